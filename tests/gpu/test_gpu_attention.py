"""The draft's FlexAttention against a dense mask, and Qwen3.5's linear attention, fused or not."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

from kd.dflash.attention import attention
from tests.gpu.test_gpu_basics import relative

NUM_SHAPES, MOST_GRAPHS = 10, 3
BLOCK = 16
KERNELS = ("torch_chunk_gated_delta_rule", "causal_conv1d_fn")


def attended(kind: str, inputs: list[Tensor], anchors_BA: Tensor, context: int) -> list[Tensor]:
    """Output and gradients; on a CPU FlexAttention has none."""
    on_gpu = inputs[0].is_cuda
    leaves = [x.detach().requires_grad_(on_gpu) for x in inputs]
    valid_BA = torch.ones_like(anchors_BA, dtype=torch.bool)
    valid_BA[0, -1] = False  # padding
    out = attention(kind, anchors_BA, valid_BA, context, BLOCK)(*leaves)
    if not on_gpu:
        return [out]
    out.float().square().sum().backward()
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


def test_flex(device, found):
    """Against the same in fp32; rows, blocks and lengths differ from shape to shape."""
    heads, width, unit = (16, 128, 128) if device == "cuda" else (2, 16, 16)
    random = torch.Generator(device).manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    worst = 0.0
    for i in range(NUM_SHAPES if device == "cuda" else 2):
        rows, blocks, context = 1 + i % 3, 3 + 5 * i, unit * (1 + i) - i
        anchors_BA = torch.randint(context, (rows, blocks), generator=random, device=device)
        queries = blocks * BLOCK
        seen = (heads // 2, context + queries)
        inputs = [
            torch.randn(rows, *shape, width, generator=random, device=device).bfloat16()
            for shape in ((heads, queries), seen, seen)
        ]
        flex = attended("flex", inputs, anchors_BA, context)
        whole = attended("dense", [x.float() for x in inputs], anchors_BA, context)
        errors = [relative(*pair) for pair in zip(flex, whole, strict=True)]
        worst = max(worst, *errors)
        assert max(errors) < 1e-2, f"shape {i}"
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found("error at most", worst)
    found("graphs", graphs)
    assert graphs <= MOST_GRAPHS


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Qwen3.5 without the kernels of other packages, which read no CPU tensors."""
    with pytest.MonkeyPatch.context() as patch:
        for name in KERNELS:
            patch.setattr(qwen, name, inspect.unwrap(getattr(qwen, name)))
        yield


def make_layer(device: str) -> qwen.Qwen3_5GatedDeltaNet:
    """Of Qwen3.5-4B, or a small one."""
    large = {"hidden_size": 2560, "linear_num_value_heads": 32, "linear_num_key_heads": 16}
    small = {"hidden_size": 32, "linear_num_value_heads": 4, "linear_num_key_heads": 2}
    small |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    text = {**(large if device == "cuda" else small), "layer_types": ["linear_attention"]}
    config = AutoConfig.for_model("qwen3_5", text_config={**text, "num_hidden_layers": 1})
    torch.manual_seed(0)
    return qwen.Qwen3_5GatedDeltaNet(config.get_text_config(), 0).to(device, torch.bfloat16)


def passed(layer: qwen.Qwen3_5GatedDeltaNet, hidden_BSD: Tensor) -> list[Tensor]:
    """Output and gradients of the input and the input projection."""
    leaf = hidden_BSD.detach().requires_grad_()
    out = layer(leaf)
    weight = layer.in_proj_qkv.weight
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), [leaf, weight])]


def timed(run: Callable[[], list[Tensor]], device: str) -> tuple[list[Tensor], str]:
    """What comes of it, and the time and peak of a second pass."""
    run()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    start_s = time.perf_counter()
    result = run()
    gib = 0.0
    if device == "cuda":
        torch.cuda.synchronize()
        gib = (torch.cuda.max_memory_allocated() - before) / 2**30
    return result, f"{1000 * (time.perf_counter() - start_s):.1f} ms, {gib:.2f} GiB"


def test_linear_attention(device, found, monkeypatch):
    """The kernels that are installed against plain torch; on a CPU, two ways of plain torch."""
    if device == "cuda" and find_spec("fla") is None:
        pytest.skip("flash-linear-attention is not installed")
    found("causal_conv1d", "installed" if find_spec("causal_conv1d") else "not installed")
    layer, (rows, length) = make_layer(device), (1, 2048) if device == "cuda" else (2, 130)
    hidden_BSD = torch.randn(rows, length, layer.hidden_size, device=device).bfloat16()
    with plain_torch():
        plain, cost = timed(lambda: passed(layer, hidden_BSD), device)
    found("fallback", cost)
    if device == "cpu":
        recurrent = inspect.unwrap(qwen.torch_recurrent_gated_delta_rule)
        monkeypatch.setattr(qwen, KERNELS[0], recurrent)
        monkeypatch.setattr(qwen, KERNELS[1], inspect.unwrap(qwen.causal_conv1d_fn))
    fused, cost = timed(lambda: passed(layer, hidden_BSD), device)
    found("fused", cost)
    errors = [relative(*pair) for pair in zip(fused, plain, strict=True)]
    found("error of output, hidden, weight", [f"{x:.1e}" for x in errors])
    assert any(error > 0 for error in errors), "the same code has run twice"
    assert max(errors) < 1e-2
