"""What `kd.plan` and `dry_run=true` predict for a rank, against the memory that a run really takes.

    python scripts/bench_plan.py

Random models of Qwen3-VL's architecture on a CPU, in float32, with 32,768 vocabulary entries; rows
of one length. Measured: the most that the process holds while it trains (resident pages, read every
5 ms over two steps), less what it holds before the models are built. glibc is told to give freed
blocks of 1 MiB and more back at once (MALLOC_MMAP_THRESHOLD_): left alone it keeps hundreds of MiB.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.utils import logging as transformers_logging

from kd.config import VlmKDConfig, register, to_object, validate
from kd.footprint import make_plan
from kd.launch import config_dir
from kd.model.tiny import build_processor
from recipes.vlm_kd import VlmKD

ROW_TOKENS, VOCAB = 384, 32_768
CASES = {
    "student and teacher": [],
    "student alone": ["kd_ratio=0"],
    "activation checkpointing": ["parallel.activation_checkpointing=true"],
    "twice the rows": ["train.micro_batch_size=4", "train.global_batch_size=8"],
    "sync after each micro-batch": ["parallel.sync_every_micro_batch=true"],
    "bfloat16": ["parallel=bf16", "parallel.activation_checkpointing=false"],
    "adapters": ["student.lora.rank=16"],
}


def architecture(width: int, layers: int) -> dict:
    """Of a model as wide and deep."""
    text = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 128,
        "head_dim": 64,
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [12, 10, 10],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "out_hidden_size": width,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [],
    }
    return {"text_config": text, "vision_config": vision, "tie_word_embeddings": True}


def write_models(folder: Path) -> None:
    """student and teacher, and rows.jsonl."""
    processor = build_processor(["one two three"])
    for name, width, layers in (("student", 512, 8), ("teacher", 768, 8)):
        config = AutoConfig.for_model("qwen3_vl", **architecture(width, layers))
        for key in ("image_token_id", "video_token_id"):
            token = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}[key]
            setattr(config, key, processor.tokenizer.convert_tokens_to_ids(token))
        AutoModelForImageTextToText.from_config(config).save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    tokens_of_prompt = 32
    answer = "a" * (ROW_TOKENS - tokens_of_prompt)
    row = {
        "messages": [
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": answer},
        ]
    }
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(64):
            file.write(json.dumps({"id": str(i), **row}) + "\n")


def config_of(folder: Path, overrides: list[str]) -> VlmKDConfig:
    """Composed and checked."""
    register()
    base = [
        *("student=pretrained", f"student.name={folder / 'student'}", "student.freeze=[]"),
        *("teacher=local", f"teacher.name={folder / 'teacher'}", "teacher.dtype=float32"),
        *("data=conversations", f"data.path={folder / 'rows.jsonl'}", "data.num_workers=0"),
        *("train.micro_batch_size=2", "train.global_batch_size=4", "train.val_every=null"),
        *(f"data.max_length={ROW_TOKENS}", "logger=jsonl", "parallel=fsdp", "doctor=never"),
        "parallel.sync_every_micro_batch=false",
    ]
    with initialize_config_dir(config_dir(), version_base="1.3"):
        config = to_object(compose("qwen_vl_kd", overrides=[*base, *overrides]))
    validate(config)
    return config


class Peak(threading.Thread):
    """The most resident memory while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.stop = 0, False

    def run(self) -> None:
        """Until `stop`."""
        while not self.stop:
            self.most = max(self.most, resident())
            time.sleep(0.005)


def resident() -> int:
    """Bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(folder: Path, name: str) -> None:
    """One case, in a process of its own: prints predicted and measured bytes."""
    config = config_of(folder, CASES[name])
    predicted = make_plan(config)
    world = config.parallel.build()
    gc.collect()
    before = resident()
    run = VlmKD(config, world)
    run.train_step()  # AdamW makes its moments
    gc.collect()
    peak = Peak()
    peak.start()
    for _ in range(2):
        run.train_step()
    peak.stop = True
    peak.join()
    print(json.dumps([predicted.total, peak.most - before]))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="predicted against measured memory")
    parser.add_argument("--case", help="of this alone, in this process")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    if args.case:
        measure(args.folder, args.case)
        return
    print("| | predicted, GiB | measured, GiB | predicted / measured |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder)
        for case in CASES:
            command = [sys.executable, __file__, "--case", case, "--folder", name]
            env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
            done = subprocess.run(command, capture_output=True, text=True, env=env)
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                raise SystemExit(1)
            predicted, measured = json.loads(done.stdout.splitlines()[-1])
            sizes = f"{predicted / 2**30:.2f} | {measured / 2**30:.2f}"
            print(f"| {case} | {sizes} | {predicted / measured:.2f} |", flush=True)


if __name__ == "__main__":
    main()
