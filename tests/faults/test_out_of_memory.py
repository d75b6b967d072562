"""A run without memory says where, what a step holds, what would fit, and what is safe.

What raises is a stand-in, in torch's own words: nothing here has a GPU.
"""

from __future__ import annotations

import dataclasses
import errno
import re
from pathlib import Path
from typing import Any

import pytest

from kd import footprint, memory_options, plan_dflash
from kd.out_of_memory import DeviceMemory, explanation, is_of_device, is_of_host
from kd.process import ALLOCATOR
from kd.rundir import _flat, differences
from tests.configs.test_yaml import composed
from tests.conftest import FAST, metrics
from tests.faults.full_memory import MESSAGES, error
from tests.processes import Process, completed, environment, python

SMALL = ["student=digits_small", "doctor=never", "logger=jsonl"]


def run_with(kind: str, module: str, name: str, call: int, *overrides: str) -> Process:
    """`kd.run`, full at one place."""
    fault = ["-m", "tests.faults.full_memory", kind, module, name, str(call)]
    return completed(*python(*fault, *overrides), cwd=Path(__file__).parents[2])


def test_in_the_backward_of_a_run_with_a_checkpoint(tmp_path):
    command = ["--config-name", "digits_teacher", *FAST, *SMALL, f"run.dir={tmp_path}"]
    command += ["train.save_every=2", "train.max_steps=4"]
    done = run_with("cuda", "torch.autograd", "backward", 4, *command)
    assert done.returncode == 2
    said = done.stderr
    assert "the device has 79.15 GiB: 69.50 GiB allocated, 0.50 GiB reserved by PyTorch" in said
    assert "8.00 GiB of other processes" in said and "fragmentation" not in said
    for part in ("student weights", "gradients", "optimizer", "activations", "loss buffers"):
        assert re.search(rf"^  {part} +[\d.]+ GiB$", said, flags=re.MULTILINE)
    first, last = said.strip().splitlines()[-2:]
    assert first == (
        "error: out of memory (cpu) in the backward: CUDA out of memory. Tried to allocate 2.00 GiB"
    )
    assert last.startswith("Checkpoint step_000002 is whole, nothing is lost up to step 2")
    offered = re.findall(r"^  (\S+=.*?)  # [\d.]+ GiB$", said, flags=re.MULTILINE)
    assert 1 <= len(offered) <= 3

    resumed = completed(*python("-m", "kd.run", *command, *offered[-1].split()))
    assert resumed.returncode == 0, resumed.tail()
    assert "after step 2" in resumed.stderr
    assert sorted(metrics(tmp_path / "digits_teacher", "train/loss")) == [1, 2, 3, 4]


def test_of_two_ranks_the_one_without_memory_says_it(tmp_path):
    command = ["--config-name", "digits_teacher", *FAST, *SMALL, f"run.dir={tmp_path}"]
    module = ["-m", "tests.faults.full_memory", "cuda", "torch.autograd", "backward", "2"]
    ranks = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--local-addr=localhost"]
    done = completed(
        *python(*ranks, *module, *command),
        cwd=Path(__file__).parents[2],
        env=environment(RANK_OF_FAULT="1"),
    )
    assert done.returncode != 0
    assert done.stderr.count("out of memory (cpu) in the backward") == 1
    assert "[rank 1] error: out of memory" in done.stderr
    assert re.search(r"^  gathered blocks, embeddings and heads +[\d.]+ GiB$", done.stderr, re.M)


@pytest.mark.parametrize(
    ("full", "overrides", "says"),
    [
        ("kd.objective_loop._run_chunks", [], "(cpu) in the loss: CUDA out of memory"),
        ("kd.model.Student._hidden", [], "(cpu) in the student's forward: CUDA out of memory"),
        ("kd.model.VLM.place", [], "(cpu) in setting up: CUDA out of memory"),
        ("transformers.GenerationMixin.generate", ["train.val_every=1"], "responses of validation"),
        ("torch.optim.AdamW._init_group", [], "(host memory) in the optimizer: [enforce fail"),
    ],
)
def test_place_is_named(train, capsys, monkeypatch, full, overrides, says):
    def fail(*_: Any, **__: Any) -> None:
        raise error("host" if "host" in says else "cuda")

    monkeypatch.setattr(full, fail)
    with pytest.raises(SystemExit) as exit_:
        train("digits_teacher", "full", *SMALL, *overrides, "data.val_samples=2")
    assert exit_.value.code == 2
    error_line, safe = capsys.readouterr().err.strip().splitlines()[-2:]
    assert says in error_line
    assert safe.startswith("There is no checkpoint yet")


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("qwen_vl_kd", {}),
        ("qwen_vl_kd", {"batching": "token_budget", "batching.max_tokens": "65536"}),
        ("dflash", {"experiment": "qwen3_5_4b_dflash", "train.micro_batch_size": "16"}),
    ],
)
def test_what_is_offered_fits(name, overrides, monkeypatch):
    """Composed as it would be pasted, and planned anew."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    dflash = name == "dflash"
    options = plan_dflash.options if dflash else memory_options.options
    make_plan = plan_dflash.make_plan if dflash else footprint.make_plan
    config = composed(name, *as_words(overrides))
    memory = DeviceMemory.of(MESSAGES["cuda"])
    assert memory.total is not None
    with footprint.pretend_ranks(config.parallel) as world:
        lines = list(explanation(config, world, options, memory))
    offered = [line.split("  # ")[0].split() for line in lines if "  # " in line]
    assert 1 <= len(offered) <= 3
    before = make_plan(config).total
    for changes in offered:
        changed = composed(name, *as_words(overrides | dict(c.split("=") for c in changes)))
        assert changed.train.global_batch_size == config.train.global_batch_size
        flat = (_flat(dataclasses.asdict(x)) for x in (config, changed))
        assert not differences(*flat), "the run goes on with it"
        assert make_plan(changed).total <= min(before, memory.total - memory.others - 6 * 2**30)


def as_words(overrides: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in overrides.items()]


def test_figures_of_the_device(monkeypatch):
    memory = DeviceMemory.of(MESSAGES["cuda"])
    assert (memory.total, memory.allocated) == (int(79.15 * 2**30), int(69.5 * 2**30))
    assert memory.others == pytest.approx(8 * 2**30, abs=0.01 * 2**30)
    assert not memory.is_fragmented
    assert DeviceMemory.of(MESSAGES["fragmented"]).is_fragmented
    fragmented = DeviceMemory.of(MESSAGES["fragmented"])
    assert not any("expandable_segments" in line for line in fragmented.lines())  # set by kd
    for name in ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    assert any("set PYTORCH_ALLOC_CONF=expandable_segments" in line for line in fragmented.lines())
    nothing = DeviceMemory.of("CUDA error: out of memory")
    assert nothing.total is None and not list(nothing.lines()) and not nothing.is_fragmented


@pytest.mark.parametrize(
    ("raised", "device", "host"),
    [
        (error("cuda"), True, False),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
            True,
            False,
        ),
        (RuntimeError("CUDA error: out of memory"), True, False),
        (error("host"), False, True),
        (MemoryError(), False, True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), False, True),
        (OSError(errno.ENOSPC, "No space left on device"), False, False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False, False),
    ],
    ids=str,
)
def test_which_errors_are_of_memory(raised, device, host):
    assert (is_of_device(raised), is_of_host(raised)) == (device, host)
