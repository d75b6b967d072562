"""The memory that `kd.plan` predicts for one GPU against what the allocator takes."""

from __future__ import annotations

import json
from pathlib import Path

import bench_plan
import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import AutoConfig, AutoModelForImageTextToText

from kd.config import VlmKDConfig, register, to_object, validate
from kd.footprint import make_plan
from kd.launch import config_dir
from kd.metrics import peak_mem_gib
from kd.model.tiny import build_processor
from recipes.vlm_kd import VlmKD

GIB = 2**30
SIZES = {
    "cuda": {"student": (2560, 8), "teacher": (4096, 4), "vocab": 151_936, "tokens": 1024},
    "cpu": {"student": (128, 2), "teacher": (256, 2), "vocab": 512, "tokens": 64},
}
"""Hidden size and layers: eight layers as wide as those of a 4B, four as those of a 9B."""


def write_models(folder: Path, device: str) -> None:
    """Random weights in bf16, made on the device: on a CPU that alone would take the time."""
    sizes, processor = SIZES[device], build_processor(["one two three"])
    tokens = {f"{x}_token_id": getattr(processor, f"{x}_token_id") for x in ("image", "video")}
    for name in ("student", "teacher"):
        values = bench_plan.architecture(*sizes[name])
        values["text_config"]["vocab_size"] = sizes["vocab"]
        config = AutoConfig.for_model("qwen3_vl", **values, **tokens)
        with torch.device(device):
            model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    turns = [
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "a" * (sizes["tokens"] - 32)},
    ]
    lines = [json.dumps({"id": str(i), "messages": turns}) for i in range(16)]
    (folder / "rows.jsonl").write_text("\n".join(lines))


def config_of(folder: Path, device: str) -> VlmKDConfig:
    register()
    overrides = [
        *("student=pretrained", f"student.name={folder / 'student'}", "student.freeze=[]"),
        *("teacher=local", f"teacher.name={folder / 'teacher'}", "parallel=bf16"),
        *("data=conversations", f"data.path={folder / 'rows.jsonl'}", "data.num_workers=0"),
        *("train.micro_batch_size=4", "train.global_batch_size=4", "train.val_every=null"),
        *(f"data.max_length={SIZES[device]['tokens']}", f"parallel.device={device}"),
        *("doctor=never", "parallel.cpu_threads=1"),
    ]
    with initialize_config_dir(config_dir(), version_base="1.3"):
        config = to_object(compose("qwen_vl_kd", overrides=overrides))
    validate(config)
    return config


def test_plan(device, found, tmp_path):
    write_models(tmp_path, device)
    config = config_of(tmp_path, device)
    predicted_gib = make_plan(config).total / GIB
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    world = config.parallel.build()
    recipe = VlmKD(config, world)
    for _ in range(3):  # AdamW makes its moments in the first
        metrics = recipe.train_step()
    peak_gib = peak_mem_gib(world.device)
    if device == "cuda":
        found("GiB allocated at the peak", torch.cuda.max_memory_allocated() / GIB)
        peak_gib = torch.cuda.max_memory_reserved() / GIB
    world.close()
    found("GiB predicted", predicted_gib)
    found("GiB reserved at the peak", peak_gib)
    found("s of a step", metrics["train/step_s"])
    assert predicted_gib > 0
    if device == "cuda":
        assert predicted_gib == pytest.approx(peak_gib, rel=0.1)
