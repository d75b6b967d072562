"""Tokens per second and memory of a whole training step, next to other projects' steps.

    python scripts/bench_step.py peers --install-peers /tmp/peers   # TRL, NeMo Automodel
    python scripts/bench_step.py ranks --ranks 1 2                  # this project, several ranks

A step is the teacher's forward, the student's forward and backward, the loss, clipping and AdamW,
on random Qwen3-VL models that differ in size alone, with a vocabulary of real size, and rows of
which every second one has an image. Everything is fp32, the vision tower is frozen, nothing is
recomputed. All variants train the same weights on the same rows with the same optimizer, so the
losses that they print must agree, step after step. What differs is how the loss is come by:

- ours: the lines of `VlmKD.train_step`, models placed as there; also with smaller chunks;
- TRL GOLD: `GOLDTrainer.compute_loss` as installed (trl/experimental/gold/gold_trainer.py): all
  logits of both models, log-softmax and divergence of every place, then the mask;
- TRL Distillation: `DistillationTrainer._compute_loss` as installed
  (trl/trainer/distillation_trainer.py): logits in tiles, computed again in the backward. On a GPU
  a Triton kernel does this; what runs on a CPU is its fallback, which computes every place of the
  padded responses. Its models read prompts padded on the left;
- NeMo Automodel, re-stated: its losses `KDLoss` (chunks of 512, as in its example
  examples/vlm_kd/qwen3_5/qwen3_5_vl_4b_kd.yaml) and `MaskedCrossEntropy` as installed, in the order
  of `_forward_backward_step` of nemo_automodel/recipes/vlm/kd.py, written anew because that file
  imports torchao, which does not load with the Triton of torch 2.15: all logits of both models,
  those of the teacher cloned;
- whole logits: the same step with the plainest losses.

TRL has no cross-entropy beside the divergence: it is measured with `--kd-ratio 1` only.

Every variant is a process per rank, with one thread each; they take turns, step by step. Memory is
the peak resident memory of a step less what the process held before there were models, of the
fullest rank. `tokens` are those of the rows, without padding.
"""

from __future__ import annotations

import argparse
import ctypes
import inspect
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import peers
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

from kd.data import Collator, Renderer
from kd.data.digits import all_texts
from kd.loss import ForwardKLConfig
from kd.metrics import Counts
from kd.model import FrozenVLM, Student
from kd.model.tiny import build_processor
from kd.optim import OptimConfig, clip_gradients
from kd.parallel import ParallelConfig, World, shard
from kd.teacher.local import LocalTeacher
from kd.types import IGNORE_INDEX, Batch, Sample

SIZES = {"tiny": ((128, 2), (256, 4)), "small": ((256, 4), (512, 8))}
"""(hidden size, layers) of student and teacher."""
WORD = " odd"
"""One token of the digits' tokenizer."""


class Case(NamedTuple):
    """What every variant is given; the models are the same on every rank."""

    world: World
    student: PreTrainedModel
    teacher: PreTrainedModel
    batch: Batch
    collate: Collator
    num_targets: int
    """Of all ranks."""
    kd_ratio: float


class Variant(NamedTuple):
    """Sharded models; `loss` is this rank's part of the mean over the targets of all ranks."""

    student: nn.Module
    loss: Callable[[], Tensor]


# ---- models and rows -----------------------------------------------------------------------------


