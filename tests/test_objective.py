"""The fused objective against float64 autograd on full logits."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kd.objective import fused_linear_kd
from kd.types import UserError

N, DS, DT, VS, VT = 11, 5, 6, 17, 17
DIVERGENCES = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.9)]
INF = float("inf")


def make_inputs(
    *,
    vocabs: tuple[int, int] = (VS, VT),
    bias: bool = False,
    ignored: bool = True,
    dtype: torch.dtype = torch.float64,
    frozen_head: bool = False,
    rows: int = N,
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    labels = torch.randint(min(vocabs), (rows,), generator=g)
    if ignored:
        labels[::3] = -100
    inputs = {
        "student_hidden": randn(rows, DS).requires_grad_(),
        "student_weight": randn(vocabs[0], DS).requires_grad_(not frozen_head),
        "teacher_hidden": randn(rows, DT),
        "teacher_weight": randn(vocabs[1], DT),
        "labels": labels,
    }
    if bias:
        inputs["student_bias"] = randn(vocabs[0]).requires_grad_(not frozen_head)
        inputs["teacher_bias"] = randn(vocabs[1])
    return inputs


def divergence_of(logits: Tensor, teacher: Tensor, name: str, beta: float) -> Tensor:
    """Straight from the definition, through probabilities; nothing in common with the code."""
    p, q = teacher.softmax(-1), logits.softmax(-1)
    if name == "forward_kl" or (name == "jsd" and beta == 0):
        return torch.where(p > 0, p * (p / q).log(), 0.0).sum(-1)
    if name == "reverse_kl" or beta == 1:
        return torch.where(q > 0, q * (q / p).log(), 0.0).sum(-1)
    m = beta * p + (1 - beta) * q
    return (beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()).sum(-1)


def reference(
    inputs: dict[str, Any],
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    kd_ratio: float = 0.5,
    num_targets: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    logits = F.linear(
        inputs["student_hidden"], inputs["student_weight"], inputs.get("student_bias")
    )
    teacher = F.linear(
        inputs["teacher_hidden"], inputs["teacher_weight"], inputs.get("teacher_bias")
    )
    valid = inputs["labels"] != -100
    logits, teacher, labels = (
        logits[valid].double(),
        teacher[valid].double(),
        inputs["labels"][valid],
    )
    shared = min(logits.shape[1], teacher.shape[1])
    count = num_targets or len(labels)
    ce = F.cross_entropy(logits, labels, reduction="sum") / count
    pair = logits[:, :shared] / temperature, teacher[:, :shared] / temperature
    kd = temperature**2 * divergence_of(*pair, divergence, beta).sum() / count
    return (1 - kd_ratio) * ce + kd_ratio * kd, ce, kd


def grads_of(loss: Tensor, inputs: dict[str, Any]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [x for x in inputs.values() if x.requires_grad]))


def assert_same(
    inputs: dict[str, Any],
    chunk_size: int | None = 4,
    kernel: str = "compiled",
    **options: Any,
) -> None:
    out = fused_linear_kd(**inputs, **options, chunk_size=chunk_size, kernel=kernel)
    loss, ce, kd = reference(inputs, **options)
    tight: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(out.loss, loss, **tight)
    torch.testing.assert_close(out.ce, ce, **tight)
    if options.get("kd_ratio", 0.5) > 0:
        torch.testing.assert_close(out.kd, kd, **tight)
    assert not out.ce.requires_grad and not out.kd.requires_grad
    for ours, expected in zip(grads_of(out.loss, inputs), grads_of(loss, inputs), strict=True):
        torch.testing.assert_close(ours, expected, **tight)


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("kd_ratio", [0.0, 0.3, 1.0])
def test_equals_float64_autograd(divergence, beta, temperature, kd_ratio):
    """Every mix of head, vocabulary and rows."""
    mixes = itertools.product(
        [(VS, VT), (VS, VT - 3), (VS - 3, VT)], [False, True], [False, True], [False, True]
    )
    for vocabs, bias, ignored, frozen_head in mixes:
        inputs = make_inputs(vocabs=vocabs, bias=bias, ignored=ignored, frozen_head=frozen_head)
        options = {"divergence": divergence, "beta": beta, "temperature": temperature}
        assert_same(inputs, **options, kd_ratio=kd_ratio)


@pytest.mark.parametrize("chunk_size", [2, None])
@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_losses_of_every_target(divergence, beta, chunk_size):
    """Of the rows with a label alone, in their order."""
    inputs = make_inputs()
    options = {"divergence": divergence, "beta": beta, "temperature": 2.0, "kd_ratio": 0.3}
    out = fused_linear_kd(**inputs, **options, chunk_size=chunk_size, num_targets=100)
    rows = (inputs["labels"] != -100).nonzero()[:, 0]
    student = inputs["student_hidden"][rows] @ inputs["student_weight"].T
    teacher = inputs["teacher_hidden"][rows] @ inputs["teacher_weight"].T
    expected = 4 * divergence_of(student / 2, teacher / 2, divergence, beta)
    torch.testing.assert_close(out.kd_N, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.kd, out.kd_N.sum() / 100)
    ce_N = torch.nn.functional.cross_entropy(student, inputs["labels"][rows], reduction="none")
    torch.testing.assert_close(out.ce_N, ce_N.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 7, 100, None])
def test_chunk_size_changes_nothing(chunk_size):
    assert_same(make_inputs(bias=True), chunk_size=chunk_size, divergence="jsd")


@pytest.mark.parametrize(("beta", "name"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_jsd_at_its_ends_is_a_kl(beta, name):
    inputs = make_inputs()
    at_end = fused_linear_kd(**inputs, divergence="jsd", beta=beta)
    kl = fused_linear_kd(**inputs, divergence=name)
    assert at_end.kd == kl.kd and at_end.kd > 0


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_divergence_is_zero_where_both_agree(divergence):
    inputs = make_inputs()
    inputs |= {k: inputs[k.replace("teacher", "student")] for k in inputs if "teacher" in k}
    out = fused_linear_kd(**inputs, divergence=divergence, kd_ratio=1.0)
    assert abs(out.loss.item()) < 1e-15
    assert max(g.abs().max().item() for g in grads_of(out.loss, inputs)) < 1e-15


def test_no_teacher_needed_without_kd():
    inputs = make_inputs()
    with_teacher = fused_linear_kd(**inputs, kd_ratio=0.0)
    inputs |= {"teacher_hidden": None, "teacher_weight": None}
    without = fused_linear_kd(**inputs, kd_ratio=0.0)
    assert with_teacher.loss == without.loss == without.ce and without.kd == 0


@pytest.mark.parametrize("split", [1, 4, 10])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_micro_batches_add_up(split, as_tensor):
    """Also where one micro-batch has no target at all."""
    whole = make_inputs()
    whole["labels"][:2] = -100
    count = int((whole["labels"] != -100).sum())
    expected = grads_of(fused_linear_kd(**whole).loss, whole)
    total = None
    for rows in (slice(0, split), slice(split, None)):
        by_row = {k: whole[k][rows] for k in ("student_hidden", "teacher_hidden", "labels")}
        num_targets = torch.tensor(count) if as_tensor else count
        out = fused_linear_kd(**whole | by_row, num_targets=num_targets)
        total = out.loss if total is None else total + out.loss
    for ours, want in zip(grads_of(total, whole), expected, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_minus_inf_logits_stay_finite(divergence, beta, dtype):
    """Entries that both models rule out count for nothing, in value and gradient."""
    inputs = make_inputs(bias=True, dtype=dtype)
    dead = torch.arange(VS) % 4 == 1
    inputs["labels"] = inputs["labels"].where(inputs["labels"] % 4 != 1, 0)
    for name in ("student_bias", "teacher_bias"):
        inputs[name] = inputs[name].detach().masked_fill(dead, -INF)
    inputs["student_bias"].requires_grad_()
    out = fused_linear_kd(**inputs, divergence=divergence, beta=beta, temperature=2.0)
    grads = grads_of(out.loss, inputs)
    alive = {
        name: x[~dead].detach().requires_grad_(x.requires_grad)
        if name.endswith(("weight", "bias"))
        else x
        for name, x in inputs.items()
    }
    alive["labels"] = ((~dead).cumsum(0) - 1)[inputs["labels"].clamp(min=0)]
    alive["labels"] = alive["labels"].where(inputs["labels"] >= 0, -100)
    expected = fused_linear_kd(**alive, divergence=divergence, beta=beta, temperature=2.0)
    torch.testing.assert_close(out.loss, expected.loss)
    hidden, weight, bias = grads_of(expected.loss, alive)
    torch.testing.assert_close(grads[0], hidden)
    torch.testing.assert_close(grads[1][~dead], weight)
    torch.testing.assert_close(grads[2][~dead], bias)
    assert (grads[1][dead] == 0).all() and (grads[2][dead] == 0).all()


@pytest.mark.parametrize("dead_in", ["teacher_bias", "student_bias"])
def test_jsd_is_finite_where_only_one_model_rules_out(dead_in):
    """Ln 2 bounds the divergence, so an infinite log-ratio must not show."""
    inputs = make_inputs(bias=True, ignored=False)
    inputs["labels"][:] = 0
    other = torch.arange(VS) % 2 == 1
    inputs[dead_in] = inputs[dead_in].detach().masked_fill(other, -INF)
    inputs["student_bias"].requires_grad_()
    out = fused_linear_kd(**inputs, divergence="jsd")
    assert 0 < out.kd < 0.6932
    assert all(g.isfinite().all() for g in grads_of(out.loss, inputs))


@pytest.mark.parametrize("kd_ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_targets", [None, 7])
@pytest.mark.parametrize("rows", [0, 4])
def test_without_targets_the_loss_stays_attached(kd_ratio, num_targets, rows):
    inputs = make_inputs(rows=rows, bias=True)
    inputs["labels"][:] = -100
    out = fused_linear_kd(**inputs, kd_ratio=kd_ratio, num_targets=num_targets)
    out.loss.backward()
    assert out.loss == 0 and out.ce == 0 and out.kd == 0
    for name in ("student_hidden", "student_weight", "student_bias"):
        assert (inputs[name].grad == 0).all() and inputs[name].grad.shape == inputs[name].shape


def test_second_derivative_is_refused():
    inputs = make_inputs()
    out = fused_linear_kd(**inputs)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out.loss, inputs["student_hidden"], create_graph=True)


def test_backward_scales_and_can_be_repeated():
    inputs = make_inputs()
    out = fused_linear_kd(**inputs)
    weight = inputs["student_weight"]
    (once,) = torch.autograd.grad(out.loss, weight, retain_graph=True)
    (scaled,) = torch.autograd.grad(out.loss * -3, weight)
    torch.testing.assert_close(scaled, -3 * once)


def test_the_last_backward_scales_the_heads_gradient_in_place():
    inputs = make_inputs(vocabs=(40_000, 40_000), dtype=torch.float32)
    out = fused_linear_kd(**inputs)
    weight = inputs["student_weight"]
    (kept,) = torch.autograd.grad(out.loss, weight, retain_graph=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        (last,) = torch.autograd.grad(out.loss, weight)
    assert torch.equal(last, kept)
    assert max(op.self_cpu_memory_usage for op in profile.key_averages()) < weight.nbytes


def test_tied_head_adds_to_the_embedding():
    inputs = make_inputs(vocabs=(VS, VS))
    ids = torch.arange(N) % VS
    table = inputs["student_weight"]

    def run(compute) -> tuple[Tensor, Tensor]:
        tied = inputs | {"student_hidden": F.embedding(ids, table).tanh()}
        loss = compute(tied)
        return loss, torch.autograd.grad(loss, table)[0]

    loss, grad = run(lambda tied: fused_linear_kd(**tied).loss)
    expected_loss, expected = run(lambda tied: reference(tied)[0])
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)


def test_hidden_without_grad_and_nothing_with_grad():
    inputs = make_inputs()
    full = fused_linear_kd(**inputs)
    expected = dict(zip(("hidden", "weight"), grads_of(full.loss, inputs), strict=True))
    no_hidden = inputs | {"student_hidden": inputs["student_hidden"].detach()}
    (weight,) = grads_of(fused_linear_kd(**no_hidden).loss, no_hidden)
    torch.testing.assert_close(weight, expected["weight"], rtol=1e-12, atol=0)
    with torch.no_grad():
        frozen = fused_linear_kd(**inputs)
    assert not frozen.loss.requires_grad
    torch.testing.assert_close(frozen.loss, full.loss.detach(), rtol=1e-13, atol=0)


def test_nothing_of_the_size_of_the_logits_is_retained():
    rows, vocab = 512, 2048
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 8, generator=g, requires_grad=True)
    weight = torch.randn(vocab, 8, generator=g, requires_grad=True)
    labels = torch.randint(vocab, (rows,), generator=g)
    saved: list[int] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.untyped_storage().nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = fused_linear_kd(hidden, weight, hidden.detach() + 1, weight.detach(), labels)
    out.loss.backward()
    assert saved and sum(saved) == hidden.nbytes + weight.nbytes
    assert 10 * sum(saved) < rows * vocab * 4


def test_nothing_is_read_before_it_is_written():
    """Buffers start as NaN here, the accumulator of the head's gradient among them."""
    inputs = make_inputs(bias=True)
    expected = fused_linear_kd(**inputs)
    grads = grads_of(expected.loss, inputs)
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        assert inputs["student_weight"].new_empty(3).isnan().all()
        for chunk_size in (3, None):
            out = fused_linear_kd(**inputs, chunk_size=chunk_size)
            torch.testing.assert_close(out.loss, expected.loss, rtol=1e-12, atol=0)
            for ours, want in zip(grads_of(out.loss, inputs), grads, strict=True):
                torch.testing.assert_close(ours, want, rtol=1e-12, atol=1e-12)
        inputs["labels"][:] = -100
        assert all((x == 0).all() for x in grads_of(fused_linear_kd(**inputs).loss, inputs))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("dtype", "chunk_size", "held"),
    [
        (torch.bfloat16, None, torch.bfloat16),
        (torch.bfloat16, 4, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float64, None, torch.float64),
    ],
)
def test_one_chunk_writes_the_heads_gradient_in_its_dtype(dtype, chunk_size, held):
    """Several are summed in fp32; undivided sums of fp16 could overflow. Also by tiles of V."""
    inputs = make_inputs(vocabs=(9000, 9000), dtype=dtype)
    out = fused_linear_kd(**inputs, chunk_size=chunk_size)
    assert out.loss.grad_fn is not None
    assert out.loss.grad_fn.saved_tensors[1].dtype == held
    exact = {
        k: x if k == "labels" else x.detach().double().requires_grad_(x.requires_grad)
        for k, x in inputs.items()
    }
    wanted = grads_of(reference(exact)[0], exact)
    for ours, want in zip(grads_of(out.loss, inputs), wanted, strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours, want) < {torch.float64: 1e-12}.get(dtype, 0.005)


