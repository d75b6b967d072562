"""Losses between different tokenizers, against autograd on all logits, by the formulas."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kd.align import AlignedTargets, Alignment, Groups, MatchedVocabulary
from kd.loss import AlignedLossConfig, ForwardKLConfig, GOLDConfig, Objective, ULDConfig
from kd.loss.aligned import Merge, mass_divergence, sorted_l1
from kd.loss.config import body_for
from kd.objective import KDOutput, chunked_objective, kd_weight
from kd.types import DenseTargets, TeacherTargets, UserError

TIGHT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}
VOCABS = [(19, 19), (23, 14), (14, 23)]
LOSSES: list[AlignedLossConfig] = [
    ULDConfig(),
    GOLDConfig(divergence="forward_kl"),
    GOLDConfig(divergence="reverse_kl"),
    GOLDConfig(divergence="jsd", beta=0.3),
    GOLDConfig(divergence="jsd", beta=0.0),
    GOLDConfig(divergence="jsd", beta=1.0),
    GOLDConfig(matched_weight=0.7, unmatched_weight=1.9),
]
RESPONSES = [
    Alignment([(0, 1, 0, 1), (1, 2, 1, 1), (3, 1, 2, 3), (4, 3, 5, 2), (7, 1, 7, 1)]),
    Alignment([]),  # could not be aligned
    Alignment([(0, 1, 0, 1)]),
    Alignment([(0, 2, 0, 2), (2, 1, 2, 1)]),
]
STUDENT_LENGTHS, TEACHER_LENGTHS = [8, 2, 1, 3], [8, 3, 1, 3]
UNLABELLED = {"none": [], "some": [0, 2, 5, 9, 13], "all": list(range(14))}


@dataclass
class Case:
    parameters: tuple[Tensor, Tensor, Tensor]
    labels_N: Tensor
    targets: AlignedTargets

    def split(self, at: int) -> list["Case"]:
        """The first `at` responses, and the rest."""
        n, m = sum(STUDENT_LENGTHS[:at]), sum(TEACHER_LENGTHS[:at])
        student_ids, teacher_ids = (
            self.targets.groups.student.ids_R,
            self.targets.groups.teacher.ids_R,
        )
        cases = []
        for part, rows, teacher_rows in (
            (slice(0, at), slice(0, n), slice(0, m)),
            (slice(at, None), slice(n, None), slice(m, None)),
        ):
            groups = join(student_ids[rows], teacher_ids[teacher_rows], part)
            hidden_MD = self.targets.hidden_MD[teacher_rows]
            targets = dataclasses.replace(self.targets, hidden_MD=hidden_MD, groups=groups)
            hidden_ND, *head = self.parameters
            cases.append(Case((hidden_ND[rows], *head), self.labels_N[rows], targets))
        return cases


def join(student_ids: Tensor, teacher_ids: Tensor, responses: slice) -> Groups:
    ours = [x.tolist() for x in student_ids.split(STUDENT_LENGTHS[responses])]
    theirs = [x.tolist() for x in teacher_ids.split(TEACHER_LENGTHS[responses])]
    return Groups.join(ours, theirs, RESPONSES[responses])


def make_case(
    vocabs: tuple[int, int] = (23, 14),
    unlabelled: str = "some",
    dtype: torch.dtype = torch.float64,
    matched: int = 9,
) -> Case:
    g = torch.Generator().manual_seed(3)
    vocab, teacher_vocab = vocabs
    rows, teacher_rows = sum(STUDENT_LENGTHS), sum(TEACHER_LENGTHS)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    hidden_ND, weight_VD, bias_V = (
        x.requires_grad_() for x in (randn(rows, 5), randn(vocab, 5), randn(vocab))
    )
    student_ids = torch.randint(vocab, (rows,), generator=g)
    teacher_ids = torch.randint(teacher_vocab, (teacher_rows,), generator=g)
    labels_N = student_ids.clone()
    labels_N[UNLABELLED[unlabelled]] = -100
    pairs = (torch.randperm(v, generator=g)[:matched] for v in vocabs)
    targets = AlignedTargets(
        randn(teacher_rows, 6),
        randn(teacher_vocab, 6),
        randn(teacher_vocab),
        join(student_ids, teacher_ids, slice(None)),
        MatchedVocabulary.of(*pairs),
    )
    return Case((hidden_ND, weight_VD, bias_V), labels_N, targets)


def merged(probs_RV: Tensor, ids: list[int], start: int, length: int, merge: Merge) -> Tensor:
    """One row's distribution, times the probability of the tokens of all others."""
    kept = start if merge is Merge.observed else start + length - 1
    m_V = probs_RV[kept]
    for r in range(start, start + length):
        if r != kept:
            m_V = m_V * probs_RV[r, ids[r]]
    return m_V


