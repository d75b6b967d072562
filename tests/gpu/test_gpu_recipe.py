"""Tiny models on rows with images: bf16 against fp32, resume, offloads, profile, generation."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import count_syncs
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from kd.config import register, to_object, validate
from kd.launch import config_dir
from kd.rollout.engine import Sampling
from kd.rollout.hf import HFEngine, HFEngineConfig
from recipes.vlm_kd import VlmKD
from tests.conftest import metrics
from tests.gpu.test_gpu_attention import plain_torch
from tests.model.families import write
from tests.test_profile import PARTS, table

FAMILIES = ("qwen3_5_hybrid", "qwen3_vl")
STEPS, SAVED = 5, 3
KEYS = ("train/loss", "train/ce", "train/kd")
BF16 = ["parallel=bf16", "teacher.dtype=bfloat16"]
FP32 = ["parallel=fsdp", "teacher.dtype=float32"]


@pytest.fixture
def deterministic(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sums in one order also on a GPU, where an operator can do that."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(device == "cuda", warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def overrides(folder: Path, family: str) -> list[str]:
    """Of qwen_vl_kd: a student and a teacher of the family, rows with one image, two or none."""
    lines = []
    for i in range(12):
        name, count = f"{i}.png", (1, 0, 2)[i % 3]
        Image.new("RGB", (64, 32 + 32 * (i % 2)), (20 * i, 90, 250 - 20 * i)).save(folder / name)
        images = [{"type": "image", "path": name}] * count
        content = [*images, {"type": "text", "text": "What is in the picture?"}]
        answer = ("A red square.", "A blue circle.")[i % 2]
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": turns}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    for seed, name in enumerate(("student", "teacher")):
        if not (folder / name).exists():
            write(family, folder / name, seed)
    return [
        *("student=pretrained", f"student.name={folder / 'student'}", "student.freeze=[]"),
        *("teacher=local", f"teacher.name={folder / 'teacher'}", "data=conversations"),
        *(f"data.path={folder / 'rows.jsonl'}", "data.num_workers=0", "data.val_samples=null"),
        *("train.micro_batch_size=4", "train.global_batch_size=8", f"train.max_steps={STEPS}"),
        *("train.val_every=null", "train.log_every=1", "train.save_every=null", "doctor=never"),
        *("optim.lr=1e-4", "optim.warmup_steps=0", "optim.schedule=constant"),
        *("data.max_length=512", "parallel.cpu_threads=1"),
    ]


@pytest.fixture
def run(train: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A run of `overrides`; returns its directory."""

    def start(family: str, name: str, *more: str) -> Path:
        folder = tmp_path / family
        folder.mkdir(exist_ok=True)
        options = [*overrides(folder, family), *more]
        with plain_torch() if "parallel.device=cpu" in more else contextlib.nullcontext():
            return train("qwen_vl_kd", name, *options, fast=False)

    return start


def losses(run_dir: Path) -> dict[str, list[float]]:
    """By name, of all steps."""
    found = {key: list(metrics(run_dir, key).values()) for key in KEYS}
    assert all(len(values) == STEPS for values in found.values())
    return found


