"""The objective that the training loop calls: configs, bodies, compilation."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kd import objective_compile
from kd.loss import ForwardKLConfig, JSDConfig, LossConfig, Objective, ReverseKLConfig
from kd.loss.divergences import forward_kl, generalized_jsd, reverse_kl
from kd.objective import CompilePolicy, KDOutput, fused_linear_kd
from kd.objective_compile import GPU_OPTIONS, can_compile
from kd.objective_dense import DenseLoss, dense_chunk
from kd.types import DenseTargets, TeacherTargets, UserError
from tests.processes import completed, python

OPTIONS = {"forward_kl": ForwardKLConfig, "reverse_kl": ReverseKLConfig, "jsd": JSDConfig}
CONFIGS = Path(__file__).parents[2] / "configs" / "loss"
NAMES_AND_BETAS = [
    ("forward_kl", 0.5),
    ("reverse_kl", 0.5),
    ("jsd", 0.3),
    ("jsd", 0.0),
    ("jsd", 1.0),
]


def make_config(name: str, beta: float = 0.5, **fields: Any) -> LossConfig:
    if name == "jsd":
        return JSDConfig(beta=beta, **fields)
    return OPTIONS[name](**fields)


@dataclass
class Case:
    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor
    labels_N: Tensor
    teacher: DenseTargets

    def run(
        self, objective: Objective, targets: TeacherTargets | None, num_targets: int | Tensor = 9
    ) -> tuple[KDOutput, list[Tensor]]:
        parameters = self.hidden_ND, self.weight_VD, self.bias_V
        out = objective(*parameters, self.labels_N, targets, num_targets)
        return out, list(torch.autograd.grad(out.loss, parameters))


def make_case(
    rows: int = 7, vocab: int = 19, teacher_vocab: int = 19, dtype: torch.dtype = torch.float64
) -> Case:
    g = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=dtype)

    teacher = DenseTargets(randn(rows, 6), randn(teacher_vocab, 6), randn(teacher_vocab))
    return Case(
        randn(rows, 5).requires_grad_(),
        randn(vocab, 5).requires_grad_(),
        randn(vocab).requires_grad_(),
        torch.randint(min(vocab, teacher_vocab), (rows,), generator=g),
        teacher,
    )


@dataclass
class Opaque:
    """Dense targets that do not say so: only `align` is known of them."""

    dense: DenseTargets

    def align(
        self, student_logits_CV: Tensor, rows: slice, temperature: float
    ) -> tuple[Tensor, Tensor]:
        return self.dense.align(student_logits_CV, rows, temperature)


@dataclass
class TopK:
    """The teacher's top entries and the mass of all others, already at its temperature."""

    logp_NK: Tensor
    index_NK: Tensor

    def align(
        self, student_logits_CV: Tensor, rows: slice, temperature: float
    ) -> tuple[Tensor, Tensor]:
        logp_CV = (student_logits_CV / temperature).log_softmax(-1)
        student_logp_CK = logp_CV.gather(1, self.index_NK[rows])
        pair = student_logp_CK, self.logp_NK[rows]
        tails = [torch.log1p(-x.exp().sum(-1, keepdim=True)) for x in pair]
        return torch.cat((pair[0], tails[0]), -1), torch.cat((pair[1], tails[1]), -1)


def assert_same(
    ours: tuple[KDOutput, list[Tensor]], other: tuple[KDOutput, list[Tensor]], **tol: Any
):
    for a, b in zip(
        (*vars(ours[0]).values(), *ours[1]), (*vars(other[0]).values(), *other[1]), strict=True
    ):
        torch.testing.assert_close(a, b, **tol)


@pytest.mark.parametrize("name", OPTIONS)
def test_yaml_is_valid_and_complete(name):
    values = OmegaConf.load(CONFIGS / f"{name}.yaml")
    assert isinstance(values, DictConfig)
    assert values.pop("defaults") == [f"{name}_schema", "_self_"]
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(OPTIONS[name]), values))
    assert isinstance(config, LossConfig) and config == OPTIONS[name]()
    config.validate()


