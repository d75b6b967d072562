"""What a teacher elsewhere costs: bytes per response token, tokens per second, seconds per step.

    python scripts/bench_teacher.py bytes       what travels and what is kept, V = 151,936
    python scripts/bench_teacher.py topk        how much of a divergence k log-probs see
    python scripts/bench_teacher.py serve       kd.serve with 4 clients against the local teacher
    python scripts/bench_teacher.py epochs      a live teacher, a cache that fills, a full cache
    python scripts/bench_teacher.py ahead       asked one step ahead or not, servers near and far

`serve`, `epochs` and `ahead` make a random Qwen3.5 (--hidden, --layers) as the teacher. Server,
clients and trainer share this machine's cores; `far` is a server whose replies are held back by
--delay-ms, as a network and a queue would.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import torch
from omegaconf import OmegaConf
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as transformers_logging

from kd.data import Collator, Renderer
from kd.data.digits import DigitsConfig, all_texts
from kd.loss import ForwardKLConfig, JSDConfig, ReverseKLConfig
from kd.model import FrozenVLM, ScratchModel
from kd.parallel import ParallelConfig, World
from kd.teacher.codec import HiddenCodec, TopKCodec
from kd.teacher.engine import KdServe
from kd.teacher.payload import Hidden, tensors, top_k
from kd.teacher.server import ServerTeacherConfig
from kd.teacher.sparse import SparseTargets
from kd.types import Batch, DenseTargets, Sample

REPO = Path(__file__).parents[1]
VOCAB, HIDDEN = 151_936, 2048


STEPS, WARMUP_STEPS = 12, 3


def table(headings: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(headings) + " |")
    print("|" + "---|" * len(headings))
    for row in rows:
        print("| " + " | ".join(row) + " |")


# ---- sizes and fidelity --------------------------------------------------------------------------


def as_targets(logits_NV: Tensor) -> DenseTargets:
    """Hidden states and a head that give these logits."""
    return DenseTargets(torch.eye(len(logits_NV)), logits_NV.T.contiguous())


def zipf_logits(rows: int, vocab: int, seed: int) -> Tensor:
    """Log-probs that fall with the log of the rank, from flat rows to peaked ones."""
    made = torch.Generator().manual_seed(seed)
    slope_N1 = 1 + 1.5 * torch.rand(rows, 1, generator=made)
    sorted_NV = -slope_N1 * torch.arange(1, vocab + 1).log()
    order_NV = torch.rand(rows, vocab, generator=made).argsort(-1)
    noise_NV = 0.3 * torch.randn(rows, vocab, generator=made)
    return torch.empty(rows, vocab).scatter_(1, order_NV, sorted_NV) + noise_NV


def bytes_case(args: argparse.Namespace) -> None:
    """Measured on the tensors and packed bytes themselves."""
    rows = 32
    dense = as_targets(zipf_logits(rows, VOCAB, 0))
    ids_N = dense.weight_VD.T.argmax(-1)
    top = top_k(dense, ids_N, 128, 1.0, VOCAB)
    hidden = Hidden(torch.randn(rows, HIDDEN, dtype=torch.bfloat16))

    def wire(payload) -> float:
        found = tensors(payload)
        sizes = (x.nbytes // (2 if name == "ids_NK" else 1) for name, x in found.items())
        return sum(sizes) / rows  # ids travel as int32

    def kept(codec, payload) -> float:
        return codec.encode(payload, ids_N).nbytes / rows

    table(
        ["per response token", "bytes"],
        [
            ["logits, bfloat16", f"{2 * VOCAB:,}"],
            [f"hidden states, bfloat16 (D = {HIDDEN:,}), served", f"{wire(hidden):,.0f}"],
            ["the same, kept", f"{kept(HiddenCodec('bfloat16', HIDDEN), hidden):,.0f}"],
            ["the same in float8, kept", f"{kept(HiddenCodec('float8', HIDDEN), hidden):,.0f}"],
            ["top-128, served", f"{wire(top):,.0f}"],
            ["top-128, kept", f"{kept(TopKCodec(128, VOCAB), top):,.0f}"],
        ],
    )


def topk_case(args: argparse.Namespace) -> None:
    """The share of a divergence between two Zipf-like distributions that the buckets see."""
    rows = 48
    teacher_NV = zipf_logits(rows, VOCAB, 0)
    noise_NV = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(1))
    student = as_targets(teacher_NV + 0.7 * noise_NV)
    ids_N = teacher_NV.argmax(-1)
    losses = {"forward KL": ForwardKLConfig(), "reverse KL": ReverseKLConfig(), "JSD": JSDConfig()}

    def divergence(loss, targets) -> float:
        objective = loss.build(1.0)
        with torch.no_grad():
            out = objective(student.hidden_ND, student.weight_VD, None, ids_N, targets, rows)
        return out.kd.item()

    dense = as_targets(teacher_NV)
    exact = {name: divergence(loss, dense) for name, loss in losses.items()}
    lines = [["all", "1.000", *(f"{value:.4f}" for value in exact.values())]]
    for k in (1, 4, 16, 64, 128, 256, 1024):
        top = top_k(dense, ids_N, k, 1.0, VOCAB)
        targets = SparseTargets(top, ids_N, VOCAB, 1.0)
        mass = top.logp_NK.exp().sum(-1).mean().item()
        seen = (f"{divergence(loss, targets) / exact[name]:.1%}" for name, loss in losses.items())
        lines.append([str(k), f"{mass:.3f}", *seen])
    table(["k", "mass of the k", *losses], lines)


# ---- a model, rows and a server ------------------------------------------------------------------


def make_teacher(folder: Path, args: argparse.Namespace) -> None:
    config = OmegaConf.load(REPO / "configs/student/digits_small.yaml").architecture
    arch = OmegaConf.to_container(config)
    assert isinstance(arch, dict)
    arch["text_config"] |= {
        "hidden_size": args.hidden,
        "intermediate_size": 8 * args.hidden // 3,
        "num_attention_heads": max(1, args.hidden // arch["text_config"]["head_dim"]),
        "num_hidden_layers": args.layers,
        "layer_types": ["full_attention"] * args.layers,
    }
    arch["vision_config"]["out_hidden_size"] = args.hidden
    spec = ScratchModel(architecture=arch)
    processor = spec.build_processor(all_texts)
    spec.build(processor, with_weights=True).save_pretrained(folder)
    processor.save_pretrained(folder)


def batches_of(folder: Path, args: argparse.Namespace) -> list[Batch]:
    """Of digits with their answers, repeated so that a response has some length."""
    renderer = Renderer(AutoProcessor.from_pretrained(folder))
    collate = Collator(renderer, None, args.max_length, lockstep=False)
    rows = DigitsConfig().build("train")
    samples = [row for i in range(args.rows) if isinstance(row := rows[i], Sample)]
    for sample in samples:
        sample.answer = " ".join([sample.answer or ""] * args.repeat)
    size = args.batch_size
    return [collate(samples[i : i + size]) for i in range(0, len(samples), size)]


@contextlib.contextmanager
def serving(folder: Path, *options: str) -> Iterator[str]:
    """`kd.serve` on this machine; its url."""
    settings = ["serve.port=0", "parallel.compute_dtype=float32", "teacher.dtype=float32"]
    process = subprocess.Popen(
        [sys.executable, "-m", "kd.serve", f"teacher.name={folder}", *settings, *options],
        stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if found := re.search(r"serving .* at (http://\S+)", line):
            break
    else:
        raise SystemExit(said)
    try:
        yield found[1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


# ---- tokens per second ---------------------------------------------------------------------------


def serve_case(args: argparse.Namespace) -> None:
    """The same rows through the model here, and through the server by four clients at once."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "teacher"
        make_teacher(folder, args)
        batches = batches_of(folder, args)
        tokens = sum(batch.num_tokens for batch in batches)
        responses = sum(len(batch.rollouts) for batch in batches)
        model = FrozenVLM(AutoModelForImageTextToText.from_pretrained(folder))

        def local() -> None:
            for batch in batches:
                model.targets(batch.teacher)

        rounds: dict[str, list[float]] = {}
        budget = f"serve.max_batch_tokens={args.batch_size * args.max_length}"
        with serving(folder, budget, f"serve.max_length={args.max_length}") as url:
            variants = {"local": local}
            for name, engine in {
                "hidden": KdServe(),
                "topk": KdServe(targets="topk", k=128),
            }.items():
                variants[f"4 clients, {name}"] = clients(folder, url, engine, batches, args)
            for number in range(args.runs + 1):
                for name, run in variants.items():
                    started = time.perf_counter()
                    run()
                    if number:
                        rounds.setdefault(name, []).append(time.perf_counter() - started)
        lines = []
        for name, times in rounds.items():
            seconds = statistics.median(times)
            pairs = zip(rounds["local"], times, strict=True)
            share = statistics.median(local_s / own_s for local_s, own_s in pairs)
            per_s = f"{len(batches) / seconds:.2f}", f"{responses / seconds:.1f}"
            lines.append([name, *per_s, f"{tokens / seconds:,.0f}", f"{share:.2f}"])
        rows = f"requests/s (of {args.batch_size} rows)"
        table(["", rows, "rows/s", "tokens/s", "of local"], lines)


