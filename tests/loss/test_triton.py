"""The Triton pair against float64 autograd, in Triton's interpreter: there is no GPU here.

The interpreter is chosen when Triton is imported, so one test runs this file in a process where it
is; and the pair is compiled for a GPU, though not run on one.
"""

from __future__ import annotations

import os

import pytest
import torch

from kd.loss import ForwardKLConfig
from kd.objective import CompilePolicy, Kernel, fused_linear_kd
from kd.objective_dense import DenseLoss, dense_chunk
from kd.types import UserError
from tests.loss.test_large_logits import SIZES, make_logits
from tests.processes import completed, environment, python
from tests.test_objective import DIVERGENCES, INF, assert_same, make_inputs

pytest.importorskip("triton", reason="Triton comes with PyTorch on Linux")

IN_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not IN_INTERPRETER, reason="by the test that starts it")
ALL = [*DIVERGENCES, ("jsd", 0.0), ("jsd", 1.0)]
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.mark.skipif(IN_INTERPRETER, reason="would start itself")
def test_in_the_interpreter():
    options = "-p", "no:cacheprovider", "-p", "no:xdist"
    env = environment(TRITON_INTERPRET="1")
    done = completed(*python("-m", "pytest", *options, __file__), env=env)
    assert done.returncode == 0, done.stdout
    assert " passed, 5 skipped" in done.stdout, done.stdout


@interpreted
@pytest.mark.parametrize(("divergence", "beta"), ALL)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_equals_float64_autograd(monkeypatch, divergence, beta, temperature):
    """In several blocks; with padded vocabularies, biases, rows that are no targets."""
    monkeypatch.setattr("kd.objective_triton.BLOCK", 8)
    options = {"divergence": divergence, "beta": beta, "temperature": temperature}
    for kd_ratio, vocabs, bias in (
        (0.3, (17, 17), False),
        (1.0, (17, 14), True),
        (0.3, (14, 17), False),
    ):
        inputs = make_inputs(vocabs=vocabs, bias=bias)
        assert_same(inputs, chunk_size=None, **options, kd_ratio=kd_ratio, kernel="triton")


@interpreted
def test_chunks_and_no_teacher():
    assert_same(make_inputs(), chunk_size=3, kd_ratio=0.5, kernel="triton")
    assert_same(make_inputs(), chunk_size=None, kd_ratio=0.0, kernel="triton")


@interpreted
def test_without_targets_the_loss_stays_attached():
    inputs = make_inputs()
    inputs["labels"][:] = -100
    out = fused_linear_kd(**inputs, kernel="triton")
    out.loss.backward()
    assert out.loss == 0 and (inputs["student_weight"].grad == 0).all()


@interpreted
@pytest.mark.parametrize(("divergence", "beta"), ALL)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_minus_inf_logits_and_rows_without_a_label(monkeypatch, divergence, beta, temperature):
    """Entries that both rule out, whole blocks of them, and the first block among these."""
    monkeypatch.setattr("kd.objective_triton.BLOCK", 8)
    from kd.objective_triton import run_triton

    g = torch.Generator().manual_seed(0)
    z, t = (3 * torch.randn(4, 40, generator=g, dtype=torch.float64) for _ in range(2))
    for dead in (slice(0, 9), slice(20, 21), slice(30, 40)):
        z[:, dead], t[:, dead] = -INF, -INF
    labels, loss = torch.tensor([10, -100, 12, 29]), DenseLoss(divergence, beta, temperature, 0.4)
    expected = torch.empty_like(z)
    kd_C, ce_C = dense_chunk(z, t, labels, expected, loss)
    found = run_triton((z, t, labels, z), loss)
    for ours, want in zip((*found, z), (kd_C, ce_C, expected), strict=True):
        assert want.isfinite().all()
        torch.testing.assert_close(ours, want, rtol=1e-12, atol=1e-12)


@interpreted
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_an_entry_that_only_one_model_rules_out(name):
    """Makes forward KL infinite, or reverse KL; the JSD stays finite with its gradient."""
    from kd.objective_triton import run_triton

    for mine, theirs in ((-INF, 0.0), (0.0, -INF)):
        z, t = torch.zeros(1, 6, dtype=torch.float64), torch.zeros(1, 6, dtype=torch.float64)
        z[0, 2], t[0, 2] = mine, theirs
        loss = DenseLoss(name, 0.5, 1.0, 1.0)
        (want_C, _), (found_C, _) = (
            function((z.clone(), t, torch.tensor([0]), None), loss)
            for function in (lambda chunk, loss: dense_chunk(*chunk, loss), run_triton)
        )
        torch.testing.assert_close(found_C, want_C)
        assert want_C.isinf() == (
            (name == "forward_kl" and mine < 0) or (name == "reverse_kl" and theirs < 0)
        )


