"""Losses between models with different tokenizers, on the groups where both end a token.

Shape legend: N student rows, C of them in a chunk; R rows of either model in a chunk; G groups of
a chunk; V, W vocabularies of student and teacher; K pairs of matched tokens. q is the student, p
the teacher, both merged per group: masses that need not sum to 1.

A group of rows a..b with tokens y_a..y_b has the distribution of one of its rows, times the
probability that the model gave the tokens of the others:

    observed:  m(v) = P(v | y_<a) Π_{a<k<=b} P(y_k | y_<k)      exact for v = y_a
    bayesian:  m(v) = P(v | y_<b) Π_{a<=k<b} P(y_k | y_<k)      the chain rule, for every v

Sources: ULD is Boizard et al., Towards Cross-Tokenizer Distillation: the Universal Logit
Distillation Loss for LLMs (arXiv 2402.12030). Merging and the hybrid are Patiño et al., Unlocking
On-Policy Distillation for Any Model Family (Hugging Face, 2025), which calls them GOLD.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from kd.align import AlignedTargets, MatchedVocabulary, Side
from kd.loss.divergences import forward_kl, generalized_jsd, reverse_kl
from kd.objective import accumulation_dtype, below_maximum, head_logits
from kd.types import IGNORE_INDEX

Distance = Callable[[Tensor, Tensor, MatchedVocabulary], Tensor]
"""`(student_logp_GV, teacher_logp_GW, matched) -> loss_G`, of merged distributions."""

STUDENT_COPIES, TEACHER_COPIES = 12, 7
"""Fp32 copies of a chunk of logits at the peak; a sort alone has 3 (values, int64 places)."""


class Merge(Enum):
    """Which row of a group has the distribution that is compared."""

    observed = "observed"
    """The first."""
    bayesian = "bayesian"
    """The last."""


@dataclass(frozen=True)
class AlignedLoss:
    """All of an aligned loss that is fixed during a run."""

    distance: Distance
    merge: Merge
    temperature: float
    teacher_temperature: float


def sorted_l1(q_GV: Tensor, p_GW: Tensor, top_k: int | None) -> Tensor:
    """Σ_i |q_(i) - p_(i)| of probabilities in descending order, the shorter with zeros, [G].

    ULD: the Wasserstein distance between distributions whose supports have nothing in common, so
    that moving mass costs the same everywhere (arXiv 2402.12030, section 3). With `top_k` the rest
    R_q, R_p of both enters as |R_q - R_p|, which is at most 2 min(R_q, R_p) below the exact value;
    from top_k = min(V, W) on it is exact.
    """
    (q_GK, q_rest_G), (p_GK, p_rest_G) = (_descending(x, top_k) for x in (q_GV, p_GW))
    width = max(q_GK.shape[1], p_GK.shape[1])
    q_GK, p_GK = (torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in (q_GK, p_GK))
    return (q_GK - p_GK).abs().sum(-1) + (q_rest_G - p_rest_G).abs()


def _descending(x_GV: Tensor, top_k: int | None) -> tuple[Tensor, Tensor]:
    """The (largest) values in descending order, and the sum of the rest."""
    if top_k is None or top_k >= x_GV.shape[1]:
        return x_GV.sort(-1, descending=True).values, x_GV.new_zeros(len(x_GV))
    top_GK = x_GV.topk(top_k).values
    return top_GK, x_GV.sum(-1) - top_GK.sum(-1)


@dataclass(frozen=True)
class ULD:
    """The sorted L1 distance over the whole vocabularies."""

    top_k: int | None

    def __call__(
        self, student_logp_GV: Tensor, teacher_logp_GW: Tensor, matched: MatchedVocabulary
    ) -> Tensor:
        """[G]; needs no matched tokens."""
        return sorted_l1(student_logp_GV.exp(), teacher_logp_GW.exp(), self.top_k)


def mass_divergence(name: str, beta: float, logq_GK: Tensor, logp_GK: Tensor) -> Tensor:
    """A divergence of masses that need not sum to 1, at least 0, and 0 only where they agree, [G].

    KL(p || q) = Σ p log(p / q) - p + q. Without the last two terms, which cancel in distributions,
    it would be negative, and least where q is too large, whenever q has the greater mass. In the
    generalized JSD they cancel always: its mixture has the mixed mass.
    """
    excess_G = logq_GK.exp().sum(-1) - logp_GK.exp().sum(-1)
    if name == "forward_kl" or (name == "jsd" and beta == 0):
        return forward_kl(logq_GK, logp_GK) + excess_G
    if name == "reverse_kl" or beta == 1:
        return reverse_kl(logq_GK, logp_GK) - excess_G
    return generalized_jsd(logq_GK, logp_GK, beta)


@dataclass(frozen=True)
class GOLD:
    """A divergence on tokens that both vocabularies have, the sorted L1 distance on all others."""

    divergence: str
    beta: float
    matched_weight: float | None
    unmatched_weight: float | None
    """None: the matched share of the entries of the teacher's head, and its complement."""
    top_k: int | None

    def __call__(
        self, student_logp_GV: Tensor, teacher_logp_GW: Tensor, matched: MatchedVocabulary
    ) -> Tensor:
        """[G]"""
        ours_K, theirs_K = matched.student_ids_K, matched.teacher_ids_K
        share = len(theirs_K) / teacher_logp_GW.shape[1]
        weight = share if self.matched_weight is None else self.matched_weight
        rest_weight = 1 - share if self.unmatched_weight is None else self.unmatched_weight
        logq_GK = student_logp_GV.index_select(1, ours_K)
        logp_GK = teacher_logp_GW.index_select(1, theirs_K)
        q_GU = student_logp_GV.index_select(1, _others(ours_K, student_logp_GV.shape[1])).exp()
        p_GU = teacher_logp_GW.index_select(1, _others(theirs_K, teacher_logp_GW.shape[1])).exp()
        matched_G = mass_divergence(self.divergence, self.beta, logq_GK, logp_GK)
        return weight * matched_G + rest_weight * sorted_l1(q_GU, p_GU, self.top_k)


