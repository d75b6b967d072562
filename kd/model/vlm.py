"""A vision-language model as the recipes use it: hidden states, head and answers.

Every method that reads weights is a *forward method* of FSDP2: called through the module, it
gathers the sharded weights first. Reading `head.weight` anywhere else gives a shard of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import GenerationConfig, PreTrainedModel

from kd.objective import KDOutput
from kd.parallel import ParallelConfig, World, shard
from kd.types import Batch, DenseTargets, Inputs, TeacherTargets, UserError

Objective = Callable[
    [Tensor, Tensor, Tensor | None, Tensor, TeacherTargets | None, int | Tensor], KDOutput
]


class VLM(nn.Module):
    """A frozen or trainable `AutoModelForImageTextToText` model."""

    forward_methods = ("generate",)

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        _check_head(model)
        self.model = model
        self.lockstep = False

    def distribute(
        self, world: World, config: ParallelConfig, *, cpu_offload: bool = False
    ) -> None:
        """Move to the device and shard, with rank 0's weights on all ranks."""
        shard(self, self.model, world, config, cpu_offload=cpu_offload)
        self.lockstep = world.size > 1
        for method in self.forward_methods:
            register_fsdp_forward_method(self, method)

    def _hidden(self, inputs: Inputs) -> Tensor:
        """The last hidden states [N, D] of the target rows; no logits are computed."""
        outputs = self.model.base_model(**inputs.model_inputs(), use_cache=False)
        return outputs.last_hidden_state.flatten(0, 1)[inputs.target_rows_N]

    @torch.no_grad()
    def generate(self, prompts: Inputs, max_new_tokens: int, eos_token_id: int) -> Tensor:
        """Greedy answers [B, up to max_new_tokens] to left-padded prompts, EOS-padded."""
        plain = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=eos_token_id,
            pad_token_id=eos_token_id,
        )
        # The model's own settings (penalties, suppressed tokens) are merged in where they stand.
        own, self.model.generation_config = self.model.generation_config, plain
        try:
            ids = self.model.generate(
                **prompts.model_inputs(),
                generation_config=plain,
                # A rank whose rows are all done must go on running the shared all-gathers.
                synced_gpus=self.lockstep,
            )
        finally:
            self.model.generation_config = own
        return ids[:, prompts.input_ids_BS.shape[1] :]


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

    forward_methods = ("generate", "distill")

    def __init__(self, model: PreTrainedModel, objective: Objective) -> None:
        super().__init__(model)
        self.objective = objective
        self.train()  # from_pretrained gives evaluation mode

    def distill(
        self, batch: Batch, targets: TeacherTargets | None, num_targets: int | Tensor
    ) -> KDOutput:
        """Forward and loss of one micro-batch, divided by the step's global `num_targets`."""
        hidden_ND = self._hidden(batch.student)
        head = self.model.get_output_embeddings()
        return self.objective(
            hidden_ND, head.weight, head.bias, batch.labels_N, targets, num_targets
        )

    def freeze(self, parts: list[str]) -> None:
        """Exclude submodules from training; before `distribute`, as FSDP reads requires_grad."""
        for name in parts:
            try:
                part = self.model.get_submodule(name)
            except AttributeError as error:
                known = ", ".join(n for n, _ in self.model.base_model.named_children())
                raise UserError(
                    f"student.freeze: {name} is no part of {type(self.model).__name__}; "
                    f"parts under `{self.model.base_model_prefix}.`: {known}"
                ) from error
            part.requires_grad_(False)
        if not any(p.requires_grad for p in self.parameters()):
            raise UserError(f"student.freeze={parts} leaves nothing to train")

    def checkpoint_activations(self) -> None:
        """Recompute each block in the backward instead of keeping its activations."""
        # Non-reentrant, so that frozen towers (no input that requires grad) work.
        self.model.gradient_checkpointing_enable({"use_reentrant": False})


class FrozenVLM(VLM):
    """A teacher on the same ranks as the student."""

    forward_methods = ("generate", "targets")

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def targets(self, inputs: Inputs) -> DenseTargets:
        """Hidden states and head. The head stays gathered until the next forward re-uses it."""
        hidden_ND = self._hidden(inputs)
        head = self.model.get_output_embeddings()
        return DenseTargets(hidden_ND, head.weight, head.bias)
