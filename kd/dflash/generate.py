"""Greedy decoding with a draft, whose output is the target's own.

Each step drafts a block, has the target read it in one forward, and keeps the longest prefix that
the target would have said itself, and what it says next.

Rows of a batch accept different numbers of tokens. Keys and values of rejected ones are cut off
where no row needs them and masked where another row does. A linear-attention state cannot be cut:
it is put back to what it was before the step, and the accepted tokens are read again.

Shape legend: B rows, P prompt, T tokens of a block, K positions in the cache, M taps.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kd.dflash.attention import DenseAttention
from kd.dflash.draft import ContextCache, Draft
from kd.dflash.target import Target
from kd.types import Inputs, UserError

KNOWN_LAYERS = {"full_attention", "linear_attention"}


@dataclass
class Decoded:
    """The response to one prompt."""

    response_ids: list[int] = field(default_factory=list)
    """With the stop id that ended it, if one did."""
    finished: bool = False
    """False: cut at the most tokens allowed."""
    num_steps: int = 0
    """Forwards of the target after that of the prompt."""

    @property
    def accept_length(self) -> float:
        """Tokens per step, from 1 to the block size; the prompt's forward gives the first token."""
        return (len(self.response_ids) - 1) / self.num_steps if self.num_steps else float("nan")


@torch.no_grad()
def generate(
    target: Target,
    draft: Draft,
    prompts: Inputs,
    max_new_tokens: int,
    stop_ids: list[int],
    forbidden_ids: list[int] | None = None,
) -> list[Decoded]:
    """Decode left-padded prompts [B, P] together, each as `target.generate` would.

    Up to floating point: where two tokens tie in the target's logits, either may win. On one rank,
    or with all weights gathered. Raises UserError for a target with layers of another kind than
    full and linear attention.
    """
    check_layer_types(target)
    device = prompts.input_ids_BS.device
    decoder = _Decoder(target, draft, prompts, forbidden_ids or [])
    rows = [Decoded() for _ in range(len(prompts.input_ids_BS))]
    stops = set(stop_ids)
    for b, token in enumerate(decoder.last_B.tolist()):
        _commit(rows[b], [token], stops, max_new_tokens)
    active = list(range(len(rows)))
    while True:
        going = [i for i, b in enumerate(active) if not _ended(rows[b], max_new_tokens)]
        if not going:
            return rows
        if len(going) < len(active):
            decoder.select(torch.tensor(going, device=device))
            active = [active[i] for i in going]
        for b, tokens in zip(active, decoder.step(), strict=True):
            rows[b].num_steps += 1
            _commit(rows[b], tokens, stops, max_new_tokens)


def check_layer_types(target: Target) -> None:
    """Raise UserError for a target whose cache cannot be taken back."""
    text = target.model.config.get_text_config(decoder=True)
    kinds = set(text.to_dict().get("layer_types") or ["full_attention"])
    if unknown := kinds - KNOWN_LAYERS:
        raise UserError(
            f"{type(target.model).__name__} has layers of {', '.join(sorted(unknown))}: decoding "
            "with a draft takes back tokens, which is known for full and linear attention alone"
        )


def _commit(row: Decoded, tokens: list[int], stops: set[int], max_new_tokens: int) -> None:
    for token in tokens:
        if _ended(row, max_new_tokens):
            return
        row.response_ids.append(token)
        row.finished = token in stops


def _ended(row: Decoded, max_new_tokens: int) -> bool:
    return row.finished or len(row.response_ids) >= max_new_tokens


