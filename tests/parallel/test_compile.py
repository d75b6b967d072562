"""Compiled blocks: how many graphs a run's shapes make, and what is said beyond the limit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from kd.parallel import ParallelConfig, blocks, compile_blocks
from kd.parallel import compile as compiling
from tests.model.families import FAMILIES
from tests.model.kernel_standins import with_kernels

# Several rows and one row first: torch makes a graph of each. Never as many rows as there are heads
# (2, 4): equal sizes are one to it, which here would be chance.
SHAPES = [(3, 70), (1, 40), (5, 131), (3, 64), (6, 200), (1, 128), (5, 33), (7, 90), (3, 65)]
SHAPES += [(1, 257)]


@pytest.fixture
def graphs(monkeypatch) -> Iterator[list]:
    """Those that are made, which run as they are: kernels are not generated."""
    made: list[object] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        made.append(graph)
        return graph.forward

    torch._dynamo.reset()  # what is compiled is kept by the code, for all tests of a process
    compiling._tell_of_limit.cache_clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        yield made
    torch._dynamo.reset()


def read(model: PreTrainedModel, shape: tuple[int, int], *, padded: bool) -> Tensor:
    """Forward and backward, as in training."""
    ids_BS = torch.arange(shape[0] * shape[1]).reshape(shape) % 150 + 20
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[0, shape[1] - 5 * padded :] = 0
    out = model.base_model(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False)
    out.last_hidden_state.sum().backward()
    return out.last_hidden_state.detach()


def two_of(make: Callable) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same weights twice."""
    plain, compiled = (AutoModelForImageTextToText.from_config(make()[0]) for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    return plain.train(), compiled.train()


def layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    return blocks(model.get_decoder())


COMPILED = ParallelConfig(device="cpu", compile=True)


@pytest.mark.parametrize(
    ("family", "most"),
    [
        (FAMILIES["qwen3_vl"], 4),
        # Two kinds of layers, and torch goes around the kernel: before it and after it.
        (FAMILIES["qwen3_5_hybrid"], 16),
    ],
    ids=["qwen3_vl", "qwen3_5 with kernels"],
)
def test_ten_shapes_make_no_more_graphs_than_kinds_of_inputs(
    family, most, graphs, monkeypatch, caplog
):
    """The kernels are stand-ins, which torch does not look into, like those of fla."""
    with_kernels(monkeypatch)
    plain, compiled = two_of(family)
    compile_blocks(layers(compiled), COMPILED)
    counts = []
    for shape in SHAPES:
        for padded in (False, True):
            found = read(compiled, shape, padded=padded)
            torch.testing.assert_close(found, read(plain, shape, padded=padded))
        counts.append(len(graphs))
    assert 0 < counts[1] <= most, counts
    assert set(counts[1:]) == {counts[1]}, f"length and number of rows make no graph: {counts}"
    assert "its limit" not in caplog.text


def test_a_run_goes_on_uncompiled_and_says_so_beyond_the_limit(graphs, monkeypatch, caplog):
    monkeypatch.setattr(compiling, "MOST_GRAPHS", 1)
    plain, compiled = two_of(FAMILIES["qwen3_vl"])
    with torch._dynamo.config.patch(recompile_limit=1):
        compile_blocks(layers(compiled), COMPILED)
        for padded in (False, True, False):
            found = read(compiled, (2, 40), padded=padded)
            torch.testing.assert_close(found, read(plain, (2, 40), padded=padded))
    assert len(graphs) == 1
    (record,) = (record for record in caplog.records if record.name == "kd")
    assert "these blocks run uncompiled from now on" in record.message
    for name, weight in plain.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(compiled.get_parameter(name).grad, weight.grad)


def test_nothing_is_compiled_without_being_asked_for(graphs):
    model, other = two_of(FAMILIES["qwen3_vl"])
    compile_blocks(layers(model), ParallelConfig(device="cpu"))
    assert all("forward" not in vars(layer) for layer in layers(model))
    assert torch.equal(read(model, (2, 9), padded=False), read(other, (2, 9), padded=False))
    assert not graphs
