"""What a vision tower that is trained keeps for the backward, counted from its modules.

A row is taken to hold one image of the most pixels that the processor's settings allow, and never
more patches than its tokens stand for.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from kd.activations import kept_per_token
from kd.model import ProcessorConfig
from kd.model.parts import parts
from kd.parallel import blocks


class Tower:
    """Of a model without adapters; what of it is trained is looked at later."""

    def __init__(self, model: PreTrainedModel, itemsize: int) -> None:
        self.itemsize, self.width = itemsize, model.config.vision_config.hidden_size
        self.layers = blocks(model.get_encoder(modality="image"))
        self.kept = [kept_per_token(layer, 1, itemsize) for layer in self.layers]
        inside = {id(p) for layer in self.layers for p in layer.parameters()}
        tower = [model.get_submodule(name) for name in parts(model)["vision_tower"]]
        self.before = [p for part in tower for p in part.parameters() if id(p) not in inside]

    def kept_per_patch(self, *, checkpointing: bool) -> int:
        """Bytes from the first block on that has anything to train; 0: none has."""
        trained = [any(p.requires_grad for p in layer.parameters()) for layer in self.layers]
        if any(p.requires_grad for p in self.before):  # of patches and positions
            trained[0] = True
        if not any(trained):
            return 0
        kept = self.kept[trained.index(True) :]
        if checkpointing:
            return len(kept) * self.width * self.itemsize + max(kept)
        return sum(kept)


def patches_of_row(model: PreTrainedModel, processor: ProcessorConfig, tokens: int) -> int:
    """The most of a row of `tokens` tokens."""
    vision = model.config.vision_config.to_dict()
    merged = vision.get("spatial_merge_size", 1)
    in_tokens, size = tokens * merged * merged, vision.get("image_size")
    # Fixed by the weights: of an image, or of each of its tiles.
    pixels = processor.max_pixels if size is None else _area(size)
    return in_tokens if pixels is None else min(in_tokens, pixels // _area(vision["patch_size"]))


def _area(side: int | list[int] | tuple[int, int]) -> int:
    return side * side if isinstance(side, int) else side[0] * side[1]
