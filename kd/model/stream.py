"""The weights of a model, one tensor after another, as its export has them.

Where `gather` holds the whole model, this holds one group of it: a transformer block, or a single
module outside of the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from kd.model.vlm import VLM
from kd.parallel import World, blocks
from kd.types import UserError

Sources = dict[str, tuple[str, ...]]
"""For each tensor the names of those it is made from: `Adapters.sources`."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, type and shape of a tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightStream:
    """The names and values that `save_pretrained` would write, adapters merged.

    Floating-point tensors are in `dtype`; a tied head comes as a tensor of its own.
    """

    def __init__(self, vlm: VLM, dtype: torch.dtype, world: World) -> None:
        """Raises UserError where the model is not exported block by block."""
        self.vlm, self.dtype, self.world = vlm, dtype, world
        state = self._state()
        self.groups = _groups(vlm, state)
        self.specs = [spec for group in self.groups for spec in self._specs(group, state)]
        whole = self._specs(vlm.adapters.sources(state), state)
        if set(self.specs) != set(whole) or len(self.specs) != len(whole):
            raise UserError(
                f"the weights of a {type(vlm.model).__name__} cannot be converted block by block "
                "to the names and shapes of its checkpoint: set rollout.engine.transfer=disk"
            )

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Pairs in the order of `specs` on rank 0, nothing on the others. Collective."""
        state, specs = self._state(), iter(self.specs)
        for group in self.groups:
            yield from self._tensors(group, state, specs)

    def _tensors(
        self, group: Sources, state: dict[str, Tensor], specs: Iterator[TensorSpec]
    ) -> Iterator[tuple[str, Tensor]]:
        """Of one group; a function of its own, so that nothing holds it while the next is made."""
        values = {name: self._value([state[n] for n in names]) for name, names in group.items()}
        if not self.world.is_main:
            return
        for name, value in self._converted(values).items():
            assert TensorSpec(name, value.dtype, tuple(value.shape)) == next(specs), name
            yield name, value

    def _state(self) -> dict[str, Tensor]:
        """Shards, under the names that the model itself has for them, without what is not saved."""
        prefix = "model."  # the attribute of the VLM that holds the model
        state = {
            name.removeprefix(prefix): value
            for name, value in self.vlm.state_dict().items()
            if name.startswith(prefix)
        }
        ignored = self.vlm.model._keys_to_ignore_on_save or ()
        return {name: value for name, value in state.items() if name not in ignored}

    def _value(self, shards: list[Tensor]) -> Tensor:
        """The whole tensor made from these. Collective; it is the result on rank 0 alone."""
        if len(shards) == 1:
            # Cast before it is gathered: half the traffic, and never a whole tensor in float32.
            return _whole(shards[0].to(self.world.device, self._dtype(shards[0])))
        parts = [_whole(shard.to(self.world.device)) for shard in shards]
        if not self.world.is_main:
            return parts[0]
        return self.vlm.adapters.combine(parts).to(self.dtype)

    def _dtype(self, value: Tensor) -> torch.dtype:
        return self.dtype if value.is_floating_point() else value.dtype

    def _converted(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return revert_weight_conversion(self.vlm.model, values)

    def _specs(self, group: Sources, state: dict[str, Tensor]) -> list[TensorSpec]:
        """What will come of the group: found without memory, on the meta device."""
        first = {name: state[names[0]] for name, names in group.items()}
        values = {
            name: torch.empty(value.shape, dtype=self._dtype(value), device="meta")
            for name, value in first.items()
        }
        found = self._converted(values).items()
        return [TensorSpec(name, value.dtype, tuple(value.shape)) for name, value in found]


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _groups(vlm: VLM, names: Iterable[str]) -> list[Sources]:
    """What is converted together: the tensors of a block, or of a module outside of the blocks."""
    inside = [f"{name}." for name in _block_names(vlm.model)]
    groups: dict[str, Sources] = {}
    for name, sources in vlm.adapters.sources(names).items():
        block = next((prefix for prefix in inside if name.startswith(prefix)), None)
        groups.setdefault(block or name.rpartition(".")[0], {})[name] = sources
    return list(groups.values())


def _block_names(model: PreTrainedModel) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    return [names[block] for block in blocks(model)]
