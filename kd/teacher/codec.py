"""Payloads as bytes: as many for every token, so that a row is found by counting.

Shape legend: N response tokens, D hidden, K the top-k, M the likeliest of them.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kd.teacher.bits import EliasFano, pack, packed_bytes, unpack
from kd.teacher.payload import ABSENT, Hidden, Payload, TopK
from kd.types import UserError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8": torch.float8_e4m3fn,
}
CHUNK_ROWS = 4096
"""Tokens at a time: unpacked bits take many times their own memory."""


class Codec(Protocol):
    """How a payload is kept."""

    @property
    def token_bytes(self) -> int:
        """Bytes of a token."""
        ...

    def encode(self, payload: Payload, response_ids_N: Tensor) -> np.ndarray:
        """uint8 [N, token_bytes]. Raises UserError for what cannot be kept."""
        ...

    def decode(self, data: np.ndarray, response_ids_N: Tensor) -> Payload:
        """The reverse, on the CPU, as exactly as the codec is."""
        ...


class HiddenCodec:
    """Hidden states in another dtype; float8 (e4m3) with a scale of its own for every token."""

    def __init__(self, dtype: str, hidden_size: int) -> None:
        self.dtype, self.hidden_size = DTYPES[dtype], hidden_size
        self.is_scaled = dtype == "float8"

    @property
    def token_bytes(self) -> int:
        """See `Codec`."""
        return self.hidden_size * self.dtype.itemsize + 4 * self.is_scaled

    def encode(self, payload: Payload, response_ids_N: Tensor) -> np.ndarray:
        """See `Codec`."""
        assert isinstance(payload, Hidden)
        hidden_ND = payload.hidden_ND.detach().cpu()
        scale_N1 = None
        if self.is_scaled:
            hidden_ND = hidden_ND.float()
            largest_N1 = hidden_ND.abs().amax(-1, keepdim=True).clamp(min=1e-30)
            scale_N1 = largest_N1 / torch.finfo(self.dtype).max
            hidden_ND = hidden_ND / scale_N1
        kept_ND = hidden_ND.to(self.dtype)
        if not kept_ND.float().isfinite().all():
            raise UserError(
                f"the teacher's hidden states are not finite as {self.dtype}: check the teacher, "
                "or choose bfloat16 or float32"
            )
        parts = [kept_ND] if scale_N1 is None else [kept_ND, scale_N1]
        return np.concatenate([x.contiguous().view(torch.uint8).numpy() for x in parts], axis=1)

    def decode(self, data: np.ndarray, response_ids_N: Tensor) -> Hidden:
        """See `Codec`."""
        end = self.hidden_size * self.dtype.itemsize
        kept_ND = torch.from_numpy(data[:, :end].copy()).view(self.dtype)
        if not self.is_scaled:
            return Hidden(kept_ND)
        scale_N1 = torch.from_numpy(data[:, end:].copy()).view(torch.float32)
        return Hidden(kept_ND.float() * scale_N1)


class TopKCodec:
    """Top-k log-probs in about 2.3 bytes per entry: 299 at k = 128 and 151,936 tokens.

    The k ids ascend and are kept exactly, by Elias and Fano's code. In their order, each has a
    code of 5 bits: 31 for the M likeliest, else a level between the least and the floor, which is
    the next likeliest after those M. The M themselves have one of 256 levels between the floor and
    probability 1. Levels are evenly spaced in u = p^(1/4), between log-probs (far too fine for
    what is unlikely) and sqrt(p) (which would give every entry the same part in the KL error, but
    most entries are the least likely). The floor, the least, the tail and the response's own token
    are float16 log-probs. What is decoded is renormalised over all buckets: the KL error is then
    of second order.
    """

    MOST, CODE_BITS, LEVEL_BITS = 16, 5, 8
    TOP = 2**CODE_BITS - 1
    POWER = 4

    def __init__(self, k: int, vocab: int) -> None:
        self.k, self.most = k, min(k, self.MOST)
        self.ids = EliasFano(k, vocab)
        self._sizes = [
            self.ids.num_bytes,
            packed_bytes(k, self.CODE_BITS),
            packed_bytes(self.most, self.LEVEL_BITS),
            4 * 2,
        ]

    @property
    def token_bytes(self) -> int:
        """See `Codec`."""
        return sum(self._sizes)

    def encode(self, payload: Payload, response_ids_N: Tensor) -> np.ndarray:
        """See `Codec`."""
        assert isinstance(payload, TopK)
        fields = payload.ids_NK, payload.logp_NK, payload.response_logp_N, payload.tail_N
        arrays = [x.detach().cpu().numpy() for x in fields]
        if np.isnan(arrays[1]).any():
            raise UserError("the teacher's log-probs are not numbers: check the teacher")
        arrays.append(response_ids_N.cpu().numpy())
        chunks = range(0, max(1, len(payload)), CHUNK_ROWS)
        return np.concatenate(
            [self._encode(*(x[start : start + CHUNK_ROWS] for x in arrays)) for start in chunks]
        )

    def _encode(
        self,
        ids_NK: np.ndarray,
        logp_NK: np.ndarray,
        response_logp_N: np.ndarray,
        tail_N: np.ndarray,
        response_ids_N: np.ndarray,
    ) -> np.ndarray:
        descending = np.argsort(-logp_NK, axis=1, kind="stable")
        ids_NK, logp_NK = (np.take_along_axis(x, descending, 1) for x in (ids_NK, logp_NK))
        is_among_N = ((ids_NK == response_ids_N[:, None]) & (logp_NK > ABSENT / 2)).any(1)
        scalars = [
            logp_NK[:, -1],
            logp_NK[:, min(self.most, self.k - 1)],
            tail_N,
            np.where(is_among_N, ABSENT, response_logp_N),
        ]
        with np.errstate(over="ignore"):  # ABSENT is float16's -inf
            scalars_N4 = np.stack(scalars, axis=1).astype("<f2")
        u_NK, present_NK = self._u(logp_NK), logp_NK > ABSENT / 2
        least_N1, floor_N1 = (self._u(scalars_N4[:, i : i + 1]) for i in (0, 1))
        codes_NK = _level(u_NK, least_N1, floor_N1, self.TOP - 1, present_NK)
        codes_NK[:, : self.most] = self.TOP
        levels_NK = _level(u_NK, floor_N1, np.ones_like(floor_N1), self._levels, present_NK)

        ascending = np.argsort(ids_NK, axis=1, kind="stable")
        codes_NK, levels_NK = (np.take_along_axis(x, ascending, 1) for x in (codes_NK, levels_NK))
        levels_NM = levels_NK[codes_NK == self.TOP].reshape(-1, self.most)
        parts = [
            self.ids.encode(np.take_along_axis(ids_NK, ascending, 1)),
            pack(codes_NK, self.CODE_BITS),
            pack(levels_NM, self.LEVEL_BITS),
            scalars_N4.view(np.uint8),
        ]
        return np.concatenate(parts, axis=1)

    def decode(self, data: np.ndarray, response_ids_N: Tensor) -> TopK:
        """See `Codec`; in descending order, and equals in that of their ids."""
        response_ids = response_ids_N.cpu().numpy()
        chunks = range(0, max(1, len(data)), CHUNK_ROWS)
        parts = [
            self._decode(data[start : start + CHUNK_ROWS], response_ids[start : start + CHUNK_ROWS])
            for start in chunks
        ]
        columns = (np.concatenate(column) for column in zip(*parts, strict=True))
        return TopK(*(torch.from_numpy(column) for column in columns))

    def _decode(self, data: np.ndarray, response_ids_N: np.ndarray) -> tuple[np.ndarray, ...]:
        ids, codes, levels, scalars = np.split(data, np.cumsum(self._sizes)[:-1], axis=1)
        ids_NK = self.ids.decode(ids)
        codes_NK = unpack(codes, self.CODE_BITS, self.k)
        scalars_N4 = np.ascontiguousarray(scalars).view("<f2").astype(np.float32)
        least_N1, floor_N1 = self._u(scalars_N4[:, :1]), self._u(scalars_N4[:, 1:2])
        u_NK = least_N1 + codes_NK / (self.TOP - 1) * (floor_N1 - least_N1)
        levels_NM = unpack(levels, self.LEVEL_BITS, self.most) / self._levels
        u_NK[codes_NK == self.TOP] = (floor_N1 + levels_NM * (1 - floor_N1)).ravel()

        with np.errstate(divide="ignore"):
            logp_NK = self.POWER * np.log(u_NK)
        tail_N, response_N = scalars_N4[:, 2], scalars_N4[:, 3]
        buckets = np.concatenate([logp_NK, tail_N[:, None], response_N[:, None]], axis=1)
        buckets -= np.log(np.exp(buckets).sum(1, keepdims=True))
        buckets = np.maximum(buckets, ABSENT).astype(np.float32)
        logp_NK, tail_N, response_N = buckets[:, : self.k], buckets[:, self.k], buckets[:, -1]
        own_NK = np.where(ids_NK == response_ids_N[:, None], logp_NK, ABSENT)
        response_N = np.maximum(response_N, own_NK.max(1))
        descending = np.argsort(-logp_NK, axis=1, kind="stable")
        ids_NK, logp_NK = (np.take_along_axis(x, descending, 1) for x in (ids_NK, logp_NK))
        return ids_NK, logp_NK, response_N, np.ascontiguousarray(tail_N)

    @property
    def _levels(self) -> int:
        return 2**self.LEVEL_BITS - 1

    def _u(self, logp: np.ndarray) -> np.ndarray:
        return np.exp(logp.astype(np.float64) / self.POWER)


def _level(
    u_NK: np.ndarray, low_N1: np.ndarray, high_N1: np.ndarray, levels: int, present_NK: np.ndarray
) -> np.ndarray:
    """The nearest of levels 0 to `levels`; of low = 0 only what is absent has level 0."""
    step_N1 = np.maximum(high_N1 - low_N1, 1e-12) / levels
    level_NK = np.rint((u_NK - low_N1) / step_N1).clip(0, levels).astype(np.int64)
    return np.maximum(level_NK, (present_NK & (low_N1 == 0)).astype(np.int64))
