"""Losses by data set: what each of its targets adds, whoever else is in the micro-batch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kd.align import Groups
from kd.loss import GOLDConfig, ULDConfig
from kd.metrics import Datasets, memory, mix
from kd.objective import KDOutput
from kd.types import Batch, Inputs, Rollout, Sample
from tests.loss import test_aligned as aligned
from tests.loss import test_unlabelled_rows as dense
from tests.loss.test_loss_objective import SyncCounter

DATASETS = Datasets(["few", "many", "unseen"])
LENGTHS = aligned.STUDENT_LENGTHS
NAMES = {"mixed": ["many", "few", "many", "few"], "not aligned": ["many", "few", "many", "many"]}


def make_batch(names: list[str], lengths: list[int], groups: Groups | None = None) -> Batch:
    """All of a micro-batch that metrics read."""
    rollouts = [
        Rollout(Sample(str(i), [], [], None, dataset=name), [7] * length, True, 0)
        for i, (name, length) in enumerate(zip(names, lengths, strict=True))
    ]
    ids_BS = torch.zeros(1, sum(lengths), dtype=torch.int64)
    inputs = Inputs(ids_BS, ids_BS, torch.arange(sum(lengths)), {})
    return Batch(inputs, inputs, ids_BS, ids_BS[0], rollouts, groups=groups)


def found(parts: list[tuple[Batch, KDOutput]], kd_ratio: float) -> dict[str, float]:
    """Of the micro-batches of a step."""
    counts = DATASETS.counts([batch for batch, _ in parts])
    sums = torch.stack([DATASETS.sums(batch, out) for batch, out in parts]).sum(0).tolist()
    return DATASETS.metrics("train", kd_ratio, counts, sums)


def expected(
    names: list[str], ce_N: Tensor, kd_N: Tensor, starts: list[int], kd_ratio: float
) -> dict[str, float]:
    """Target by target; `names` are theirs, `starts` the rows that begin a target of the KD."""
    result = {}
    ce_N, kd_N = ce_N.detach(), kd_N.detach()
    for name in set(names):
        ce = [float(x) for x, mine in zip(ce_N, names, strict=True) if mine == name]
        kd = [float(kd_N[r]) for r in starts if names[r] == name]
        result[f"train/ce_{name}"] = sum(ce) / len(ce)
        if kd:
            result[f"train/kd_{name}"] = sum(kd) / len(kd)
        kd_mean = sum(kd) / len(kd) if kd else 0.0
        result[f"train/loss_{name}"] = mix(sum(ce) / len(ce), kd_mean, kd_ratio)
    return result


@pytest.mark.parametrize("rows", NAMES)
@pytest.mark.parametrize("config", [ULDConfig(), GOLDConfig()], ids=["uld", "gold"])
@pytest.mark.parametrize("unlabelled", aligned.UNLABELLED)
def test_groups_and_samples_without_labels(rows, config, unlabelled):
    """For any micro-batches, with a response that could not be aligned."""
    case = aligned.make_case(unlabelled=unlabelled)
    names = [name for name, n in zip(NAMES[rows], LENGTHS, strict=True) for _ in range(n)]
    starts = [start for start, _, _, _ in case.targets.groups.spans]
    _, ce_N, kd_N = aligned.reference(case, config, 0.4, len(names), len(starts))
    wanted = expected(names, ce_N, kd_N, starts, 0.4)
    assert ("train/kd_few" in wanted) == (rows == "mixed")
    objective = config.build(0.4)
    for at in range(len(LENGTHS) + 1):
        parts = []
        for part, which in zip(case.split(at), (slice(0, at), slice(at, None)), strict=True):
            batch = make_batch(NAMES[rows][which], LENGTHS[which], part.targets.groups)
            counts = len(names), len(starts)
            parts.append((batch, objective(*part.parameters, part.labels_N, part.targets, *counts)))
        assert found(parts, 0.4) == pytest.approx(wanted, rel=1e-11)

    # Weighted by counts they are the losses of the step.
    counts = DATASETS.counts([batch for batch, _ in parts])
    for i, term in enumerate(("ce", "kd")):
        means = [wanted.get(f"train/{term}_{name}", 0) for name in DATASETS.names]
        whole = sum(n * mean for n, mean in zip(counts[i::2], means, strict=True))
        step = sum(float(getattr(out, term)) for _, out in parts)
        assert whole / sum(counts[i::2]) == pytest.approx(step, rel=1e-11)


@pytest.mark.parametrize("body", ["eager", "autograd"])
@pytest.mark.parametrize("kd_ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("unlabelled", dense.UNLABELLED)
def test_token_by_token(body, kd_ratio, unlabelled):
    """Responses of one data set that do not follow each other, and an empty one."""
    case = dense.make_case(dense.UNLABELLED[unlabelled])
    batch = make_batch(["many", "few", "few", "many", "few"], [2, 3, 0, 3, 1])
    names = ["many"] * 2 + ["few"] * 3 + ["many"] * 3 + ["few"]
    objective = dense.make_config("reverse_kl", body).build(kd_ratio)
    out = objective(*case.parameters, case.labels_N, case.targets(body), len(names))
    _, ce_N, kd_N = dense.reference(case, "reverse_kl", kd_ratio, 1.0, len(names))
    if kd_ratio == 0:  # no teacher is asked
        kd_N = torch.zeros_like(kd_N)
    wanted = expected(names, ce_N, kd_N, list(range(len(names))), kd_ratio)
    assert found([(batch, out)], kd_ratio) == pytest.approx(wanted, rel=1e-11)


def outputs(ce_N: list[float], kd_N: list[float]) -> KDOutput:
    ce, kd = torch.tensor(ce_N), torch.tensor(kd_N)
    return KDOutput(ce.sum() + kd.sum(), ce.sum(), kd.sum(), kd, ce)


def test_an_infinity_stays_where_it_is():
    batch = make_batch(["few", "many"], [2, 1])
    result = found([(batch, outputs([1.0, math.inf, 3.0], [math.nan, 1.0, 2.0]))], 0.5)
    assert result["train/ce_many"] == 3 and result["train/kd_many"] == 2
    assert result["train/ce_few"] == math.inf and math.isnan(result["train/kd_few"])


def test_a_batch_without_rows_and_a_step_without_targets():
    empty = make_batch([], []), outputs([], [])
    assert found([empty], 0.5) == {}
    one = make_batch(["few"], [1]), outputs([2.0], [4.0])
    means = {"train/loss_few": 3.0, "train/ce_few": 2.0, "train/kd_few": 4.0}
    assert found([empty, one], 0.5) == means


def test_no_host_sync():
    batch, out = make_batch(["few", "many"], [1, 2]), outputs([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    with SyncCounter() as counter:
        sums = DATASETS.sums(batch, out)
        assert counter.count == 0
        sums.tolist()
        float(sums[0])
    assert counter.count == 1


def test_without_a_mixture_nothing_is_told_apart():
    assert Datasets([]).counts([make_batch([""], [3])]) == []
    assert Datasets([]).metrics("train", 0.5, [], []) == {}


def test_memory_of_a_gpu_is_told_with_what_its_allocator_holds(monkeypatch):
    """There is none: torch's counters are replaced."""
    assert memory(torch.device("cpu")).keys() == {"train/peak_mem_gib"}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 5 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"num_alloc_retries": 2})
    assert memory(torch.device("cuda", 0)) == {
        "train/peak_mem_gib": 3,
        "train/peak_reserved_gib": 5,
        "train/alloc_retries": 2,
    }
