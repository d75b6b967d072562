"""What each token of a tokenizer spells, in bytes.

Bytes and not characters: byte-level BPE and byte fallback split a character over several tokens.
The kind of tokenizer is what its own decoder declares, never guessed from the look of its tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from kd.types import UserError

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
KINDS = "byte-level BPE (ByteLevel), SentencePiece (Metaspace or Replace), WordPiece"


@dataclass(frozen=True)
class Unaligned:
    """Why the two sides of a response cannot be aligned: for the caller to count and to name."""

    reason: str


class TokenBytes:
    """The bytes of every token of a fast Hugging Face tokenizer.

    `stop_ids` end a response, the first of them being the EOS; None: the tokenizer's EOS alone.
    Byte-exact for byte-level BPE and SentencePiece; what a normalizer of theirs does to a text
    (NFC, say) shows as bytes that differ from those of the text.

    WordPiece is not: whitespace is lost, and case or accents may be. A word's first piece is
    taken to begin with a space, and `fold` is what has to be done to the other side's characters
    before the two can be compared.

    Raises UserError for a tokenizer that is none of these, or that has no EOS.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int] | None = None):
        name = f"{type(tokenizer).__name__} {tokenizer.name_or_path}".strip()
        if not tokenizer.is_fast:
            raise UserError(f"{name} is a slow tokenizer: aligning responses needs a fast one")
        eos = tokenizer.eos_token_id
        if not stop_ids and eos is None:
            raise UserError(f"{name} has no EOS token: nothing can end an aligned response")
        self.tokenizer, self.name = tokenizer, name
        self.stop_ids: list[int] = list(stop_ids or [eos])
        backend = tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
        decoder = _steps(backend.decoder, "decoders")
        pieces = {i: piece for piece, i in backend.get_vocab(with_added_tokens=True).items()}
        spell = _speller(decoder, name)
        self.bytes_of: list[bytes | None] = [None] * (max(pieces) + 1)
        """By token id; None: a special token, the unknown one, or an id that is not in use."""
        for i, piece in pieces.items():
            self.bytes_of[i] = spell(piece)
        self.specials: dict[int, str] = {}
        """Names of the special tokens."""
        for i, added in backend.get_added_tokens_decoder().items():
            self.bytes_of[i] = None if added.special else added.content.encode()
            if added.special:
                self.specials[i] = added.content
        if tokenizer.unk_token_id is not None:
            self.bytes_of[tokenizer.unk_token_id] = None
        self.free_spaces = _free_spaces(decoder, _steps(backend.pre_tokenizer, "pretokenizers"))
        fallback = any(step["type"] == "ByteFallback" for step in decoder)
        self.byte_tokens = {i for i, p in pieces.items() if fallback and BYTE_TOKEN.fullmatch(p)}
        """Tokens of a byte fallback: the same byte may be a piece, too."""
        self.is_exact = not any(step["type"] == "WordPiece" for step in decoder)
        """False: whitespace is lost, and offsets are those of the folded text."""
        self._normalizer = backend.normalizer
        self._folded: dict[str, str] = {}

    @property
    def eos_id(self) -> int:
        """The token that ends a response unless another did."""
        return self.stop_ids[0]

    def split(self, ids: list[int]) -> tuple[list[int], bool]:
        """The tokens of the text, and whether a stop id ends them."""
        ended = bool(ids) and ids[-1] in self.stop_ids
        return (ids[:-1] if ended else ids), ended

    def spell(self, ids: list[int]) -> list[bytes] | Unaligned:
        """The bytes of each token. Special and unknown tokens have none."""
        pieces: list[bytes] = []
        for i in ids:
            piece = self.bytes_of[i] if i < len(self.bytes_of) else None
            if piece is None:
                token = self.specials.get(i, "special, unknown or unused")
                return Unaligned(f"token {i} ({token}) of {self.name} spells nothing")
            pieces.append(piece)
        return pieces

    def readings(self, pieces: list[bytes]) -> list[list[bytes]]:
        """`pieces` without the space that the tokenizer may have put first, then as they are.

        Some tokenizers put a space before every text, or take one that is there for it; which of
        the two it was cannot be told from the tokens.
        """
        stripped = list(pieces)
        for _ in range(self.free_spaces):
            first = next((k for k, piece in enumerate(stripped) if piece), None)
            if first is None or not stripped[first].startswith(b" "):
                break
            stripped[first] = stripped[first][1:]
        return [stripped] if stripped == pieces else [stripped, pieces]

    def fold(self, character: str) -> str:
        """What a tokenizer that is not byte-exact leaves of a character, without whitespace."""
        if character not in self._folded:
            left = character
            if self._normalizer is not None:
                left = self._normalizer.normalize_str(character)
            self._folded[character] = "".join(left.split())
        return self._folded[character]