@interpreted
@pytest.mark.parametrize(("spread", "offset"), [SIZES[0], SIZES[-1]])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_large_logits_keep_their_digits(name, spread, offset):
    from kd.objective_triton import run_triton

    z = make_logits(spread, offset)
    t = z + 0.3 * torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    labels, loss = torch.arange(len(z)), DenseLoss(name, 0.5, 2.0, 0.5)
    expected = torch.empty_like(z, dtype=torch.float64)
    wanted = dense_chunk(z.double(), t.double(), labels, expected, loss)
    found = run_triton((z, t, labels, z), loss)
    for ours, want in zip((*found, z), (*wanted, expected), strict=True):
        assert (ours - want).abs().max() <= 5e-4 * want.abs().max()


@interpreted
def test_a_narrower_gradient_lies_over_the_logits(monkeypatch):
    """Entry j is written when logits up to j have been read, block by block.

    The interpreter cuts bf16 off where a GPU rounds.
    """
    monkeypatch.setattr("kd.objective_triton.BLOCK", 64)
    from kd.objective_triton import run_triton

    z, t = make_logits(1.0, 0.0)[:3].clone(), make_logits(1.0, 0.0, seed=1)[:3]
    labels, loss = torch.arange(len(z)), DenseLoss("jsd", 0.5, 1.0, 0.5)
    expected = torch.empty_like(z)
    run_triton((z.clone(), t, labels, expected), loss)
    narrow = z.view(torch.bfloat16)[:, : z.shape[1]]
    run_triton((z, t, labels, narrow), loss)
    torch.testing.assert_close(narrow.float(), expected, rtol=2**-7, atol=0)


@pytest.mark.skipif(IN_INTERPRETER, reason="compiles nothing")
@pytest.mark.parametrize("formula", [0, 1, 2])
def test_compiles_for_a_gpu(formula):
    """For an H100, without one: the interpreter does not see what the compiler rejects."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kd.objective_triton import NUM_STATS, NUM_WARPS, _gradient, _losses

    logits = dict.fromkeys(("z_ptr", "t_ptr", "stats_ptr"), "*fp32") | {"labels_ptr": "*i64"}
    sizes = dict.fromkeys(("vocab", "shared", "z_stride", "t_stride"), "i32")
    constants = {"temperature": 2.0, "beta": 0.3, "tiny": torch.finfo(torch.float32).tiny}
    constants |= {"formula": formula, "has_teacher": True, "same": False}
    constants |= {"NUM_STATS": NUM_STATS, "BLOCK": 2048}
    more = {
        _losses: ({"kd_ptr": "*fp32", "ce_ptr": "*fp32"}, {}),
        _gradient: ({"grad_ptr": "*bf16", "grad_stride": "i32"}, {"kd_ratio": 0.5}),
    }
    for kernel, (pointers, fixed) in more.items():
        values = constants | fixed
        types = logits | sizes | pointers | dict.fromkeys(values, "constexpr")
        signature = {name: types[name] for name in kernel.arg_names}
        source = ASTSource(kernel, signature, constexprs=values)
        target, options = GPUTarget("cuda", 90, 32), {"num_warps": NUM_WARPS}
        made = triton.compile(source, target=target, options=options)
        # Between the reads of a block and its writes, where one may lie over the other.
        assert kernel is _losses or "bar.sync" in made.asm["ptx"]


@pytest.mark.skipif(IN_INTERPRETER, reason="runs on a CPU there")
def test_refused_without_a_gpu():
    with pytest.raises(UserError, match="kernel is triton, but the device is cpu, not cuda"):
        fused_linear_kd(**make_inputs(), kernel="triton")


def test_mistakes_are_named():
    with pytest.raises(UserError, match="kernel is 'cuda': it must be one of compiled, triton"):
        fused_linear_kd(**make_inputs(), kernel="cuda")
    config = ForwardKLConfig(kernel=Kernel.eager, compile=CompilePolicy.always)
    with pytest.raises(UserError, match=r"loss.compile=always, but loss.kernel=eager"):
        config.validate()