class _Decoder:
    """The state of rows that are decoded together."""

    def __init__(
        self, target: Target, draft: Draft, prompts: Inputs, forbidden_ids: list[int]
    ) -> None:
        self.target, self.draft = target, draft
        device = prompts.input_ids_BS.device
        self.forbidden = torch.tensor(forbidden_ids, device=device, dtype=torch.int64)
        text = target.model.config.get_text_config(decoder=True)
        self.cache = _TargetCache(DynamicCache(config=text))
        self.context = ContextCache(len(draft.layers))
        self.seen_BK = prompts.attention_mask_BS.bool()
        """Which positions of the cache hold a token of the row."""
        self.new_seen = self.seen_BK
        self.length_B = self.seen_BK.sum(-1)
        self.new_positions = (self.seen_BK.cumsum(-1) - 1).clamp(min=0)
        # Image tokens of some models share positions, which those find for themselves. What such a
        # model remembers (rope_deltas) is of the last prompts that had images.
        finds_positions = hasattr(target.model.base_model, "rope_deltas") and any(
            name.startswith("pixel_values") for name in prompts.media
        )
        given = {} if finds_positions else {"position_ids": self.new_positions}
        hidden_BPD, self.new_taps = target.read(
            **prompts.model_inputs(), **given, past_key_values=self.cache.cache
        )
        self.delta_B = torch.zeros_like(self.length_B)
        if finds_positions:
            self.delta_B = target.model.base_model.rope_deltas.flatten()
        self.context_seen = self.seen_BK[:, :0]
        self.last_B = self._argmax(hidden_BPD[:, -1])

    def _argmax(self, hidden: Tensor) -> Tensor:
        logits = self.target.logits(hidden)
        return logits.index_fill_(-1, self.forbidden, -torch.inf).argmax(-1)

    def step(self) -> list[list[int]]:
        """Draft, verify, and commit: the tokens that each row gains, at least one."""
        ids_BT = torch.cat([self.last_B[:, None], self._propose()], 1)
        num_rows, size = ids_BT.shape
        positions_BT = self.length_B[:, None] + torch.arange(size, device=ids_BT.device)
        kept = self.cache.before()
        seen_BK = torch.cat([self.seen_BK, self.seen_BK.new_ones(num_rows, size)], 1)
        hidden_BTD, taps_BTM = self.target.read(
            input_ids=ids_BT,
            attention_mask=seen_BK.long(),
            position_ids=positions_BT + self.delta_B[:, None],
            past_key_values=self.cache.cache,
        )
        said_BT = self._argmax(hidden_BTD)
        accepted_B = (ids_BT[:, 1:] == said_BT[:, :-1]).cumprod(-1).sum(-1)
        counts = (accepted_B + 1).tolist()
        self._keep(counts, kept, ids_BT, positions_BT, taps_BTM)
        self.last_B = said_BT.gather(1, accepted_B[:, None])[:, 0]
        tokens = torch.cat([ids_BT[:, 1:], said_BT[:, -1:]], 1)  # the last column is overwritten
        tokens.scatter_(1, accepted_B[:, None], self.last_B[:, None])
        return [row[:count] for row, count in zip(tokens.tolist(), counts, strict=True)]

    def _propose(self) -> Tensor:
        """[B, T - 1] tokens after the last one of each row."""
        draft, size = self.draft, self.draft.block_size
        block_BT = torch.full(
            (len(self.last_B), size), draft.mask_token_id, device=self.last_B.device
        )
        block_BT[:, 0] = self.last_B
        context_BK = torch.cat([self.context_seen, self.new_seen], 1)
        own_BT = context_BK.new_ones(len(block_BT), size)
        seen_B11K = torch.cat([context_BK, own_BT], 1)[:, None, None]
        hidden_BTD = draft(
            self.new_taps,
            self.target.embed(block_BT),
            self.new_positions,
            self.length_B[:, None] + torch.arange(size, device=block_BT.device),
            DenseAttention(seen_B11K),
            self.context,
        )
        self.context_seen = context_BK
        return self._argmax(hidden_BTD[:, 1:])

    def _keep(
        self,
        counts: list[int],
        kept: _Before,
        ids_BT: Tensor,
        positions_BT: Tensor,
        taps_BTM: Tensor,
    ) -> None:
        """Take back what was not accepted: of each row all but its first `counts` tokens."""
        most = max(counts)
        device = ids_BT.device
        count_B = torch.tensor(counts, device=device)
        if kept.states:
            for count in sorted({c for c in counts if c < ids_BT.shape[1]}):
                rows = torch.tensor([b for b, c in enumerate(counts) if c == count], device=device)
                again = self.cache.select_before(kept, rows)
                seen = torch.cat([self.seen_BK[rows], self.seen_BK.new_ones(len(rows), count)], 1)
                positions = positions_BT[rows, :count] + self.delta_B[rows, None]
                self.target.read(
                    input_ids=ids_BT[rows, :count],
                    attention_mask=seen.long(),
                    position_ids=positions,
                    past_key_values=again.cache,
                )
                self.cache.put_states(rows, again)
        self.cache.cut(kept.length + most)
        self.new_seen = torch.arange(most, device=device) < count_B[:, None]
        self.new_taps, self.new_positions = taps_BTM[:, :most], positions_BT[:, :most]
        self.seen_BK = torch.cat([self.seen_BK, self.new_seen], 1)
        self.length_B = self.length_B + count_B

    def select(self, rows: Tensor) -> None:
        """Go on with some of the rows."""
        self.cache.cache.reorder_cache(rows)
        self.context.layers = [
            None if held is None else (held[0][rows], held[1][rows]) for held in self.context.layers
        ]
        for name in (
            *("seen_BK", "new_seen", "context_seen", "length_B", "delta_B"),
            *("new_positions", "new_taps", "last_B"),
        ):
            setattr(self, name, getattr(self, name)[rows])


