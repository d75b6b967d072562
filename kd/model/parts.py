"""What a vision-language model is made of, by the same four names in every family."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from kd.parallel.shard import blocks
from kd.types import UserError


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
    inside = [child for name, child in tower.named_children() if "merger" in name]
    seeing = [child for child in tower.children() if child not in inside] if inside else [tower]
    found = {
        "vision_tower": seeing,
        "projector": [*inside, *beside],
        "embeddings": [model.get_input_embeddings()],
        "layers": blocks(decoder),
    }
    return {part: [names[m] for m in modules if _trainable(m)] for part, modules in found.items()}


def _trainable(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
