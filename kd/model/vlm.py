"""A vision-language model as the recipes use it: hidden states, head and answers.

Every method that reads weights is a *forward method* of FSDP2: called through the module, it
gathers the sharded weights first. Reading `head.weight` anywhere else gives a shard of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.autograd.graph import _MultiHandle
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.profiler import record_function
from torch.utils.hooks import RemovableHandle
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

from kd.model.kernels import Kernels, check_kernels
from kd.model.lora import Adapters, LoRAConfig
from kd.model.packing import row_bounds
from kd.model.parts import find_part
from kd.model.positions import Positions
from kd.objective import KDOutput
from kd.parallel import ParallelConfig, World, blocks, compile_blocks, needs_fsdp, shard
from kd.types import Batch, DenseTargets, Inputs, TeacherTargets, UserError

Objective = Callable[
    [Tensor, Tensor, Tensor | None, Tensor, TeacherTargets | None, int, int | None], KDOutput
]


class VLM(nn.Module):
    """A frozen or trainable `AutoModelForImageTextToText` model."""

    forward_methods = ("generate", "targets")
    role = "model"
    """What messages call it."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        _check_head(model)
        self.model, self.positions = model, Positions(model)
        self.kernels = Kernels.of(model)
        self.adapters = Adapters()
        self.lockstep = False
        self._gathered = False

    def distribute(
        self, world: World, config: ParallelConfig, *, cpu_offload: bool = False
    ) -> None:
        """Move to the device and shard, with rank 0's weights on all ranks."""
        shard(self, self.model, world, config, cpu_offload=cpu_offload)
        self.lockstep = world.size > 1
        for method in self.forward_methods:
            register_fsdp_forward_method(self, method)

    def place(self, world: World, config: ParallelConfig, *, cpu_offload: bool = False) -> None:
        """Move to the device; and `distribute`, unless that would do no more than copy weights.

        Raises UserError where `parallel.compile` makes no sense for this model, here.
        """
        check_kernels(self.kernels, self.role, world, compiled=config.compile)
        if needs_fsdp(self.model, world, config, cpu_offload=cpu_offload):
            self.distribute(world, config, cpu_offload=cpu_offload)
            return
        compile_blocks(blocks(self.model.get_decoder()), config)
        self.to(world.device)

    def _hidden(self, inputs: Inputs) -> Tensor:
        """The last hidden states [N, D] of the target rows; no logits are computed."""
        bounds = {}
        if inputs.lengths:
            if inputs.position_ids is None:  # the forward knows of no rows
                inputs = inputs.placed(self.positions(inputs))
            if self.kernels.bounds_rows:
                bounds = row_bounds(inputs)
        outputs = self.model.base_model(**inputs.model_inputs(), **bounds, use_cache=False)
        return outputs.last_hidden_state.flatten(0, 1)[inputs.target_rows_N]

    @torch.no_grad()
    def targets(self, inputs: Inputs) -> DenseTargets:
        """Hidden states and head. The head stays gathered until the next forward re-uses it."""
        hidden_ND = self._hidden(inputs)
        head = self.model.get_output_embeddings()
        return DenseTargets(hidden_ND, head.weight, head.bias)

    def read(self, inputs: Inputs) -> Tensor:
        """The last hidden states [N, D] of the target rows, without gradients."""
        return self.targets(inputs).hidden_ND

    def stop_ids(self, eos_token_id: int) -> list[int]:
        """What ends a response: the tokenizer's EOS first, then what the model's settings add."""
        own = self.model.generation_config.eos_token_id
        own = [] if own is None else [own] if isinstance(own, int) else own
        return [eos_token_id, *(token for token in own if token != eos_token_id)]

    def forbidden_ids(self, num_tokens: int) -> list[int]:
        """What a response can never hold: tokens that stand for an image's features or frame them,
        and entries of the head beyond the tokenizer's `num_tokens`, which pad it.
        """
        media = ("image", "video", "audio", "vision_start", "vision_end", "boi", "eoi")
        names = (f"{medium}_token_{end}" for medium in media for end in ("id", "index"))
        found = {self.model.config.to_dict().get(name) for name in names}
        vocab = self.model.get_output_embeddings().out_features
        special = {token for token in found if token is not None and token < vocab}
        return sorted(special | set(range(num_tokens, vocab)))

    @torch.no_grad()
    def generate(
        self,
        prompts: Inputs,
        max_new_tokens: int,
        stop_ids: list[int],
        forbidden_ids: list[int],
        draw: LogitsProcessor | None = None,
    ) -> Tensor:
        """Responses [B, up to max_new_tokens] to left-padded prompts; `cut` ends them.

        Greedy, or the token that `draw` leaves the highest score; never one of `forbidden_ids`.
        """
        plain = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=stop_ids,
            pad_token_id=stop_ids[0],
        )
        device = prompts.input_ids_BS.device
        forbidden = torch.tensor(forbidden_ids, device=device, dtype=torch.int64)
        # The model's own settings (penalties, suppressed tokens) are merged in where they stand.
        own, self.model.generation_config = self.model.generation_config, plain
        try:
            ids = self.model.generate(
                **prompts.model_inputs(),
                generation_config=plain,
                logits_processor=LogitsProcessorList(
                    [_Forbid(forbidden), *([draw] if draw else [])]
                ),
                # A rank whose rows are all done must go on running the shared all-gathers.
                synced_gpus=self.lockstep and not self._gathered,
            )
        finally:
            self.model.generation_config = own
        return ids[:, prompts.input_ids_BS.shape[1] :]

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Hold all weights, in compute precision, so that each rank generates on its own.

        Collective at its start; inside it no forward is. Costs the memory of the whole model.
        """
        groups = [module for module in self.modules() if isinstance(module, FSDPModule)]
        for group in groups:
            group.unshard()
        self._gathered = True
        try:
            with _unhooked([group for group in groups if group is not self]):
                yield
        finally:
            self._gathered = False
            for group in groups:
                group.reshard()


@contextlib.contextmanager
def _unhooked(groups: list[FSDPModule]) -> Iterator[None]:
    """Without the hooks of FSDP2: they would reshard, and take a tenth of a small model's time.

    Other hooks stay: transformers collects hidden states by them, some of which are image features.
    """
    handles: set[RemovableHandle] = set()
    for state in {group._get_fsdp_state() for group in groups}:  # modules gathered as one have one
        for handle in (state._pre_forward_hook_handle, state._post_forward_hook_handle):
            handles.update(handle.handles if isinstance(handle, _MultiHandle) else [handle])
    held = [(handle.hooks_dict_ref(), dict(handle.hooks_dict_ref())) for handle in handles]
    for handle in handles:
        handle.hooks_dict_ref().pop(handle.id)
    try:
        yield
    finally:
        for hooks, before in held:
            whole = before | dict(hooks)  # in the old order
            hooks.clear()
            hooks.update(whole)


class _Forbid(LogitsProcessor):
    """Rules tokens out. `suppress_tokens` would compare the whole vocabulary for every token."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill_(1, self.ids, -torch.inf)