def _steps(part: Any, kind: str) -> list[dict[str, Any]]:
    """What a component of the tokenizer declares, a Sequence as its steps."""
    if part is None:
        return []
    state = json.loads(part.__getstate__())
    pending, steps = [state], []
    while pending:
        step = pending.pop(0)
        if step["type"] == "Sequence":
            pending = step[kind] + pending
        else:
            steps.append(step)
    return steps


def _byte_map() -> dict[str, int]:
    """The characters that GPT-2's byte-level BPE writes for the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + k): b for k, b in enumerate(others)}


class _ByteLevel:
    def __init__(self) -> None:
        self.byte_of = _byte_map()

    def __call__(self, piece: str) -> bytes | None:
        found = [self.byte_of.get(c) for c in piece]
        return None if None in found else bytes(b for b in found if b is not None)


@dataclass
class _SentencePiece:
    space: str
    byte_fallback: bool

    def __call__(self, piece: str) -> bytes:
        byte = BYTE_TOKEN.fullmatch(piece) if self.byte_fallback else None
        return bytes([int(byte[1], 16)]) if byte else piece.replace(self.space, " ").encode()


@dataclass
class _WordPiece:
    prefix: str

    def __call__(self, piece: str) -> bytes:
        continues = piece.startswith(self.prefix)
        return (piece[len(self.prefix) :] if continues else " " + piece).encode()


def _speller(decoder: list[dict[str, Any]], name: str) -> Callable[[str], bytes | None]:
    """What turns a token's string into its bytes."""
    steps = {step["type"]: step for step in decoder}
    if steps.keys() == {"ByteLevel"}:
        return _ByteLevel()
    if steps.keys() == {"WordPiece"}:
        return _WordPiece(steps["WordPiece"]["prefix"])
    fallback = "ByteFallback" in steps
    if "Metaspace" in steps and steps.keys() <= {"Metaspace", "ByteFallback", "Fuse"}:
        return _SentencePiece(steps["Metaspace"]["replacement"], fallback)
    if "Replace" in steps and steps.keys() <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        replace, strip = steps["Replace"], steps.get("Strip", {"content": " ", "stop": 0})
        plain = replace["content"] == " " and strip["content"] == " " and strip["stop"] == 0
        if plain and "String" in replace["pattern"]:
            return _SentencePiece(replace["pattern"]["String"], fallback)
    found = ", ".join(step["type"] for step in decoder) or "none"
    raise UserError(f"{name} has the decoder {found}: responses can be aligned for {KINDS}")


def _free_spaces(decoder: list[dict[str, Any]], pre_tokenizer: list[dict[str, Any]]) -> int:
    """How many spaces at the start of a text may be the tokenizer's own."""
    for step in decoder:
        if step["type"] == "Strip":
            return step["start"]
        if step["type"] == "Metaspace":
            return int(step["prepend_scheme"] != "never")
        if step["type"] == "WordPiece":
            return 1
    return int(any(s["type"] == "ByteLevel" and s["add_prefix_space"] for s in pre_tokenizer))
