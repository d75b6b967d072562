"""What `kd.serve` and its clients say to each other.

- `GET /v1/info`: an `Info` as JSON, compared with what the run needs before its first step.
- `GET /v1/head`: the teacher's head as safetensors (`weight`, and `bias` if it has one).
- `POST /v1/targets`: JSON `{"rows": [{"messages": […], "response_ids": […]}], "kind": "hidden"}`,
  or `"kind": "topk"` with `k`, `temperature` and `vocab`. Messages are chat messages with images as
  data URIs. The reply is safetensors: the payload's tensors over all rows, one after the other,
  and per row how many tokens it has and a digest of the prompt that the server has read.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kd.teacher.payload import Payload, TopK, from_tensors, join, split, tensors
from kd.types import digest, ids_bytes

LENGTHS, PROMPTS = "row_lengths", "row_prompts"


@dataclass(frozen=True)
class Info:
    """A served teacher."""

    model: str
    revision: str | None
    weights: str
    """`kd.teacher.weights.weights_digest`"""
    dtype: str
    """Of its hidden states and head."""
    vocab_size: int
    """Entries of its head."""
    hidden_size: int
    max_length: int
    """Tokens of prompt and response, at most."""
    max_top_k: int
    max_rows: int
    """Of a request."""
    stop_ids: list[int]
    tokenizer: str
    """`kd.model.tokenizer_digest`"""
    rendering: str
    """`kd.model.rendering_digest`"""

    @staticmethod
    def read(values: dict[str, Any]) -> Info:
        """From JSON. Raises ValueError where something is missing or of another type."""
        try:
            fields = {f.name: values[f.name] for f in dataclasses.fields(Info)}
            numbers = "vocab_size", "hidden_size", "max_length", "max_top_k", "max_rows"
            return Info(**fields | {name: int(fields[name]) for name in numbers})
        except (KeyError, TypeError) as error:
            raise ValueError(f"no description of a teacher: {error}") from error


def prompt_digest(prompt_ids: list[int]) -> bytes:
    """What a reply says of the prompt that was read."""
    return digest(ids_bytes(prompt_ids))


def pack_reply(payloads: list[Payload], prompts: list[list[int]]) -> bytes:
    """The body of a reply; at least one row."""
    joined = {name: x.contiguous().cpu() for name, x in tensors(join(payloads)).items()}
    if "ids_NK" in joined:
        joined["ids_NK"] = joined["ids_NK"].to(torch.int32)
    digests = [list(prompt_digest(ids)) for ids in prompts]
    rows = {
        LENGTHS: torch.tensor([len(payload) for payload in payloads]),
        PROMPTS: torch.tensor(digests, dtype=torch.uint8),
    }
    return save(joined | rows)


def unpack_reply(body: bytes) -> tuple[list[Payload], list[bytes]]:
    """The payload and the digest of the prompt of each row. Raises ValueError for anything else."""
    try:
        found = load(body)
        lengths, prompts = found.pop(LENGTHS), found.pop(PROMPTS)
        payload = from_tensors(found)
        if isinstance(payload, TopK):
            payload.ids_NK = payload.ids_NK.to(torch.int64)
        if lengths.ndim != 1 or any(len(x) != int(lengths.sum()) for x in found.values()):
            raise ValueError("tensors of another length than its rows")
        return split(payload, lengths.tolist()), [bytes(row.tolist()) for row in prompts]
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(str(error)) from error


def pack_head(weight_VD: Tensor, bias_V: Tensor | None) -> bytes:
    """The body of `/v1/head`."""
    head = {"weight": weight_VD} | ({} if bias_V is None else {"bias": bias_V})
    return save({name: x.detach().contiguous().cpu() for name, x in head.items()})


def unpack_head(body: bytes) -> tuple[Tensor, Tensor | None]:
    """The reverse. Raises ValueError for anything else."""
    try:
        found = load(body)
        return found["weight"], found.get("bias")
    except (SafetensorError, KeyError) as error:
        raise ValueError(str(error)) from error
