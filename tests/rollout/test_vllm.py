"""The vllm engine against a stand-in that misbehaves. The real server is in tests/vllm."""

from __future__ import annotations

import base64
import io
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig

from kd.data import Collator, Renderer
from kd.model import VLM, LoRAConfig, ScratchModel
from kd.model.tiny import build_processor
from kd.parallel import ParallelConfig, World
from kd.rollout import Policy, Sampling
from kd.rollout.vllm import VllmEngineConfig
from kd.types import Sample, UserError
from tests.processes import LIMIT_S

TEXTS = ["What is in the picture?", "A red square.", "A blue circle."]
SCRATCH = ScratchModel(
    architecture={
        "model_type": "qwen3_5",
        "tie_word_embeddings": True,
        "text_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "layer_types": ["full_attention"],
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 1.0,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
        },
    }
)
EOS_AND = [2, 300]
STALE = 299
"""The token that a stand-in responds with which has only the weights it was started with."""


@dataclass
class State:
    """Of a stand-in: what it holds, what it was asked, and how it errs."""

    root: str
    tokenize: Callable[[list[dict[str, Any]]], list[int]]
    version: str = "default"
    max_model_len: int = 256
    asked: list[str] = field(default_factory=list)
    trouble: Callable[[State, str, int], tuple[int, bytes] | None] = lambda state, path, count: None
    """Given how often a path was asked, an answer (status, body) in place of the right one."""

    def count(self, path: str) -> int:
        return self.asked.count(path)

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        match path:
            case "/weight_info":
                return {"weight_version": self.version}
            case "/v1/models":
                card = {"id": "tiny", "root": self.root, "max_model_len": self.max_model_len}
                return {"data": [card]}
            case "/tokenize":
                return {"tokens": self.tokenize(body["messages"])}
            case "/collective_rpc":
                assert load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors")
            case "/update_weight_version":
                self.version = body["new_version"]
            case "/v1/chat/completions":
                return self.chat(body)
        return {"success": True}

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """Responses that tell the prompt, the seed and the number: never two alike."""
        prompt_ids = self.tokenize(body["messages"])
        time.sleep(0.05 * (sum(prompt_ids) % 3))  # out of order
        first = 298 if "/" in self.version else STALE
        choices = [
            {"index": k, "finish_reason": "stop", "token_ids": [first, k, *prompt_ids[-30:], 300]}
            for k in range(body["n"])
        ]
        return {"choices": choices[::-1], "prompt_token_ids": prompt_ids}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: State

    def do_GET(self) -> None:
        self.reply({})

    def do_POST(self) -> None:
        self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def reply(self, body: dict[str, Any]) -> None:
        path = self.path.split("?")[0]
        self.state.asked.append(path)
        trouble = self.state.trouble(self.state, path, self.state.count(path))
        status, content = trouble or (200, json.dumps(self.state.answer(path, body)).encode())
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@dataclass
class Standin:
    state: State
    server: ThreadingHTTPServer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def processor():
    return build_processor(TEXTS, 320)


@pytest.fixture(scope="module")
def root(processor, tmp_path_factory) -> Path:
    """The folder that is served."""
    folder = tmp_path_factory.mktemp("served")
    SCRATCH.build(processor, with_weights=True).config.save_pretrained(folder)
    return folder


@pytest.fixture
def standin(processor, root) -> Iterator[Callable[[], Standin]]:
    """Starts stand-ins."""
    render = Renderer(processor)
    started: list[Standin] = []

    def tokenize(messages: list[dict[str, Any]]) -> list[int]:
        return render.prompt(received(messages)).ids_S.tolist()

    def start() -> Standin:
        state = State(str(root), tokenize)
        handler = type("Of", (Handler,), {"state": state})
        made = Standin(state, ThreadingHTTPServer(("127.0.0.1", 0), handler))
        made.server.daemon_threads = True
        threading.Thread(target=made.server.serve_forever, args=(0.05,), daemon=True).start()
        started.append(made)
        return made

    yield start
    for made in started:
        made.stop()


