"""What batching saves: padding, and tokens per second of forward and backward.

    python scripts/bench_batches.py speed      one process, a small random Qwen3-VL on this machine
    python scripts/bench_batches.py ranks      padding and waiting of 1 to 64 ranks, by arithmetic

Rows are questions about a radiology image, as in MedPix: the sides of an image are drawn from a
log-normal distribution (median 512 pixels, sigma 0.4, between 128 and 1,024), one token stands for
32 x 32 pixels, as in Qwen3-VL; the text of a question has a median of 30 tokens (sigma 0.5), that
of an answer 60 (sigma 1.0). These numbers are assumptions about such data, not measured on it.

All options read the same rows in every step, and none reads more than `--max-tokens` at once: fixed
batches are of as many rows as have room if all are of `--max-length`. Packed rows may be given
fewer (`--packed-tokens`): without a kernel that ends at each row, attention is computed over all of
a sequence and masked. Options take turns, round by round. `tokens` are those of rows: neither
padding nor fillers count.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import ProcessorMixin

from kd.batching import BatchingConfig, FixedBatching, PackedBatching, TokenBudgetBatching
from kd.batching.divide import Packed, Padded, Size, Tally, balance, divide, fill
from kd.data import BatchStream, Collator, Renderer, Split
from kd.data.digits import all_texts
from kd.loss import ForwardKLConfig
from kd.model import ScratchModel, Student
from kd.parallel import ParallelConfig, World
from kd.types import Batch, Sample

TOKEN_PX = 32
WORD = " odd"
"""One token of the digits' tokenizer."""


class Lengths(NamedTuple):
    """Of one row."""

    width_px: int
    height_px: int
    question: int
    answer: int

    @property
    def total(self) -> int:
        """Tokens of the row, without those of the chat template."""
        image = round(self.width_px / TOKEN_PX) * round(self.height_px / TOKEN_PX)
        return image + self.question + self.answer


def draw(rows: int, seed: int, scale: float, max_length: int) -> list[Lengths]:
    """Rows of the distribution above, all tokens times `scale`; those too long are left out."""
    rng = np.random.default_rng(seed)
    found: list[Lengths] = []
    while len(found) < rows:
        sides = np.clip(512 * np.exp(0.4 * rng.standard_normal(2)), 128, 1024) * scale**0.5
        question, answer = np.array([30, 60]) * np.exp(np.array([0.5, 1.0]) * rng.normal(size=2))
        width, height = (TOKEN_PX * max(1, round(side / TOKEN_PX)) for side in sides)
        row = Lengths(width, height, max(1, round(scale * question)), max(1, round(scale * answer)))
        if row.total + 20 <= max_length:  # the chat template's
            found.append(row)
    return found


class Rows:
    """The rows, with real images of noise."""

    def __init__(self, lengths: list[Lengths]) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        row = self.lengths[index]
        shape = row.height_px, row.width_px, 3
        pixels = np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8)
        content = [{"type": "image"}, {"type": "text", "text": WORD * row.question}]
        messages = [{"role": "user", "content": content}]
        return Sample(str(index), messages, [Image.fromarray(pixels)], WORD * row.answer)


# ---- speed ---------------------------------------------------------------------------------------


