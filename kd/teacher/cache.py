"""An open cache: its manifest, its codec, its head and its rows.

Shape legend: N response tokens of several responses.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kd.teacher.base import Head
from kd.teacher.codec import Codec, HiddenCodec, TopKCodec
from kd.teacher.manifest import Manifest, read_head
from kd.teacher.payload import Hidden, Payload
from kd.teacher.store import Store
from kd.types import Batch, Response, UserError

SEGMENTS = "segments"


def told(batch: Batch) -> list[Response]:
    """The responses that the teacher has a word on: those that have a token in its tokenizer."""
    return [response for response in batch.responses if response.response_ids]


def ids_of(responses: list[Response]) -> Tensor:
    """Their tokens [N], one response after the other."""
    return torch.tensor([i for r in responses for i in r.response_ids], dtype=torch.int64)


class Cache:
    """Raises UserError for files that are damaged, when it opens them or reads a row."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        device: torch.device,
        *,
        ignored: frozenset[Path] = frozenset(),
    ) -> None:
        self.folder, self.manifest = folder, manifest
        self.codec = _codec(manifest)
        self.store = Store(folder / SEGMENTS, ignored=ignored)
        self.head = None
        if manifest.head is not None:
            head = read_head(folder, manifest.head)
            bias_V = None if head.bias_V is None else head.bias_V.to(device)
            self.head = Head(head.weight_VD.to(device), bias_V)
        self.rows_before = len(self.store)

    def rows(self, responses: list[Response]) -> list[np.ndarray | None]:
        """What is kept of each; None: nothing."""
        if any(response.key not in self.store for response in responses):
            self.store.refresh()
        return [self.store.get(response.key) for response in responses]

    def keep(self, responses: list[Response], payload: Payload) -> None:
        """Keep what is not there of all of these; on the disk with the next `publish`."""
        for response, row in zip(responses, self.encode(responses, payload), strict=True):
            self.store.put(response.key, row)

    def encode(self, responses: list[Response], payload: Payload) -> list[np.ndarray]:
        """The payload of all of these, at least one, as the row of each."""
        data = self.codec.encode(payload, ids_of(responses))
        ends = np.cumsum([len(response.response_ids) for response in responses])
        return [row.ravel() for row in np.split(data, ends[:-1])]

    def payload(self, responses: list[Response], rows: list[np.ndarray | None]) -> Payload:
        """Of all of these, at least one, from what is kept: no row is None. On the CPU."""
        data = np.concatenate(rows).reshape(-1, self.codec.token_bytes)
        payload = self.codec.decode(data, ids_of(responses))
        if isinstance(payload, Hidden):
            assert self.head is not None
            return Hidden(payload.hidden_ND.to(self.head.weight_VD.dtype))
        return payload

    def publish(self) -> None:
        """Put what is kept on the disk for good. Raises UserError where it refuses."""
        try:
            self.store.publish()
        except OSError as error:
            raise UserError(
                f"cannot write the cache {self.folder}: {error.strerror}\n"
                "What it holds is whole: make room, and start the same command again"
            ) from error


def _codec(manifest: Manifest) -> Codec:
    settings = manifest.codec
    if settings["name"] == "hidden":
        return HiddenCodec(settings["dtype"], settings["hidden_size"])
    return TopKCodec(settings["k"], settings["vocab"])