def received(messages: list[dict[str, Any]]) -> Sample:
    """The sample that came over the wire."""
    images, turns = [], []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            images += [picture(part) for part in content if part["type"] == "image_url"]
            content = [p if p["type"] == "text" else {"type": "image"} for p in content]
        turns.append({**message, "content": content})
    return Sample("received", turns, images, None)


def picture(part: dict[str, Any]) -> Image.Image:
    head, data = part["image_url"]["url"].split(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def make_policy(processor, world: World, folder: Path, vlm: VLM | None = None) -> Policy:
    return Policy(
        vlm=vlm or VLM(SCRATCH.build(processor, with_weights=True)),
        processor=processor,
        prompts=Collator(Renderer(processor), None, 256, lockstep=world.size > 1).prompts,
        stop_ids=EOS_AND,
        forbidden_ids=[],
        world=world,
        max_length=256,
        folder=folder,
    )


@pytest.fixture
def policy(processor, tmp_path) -> Iterator[Policy]:
    world = ParallelConfig(device="cpu", cpu_threads=1).build()
    yield make_policy(processor, world, tmp_path)
    world.close()


def config(*standins: Standin, **changes) -> VllmEngineConfig:
    urls = [s.url for s in standins]
    quick = VllmEngineConfig(urls=urls, timeout_s=LIMIT_S, retries=2, wait_s=0.0)
    return replace(quick, **changes)


def prompts() -> list[Sample]:
    """With no, one and two images."""
    samples = []
    for i in range(6):
        images = [Image.new("RGB", (32 + 32 * k, 64), (40 * i, 0, 0)) for k in range(i % 3)]
        content = [*[{"type": "image"} for _ in images], {"type": "text", "text": f"Row {i}?"}]
        samples.append(Sample(str(i), [{"role": "user", "content": content}], images, None))
    return samples


def generate(engine, rows: list[Sample] | None = None):
    rows = prompts() if rows is None else rows
    return engine.generate(rows, 3, Sampling(max_new_tokens=40), list(range(len(rows))))


def expected(policy: Policy) -> list[list[int]]:
    """What stand-ins with the weights of a run respond."""
    responses = []
    for sample in prompts():
        inputs = policy.prompts([sample])
        ids = inputs.input_ids_BS[0][inputs.attention_mask_BS[0].bool()].tolist()
        responses += [[298, k, *ids[-30:], 300] for k in range(3)]
    return responses


def synced(policy: Policy, *standins: Standin, **changes):
    engine = config(*standins, **changes).build(policy)
    engine.sync(0)
    return engine


def fails(path: str, times: int, status: int = 500, body: bytes = b"{}"):
    """The first `times` requests of `path` are answered like this."""
    return lambda state, asked, count: (status, body) if asked == path and count <= times else None


CHAT = "/v1/chat/completions"


def test_responses_belong_to_their_prompts_whatever_comes_first(policy, standin):
    one, two = standin(), standin()
    rollouts = generate(synced(policy, one, two))
    assert [r.response_ids for r in rollouts] == expected(policy)
    assert [r.sample.id for r in rollouts] == [str(i) for i in range(6) for _ in range(3)]
    assert all(r.finished and r.policy_step == 0 for r in rollouts)
    assert one.state.count(CHAT) == two.state.count(CHAT) == 3


def test_no_more_requests_in_flight_than_allowed(policy, standin):
    server = standin()
    flying, most = [], []

    def watch(state, path, count):
        if path == CHAT:
            flying.append(count)
            most.append(len(flying))
            time.sleep(0.05)
            flying.remove(count)

    server.state.trouble = watch
    generate(synced(policy, server, max_concurrency=2))
    assert max(most) == 2


def test_an_error_of_the_server_is_tried_again(policy, standin):
    server = standin()
    engine = synced(policy, server)
    server.state.trouble = fails(CHAT, 2)
    assert [r.response_ids for r in generate(engine)] == expected(policy)
    assert server.state.count(CHAT) == 8


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (500, b'{"error": {"message": "out of memory"}}', "answers 500: out of memory"),
        (200, b"<html>", "answers no JSON: '<html>'"),
        (200, b"[]", "answers no JSON object"),
        (200, b"{}", "answers something else than a chat completion: 'choices'"),
        (
            200,
            b'{"choices": [{"index": 0, "finish_reason": "abort", "token_ids": []}]}',
            "has ended a response by 'abort'",
        ),
        (200, b'{"choices": [], "prompt_token_ids": []}', "0 responses, not 3"),
    ],
)
def test_errors_that_do_not_end_end_the_run(policy, standin, status, body, says):
    server = standin()
    engine = synced(policy, server, retries=1)
    server.state.trouble = fails(CHAT, 99, status, body)
    with pytest.raises(UserError, match=f"failed 2 times, at last: {server.url}.*{says}"):
        generate(engine, prompts()[:1])
    assert server.state.count(CHAT) == 2


