"""Target rows without a reference answer (label -100): no CE, KD in full; and KD per row."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kd.loss import ForwardKLConfig, JSDConfig, LossConfig, ReverseKLConfig
from kd.loss.config import body_for
from kd.objective import CompilePolicy, KDOutput, chunked_objective
from kd.types import DenseTargets, TeacherTargets

ROWS, STUDENT_VOCAB, TEACHER_VOCAB = 9, 19, 17
LOSSES = {"forward_kl": ForwardKLConfig, "reverse_kl": ReverseKLConfig, "jsd": JSDConfig}
BODIES = ["eager", "compiled", "autograd"]
UNLABELLED = {"none": [], "some": [0, 3, 4, 8], "all": list(range(ROWS))}
Parameters = tuple[Tensor, Tensor, Tensor]


@dataclass
class OnlyAlign:
    """Dense targets that do not say so, which are served by the autograd body."""

    dense: DenseTargets

    def align(
        self, student_logits_CV: Tensor, rows: slice, temperature: float
    ) -> tuple[Tensor, Tensor]:
        return self.dense.align(student_logits_CV, rows, temperature)


@dataclass
class Case:
    parameters: Parameters
    labels_N: Tensor
    teacher: DenseTargets

    def targets(self, body: str) -> TeacherTargets:
        return OnlyAlign(self.teacher) if body == "autograd" else self.teacher


def make_case(unlabelled: list[int], dtype: torch.dtype = torch.float64) -> Case:
    g = torch.Generator().manual_seed(5)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    student = randn(ROWS, 5), randn(STUDENT_VOCAB, 5), randn(STUDENT_VOCAB)
    teacher = DenseTargets(randn(ROWS, 6), randn(TEACHER_VOCAB, 6), randn(TEACHER_VOCAB))
    labels_N = torch.randint(STUDENT_VOCAB, (ROWS,), generator=g)
    labels_N[unlabelled] = -100
    hidden_ND, weight_VD, bias_V = (x.requires_grad_() for x in student)
    return Case((hidden_ND, weight_VD, bias_V), labels_N, teacher)


def make_config(name: str, body: str, **fields: Any) -> LossConfig:
    policy = CompilePolicy.always if body == "compiled" else CompilePolicy.never
    return LOSSES[name](compile=policy, **fields)


def divergence_of(student_NK: Tensor, teacher_NK: Tensor, name: str) -> Tensor:
    """From the definition, through probabilities; `jsd` with beta 0.5."""
    p, q = teacher_NK.softmax(-1), student_NK.softmax(-1)
    m = (p + q) / 2
    return {
        "forward_kl": p * (p / q).log(),
        "reverse_kl": q * (q / p).log(),
        "jsd": (p * (p / m).log() + q * (q / m).log()) / 2,
    }[name].sum(-1)


def reference(
    case: Case, name: str, kd_ratio: float, temperature: float, num_targets: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, ce_N, kd_N) by autograd on all logits; unlabelled rows never meet cross-entropy."""
    teacher = case.teacher
    student_NV = F.linear(*case.parameters)
    teacher_NK = F.linear(teacher.hidden_ND, teacher.weight_VD, teacher.bias_V)
    labelled_M = (case.labels_N >= 0).nonzero()[:, 0]
    logp_MV = student_NV[labelled_M].log_softmax(-1)
    ce_M = -logp_MV[torch.arange(len(labelled_M)), case.labels_N[labelled_M]]
    ce_N = ce_M.new_zeros(len(case.labels_N)).index_copy(0, labelled_M, ce_M)
    shared_NK = student_NV[:, :TEACHER_VOCAB]
    kd_N = temperature**2 * divergence_of(shared_NK / temperature, teacher_NK / temperature, name)
    loss_N = (1 - kd_ratio) * ce_N + kd_ratio * kd_N
    return loss_N.sum() / num_targets, ce_N, kd_N


