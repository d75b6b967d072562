"""A teacher on the same ranks as the student."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from kd.align import AlignedTargets
from kd.model import FindPositions, FrozenVLM, PretrainedModel
from kd.parallel import HostWeights, ParallelConfig, World
from kd.teacher.base import BaseTeacher, Head, TeacherConfig
from kd.teacher.weights import weights_digest
from kd.types import Batch, DenseTargets, Inputs, UserError


@dataclass
class LocalTeacherConfig(PretrainedModel, TeacherConfig):
    """A teacher beside the student, sharded over the same ranks."""

    dtype: str = "bfloat16"
    cpu_offload: bool = False
    """Keep the sharded weights in host memory and copy each block to the device when it runs."""
    offload: bool = False
    """Keep the model in (pinned) host memory: it is copied to the device once per optimizer step,
    for all micro-batches of the step, and dropped there. Its head stays."""

    def validate(self, key: str) -> None:
        """Refuse values out of range."""
        PretrainedModel.validate(self, key)
        TeacherConfig.validate(self, key)
        if self.cpu_offload and self.offload:
            raise UserError(
                f"{key}.cpu_offload and {key}.offload: the first keeps the weights in host memory "
                "all the time, the second between uses; choose one"
            )

    @property
    def can_respond(self) -> bool:
        """It is a model of these ranks, and on their devices."""
        return not self.offload

    def identity(self, parallel: ParallelConfig) -> dict[str, str]:
        """Its weights, unless they are not there, and its precision."""
        weights = weights_digest(self)
        return {
            "name": self.name,
            **({} if weights is None else {"weights": weights}),
            "dtype": self.dtype,
            "compute_dtype": parallel.compute_dtype,
        }

    def build_teacher(
        self,
        processor: ProcessorMixin | None,
        world: World,
        parallel: ParallelConfig,
        student_vocab: int,
    ) -> LocalTeacher | OffloadedTeacher:
        """Load and shard; only rank 0 reads the weights."""
        assert processor is not None
        vlm = FrozenVLM(self.build(processor, with_weights=world.is_main))
        vlm.place(world, parallel, cpu_offload=self.cpu_offload)
        return OffloadedTeacher(vlm, world) if self.offload else LocalTeacher(vlm)

    def meta_model(self) -> PreTrainedModel:
        """The teacher on the meta device, for counting."""
        return PretrainedModel.meta_model(self)


class LocalTeacher(BaseTeacher):
    """Serves the whole distribution of every target row."""

    def __init__(self, vlm: FrozenVLM) -> None:
        self.vlm = vlm

    def targets(self, batch: Batch) -> DenseTargets | AlignedTargets:
        """Hidden states of the response rows in its own rendering, and the head."""
        dense = self.vlm.targets(batch.teacher)
        return Head(dense.weight_VD, dense.bias_V).targets(dense.hidden_ND, batch, self.matched)

    def read(self, inputs: Inputs) -> Tensor:
        """See the base class."""
        return self.vlm.read(inputs)

    def stop_ids(self, eos_token_id: int) -> list[int]:
        """See `Teacher`."""
        return self.vlm.stop_ids(eos_token_id)


class OffloadedTeacher(BaseTeacher):
    """One whose weights are on the device only while it works on the batches of a step.

    It does not generate: `vlm` is None.
    """

    def __init__(self, model: FrozenVLM, world: World) -> None:
        self.model, self.device = model, world.device
        self.head: Head | None = None
        self.num_swaps = 0
        self._hidden: dict[int, Tensor] = {}
        """Of the batches expected, by the identity of their rollouts, which device copies share."""
        self._weights = HostWeights(model, world.device)

    @property
    def positions(self) -> FindPositions:
        """See the base class."""
        return self.model.positions

    def expect(self, batches: list[Batch]) -> None:
        """Work on all of them with one swap. Collective."""
        with self._weights.on_device():
            for batch in batches:
                dense = self.model.targets(batch.teacher.to(self.device))
                self._hidden[id(batch.rollouts)] = dense.hidden_ND
                if self.head is None:  # a copy: the gathered one goes with the model
                    bias_V = None if dense.bias_V is None else dense.bias_V.clone()
                    self.head = Head(dense.weight_VD.clone(), bias_V)
        self.num_swaps += 1

    def targets(self, batch: Batch) -> DenseTargets | AlignedTargets:
        """Of a batch that was expected, or else with a swap of its own."""
        if id(batch.rollouts) not in self._hidden:
            self.expect([batch])
        assert self.head is not None
        return self.head.targets(self._hidden.pop(id(batch.rollouts)), batch, self.matched)

    def read(self, inputs: Inputs) -> Tensor:
        """See the base class."""
        with self._weights.on_device():
            return self.model.read(inputs)

    def stop_ids(self, eos_token_id: int) -> list[int]:
        """See `Teacher`."""
        return self.model.stop_ids(eos_token_id)