def _others(ids_K: Tensor, vocab: int) -> Tensor:
    """All other entries, ascending; not by nonzero, which would be a host sync."""
    is_other_V = torch.ones(vocab, dtype=torch.bool, device=ids_K.device)
    is_other_V.index_fill_(0, ids_K, False)
    return is_other_V.sort(descending=True, stable=True).indices[: vocab - len(ids_K)]


def merged_log_probs(
    logits_RV: Tensor, side: Side, rows: slice, groups: slice, temperature: float, merge: Merge
) -> Tensor:
    """Log m, [G, V], of the groups `groups`, which lie within the rows `rows` of one model."""
    logits_RV = below_maximum(logits_RV)
    if temperature != 1:
        logits_RV = logits_RV / temperature
    num_groups = groups.stop - groups.start
    kept_G = (side.first_G if merge is Merge.observed else side.last_G)[groups] - rows.start
    group_R = (side.group_R[rows] - groups.start).clamp(max=num_groups)  # in none: one past them
    log_z_R = logits_RV.logsumexp(-1)
    token_logp_R = logits_RV.gather(1, side.ids_R[rows, None])[:, 0] - log_z_R
    others_R = token_logp_R.index_fill(0, kept_G, 0)  # not subtracted again: it may be -inf
    others_G = others_R.new_zeros(num_groups + 1).index_add(0, group_R, others_R)[:num_groups]
    shift_G = others_G - log_z_R.index_select(0, kept_G)
    return logits_RV.index_select(0, kept_G) + shift_G[:, None]


@dataclass
class AlignedBody:
    """CE per row and an aligned loss per group; autograd on one chunk, which cuts no group."""

    targets: AlignedTargets
    loss: AlignedLoss
    kd_ratio: float
    kd_weight: float | Tensor = 1.0
    """num_targets / num_kd_targets: the loop divides the gradient by num_targets."""
    _teacher_logits: Tensor | None = field(default=None, init=False, repr=False)

    @property
    def narrows_in_place(self) -> bool:
        """It does not."""
        return False

    def row_bytes(self, vocab: int) -> int:
        """What autograd keeps for one row of each model."""
        return 4 * (STUDENT_COPIES * vocab + TEACHER_COPIES * len(self.targets.weight_VD))

    def _teacher_logp_GW(self, rows: slice, groups: slice) -> Tensor:
        targets, size = self.targets, rows.stop - rows.start
        buffer = self._teacher_logits
        if buffer is None or len(buffer) < size:
            dtype = accumulation_dtype(targets.weight_VD.dtype)
            buffer = targets.hidden_MD.new_empty(size, len(targets.weight_VD), dtype=dtype)
            self._teacher_logits = buffer
        logits_RW = buffer[:size]
        with torch.no_grad():
            head_logits(targets.hidden_MD[rows], targets.weight_VD, targets.bias_V, logits_RW)
            side, loss = targets.groups.teacher, self.loss
            return merged_log_probs(
                logits_RW, side, rows, groups, loss.teacher_temperature, loss.merge
            )

    def _kd_C(self, logits_CV: Tensor, rows: slice) -> Tensor:
        """The loss of each group at the group's first row, 0 at all other rows."""
        groups, teacher_rows = self.targets.groups.within(rows)
        side, loss = self.targets.groups.student, self.loss
        teacher_logp_GW = self._teacher_logp_GW(teacher_rows, groups)
        student_logp_GV = merged_log_probs(
            logits_CV, side, rows, groups, loss.temperature, loss.merge
        )
        loss_G = loss.distance(student_logp_GV, teacher_logp_GW, self.targets.matched)
        first_G = side.first_G[groups] - rows.start
        return logits_CV.new_zeros(len(logits_CV)).index_copy(0, first_G, loss_G.to(logits_CV))

    def __call__(
        self, logits_CV: Tensor, labels_C: Tensor, rows: slice, dlogits_CV: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return (kd_C, ce_C); write the gradient of their mix to `dlogits_CV` if given."""
        with torch.set_grad_enabled(dlogits_CV is not None):
            leaf_CV = logits_CV.detach().requires_grad_(dlogits_CV is not None)
            kd_C = self._kd_C(leaf_CV, rows)
            loss = self.kd_ratio * (kd_C * self.kd_weight).sum()
            with torch.set_grad_enabled(dlogits_CV is not None and self.kd_ratio < 1):
                ce_C = torch.nn.functional.cross_entropy(
                    leaf_CV, labels_C, reduction="none", ignore_index=IGNORE_INDEX
                )
            if self.kd_ratio < 1:
                loss = loss + (1 - self.kd_ratio) * ce_C.sum()
            if dlogits_CV is not None:
                (grad_CV,) = torch.autograd.grad(loss, leaf_CV)
                dlogits_CV.copy_(grad_CV)
        return kd_C.detach(), ce_C.detach()
