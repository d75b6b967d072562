"""What the generation buffer and the rollout engines cost: seconds and rollout tokens per second.

    python scripts/bench_rollout.py buffer                 one call of the engine per window, or 8
    python scripts/bench_rollout.py plain                  the hf engine, or `generate` on its own
    python scripts/bench_rollout.py save DIR --family qwen3_vl
    bash scripts/vllm_server.sh DIR --max-model-len 256    and, beside it:
    python scripts/bench_rollout.py buffer --engine vllm --model DIR
    python scripts/bench_rollout.py async --model DIR      the recipe, a window ahead or not

The variants of a case take turns, round by round, after a round to warm up: what else the machine
does meets them alike. `speed` is the median over the rounds of tokens per second over those of the
case's first variant in the same round. No response ends before `--max-new-tokens` (but in `async`,
which trains), so the variants of a case generate equally many tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin
from transformers.utils import logging as transformers_logging

from kd.data import Collator, Renderer
from kd.data.digits import DigitsConfig, all_texts
from kd.model import VLM, PretrainedModel, ScratchModel
from kd.model.spec import ModelConfig
from kd.parallel import ParallelConfig
from kd.rollout import EngineConfig, HFEngineConfig, Policy, Sampling
from kd.rollout.engine import Engine
from kd.types import Inputs, Sample

REPO = Path(__file__).parents[1]
WARMUP_STEPS = 2
"""Of the recipe: the first window is generated before anything is trained on."""


class Timing(NamedTuple):
    seconds: float
    tokens: int


class Variant(NamedTuple):
    name: str
    prepare: Callable[[], None]
    """Not timed."""
    run: Callable[[], int]
    """Returns the tokens generated."""


# ---- the model -----------------------------------------------------------------------------------


def architecture(args: argparse.Namespace) -> dict[str, Any]:
    """That of student=digits_small, of another family or size if asked for."""
    config = OmegaConf.load(REPO / "configs/student/digits_small.yaml").architecture
    arch: dict[str, Any] = OmegaConf.to_container(config)  # pyright: ignore[reportAssignmentType]
    text, vision = arch["text_config"], arch["vision_config"]
    if args.hidden:
        text |= {"hidden_size": args.hidden, "intermediate_size": 8 * args.hidden // 3}
        text["num_attention_heads"] = max(1, args.hidden // text["head_dim"])
        vision["out_hidden_size"] = args.hidden
    if args.layers:
        text["num_hidden_layers"] = args.layers
        text["layer_types"] = ["full_attention"] * args.layers
    if args.family == "qwen3_vl":
        del text["layer_types"], text["rope_parameters"]["partial_rotary_factor"]
        vision["deepstack_visual_indexes"] = list(range(vision["depth"]))
    return arch | {"model_type": args.family}


def model_config(args: argparse.Namespace) -> ModelConfig:
    if args.model:
        return PretrainedModel(name=str(args.model), dtype=args.dtype)
    return ScratchModel(architecture=architecture(args), dtype=args.dtype)


def build_model(args: argparse.Namespace, processor: ProcessorMixin) -> PreTrainedModel:
    """The same weights each time."""
    model = model_config(args).build(processor, with_weights=True)
    if args.vocab:
        torch.manual_seed(0)
        model.resize_token_embeddings(args.vocab, mean_resizing=False)
    return model


@contextlib.contextmanager
def policy(args: argparse.Namespace) -> Iterator[Policy]:
    """As the recipe builds it, but that nothing which can be sampled ends a response."""
    settings = ParallelConfig(
        device=args.device, compute_dtype=args.dtype, cpu_threads=args.threads
    )
    world = settings.build()
    processor = model_config(args).build_processor(all_texts)
    vlm = VLM(build_model(args, processor))
    vlm.distribute(world, settings)
    length = DigitsConfig().max_length
    prompts = Collator(Renderer(processor), None, length, lockstep=False).prompts
    never = vlm.forbidden_ids(len(processor.tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        yield Policy(vlm, processor, prompts, never[:1], never, world, length, folder=Path(folder))
    world.close()


def window(args: argparse.Namespace, renders: Policy, n: int) -> list[Sample]:
    """The prompts of an optimizer step, rendered, as a source hands them to an engine."""
    rows = DigitsConfig().build("train")
    count = args.micro_batch * args.grad_accum // n
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    collator = Collator(Renderer(renders.processor), None, renders.max_length, lockstep=False)
    usable, rejected = collator.screen([rows[i] for i in order[:count]], args.max_new_tokens)
    assert not rejected, rejected
    return usable


# ---- cases ---------------------------------------------------------------------------------------


def engine_config(args: argparse.Namespace) -> EngineConfig:
    if args.engine == "hf":
        return HFEngineConfig()
    from kd.rollout.vllm import VllmEngineConfig

    return VllmEngineConfig(urls=args.url, weights_dtype=args.dtype)


def call(engine: Engine, prompts: list[Sample], n: int, sampling: Sampling, calls: int) -> int:
    """Generate in so many calls of equally many prompts."""
    each, tokens = len(prompts) // calls, 0
    for start in range(0, len(prompts), each):
        part = prompts[start : start + each]
        rollouts = engine.generate(part, n, sampling, list(range(start, start + each)))
        tokens += sum(len(rollout.response_ids) for rollout in rollouts)
    return tokens


def buffer(args: argparse.Namespace, sides: Policy, n: int) -> dict[str, list[Timing]]:
    """A window in one call, against a call for each of its micro-batches."""
    engine = engine_config(args).build(sides)
    prompts, sampling = window(args, sides, n), Sampling(max_new_tokens=args.max_new_tokens)
    steps = iter(range(10**9))

    def variant(name: str, calls: int) -> Variant:
        # Hands over the weights, after which a server has no prompt in its cache.
        return Variant(
            name,
            lambda: engine.sync(next(steps)),
            lambda: call(engine, prompts, n, sampling, calls),
        )

    per_batch = variant(f"{args.grad_accum} calls, no buffer", args.grad_accum)
    try:
        return take_turns([per_batch, variant("1 call, buffer", 1)], args)
    finally:
        engine.close()


def plain(args: argparse.Namespace, ours: Policy, n: int) -> dict[str, list[Timing]]:
    """The engine, which renders, sorts and cuts too, against `generate` on a batch made before."""
    engine = HFEngineConfig().build(ours)
    model = build_model(args, ours.processor).to(ours.world.device).eval()
    prompts = window(args, ours, n)
    batch = ours.prompts([sample for sample in prompts for _ in range(n)]).to(ours.world.device)
    variants = []
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        sampling = Sampling(temperature=temperature, max_new_tokens=args.max_new_tokens)
        variants += [
            Variant(
                f"{name}: plain generate",
                lambda: None,
                lambda do=temperature > 0: plain_generate(model, batch, args.max_new_tokens, do),
            ),
            Variant(
                f"{name}: hf engine",
                lambda: None,
                lambda sampling=sampling: call(engine, prompts, n, sampling, 1),
            ),
        ]
    return take_turns(variants, args)


@torch.no_grad()
def plain_generate(model: PreTrainedModel, batch: Inputs, max_new_tokens: int, do: bool) -> int:
    vocab = model.get_output_embeddings().weight.shape[0]
    never = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=do,
        top_k=0 if do else None,
        eos_token_id=[vocab],
        pad_token_id=0,
    )
    ids = model.generate(**batch.model_inputs(), generation_config=never)
    return sum(map(len, ids[:, batch.input_ids_BS.shape[1] :].tolist()))


def take_turns(variants: list[Variant], args: argparse.Namespace) -> dict[str, list[Timing]]:
    """`--runs` rounds of all variants, every other one backwards, after one to warm up."""
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    expected = args.micro_batch * args.grad_accum * args.max_new_tokens
    timings: dict[str, list[Timing]] = {variant.name: [] for variant in variants}
    for number in range(args.runs + 1):
        for variant in variants[:: 1 if number % 2 else -1]:
            variant.prepare()
            start = clock()
            tokens = variant.run()
            seconds = clock() - start
            assert tokens == expected, f"{variant.name}: {tokens} tokens, not {expected}"
            if number:
                timings[variant.name].append(Timing(seconds, tokens))
    return timings


def ahead(args: argparse.Namespace, n: int) -> dict[str, list[Timing]]:
    """The training steps of the recipe with the next window generated meanwhile, and without."""
    timings: dict[str, list[Timing]] = {"sync": [], "async": []}
    for number in range(args.runs):
        for async_steps in (0, 1) if number % 2 else (1, 0):
            with tempfile.TemporaryDirectory() as folder:
                name = "async" if async_steps else "sync"
                timings[name].append(train(args, n, async_steps, folder))
    return timings


def train(args: argparse.Namespace, n: int, async_steps: int, folder: str) -> Timing:
    """Seconds of the steps after the first ones, and the tokens trained on in them."""
    overrides = [
        "rollout/engine=vllm",
        f"rollout.engine.urls=[{','.join(args.url)}]",
        f"rollout.async_steps={async_steps}",
        f"rollout.num_generations={n}",
        f"rollout.sampling.max_new_tokens={args.max_new_tokens}",
        f"train.micro_batch_size={args.micro_batch}",
        f"train.grad_accum={args.grad_accum}",
        f"train.max_steps={WARMUP_STEPS + args.steps}",
        "train.log_every=1",
        "train.val_every=null",
        "optim.warmup_steps=1",
        f"parallel.device={args.device}",
        f"parallel.compute_dtype={args.dtype}",
        f"parallel.cpu_threads={args.threads}",
        "logger=jsonl",
        f"student.name={args.model}",
        f"teacher.name={args.teacher or args.model}",
        f"run.dir={folder}",
        "run.name=bench",
    ]
    command = [sys.executable, "-m", "kd.run", "--config-name", "digits_opd"]
    done = subprocess.run([*command, *overrides, *args.override], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip() or done.stdout.strip())
    lines = (Path(folder) / "bench/metrics.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if "train/step_s" in row][WARMUP_STEPS:]
    assert len(steps) == args.steps
    tokens = sum(row["train/num_targets"] for row in steps)
    return Timing(sum(row["train/step_s"] for row in steps), int(tokens))


# ---- output --------------------------------------------------------------------------------------


def summarise(case: str, n: int, timings: dict[str, list[Timing]]) -> list[dict[str, Any]]:
    """A row per variant. Names `a: …` are compared with the first of that `a`."""
    rows, bases = [], {}
    for name, found in timings.items():
        per_s = [timing.tokens / timing.seconds for timing in found]
        base = bases.setdefault(name.rpartition(":")[0], per_s)
        seconds = [timing.seconds for timing in found]
        rows.append(
            {
                "case": case,
                "n": n,
                "variant": name,
                "median_s": statistics.median(seconds),
                "min_s": min(seconds),
                "max_s": max(seconds),
                "tokens": found[0].tokens,
                "tokens_per_s": statistics.median(per_s),
                "speed": statistics.median(a / b for a, b in zip(per_s, base, strict=True)),
            }
        )
    return rows


def machine(args: argparse.Namespace) -> str:
    if args.device == "cuda":
        chip = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo").read_text().splitlines()
        chip = next(x.split(":")[1].strip() for x in info if x.startswith("model name"))
        chip += f" ({torch.backends.cpu.get_cpu_capability()})"
    return f"{chip}; torch {torch.__version__}, Python {platform.python_version()}"


def facts(args: argparse.Namespace) -> dict[str, Any]:
    clock = "wall" if args.case == "async" else args.clock
    kept = ("engine", "micro_batch", "grad_accum", "max_new_tokens", "dtype", "threads", "runs")
    own = ("model",) if args.model else ("family", "hidden", "layers", "vocab")
    return {
        "machine": machine(args),
        "case": args.case,
        "clock": clock,
        **{name: getattr(args, name) for name in kept},
        **{name: str(getattr(args, name) or "digits_small") for name in own},
    }


def markdown(about: dict[str, Any], rows: list[dict[str, Any]]) -> Iterator[str]:
    settings = ", ".join(f"{k} {v}" for k, v in about.items() if k != "machine")
    yield f"{about['machine']}\n\n{settings}\n"
    yield "| case | n | variant | seconds, median (min-max) | rollout tokens/s | speed |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        span = f"{row['median_s']:.3g} ({row['min_s']:.3g}-{row['max_s']:.3g})"
        yield (
            f"| {row['case']} | {row['n']} | {row['variant']} | {span} | "
            f"{row['tokens_per_s']:,.0f} | {row['speed']:.2f} |"
        )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("case", choices=["buffer", "plain", "async", "save"])
    parser.add_argument("folder", type=Path, nargs="?", help="save: where the model is written")
    parser.add_argument("--engine", choices=["hf", "vllm"], default="hf", help="of buffer")
    parser.add_argument("--url", nargs="+", default=["http://127.0.0.1:8000"], help="vLLM servers")
    parser.add_argument("--model", type=Path, help="folder; default: random weights of:")
    parser.add_argument("--family", choices=["qwen3_5", "qwen3_vl"], default="qwen3_5")
    parser.add_argument("--hidden", type=int, help="a multiple of 32; default: digits_small")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vocab", type=int, help="default: the tokenizer's")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--grad-accum", type=int, default=8)
    parser.add_argument("--n", type=int, nargs="+", default=[1, 4], help="rollouts of each prompt")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5, help="rounds")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: processor seconds of this process; on a shared machine, with one thread and hf",
    )
    parser.add_argument("--teacher", type=Path, help="async: default: --model")
    parser.add_argument("--steps", type=int, default=10, help="async: steps that are timed")
    parser.add_argument("--override", nargs="+", default=[], help="async: more of the command line")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="a table (the default)")
    form.add_argument("--json", action="store_true", help="JSON lines: facts, then a row each")
    args = parser.parse_args()
    check(parser, args)
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if (args.case == "save") != (args.folder is not None):
        parser.error("a folder belongs to save, and to nothing else")
    if args.case == "async" and args.model is None:
        parser.error("async needs --model, the folder that the server serves: make it by save")
    if args.case == "async":
        args.engine = "vllm"
    elif args.case == "plain" and args.engine != "hf":
        parser.error("plain compares the hf engine only")
    if args.engine == "vllm" and args.clock == "cpu":
        parser.error("--clock cpu leaves out the seconds of a server: use wall")
    for n in args.n:
        if n < 1 or args.micro_batch % n:
            parser.error(f"--n {n} does not divide --micro-batch {args.micro_batch}")


def save(args: argparse.Namespace) -> None:
    """A folder that a server can serve, with the weights that the other cases begin with."""
    processor = model_config(args).build_processor(all_texts)
    build_model(args, processor).save_pretrained(args.folder)
    processor.save_pretrained(args.folder)


def main() -> None:
    args = parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    if args.case == "save":
        save(args)
        return
    rows: list[dict[str, Any]] = []
    if args.case == "async":
        for n in args.n:
            rows += summarise(args.case, n, ahead(args, n))
    else:
        measure = {"buffer": buffer, "plain": plain}[args.case]
        with policy(args) as shared:
            for n in args.n:
                rows += summarise(args.case, n, measure(args, shared, n))
    about = facts(args)
    lines = map(json.dumps, [about, *rows]) if args.json else markdown(about, rows)
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
