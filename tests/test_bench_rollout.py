from __future__ import annotations

import importlib.util
import json
import math
import sys

import pytest

SMALL = ("--grad-accum", "2", "--micro-batch", "2", "--max-new-tokens", "3", "--runs", "1")
EXPECTED = {
    "buffer": ["2 calls, no buffer", "1 call, buffer"],
    "plain": [
        "sampled: plain generate",
        "sampled: hf engine",
        "greedy: plain generate",
        "greedy: hf engine",
    ],
}


@pytest.fixture(scope="module")
def script(repo):
    spec = importlib.util.spec_from_file_location(
        "bench_rollout", repo / "scripts/bench_rollout.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", EXPECTED)
def test_every_variant_is_measured_on_equal_work(script, case, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_rollout.py", case, *SMALL, "--n", "2", "--json"])
    script.main()
    about, *rows = map(json.loads, capsys.readouterr().out.splitlines())
    assert about["threads"] == 1 and about["machine"]
    assert [row["variant"] for row in rows] == EXPECTED[case]
    for row in rows:
        assert (row["n"], row["tokens"]) == (2, 2 * 2 * 3)
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
        assert math.isclose(row["tokens_per_s"], row["tokens"] / row["median_s"])
        assert math.isfinite(row["speed"]) and row["speed"] > 0
    assert [row["speed"] == 1 for row in rows] == [i % 2 == 0 for i in range(len(rows))]


def test_calls_that_split_a_prompt_s_rollouts_are_refused(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_rollout.py", "buffer", *SMALL, "--n", "4"])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert "--n 4 does not divide --micro-batch 2" in capsys.readouterr().err
