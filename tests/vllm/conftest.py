"""A real vLLM server on this machine's CPU, serving a tiny random model that knows images."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import torch
from transformers import PreTrainedModel, ProcessorMixin

from kd.data import Collator, Renderer
from kd.data.digits import all_texts
from kd.model import VLM, ScratchModel
from kd.model.tiny import build_processor
from kd.parallel import ParallelConfig, World
from kd.rollout import Policy
from tests.processes import Process

VOCABULARY = 400
MAX_LENGTH = 512
ARCHITECTURE = {
    "model_type": "qwen3_vl",
    "tie_word_embeddings": True,
    "text_config": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
    },
    "vision_config": {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    },
}


def random_model(processor: ProcessorMixin, seed: int, layers: int = 2) -> PreTrainedModel:
    """With weights so large that its distributions are far from uniform, and hang on the image."""
    text = {**ARCHITECTURE["text_config"], "num_hidden_layers": layers}
    spec = ScratchModel(architecture={**ARCHITECTURE, "text_config": text}, seed=seed)
    model = spec.build(processor, with_weights=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model.eval()


@dataclass
class LiveServer:
    """scripts/vllm_server.sh."""

    repo: Path
    folder: Path
    port: int
    options: tuple[str, ...] = ()
    process: Process = field(init=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        script = self.repo / "scripts/vllm_server.sh"
        options = ["--dtype", "float32", "--max-model-len", str(MAX_LENGTH), "--max-num-seqs", "16"]
        command = ["bash", script, self.folder, self.port, *options, *self.options]
        self.process = Process(*command, env=dict(os.environ), one_output=True)

    def wait(self) -> None:
        self.process.wait_for(self._is_healthy)

    def _is_healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def kill(self) -> None:
        """kill -9, engine and workers included."""
        self.process.end()


@pytest.fixture(scope="session")
def processor() -> ProcessorMixin:
    return build_processor(all_texts(), VOCABULARY)


@contextlib.contextmanager
def serving(
    repo: Path, processor: ProcessorMixin, folder: Path, *options: str
) -> Iterator[LiveServer]:
    """A server of the random model of seed 1."""
    random_model(processor, seed=1).save_pretrained(folder / "served")
    processor.save_pretrained(folder / "served")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    live = LiveServer(repo, folder / "served", port, options)
    live.start()
    try:
        live.wait()
        yield live
    finally:
        live.kill()


@pytest.fixture(scope="session")
def server(
    repo: Path, processor: ProcessorMixin, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """For rollouts: started with weights which no test's policy has."""
    with serving(repo, processor, tmp_path_factory.mktemp("rollouts")) as live:
        yield live


@pytest.fixture(scope="module")
def teacher_server(
    repo: Path, processor: ProcessorMixin, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """For teaching: it keeps its weights."""
    options = ("--enable-scale-out", "--max-logprobs", str(VOCABULARY))
    with serving(repo, processor, tmp_path_factory.mktemp("teacher"), *options) as live:
        yield live


@pytest.fixture
def world() -> Iterator[World]:
    made = ParallelConfig(device="cpu", cpu_threads=1).build()
    yield made
    made.close()


@pytest.fixture
def make_policy(world: World, processor: ProcessorMixin, tmp_path: Path) -> Callable[..., Policy]:
    """A policy on a random model of this seed."""

    def make(seed: int = 2, processor: ProcessorMixin = processor, layers: int = 2) -> Policy:
        vlm = VLM(random_model(processor, seed, layers))
        return Policy(
            vlm=vlm,
            processor=processor,
            prompts=Collator(Renderer(processor), None, MAX_LENGTH, lockstep=False).prompts,
            stop_ids=[processor.tokenizer.eos_token_id],
            forbidden_ids=vlm.forbidden_ids(len(processor.tokenizer)),
            world=world,
            max_length=MAX_LENGTH,
            folder=tmp_path,
        )

    return make