@functools.cache
def one_rank(device: str) -> World:
    return ParallelConfig(device=device).build()


def clients(folder: Path, url: str, engine: KdServe, batches: list[Batch], args):
    """Four trainers that each ask for a quarter of the batches."""
    config = ServerTeacherConfig(
        name=str(folder),
        urls=[url],
        engine=engine,
        max_length=args.max_length,
        rows_per_request=args.batch_size,
    )
    processor = config.build_processor(list)
    world, parallel = one_rank("cpu"), ParallelConfig(device="cpu")
    teachers = [config.build_teacher(processor, world, parallel, VOCAB) for _ in range(4)]

    def work(number: int) -> None:
        mine = batches[number::4]
        teachers[number].expect(mine)
        for batch in mine:
            teachers[number].targets(batch)

    def run() -> None:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return run


# ---- training ------------------------------------------------------------------------------------


def train(run_dir: Path, name: str, *overrides: str) -> dict[str, float]:
    """Median of the metrics of a run of the recipe, without its first steps."""
    common = [f"run.dir={run_dir}", f"run.name={name}", "logger=jsonl", "train.val_every=null"]
    common += [f"train.max_steps={STEPS}", "optim.warmup_steps=1", "train.log_every=1"]
    common += ["train.global_batch_size=32", "train.micro_batch_size=8", "doctor=never"]
    command = [sys.executable, "-m", "kd.run", "--config-name", "digits_kd", *common, *overrides]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    lines = [json.loads(x) for x in (run_dir / name / "metrics.jsonl").read_text().splitlines()]
    keys = ("train/step_s", "train/teacher_s", "cache/hit_rate")
    return {
        key: statistics.median(line[key] for line in lines[WARMUP_STEPS:])
        for key in keys
        if key in lines[-1]
    }


