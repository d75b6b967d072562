"""A teacher whose word is kept on disk: it is loaded where something is missing, or never.

Shape legend: N response tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from kd.align import AlignedTargets
from kd.parallel import World
from kd.teacher.assemble import assemble
from kd.teacher.base import BaseTeacher
from kd.teacher.cache import Cache, ids_of, told
from kd.teacher.fidelity import divergence
from kd.teacher.manifest import Manifest, read_manifest, write_head
from kd.teacher.payload import Hidden, Payload, top_k
from kd.teacher.sparse import SparseTargets
from kd.types import Batch, DenseTargets, TeacherTargets, UserError

T = TypeVar("T")
Rows = list[np.ndarray | None]


@dataclass(frozen=True)
class Wanted:
    """What a cache is to hold."""

    folder: Path
    settings: dict[str, Any]
    """Of the codec, without what depends on the teacher."""
    teacher: dict[str, str]
    """What is known of it without loading it."""
    student_vocab: int
    """Entries of the vocabulary that are compared, at most."""
    eos_token_id: int
    tail: bool

    @property
    def is_dense(self) -> bool:
        """Whether it holds hidden states."""
        return self.settings["name"] == "hidden"

    def codec(self, vocab_size: int) -> dict[str, Any]:
        """The codec's settings for a teacher with so many entries."""
        if self.is_dense:
            return self.settings
        return {**self.settings, "vocab": min(self.student_vocab, vocab_size)}

    def describe(self, source: BaseTeacher, targets: TeacherTargets) -> Manifest:
        """The manifest of a cache of `source`, which has given `targets`; its head is written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        teacher = {**self.teacher, **source.identity}
        stop_ids = source.stop_ids(self.eos_token_id)
        if isinstance(targets, SparseTargets):
            return Manifest(self.codec(targets.vocab), teacher, stop_ids, targets.vocab, None)
        dense = _dense(targets)
        vocab_size, hidden_size = dense.weight_VD.shape
        if not self.is_dense:
            return Manifest(self.codec(vocab_size), teacher, stop_ids, vocab_size, None)
        codec = {**self.codec(vocab_size), "hidden_size": hidden_size}
        head = write_head(self.folder, dense.weight_VD, dense.bias_V)
        return Manifest(codec, teacher, stop_ids, vocab_size, head)


class CachedTeacher(BaseTeacher):
    """Looks up what is expected, and has the source work on what is missing.

    What is trained on is always what the codec has kept, just now or long ago: a run is the same
    whatever was there before it.
    """

    def __init__(
        self,
        wanted: Wanted,
        build_source: Callable[[], BaseTeacher],
        require_full: bool,
        world: World,
    ) -> None:
        self.wanted, self.world = wanted, world
        self.build_source, self.require_full = build_source, require_full
        self._source: BaseTeacher | None = None
        self._expected: dict[int, tuple[Batch, Rows]] = {}
        """By the identity of `responses`, which device copies share; the batch keeps it alive."""
        self._num_asked = self._num_found = self._num_added = 0
        self._has_failed = False
        self.cache: Cache | None = None
        manifest = on_main(world, lambda: read_manifest(wanted.folder))
        if manifest is not None:
            self._open(manifest)

    def _open(self, manifest: Manifest) -> Cache:
        """Collective."""
        wanted = self.wanted

        def work() -> Cache:
            manifest.refuse_other(wanted.folder, wanted.codec(manifest.vocab_size), wanted.teacher)
            return Cache(wanted.folder, manifest, self.world.device)

        self.cache = agreed(self.world, work)
        return self.cache

    # ---- what is there -------------------------------------------------------------------------

    def expect(self, batches: list[Batch]) -> None:
        """See `fill`; the rows stay in memory until they are asked for."""
        new = [batch for batch in batches if id(batch.responses) not in self._expected]
        if new:
            for batch, rows in zip(new, self.fill(new), strict=True):
                self._expected[id(batch.responses)] = batch, rows

    def targets(self, batch: Batch) -> TeacherTargets:
        """See `Teacher`."""
        self.expect([batch])
        _, rows = self._expected.pop(id(batch.responses))
        assert self.cache is not None
        codec = self.cache.manifest.codec
        return assemble(
            [self.cache.payload(told(batch), rows)] if rows else [],
            batch,
            head=self.cache.head,
            matched=self.matched,
            vocab=codec.get("vocab", 0),
            temperature=codec.get("temperature", 1.0),
            tail=self.wanted.tail,
        )

    def fill(self, batches: list[Batch]) -> list[Rows]:
        """The rows of each batch as they are kept, after the source was asked for missing ones.

        Collective: all ranks have the source work on the batches that lack a row on any of them.
        """
        problem, found = None, [[] for _ in batches]
        try:
            found = [self._look_up(batch) for batch in batches]
        except (UserError, OSError) as error:
            problem = str(error)
        missing = [sum(row is None for row in rows) for rows in found]
        problems, *missing_anywhere = self.world.sum_ints(problem is not None, *missing)
        if problems:
            self.world.agree(problem)
        self._num_asked += sum(len(rows) for rows in found)
        self._num_found += sum(row is not None for rows in found for row in rows)
        lacking = [batch for batch, n in zip(batches, missing_anywhere, strict=True) if n]
        if not lacking:
            return found
        if self.require_full:
            self._refuse(lacking)
        self._ask(lacking)
        return [self._look_up(batch) for batch in batches]

    def _look_up(self, batch: Batch) -> Rows:
        responses = told(batch)
        return [None] * len(responses) if self.cache is None else self.cache.rows(responses)

    # ---- what is missing -----------------------------------------------------------------------

    def _refuse(self, batches: list[Batch]) -> None:
        """Collective."""
        ids = [
            response.sample.id
            for batch in batches
            for response, row in zip(told(batch), self._look_up(batch), strict=True)
            if row is None
        ]
        self.world.agree(
            f"{self.wanted.folder} lacks the response of row {ids[0]}\nFill it by "
            "python -m kd.cache with the same settings, or set teacher.require_full=false"
            if ids
            else None
        )

    def _ask(self, batches: list[Batch]) -> None:
        """Keep the source's word on these batches. Collective."""
        source, problem = self.source(), None
        source.expect(batches)
        for batch in batches:
            targets = None
            try:
                targets = source.targets(batch.to(self.world.device))
            except UserError as error:  # told of below: other ranks are in the next forward
                problem = problem or str(error)
            if self.cache is None:
                self.world.agree(problem)
                self._create(targets)
            try:
                self._keep(batch, targets)
            except UserError as error:
                problem = problem or str(error)
        self.world.agree(problem)

    def source(self) -> BaseTeacher:
        """The teacher itself, loaded now if it is not yet. Collective."""
        if self._source is None:
            self._source = self.build_source()
            if self.cache is not None:
                self._refuse_other_source(self.cache.manifest)
        self._source.matched = self.matched
        return self._source

    def _create(self, targets: TeacherTargets | None) -> None:
        """The cache, of the teacher that these are of. Collective."""
        assert targets is not None
        wanted, source = self.wanted, self.source()
        manifest = on_main(
            self.world, lambda: wanted.describe(source, targets).write(wanted.folder)
        )
        self._refuse_other_source(manifest)  # it may be another run's, which came first
        self._open(manifest)

    def _refuse_other_source(self, manifest: Manifest) -> None:
        """Collective."""
        source, folder = self._source, self.wanted.folder
        assert source is not None
        agreed(self.world, lambda: manifest.refuse_other(folder, {}, source.identity))

    def _keep(self, batch: Batch, targets: TeacherTargets | None) -> None:
        responses = told(batch)
        if targets is None or not responses:
            return
        assert self.cache is not None
        before = len(self.cache.store)
        self.cache.keep(responses, self._payload(targets, ids_of(responses)))
        self._num_added += len(self.cache.store) - before
        if self.cache.store.is_due:
            self._publish()

    def _payload(self, targets: TeacherTargets, response_ids_N: Tensor) -> Payload:
        """What there is to keep of it."""
        assert self.cache is not None
        codec = self.cache.manifest.codec
        if isinstance(targets, SparseTargets):
            served = targets.top.ids_NK.shape[1], targets.temperature, targets.vocab
            if served != (codec["k"], codec["temperature"], codec["vocab"]):
                raise UserError(
                    "the source serves top-{} log-probs of temperature {:g} over {} tokens, which "
                    "is not what the cache keeps: {}".format(*served, codec)
                )
            return targets.top
        dense = _dense(targets)
        if self.wanted.is_dense:
            return Hidden(dense.hidden_ND)
        ids_N = response_ids_N.to(dense.hidden_ND.device)
        return top_k(dense, ids_N, codec["k"], codec["temperature"], codec["vocab"])

    def _publish(self) -> None:
        assert self.cache is not None
        try:
            self.cache.publish()
        except UserError:
            self._has_failed = True
            raise

    # ---- the rest ------------------------------------------------------------------------------

    @torch.no_grad()
    def compare(self, batch: Batch) -> Tensor:
        """KL(what the source says now || what is kept) of each token [N], on the CPU.

        What is not kept is encoded and decoded for it. Collective; there must be a cache.
        """
        source, responses = self.source(), told(batch)
        source.expect([batch])
        targets = source.targets(batch.to(self.world.device))
        assert self.cache is not None
        if not responses:
            return torch.empty(0)
        exact = self._payload(targets, ids_of(responses))
        encoded = self.cache.encode(responses, exact)
        kept = self.cache.rows(responses)
        rows = [new if old is None else old for old, new in zip(kept, encoded, strict=True)]
        decoded = self.cache.payload(responses, rows)
        return divergence(exact, decoded, ids_of(responses), self.cache.head)

    def stop_ids(self, eos_token_id: int) -> list[int]:
        """See `Teacher`. Collective where there is no cache yet."""
        if self.cache is None:
            return self.source().stop_ids(eos_token_id)
        return [eos_token_id, *(t for t in self.cache.manifest.stop_ids if t != eos_token_id)]

    def metrics(self) -> dict[str, float]:
        """The share of responses found since the last call, and the rows there are by now.

        Rows are those of when it was opened and those added here; other runs' are not counted.
        """
        before = self.cache.rows_before if self.cache and self.world.is_main else 0
        counts = self._num_asked, self._num_found, before + self._num_added
        num_asked, num_found, num_rows = self.world.sum_ints(*counts)
        self._num_asked = self._num_found = 0
        hit_rate = num_found / num_asked if num_asked else 1.0
        return {"cache/hit_rate": hit_rate, "cache/rows": num_rows}

    def close(self) -> None:
        """Publish what is not yet. Raises UserError where the disk refuses."""
        try:
            if self.cache is not None and not self._has_failed:
                self._publish()
        finally:
            if self._source is not None:
                self._source.close()


def _dense(targets: TeacherTargets) -> DenseTargets:
    if isinstance(targets, AlignedTargets):
        return DenseTargets(targets.hidden_MD, targets.weight_VD, targets.bias_V)
    assert isinstance(targets, DenseTargets)
    return targets


def agreed(world: World, work: Callable[[], T]) -> T:
    """What this rank makes of it; what is wrong on any rank ends all of them. Collective."""
    result: Any = None
    problem = None
    try:
        result = work()
    except (UserError, OSError) as error:
        problem = str(error)
    world.agree(problem)
    return result


def on_main(world: World, work: Callable[[], T]) -> T:
    """What rank 0 makes of it, on all ranks; what is wrong there ends all of them. Collective."""
    result = agreed(world, work if world.is_main else lambda: cast(T, None))
    return world.broadcast(result)