def test_a_refusal_is_shown_and_not_tried_again(policy, standin):
    server = standin()
    engine = synced(policy, server)
    body = b'{"error": {"message": "max_tokens=600 cannot be greater"}}'
    server.state.trouble = fails(CHAT, 99, 400, body)
    with pytest.raises(UserError, match=r"refuses the request \(400\): max_tokens=600 cannot"):
        generate(engine, prompts()[:1])
    assert server.state.count(CHAT) == 1


def hangs(over: threading.Event, path: str) -> Callable[[State, str, int], None]:
    """No reply to requests below `path` before it is over."""

    def trouble(state: State, asked: str, count: int) -> None:
        if asked.startswith(path):
            over.wait(LIMIT_S)

    return trouble


def test_a_server_that_hangs_is_given_up(policy, standin):
    server = standin()
    engine = synced(policy, server, timeout_s=3, retries=1)
    over = threading.Event()
    server.state.trouble = hangs(over, CHAT)
    with pytest.raises(UserError, match=r"completions has not answered within 3 s"):
        generate(engine, prompts()[:1])
    over.set()


def test_a_server_that_hangs_altogether_is_waited_for_no_longer_than_asked(policy, standin):
    server = standin()
    engine = synced(policy, server, timeout_s=3, wait_s=1.0)
    over = threading.Event()
    server.state.trouble = hangs(over, "")
    with pytest.raises(UserError, match=r"no vLLM server was of use for 1 s: .*within 3 s"):
        generate(engine)
    over.set()


def test_the_other_server_stands_in_for_one_that_is_away(policy, standin, caplog):
    one, two = standin(), standin()
    engine = synced(policy, one, two)
    one.stop()
    assert [r.response_ids for r in generate(engine)] == expected(policy)
    with caplog.at_level(logging.WARNING):
        engine.sync(1)
    assert f"not handed over yet: {one.url}" in caplog.text
    assert {r.policy_step for r in generate(engine)} == {1}
    two.stop()
    with pytest.raises(UserError, match=r"no vLLM server was of use for 0 s: .*(?s:.*)Start it"):
        generate(engine)


def test_no_server_at_the_start(policy, standin):
    server = standin()
    server.stop()
    with pytest.raises(UserError, match=f"{server.url}/weight_info: .*connection"):
        config(server, wait_s=0.5).build(policy)


def test_a_server_that_starts_late_is_waited_for(policy, standin):
    server = standin()
    server.state.trouble = fails("/weight_info", 3, 503)
    assert len(generate(synced(policy, server, wait_s=20))) == 18


@pytest.mark.parametrize(
    ("path", "status", "body", "says"),
    [
        ("/weight_info", 404, b"Not Found", "VLLM_SERVER_DEV_MODE=1"),
        ("/tokenize", 200, b'{"tokens": [1, 2]}', "reads a prompt of 2 tokens where the run has"),
        ("/tokenize", 404, b"Not Found", r"refuses the request \(404\): Not Found"),
    ],
)
def test_a_server_of_no_use_is_refused_at_the_start(policy, standin, path, status, body, says):
    server = standin()
    server.state.trouble = fails(path, 99, status, body)
    with pytest.raises(UserError, match=says):
        config(server).build(policy)


