"""The chunk loop that every loss shares: head GEMMs into reused buffers, gradients in the forward.

Shape legend: N target rows, C rows of one chunk, D hidden, V student vocabulary.

Nothing of size [N, V] exists: a chunk of logits is made, turned into its losses and its gradient by
a `Body`, and multiplied straight into grad-hidden and grad-weight before the next chunk reuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

UPCAST_TILE = 8192
"""Vocabulary entries that are upcast at a time where the device has no mixed-precision GEMM."""


@dataclass(frozen=True)
class KDOutput:
    """Scalars, each a sum over this rank's targets divided by their count; kd and ce per target.

    `loss = (1 - kd_ratio) * ce + kd_ratio * kd` is differentiable; all else is detached. `kd` of a
    divergence has the factor temperature² in it, and is 0 where there is no teacher (kd_ratio = 0).
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor
    kd_N: Tensor
    """[N] fp32 (fp64 for fp64), not yet divided: `kd = kd_N.sum() / num_kd_targets`.

    Where several rows are one target of the KD term, the first of them has its value.
    """
    ce_N: Tensor
    """The same of `ce`; 0 where there is no reference answer."""


class Body(Protocol):
    """What differs per loss: student logits of a chunk -> its losses and their gradient.

    A body is made for one call of the loop and may own buffers of the size of a chunk.
    """

    @property
    def narrows_in_place(self) -> bool:
        """Whether it can write a gradient of fewer bytes over the logits that it reads."""
        ...

    def row_bytes(self, vocab: int) -> int:
        """Bytes per row that the body needs next to the loop's own buffers."""
        ...

    def __call__(
        self, logits_CV: Tensor, labels_C: Tensor, rows: slice, dlogits_CV: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return (kd_C, ce_C) of the target rows `rows`; write the gradient to `dlogits_CV`.

        A row labelled -100 has no reference answer: its CE is 0, in value and gradient.
        The gradient is that of `(1 - kd_ratio) * ce_C + kd_ratio * kd_C`, with the second term
        times num_targets / num_kd_targets where these differ. `dlogits_CV` is None where no
        gradient is wanted, and may be `logits_CV` itself: read before writing. With
        `narrows_in_place` it may also begin where `logits_CV` begins, each row with its row.
        """
        ...


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and sums: fp64 stays, everything else is fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gemm_dtype(weight_VD: Tensor) -> torch.dtype:
    """The dtype that the GEMMs of this head read: its own on a GPU, at least fp32 on a CPU.

    CPU GEMMs round a bf16 product to bf16, which costs 16-19% of gradient error where teacher and
    student agree; upcasting their operands is the equivalent of `out_dtype=torch.float32`.
    """
    return weight_VD.dtype if weight_VD.is_cuda else accumulation_dtype(weight_VD.dtype)


def head_tiles(weight_VD: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The head in `gemm_dtype`: whole where it has that dtype already, else tile by tile."""
    dtype, vocab = gemm_dtype(weight_VD), weight_VD.shape[0]
    step = vocab if weight_VD.dtype == dtype else UPCAST_TILE
    for start in range(0, vocab, step):
        cols = slice(start, min(start + step, vocab))
        yield cols, weight_VD[cols].to(dtype)


def below_maximum(logits_CV: Tensor) -> Tensor:
    """The logits minus the largest of their row: the same distribution, differentiable.

    A log-sum-exp of numbers near 1,000 is rounded to 6e-5 in fp32, and so would be every log-prob;
    near 0 it is not. Far from the maximum the difference is rounded, but the probability is 0.
    """
    return logits_CV - logits_CV.detach().amax(-1, keepdim=True)


def _gemm(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool) -> None:
    """`out (+)= a @ b` in out's dtype, without a temporary; `out=` also bypasses autocast."""
    beta = 1 if accumulate else 0  # beta = 0 does not read `out`
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)


