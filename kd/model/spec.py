"""Which model, where its weights come from, and how its processor sees an image."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen3VLProcessor,
)
from transformers.initialization import no_init_weights

from kd.model.lora import LoRAConfig
from kd.model.processor import ProcessorConfig
from kd.model.tiny import SPECIAL_TOKENS, build_processor
from kd.types import UserError


@dataclass
class ModelConfig:
    """Fields shared by every way to come by a vision-language model."""

    architecture: dict[str, Any] = field(default_factory=dict)
    """The model's `config.json` as far as it differs from the family's defaults. It is the model
    itself for `scratch`; for pretrained ones it serves dry runs, which need no network."""
    processor: ProcessorConfig = field(default_factory=ProcessorConfig)
    dtype: str = "float32"
    """In which the weights are held; trained ones are float32 always, adapters too."""
    attn_implementation: str = "sdpa"
    trust_remote_code: bool = False
    """Run code that comes with the model or its processor."""

    def validate(self, key: str) -> None:
        """Refuse values out of range; `key` is where this config stands."""
        _check_dtype(f"{key}.dtype", self.dtype)
        self.processor.validate(key)

    def dry_config(self) -> PreTrainedConfig:
        """The architecture without weights or network."""
        if "model_type" not in self.architecture:
            raise UserError(
                "no architecture to build without weights: give `architecture` with a `model_type`"
            )
        values = dict(self.architecture)
        try:
            return AutoConfig.for_model(values.pop("model_type"), **values)
        except Exception as error:  # transformers raises many kinds for a wrong value
            raise UserError(f"architecture: {_first_line(error)}") from error

    def build_processor(self, corpus: Callable[[], list[str]]) -> ProcessorMixin:
        """The model's processor; `corpus` trains the tokenizer of a model made from scratch."""
        raise NotImplementedError

    def build(self, processor: ProcessorMixin, *, with_weights: bool) -> PreTrainedModel:
        """The model on the CPU. `with_weights=False` gives uninitialised memory of its shapes."""
        raise NotImplementedError

    def meta_model(self) -> PreTrainedModel:
        """The model on the meta device, for counting."""
        with torch.device("meta"):
            return _from_config(self.dry_config(), self)


@dataclass
class PretrainedModel(ModelConfig):
    """Weights from a folder or the hub."""

    name: str = "???"
    revision: str | None = None

    def build_processor(self, corpus: Callable[[], list[str]]) -> ProcessorMixin:
        """The processor that belongs to the model, or the one named by `processor.name`."""
        name = self.processor.name or self.name
        revision = self.processor.revision if self.processor.name else self.revision
        holds = "model" if self.processor.name is None else "processor with an image part"
        with _plain_errors(name, revision, holds):
            if self.processor.name is None:
                self._config()
            processor = AutoProcessor.from_pretrained(
                name, revision=revision, trust_remote_code=self.trust_remote_code
            )
        if not isinstance(processor, ProcessorMixin) or not hasattr(processor, "image_processor"):
            raise UserError(
                f"{name}: its processor ({type(processor).__name__}) has no image part; "
                "kd distils models that read images"
            )
        return self.processor.apply(processor, name)

    def build(self, processor: ProcessorMixin, *, with_weights: bool) -> PreTrainedModel:
        """`AutoModelForImageTextToText.from_pretrained`."""
        with _plain_errors(self.name, self.revision):
            config = self._config()
            if not with_weights:
                return _uninitialised(config, self)
            return AutoModelForImageTextToText.from_pretrained(
                self.name,
                revision=self.revision,
                dtype=self.dtype,
                attn_implementation=self.attn_implementation,
                trust_remote_code=self.trust_remote_code,
            )

    def dry_config(self) -> PreTrainedConfig:
        """The config of a local folder, else `architecture`."""
        if not Path(self.name).is_dir():
            return super().dry_config()
        with _plain_errors(self.name, self.revision):
            return self._config()

    def _config(self) -> PreTrainedConfig:
        if (Path(self.name) / "adapter_config.json").exists():
            raise UserError(
                f"{self.name} holds adapters, and no model: give the export of a run with "
                "student.lora.export=merged"
            )
        config = AutoConfig.from_pretrained(
            self.name, revision=self.revision, trust_remote_code=self.trust_remote_code
        )
        if not self.trust_remote_code:  # whose class may stand in no mapping
            _check_images(self.name, config)
        return config


@dataclass
class TrainedModel(ModelConfig):
    """Fields of a model that is trained and exported."""

    freeze: list[str] = field(default_factory=list)
    """Parts that are not trained: vision_tower, projector, embeddings (with a head tied to them),
    layers, layers.0-7, or a module's own name."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    export_dtype: str = "bfloat16"
    """In which the exported weights are written."""

    def validate(self, key: str) -> None:
        """Also check the export's, and what is trained."""
        super().validate(key)
        _check_dtype(f"{key}.export_dtype", self.export_dtype)
        self.lora.validate(f"{key}.lora")
        if self.lora.rank > 0 and self.freeze:
            raise UserError(
                f"{key}.lora.rank={self.lora.rank} trains adapters alone: set {key}.freeze=[], and "
                f"say by {key}.lora.parts what has some"
            )
        if self.dtype != "float32" and self.lora.rank == 0:
            raise UserError(
                f"{key}.dtype={self.dtype}: the trained weights are kept in float32 (small updates "
                "vanish otherwise); parallel.compute_dtype sets what it computes in"
            )