def assert_equals_reference(
    out: KDOutput, case: Case, name: str, kd_ratio: float, temperature: float, num_targets: int
) -> None:
    loss, ce_N, kd_N = reference(case, name, kd_ratio, temperature, num_targets)
    kd_N = kd_N.detach() if kd_ratio else torch.zeros_like(kd_N)
    tight: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(out.loss, loss, **tight)
    torch.testing.assert_close(out.ce_N, ce_N.detach(), **tight)
    torch.testing.assert_close(out.ce, ce_N.detach().sum() / num_targets, **tight)
    torch.testing.assert_close(out.kd_N, kd_N, **tight)
    torch.testing.assert_close(out.kd, kd_N.sum() / num_targets, **tight)
    grads, wanted = (torch.autograd.grad(x, case.parameters) for x in (out.loss, loss))
    for ours, expected in zip(grads, wanted, strict=True):
        torch.testing.assert_close(ours, expected, **tight)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("kd_ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_equals_float64_autograd(name, body, kd_ratio, temperature):
    """Value, gradients and KD of every row, with a count of targets that is not that of rows."""
    objective = make_config(name, body, temperature=temperature).build(kd_ratio)
    for unlabelled in UNLABELLED.values():
        case = make_case(unlabelled)
        for count in (ROWS, 23):
            out = objective(*case.parameters, case.labels_N, case.targets(body), count)
            assert_equals_reference(out, case, name, kd_ratio, temperature, count)


@pytest.mark.parametrize("body", ["eager", "autograd"])
@pytest.mark.parametrize("kd_ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk_size", [1, 2, 4, ROWS, 100])
def test_chunk_size_changes_nothing(body, kd_ratio, chunk_size):
    case = make_case(UNLABELLED["some"])
    objective = make_config("jsd", body).build(kd_ratio)
    targets = case.targets(body) if kd_ratio else None
    out = chunked_objective(
        *case.parameters,
        case.labels_N,
        body_for(targets, objective),
        kd_ratio=kd_ratio,
        num_targets=torch.tensor(ROWS),
        chunk_size=chunk_size,
    )
    assert_equals_reference(out, case, "jsd", kd_ratio, 1.0, ROWS)


@pytest.mark.parametrize("body", ["eager", "compiled"])
@pytest.mark.parametrize("kd_ratio", [0.0, 1.0])
def test_what_no_label_and_no_kd_reach_has_no_gradient(body, kd_ratio):
    """Exactly: with kd_ratio 0 the unlabelled rows, with kd_ratio 1 the labels of all others."""
    case, other = make_case(UNLABELLED["some"]), make_case(UNLABELLED["all"])
    objective = make_config("forward_kl", body).build(kd_ratio)
    grads = []
    for x in (case, other):
        out = objective(*x.parameters, x.labels_N, x.teacher, ROWS)
        grads.append(torch.autograd.grad(out.loss, x.parameters))
    if kd_ratio == 0:
        assert (grads[0][0][UNLABELLED["some"]] == 0).all() and (grads[0][0] != 0).any()
        assert all((g == 0).all() for g in grads[1])
    else:
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("kd_ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dead", [0, STUDENT_VOCAB - 1])
def test_minus_inf_logits_stay_finite(body, kd_ratio, dead):
    """Also at the ends of the vocabulary, where -100 might be taken for an index."""
    case = make_case(UNLABELLED["some"])
    case.labels_N[case.labels_N == dead] = 1
    hidden_ND, weight_VD, bias_V = case.parameters
    bias_V = bias_V.detach().index_fill(0, torch.tensor(dead), -torch.inf).requires_grad_()
    if dead < TEACHER_VOCAB:
        assert case.teacher.bias_V is not None
        case.teacher.bias_V[dead] = -torch.inf
    objective = make_config("forward_kl", body).build(kd_ratio)
    out = objective(hidden_ND, weight_VD, bias_V, case.labels_N, case.targets(body), ROWS)
    grads = torch.autograd.grad(out.loss, (hidden_ND, weight_VD, bias_V))
    assert all(x.isfinite().all() for x in (out.loss, out.ce, out.kd_N, *grads))
    assert (grads[1][dead] == 0).all() and grads[2][dead] == 0


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_losses_per_row_are_detached_and_of_their_own_size(body, dtype):
    case = make_case(UNLABELLED["some"], dtype)
    objective = make_config("reverse_kl", body).build(0.3)
    args = *case.parameters, case.labels_N, case.targets(body), ROWS
    out = objective(*args)
    with torch.no_grad():
        validated = objective(*args)
    for loss_N in (out.kd_N, validated.kd_N, out.ce_N, validated.ce_N):
        assert loss_N.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert not loss_N.requires_grad
        assert loss_N.untyped_storage().nbytes() == ROWS * loss_N.element_size()
    for kd_N, ce_N in ((out.kd_N, out.ce_N), (validated.kd_N, validated.ce_N)):
        assert (kd_N > 0).all() and ((ce_N > 0) == (case.labels_N >= 0)).all()
    torch.testing.assert_close(out.kd_N, validated.kd_N)
    torch.testing.assert_close(out.ce_N, validated.ce_N)
