"""Drawing tokens so that a row's response does not depend on the rows beside it.

Shape legend: B rows, T new tokens, S tokens so far, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kd.rollout.engine import Sampling


def uniforms(seeds: list[int], n: int, length: int) -> Tensor:
    """[len(seeds) * n, length] numbers in [0, 1) for `n` rollouts of each seed, n in succession."""
    rows = [
        # 32 bits: in float64 such a number times the last of the cumulated sums stays below it.
        np.random.default_rng([seed, k]).integers(2**32, size=length) / 2**32
        for seed in seeds
        for k in range(n)
    ]
    return torch.from_numpy(np.array(rows).reshape(-1, length))


class Draw(LogitsProcessor):
    """Samples by inverse transform: the first token whose cumulated probability exceeds u.

    Leaves that token the only possible one, for a greedy `generate` to take. With the numbers given
    row by row, the response to a prompt is the same whatever batch, order or rank it is in (up to
    rounding of the logits), and no state of a generator has to be kept. Rows that have no numbers
    are fillers: they end at once, by `stop_id`.
    """

    def __init__(
        self, sampling: Sampling, uniforms_BT: Tensor, prompt_tokens: int, stop_id: int
    ) -> None:
        self.uniforms_BT, self.prompt_tokens, self.stop_id = uniforms_BT, prompt_tokens, stop_id
        warpers: list[LogitsProcessor] = []
        if sampling.temperature != 1:
            warpers.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            warpers.append(TopPLogitsWarper(sampling.top_p))
        self.warpers = LogitsProcessorList(warpers)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, S] ids so far and [B, V] logits -> 0 for the token drawn and -inf for the rest."""
        scores_BV = self.warpers(input_ids, scores)
        cdf_BV = scores_BV.softmax(-1, dtype=torch.float64).cumsum(-1)
        drawn_B1 = input_ids.new_full((len(scores), 1), self.stop_id)
        u_R1 = self.uniforms_BT[:, input_ids.shape[1] - self.prompt_tokens, None]
        cdf_RV = cdf_BV[: len(u_R1)]
        # right: a token of probability 0 ends where the one before it does, and is passed over.
        drawn_R1 = torch.searchsorted(cdf_RV, u_R1 * cdf_RV[:, -1:], right=True)
        # Past the end where logits are not finite: training will refuse what they make of the loss.
        drawn_B1[: len(u_R1)] = drawn_R1.clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn_B1, 0)