def furthest(run_dir: Path, expected: Path) -> float:
    """The largest relative difference of a loss."""
    ours, wanted = losses(run_dir), losses(expected)
    return max(
        abs(a - b) / abs(b) for key in KEYS for a, b in zip(ours[key], wanted[key], strict=True)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_and_resume(run, device, found, deterministic, family):
    expected = run(family, "fp32", *FP32, "parallel.device=cpu")
    options = [*BF16, f"parallel.device={device}", f"train.save_every={SAVED}"]
    options += ["checkpoint.save_async=true", "checkpoint.keep_last=3"]
    bf16 = run(family, "bf16", *options)
    difference = furthest(bf16, expected)
    found(f"{family}: bf16 against fp32 on a CPU", difference)
    assert difference < 0.02

    straight = losses(bf16)
    last = sorted((bf16 / "checkpoints").glob("step_*"))[-1]
    assert last.name.endswith(f"{STEPS}")
    shutil.rmtree(last)
    run(family, "bf16", *options)
    resumed = losses(bf16)
    gaps = [abs(a - b) for key in KEYS for a, b in zip(straight[key], resumed[key], strict=True)]
    found(f"{family}: resumed after step {SAVED}, largest difference", max(gaps))
    assert resumed == straight


def step_s(run_dir: Path) -> str:
    """Of the steps after the first, which warms up."""
    seconds = sorted(list(metrics(run_dir, "train/step_s").values())[1:])
    return f"{1000 * seconds[len(seconds) // 2]:.0f} ms"


def test_offloads(run, device, found, deterministic):
    """What leaves the device between uses, or stays in host memory, trains the same."""
    options = [*BF16, f"parallel.device={device}"]
    plain = run("qwen3_vl", "plain", *options)
    found("step, plain", step_s(plain))
    for key, tolerance in {
        "teacher.offload": 0.0,
        "teacher.cpu_offload": 0.0,
        "parallel.cpu_offload": 1e-3,  # AdamW steps on a CPU, which rounds otherwise
    }.items():
        offloaded = run("qwen3_vl", key, *options, f"{key}=true")
        difference = furthest(offloaded, plain)
        found(key, f"step {step_s(offloaded)}, difference of a loss {difference:.1e}")
        assert difference <= tolerance, key


def test_profile(run, device, found):
    options = [*BF16, f"parallel.device={device}", "profile=true", "profile_steps=[3,4]"]
    run_dir = run("qwen3_vl", "profiled", *options)
    times = table(run_dir)
    parts = [name for name in times if name in PARTS]
    found("ms of a step", {name: times[name] for name in ("step", *parts)})
    assert {"teacher", "student", "loss", "backward", "optimizer"} <= {*parts}
    assert sum(times[name] for name in parts) == pytest.approx(times["step"], abs=1)
    if device == "cuda":
        text = (run_dir / "profile.txt").read_text()
        assert "device idle" in text, "no kernel is in the trace"


@contextlib.contextmanager
def recipe(folder: Path, family: str, device: str) -> Iterator[VlmKD]:
    """The recipe in bf16, before its first step."""
    register()
    options = [*overrides(folder, family), *BF16, f"parallel.device={device}"]
    with initialize_config_dir(config_dir(), version_base="1.3"):
        config = to_object(compose("qwen_vl_kd", overrides=options))
    validate(config)
    world = config.parallel.build()
    try:
        yield VlmKD(config, world)
    finally:
        world.close()


def test_generation(device, found, tmp_path):
    """The gathered weights are those that blocks gather for themselves, token by token."""
    num_prompts, length = (16, 64) if device == "cuda" else (4, 16)
    with recipe(tmp_path, "qwen3_vl", device) as made:
        prompts = [made.rows[i % len(made.rows)] for i in range(num_prompts)]
        sampling = Sampling(max_new_tokens=length, temperature=1.0)
        responses = []
        for gather in (True, False):
            engine = HFEngine(made.student_policy, HFEngineConfig(gather=gather))
            start_s = time.perf_counter()
            rollouts = engine.generate(prompts, 1, sampling, list(range(num_prompts)))
            found(f"s, gather={gather}".lower(), time.perf_counter() - start_s)
            responses.append([rollout.response_ids for rollout in rollouts])
    found("tokens", sum(map(len, responses[0])))
    assert responses[0] == responses[1]
    assert len({tuple(ids) for ids in responses[0]}) > num_prompts // 2, "all alike"


@pytest.mark.parametrize("family", FAMILIES)
def test_host_syncs(device, found, tmp_path, family):
    """Of the second step, by the line that waits; on a CPU, what would wait on a GPU."""
    with recipe(tmp_path, family, device) as made:
        syncs = count_syncs.count(made, steps=1)
    found(f"{family}: host syncs of a step of 2 micro-batches", syncs.total())
    most = {f"{line} {what}": number for (line, what), number in syncs.most_common(8)}
    found(f"{family}: most often", most)
    assert syncs.total() > 0, "the step's metrics are read"
