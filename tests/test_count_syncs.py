"""`scripts/count_syncs.py`: what it counts, and what a step has."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "scripts" / "count_syncs.py"
SYNCS = runpy.run_path(str(SCRIPT), run_name="count_syncs")

x, mask = torch.arange(4.0), torch.tensor([True, False, True, False])
counts = torch.tensor([1, 0, 2, 1])


@pytest.mark.parametrize(
    ("work", "what"),
    [
        (lambda: x[0].item(), "item"),
        (lambda: float(x[0]), "item"),
        (lambda: bool(mask.any()), "item"),
        (lambda: x.tolist(), "tolist"),
        (lambda: x.cpu(), "cpu"),
        (lambda: mask.nonzero(), "nonzero"),
        (lambda: x[mask], "index by a mask"),
        (lambda: x.clone().__setitem__(mask, torch.zeros(2)), "index by a mask"),
        (lambda: x.masked_select(mask), "masked_select"),
        (lambda: torch.equal(x, x), "equal"),
        (lambda: x.repeat_interleave(counts), "repeat_interleave"),
        (lambda: torch.tensor([1, 2], device="cpu"), "tensor of host numbers"),
    ],
)
def test_what_waits_is_counted(work, what):
    tally = SYNCS["Tally"]()
    with SYNCS["stand_in"](tally):
        work()
    assert tally.found == {("elsewhere", what): 1}


def test_what_does_not_wait_is_not_counted():
    tally = SYNCS["Tally"]()
    with SYNCS["stand_in"](tally):
        x[counts], x.masked_fill(mask, 0), x.where(mask, 1), x.sum(), x.index_select(0, counts)
        x.repeat_interleave(counts, output_size=4), x.repeat_interleave(2), x.split([1, 3])
        torch.zeros(2, device="cpu"), x.argsort(), mask.any()
    assert not tally.found


@pytest.mark.parametrize("student", ["digits_small", "digits_qwen3_vl"])
def test_a_step_finds_no_positions_and_reads_the_loss_once(student, monkeypatch, capsys):
    """By lines of the code that does it: none of `get_rope_index`, one of the metrics."""
    options = ["--config-name", "digits_kd", "--steps", "2", "kd_ratio=0", f"student={student}"]
    options += ["train.micro_batch_size=2", "parallel.device=cpu", "parallel.cpu_threads=1"]
    found = {}
    monkeypatch.setattr(sys, "argv", ["count_syncs", *options])
    main = SYNCS["main"]
    monkeypatch.setitem(main.__globals__, "show", lambda syncs, *rest: found.update(syncs))
    main()
    ours = {line: number for (line, _), number in found.items() if line.startswith("kd/")}
    assert [line.split(":")[0] for line in ours] == ["kd/metrics.py"]
    assert list(ours.values()) == [2]
    # A tower of two layers splits queries, keys and values by image.
    model = "qwen3_5" if student == "digits_small" else "qwen3_vl"
    split = f"transformers/models/{model}/modeling_{model}.py"
    lists = {line: n for (line, what), n in found.items() if what == "tolist" and split in line}
    assert sorted(lists.values()) == [2, 12]
    items = [n for (line, what), n in found.items() if what == "item" and split in line]
    assert sum(items) <= 2