def relative_error(x: Tensor, expected: Tensor) -> float:
    return ((x.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_bf16_gradients_are_precise_near_the_teacher(divergence):
    """Logits stored in bf16 have 16-19% here."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 64, generator=g).bfloat16().requires_grad_()
    teacher = torch.randn(4096, 64, generator=g) * 0.3
    weight = (teacher + 0.0177 * torch.randn(4096, 64, generator=g)).bfloat16().requires_grad_()
    labels = torch.randint(4096, (64,), generator=g)
    args = (hidden, weight, hidden.detach(), teacher.bfloat16(), labels)
    names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight", "labels")
    options = {"divergence": divergence, "kd_ratio": 1.0}
    exact = {
        k: x if k == "labels" else x.detach().double().requires_grad_(x.requires_grad)
        for k, x in zip(names, args, strict=True)
    }
    expected = reference(exact, **options)[2]
    assert 0.002 < expected < 0.015
    out = fused_linear_kd(*args, **options, chunk_size=10)
    assert relative_error(out.loss.detach(), expected.detach()) < 1e-4
    grads = torch.autograd.grad(out.loss, [hidden, weight])
    assert [x.dtype for x in grads] == [torch.bfloat16] * 2
    for ours, want in zip(grads, grads_of(expected, exact), strict=True):
        assert relative_error(ours, want) < 0.01


def test_half_precision_works_inside_autocast():
    inputs = make_inputs(dtype=torch.bfloat16, bias=True)
    plain = fused_linear_kd(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = fused_linear_kd(**inputs)
    full = make_inputs(bias=True, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        full_cast = fused_linear_kd(**full)
    assert plain.loss == cast.loss and plain.loss.dtype == torch.float32
    assert full_cast.loss == fused_linear_kd(**full).loss


def test_teacher_may_have_another_dtype():
    inputs = make_inputs(dtype=torch.float32)
    expected = fused_linear_kd(**inputs)
    for name in ("teacher_hidden", "teacher_weight"):
        inputs[name] = inputs[name].bfloat16()
    torch.testing.assert_close(fused_linear_kd(**inputs).loss, expected.loss, rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divergence": "kl"}, "divergence is 'kl'"),
        ({"beta": 1.5}, "beta is 1.5"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": INF}, "temperature is inf"),
        ({"kd_ratio": -0.1}, "kd_ratio is -0.1"),
        ({"num_targets": 0}, "num_targets is 0"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"teacher_hidden": None}, "there is no teacher"),
        ({"teacher_weight": torch.zeros(5, DT).double()}, "another tokenizer"),
        ({"teacher_hidden": torch.zeros(3, DT).double()}, "the 3 rows of teacher_hidden"),
        ({"teacher_weight": torch.zeros(VT, DT + 1).double()}, "teacher_hidden has 6 features"),
        ({"student_hidden": torch.zeros(N, DS).bfloat16()}, "cast one of them"),
        ({"student_bias": torch.zeros(3).double()}, "student_bias has 3 entries"),
        ({"labels": torch.zeros(N)}, "want one int64"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(UserError, match=message):
        fused_linear_kd(**make_inputs() | change)
