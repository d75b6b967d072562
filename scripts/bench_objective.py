"""Time and memory of the fused objective next to its floor and its peers.

    python scripts/bench_objective.py --install-peers /tmp/peers --threads 1 -N 1024 --vocab 150000

Every variant runs in a process of its own with the same inputs, threads and core: a warm-up (with
compilation), then the median of `--runs` forward + backward passes, then the peak memory of one
more pass above what the inputs take. The table goes to stdout.

Shape legend: N rows, D hidden, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import peers
import torch
import torch.nn.functional as F
from torch import Tensor

from kd.objective import DenseBody, DenseLoss, fused_linear_kd
from kd.objective_loop import balanced_chunks, rows_in_budget
from kd.types import DenseTargets

BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
MIB = 2**20


class Case(NamedTuple):
    hidden_ND: Tensor
    weight_VD: Tensor
    teacher_hidden_ND: Tensor
    teacher_weight_VD: Tensor
    labels_N: Tensor


Step = Callable[[], float]
"""One forward + backward; returns the loss (NaN where there is none)."""


def make_case(args: argparse.Namespace) -> Case:
    """Logits of unit scale; every 1 / targets_fraction-th row is a target."""
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)

    def randn(rows: int, cols: int, scale: float) -> Tensor:
        return (torch.randn(rows, cols, device=args.device) * scale).to(dtype)

    labels_N = torch.randint(args.vocab, (args.N,), device=args.device)
    labels_N[torch.arange(args.N, device=args.device) % round(1 / args.targets_fraction) > 0] = -100
    return Case(
        randn(args.N, args.ds, 1.0).requires_grad_(),
        randn(args.vocab, args.ds, args.ds**-0.5).requires_grad_(),
        randn(args.N, args.dt, 1.0),
        randn(args.vocab, args.dt, args.dt**-0.5),
        labels_N,
    )


def backward(case: Case, loss: Tensor) -> float:
    loss.backward()
    case.hidden_ND.grad = case.weight_VD.grad = None
    return loss.item()


def floor(case: Case, args: argparse.Namespace) -> Step:
    """The four GEMMs alone on the target rows, into reused buffers, with the chunks of `ours`."""
    rows_N = (case.labels_N != -100).nonzero()[:, 0]
    hidden, teacher = case.hidden_ND.detach()[rows_N], case.teacher_hidden_ND[rows_N]
    weight, teacher_weight = case.weight_VD.detach(), case.teacher_weight_VD
    body = DenseBody(DenseTargets(teacher, teacher_weight), DenseLoss("forward_kl", 0.5, 1.0, 0.5))
    chunks = balanced_chunks(len(rows_N), rows_in_budget(weight, body, None))

    def step() -> float:
        student_CV, teacher_CV = hidden.new_empty(2, chunks[0].stop, args.vocab)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for rows in chunks:
            size = rows.stop - rows.start
            torch.mm(hidden[rows], weight.T, out=student_CV[:size])
            torch.mm(teacher[rows], teacher_weight.T, out=teacher_CV[:size])
            torch.mm(student_CV[:size], weight, out=grad_hidden[rows])
            grad_weight.addmm_(student_CV[:size].T, hidden[rows])
        return float("nan")

    return step


def ours(case: Case, args: argparse.Namespace) -> Step:
    return lambda: backward(case, fused_linear_kd(*case, divergence=args.divergence).loss)


def ours_triton(case: Case, args: argparse.Namespace) -> Step:
    assert args.device == "cuda", "Triton: on a GPU only"
    options = {"divergence": args.divergence, "kernel": "triton"}
    return lambda: backward(case, fused_linear_kd(*case, **options).loss)


def naive_divergence(logits: Tensor, teacher: Tensor, name: str) -> Tensor:
    logq, logp = logits.log_softmax(-1), teacher.log_softmax(-1)
    if name == "forward_kl":
        return F.kl_div(logq, logp, log_target=True, reduction="sum")
    if name == "reverse_kl":
        return F.kl_div(logp, logq, log_target=True, reduction="sum")
    logm = torch.logaddexp(logp, logq) - torch.tensor(2.0).log()
    halves = (F.kl_div(logm, x, log_target=True, reduction="sum") for x in (logp, logq))
    return sum(halves, start=logits.new_zeros(())) / 2


def naive(case: Case, args: argparse.Namespace) -> Step:
    """What one writes first: all logits, fp32 log-softmaxes, autograd."""

    def step() -> float:
        valid = case.labels_N != -100
        logits = (case.hidden_ND @ case.weight_VD.T)[valid].float()
        with torch.no_grad():
            teacher = (case.teacher_hidden_ND @ case.teacher_weight_VD.T)[valid].float()
        ce = F.cross_entropy(logits, case.labels_N[valid])
        kd = naive_divergence(logits, teacher, args.divergence) / len(logits)
        return backward(case, 0.5 * ce + 0.5 * kd)

    return step


def nemo(case: Case, args: argparse.Namespace) -> Step:
    from nemo_automodel.components.loss.kd_loss import KDLoss  # pyright: ignore

    assert args.divergence == "forward_kl", "has forward KL only"
    divergence = KDLoss(ignore_index=-100, temperature=1.0, chunk_size=512)

    def step() -> float:
        logits = case.hidden_ND @ case.weight_VD.T
        with torch.no_grad():
            teacher = case.teacher_hidden_ND @ case.teacher_weight_VD.T
        ce = F.cross_entropy(logits.float(), case.labels_N)
        return backward(case, 0.5 * ce + 0.5 * divergence(logits, teacher, case.labels_N))

    return step


def liger(
    case: Case, args: argparse.Namespace, *, compiled: bool = True, chunk_size: int = 1024
) -> Step:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # pyright: ignore

    loss = LigerFusedLinearJSDLoss(
        0.5, 0.5, beta=BETAS[args.divergence], compiled=compiled, chunk_size=chunk_size
    )
    hidden, weight, teacher, teacher_weight, labels = case
    return lambda: backward(case, loss(hidden, weight, teacher, teacher_weight, labels))


def liger_eager(case: Case, args: argparse.Namespace) -> Step:
    return liger(case, args, compiled=False)


def liger_small(case: Case, args: argparse.Namespace) -> Step:
    """With less memory than its default of 1,024 rows takes."""
    return liger(case, args, chunk_size=256)


def trl(case: Case, args: argparse.Namespace) -> Step:
    """KD only: it has no cross-entropy."""
    assert args.device == "cuda", "Triton: on a GPU only"
    from trl.trainer.distillation_trainer import _chunked_divergence_loss  # pyright: ignore

    hidden, weight, teacher, teacher_weight, labels = case
    mask, beta = (labels != -100).int()[None], BETAS[args.divergence]

    def step() -> float:
        out = _chunked_divergence_loss(
            hidden[None], teacher[None], weight, teacher_weight, mask, beta=beta, temperature=1.0
        )
        return backward(case, out[0] if isinstance(out, tuple) else out)

    return step


VARIANTS = {
    "floor: 4 GEMMs": floor,
    "ours": ours,
    "ours, kernel=triton": ours_triton,
    "naive": naive,
    "NeMo KDLoss + CE": nemo,
    "Liger compiled": liger,
    "Liger compiled, 256 rows": liger_small,
    "Liger eager": liger_eager,
    "TRL Triton (KD only)": trl,
}
OWN = ("floor: 4 GEMMs", "ours", "ours, kernel=triton", "naive")


def status_mib(key: str) -> float:
    """A field of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) / 1024 for x in lines if x.startswith(key + ":"))