def test_a_server_too_short_or_of_another_name_is_refused(policy, standin):
    server = standin()
    with pytest.raises(UserError, match="does not serve big, but tiny"):
        config(server, model="big").build(policy)
    server.state.max_model_len = 255
    with pytest.raises(UserError, match="255 tokens, the run needs 256"):
        config(server).build(policy)


def test_a_server_of_another_size_is_refused(policy, standin, processor, tmp_path):
    text = {**SCRATCH.architecture["text_config"], "intermediate_size": 96}
    other = replace(SCRATCH, architecture={**SCRATCH.architecture, "text_config": text})
    other.build(processor, with_weights=True).config.save_pretrained(tmp_path / "other")
    server = standin()
    server.state.root = str(tmp_path / "other")
    with pytest.raises(UserError, match=r"3 differ, first .*gate_proj.*: \(96, 32\), not \(64, 32"):
        config(server).build(policy)


def test_a_server_of_a_model_without_images_is_refused(policy, standin, tmp_path):
    AutoConfig.for_model("qwen3").save_pretrained(tmp_path / "text")
    server = standin()
    server.state.root = str(tmp_path / "text")
    with pytest.raises(UserError, match="which is no model that reads images"):
        config(server).build(policy)


def test_a_model_that_cannot_be_looked_at_is_told_of(policy, standin, caplog):
    server = standin()
    server.state.root = "/on/another/machine"
    with caplog.at_level(logging.WARNING):
        config(server).build(policy)
    assert "/on/another/machine, which cannot be read here" in caplog.text


def test_other_prompt_ids_than_ours_are_refused(policy, standin):
    server = standin()
    engine = synced(policy, server)
    right = server.state.tokenize
    server.state.tokenize = lambda messages: [*right(messages)[:9], 77, *right(messages)[10:]]
    with pytest.raises(UserError, match=r"they differ from token 9 on \(\[77, "):
        generate(engine)


def test_a_stop_id_that_is_not_ours_is_refused(policy, standin):
    server = standin()
    engine = synced(policy, server)
    engine.policy.stop_ids = [2]
    with pytest.raises(UserError, match=r"ended a response with token 300 .* stop ids are"):
        generate(engine)


def test_empty_responses_are_handed_on(policy, standin):
    server = standin()
    engine = synced(policy, server)
    ids = policy.prompts(prompts()[:1]).input_ids_BS[0].tolist()
    choices = [{"index": k, "finish_reason": "stop", "token_ids": []} for k in range(3)]
    body = json.dumps({"choices": choices, "prompt_token_ids": ids}).encode()
    server.state.trouble = fails(CHAT, 1, 200, body)
    rollouts = generate(engine, prompts()[:1])
    assert [(r.response_ids, r.finished) for r in rollouts] == [([], False)] * 3


def test_a_server_brought_back_is_given_the_weights_before_it_is_used(policy, standin):
    server = standin()
    engine = synced(policy, server)
    server.state.version = "default"
    assert [r.response_ids for r in generate(engine)] == expected(policy)
    assert server.state.count("/collective_rpc") == 2


def test_what_a_server_brought_back_has_responded_is_not_used(policy, standin):
    server = standin()
    engine = synced(policy, server, max_concurrency=2)

    def restart(state, path, count):
        if path == CHAT and count == 3:
            state.version = "default"

    server.state.trouble = restart
    assert [r.response_ids for r in generate(engine)] == expected(policy)
    assert server.state.count("/collective_rpc") == 2
    assert server.state.count(CHAT) == 12


def test_weights_that_never_stay_end_the_run(policy, standin):
    server = standin()
    engine = synced(policy, server, retries=1)

    def restart(state, path, count):
        if path == CHAT:
            state.version = "default"

    server.state.trouble = restart
    with pytest.raises(UserError, match=r"2 times in succession\. Does another run use them"):
        generate(engine)


