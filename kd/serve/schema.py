"""The body of `/v1/targets`, and why one is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

KINDS = ("hidden", "topk")


class Refused(Exception):
    """A request that is answered with a status of 400 or more, and one plain sentence."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers


class Body(BaseModel):
    """What nobody reads would be ignored in silence: it is forbidden."""

    model_config = ConfigDict(extra="forbid", strict=True)


class RowBody(Body):
    """A prompt and a response to it."""

    messages: list[dict[str, Any]]
    response_ids: list[Annotated[int, Field(ge=0)]]


class HiddenBody(Body):
    """Asks for hidden states."""

    kind: Literal["hidden"]
    rows: list[RowBody] = Field(min_length=1)


class TopKBody(Body):
    """Asks for the k likeliest of the first `vocab` entries of softmax(logits / temperature)."""

    kind: Literal["topk"]
    rows: list[RowBody] = Field(min_length=1)
    k: int = Field(ge=1)
    temperature: float = Field(ge=1e-3, le=1e3, allow_inf_nan=False)
    vocab: int = Field(ge=2)


TargetsBody = HiddenBody | TopKBody
_TARGETS = TypeAdapter(Annotated[TargetsBody, Field(discriminator="kind")])


def read_targets(body: bytes | bytearray) -> TargetsBody:
    """Raises Refused where it is something else."""
    try:
        return _TARGETS.validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> Refused:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return Refused(400, f"the body is no JSON: {first['msg']}")
    if first["type"].startswith("union_tag"):
        return Refused(422, f"kind: use {' or '.join(KINDS)}")
    place = [str(key) for key in first["loc"] if key not in KINDS]
    return Refused(422, f"{'.'.join(place) or 'the body'}: {first['msg']}")
