"""What `kd.plan` and `dry_run=true` predict for a rank, against the memory that a run really takes.

    python scripts/bench_plan.py

Random models of Qwen3-VL's architecture on a CPU, in float32, with 32,768 vocabulary entries; rows
of one length. Measured: the tensors that are there between two steps, and what the process
(resident pages, read every 5 ms over two steps) takes at most beyond what it has between them. So
code, compiler and threads do not count, which are no memory of a GPU. glibc is told to give freed
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
from peak_bytes import held_tensors
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.utils import logging as transformers_logging

from kd import footprint, plan_dflash
from kd.config import VlmKDConfig, register
from kd.config_dflash import DFlashConfig, register_dflash
from kd.launch import config_dir
from kd.model.tiny import build_processor
from kd.run import checked
from recipes.dflash import DFlash
from recipes.vlm_kd import VlmKD

ROW_TOKENS, VOCAB = 384, 32_768
RANKS = {"two ranks": 2, "two ranks, reduced at every micro-batch": 2}
"""Of cases that have more than one; rank 0 is measured."""
CASES = {
    "student and teacher": [],
    "student alone": ["kd_ratio=0"],
    "activation checkpointing": ["parallel.activation_checkpointing=true"],
    "twice the rows": ["train.micro_batch_size=4", "train.global_batch_size=8"],
    "one micro-batch a step": ["train.global_batch_size=2"],
    "bfloat16": ["parallel=bf16", "parallel.activation_checkpointing=false"],
    "adapters": ["student.lora.rank=16"],
    "jsd": ["loss=jsd"],
    "two ranks": ["train.global_batch_size=8", "parallel.sync_every_micro_batch=false"],
    "two ranks, reduced at every micro-batch": [
        "train.global_batch_size=8",
        "parallel.sync_every_micro_batch=true",
    ],
    "vision tower trained": ["student.name={folder}/seeing", "data.path={folder}/images.jsonl"],
    "vision tower frozen": [
        *("student.name={folder}/seeing", "data.path={folder}/images.jsonl"),
        "student.freeze=[vision_tower]",
    ],
    "dflash": [],
}


def architecture(width: int, layers: int, sight: int = 64) -> dict:
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
        "depth": 2 if sight == 64 else 8,
        "hidden_size": sight,
        "intermediate_size": 2 * sight,
        "num_heads": 4,
        "out_hidden_size": width,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [],
    }
    return {"text_config": text, "vision_config": vision, "tie_word_embeddings": True}


def write_models(folder: Path) -> None:
    """student and teacher, and rows.jsonl."""
    processor = build_processor(["one two three"])
    models = {"student": (512, 8), "teacher": (768, 8), "seeing": (512, 8, 256)}
    for name, sizes in models.items():
        config = AutoConfig.for_model("qwen3_vl", **architecture(*sizes))
        for key in ("image_token_id", "video_token_id"):
            token = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}[key]
            setattr(config, key, processor.tokenizer.convert_tokens_to_ids(token))
        AutoModelForImageTextToText.from_config(config).save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    tokens_of_prompt, tokens_of_image = 32, 256
    Image.new("RGB", (512, 512), "teal").save(folder / "image.png")
    image = {"type": "image", "path": "image.png"}
    for name, parts, taken in (("rows", [], 0), ("images", [image], tokens_of_image)):
        content = [*parts, {"type": "text", "text": "b"}]
        answer = "a" * (ROW_TOKENS - tokens_of_prompt - taken)
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": answer},
        ]
        with (folder / f"{name}.jsonl").open("w") as file:
            for i in range(64):
                file.write(json.dumps({"id": str(i), "messages": messages}) + "\n")


def config_of(folder: Path, case: str) -> VlmKDConfig | DFlashConfig:
    """Composed and checked."""
    register()
    register_dflash()
    base = [
        *("data=conversations", f"data.path={folder / 'rows.jsonl'}", "data.num_workers=0"),
        *("train.micro_batch_size=2", "train.global_batch_size=4", "train.val_every=null"),
        *(f"data.max_length={ROW_TOKENS}", "logger=jsonl", "parallel=fsdp"),
        "parallel.sync_every_micro_batch=false",
    ]
    name = "qwen_vl_kd"
    if case == "dflash":
        name = "dflash"
        base += ["target=pretrained", f"target.name={folder / 'student'}", "target.dtype=float32"]
        base += ["rollout=dataset", "draft=dflash", "draft.num_anchors=64", "draft.block_size=8"]
        base += ["draft.num_layers=3", "draft.num_taps=3"]
    else:
        base += ["student=pretrained", f"student.name={folder / 'student'}", "student.freeze=[]"]
        base += ["teacher=local", f"teacher.name={folder / 'teacher'}", "teacher.dtype=float32"]
        base += ["student.processor.max_pixels=262144", "doctor=never"]
    overrides = [override.format(folder=folder) for override in CASES[case]]
    with initialize_config_dir(config_dir(), version_base="1.3"):
        return checked(compose(name, overrides=[*base, *overrides]))


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


def measure(folder: Path, case: str) -> None:
    """One case, in a process of its own: prints predicted and measured bytes."""
    config = config_of(folder, case)
    draft = isinstance(config, DFlashConfig)
    predicted = plan_dflash.make_plan(config) if draft else footprint.make_plan(config)
    world = config.parallel.build()
    run = DFlash(config, world) if draft else VlmKD(config, world)
    for _ in range(2):  # AdamW makes its moments, and the loss is compiled
        run.train_step()
    gc.collect()
    between, held = resident(), held_tensors()
    peak = Peak()
    peak.start()
    for _ in range(2):
        run.train_step()
    peak.stop = True
    peak.join()
    if world.is_main:
        print(json.dumps([predicted.total, held + peak.most - between]), flush=True)
    if world.size > 1:
        world.barrier()
    world.close()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="predicted against measured memory")
    parser.add_argument("--case", help="of this alone, in this process")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
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
        for case in args.only:
            ranks = ["-m", "torch.distributed.run", f"--nproc-per-node={RANKS.get(case, 1)}"]
            command = [sys.executable, *(ranks if case in RANKS else []), __file__]
            command += ["--case", case, "--folder", name]
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