def make_model(
    hidden: int, layers: int, vocab: int, processor: ProcessorMixin, seed: int
) -> PreTrainedModel:
    """A random Qwen3-VL with a tied head, whose logits differ enough for a divergence."""
    text = {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 64,
        "head_dim": 32,
        "vocab_size": vocab,
        "initializer_range": 1.5 * hidden**-0.5,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": hidden,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    tokens = {f"{name}_token_id": getattr(processor, f"{name}_token_id") for name in TOKENS}
    config = AutoConfig.for_model(
        "qwen3_vl", text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens
    )
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    model.get_submodule("model.visual").requires_grad_(False)
    return model


TOKENS = ("image", "video", "vision_start", "vision_end")


def make_rows(number: int, length: int, seed: int = 0) -> list[Sample]:
    """Questions and answers of up to `length` words; every second row has an image."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(number):
        question, answer = rng.integers(length // 3, length, size=2)
        text = {"type": "text", "text": WORD * question}
        images = []
        if index % 2 == 0:
            images = [Image.fromarray(rng.integers(0, 256, (96, 128, 3), dtype=np.uint8))]
        content = [*({"type": "image"} for _ in images), text]
        messages = [{"role": "user", "content": content}]
        rows.append(Sample(str(index), messages, images, WORD * answer))
    return rows


def make_case(args: argparse.Namespace, world: World, dtype: torch.dtype = torch.float32) -> Case:
    """The models and this rank's rows."""
    processor = build_processor(all_texts())
    sizes = zip(("student", "teacher"), SIZES[args.size], strict=True)
    models = [
        make_model(*size, args.vocab, processor, seed).to(dtype)
        for seed, (_, size) in enumerate(sizes)
    ]
    collate = Collator(Renderer(processor), None, 4096, lockstep=world.size > 1)
    batch = collate(make_rows(args.rows, args.length)[world.rank :: world.size])
    num_targets = world.sum_ints(batch.num_targets)[0]
    models[1].requires_grad_(False).eval()
    return Case(world, models[0].train(), models[1], batch, collate, num_targets, args.kd_ratio)


# ---- variants ------------------------------------------------------------------------------------


def parallel(case: Case) -> ParallelConfig:
    """One thread per rank; computes in what the weights are held in."""
    name = str(case.student.dtype).removeprefix("torch.")
    return ParallelConfig(cpu_threads=1, compute_dtype=name, reduce_dtype=name)


def ours(case: Case, chunk_mib: int | None = None) -> Variant:
    """As in `VlmKD.train_step`."""
    student = Student(case.student, ForwardKLConfig(chunk_mib=chunk_mib).build(case.kd_ratio))
    frozen = FrozenVLM(case.teacher)
    for model in (student, frozen):
        model.place(case.world, parallel(case))
    teacher, batch = LocalTeacher(frozen), case.batch

    def loss() -> Tensor:
        targets = teacher.targets(batch)
        return student.distill(batch, targets, case.num_targets, case.num_targets).loss

    return Variant(student, loss)


def ours_small(case: Case) -> Variant:
    """With `loss.chunk_mib` below its default of 256 on a CPU."""
    return ours(case, 96)


def distribute(case: Case) -> None:
    """On several ranks the peers shard by FSDP2 too; with one they leave the models as they are."""
    if case.world.size > 1:
        for model in (case.student, case.teacher):
            shard(model, model, case.world, parallel(case))


Loss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(logits_BSV, teacher_logits_BSV, labels_BS) -> sums of CE and KD over the targets."""


def plain_losses(logits_BSV: Tensor, teacher_BSV: Tensor, labels_BS: Tensor) -> tuple:
    """Cross-entropy and forward KL, written as the formulas are."""
    valid_BS = labels_BS != IGNORE_INDEX
    logq_NV, logp_NV = logits_BSV[valid_BS].log_softmax(-1), teacher_BSV[valid_BS].log_softmax(-1)
    ce = F.nll_loss(logq_NV, labels_BS[valid_BS], reduction="sum")
    return ce, F.kl_div(logq_NV, logp_NV, log_target=True, reduction="sum")


def whole_logits(case: Case, losses: Loss = plain_losses) -> Variant:
    """Logits of every place of both models, then the losses: NeMo's order."""
    distribute(case)
    inputs, labels_BS = case.batch.student.model_inputs(), case.batch.labels_BS

    def loss() -> Tensor:
        with torch.no_grad():
            teacher_BSV = case.teacher(**inputs).logits.detach().clone()
        logits_BSV = case.student(**inputs).logits
        ce, kd = losses(logits_BSV, teacher_BSV, labels_BS)
        return ((1 - case.kd_ratio) * ce + case.kd_ratio * kd) / case.num_targets

    return Variant(case.student, loss)


def nemo(case: Case) -> Variant:
    """Its losses; without cross-entropy where that has no weight, as there."""
    from nemo_automodel.components.loss.kd_loss import KDLoss  # pyright: ignore
    from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy  # pyright: ignore

    kd_loss, ce_loss = KDLoss(fp32_upcast=True, chunk_size=512), MaskedCrossEntropy()

    def losses(logits_BSV: Tensor, teacher_BSV: Tensor, labels_BS: Tensor) -> tuple:
        ce = torch.zeros(())
        if case.kd_ratio < 1:
            ce = ce_loss(logits_BSV, labels_BS)
        return ce, kd_loss(logits_BSV, teacher_BSV, labels_BS, num_batch_labels=1)

    return whole_logits(case, losses)


def bare_trainer(kind: type, case: Case, **fields: Any) -> Any:
    """A trainer with what its loss reads, without its data, logging and generation."""
    assert case.kd_ratio == 1, "TRL's trainers have no cross-entropy: --kd-ratio 1"
    trainer = object.__new__(kind)
    vars(trainer).update(teacher_model=case.teacher, beta=0.0, temperature=1.0, **fields)
    return trainer


def trl_gold(case: Case) -> Variant:
    """Full logits."""
    from trl.experimental.gold import GOLDTrainer  # pyright: ignore

    trainer = bare_trainer(GOLDTrainer, case, use_uld_loss=False)
    distribute(case)
    labels_BS = torch.full_like(case.batch.labels_BS, IGNORE_INDEX)
    labels_BS[:, 1:] = case.batch.labels_BS[:, :-1]  # it shifts them itself
    inputs = {**case.batch.student.model_inputs(), "labels": labels_BS}

    def loss() -> Tensor:
        return trainer.compute_loss(case.student, inputs, num_items_in_batch=case.num_targets)

    return Variant(case.student, loss)


def trl_distillation(case: Case) -> Variant:
    """Logits in tiles."""
    from accelerate import Accelerator
    from trl import DistillationTrainer  # pyright: ignore
    from trl.models.utils import _ForwardRedirection  # pyright: ignore

    trainer = bare_trainer(
        DistillationTrainer,
        case,
        accelerator=Accelerator(cpu=True),
        model_kwarg_keys=inspect.signature(case.student.forward).parameters.keys(),
        _is_vlm=True,
        _forward_redirection=_ForwardRedirection(),
    )
    distribute(case)
    inputs, student = prompts_and_completions(case), case.student

    def loss() -> Tensor:
        redirect, compute = trainer._forward_redirection, trainer._compute_loss
        return redirect(student, student, compute, student, inputs, case.num_targets)[0]

    return Variant(student, loss)


def prompts_and_completions(case: Case) -> dict[str, Tensor]:
    """The batch as that trainer reads it: prompts padded on the left, responses on the right."""
    prompts = case.collate.prompts(case.batch.samples)
    ids_BP = prompts.input_ids_BS
    responses = [torch.tensor(rollout.response_ids) for rollout in case.batch.rollouts]
    responses += [torch.empty(0, dtype=torch.int64)] * (len(ids_BP) - len(responses))  # a filler's
    ids_BC = pad_sequence(responses, batch_first=True)
    mask_BC = pad_sequence([torch.ones_like(ids) for ids in responses], batch_first=True)
    media = {
        name: torch.cat([x, torch.zeros_like(ids_BC)], 1) if x.shape == ids_BP.shape else x
        for name, x in prompts.media.items()
    }
    return media | {
        "prompt_ids": ids_BP,
        "prompt_mask": prompts.attention_mask_BS,
        "completion_ids": ids_BC,
        "completion_mask": mask_BC,
    }


VARIANTS: dict[str, Callable[[Case], Variant]] = {
    "ours": ours,
    "ours, chunks of 96 MiB": ours_small,
    "TRL Distillation": trl_distillation,
    "TRL GOLD": trl_gold,
    "NeMo Automodel, re-stated": nemo,
    "whole logits": whole_logits,
}
OWN = ("ours", "ours, chunks of 96 MiB", "whole logits")


def make_step(variant: Variant, world: World) -> Callable[[], float]:
    """One optimizer step; returns the loss over all ranks, from before the step."""
    student = variant.student
    optimizer, scheduler = OptimConfig(lr=1e-3, schedule="constant").build(student, 100)

    def step() -> float:
        loss = variant.loss()
        (loss * world.size).backward()  # FSDP2 averages over the ranks
        clip_gradients(student, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        return world.sum(loss.detach()).item()

    return step


# ---- one rank of one variant ---------------------------------------------------------------------


def status_mib(key: str) -> float:
    """A field of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) / 1024 for x in lines if x.startswith(key + ":"))


def serve(args: argparse.Namespace) -> None:
    """Take a step for each line on stdin; JSON for each on stdout."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    world = ParallelConfig(cpu_threads=1, device="cpu").build()
    preload(args.only)
    before_mib = status_mib("VmRSS")

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=out, flush=True)

    try:
        case = make_case(args, world)
        step = make_step(VARIANTS[args.only](case), world)
    except (ImportError, AssertionError) as error:
        answer(skipped=str(error))
        return
    tokens = world.sum_ints(*Counts.of([case.batch]))[4]
    answer(tokens=tokens, targets=case.num_targets, places=case.batch.num_places)
    for _ in sys.stdin:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        world.barrier()
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        loss = step()
        world.barrier()
        seconds, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
        peak_mib = status_mib("VmHWM") - before_mib
        answer(seconds=seconds, cpu_s=cpu_s, peak_mib=peak_mib, loss=loss)
    world.close()


def preload(name: str) -> None:
    """Import what a peer is made of, which shall not count as memory of its step."""
    if name not in OWN:
        try:
            import nemo_automodel.components.loss.kd_loss  # pyright: ignore # noqa: F401
            import trl.experimental.gold  # pyright: ignore # noqa: F401
        except ImportError:
            return  # said by the variant itself


# ---- all of them, in turns -----------------------------------------------------------------------


class Runner:
    """The ranks of one variant, each a process that waits for its turn."""

    def __init__(self, name: str, ranks: int, python: Path) -> None:
        self.name, self.ranks = name, ranks
        self.steps: list[dict[str, float]] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [str(python), __file__, *sys.argv[1:], "--only", name]
        env = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "TRL_EXPERIMENTAL_SILENCE": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self.processes = []
        for rank in range(ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
            place |= {"LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            rank_env = env | ({k: str(v) for k, v in place.items()} if ranks > 1 else {})
            pipe = subprocess.PIPE
            self.processes.append(
                subprocess.Popen(
                    command, env=rank_env, stdin=pipe, stdout=pipe, stderr=None, text=True
                )
            )
        self.about: dict[str, Any] = self.read()[0]

    def read(self) -> list[dict]:
        """A line of each rank."""
        lines = [pipe(process.stdout).readline() for process in self.processes]
        return [json.loads(line) if line else {"skipped": "it failed, see above"} for line in lines]

    def step(self) -> None:
        """Have a turn."""
        if "skipped" in self.about:
            return
        for process in self.processes:
            pipe(process.stdin).write("\n")
            pipe(process.stdin).flush()
        ranks = self.read()
        if any("skipped" in rank for rank in ranks):
            self.about = {"skipped": "it failed, see above"}
            return
        self.steps.append(
            {
                "seconds": max(rank["seconds"] for rank in ranks),
                "cpu_s": sum(rank["cpu_s"] for rank in ranks),
                "peak_mib": max(rank["peak_mib"] for rank in ranks),
                "loss": ranks[0]["loss"],
            }
        )

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            pipe(process.stdin).close()
        for process in self.processes:
            process.wait(timeout=60)

    def median(self, key: str) -> float:
        """Of the steps after the first, which warms up."""
        return statistics.median(step[key] for step in self.steps[1:])


def pipe(end: IO[str] | None) -> IO[str]:
    """One that was asked for."""
    assert end is not None
    return end


def row(runner: Runner, base: Runner) -> str:
    """A line of the table; speed and memory as `base` has them, in relation to this one."""
    label = f"{runner.name}, {runner.ranks} rank(s)"
    if "skipped" in runner.about:
        return f"| {label} | - | - | - | - | - | - | {runner.about['skipped']} |"
    seconds, cpu_s, peak = (runner.median(key) for key in ("seconds", "cpu_s", "peak_mib"))
    speed = runner.about["tokens"] / seconds
    losses = " ".join(f"{step['loss']:.5f}" for step in runner.steps)
    slower, more_cpu = seconds / base.median("seconds"), cpu_s / base.median("cpu_s")
    return (
        f"| {label} | {speed:,.0f} | {slower:.2f} | {cpu_s:.2f} | {more_cpu:.2f} | {peak:,.0f} | "
        f"{base.median('peak_mib') / peak:.2f} | {losses} |"
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("case", choices=["peers", "ranks"])
    parser.add_argument("--size", choices=list(SIZES), default="tiny", help="of the models")
    parser.add_argument("--vocab", type=int, default=151_936, help="default: that of Qwen3-VL")
    parser.add_argument("--rows", type=int, default=4, help="of the step, all ranks together")
    parser.add_argument("--length", type=int, default=128, help="of a question or an answer")
    parser.add_argument("--kd-ratio", type=float, default=1.0, help="1: no cross-entropy")
    parser.add_argument("--steps", type=int, default=3, help="after one that warms up")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--install-peers", type=Path, metavar="DIR", help="venv for the peers")
    parser.add_argument("--only", choices=list(VARIANTS), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Start all processes, let them take turns, print the table."""
    args = parse_args()
    if args.only:
        serve(args)
        return
    here = Path(sys.executable)
    other = peers.install(args.install_peers) if args.install_peers else here
    names = args.variants if args.case == "peers" else ["ours"]
    runners = [
        Runner(name, ranks, here if name in OWN else other)
        for ranks in args.ranks
        for name in names
    ]
    for _ in range(1 + args.steps):
        for runner in runners:
            runner.step()
            print(f"{runner.name}: {runner.steps[-1:]}", file=sys.stderr)
    for runner in runners:
        runner.close()
    base = runners[0]
    print(
        f"{args.size}, V {args.vocab:,}, kd_ratio {args.kd_ratio:g}: {base.about['tokens']} tokens "
        f"in {args.rows} rows, {base.about['targets']} targets; {args.steps} steps; torch "
        f"{torch.__version__}, Python {platform.python_version()}; load {os.getloadavg()[0]:.1f} "
        f"on {os.cpu_count()} cores\n"
    )
    ratios = "speed of the first", "processor s", "over the first", "peak MiB", "of the first"
    print(f"| | tokens/s | {' | '.join(ratios)} | loss of each step |\n|{'---|' * 8}")
    for runner in runners:
        print(row(runner, base))


if __name__ == "__main__":
    main()
