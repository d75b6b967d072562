"""A vLLM server that decodes with an exported draft says what the target says."""

from __future__ import annotations

import base64
import io
import json
import re
import socket

import httpx
import pytest

from kd.data import Collator, Renderer
from kd.dflash import DecayWeighting, DraftConfig, Target, export_draft, generate
from kd.model import cut
from tests.dflash.conftest import BLOCK, TAPS, TOKENS, Pair, sample, save
from tests.vllm.conftest import MAX_LENGTH, LiveServer, random_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

SAMPLES = [sample(i) for i in range(12)]


@pytest.fixture
def pair(processor) -> Pair:
    """Image features are added between its first layers, which are tapped."""
    config = DraftConfig(
        block_size=BLOCK,
        num_layers=2,
        target_layer_ids=TAPS,
        mask_token="<|video_pad|>",
        weighting=DecayWeighting(),
    )
    collator = Collator(Renderer(processor), None, MAX_LENGTH, lockstep=False)
    return Pair(
        Target(random_model(processor, seed=1, layers=4), TAPS), processor, collator, config
    )


def asked(url: str, row) -> list[int]:
    """The tokens of a greedy response."""
    images = iter(row.images)
    messages = []
    for message in row.messages:
        content = [
            {"type": "image_url", "image_url": {"url": data_uri(next(images))}}
            if part["type"] == "image"
            else part
            for part in message["content"]
            if isinstance(part, dict)
        ]
        messages.append({"role": message["role"], "content": content or message["content"]})
    body = {"messages": messages, "temperature": 0, "max_tokens": TOKENS, "return_token_ids": True}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120, trust_env=False)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["token_ids"]


def data_uri(image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def counter(url: str, name: str) -> float:
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    return sum(float(x) for x in re.findall(rf"^vllm:{name}_total\{{.*\}} (\S+)$", text, re.M))


def test_a_draft_that_vllm_loads_as_it_is(pair, world, repo, tmp_path):
    prompts = pair.collator.prompts(SAMPLES)
    expected = cut(pair.target.generate(prompts, TOKENS, pair.stop_ids, []), pair.stop_ids)
    draft = pair.fitted(pair.greedy(SAMPLES[:8]), steps=150)
    ours = generate(pair.target, draft, prompts, TOKENS, pair.stop_ids)
    export_draft(tmp_path / "draft", draft, "float32", world)
    speculative = {
        "method": "dflash",
        "model": str(tmp_path / "draft"),
        "num_speculative_tokens": BLOCK - 1,
    }
    options = "--speculative-config", json.dumps(speculative)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = save(pair, tmp_path / "target")
    live = LiveServer(repo, folder, port, options)
    live.start()
    try:
        live.wait()
        assert [asked(live.url, row) for row in SAMPLES] == [ids for ids, _ in expected]
        steps = counter(live.url, "spec_decode_num_drafts")
        accepted = counter(live.url, "spec_decode_num_accepted_tokens")
    finally:
        live.kill()
    ours_accepted = sum(len(row.response_ids) - 1 - row.num_steps for row in ours)
    assert accepted / steps > 0.8 * ours_accepted / sum(row.num_steps for row in ours)