def l1_of_sorted(q: Tensor, p: Tensor) -> Tensor:
    q, p = q.sort(descending=True).values, p.sort(descending=True).values
    both = torch.zeros(2, max(len(q), len(p)), dtype=q.dtype)
    return (torch.cat([q, both[0, len(q) :]]) - torch.cat([p, both[0, len(p) :]])).abs().sum()


def on_matched(config: GOLDConfig, q: Tensor, p: Tensor) -> Tensor:
    m = config.beta * p + (1 - config.beta) * q

    def kl(x: Tensor, y: Tensor) -> Tensor:
        return (x * (x / y).log() - x + y).sum()

    if config.divergence == "forward_kl" or (config.divergence == "jsd" and config.beta == 0):
        return kl(p, q)
    if config.divergence == "reverse_kl" or config.beta == 1:
        return kl(q, p)
    return config.beta * kl(p, m) + (1 - config.beta) * kl(q, m)


def distance(config: AlignedLossConfig, q: Tensor, p: Tensor, matched: MatchedVocabulary) -> Tensor:
    if not isinstance(config, GOLDConfig):
        return l1_of_sorted(q, p)
    ours, theirs = matched.student_ids_K.tolist(), matched.teacher_ids_K.tolist()
    share = len(ours) / len(p)
    weight = share if config.matched_weight is None else config.matched_weight
    rest = 1 - share if config.unmatched_weight is None else config.unmatched_weight
    q_rest = q[[v for v in range(len(q)) if v not in ours]]
    p_rest = p[[v for v in range(len(p)) if v not in theirs]]
    return weight * on_matched(config, q[ours], p[theirs]) + rest * l1_of_sorted(q_rest, p_rest)


def reference(
    case: Case, config: AlignedLossConfig, kd_ratio: float, count: int, kd_count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, ce_N, kd_N)"""
    targets, groups = case.targets, case.targets.groups
    student_NV = F.linear(*case.parameters)
    teacher_MV = F.linear(targets.hidden_MD, targets.weight_VD, targets.bias_V)
    q_NV = (student_NV / config.temperature).softmax(-1)
    p_MV = (teacher_MV / config.teacher_temperature).softmax(-1)
    kd = {}
    for s, s_len, t, t_len in groups.spans:
        q = merged(q_NV, groups.student.ids_R.tolist(), s, s_len, config.merge)
        p = merged(p_MV, groups.teacher.ids_R.tolist(), t, t_len, config.merge)
        kd[s] = distance(config, q, p, targets.matched)
    zero = student_NV.sum() * 0
    kd_N = torch.stack([kd.get(r, zero) for r in range(len(case.labels_N))])
    logp_NV = student_NV.log_softmax(-1)
    labels = enumerate(case.labels_N.tolist())
    ce_N = torch.stack([-logp_NV[r, label] if label >= 0 else zero for r, label in labels])
    loss = (1 - kd_ratio) * ce_N.sum() / count + kd_ratio * kd_N.sum() / kd_count
    return loss, ce_N, kd_N


def grads(loss: Tensor, case: Case) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, case.parameters)


def assert_equals_reference(
    out: KDOutput,
    case: Case,
    config: AlignedLossConfig,
    kd_ratio: float,
    count: int,
    kd_count: int,
) -> None:
    loss, ce_N, kd_N = reference(case, config, kd_ratio, count, kd_count)
    torch.testing.assert_close(out.loss, loss, **TIGHT)
    torch.testing.assert_close(out.ce_N, ce_N.detach(), **TIGHT)
    torch.testing.assert_close(out.ce, ce_N.detach().sum() / count, **TIGHT)
    torch.testing.assert_close(out.kd_N, kd_N.detach(), **TIGHT)
    torch.testing.assert_close(out.kd, kd_N.detach().sum() / kd_count, **TIGHT)
    for ours, wanted in zip(grads(out.loss, case), grads(loss, case), strict=True):
        torch.testing.assert_close(ours, wanted, **TIGHT)


@pytest.mark.parametrize("config", LOSSES, ids=str)
@pytest.mark.parametrize("merge", Merge)
@pytest.mark.parametrize("vocabs", VOCABS)
@pytest.mark.parametrize("kd_ratio", [0.3, 1.0])
def test_equals_float64_autograd(config, merge, vocabs, kd_ratio):
    """Values and gradients, with a temperature each and counts that are not the batch's."""
    for temperatures in ((1.0, 1.0), (1.7, 0.6)):
        config = dataclasses.replace(
            config, merge=merge, temperature=temperatures[0], teacher_temperature=temperatures[1]
        )
        for unlabelled in UNLABELLED:
            case = make_case(vocabs, unlabelled)
            out = config.build(kd_ratio)(*case.parameters, case.labels_N, case.targets, 17, 11)
            assert_equals_reference(out, case, config, kd_ratio, 17, 11)
            assert (out.kd_N > 0).sum() == case.targets.num_groups


