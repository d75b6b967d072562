"""How the dense loss of a chunk is run: eagerly, or through torch.compile.

Shape legend: C rows of a chunk, V student vocabulary, K the vocabulary prefix both models share.
"""

from __future__ import annotations

import functools
import itertools
import logging
import types
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from kd.objective_dense import DenseLoss, dense_chunk
from kd.objective_loop import balanced_chunks
from kd.types import UserError

log = logging.getLogger(__name__)

COMPILE_FROM_VOCAB = 16384
"""Below this vocabulary compiling takes longer than it saves."""

CPU_BLOCK_BYTES = 2 * 2**20
"""Logits per thread that are worked on at a time: they stay in the cache between sweeps."""

EAGER_BLOCK_ROWS = 128
"""Rows per block on a GPU where there are temporaries, which this bounds."""

COMPILED_IN_PLACE = TorchVersion(torch.__version__) >= "2.15"
"""Whether compiled code may write the gradient over the logits: that of torch 2.11 reads them again
afterwards, and losses are wrong by per cents. Versions between the two have not been tried."""

GPU_OPTIONS = {
    "realize_opcount_threshold": 256,
    "realize_reads_threshold": 32,
    "realize_acc_reads_threshold": 64,
}
"""Inductor's: on a GPU every sweep computes anew what it needs. By its defaults reverse KL and JSD
would keep one or two tensors of [C, V] between sweeps, which no budget counts."""

Chunk = tuple[Tensor, Tensor | None, Tensor, Tensor | None]
"""(logits_CV, teacher_logits_CK, labels_C, dlogits_CV)"""


class CompilePolicy(Enum):
    """Whether the pointwise part of the loss goes through torch.compile (GEMMs never do)."""

    auto = "auto"
    """Where torch.compile works and the vocabulary has at least 16,384 entries."""
    always = "always"
    """Refused where torch.compile does not work."""
    never = "never"


_serial = itertools.count()


@functools.cache
def _compiled(
    loss: DenseLoss, device_type: str, *layout: object
) -> Callable[..., tuple[Tensor, Tensor]]:
    """`dense_chunk` compiled for one loss and one layout of its arguments, any number of rows.

    Dynamo counts recompilations per code object and remembers shapes per function name; past eight
    configurations it would run eagerly without a word. So each gets a code object of its own.
    """
    del loss, layout
    code = dense_chunk.__code__
    code = code.replace(co_name=f"{code.co_name}_{next(_serial)}")
    function = types.FunctionType(code, dense_chunk.__globals__)
    options = None if device_type == "cpu" else dict(GPU_OPTIONS)
    return torch.compile(function, dynamic=False, fullgraph=True, options=options)


@functools.cache
def compile_problem(device_type: str) -> str | None:
    """Why torch.compile does not work here; None: it does.

    It needs a C++ compiler, and Triton on a GPU. Found by compiling one line, once per process:
    what is missing shows in many different errors.
    """
    try:
        with torch.no_grad():
            torch.compile(lambda x: x + 1, fullgraph=True)(torch.zeros(8, device=device_type))
    except Exception as error:
        return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    return None


@functools.cache  # told once
def can_compile(device_type: str) -> bool:
    """Whether torch.compile works here; logged if not."""
    problem = compile_problem(device_type)
    if problem is not None:
        log.warning("torch.compile does not work here, so the loss runs eagerly: %s", problem)
    return problem is None


def use_compile(policy: CompilePolicy, device: torch.device, vocab: int) -> bool:
    """Decide by policy; raises UserError where compiling is demanded but does not work."""
    if policy is CompilePolicy.never or (
        policy is CompilePolicy.auto and vocab < COMPILE_FROM_VOCAB
    ):
        return False
    works = can_compile(device.type)
    if policy is CompilePolicy.always and not works:
        raise UserError(
            "compile is always, but torch.compile does not work here: set it to auto.\n"
            f"{compile_problem(device.type)}"
        )
    return works


def run_eagerly(chunk: Chunk, loss: DenseLoss) -> tuple[Tensor, Tensor]:
    """(kd_C, ce_C) of a chunk; the gradient of their mix goes to its `dlogits_CV`."""
    return _by_blocks(dense_chunk, chunk, loss, whole=False)


def run_compiled(chunk: Chunk, loss: DenseLoss) -> tuple[Tensor, Tensor]:
    """The same, by a function that is compiled once for the loss and the layout of the chunk."""
    if chunk[3] is chunk[0] and not COMPILED_IN_PLACE:
        return _by_blocks(_run_apart, chunk, loss, whole=False)
    return _by_blocks(_run_block, chunk, loss, whole=True)


def _run_block(*block: Any) -> tuple[Tensor, Tensor]:
    """A block through the function that is compiled for it."""
    *chunk, loss = block
    for x in chunk:
        if x is not None:
            torch._dynamo.maybe_mark_dynamic(x, 0)
    layout = [None if x is None else (x.shape[1:], x.dtype, x.device) for x in chunk]
    function = _compiled(loss, chunk[0].device.type, *layout, chunk[0] is chunk[3])
    return function(*chunk, loss)


def _run_apart(logits_CV: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The same with memory of its own for a gradient that is to replace the logits."""
    teacher_CK, labels_C, _, loss = rest
    dlogits_CV = torch.empty_like(logits_CV)
    losses = _run_block(logits_CV, teacher_CK, labels_C, dlogits_CV, loss)
    logits_CV.copy_(dlogits_CV)
    return losses


def _by_blocks(
    function: Callable[..., tuple[Tensor, Tensor]], chunk: Chunk, loss: DenseLoss, *, whole: bool
) -> tuple[Tensor, Tensor]:
    logits_CV, _, labels_C, _ = chunk
    kd_C, ce_C = logits_CV.new_empty(2, len(labels_C))
    for block in balanced_chunks(len(labels_C), _block_rows(logits_CV, whole)):
        kd_C[block], ce_C[block] = function(*_take(block, chunk), loss)
    return kd_C, ce_C


def _block_rows(logits_CV: Tensor, whole: bool) -> int:
    """Rows that `dense_chunk` gets at a time, on a GPU all with `whole`.

    It sweeps over them several times. On a CPU they should stay in the cache meanwhile, which is
    worth a factor of 2 to 3; where not all can be had, the bound also holds down the temporaries.
    """
    if logits_CV.device.type != "cpu":
        return len(logits_CV) if whole else EAGER_BLOCK_ROWS
    row_bytes = logits_CV.shape[1] * logits_CV.element_size()
    return max(1, CPU_BLOCK_BYTES // row_bytes) * torch.get_num_threads()


def _take(block: slice, chunk: Chunk) -> Chunk:
    """These rows of each.

    A gradient that shares its memory with the logits stays the very same object: torch.compile
    handles that well, and two overlapping views badly.
    """
    logits_CV, teacher_CK, labels_C, dlogits_CV = chunk
    rows_CV = logits_CV[block]
    if dlogits_CV is not None:
        dlogits_CV = rows_CV if dlogits_CV is logits_CV else dlogits_CV[block]
    teacher_CK = None if teacher_CK is None else teacher_CK[block]
    return rows_CV, teacher_CK, labels_C[block], dlogits_CV