def peak_mib(step: Step, device: str) -> float:
    """Peak memory of one step above what is allocated before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # else memory freed by the warm-up counts as taken
    before = status_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    step()
    return status_mib("VmHWM") - before


def measure(args: argparse.Namespace) -> dict[str, float | str]:
    """Run one variant in this process."""
    torch.set_num_threads(args.threads)
    try:
        step = VARIANTS[args.only](make_case(args), args)
    except (ImportError, AssertionError) as error:
        return {"skipped": str(error)}
    loss = step()
    step()
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    times_s = []
    for _ in range(args.runs):
        start = clock()
        step()
        if args.device == "cuda":
            torch.cuda.synchronize()
        times_s.append(clock() - start)
    return {
        "median_s": statistics.median(times_s),
        "min_s": min(times_s),
        "max_s": max(times_s),
        "peak_mib": peak_mib(step, args.device),
        "loss": loss,
    }


def run_alone(name: str, args: argparse.Namespace, python: Path) -> dict:
    """Measure one variant in a process of its own, on the last `threads` cores."""
    env = os.environ | {
        "OMP_NUM_THREADS": str(args.threads),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}",
    }
    cores = sorted(os.sched_getaffinity(0))[-args.threads :]
    pin = ["taskset", "-c", ",".join(map(str, cores))] if args.device == "cpu" else []
    command = [*pin, python, __file__, *sys.argv[1:], "--only", name]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        return {"skipped": f"failed: {done.stderr.strip().splitlines()[-1]}"}
    return json.loads(done.stdout.splitlines()[-1])


def machine(args: argparse.Namespace) -> str:
    if args.device == "cuda":
        chip = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo").read_text().splitlines()
        chip = next(x.split(":")[1].strip() for x in info if x.startswith("model name"))
        chip += f" ({torch.backends.cpu.get_cpu_capability()}), {args.threads} thread(s)"
    return f"{chip}; torch {torch.__version__}, Python {platform.python_version()}"


def row(name: str, result: dict, base: dict, mine: dict) -> str:
    if "skipped" in result:
        return f"| {name} | - | - | - | - | - | {result['skipped']} |"
    seconds, peak = result["median_s"], result["peak_mib"]
    span = f"{result['min_s']:.3g}-{result['max_s']:.3g}"
    return (
        f"| {name} | {seconds:.3g} ({span}) | {seconds / base['median_s']:.2f} | "
        f"{seconds / mine['median_s']:.2f} | {peak:,.0f} | {peak / mine['peak_mib']:.2f} | "
        f"{result['loss']:.5f} |"
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and memory of the fused objective.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("-N", type=int, default=1024, help="rows")
    parser.add_argument("--ds", type=int, default=256, help="hidden size of the student")
    parser.add_argument("--dt", type=int, default=512, help="hidden size of the teacher")
    parser.add_argument("--vocab", type=int, default=150_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--targets-fraction", type=float, default=1.0, help="1 / an integer")
    parser.add_argument("--divergence", choices=list(BETAS), default="forward_kl")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: processor seconds of all threads; on a shared machine, with one thread",
    )
    parser.add_argument("--install-peers", type=Path, metavar="DIR", help="venv for the peers")
    parser.add_argument("--only", choices=list(VARIANTS), help="one variant, in this process")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.only:
        print(json.dumps(measure(args)))
        return
    here = Path(sys.executable)
    other = peers.install(args.install_peers) if args.install_peers else here
    results = {name: run_alone(name, args, here if name in OWN else other) for name in VARIANTS}
    shape = f"N {args.N}, Ds {args.ds}, Dt {args.dt}, V {args.vocab:,}, {args.dtype}"
    print(f"{machine(args)}\n\n{args.divergence}, {shape}, targets {args.targets_fraction:.0%}\n")
    times = f"{args.clock} seconds, median (min-max)"
    print(f"| | {times} | / floor | / ours | peak MiB | / ours | loss |")
    print("|---|---|---|---|---|---|---|")
    for name, result in results.items():
        print(row(name, result, results["floor: 4 GEMMs"], results["ours"]))


if __name__ == "__main__":
    main()
