"""Stand-ins for the kernels of linear attention, which run on a GPU alone.

Packages `fla` and `causal_conv1d` whose functions have the kernels' names and arguments and compute
with transformers' PyTorch, packed rows one by one. transformers finds and wraps them by its own
decorator, as it does on import.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.models.lfm2 import modeling_lfm2
from transformers.models.qwen3_5 import modeling_qwen3_5

FUNCTIONS = {
    (modeling_qwen3_5, "torch_chunk_gated_delta_rule"): ("chunk_gated_delta_rule", "fla"),
    (modeling_qwen3_5, "torch_recurrent_gated_delta_rule"): (
        "fused_recurrent_gated_delta_rule",
        "fla",
    ),
    **{
        (module, name): (name, "causal_conv1d")
        for module in (modeling_qwen3_5, modeling_lfm2)
        for name in ("causal_conv1d_fn", "causal_conv1d_update")
    },
}
PLAIN = {place: getattr(*place).__wrapped__ for place in FUNCTIONS}


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where neither package is installed."""
    for package in ("fla", "causal_conv1d"):
        monkeypatch.setitem(sys.modules, package, None)
    _import_again(monkeypatch)


def with_kernels(
    monkeypatch: pytest.MonkeyPatch, *, convolution: bool = True, bounds_rows: bool = True
) -> None:
    """As where they are; `bounds_rows` False: kernels that let packed rows run into each other."""
    without_kernels(monkeypatch)
    packages = {"fla": {"ops.gated_delta_rule": [_delta_rule(bounds_rows), _recurrent]}}
    if convolution:
        packages["causal_conv1d"] = {"": [_convolution(bounds_rows), _update]}
    for package, parts in packages.items():
        root = ModuleType(package)
        monkeypatch.setitem(sys.modules, package, root)
        for part, functions in parts.items():
            inner, path = root, package
            for name in filter(None, part.split(".")):
                path = f"{path}.{name}"
                setattr(inner, name, ModuleType(path))
                inner = getattr(inner, name)
            for function in functions:
                setattr(inner, function.__name__, function)
    _import_again(monkeypatch)


def _import_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for (module, name), (function, package) in FUNCTIONS.items():
        decorate = use_kernel_func_from_hub_with_fallback(function, package)
        monkeypatch.setattr(module, name, decorate(PLAIN[module, name]))


def _delta_rule(bounds_rows: bool) -> Callable[..., Any]:
    plain = PLAIN[modeling_qwen3_5, "torch_chunk_gated_delta_rule"]

    @torch.compiler.disable  # as that of fla
    def chunk_gated_delta_rule(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        inputs = (q, k, v, g, beta)
        options = {"use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel}
        if cu_seqlens is None or not bounds_rows:
            options |= {"initial_state": initial_state, "output_final_state": output_final_state}
            out, state = plain(*inputs, **options)
            return out.contiguous(), state
        rows = [
            plain(*(x[:, start:end] for x in inputs), **options)[0]
            for start, end in itertools.pairwise(cu_seqlens.tolist())
        ]
        return torch.cat(rows, dim=1), None

    return chunk_gated_delta_rule


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, Tensor | None]:
    plain = PLAIN[modeling_qwen3_5, "torch_recurrent_gated_delta_rule"]
    options = (initial_state, output_final_state, use_qk_l2norm_in_kernel)
    return plain(q, k, v, g, beta, *options)


def _convolution(bounds_rows: bool) -> Callable[..., Any]:
    plain = PLAIN[modeling_qwen3_5, "causal_conv1d_fn"]

    def causal_conv1d_fn(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        seq_idx: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        if seq_idx is None or not bounds_rows:
            return plain(x, weight, bias, activation)
        lengths = seq_idx[0].unique_consecutive(return_counts=True)[1].tolist()
        return torch.cat(
            [plain(part, weight, bias, activation) for part in x.split(lengths, dim=-1)], dim=-1
        )

    return causal_conv1d_fn


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    return PLAIN[modeling_qwen3_5, "causal_conv1d_update"](x, conv_state, weight, bias, activation)


_recurrent, _update = fused_recurrent_gated_delta_rule, causal_conv1d_update
