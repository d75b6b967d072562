"""How an optimizer window is cut, and who responds to which part of it.

A *window* is what one call of the engine generates for: the rows of one or several optimizer steps.
It consists of *groups* of `num_generations` rows: one prompt with its rollouts, or as many rows of
the data set. A *slice* is the groups that all ranks read in the smallest number of micro-batches
that holds whole groups (mostly one); on- or off-policy is drawn slice by slice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kd.types import Rollout, UserError


@dataclass(frozen=True)
class Partition:
    """Numbers of a window, each for one rank."""

    micro_batch_size: int
    grad_accum: int
    num_generations: int
    window_steps: int

    @property
    def rows(self) -> int:
        """Rows of an optimizer step."""
        return self.micro_batch_size * self.grad_accum

    @property
    def groups(self) -> int:
        """Groups of an optimizer step."""
        return self.rows // self.num_generations

    @property
    def groups_per_slice(self) -> int:
        """Groups of the fewest micro-batches that hold whole ones."""
        return math.lcm(self.micro_batch_size, self.num_generations) // self.num_generations

    @property
    def slices(self) -> int:
        """Slices of a window."""
        return self.window_steps * self.groups // self.groups_per_slice

    def validate(self, generation_batch_size: int | None) -> None:
        """Refuse numbers that do not fit into each other, naming them all.

        `generation_batch_size` is the user's own count of prompts per window and rank.
        """
        n, steps = self.num_generations, self.window_steps
        have = (
            f"micro_batch_size {self.micro_batch_size} x grad_accum {self.grad_accum} = "
            f"{self.rows} rows per optimizer step and rank"
        )
        if self.rows % n:
            raise UserError(
                f"rollout.num_generations={n} does not divide {have}: the rollouts of a prompt "
                "belong to one step. Change one of the three"
            )
        prompts = steps * self.groups
        if generation_batch_size not in (None, prompts):
            over = f" x window_steps {steps}" if steps > 1 else ""
            raise UserError(
                f"rollout.generation_batch_size={generation_batch_size} x num_generations {n} = "
                f"{generation_batch_size * n} rollouts, but {have}{over}: give {prompts}, or null"
            )


@dataclass
class Group:
    """The rows of one prompt, or rows of the data set, on their way to training."""

    number: int
    """Its place among all groups of the run, over all ranks."""
    policy: str
    slots: list[int]
    """Places in the stream of rows: one, or one per row for the data set's own answers."""
    rows: list[Any] = field(default_factory=list)
    """What is to be collated: samples of the data set, or rollouts; none for a prompt rejected."""


@dataclass(frozen=True)
class Mix:
    """Draws who responds: the student with probability `lmbda`, else `off_policy`.

    The probability goes from `lmbda` to `lmbda_end` in a straight line over `lmbda_steps`.
    """

    seed: int
    lmbda: float
    off_policy: str = "dataset"
    lmbda_end: float | None = None
    lmbda_steps: int = 1

    def probability(self, step: int) -> float:
        """The student's at an optimizer step."""
        if self.lmbda_end is None:
            return self.lmbda
        done = min(1.0, step / self.lmbda_steps)
        return self.lmbda + done * (self.lmbda_end - self.lmbda)

    def draw(self, step: int, slices: int) -> list[str]:
        """Who responds to each slice of the window that begins at `step`; alike on all ranks."""
        u = np.random.default_rng([self.seed, step, 1]).random(slices)
        student = u < self.probability(step)
        return ["student" if s else self.off_policy for s in student.tolist()]


def pack_group(group: Group) -> dict[str, Any]:
    """As JSON; samples are read again by their slots."""
    return {
        "number": group.number,
        "policy": group.policy,
        "slots": group.slots,
        "responses": [
            {
                "ids": " ".join(map(str, row.response_ids)),
                "finished": row.finished,
                "policy_step": row.policy_step,
            }
            for row in group.rows
            if isinstance(row, Rollout)
        ],
    }


def unpack_group(packed: dict[str, Any], rows: list[Any]) -> Group:
    """From JSON and what is in its slots."""
    group = Group(packed["number"], packed["policy"], packed["slots"], rows)
    if group.policy != "dataset":
        group.rows = [
            Rollout(
                rows[0],
                [int(token) for token in response["ids"].split()],
                response["finished"],
                response["policy_step"],
                group.policy,
            )
            for response in packed["responses"]
        ]
    return group