def cut(ids_BS: Tensor, stop_ids: list[int]) -> list[tuple[list[int], bool]]:
    """Each row up to and including its first stop id, and whether it has one."""
    rows = []
    for ids in ids_BS.tolist():
        end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
        rows.append((ids, False) if end is None else (ids[: end + 1], True))
    return rows


def _check_head(model: PreTrainedModel) -> None:
    """Refuse families whose logits are more than hidden states times head."""
    text = model.config.get_text_config().to_dict()
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if text.get(name) not in (None, 1, 1.0):
            raise UserError(
                f"{type(model).__name__} changes its logits after the head ({name}={text[name]}): "
                "the fused loss does not, so this family is not supported"
            )


class Student(VLM):
    """The model that is trained."""

    forward_methods = ("generate", "targets", "distill")
    role = "student"

    def __init__(self, model: PreTrainedModel, objective: Objective) -> None:
        super().__init__(model)
        self.objective = objective
        self.train()  # from_pretrained gives evaluation mode

    def distill(
        self,
        batch: Batch,
        targets: TeacherTargets | None,
        num_targets: int,
        num_kd_targets: int | None = None,
    ) -> KDOutput:
        """Forward and loss of one micro-batch, divided by the counts of the whole step.

        `num_kd_targets` None: as many as targets.
        """
        hidden_ND = self._hidden(batch.student)
        head = self.model.get_output_embeddings()
        counts = num_targets, num_kd_targets
        with record_function("kd::loss"):
            return self.objective(
                hidden_ND, head.weight, head.bias, batch.labels_N, targets, *counts
            )

    def freeze(self, parts: list[str]) -> None:
        """Exclude parts (see `find_part`); before `distribute`, as FSDP reads requires_grad."""
        for name in parts:
            for module in find_part(self.model, name, "student.freeze"):
                module.requires_grad_(False)
        if not any(p.requires_grad for p in self.parameters()):
            raise UserError(f"student.freeze={parts} leaves nothing to train")

    def adapt(self, lora: LoRAConfig, seed: int) -> None:
        """Freeze all but adapters, if there are to be any; before `distribute`, like `freeze`."""
        self.adapters = lora.inject(self.model, seed)

    def checkpoint_activations(self) -> None:
        """Recompute each block in the backward instead of keeping its activations."""
        # Non-reentrant, so that frozen towers (no input that requires grad) work.
        self.model.gradient_checkpointing_enable({"use_reentrant": False})


class FrozenVLM(VLM):
    """A teacher on the same ranks as the student."""

    role = "teacher"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.requires_grad_(False)
        self.eval()
