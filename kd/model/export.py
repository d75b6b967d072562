"""The trained model as a folder that others load: whole, or its adapters alone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import ProcessorMixin

from kd.model.spec import PretrainedStudent, TrainedModel
from kd.model.vlm import VLM
from kd.parallel import World


def gather(vlm: VLM) -> dict[str, Tensor]:
    """The whole weights in rank 0's memory, adapters merged; nothing on the others. Collective."""
    state = _state(vlm, StateDictOptions(full_state_dict=True, cpu_offload=True))
    return vlm.adapters.merge(state) if state else {}


def export(
    folder: Path, vlm: VLM, processor: ProcessorMixin, spec: TrainedModel, world: World
) -> None:
    """Write the model that `spec` has built, and its processor, atomically. Collective.

    A Hugging Face folder, or with `spec.lora.export=adapters` one of peft.
    """
    partial = folder.with_name(f".partial_{folder.name}")
    if spec.lora.export == "adapters":
        assert isinstance(spec, PretrainedStudent)  # validated
        _write_adapters(partial, vlm, spec, world)
    else:
        _write_model(partial, vlm, getattr(torch, spec.export_dtype), world)
    if world.is_main:
        processor.save_pretrained(partial)
        old = folder.with_name(f".old_{folder.name}")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.rename(folder, old)
        os.rename(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    world.barrier()


def _write_model(folder: Path, vlm: VLM, dtype: torch.dtype, world: World) -> None:
    state = gather(vlm)
    if not world.is_main:
        return
    shutil.rmtree(folder, ignore_errors=True)
    model = vlm.model
    # A tied head is the embedding: it is stored once.
    once = {name for name, _ in model.named_parameters()}
    again = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    weights = {name: _cast(value, dtype) for name, value in state.items() if name not in again}
    model.save_pretrained(folder, state_dict=weights)
    model.config.dtype = dtype  # save_pretrained has written that of the trained weights
    model.config.save_pretrained(folder)
    _readable(folder / "config.json")


def _write_adapters(folder: Path, vlm: VLM, spec: PretrainedStudent, world: World) -> None:
    trained = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = _state(vlm, trained)
    if not world.is_main:
        return
    shutil.rmtree(folder, ignore_errors=True)
    settings = spec.lora.settings(vlm.adapters)
    settings.inference_mode = True
    settings.target_modules = list(vlm.adapters.layers)  # in order: peft makes a set of them
    settings.base_model_name_or_path, settings.revision = spec.name, spec.revision
    base = type(vlm.model)
    settings.save_pretrained(
        str(folder),
        auto_mapping_dict={"base_model_class": base.__name__, "parent_library": base.__module__},
    )
    dtype = getattr(torch, spec.export_dtype)
    weights = {name: _cast(value, dtype) for name, value in vlm.adapters.alone(state).items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _readable(folder / "adapter_config.json")


def _state(vlm: VLM, options: StateDictOptions) -> dict[str, Tensor]:
    """Under the names that the model itself has for them."""
    prefix = "model."  # the attribute of the VLM that holds the model
    state = get_model_state_dict(vlm, options=options)
    return {name.removeprefix(prefix): cast(Tensor, value) for name, value in state.items()}


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _readable(like: Path) -> None:
    """Weights are written for their owner alone: give them the rights of the file beside them."""
    for weights in like.parent.glob("*.safetensors"):
        shutil.copymode(like, weights)
