"""Training text that is generated, window by window: the generation buffer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.profiler import record_function

from kd.rollout.engine import Engine, Sampling
from kd.rollout.parts import Parts, Stream
from kd.rollout.rejections import Rejections
from kd.rollout.stats import RolloutStats
from kd.rollout.window import Group, Mix, Partition, pack_group, unpack_group
from kd.types import Batch, Rejected, Rollout, Sample, UserError


@dataclass
class Generator:
    """Who responds under a name, and how."""

    engine: Engine
    n: int
    sampling: Sampling
    is_trained: bool
    """Whether its weights change, and are to be synchronised."""


@dataclass
class Window:
    """Groups with their responses, and what these took on this rank."""

    groups: list[Group]
    tokens: int = 0
    seconds: float = 0.0


class GeneratedSource:
    """Reads a window of prompts, has it responded to in one call, and hands out its slices.

    With `ahead`, the next window is generated in a thread while this one is trained on; its weights
    are those from before this window.
    """

    def __init__(
        self,
        parts: Parts,
        partition: Partition,
        mix: Mix,
        generators: dict[str, Generator],
        ahead: bool,
    ) -> None:
        self.parts, self.partition, self.mix = parts, partition, mix
        self.generators = generators
        self.stream: Stream = parts.stream(parts.collate.render, partition.groups_per_slice)
        self.rejections = Rejections(parts.on_broken_row)
        self.stats = RolloutStats(parts.world)
        self.step = 0
        self.num_groups = 0
        """Groups read so far, over all ranks."""
        self.pending: list[Group] = []
        """Of this window, what is not handed out yet (this rank's)."""
        self.next: Future[Window] | None = None
        """The window after it, under way or done."""
        self.ahead = ahead

    def take(self) -> list[Batch]:
        """The micro-batches of the next optimizer step. Collective.

        Raises UserError on every rank at a broken row, unless such rows are dropped, and where
        an engine cannot go on.
        """
        partition = self.partition
        started = time.perf_counter()
        with record_function("kd::rollout"):
            if not self.pending:
                self.pending = self._window()
            if self.ahead and self.next is None:
                groups = self._read()
                self._sync(groups)
                self.next = _in_thread(lambda: self._respond(groups))
        self.stats.waited_s = time.perf_counter() - started
        groups, self.pending = self.pending[: partition.groups], self.pending[partition.groups :]
        self.stats.count([row for group in groups for row in group.rows], self.step)
        self.step += 1
        return self._collate(groups)

    def metrics(self) -> dict[str, float]:
        """`rollout/…` of the rows of the last `take`, `data/…` so far. Collective."""
        counters = self.rejections.counters
        sums = self.parts.world.sum_ints(*counters.values())
        dropped = {f"data/{name}": value for name, value in zip(counters, sums, strict=True)}
        return self.stats.metrics() | dropped | self.stream.metrics()

    def close(self) -> None:
        """End the engines."""
        for generator in self.generators.values():
            generator.engine.close()

    # ---- a window --------------------------------------------------------------------------------

    def _window(self) -> list[Group]:
        """The next window, with its responses."""
        if self.next is None:
            groups = self._read()
            self._sync(groups)
            self.next = Future()
            _settle(self.next, lambda: self._respond(groups))
        window = self._finish_next()
        self.next = None
        self.stats.generated(window.tokens, window.seconds)
        return window.groups

    def _finish_next(self) -> Window:
        """Wait for the window under way; what goes wrong on one rank is told on all."""
        assert self.next is not None
        window, problem = Window([]), None
        try:
            window = self.next.result()
        except UserError as error:
            problem = str(error)
        self.parts.world.agree(problem)
        return window

    def _read(self) -> list[Group]:
        """The prompts of a window, before anyone has responded to them."""
        # The step that the window begins at, which may be ahead of the step that asks for it.
        step = self.num_groups // (self.parts.world.size * self.partition.groups)
        groups, problem = [], None
        try:
            for policy in self.mix.draw(step, self.partition.slices):
                groups += self._read_slice(policy)
        except UserError as error:
            problem = str(error)
        self.parts.world.agree(problem)
        return groups

    def _read_slice(self, policy: str) -> list[Group]:
        size, world = self.partition.groups_per_slice, self.parts.world
        slots, rows = [], []
        # The data set's own answers: as many rows as there would be rollouts, each read once.
        for _ in range(self.partition.num_generations if policy == "dataset" else 1):
            first = self.stream.position + world.rank * size
            slots += range(first, first + size)
            rows += next(self.stream)
        first_number = self.num_groups + world.rank * size
        self.num_groups += world.size * size
        each = len(rows) // size
        return [
            Group(
                first_number + j,
                policy,
                slots[j * each : (j + 1) * each],
                self._usable(rows[j * each : (j + 1) * each], policy),
            )
            for j in range(size)
        ]

    def _usable(self, rows: list[Sample | Rejected], policy: str) -> list[Any]:
        room = None if policy == "dataset" else self.generators[policy].sampling.max_new_tokens
        usable, rejected = self.parts.collate.screen(rows, room)
        self.rejections.note_read(len(usable), rejected, self.stream.num_rows)
        return usable

    def _sync(self, groups: list[Group]) -> None:
        # The draw is the same on every rank, so all of them come here together or not at all.
        for name, generator in self.generators.items():
            if generator.is_trained and any(group.policy == name for group in groups):
                generator.engine.sync(self.step)

    def _respond(self, groups: list[Group]) -> Window:
        """One call of each engine for all prompts of this rank's window."""
        started = time.perf_counter()
        for name, generator in self.generators.items():
            mine = [group for group in groups if group.policy == name]
            asked = [group for group in mine if group.rows]
            if not mine:
                continue
            rollouts = generator.engine.generate(
                [group.rows[0] for group in asked],
                generator.n,
                generator.sampling,
                [self._seed(group) for group in asked],
            )
            for i, group in enumerate(asked):
                own = rollouts[i * generator.n : (i + 1) * generator.n]
                group.rows = [replace(rollout, policy=name) for rollout in own]
        rows = [row for group in groups for row in group.rows if isinstance(row, Rollout)]
        tokens = sum(len(rollout.response_ids) for rollout in rows)
        return Window(groups, tokens, time.perf_counter() - started)

    def _seed(self, group: Group) -> int:
        sequence = np.random.SeedSequence([self.mix.seed, group.slots[0]])
        return int(sequence.generate_state(1)[0]) >> 1

    def _collate(self, groups: list[Group]) -> list[Batch]:
        n = self.partition.num_generations
        # A rejected prompt leaves its places empty: what follows stays in its micro-batch.
        rows = [row for group in groups for row in [*group.rows, *[None] * (n - len(group.rows))]]
        batches = self.parts.batching.divide(rows)
        for batch in batches:
            # A response can be longer in a teacher's tokens than the room that was left for it.
            self.rejections.note(batch.rejected)
        return batches

    # ---- resuming --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything over all ranks, the windows under way included. Collective."""
        counters = self.rejections.counters
        sums = self.parts.world.sum_ints(*counters.values())
        following = None if self.next is None else self._finish_next().groups
        return {
            "position": self.stream.position,
            "step": self.step,
            "num_groups": self.num_groups,
            **dict(zip(counters, sums, strict=True)),
            "pending": self._pack(self.pending),
            "next": None if following is None else self._pack(following),
            "stats": self.stats.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on, also in the middle of a window and on another number of ranks."""
        self.stream.seek(state["position"])
        self.step, self.num_groups = state["step"], state["num_groups"]
        for name in self.rejections.counters:
            self.rejections.counters[name] = state[name] if self.parts.world.is_main else 0
        self.stats.load_state_dict(state["stats"])
        problem = None
        try:
            self.pending = self._unpack(state["pending"])
            if state["next"] is not None:
                self.next = Future()
                self.next.set_result(Window(self._unpack(state["next"])))
        except UserError as error:
            problem = str(error)
        self.parts.world.agree(problem)

    def _pack(self, groups: list[Group]) -> list[dict[str, Any]]:
        ranks = self.parts.world.gather([pack_group(group) for group in groups])
        return sorted((group for rank in ranks for group in rank), key=lambda g: g["number"])

    def _unpack(self, packed: list[dict[str, Any]]) -> list[Group]:
        """The share of this rank in the groups of all ranks, which are in order."""
        world, size = self.parts.world, self.partition.groups_per_slice
        if len(packed) % (world.size * self.partition.groups):
            raise UserError(
                f"The checkpoint is in the middle of a window, with {len(packed)} prompts left: "
                f"not whole steps of {world.size} ranks x {self.partition.groups} prompts. "
                "Resume with the ranks, micro_batch_size and grad_accum it was made with"
            )
        mine = [g for i, g in enumerate(packed) if i // size % world.size == world.rank]
        return [self._reread(group) for group in mine]

    def _reread(self, packed: dict[str, Any]) -> Group:
        # What is rejected now was rejected, and counted, before.
        room = None if packed["policy"] == "dataset" else 0
        usable, rejected = self.parts.collate.screen(self.stream.at(packed["slots"]), room)
        if packed["responses"] and rejected:
            raise UserError(
                f"Row {rejected[0].id} has responses in the checkpoint but cannot be read any "
                f"more: {rejected[0].reason}. Mend it, or start anew under another run.name"
            )
        return unpack_group(packed, usable)


def _settle(future: Future[Window], work: Callable[[], Window]) -> None:
    """Do the work; its error is for whoever asks for the result."""
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


def _in_thread(work: Callable[[], Window]) -> Future[Window]:
    future: Future[Window] = Future()
    # A daemon, unlike those of an executor: a run that ends does not wait for its last window.
    threading.Thread(target=_settle, args=(future, work), name="rollout", daemon=True).start()
    return future