def test_weights_are_whole_before_they_are_loaded_and_older_ones_go(policy, standin):
    server = standin()
    engine = synced(policy, server)
    with torch.no_grad():
        policy.vlm.model.get_input_embeddings().weight.fill_(0.5)
    engine.sync(3)
    folder = policy.folder / "rollout_weights"
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["step_000003"]
    state = load_file(folder / "step_000003" / "model.safetensors")
    name = next(name for name in state if "embed_tokens" in name)
    for tied in (name, "lm_head.weight"):
        assert state[tied].dtype == torch.bfloat16 and state[tied].eq(0.5).all()
    assert server.state.asked.index("/pause") < server.state.asked.index("/collective_rpc")
    engine.close()
    assert not folder.exists()


def test_adapters_are_handed_over_merged(policy, standin):
    model = policy.vlm.model
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    policy.vlm.adapters = LoRAConfig(rank=2, alpha=6.0).inject(model, 0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_()
    engine = synced(policy, standin(), weights_dtype="float32")
    state = load_file(engine.weights.folder / "model.safetensors")
    assert set(state) == {*plain, "lm_head.weight"}
    layer = policy.vlm.adapters.layers[0]
    a, b = (model.get_parameter(f"{layer}.lora_{x}.default.weight") for x in "AB")
    weight = f"{layer}.weight"
    torch.testing.assert_close(state[weight], plain[weight] + 3.0 * b @ a)
    changed = {name for name, before in plain.items() if not torch.equal(state[name], before)}
    assert changed == {f"{name}.weight" for name in policy.vlm.adapters.layers}


def test_weights_that_do_not_load_end_the_run(policy, standin):
    server = standin()
    engine = config(server).build(policy)
    body = b'{"error": {"message": "no module named layers.2"}}'
    server.state.trouble = fails("/collective_rpc", 99, 500, body)
    with pytest.raises(UserError, match=r"cannot be loaded: .*no module named layers\.2"):
        engine.sync(0)
    assert server.state.version == "loading"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"urls": []}, "give one or more"),
        ({"urls": ["http://a", "http://a"]}, "each once"),
        ({"urls": ["localhost:8000"]}, "should look like"),
        ({"sync_every": 0}, "sync_every=0"),
        ({"timeout_s": 0}, "positive timeout_s"),
        ({"weights_dtype": "fp16"}, "weights_dtype=fp16: use one of float32"),
    ],
)
def test_values_out_of_range(changes, says):
    with pytest.raises(UserError, match=f"rollout.engine.*{says}"):
        replace(VllmEngineConfig(), **changes).validate("rollout.engine")
    VllmEngineConfig().validate("rollout.engine")


def rank_of_two(rank: int, urls: list[str], folder: Path) -> None:
    """Sharded weights reach the server whole, each rank generates its own, and both end alike."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    mesh = torch.distributed.init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
    world = World(mesh, torch.device("cpu"), rank, 2)
    processor = build_processor(TEXTS, 320)
    vlm = VLM(SCRATCH.build(processor, with_weights=True))
    whole = {name: p.detach().clone() for name, p in vlm.model.named_parameters()}
    vlm.distribute(world, ParallelConfig(device="cpu"))
    policy = make_policy(processor, world, folder, vlm)
    made = VllmEngineConfig(urls=urls, timeout_s=LIMIT_S, wait_s=0.0, weights_dtype="float32")
    engine = made.build(policy)
    engine.sync(0)
    state = load_file(folder / "rollout_weights" / "step_000000" / "model.safetensors")
    assert state.keys() == {*whole, "lm_head.weight"}  # also where it is tied
    assert all(torch.equal(state[name], value) for name, value in whole.items())
    rows = prompts()[rank::2]
    found = [r.response_ids for r in generate(engine, rows)]
    assert found == [expected(policy)[3 * int(row.id) + k] for row in rows for k in range(3)]
    with pytest.raises(UserError if rank == 0 else SystemExit):
        replace(made, model="another").build(policy)


def test_two_ranks(standin, tmp_path):
    server = standin()
    mp.start_processes(rank_of_two, ([server.url], tmp_path), nprocs=2, start_method="forkserver")
    assert server.state.count("/collective_rpc") == 1
