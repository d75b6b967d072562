"""What `kd.serve` and its clients say to each other.

- `GET /v1/info`: an `Info` as JSON, compared with what the run needs before its first step.
- `GET /v1/head`: the teacher's head as safetensors (`weight`, and `bias` if it has one).
- `POST /v1/targets`: JSON `{"rows": [{"messages": […], "response_ids": […]}], "kind": "hidden"}`,
  or `"kind": "topk"` with `k`, `temperature` and `vocab`. Messages are chat messages with images as
  data URIs. The reply is safetensors: the payload's tensors over all rows, one after the other,
  per row how many tokens it has and a digest of the prompt that the server has read, and a digest
  of whose word it is: another teacher may have come to its place since the start of the run.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kd.teacher.payload import Payload, TopK, from_tensors, join, split, tensors
from kd.types import digest, ids_bytes

LENGTHS, PROMPTS, TEACHER = "row_lengths", "row_prompts", "teacher"


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

    @property
    def digest(self) -> bytes:
        """What a reply says of who has made it: of all that its word depends on."""
        word = self.weights, self.dtype, self.vocab_size, self.tokenizer, self.rendering
        return digest(json.dumps(word).encode())


@dataclass(frozen=True)
class Reply:
    """The body of a reply, unpacked."""

    payloads: list[Payload]
    """Of each row, as what follows."""
    prompts: list[bytes]
    """`prompt_digest`"""
    teacher: bytes
    """`Info.digest`"""


def prompt_digest(prompt_ids: list[int]) -> bytes:
    """What a reply says of the prompt that was read."""
    return digest(ids_bytes(prompt_ids))


def pack_reply(payloads: list[Payload], prompts: list[list[int]], teacher: bytes) -> bytes:
    """The body of a reply; at least one row."""
    joined = {name: x.contiguous().cpu() for name, x in tensors(join(payloads)).items()}
    if "ids_NK" in joined:
        joined["ids_NK"] = joined["ids_NK"].to(torch.int32)
    digests = [list(prompt_digest(ids)) for ids in prompts]
    about = {
        LENGTHS: torch.tensor([len(payload) for payload in payloads]),
        PROMPTS: torch.tensor(digests, dtype=torch.uint8),
        TEACHER: torch.tensor(list(teacher), dtype=torch.uint8),
    }
    return save(joined | about)


def unpack_reply(body: bytes) -> Reply:
    """The reverse. Raises ValueError for anything else."""
    try:
        found = load(body)
        lengths, prompts, teacher = (found.pop(name) for name in (LENGTHS, PROMPTS, TEACHER))
        payload = from_tensors(found)
        if isinstance(payload, TopK):
            payload.ids_NK = payload.ids_NK.to(torch.int64)
        sizes = [len(x) == int(lengths.sum()) for x in found.values()]
        if lengths.ndim != 1 or not all(sizes) or len(prompts) != len(lengths):
            raise ValueError("tensors of another length than its rows")
        payloads = split(payload, lengths.tolist())
        return Reply(payloads, [bytes(row.tolist()) for row in prompts], bytes(teacher.tolist()))
    except (SafetensorError, KeyError, RuntimeError, TypeError, IndexError) as error:
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