@pytest.mark.parametrize("config", LOSSES[:4], ids=str)
def test_no_count_of_groups_means_that_of_targets(config):
    case = make_case()
    out = config.build(0.4)(*case.parameters, case.labels_N, case.targets, 17)
    assert_equals_reference(out, case, config, 0.4, 17, 17)


def run_chunked(case: Case, objective: Objective, counts: tuple, **options: Any) -> KDOutput:
    body = body_for(case.targets, objective)
    body.kd_weight = kd_weight(*counts, torch.device("cpu"))  # pyright: ignore
    return chunked_objective(
        *case.parameters,
        case.labels_N,
        body,
        kd_ratio=objective.kd_ratio,
        num_targets=counts[0],
        num_kd_targets=counts[1],
        cut=case.targets.groups.chunks,
        **options,
    )


@pytest.mark.parametrize("config", LOSSES[:4], ids=str)
@pytest.mark.parametrize("merge", Merge)
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("counts", [(17, 11), (torch.tensor(17), torch.tensor(11)), (17, None)])
def test_chunks_change_nothing(config, merge, chunk_size, counts):
    """From one group at a time to all at once, with counts on the host and on the device."""
    config = dataclasses.replace(config, merge=merge)
    case = make_case()
    out = run_chunked(case, config.build(0.3), counts, chunk_size=chunk_size)
    kd_count = 17 if counts[1] is None else 11
    assert_equals_reference(out, case, config, 0.3, 17, kd_count)