def epochs_case(args: argparse.Namespace) -> None:
    """The same steps with the teacher at work, with a cache that it fills, and from the cache."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, runs = Path(scratch) / "teacher", Path(scratch) / "runs"
        make_teacher(folder, args)
        cached = ["teacher=cached", f"teacher.source.name={folder}"]
        cached += ["teacher.source.dtype=float32", f"teacher.folder={scratch}/cache"]
        variants = {
            "live": ["teacher=local", f"teacher.name={folder}", "teacher.dtype=float32"],
            "filling": cached,
            "full": [*cached, "teacher.require_full=true"],
        }
        report({name: train(runs, name, *options) for name, options in variants.items()})


def ahead_case(args: argparse.Namespace) -> None:
    """A step with the targets asked for one step ahead, and when they are needed.

    Trainer and server have one thread each: they work at the same time.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder, runs = Path(scratch) / "teacher", Path(scratch) / "runs"
        make_teacher(folder, args)
        single = "parallel.cpu_threads=1"
        with serving(folder, single) as near, delayed(near, args.delay_ms) as far:
            found = {}
            for place, url in {"near": near, "far": far}.items():
                for ahead in ("false", "true"):
                    options = ["teacher=server", f"teacher.name={folder}", f"teacher.urls=[{url}]"]
                    options += ["data.max_length=512", f"teacher.ahead={ahead}", single]
                    found[f"{place}, ahead={ahead}"] = train(runs, f"{place}_{ahead}", *options)
        report(found)


def report(found: dict[str, dict[str, float]]) -> None:
    names = list(next(iter(found.values())))
    lines = [[name, *(f"{values.get(n, 0):.3f}" for n in names)] for name, values in found.items()]
    table(["", *names], lines)


@contextlib.contextmanager
def delayed(upstream: str, delay_ms: float) -> Iterator[str]:
    """A proxy that holds every reply back."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            reply = httpx.request(
                self.command, upstream + self.path, content=body, timeout=600, trust_env=False
            )
            time.sleep(delay_ms / 1000)
            self.send_response(reply.status_code)
            self.send_header("content-length", str(len(reply.content)))
            self.end_headers()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the run has ended
                self.wfile.write(reply.content)

        do_GET = do_POST

        def log_message(self, format: str, *args) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


CASES = {
    "bytes": bytes_case,
    "topk": topk_case,
    "serve": serve_case,
    "epochs": epochs_case,
    "ahead": ahead_case,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=12, help="answers per response")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--delay-ms", type=float, default=500)
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {platform.processor()}\n")
    CASES[args.case](args)


if __name__ == "__main__":
    main()
