"""A row's messages, as users write them -> one form. What does not fit is a RowError."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from kd.data.base import RowError

ROLES = ("system", "user", "assistant", "tool")
REFERENCES = ("image", "path", "url", "bytes")


@dataclass
class Parsed:
    """A conversation up to its answer; `images[k]` refers to the k-th image part."""

    messages: list[dict[str, Any]]
    images: list[Any]
    answer: str | None


def parse_conversation(messages: Any, images: Any, *, require_answer: bool) -> Parsed:
    """Sort a row into context, image references and answer, its last assistant turn.

    `messages` is a list of turns, or the JSON text of one. An image part with a reference of its
    own has that one, the others have those of `images`, in order. Without `require_answer` a row
    may end in another turn: a prompt, for rollouts. Raises RowError with what is wrong.
    """
    turns = _turns(messages)
    answer = None
    if turns[-1]["role"] == "assistant":
        answer = _answer(turns.pop())
    elif require_answer:
        raise RowError(f"no answer: the last turn is the {turns[-1]['role']}'s")
    if not turns:
        raise RowError("nothing comes before the answer")
    own: list[Any] = []
    context = [_message(turn, number, own) for number, turn in enumerate(turns)]
    return Parsed(context, _assign(own, _listed(images)), answer)


def images_first(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`messages` with all image parts moved to the front of the first user turn, in their order.

    Raises RowError where there are images but no user turn.
    """
    contents = [turn["content"] for turn in messages]
    count = sum(part["type"] == "image" for content in contents for part in _parts(content))
    if count == 0:
        return messages
    first = next((i for i, turn in enumerate(messages) if turn["role"] == "user"), None)
    if first is None:
        raise RowError("there are images, but no user turn that they could come first in")
    moved = [{**turn, "content": _without_images(turn["content"])} for turn in messages]
    moved[first]["content"] = [{"type": "image"}] * count + _parts(moved[first]["content"])
    return moved


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _without_images(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return [part for part in content if part["type"] != "image"]


def _turns(messages: Any) -> list[dict[str, Any]]:
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except ValueError as error:
            raise RowError(f"messages are text but not JSON: {error}") from error
    if not isinstance(messages, list) or not messages:
        raise RowError("messages are not a list of turns")
    for number, turn in enumerate(messages):
        if not isinstance(turn, dict) or turn.get("role") not in ROLES:
            raise RowError(f"turn {number} has no role of {', '.join(ROLES)}")
    return list(messages)


def _answer(turn: dict[str, Any]) -> str:
    content = turn.get("content")
    parts = _parts(content or [])
    if any(part.get("type") != "text" for part in parts):
        raise RowError("the answer has parts that are not text")
    answer = "".join(part.get("text") or "" for part in parts)
    if not answer:
        raise RowError("no answer: the last assistant turn is empty")
    return answer


def _message(turn: dict[str, Any], number: int, references: list[Any]) -> dict[str, Any]:
    """One turn with bare image parts; their references (None: no own one) go to `references`."""
    content = turn.get("content")
    if isinstance(content, list):
        content = [_part(part, number, references) for part in content]
    elif content is None:
        content = ""
    elif not isinstance(content, str):
        raise RowError(f"the content of turn {number} is neither text nor a list of parts")
    # A column of structs fills the keys that a turn does not have with None.
    rest = {key: value for key, value in turn.items() if value is not None}
    return {**rest, "content": content}


def _part(part: Any, number: int, references: list[Any]) -> dict[str, Any]:
    given = {k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else {}
    kind = given.get("type")
    if kind == "text" and isinstance(given.get("text"), str):
        return {"type": "text", "text": given["text"]}
    if kind == "image":
        key = next((key for key in REFERENCES if key in given), None)
        references.append({key: given[key]} if key == "bytes" else given[key] if key else None)
        return {"type": "image"}
    if kind == "image_url":
        url = given.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        if not isinstance(url, str):
            raise RowError(f"an image_url part of turn {number} has no url")
        references.append(url)
        return {"type": "image"}
    raise RowError(f"turn {number} has a part that is no text, image or image_url: {kind!r}")


def _listed(images: Any) -> list[Any]:
    if images is None:
        return []
    return images if isinstance(images, list) else [images]


def _assign(own: list[Any], column: list[Any]) -> list[Any]:
    bare = sum(reference is None for reference in own)
    if bare != len(column):
        raise RowError(
            f"{len(column)} images beside the messages, but {bare} image parts for them; "
            f"mark the place of each by a part {{'type': 'image'}}"
        )
    rest = iter(column)
    return [next(rest) if reference is None else reference for reference in own]
