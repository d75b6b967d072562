"""A teacher's top-k as targets, against whole distributions in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kd.loss import ForwardKLConfig, JSDConfig, ReverseKLConfig
from kd.loss.config import LossConfig
from kd.teacher.payload import ABSENT, Hidden, TopK, join, split, tensors, top_k
from kd.teacher.sparse import SparseTargets
from kd.teacher.vllm import read_log_probs
from kd.types import DenseTargets, TeacherTargets, UserError

N, D, V = 37, 8, 50
LOSSES = [ForwardKLConfig(), ReverseKLConfig(), JSDConfig(beta=0.3)]


def numbers(seed: int = 0, teacher_vocab: int = V) -> tuple[Tensor, Tensor, DenseTargets, Tensor]:
    """Student hidden states and head, the dense teacher, and the response ids."""
    made = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    teacher = DenseTargets(normal(N, D), normal(teacher_vocab, D), normal(teacher_vocab))
    ids_N = torch.randint(0, V, (N,), generator=made)
    return normal(N, D), normal(V, D), teacher, ids_N


def sparse(teacher: DenseTargets, ids_N: Tensor, k: int, temperature: float = 1.0, **options):
    top = top_k(teacher, ids_N, k, temperature, V)
    return SparseTargets(top, ids_N, V, temperature, **options)


def loss_and_gradients(
    loss: LossConfig, targets: TeacherTargets, kd_ratio: float = 0.6
) -> tuple[Tensor, Tensor, Tensor]:
    hidden_ND, weight_VD, _, ids_N = numbers()
    hidden_ND.requires_grad_()
    weight_VD.requires_grad_()
    out = loss.build(kd_ratio)(hidden_ND, weight_VD, None, ids_N, targets, 60)
    out.loss.backward()
    assert hidden_ND.grad is not None and weight_VD.grad is not None
    return out.kd.detach(), hidden_ND.grad, weight_VD.grad


def test_top_k_is_that_of_the_whole_distribution():
    *_, teacher, ids_N = numbers()
    top = top_k(teacher, ids_N, 5, 2.0, V)
    logits = teacher.hidden_ND @ teacher.weight_VD.T + teacher.bias_V
    logp = (logits / 2.0).log_softmax(-1)
    assert torch.equal(top.ids_NK, logp.topk(5).indices)
    torch.testing.assert_close(top.logp_NK, logp.topk(5).values)
    torch.testing.assert_close(top.response_logp_N, logp.gather(1, ids_N[:, None])[:, 0])
    others = logp.exp().scatter(1, torch.cat([top.ids_NK, ids_N[:, None]], 1), 0).sum(-1)
    torch.testing.assert_close(top.tail_N.exp(), others)


def test_only_the_vocabulary_that_both_have_is_looked_at():
    *_, teacher, ids_N = numbers(teacher_vocab=V + 14)
    prefix = DenseTargets(teacher.hidden_ND, teacher.weight_VD[:V], teacher.bias_V[:V])
    for name, x in tensors(top_k(teacher, ids_N, 7, 1.0, V)).items():
        torch.testing.assert_close(x, tensors(top_k(prefix, ids_N, 7, 1.0, V))[name])


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_but_one_token_is_the_whole_distribution(loss, temperature):
    *_, teacher, ids_N = numbers()
    loss.temperature = temperature
    dense = loss_and_gradients(loss, teacher)
    few = loss_and_gradients(loss, sparse(teacher, ids_N, V - 1, temperature))
    for ours, expected in zip(few, dense, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("rank", [0, V - 1])
def test_a_vllm_server_s_log_probs_of_all_but_one_token(loss, rank):
    """With the response's own token they may be all there are, and nothing is left as a tail."""
    *_, peaked, _ = numbers()
    assert peaked.bias_V is not None
    # Flat enough for tails above SMALLEST_TAIL.
    teacher = DenseTargets(peaked.hidden_ND / 3, peaked.weight_VD, peaked.bias_V / 3)
    logits_NV = teacher.hidden_ND @ teacher.weight_VD.T + teacher.bias_V
    logp_NV, order_NV = logits_NV.log_softmax(-1), logits_NV.argsort(-1, descending=True)
    own_N = order_NV[:, rank]
    rows = [
        {str(i): {"logprob": logp_V[i].item()} for i in {*order_V[: V - 1].tolist(), own}}
        for logp_V, order_V, own in zip(logp_NV, order_NV, own_N.tolist(), strict=True)
    ]
    top = read_log_probs(rows, own_N.tolist(), k=V - 1, vocab=V)
    loss = replace(loss, temperature=1.0)
    found = loss_and_gradients(loss, SparseTargets(top, own_N, V, 1.0))
    for ours, dense in zip(found, loss_and_gradients(loss, teacher), strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_a_coarser_look_never_sees_more(loss):
    loss.temperature = 1.0
    *_, teacher, ids_N = numbers()
    hidden_ND, weight_VD, _, _ = numbers()
    exact = loss.build(1.0)(hidden_ND, weight_VD, None, ids_N, teacher, 1).kd_N
    before = torch.zeros(N, dtype=torch.float64)
    for k in (1, 2, 4, 8, 16, 32, V - 1):
        kd_N = loss.build(1.0)(hidden_ND, weight_VD, None, ids_N, sparse(teacher, ids_N, k), 1).kd_N
        assert (kd_N >= before - 1e-12).all() and (kd_N <= exact + 1e-12).all()
        before = kd_N


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_gradients_are_those_of_the_formula(loss):
    """k + 2 buckets written out from whole softmaxes, where the response's token comes but once."""
    loss.temperature = 1.0
    hidden_ND, weight_VD, teacher, ids_N = numbers()
    hidden_ND.requires_grad_()
    logq = (hidden_ND @ weight_VD.T).log_softmax(-1)
    logp = (teacher.hidden_ND @ teacher.weight_VD.T + teacher.bias_V).log_softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for n in range(N):
        kept = sorted({*logp[n].topk(3).indices.tolist(), int(ids_N[n])})
        others = [v for v in range(V) if v not in kept]
        p, q = (torch.cat([x[n, kept].exp(), x[n, others].exp().sum()[None]]) for x in (logp, logq))
        if isinstance(loss, ForwardKLConfig):
            total = total + (p * (p / q).log()).sum()
        elif isinstance(loss, ReverseKLConfig):
            total = total + (q * (q / p).log()).sum()
        else:
            m = 0.3 * p + 0.7 * q
            total = total + (0.3 * p * (p / m).log()).sum() + (0.7 * q * (q / m).log()).sum()
    kd = total / 60
    (expected,) = torch.autograd.grad(kd, hidden_ND)
    ours, grad, _ = loss_and_gradients(loss, sparse(teacher, ids_N, 3), kd_ratio=1.0)
    torch.testing.assert_close(ours, kd.detach())
    torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tail", [True, False])
def test_places_that_are_not_taken_do_not_count(tail):
    *_, teacher, ids_N = numbers()
    full = sparse(teacher, ids_N, 4, tail=tail)
    top = full.top
    ids_NK = torch.cat([top.ids_NK, ids_N[:, None].expand(-1, 2)], 1)
    logp_NK = torch.cat([top.logp_NK, torch.full((N, 2), ABSENT)], 1)
    wide = TopK(ids_NK, logp_NK, top.response_logp_N, top.tail_N)
    padded = SparseTargets(wide, ids_N, V, 1.0, tail)
    for ours, expected in zip(
        loss_and_gradients(ForwardKLConfig(), padded),
        loss_and_gradients(ForwardKLConfig(), full),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected)


def test_nothing_left_outside_of_the_top_k_is_no_nan():
    *_, teacher, _ = numbers()
    last = (teacher.hidden_ND @ teacher.weight_VD.T + teacher.bias_V).argmin(-1)
    targets = sparse(teacher, last, V - 1)
    assert (targets.top.tail_N == ABSENT).all()
    for loss in LOSSES:
        loss.temperature = 1.0
        _, grad, _ = loss_and_gradients(loss, targets)
        assert grad.isfinite().all()


def test_renormalised_top_k_can_change_its_temperature():
    *_, teacher, ids_N = numbers()
    warm = loss_and_gradients(
        ForwardKLConfig(temperature=2.0), sparse(teacher, ids_N, 6, 2.0, tail=False)
    )
    cold = loss_and_gradients(
        ForwardKLConfig(temperature=2.0), sparse(teacher, ids_N, 6, 1.0, tail=False)
    )
    for ours, expected in zip(cold, warm, strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_tail_of_another_temperature_is_refused():
    *_, teacher, ids_N = numbers()
    with pytest.raises(UserError, match=r"set loss\.temperature=1"):
        loss_and_gradients(ForwardKLConfig(temperature=2.0), sparse(teacher, ids_N, 6))


@pytest.mark.parametrize("k", [0, V, V + 1])
def test_an_impossible_k_is_refused(k):
    *_, teacher, ids_N = numbers()
    with pytest.raises(UserError, match="at least 1 and below the 50 tokens"):
        top_k(teacher, ids_N, k, 1.0, V)


def test_payloads_are_split_as_they_were_joined():
    *_, teacher, ids_N = numbers()
    for payload in (Hidden(teacher.hidden_ND), top_k(teacher, ids_N, 4, 1.0, V)):
        parts = split(payload, [0, 30, 7])
        assert [len(part) for part in parts] == [0, 30, 7]
        for name, x in tensors(join(parts)).items():
            assert torch.equal(x, tensors(payload)[name])
    assert isinstance(payload, TopK)


def test_no_rows_are_no_problem():
    *_, teacher, _ = numbers()
    nothing = DenseTargets(teacher.hidden_ND[:0], teacher.weight_VD, teacher.bias_V)
    top = top_k(nothing, torch.empty(0, dtype=torch.int64), 4, 1.0, V)
    assert top.ids_NK.shape == top.logp_NK.shape == (0, 4) and len(top.tail_N) == 0