def head_logits(
    hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, out_CV: Tensor
) -> None:
    """`out_CV = hidden_CD @ weight_VD.T + bias_V` at out's precision (fp32 or fp64)."""
    hidden_CD = hidden_CD.to(gemm_dtype(weight_VD))
    for cols, tile_VD in head_tiles(weight_VD):
        _gemm(hidden_CD, tile_VD.T, out_CV[:, cols], accumulate=False)
    if bias_V is not None:
        out_CV.add_(bias_V)


@dataclass
class Gradients:
    """Sums over the chunks, not yet divided by the number of targets; None: not wanted.

    The first chunk writes, every other adds, so that only the bias starts as zeros.
    """

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None
    is_empty: bool = True
    """No chunk has been added yet."""

    @staticmethod
    def of(
        inputs: tuple[Tensor, Tensor, Tensor | None], wanted: tuple[bool, ...], num_chunks: int
    ) -> Gradients:
        """Room for those of (hidden, weight, bias) that are wanted, in the accumulation dtype.

        A single chunk is no sum, so its head's gradient is rounded to the head's dtype at once;
        not to fp16, which overflows before the division by the number of targets.
        """
        dtypes = [None if x is None else accumulation_dtype(x.dtype) for x in inputs]
        if num_chunks == 1 and inputs[1].dtype == torch.bfloat16:
            dtypes[1] = torch.bfloat16
        room = [
            None if x is None or not want else x.new_empty(x.shape, dtype=dtype)
            for x, want, dtype in zip(inputs, wanted, dtypes, strict=True)
        ]
        for x in room if num_chunks == 0 else room[2:]:
            if x is not None:
                x.zero_()
        return Gradients(*room)

    @property
    def wanted(self) -> bool:
        """Whether any gradient is."""
        return any(g is not None for g in self.as_tuple())

    def as_tuple(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(hidden, weight, bias)."""
        return self.hidden_ND, self.weight_VD, self.bias_V

    def add_chunk(
        self, dlogits_CV: Tensor, hidden_CD: Tensor, weight_VD: Tensor, rows: slice
    ) -> None:
        """Add what one chunk of logits contributes."""
        hidden_CD = hidden_CD.to(dlogits_CV.dtype)
        if self.hidden_ND is not None:  # no other chunk has these rows
            for cols, tile_VD in head_tiles(weight_VD):
                out_CD = self.hidden_ND[rows]
                _gemm(dlogits_CV[:, cols], tile_VD, out_CD, accumulate=cols.start > 0)
        if self.weight_VD is not None:
            self._add_to_weight(self.weight_VD, dlogits_CV, hidden_CD)
        if self.bias_V is not None:
            self.bias_V.add_(dlogits_CV.sum(0, dtype=self.bias_V.dtype))
        self.is_empty = False

    def _add_to_weight(self, out_VD: Tensor, dlogits_CV: Tensor, hidden_CD: Tensor) -> None:
        if dlogits_CV.dtype.itemsize <= out_VD.dtype.itemsize:
            _gemm(dlogits_CV.T, hidden_CD, out_VD, accumulate=not self.is_empty)
            return
        assert self.is_empty  # a CPU's GEMM in fp32, of a single chunk: rounded tile by tile
        for start in range(0, len(out_VD), UPCAST_TILE):
            cols = slice(start, start + UPCAST_TILE)
            out_VD[cols] = dlogits_CV[:, cols].T @ hidden_CD


def balanced_chunks(num_rows: int, max_rows: int) -> list[slice]:
    """Cut `num_rows` into the fewest chunks of at most `max_rows`; sizes differ by one at most.

    The larger come first, so that the buffers of the first chunk hold every other.
    """
    count = -(-num_rows // max_rows)
    bounds, start = [], 0
    for i in range(count):
        size = num_rows // count + (i < num_rows % count)
        bounds.append(slice(start, start + size))
        start += size
    return bounds


def default_budget_mib(device: torch.device) -> int:
    """Chunk memory: on a GPU enough for 1,024 rows of V = 248,320, to stay bound by arithmetic."""
    return 2560 if device.type == "cuda" else 256


def rows_in_budget(weight_VD: Tensor, body: Body, budget_mib: int | None) -> int:
    """Rows of logits (student's, the body's, and a separate dlogits) that fit; at least one."""
    vocab, dtype = weight_VD.shape[0], accumulation_dtype(weight_VD.dtype)
    separate = gemm_dtype(weight_VD) != dtype and not body.narrows_in_place
    row_bytes = vocab * (dtype.itemsize + separate * weight_VD.dtype.itemsize)
    budget_mib = budget_mib or default_budget_mib(weight_VD.device)
    return max(1, budget_mib * 2**20 // (row_bytes + body.row_bytes(vocab)))


def _gradient_buffer(logits_CV: Tensor, dtype: torch.dtype, *, in_place: bool) -> Tensor:
    """Where a chunk's gradient goes: over the logits where that can be, else beside them."""
    if dtype == logits_CV.dtype:
        return logits_CV
    if in_place:  # the front of every row
        return logits_CV.view(dtype)[:, : logits_CV.shape[1]]
    return torch.empty_like(logits_CV, dtype=dtype)


def _run_chunks(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    body: Body,
    chunks: list[slice],
    gradients: Gradients,
) -> tuple[Tensor, Tensor]:
    """(kd_N, ce_N) of all rows; adds to `gradients` on the way. No host sync."""
    dtype, vocab = accumulation_dtype(weight_VD.dtype), weight_VD.shape[0]
    # Not one tensor cut in two: whoever keeps kd_N alone would keep the memory of both.
    kd_N = hidden_ND.new_zeros(len(labels_N), dtype=dtype)
    ce_N = torch.zeros_like(kd_N)
    max_rows = max((rows.stop - rows.start for rows in chunks), default=0)
    logits = hidden_ND.new_empty(max_rows, vocab, dtype=dtype)
    dlogits = None
    if gradients.wanted:
        dlogits = _gradient_buffer(logits, gemm_dtype(weight_VD), in_place=body.narrows_in_place)
    for rows in chunks:
        size = rows.stop - rows.start
        logits_CV = logits[:size]
        head_logits(hidden_ND[rows], weight_VD, bias_V, logits_CV)
        dlogits_CV = None
        if dlogits is not None:  # the very same object where they are one: torch.compile asks
            dlogits_CV = logits_CV if dlogits is logits else dlogits[:size]
        kd_N[rows], ce_N[rows] = body(logits_CV, labels_N[rows], rows, dlogits_CV)
        if dlogits_CV is not None:
            gradients.add_chunk(dlogits_CV, hidden_ND[rows], weight_VD, rows)
    return kd_N, ce_N


Count = int | Tensor


def divisor(count: Count, device: torch.device) -> Count:
    """A count as what to divide by: on the device, and 1 where there is nothing to divide."""
    return count.detach().to(device).clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def kd_weight(
    num_targets: Count, num_kd_targets: Count | None, device: torch.device
) -> float | Tensor:
    """What a body multiplies the KD term of its gradient by: num_targets / num_kd_targets."""
    if num_kd_targets is None:
        return 1.0
    counts = (divisor(count, device) for count in (num_targets, num_kd_targets))
    # Two counts as tensors would be divided in fp32.
    count, kd_count = (x.double() if isinstance(x, Tensor) else x for x in counts)
    return count / kd_count


def _mix(
    kd_N: Tensor, ce_N: Tensor, kd_ratio: float, num_targets: Count, num_kd_targets: Count
) -> tuple[Tensor, ...]:
    """The fields of KDOutput. An endpoint drops the other term, which 0 * inf would not."""
    ce, kd = ce_N.sum() / num_targets, kd_N.sum() / num_kd_targets
    if kd_ratio in (0, 1):
        return (kd if kd_ratio else ce).clone(), ce, kd, kd_N, ce_N
    return (1 - kd_ratio) * ce + kd_ratio * kd, ce, kd, kd_N, ce_N


class _FusedHead(torch.autograd.Function):
    """Losses and gradients in one go; backward only scales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        body: Body,
        chunks: list[slice],
        kd_ratio: float,
        num_targets: Count,
        num_kd_targets: Count,
    ) -> tuple[Tensor, ...]:
        inputs = hidden_ND, weight_VD, bias_V
        gradients = Gradients.of(inputs, ctx.needs_input_grad[:3], len(chunks))
        per_row = _run_chunks(hidden_ND, weight_VD, bias_V, labels_N, body, chunks, gradients)
        ctx.save_for_backward(*gradients.as_tuple())
        ctx.num_targets = num_targets
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        fields = _mix(*per_row, kd_ratio, num_targets, num_kd_targets)
        ctx.mark_non_differentiable(*fields[1:])
        return fields

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The fused objective has no second derivative: its gradients are computed in the "
                "forward. Call backward without create_graph=True."
            )
        scale = grad_outputs[0] / ctx.num_targets
        sums = ctx.saved_tensors
        ctx.maybe_clear_saved_tensors()  # autograd adds in place to what nobody else holds
        reusable = not torch._C._autograd._get_current_graph_task_keep_graph()
        grads = (
            None if x is None else _scaled(x, scale, dtype, in_place=reusable)
            for x, dtype in zip(sums, ctx.dtypes, strict=True)
        )
        return *grads, None, None, None, None, None, None


def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype, *, in_place: bool) -> Tensor:
    """`x * scale` rounded to `dtype` once; a head's sums are as large as its weight."""
    if in_place and x.dtype == dtype:
        return x.mul_(scale)
    return torch.mul(x, scale, out=torch.empty_like(x, dtype=dtype))


def chunked_objective(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    body: Body,
    *,
    kd_ratio: float,
    num_targets: Count,
    num_kd_targets: Count | None = None,
    chunk_size: int | None = None,
    budget_mib: int | None = None,
    cut: Callable[[int], list[slice]] | None = None,
) -> KDOutput:
    """Run `body` over rows that are all targets, without a host sync.

    Args:
        hidden_ND: student hidden states of the target rows; may be empty.
        weight_VD: student head, unsharded; a head that needs no gradient costs none.
        bias_V: bias of the head or None.
        labels_N: int64 in [0, V), or -100: this row has no reference answer (the student sampled
            it), so it gets the KD term alone and still counts as a target.
        body: turns logits into losses and their gradient.
        kd_ratio: share of the KD term; must be what `body` was made with.
        num_targets: count of targets that the sums are divided by; 0 counts as 1.
        num_kd_targets: count that the sum of the KD term is divided by instead; None: the same. The
            body must have been made with `kd_weight` of the two.
        chunk_size: rows per chunk; None: as many as fit into `budget_mib`.
        budget_mib: memory for the logits of one chunk; None: 2,560 MiB on a GPU, else 256 MiB.
        cut: the chunks, in order and covering all rows, for the most rows that one should have;
            None: any row may end a chunk.

    With N = 0 the loss is 0 and still attached to hidden and head, so that every rank of a
    distributed step runs its backward.
    """
    counts = [num_targets, num_targets if num_kd_targets is None else num_kd_targets]
    counts = [divisor(count, hidden_ND.device) for count in counts]
    max_rows = chunk_size or rows_in_budget(weight_VD, body, budget_mib)
    chunks = cut(max_rows) if cut else balanced_chunks(len(labels_N), max_rows)
    inputs = hidden_ND, weight_VD, bias_V
    with torch.autocast(hidden_ND.device.type, enabled=False):
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
            out = _FusedHead.apply(*inputs, labels_N, body, chunks, kd_ratio, *counts)
            return KDOutput(*out)
        with torch.no_grad():
            none = Gradients(None, None, None)
            per_row = _run_chunks(*inputs, labels_N, body, chunks, none)
            return KDOutput(*_mix(*per_row, kd_ratio, *counts))