@dataclass
class PretrainedStudent(PretrainedModel, TrainedModel):
    """A student that starts from weights of a folder or the hub."""


@dataclass
class ScratchModel(TrainedModel):
    """Random weights of a given architecture, with a tokenizer trained on the data's texts."""

    seed: int = 0
    vocab_size: int = 512
    """Largest vocabulary of the tokenizer; the model's has the size that the texts fill."""
    export_dtype: str = "float32"

    def validate(self, key: str) -> None:
        """Also refuse a vocabulary without room for every byte and the special tokens."""
        super().validate(key)
        smallest = 256 + len(SPECIAL_TOKENS)
        if self.vocab_size < smallest:
            raise UserError(f"{key}.vocab_size={self.vocab_size}: at least {smallest} are needed")
        if self.lora.export == "adapters":
            raise UserError(
                f"{key}.lora.export=adapters: a model made from scratch is in no folder that they "
                "could be loaded onto: use merged"
            )

    def build_processor(self, corpus: Callable[[], list[str]]) -> ProcessorMixin:
        """A tokenizer trained on `corpus`, or the processor named by `processor.name`."""
        if self.processor.name is not None:
            named = PretrainedModel(name=self.processor.name, processor=self.processor)
            return named.build_processor(corpus)
        made = build_processor(corpus(), self.vocab_size)
        return self.processor.apply(made, "the model made from scratch")

    def build(self, processor: ProcessorMixin, *, with_weights: bool) -> PreTrainedModel:
        """The architecture with the vocabulary and special tokens of `processor`."""
        if not isinstance(processor, Qwen3VLProcessor):
            raise UserError(
                f"no model can be made from scratch for a {type(processor).__name__}, only for "
                "that of Qwen3-VL and Qwen3.5: save a random model of another family and its "
                "processor to a folder, and give that as a pretrained one"
            )
        config = self.dry_config()
        tokenizer = processor.tokenizer
        text = config.get_text_config()
        text.vocab_size = len(tokenizer)
        text.eos_token_id = tokenizer.eos_token_id
        text.pad_token_id = tokenizer.pad_token_id
        config.image_token_id = processor.image_token_id
        config.video_token_id = processor.video_token_id
        config.vision_start_token_id = processor.vision_start_token_id
        config.vision_end_token_id = processor.vision_end_token_id
        if not with_weights:
            return _uninitialised(config, self)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return _from_config(config, self)


def _from_config(config: PreTrainedConfig, spec: ModelConfig) -> PreTrainedModel:
    try:
        return AutoModelForImageTextToText.from_config(
            config,
            dtype=spec.dtype,
            attn_implementation=spec.attn_implementation,
            trust_remote_code=spec.trust_remote_code,
        )
    except ValueError as error:
        raise UserError(
            f"cannot build a {config.model_type} model: {_first_line(error)}"
        ) from error


def _uninitialised(config: PreTrainedConfig, spec: ModelConfig) -> PreTrainedModel:
    with no_init_weights():
        model = _from_config(config, spec)
    model.tie_weights()  # part of the initialisation that was left out
    return model


def _check_dtype(key: str, dtype: str) -> None:
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"{key}={dtype}: use float32, bfloat16 or float16")


def _check_images(name: str, config: PreTrainedConfig) -> None:
    # Some families list their text-only sibling in the mapping too.
    known = type(config) in AutoModelForImageTextToText._model_mapping
    if not known or not hasattr(config, "vision_config"):
        raise UserError(
            f"{name} ({config.model_type}) has no image part: kd needs a model that "
            "AutoModelForImageTextToText loads and that reads images"
        )
    text = config.get_text_config()
    values = {**text.to_dict(), **config.to_dict()}
    if config.is_encoder_decoder or text.is_encoder_decoder:
        problem = "is an encoder-decoder"
    elif any(values.get(key) for key in ("cross_attention_layers", "cross_layer_interval")):
        problem = "sees its images by cross-attention"
    elif all(values.get(key) is None for key in ("image_token_id", "image_token_index")):
        problem = "has no token that stands for an image"
    else:
        return
    raise UserError(
        f"{name} ({config.model_type}) {problem}: kd needs a decoder that reads the features of an "
        "image in place of tokens, as Qwen-VL, Gemma 3, InternVL, LLaVA or SmolVLM do"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


@contextlib.contextmanager
def _plain_errors(name: str, revision: str | None, holds: str = "model") -> Iterator[None]:
    at = f" at revision {revision}" if revision else ""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as error:
        if Path(name).is_dir():
            hint = f"the folder holds no {holds} that transformers can read"
        elif name.startswith((".", "/", "~")) or name.count("/") > 1:
            hint = "there is no such folder"
        else:
            hint = "no such folder, and the hub could not give it (network, name, access token?)"
        raise UserError(f"cannot load {name}{at}: {hint}\n({_first_line(error)})") from error