@pytest.mark.parametrize("config", LOSSES[:4], ids=str)
@pytest.mark.parametrize("at", [0, 1, 2, 3, 4])
def test_accumulation_changes_nothing(config, at):
    """Two micro-batches with the counts of both give the loss and the gradient of one."""
    case = make_case()
    objective = config.build(0.3)
    whole = objective(*case.parameters, case.labels_N, case.targets, 14, 9)
    parts = [
        objective(*part.parameters, part.labels_N, part.targets, 14, 9) for part in case.split(at)
    ]
    total = sum((out.loss for out in parts), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(total, whole.loss, **TIGHT)
    torch.testing.assert_close(torch.cat([out.kd_N for out in parts]), whole.kd_N, **TIGHT)
    for ours, wanted in zip(grads(total, case), grads(whole.loss, case), strict=True):
        torch.testing.assert_close(ours, wanted, **TIGHT)


@pytest.mark.parametrize("kd_ratio", [0.0, 0.3, 1.0])
def test_without_rows_every_gradient_is_there(kd_ratio):
    case = make_case()
    empty = dataclasses.replace(
        case.targets, hidden_MD=case.targets.hidden_MD[:0], groups=Groups.join([], [], [])
    )
    hidden_ND, *head = case.parameters
    out = GOLDConfig().build(kd_ratio)(hidden_ND[:0], *head, case.labels_N[:0], empty, 5, 0)
    assert out.loss == 0 and all((g == 0).all() for g in grads(out.loss, case))


def test_responses_that_could_not_be_aligned_have_cross_entropy_alone():
    case = make_case(unlabelled="none")
    groups = Groups.join(
        [case.targets.groups.student.ids_R.tolist()],
        [case.targets.groups.teacher.ids_R.tolist()],
        [Alignment([])],
    )
    case.targets = dataclasses.replace(case.targets, groups=groups)
    out = ULDConfig().build(0.3)(*case.parameters, case.labels_N, case.targets, 14, 0)
    plain = ULDConfig().build(0.0)(*case.parameters, case.labels_N, None, 14)
    torch.testing.assert_close(out.loss, 0.7 * plain.loss, **TIGHT)
    for ours, ce in zip(grads(out.loss, case), grads(plain.loss, case), strict=True):
        torch.testing.assert_close(ours, 0.7 * ce, **TIGHT)
    assert (out.kd_N == 0).all()


@pytest.mark.parametrize("config", LOSSES, ids=str)
def test_is_zero_where_the_student_is_its_teacher(config):
    """One tokenizer and one model; and a loss of almost nothing is no gradient of noise."""
    case = make_case((19, 19))
    hidden_ND, weight_VD, bias_V = (x.detach() for x in case.parameters)
    for targets in (
        DenseTargets(hidden_ND, weight_VD, bias_V),
        dataclasses.replace(
            case.targets,
            hidden_MD=hidden_ND,
            weight_VD=weight_VD,
            bias_V=bias_V,
            groups=Groups.join(
                [case.targets.groups.student.ids_R.tolist()] * 1,
                [case.targets.groups.student.ids_R.tolist()] * 1,
                [Alignment([(0, 2, 0, 2), (2, 3, 2, 3), (5, 9, 5, 9)])],
            ),
            matched=MatchedVocabulary.of(torch.arange(7), torch.arange(7)),
        ),
    ):
        out = config.build(1.0)(*case.parameters, case.labels_N, targets, 14)
        assert out.kd_N.abs().max() < 1e-14
        assert all(g.abs().max() < 1e-13 for g in grads(out.loss, case))


@pytest.mark.parametrize("config", LOSSES, ids=str)
@pytest.mark.parametrize("vocabs", [(19, 19), (19, 14), (14, 19)])
def test_dense_targets_are_groups_of_one_token(config, vocabs):
    """One tokenizer: a group per row, the vocabulary that both heads have matched."""
    case = make_case(vocabs)
    rows, shared = len(case.labels_N), torch.arange(min(vocabs))
    teacher = case.targets
    dense = DenseTargets(teacher.hidden_MD[:rows], teacher.weight_VD, teacher.bias_V)
    ids = case.targets.groups.student.ids_R.clamp(max=13).tolist()
    groups = Groups.join([ids], [ids], [Alignment([(r, 1, r, 1) for r in range(rows)])])
    matched = MatchedVocabulary.of(shared, shared)
    same = AlignedTargets(dense.hidden_ND, dense.weight_VD, dense.bias_V, groups, matched)
    case.targets = same
    out = config.build(0.4)(*case.parameters, case.labels_N, dense, 17)
    assert_equals_reference(out, case, config, 0.4, 17, 17)


@pytest.mark.parametrize("vocabs", VOCABS)
@pytest.mark.parametrize("base", [ULDConfig(), GOLDConfig()], ids=str)
def test_top_k_of_the_smaller_vocabulary_is_exact(base, vocabs):
    case = make_case(vocabs)
    exact = base.build(0.3)(*case.parameters, case.labels_N, case.targets, 14, 9)
    wanted_grads = grads(exact.loss, case)
    for top_k in (min(vocabs), max(vocabs), 1000):
        config = dataclasses.replace(base, top_k=top_k)
        out = config.build(0.3)(*case.parameters, case.labels_N, case.targets, 14, 9)
        torch.testing.assert_close(out.kd_N, exact.kd_N, **TIGHT)
        for ours, wanted in zip(grads(out.loss, case), wanted_grads, strict=True):
            torch.testing.assert_close(ours, wanted, **TIGHT)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_top_k_is_within_its_bound(top_k):
    g = torch.Generator().manual_seed(0)
    q, p = (torch.randn(50, v, generator=g).double().softmax(-1) for v in (30, 20))
    exact, ours = sorted_l1(q, p, None), sorted_l1(q, p, top_k)
    rest = [1 - x.topk(top_k).values.sum(-1) for x in (q, p)]
    below = exact - ours
    assert (below > -1e-12).all() and (below <= 2 * torch.minimum(*rest) + 1e-12).all()
    assert below.max() > 1e-3  # it is no exact value by chance


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_divergences_of_masses_are_never_negative(name):
    g = torch.Generator().manual_seed(0)
    q, p = torch.rand(2, 400, 5, generator=g, dtype=torch.float64) * 2 - 2
    assert (mass_divergence(name, 0.3, q, p) > 0).all()
    assert mass_divergence(name, 0.3, q, q.clone()).abs().max() < 1e-14


MINUS_INF = [
    *((config, sampled) for config in (ULDConfig(), ULDConfig(top_k=4)) for sampled in (0, 1)),
    *((GOLDConfig(divergence="jsd", beta=0.3), sampled) for sampled in (0, 1)),
    *((GOLDConfig(divergence=name), 0) for name in ("forward_kl", "reverse_kl")),
]


@pytest.mark.parametrize(("config", "sampled"), MINUS_INF, ids=str)
@pytest.mark.parametrize("merge", Merge)
def test_minus_inf_logits_stay_finite(config, sampled, merge):
    """A matched token that both rule out; with `sampled`, one that groups are merged by.

    There, all of a group's mass is 0 on both sides or on one, and KL is infinite as it should be.
    """
    case = make_case()
    dead = []
    for side in (case.targets.groups.student, case.targets.groups.teacher):
        used = side.ids_R.tolist()
        dead.append(used[2] if sampled else next(v for v in range(99) if v not in used))
    pairs = [torch.tensor([i, *(v for v in range(6) if v != i)][:5]) for i in dead]
    assert case.targets.bias_V is not None
    case.targets = dataclasses.replace(
        case.targets,
        bias_V=case.targets.bias_V.index_fill(0, torch.tensor(dead[1]), -torch.inf),
        matched=MatchedVocabulary.of(*pairs),
    )
    hidden_ND, weight_VD, bias_V = case.parameters
    bias_V = bias_V.detach().index_fill(0, torch.tensor(dead[0]), -torch.inf).requires_grad_()
    parameters = hidden_ND, weight_VD, bias_V
    labels_N = torch.full_like(case.labels_N, -100)
    objective = dataclasses.replace(config, merge=merge).build(0.5)
    out = objective(*parameters, labels_N, case.targets, 14, 9)
    found = torch.autograd.grad(out.loss, parameters)
    assert all(x.isfinite().all() for x in (out.loss, out.ce, out.kd_N, *found))
    assert (found[1][dead[0]] == 0).all() and found[2][dead[0]] == 0


@pytest.mark.parametrize("config", [ULDConfig(), GOLDConfig(), ULDConfig(top_k=4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_near(config, dtype):
    case, exact = make_case(dtype=dtype), make_case()
    out = config.build(0.3)(*case.parameters, case.labels_N, case.targets, 14, 9)
    wanted = config.build(0.3)(*exact.parameters, exact.labels_N, exact.targets, 14, 9)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    assert out.kd_N.dtype == torch.float32 and all(g.dtype == dtype for g in grads(out.loss, case))
    torch.testing.assert_close(out.kd_N.double(), wanted.kd_N, rtol=tolerance, atol=tolerance)


def test_validation_takes_no_gradients():
    case = make_case()
    objective = GOLDConfig().build(0.3)
    with torch.no_grad():
        out = objective(*case.parameters, case.labels_N, case.targets, 14, 9)
    trained = objective(*case.parameters, case.labels_N, case.targets, 14, 9)
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, trained.loss.detach(), rtol=1e-13, atol=0)


class SyncCounter(TorchDispatchMode):
    """Counts the operations whose result the host must wait for on a GPU."""

    waits = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in self.waits
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", [ULDConfig(top_k=4), *LOSSES[:4]], ids=str)
def test_no_host_sync(config):
    case = make_case()
    objective = config.build(0.5)
    with SyncCounter() as counter:
        out = objective(
            *case.parameters, case.labels_N, case.targets, torch.tensor(14), torch.tensor(9)
        )
        grads(out.loss, case)
        assert counter.count == 0
        torch.ones(3).nonzero()
    assert counter.count == 1


def test_nothing_has_the_size_of_all_rows_and_the_vocabulary():
    """A budget for a few rows holds few rows: the student's and the teacher's logits, too."""
    case = make_case((4000, 3000))
    shapes = set()

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            shapes.update(tuple(x.shape) for x in (out,) if isinstance(x, Tensor))
            return out

    config = GOLDConfig(chunk_mib=1)
    with Shapes():
        out = config.build(0.3)(*case.parameters, case.labels_N, case.targets, 14, 9)
    wide = {shape[0] for shape in shapes if len(shape) == 2 and shape[1] in (4000, 3000)}
    assert max(wide - {5, 6}) <= 4  # the heads, transposed, have 5 and 6 rows
    assert_equals_reference(out, case, config, 0.3, 14, 9)


@dataclass
class Sparse:
    """Targets of which only `align` is known."""

    dense: DenseTargets

    def align(
        self, student_logits_CV: Tensor, rows: slice, temperature: float
    ) -> tuple[Tensor, Tensor]:
        return self.dense.align(student_logits_CV, rows, temperature)


def test_targets_that_a_loss_cannot_be_taken_of_are_refused():
    case = make_case((19, 19))
    teacher = case.targets
    dense = DenseTargets(teacher.hidden_MD[:14], teacher.weight_VD, teacher.bias_V)

    def message(config: Any, targets: TeacherTargets, *counts: int) -> str:
        with pytest.raises(UserError) as caught:
            config.build(0.5)(*case.parameters, case.labels_N, targets, *counts)
        return str(caught.value)

    assert "different tokenizers need loss=uld or loss=gold" in message(
        ForwardKLConfig(), teacher, 14
    )
    with pytest.raises(UserError, match="loss=uld"):
        teacher.align(torch.zeros(1, 2), slice(0, 1), 1.0)
    assert "whole distribution" in message(ULDConfig(), Sparse(dense), 14)
    assert "num_kd_targets is 9, num_targets 14" in message(ForwardKLConfig(), dense, 14, 9)
    short = dataclasses.replace(teacher, hidden_MD=teacher.hidden_MD[1:])
    assert "rows of teacher_hidden" in message(ULDConfig(), short, 14)
    groups = Groups.join([[0] * 15], [[0] * 15], [Alignment([(0, 15, 0, 15)])])
    assert "of 15 student rows, but there are 14" in message(
        ULDConfig(), dataclasses.replace(teacher, groups=groups), 14
    )
    far = MatchedVocabulary.of(torch.tensor([3, 40]), torch.tensor([3, 4]))
    assert "41 tokens that are matched, its head only 19" in message(
        GOLDConfig(), dataclasses.replace(teacher, matched=far), 14
    )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ULDConfig(temperature=0), "loss.temperature is 0"),
        (ULDConfig(teacher_temperature=-1), "loss.teacher_temperature is -1"),
        (ULDConfig(top_k=0), "loss.top_k is 0"),
        (GOLDConfig(divergence="kl"), "loss.divergence is 'kl': use one of forward_kl"),
        (GOLDConfig(beta=2), "loss.beta is 2"),
        (GOLDConfig(matched_weight=1), "give both, or neither"),
        (GOLDConfig(matched_weight=0, unmatched_weight=0), "are both 0"),
        (GOLDConfig(matched_weight=1, unmatched_weight=-1), "loss.unmatched_weight is -1"),
    ],
)
def test_values_out_of_range_are_refused(config, words):
    with pytest.raises(UserError, match=words):
        config.validate()
    for good in (ULDConfig(top_k=1), GOLDConfig(matched_weight=1, unmatched_weight=0)):
        good.validate()