def student(args: argparse.Namespace) -> tuple[Student, ProcessorMixin]:
    """A small random Qwen3-VL."""
    text = {
        "hidden_size": args.hidden,
        "intermediate_size": 3 * args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden // 32,
        "num_key_value_heads": args.hidden // 64,
        "head_dim": 32,
        "max_position_embeddings": 8192,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": args.hidden,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    architecture = {"model_type": "qwen3_vl", "text_config": text, "vision_config": vision}
    config = ScratchModel(architecture=architecture)
    processor = config.build_processor(all_texts)
    torch.manual_seed(0)
    model = config.build(processor, with_weights=True)
    made = Student(model, ForwardKLConfig().build(0.0))
    made.freeze(["model.visual"])
    return made, processor


def step(model: Student, batches: list[Batch], device: torch.device) -> None:
    """Forward and backward of an optimizer step."""
    num_targets = sum(batch.num_targets for batch in batches)
    for batch in batches:
        model.distill(batch.to(device), None, num_targets).loss.backward()
    model.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()


def speed(args: argparse.Namespace, world: World) -> None:
    """Time the options on the same steps."""
    model, processor = student(args)
    model.distribute(world, ParallelConfig(device=args.device, compute_dtype=args.dtype))
    collate = Collator(Renderer(processor), None, args.max_length, lockstep=False)
    rows = Rows(draw(args.rows * args.rounds, 0, args.scale, args.max_length))
    micro = max(1, args.max_tokens // args.max_length)
    options: dict[str, BatchingConfig] = {
        f"fixed, {micro} rows": FixedBatching(),
        "token_budget": TokenBudgetBatching(args.max_tokens),
        f"packed, {args.packed_tokens} tokens": PackedBatching(args.packed_tokens),
    }
    takes: dict[str, Callable[[], list[Batch]]] = {}
    for name, option in options.items():
        batching = option.build(collate, micro, args.rows // micro, world)
        split = Split(batching.rows_at_a_time)
        stream = BatchStream(rows, batching.prepare, split, seed=0, shuffle=False)
        takes[name] = lambda batching=batching, stream=stream: batching.take(stream)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    rates: dict[str, list[float]] = {name: [] for name in options}
    counts = {name: np.zeros(3) for name in options}
    for number in range(args.rounds):
        for name, take in takes.items():
            batches = take()
            started = clock()
            step(model, batches, world.device)
            seconds = clock() - started
            if number == 0:  # to warm up
                continue
            tokens = sum(batch.num_tokens for batch in batches)
            rates[name].append(tokens / seconds)
            counts[name] += tokens, sum(b.num_places for b in batches), len(batches)
    base = rates[f"fixed, {micro} rows"]
    print(f"{args.rows} rows a step, {args.rounds - 1} steps; {torch.get_num_threads()} thread(s)")
    print("| batching | micro-batches a step | padding waste | tokens/s | speed |")
    print("|---|---|---|---|---|")
    for name, (tokens, places, number) in counts.items():
        ratio = statistics.median(a / b for a, b in zip(rates[name], base, strict=True))
        print(
            f"| {name} | {number / (args.rounds - 1):.1f} | {1 - tokens / places:.1%} | "
            f"{statistics.median(rates[name]):,.0f} | {ratio:.2f} |"
        )


# ---- ranks ---------------------------------------------------------------------------------------


def ranks(args: argparse.Namespace) -> None:
    """Padding, and how long ranks wait for the fullest one, if time goes by the tokens read."""
    print("| ranks | rows a step | batching | micro-batches a rank | padding waste | efficiency |")
    print("|---|---|---|---|---|---|")
    for world, rows in ((1, 16), (1, 128), (8, 16), (8, 128), (64, 128), (64, 512)):
        lengths = draw(rows * args.rounds, 1, 1.0, args.max_length)
        steps = [lengths[i * rows : (i + 1) * rows] for i in range(args.rounds)]
        for name in ("fixed", "token_budget, not balanced", "token_budget", "packed"):
            results = np.array([of_step(args, name, world, lengths) for lengths in steps])
            tokens, places, critical, number = results.sum(0)
            print(
                f"| {world} | {rows} | {name} | {number / args.rounds:.1f} | "
                f"{1 - tokens / places:.1%} | {tokens / (world * critical):.0%} |"
            )


def of_step(
    args: argparse.Namespace, name: str, world: int, lengths: list[Lengths]
) -> tuple[int, int, int, int]:
    """Tokens, places over all ranks, places of the longest of each micro-step, micro-steps."""
    per_rank = len(lengths) // world
    sizes = [Size(slot, row.total, True) for slot, row in enumerate(lengths)]
    shares = [sizes[r * per_rank : (r + 1) * per_rank] for r in range(world)]
    layout = Packed(0) if name == "packed" else Padded(0, 0.05)
    if name == "fixed":
        micro = min(per_rank, max(1, args.max_tokens // args.max_length))
        groups = [[s[i : i + micro] for i in range(0, per_rank, micro)] for s in shares]
    else:
        shares = shares if "not balanced" in name else balance(shares)
        count = max(len(fill(share, layout, args.max_tokens)) for share in shares)
        groups = [divide(share, layout, args.max_tokens, count) for share in shares]
    places = [[layout.tokens(sum(group, Tally())) for group in rank] for rank in groups]
    critical = sum(max(at_once) for at_once in zip(*places, strict=True))
    return sum(size.length for size in sizes), sum(map(sum, places)), critical, len(places[0])


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("case", choices=["speed", "ranks"])
    parser.add_argument("--max-length", type=int, help="of a row; default 2048, speed: 512")
    parser.add_argument("--max-tokens", type=int, help="at once; default 4 x --max-length")
    parser.add_argument("--packed-tokens", type=int, help="of batching=packed, where others")
    parser.add_argument("--rows", type=int, default=64, help="of an optimizer step")
    parser.add_argument("--rounds", type=int, default=6, help="the first warms up")
    parser.add_argument("--scale", type=float, default=0.25, help="of all lengths")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    args = parser.parse_args()
    args.max_length = args.max_length or (512 if args.case == "speed" else 2048)
    args.max_tokens = args.max_tokens or 4 * args.max_length
    args.packed_tokens = args.packed_tokens or args.max_tokens
    if args.case == "ranks":
        ranks(args)
        return
    world = ParallelConfig(device=args.device, cpu_threads=1).build()
    speed(args, world)
    world.close()


if __name__ == "__main__":
    main()