@pytest.mark.parametrize("field", ["temperature", "chunk_mib", "beta"])
def test_values_out_of_range_are_refused(field):
    config = JSDConfig()
    setattr(config, field, -1)
    with pytest.raises(UserError, match=f"^loss.{field} is -1"):
        config.validate()


@pytest.mark.parametrize(("name", "beta"), NAMES_AND_BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kd_ratio", [0.4, 1.0])
@pytest.mark.parametrize("vocabs", [(19, 19), (19, 16), (16, 19)])
def test_autograd_body_equals_closed_form(name, beta, temperature, kd_ratio, vocabs):
    case = make_case(vocab=vocabs[0], teacher_vocab=vocabs[1])
    objective = make_config(name, beta, temperature=temperature).build(kd_ratio)
    closed, autograd = (case.run(objective, x) for x in (case.teacher, Opaque(case.teacher)))
    assert_same(closed, autograd, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("chunk_mib", [None, 1])
def test_sparse_targets(name, chunk_mib):
    """Also when the budget holds only a part of the rows."""
    rows, vocab = (7, 19) if chunk_mib is None else (7, 9000)
    case = make_case(rows=rows, vocab=vocab, teacher_vocab=vocab)
    logits = case.teacher.hidden_ND @ case.teacher.weight_VD.T
    targets = TopK(*(logits / 2).log_softmax(-1).topk(4))
    config = make_config(name, temperature=2.0, chunk_mib=chunk_mib)
    ours = case.run(config.build(0.4), targets)
    student = torch.nn.functional.linear(case.hidden_ND, case.weight_VD, case.bias_V)
    divergence = {
        "forward_kl": forward_kl,
        "reverse_kl": reverse_kl,
        "jsd": lambda s, t: generalized_jsd(s, t, 0.5),
    }[name]
    kd_N = 4 * divergence(*targets.align(student, slice(None), 2.0))
    kd = kd_N.sum() / 9
    ce_N = torch.nn.functional.cross_entropy(student, case.labels_N, reduction="none")
    ce = ce_N.sum() / 9
    loss = 0.6 * ce + 0.4 * kd
    grads = torch.autograd.grad(loss, (case.hidden_ND, case.weight_VD, case.bias_V))
    expected = KDOutput(loss, *(x.detach() for x in (ce, kd, kd_N, ce_N))), list(grads)
    assert_same(ours, expected, rtol=1e-11, atol=1e-12)


def squared_error(student_logp_CK: Tensor, teacher_logp_CK: Tensor) -> Tensor:
    return (student_logp_CK.exp() - teacher_logp_CK.exp()).square().sum(-1)


def test_a_divergence_without_closed_form_serves_dense_targets():
    case = make_case()
    ours = case.run(Objective(squared_error, None, temperature=1.0, kd_ratio=1.0), case.teacher)
    student = torch.nn.functional.linear(case.hidden_ND, case.weight_VD, case.bias_V)
    teacher = torch.nn.functional.linear(
        case.teacher.hidden_ND, case.teacher.weight_VD, case.teacher.bias_V
    )
    loss = (student.softmax(-1) - teacher.softmax(-1)).square().sum() / 9
    grads = torch.autograd.grad(loss, (case.hidden_ND, case.weight_VD, case.bias_V))
    for a, b in zip((ours[0].loss, *ours[1]), (loss, *grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "divergence", [forward_kl, reverse_kl, lambda s, t: generalized_jsd(s, t, 0.3)]
)
def test_divergences_with_probabilities_of_zero(divergence):
    """A dead entry of both models changes neither value nor gradient."""
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 8, generator=g, dtype=torch.float64)
    dead = torch.zeros(3, 2).double() - float("inf")

    def value_and_grad(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        student = student.clone().requires_grad_()
        value = divergence(student.log_softmax(-1), teacher.log_softmax(-1))
        return value, torch.autograd.grad(value.sum(), student)[0]

    value, grad = value_and_grad(student, teacher)
    padded, padded_grad = value_and_grad(
        torch.cat((student, dead), -1), torch.cat((teacher, dead), -1)
    )
    torch.testing.assert_close(padded, value)
    torch.testing.assert_close(padded_grad[:, :8], grad)
    assert (padded_grad[:, 8:] == 0).all() and (value > 0).all()


def test_same_as_the_public_call():
    case = make_case()
    ours, grads = case.run(ForwardKLConfig(temperature=2.0).build(0.3), case.teacher, 20)
    out = fused_linear_kd(
        case.hidden_ND,
        case.weight_VD,
        case.teacher.hidden_ND,
        case.teacher.weight_VD,
        case.labels_N,
        student_bias=case.bias_V,
        teacher_bias=case.teacher.bias_V,
        temperature=2.0,
        kd_ratio=0.3,
        num_targets=torch.tensor(20),
    )
    expected = torch.autograd.grad(out.loss, (case.hidden_ND, case.weight_VD, case.bias_V))
    assert_same((ours, grads), (out, list(expected)), rtol=0, atol=0)


@pytest.mark.parametrize("kd_ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("wrap", [lambda x: x, Opaque])
def test_without_rows_every_gradient_is_there(kd_ratio, wrap):
    case = make_case(rows=0)
    out, grads = case.run(ForwardKLConfig().build(kd_ratio), wrap(case.teacher))
    assert out.loss == 0 and all((g == 0).all() for g in grads)


def test_a_step_without_any_target_has_no_loss():
    out, grads = make_case(rows=0).run(ForwardKLConfig().build(0.0), None, torch.tensor(0))
    assert out.loss == 0 and all((g == 0).all() for g in grads)


@pytest.mark.parametrize("wrap", [lambda x: x, Opaque])
def test_autocast_changes_nothing(wrap):
    case = make_case(dtype=torch.float32)
    objective = JSDConfig().build(0.5)
    plain = case.run(objective, wrap(case.teacher))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = case.run(objective, wrap(case.teacher))
    assert_same(plain, cast, rtol=0, atol=0)


@pytest.mark.parametrize("wrap", [lambda x: x, Opaque])
def test_validation_takes_no_gradients(wrap):
    case = make_case()
    objective = ForwardKLConfig().build(0.5)
    with torch.no_grad():
        out = objective(
            case.hidden_ND, case.weight_VD, case.bias_V, case.labels_N, wrap(case.teacher), 9
        )
    trained, _ = case.run(objective, case.teacher)
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, trained.loss.detach(), rtol=1e-13, atol=0)


def test_targets_are_needed_unless_kd_is_off():
    case = make_case()
    with pytest.raises(UserError, match="no teacher targets"):
        case.run(ForwardKLConfig().build(0.5), None)
    ce_only = ForwardKLConfig().build(0.0)
    assert_same(case.run(ce_only, None), case.run(ce_only, case.teacher), rtol=0, atol=0)


class SyncCounter(TorchDispatchMode):
    """Counts the operations whose result the host must wait for on a GPU."""

    waits = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in self.waits
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPTIONS)
def test_no_host_sync(name):
    case = make_case()
    case.labels_N[1] = -100
    objective = make_config(name, compile=CompilePolicy.never).build(0.5)
    with SyncCounter() as counter:
        case.run(objective, case.teacher, torch.tensor(9))
        assert counter.count == 0
        torch.ones(3).nonzero()
    assert counter.count == 1


@pytest.mark.parametrize("in_place", sorted({False, objective_compile.COMPILED_IN_PLACE}))
@pytest.mark.parametrize("name", OPTIONS)
def test_compiled_equals_eager(name, in_place, monkeypatch):
    """With numbers of rows that change from batch to batch, and one and none of them."""
    monkeypatch.setattr(objective_compile, "COMPILED_IN_PLACE", in_place)
    for rows in (6, 9, 1, 0, 4):
        case = make_case(rows=rows, vocab=40, teacher_vocab=36, dtype=torch.float32)
        always, never = (
            case.run(make_config(name, compile=policy).build(0.5), case.teacher)
            for policy in (CompilePolicy.always, CompilePolicy.never)
        )
        assert_same(always, never, rtol=2e-5, atol=1e-6)


def test_one_graph_serves_any_number_of_rows():
    from torch._dynamo.utils import counters

    assert can_compile("cpu")  # which compiles something itself, once per process
    counters.clear()
    objective = ForwardKLConfig(compile=CompilePolicy.always).build(0.0)
    for rows in (6, 9, 4, 31, 2):
        make_case(rows=rows, vocab=33, dtype=torch.float32).run(objective, None)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_no_whole_tensor_between_sweeps_on_a_gpu(monkeypatch, name, temperature):
    """By Inductor's rules for GPUs, which it is made to take a CPU for; there is none here.

    On a CPU it may keep some, of a block of rows that stays in the cache.
    """
    import torch._inductor.ir as ir
    from torch._inductor.utils import run_and_get_code

    monkeypatch.setattr(ir, "is_cpu", lambda x: False)
    rows, vocab = 8, 20_011
    z, t = torch.randn(2, rows, vocab).unbind()
    labels, loss = torch.arange(rows), DenseLoss(name, 0.5, temperature, 0.5)
    buffers = {}
    by_default = [None] if name == "jsd" and temperature == 2 else []  # compiling takes seconds
    for options in (dict(GPU_OPTIONS), *by_default):
        torch._dynamo.reset()
        with torch._inductor.config.patch(force_disable_caches=True):
            function = torch.compile(dense_chunk, dynamic=False, fullgraph=True, options=options)
            _, (code,) = run_and_get_code(function, z.clone(), t, labels, z.clone(), loss)
        buffers[options is None] = code.count(f"empty_strided_cpu(({rows}, {vocab})")
    assert buffers[False] == 0
    assert not by_default or buffers[True] > 0


def test_many_configurations_stay_compiled():
    """Dynamo gives up on a function after `recompile_limit` versions of it (8 unless told)."""
    from torch._dynamo.utils import counters

    assert can_compile("cpu")  # which compiles something itself, once per process
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=2, accumulated_recompile_limit=4):
        for vocab in range(20, 25):
            case = make_case(vocab=vocab, dtype=torch.float32)
            eager, _ = case.run(ForwardKLConfig(compile=CompilePolicy.never).build(0.0), None)
            for _ in range(2):
                config = ForwardKLConfig(compile=CompilePolicy.always)
                out, _ = case.run(config.build(0.0), None)
                torch.testing.assert_close(out.loss, eager.loss)
    assert counters["stats"]["unique_graphs"] == 5


WITHOUT_COMPILER = """
import logging, torch
from kd.loss import ForwardKLConfig
from kd.objective import CompilePolicy
from kd.types import UserError
logging.basicConfig()
h, w = torch.randn(3, 4, requires_grad=True), torch.randn(20000, 4, requires_grad=True)
for _ in range(2):
    out = ForwardKLConfig().build(0.0)(h, w, None, torch.tensor([0, 5, 19999]), None, 3)
expected = torch.nn.functional.cross_entropy(h @ w.T, torch.tensor([0, 5, 19999]))
torch.testing.assert_close(out.loss, expected)
try:
    always = ForwardKLConfig(compile=CompilePolicy.always).build(0.0)
    always(h, w, None, torch.zeros(3).long(), None, 3)
except UserError as error:
    print(error)
"""


def test_machine_without_a_compiler_runs_eagerly_and_says_so(tmp_path):
    env = os.environ | {"CXX": str(tmp_path / "none"), "PATH": str(tmp_path)}
    env |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": os.getcwd()}
    done = completed(*python("-c", WITHOUT_COMPILER), env=env)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the loss runs eagerly") == 1
    assert "torch.compile does not work here: set it to auto" in done.stdout


def test_compiling_says_nothing_where_it_works(caplog):
    case = make_case(dtype=torch.float32)
    with caplog.at_level(logging.WARNING, logger="kd"):
        case.run(ForwardKLConfig(compile=CompilePolicy.always).build(0.5), case.teacher)
    assert not [x for x in caplog.records if x.name.startswith("kd")]
