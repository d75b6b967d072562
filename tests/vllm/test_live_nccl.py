"""Weights streamed into a real server, by its own routes and its own packed transfer.

On a CPU, so NCCL is not there: a plugin of the server (tests/rollout/gloo_standin.py) puts gloo in
its place, and in that of CUDA streams. Run by scripts/test_vllm.sh.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from kd.model import LoRAConfig
from kd.rollout.vllm import VllmEngine, VllmEngineConfig
from kd.rollout.vllm_nccl import NcclTransfer
from kd.types import Rollout, UserError
from tests.rollout import gloo_standin
from tests.vllm.conftest import LiveServer, serving
from tests.vllm.test_live_engine import PROMPTS, SAMPLING, SEEDS, ids, served, student_logp

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
OPTIONS = ("--weight-transfer-config", '{"backend": "nccl"}')


@pytest.fixture(scope="module")
def nccl_server(
    repo: Path, processor, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """With the stand-in as a plugin."""
    plugin = tmp_path_factory.mktemp("plugin")
    shutil.copy(gloo_standin.__file__, plugin)
    about = plugin / "kd_gloo_standin-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: kd-gloo-standin\nVersion: 0\n")
    point = "[vllm.general_plugins]\nkd_gloo_standin = gloo_standin:register\n"
    (about / "entry_points.txt").write_text(point)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(plugin))
        with serving(repo, processor, tmp_path_factory.mktemp("nccl"), *OPTIONS) as live:
            yield live


def engine_of(server: LiveServer, policy, **changes) -> VllmEngine:
    config = VllmEngineConfig(
        urls=[server.url], weights_dtype="float32", timeout_s=120, wait_s=5, retries=1, **changes
    )
    # Buffers of 64 KiB: the tiny model fills several.
    transfer = NcclTransfer(policy, config, gloo_standin.GlooCommunicator, 2**16)
    return config.connect(policy, transfer)


def difference(engine: VllmEngine) -> float:
    """Of the log-probs of responses: the server's and the model's that is trained."""
    worst = []
    for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
        response, logp = served(engine, prompt, seed)
        ours = student_logp(engine.policy, [Rollout(prompt, response, True, 0)])
        worst.append((ours - logp).abs().max().item())
    return max(worst)


def test_streamed_weights_are_taken_over_again_and_again(nccl_server, make_policy):
    engine = engine_of(nccl_server, make_policy())
    engine.sync(0)
    assert difference(engine) < 1e-4
    before = ids(engine.generate(PROMPTS, 1, SAMPLING, SEEDS))
    groups = dict(engine.transfer.groups._joined)
    for step in (1, 2):
        with torch.no_grad():
            for parameter in engine.policy.vlm.parameters():
                parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
        assert difference(engine) > 0.1
        engine.sync(step)
        assert difference(engine) < 1e-4
    assert engine.transfer.groups._joined == groups, "joined once"
    rollouts = engine.generate(PROMPTS, 1, SAMPLING, SEEDS)
    assert ids(rollouts) != before and {r.policy_step for r in rollouts} == {2}
    assert not (engine.policy.folder / "rollout_weights").exists()
    engine.close()


def test_adapters_are_streamed_merged(nccl_server, make_policy):
    policy = make_policy(4)
    policy.vlm.adapters = LoRAConfig(rank=2, alpha=6.0).inject(policy.vlm.model, 0)
    for name, parameter in policy.vlm.model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.1)
    engine = engine_of(nccl_server, policy)
    engine.sync(0)
    assert difference(engine) < 1e-4


def test_another_run_on_the_same_server_joins_anew(nccl_server, make_policy):
    engine = engine_of(nccl_server, make_policy(5))
    engine.sync(0)
    other = engine_of(nccl_server, make_policy(6))
    other.sync(0)
    assert difference(other) < 1e-4
    with pytest.raises(UserError, match=r"does not hold this step's weights"):
        engine.generate(PROMPTS, 1, SAMPLING, SEEDS)
    engine.sync(1)
    assert difference(engine) < 1e-4


def test_a_server_of_another_size_says_so(nccl_server, make_policy):
    """Past the handshake, as where the served folder cannot be read here."""
    policy = make_policy(7)
    engine = engine_of(nccl_server, policy)
    policy.vlm.model.get_decoder().layers[0].register_parameter(
        "unknown", torch.nn.Parameter(torch.zeros(3))
    )
    engine.transfer = NcclTransfer(policy, engine.config, gloo_standin.GlooCommunicator)
    with pytest.raises(UserError, match=r"cannot take the weights over NCCL: .*unknown"):
        engine.sync(0)


def test_a_server_without_the_option_is_refused(server, make_policy):
    with pytest.raises(UserError, match=r"Weight transfer not configured.*KD_VLLM_TRANSFER=nccl"):
        engine_of(server, make_policy())


def test_nccl_itself_is_not_there(nccl_server):
    """What the real routes answer without the stand-in's part: an id that is not one."""
    info = {"nccl_unique_id_b64": "AAAA", "rank_offset": 1, "world_size": 2}
    url = f"{nccl_server.url}/init_weight_transfer_engine"
    reply = httpx.post(url, json={"init_info": info}, trust_env=False, timeout=60)
    assert reply.status_code == 500 and "must decode to 128 bytes" in reply.text
    assert os.environ.get("PYTHONPATH") is None or "plugin" not in os.environ["PYTHONPATH"]
