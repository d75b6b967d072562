"""What a vision-language model is made of, by the same four names in every family."""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel

from kd.parallel.shard import blocks, mergers
from kd.types import UserError

PART_NAMES = ("vision_tower", "projector", "embeddings", "layers")


def parts(model: PreTrainedModel) -> dict[str, list[str]]:
    """Names of the modules (as `model.named_modules` gives them) that make up each part.

    - `vision_tower`: what sees the image;
    - `projector`: what takes its features to the language model, inside the tower (Qwen) or beside;
    - `embeddings`: of the input tokens; where they are tied to the head, the head as well;
    - `layers`: the decoder layers of the language model, in order: `layers[i]` is the i-th.

    The rest are a decoder's final norm, an untied head, and parameters that belong to no module
    of their own. Raises UserError where a model is not built of these.
    """
    tower, decoder = model.get_encoder(modality="image"), model.get_decoder()
    names = {module: name for name, module in model.named_modules()}
    if tower in (model, model.base_model) or decoder in (model, model.base_model):
        raise UserError(
            f"{type(model).__name__} has no vision tower beside a language model: its parts are "
            "not known by the names vision_tower, projector, embeddings and layers"
        )
    children = dict(model.base_model.named_children())
    beside = [child for child in children.values() if child not in (tower, decoder)]
    inside = mergers(tower)
    seeing = [child for child in tower.children() if child not in inside] if inside else [tower]
    found = {
        "vision_tower": seeing,
        "projector": [*inside, *beside],
        "embeddings": [model.get_input_embeddings()],
        "layers": blocks(decoder),
    }
    return {part: [names[m] for m in modules if _trainable(m)] for part, modules in found.items()}


def find_part(model: PreTrainedModel, name: str, key: str) -> list[nn.Module]:
    """The modules under a name: one of `parts`, `layers.3`, `layers.0-7`, or a module's own name.

    Raises UserError, speaking of the config's `key`, where there is no such part.
    """
    layer = re.fullmatch(r"layers\.(\d+)(?:-(\d+))?", name)
    if name in PART_NAMES:
        names = parts(model)[name]
    elif layer:
        layers = parts(model)["layers"]
        first, last = int(layer[1]), int(layer[2] or layer[1])
        if not first <= last < len(layers):
            raise UserError(f"{key}: {name}: the layers are 0 to {len(layers) - 1}")
        names = layers[first : last + 1]
    else:
        names = [name]
    try:
        return [model.get_submodule(found) for found in names]
    except AttributeError as error:
        known = ", ".join(f"{model.base_model_prefix}.{n}" for n, _ in _children(model))
        raise UserError(
            f"{key}: {name} is no part of {type(model).__name__}; "
            f"there is {', '.join(PART_NAMES)}, layers.0-7, {known}"
        ) from error


def _children(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    return list(model.base_model.named_children())


def _trainable(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
