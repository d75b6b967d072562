"""What the draft reads of its target: from a forward of every step, or kept on disk.

Shape legend: B rows, S sequence, Q block tokens of a row, M numbers of all taps together.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import ProcessorMixin

from kd.config_dflash import DFlashConfig
from kd.dflash import Blocks, Target, TargetStates
from kd.model import rendering_digest, tokenizer_digest
from kd.parallel import DTYPES, World
from kd.teacher.cache import SEGMENTS
from kd.teacher.cached import agreed, on_main
from kd.teacher.manifest import Manifest
from kd.teacher.store import Store
from kd.teacher.weights import weights_digest
from kd.types import Batch, UserError


class LiveStates:
    """The target reads every batch. All of it is collective."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def __call__(self, batch: Batch, blocks: Blocks) -> TargetStates:
        """Of a batch that is on the device."""
        return self.target.states(batch.student, blocks.ids_BQ)

    def publish(self) -> None:
        """Before a checkpoint."""

    def metrics(self) -> dict[str, float]:
        """Since the last call."""
        return {}


class KeptStates(LiveStates):
    """The target reads what has not been read before; any number of runs may share the folder.

    What is kept are the taps as they were computed, in the compute precision: M numbers for every
    token of prompt and response. What the draft reads is always what is kept, just now or long
    ago. Raises UserError for a folder of another target, and for files that are damaged.
    """

    def __init__(
        self, target: Target, folder: Path, manifest: Manifest, dtype: torch.dtype, world: World
    ) -> None:
        super().__init__(target)
        self.folder, self.dtype, self.world = folder, dtype, world
        found = on_main(world, lambda: _write(manifest, folder))
        agreed(world, lambda: found.refuse_other(folder, manifest.codec, manifest.teacher))
        self.store = agreed(world, lambda: Store(folder / SEGMENTS))
        self._num_asked = self._num_found = 0
        self._problem: str | None = None
        """Of this rank's last writing, told to the others at the next batch."""

    def __call__(self, batch: Batch, blocks: Blocks) -> TargetStates:
        """Of a batch that is on the device."""
        keys = [response.key for response in batch.responses]
        rows, problem = [None], self._problem
        try:
            rows = self._look_up(keys)
        except UserError as error:
            problem = problem or str(error)
        lacking = sum(row is None for row in rows)
        self._num_asked += len(keys)
        self._num_found += len(keys) - lacking
        problems, lacking = self.world.sum_ints(problem is not None, lacking)
        if problems:
            self.world.agree(problem)
        if not lacking:
            return self.target.beside(self._padded(rows, batch), blocks.ids_BQ)
        states = super().__call__(batch, blocks)
        for key, row_SM, seen_S in zip(
            keys, states.taps_BSM, batch.student.attention_mask_BS.bool(), strict=False
        ):  # without the rows that keep ranks in step
            self.store.put(key, _bytes(row_SM[seen_S].to(self.dtype)))
        kept = self._padded(self._look_up(keys), batch)
        if self.store.is_due:
            try:
                self._write_rows()
            except UserError as error:  # the others are in the next forward already
                self._problem = str(error)
        return self.target.beside(kept, blocks.ids_BQ)

    def _look_up(self, keys: list[bytes]) -> list[np.ndarray | None]:
        if any(key not in self.store for key in keys):
            self.store.refresh()
        return [self.store.get(key) for key in keys]

    def _padded(self, rows: list[np.ndarray | None], batch: Batch) -> Tensor:
        """[B, S, M]; zeros where a row has no token."""
        seen_BS = batch.student.attention_mask_BS.bool().cpu()
        taps_BSM = torch.zeros(*seen_BS.shape, self.target.taps_width, dtype=self.dtype)
        for b, row in enumerate(rows):
            assert row is not None
            kept = torch.from_numpy(row).view(self.dtype)
            taps_BSM[b, seen_BS[b]] = kept.view(-1, taps_BSM.shape[-1])
        return taps_BSM.to(batch.student.input_ids_BS.device)

    def publish(self) -> None:
        """Put what is kept on the disk: a run that resumes reads the same."""
        agreed(self.world, self._write_rows)

    def _write_rows(self) -> None:
        try:
            self.store.publish()
        except OSError as error:
            raise UserError(
                f"cannot write {self.folder}: {error.strerror}\nWhat it holds is whole: make room, "
                "and start the same command again"
            ) from error

    def metrics(self) -> dict[str, float]:
        """Since the last call."""
        asked, found = self.world.sum_ints(self._num_asked, self._num_found)
        self._num_asked = self._num_found = 0
        return {"target/states_found": found / max(1, asked)}


def build_states(
    config: DFlashConfig, target: Target, processor: ProcessorMixin, world: World
) -> LiveStates:
    """By `target.states_folder`. Collective."""
    folder = config.target.states_folder
    if folder is None:
        return LiveStates(target)
    kwargs = config.target.processor.chat_template_kwargs
    teacher = {
        "name": config.target.name,
        "weights": on_main(world, lambda: weights_digest(config.target)),
        "dtype": config.target.dtype,
        "compute_dtype": config.parallel.compute_dtype,
        "tokenizer": tokenizer_digest(processor),
        "rendering": rendering_digest(processor, kwargs),
    }
    codec = {"name": "taps", "layers": target.layer_ids, "width": target.width}
    manifest = Manifest(codec, teacher, [], target.vocab_size, None)
    dtype = DTYPES[config.parallel.compute_dtype]
    return KeptStates(target, Path(folder), manifest, dtype, world)


def _write(manifest: Manifest, folder: Path) -> Manifest:
    folder.mkdir(parents=True, exist_ok=True)
    return manifest.write(folder)


def _bytes(row: Tensor) -> np.ndarray:
    return row.contiguous().cpu().flatten().view(torch.uint8).numpy()
