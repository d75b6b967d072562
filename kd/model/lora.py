"""Low-rank adapters (LoRA, Hu et al., arXiv:2106.09685): W + alpha / rank * B A, with W frozen.

Legend: W [out, in] is the weight of a linear layer, A [rank, in], B [out, rank].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kd.model.parts import find_part
from kd.types import UserError

if TYPE_CHECKING:
    from peft import LoraConfig

EXPORTS = ("merged", "adapters")


@dataclass
class LoRAConfig:
    """Which weights are trained: all of them, or adapters beside some linear layers."""

    rank: int = 0
    """0: no adapters, all weights are trained."""
    alpha: float = 16.0
    """B A is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Of an adapter's input while training. A resumed run draws what it would have drawn, but other
    micro-batches or ranks draw otherwise: only without it is their result the same."""
    parts: list[str] = field(default_factory=lambda: ["layers"])
    """Every linear layer in them has an adapter; named as in `student.freeze`. Experts have none
    where the weights of all lie in one tensor."""
    export: str = "merged"
    """merged: a whole model, as without adapters; adapters: a folder for peft, beside the base."""

    def validate(self, key: str) -> None:
        """Refuse values out of range, and adapters without peft."""
        if self.rank < 0:
            raise UserError(f"{key}.rank={self.rank}: at least 1, or 0 to train all weights")
        if not 0 < self.alpha < float("inf"):
            raise UserError(f"{key}.alpha={self.alpha}: must be above 0, and finite")
        if not 0 <= self.dropout < 1:
            raise UserError(f"{key}.dropout={self.dropout}: must be in [0, 1)")
        if not self.parts:
            raise UserError(f"{key}.parts=[]: name what has adapters, such as layers")
        if self.export not in EXPORTS:
            raise UserError(f"{key}.export={self.export}: use {' or '.join(EXPORTS)}")
        if self.export == "adapters" and self.rank == 0:
            raise UserError(f"{key}.export=adapters: there are none with {key}.rank=0")
        if self.rank > 0:
            _check_peft(f"{key}.rank={self.rank}")

    def inject(self, model: PreTrainedModel, seed: int) -> Adapters:
        """Freeze `model` and put float32 adapters into it, which change nothing yet (B is 0).

        `seed` settles A. Raises UserError where a part has no linear layer, or holds the head.
        """
        if self.rank == 0:
            return Adapters()
        from peft import inject_adapter_in_model

        adapters = Adapters(tuple(_linear_layers(model, self.parts)), self.alpha / self.rank)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            inject_adapter_in_model(self.settings(adapters), model)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        # For some mixtures of experts peft reads other names than are asked for.
        assert trained == {name for layer in adapters.layers for name in _names(layer)}, trained
        for name in trained:
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.to(model.device, torch.float32)
        return adapters

    def settings(self, adapters: Adapters) -> LoraConfig:
        """The same for peft."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # a float, too
            lora_dropout=self.dropout,
            target_modules=list(adapters.layers),
        )


@dataclass(frozen=True)
class Adapters:
    """The adapters of a model; without layers there are none."""

    layers: tuple[str, ...] = ()
    """Names of the linear layers, as in the model without adapters."""
    scale: float = 0.0

    def merge(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state of the model without adapters that computes the same."""
        return {
            name: self.combine([state[source] for source in sources])
            for name, sources in self.sources(state).items()
        }

    def sources(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """For each tensor of the model without adapters, the names of those it is made from.

        Of itself alone; or of W, A and B, in this order.
        """
        adapted = {f"{layer}.base_layer.weight": layer for layer in self.layers}
        ends = {f"{layer}.base_layer.bias": layer for layer in self.layers}
        added = {name for layer in self.layers for name in _names(layer)}
        found: dict[str, tuple[str, ...]] = {}
        for name in names:
            if name in adapted:
                found[f"{adapted[name]}.weight"] = (name, *_names(adapted[name]))
            elif name in ends:
                found[f"{ends[name]}.bias"] = (name,)
            elif name not in added:
                found[name] = (name,)
        return found

    def combine(self, parts: Sequence[Tensor]) -> Tensor:
        """The tensor made from its `sources`: W + scale * B A in float32, whatever W is held in."""
        if len(parts) == 1:
            return parts[0]
        weight, a, b = parts
        return weight.float() + self.scale * (b.float() @ a.float())

    def alone(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A and B of every layer under the names of a peft folder."""
        names = [name for layer in self.layers for name in _names(layer)]
        return {f"base_model.model.{name.replace('.default.', '.')}": state[name] for name in names}


def _check_peft(asked: str) -> None:
    try:
        distribution("peft")  # an import would take a folder named peft for the package
    except PackageNotFoundError:
        raise UserError(f'{asked} needs the package peft: pip install "kd-vlm[lora]"') from None


def _names(layer: str) -> tuple[str, str]:
    """Of A and B in a model that peft has put adapters into."""
    return f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"


def _linear_layers(model: PreTrainedModel, parts: list[str]) -> list[str]:
    """Names of the linear layers inside the parts, each once."""
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, None] = {}
    for part in parts:
        inside = [
            m for whole in find_part(model, part, "student.lora.parts") for m in whole.modules()
        ]
        if model.get_output_embeddings() in inside:
            raise UserError(
                f"student.lora.parts: {part} holds the head, whose weight the loss reads as it is: "
                "it cannot have an adapter"
            )
        # Subclasses do more than multiply: routers of experts, projections read past their call.
        linear = [names[module] for module in inside if type(module) is nn.Linear]
        if not linear:
            raise UserError(f"student.lora.parts: {part} has no linear layer to put an adapter on")
        found |= dict.fromkeys(linear)
    return list(found)
