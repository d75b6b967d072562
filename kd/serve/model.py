"""The teacher over all ranks: rank 0 has rows answered, the others take their share of them.

Shape legend: N response tokens, D hidden.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum

import torch

from kd.data import Collator, Renderer
from kd.model import rendering_digest, tokenizer_digest
from kd.parallel import World
from kd.serve.config import ServerConfig
from kd.teacher.payload import Hidden, Payload, split, tensors, top_k
from kd.teacher.weights import weights_digest
from kd.teacher.wire import Info, pack_head
from kd.types import DenseTargets, Rollout


@dataclass(frozen=True)
class TopKOf:
    """What a request for a top-k names."""

    k: int
    temperature: float
    vocab: int


@dataclass
class Row:
    """A response to a rendered prompt, and what is asked of it."""

    rollout: Rollout
    prompt_ids: list[int]
    top: TopKOf | None
    """None: hidden states."""

    @property
    def tokens(self) -> int:
        """Of prompt and response."""
        return len(self.prompt_ids) + len(self.rollout.response_ids)


class Order(Enum):
    """What a rank is told instead of rows."""

    REST = "rest"
    """So that no collective waits longer than its time-out."""
    STOP = "stop"


class ServedModel:
    """A teacher for one thread of rank 0. Collective to make."""

    def __init__(self, config: ServerConfig, world: World) -> None:
        self.config, self.world = config, world
        teacher = config.model
        self.processor = teacher.build_processor(lambda: [])
        self.chat_template_kwargs = teacher.processor.chat_template_kwargs
        renderer = Renderer(self.processor, self.chat_template_kwargs)
        loaded = teacher.build_teacher(self.processor, world, config.parallel, student_vocab=0)
        assert loaded.vlm is not None  # it is not offloaded
        self.vlm = loaded.vlm
        text = self.vlm.model.config.get_text_config().to_dict()
        max_length = config.serve.length_for(text.get("max_position_embeddings"))
        lockstep, positions = world.size > 1, (self.vlm.positions, self.vlm.positions)
        self.collate = Collator(renderer, None, max_length, lockstep, positions=positions)
        dense = self._dense([])  # also what is slow the first time
        self.head = pack_head(dense.weight_VD, dense.bias_V) if world.is_main else b""
        self.info = self._info(renderer, dense, max_length)
        self.media_ids = frozenset(self.vlm.forbidden_ids(self.info.vocab_size))
        """Stand for what only a prompt has: an image's features, or their frame."""

    def _info(self, renderer: Renderer, dense: DenseTargets, max_length: int) -> Info:
        teacher, serve = self.config.model, self.config.serve
        vocab_size, hidden_size = dense.weight_VD.shape
        return Info(
            model=teacher.name,
            revision=teacher.revision,
            weights=weights_digest(teacher),
            dtype=str(dense.hidden_ND.dtype).removeprefix("torch."),
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            max_length=max_length,
            max_top_k=min(serve.max_top_k, vocab_size - 1),
            max_rows=serve.max_rows,
            stop_ids=self.vlm.stop_ids(renderer.eos_token_id),
            tokenizer=tokenizer_digest(self.processor),
            rendering=rendering_digest(self.processor, self.chat_template_kwargs),
        )

    def answer(self, rows: list[Row]) -> list[Payload]:
        """One payload (CPU) per row. For rank 0."""
        shares = _shares(rows, self.world.size)
        own = self.world.scatter([[rows[i] for i in share] for share in shares])
        answers: dict[int, Payload] = {}
        for share, found in zip(shares, self.world.collect(self._work(own)), strict=True):
            for places, payload in found:
                lengths = [len(rows[share[place]].rollout.response_ids) for place in places]
                parts = split(payload, lengths)
                answers |= {share[place]: part for place, part in zip(places, parts, strict=True)}
        return [answers[i] for i in range(len(rows))]

    def follow(self) -> None:
        """Work on shares until rank 0 ends it. For the other ranks."""
        while (share := self.world.scatter(None)) is not Order.STOP:
            if share is not Order.REST:
                self.world.collect(self._work(share))

    def rest(self) -> None:
        """There is nothing to do. For rank 0, several times within `parallel.timeout_s`."""
        self.world.scatter([Order.REST] * self.world.size)

    def stop(self) -> None:
        """End `follow`. For rank 0."""
        self.world.scatter([Order.STOP] * self.world.size)

    def survives(self, error: Exception) -> bool:
        """Whether the model works on after a failure."""
        # The other ranks wait in a collective; and a CUDA context does not outlive a failed kernel.
        return self.world.size == 1 and not isinstance(error, torch.AcceleratorError)

    def _work(self, rows: list[Row]) -> list[tuple[list[int], Payload]]:
        """Payloads of the rows at these places: one for all that ask the same."""
        dense = self._dense(rows)
        hidden = dense.hidden_ND.split([len(row.rollout.response_ids) for row in rows])
        found = []
        for top in dict.fromkeys(row.top for row in rows):
            places = [place for place, row in enumerate(rows) if row.top == top]
            joined = dataclasses.replace(dense, hidden_ND=torch.cat([hidden[i] for i in places]))
            ids = [token for place in places for token in rows[place].rollout.response_ids]
            found.append((places, _to_cpu(_payload(joined, top, ids))))
        return found

    def _dense(self, rows: list[Row]) -> DenseTargets:
        batch = self.collate([row.rollout for row in rows])
        assert len(batch.rollouts) == len(rows), batch.rejected  # they were checked on arrival
        return self.vlm.targets(batch.teacher.to(self.world.device))


def _payload(dense: DenseTargets, top: TopKOf | None, response_ids: list[int]) -> Payload:
    if top is None:
        return Hidden(dense.hidden_ND)
    ids_N = torch.tensor(response_ids, dtype=torch.int64, device=dense.hidden_ND.device)
    return top_k(dense, ids_N, top.k, top.temperature, top.vocab)


def _to_cpu(payload: Payload) -> Payload:
    return type(payload)(**{name: x.cpu() for name, x in tensors(payload).items()})


def _shares(rows: list[Row], size: int) -> list[list[int]]:
    """Which rows each rank takes: alike in length, so that little is padded."""
    order = sorted(range(len(rows)), key=lambda i: -rows[i].tokens)
    per_rank = -(-len(rows) // size)
    return [order[i * per_rank : (i + 1) * per_rank] for i in range(size)]