@dataclass
class _Before:
    """What a forward changes in a cache and cannot be cut off."""

    length: int
    states: dict[int, tuple[Tensor, Tensor]]
    """Layer -> (convolution, recurrent) of linear attention."""


class _TargetCache:
    """A DynamicCache whose last tokens can be taken back."""

    def __init__(self, cache: DynamicCache) -> None:
        self.cache: Any = cache  # the attributes of its layers depend on their kind

    @property
    def _linear(self) -> list[int]:
        return [i for i, layer in enumerate(self.cache.layers) if hasattr(layer, "conv_states")]

    def before(self) -> _Before:
        """Note the state, by value."""
        states = {}
        for i in self._linear:
            layer = self.cache.layers[i]
            states[i] = layer.conv_states[0].clone(), layer.recurrent_states[0].clone()
        return _Before(self._length(), states)

    def _length(self) -> int:
        return max(
            layer.keys.shape[-2]
            for i, layer in enumerate(self.cache.layers)
            if i not in self._linear
        )

    def cut(self, length: int) -> None:
        """Keep the first `length` keys and values."""
        for i, layer in enumerate(self.cache.layers):
            if i not in self._linear:
                layer.keys, layer.values = (
                    layer.keys[..., :length, :],
                    layer.values[..., :length, :],
                )

    def select_before(self, before: _Before, rows: Tensor) -> _TargetCache:
        """A copy of some rows as they were."""
        other = copy.copy(self.cache)
        other.layers = [copy.copy(layer) for layer in self.cache.layers]
        for i, layer in enumerate(other.layers):
            if i in before.states:
                conv, recurrent = before.states[i]
                layer.conv_states = {0: conv[rows]}
                layer.recurrent_states = {0: recurrent[rows]}
            else:
                layer.keys = layer.keys[rows, :, : before.length]
                layer.values = layer.values[rows, :, : before.length]
        return _TargetCache(other)

    def put_states(self, rows: Tensor, other: _TargetCache) -> None:
        """Take the linear-attention states of these rows from another cache."""
        for i in self._linear:
            mine, theirs = self.cache.layers[i], other.cache.layers[i]
            mine.conv_states[0][rows] = theirs.conv_states[0]
            mine.recurrent_states[0][rows] = theirs.recurrent_states[0]
