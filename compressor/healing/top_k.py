"""Distil from the teacher's k likeliest next tokens: what is compared, and its gradient.

For each predicted token the teacher gives k + 1 masses q: of its k likeliest tokens, and of all
others together, the tail. The student's distribution p over the vocabulary is summed into the
same k + 1 buckets, and the divergence is

    D = sum_j q_j log(q_j / p_j) + q_tail log(q_tail / p_tail)

Both sides are coarsened alike, so D is a true Kullback-Leibler divergence: never negative, never
more than that of the full distributions (data processing inequality), and zero only where every
one of the k + 1 masses agrees. Only how the tail is spread over its tokens is left to the student.
Dropping the tail and renormalising the k masses instead would ask the student to put mass 1 on k
tokens: even its optimum is not the teacher.

With t = the student's softmax over the tail's tokens alone,

    dD/ds_i = p_i - q_i               for the k tokens
            = t_i (p_tail - q_tail)   for the tail

which is finite however small a mass is: ``p_tail`` comes from the tail's own logsumexp, never from
1 - sum p_j, and the teacher's tail is kept, not computed from rounded log-probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vdcompress.healing.divergence import Objective


@dataclass(frozen=True)
class TopKMasses:
    """What the teacher finds likeliest to come next, for n tokens.

    Attributes:
        ids: integers [n, k], all different in a row.
        logprobs: their log-probabilities, and that of all other tokens together, [n, k + 1], at
            the objective's temperature.
    """

    ids: Tensor
    logprobs: Tensor

    def part(self, part: slice) -> TopKMasses:
        """Return some tokens' masses."""
        return TopKMasses(self.ids[part], self.logprobs[part])


def top_k_losses(
    logits: Tensor, teacher: TopKMasses, labels: Tensor, objective: Objective, *, gradient: bool
) -> Tensor:
    """Return the summed objective and cross-entropy [2].

    Args:
        logits: the student's [n, v]; with ``gradient`` they are replaced by the objective's
            gradient with respect to them, else they are spent.
        teacher: of the same tokens.
        labels: the next tokens, int64 [n].
        objective: weights and temperature.
        gradient: whether the gradient is wanted.
    """
    labels, t = labels[:, None], objective.temperature
    s = logits if logits.dtype == torch.float64 else logits.float()
    log_total = s.logsumexp(-1, keepdim=True)
    cross_entropy = (log_total - s.gather(-1, labels)).sum()
    slope = None
    if gradient and objective.ce:
        slope = (s - log_total).exp_().mul_(objective.ce)
        slope.scatter_add_(-1, labels, slope.new_full(labels.shape, -objective.ce))
    if t != 1.0:
        s /= t
    divergence = bucket_divergence_(s, teacher).sum()
    total = objective.kl * t**2 * divergence + objective.ce * cross_entropy
    if gradient:
        s *= objective.kl * t
        logits.copy_(s if slope is None else s.add_(slope))
    return torch.stack([total, cross_entropy])


def bucket_divergence_(logits: Tensor, teacher: TopKMasses) -> Tensor:
    """Return D of each row [n], and turn the logits into its gradient in place.

    The teacher's masses are normalised here: what was rounded to float16 does not sum to 1.

    Args:
        logits: the student's, float32 or float64 [n, v].
        teacher: of the same rows.
    """
    ids = teacher.ids.long()
    log_q = teacher.logprobs.to(logits.dtype).log_softmax(-1)
    top = logits.gather(-1, ids)
    tail = logits.scatter_(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    log_p = torch.cat((top, tail), -1).log_softmax(-1)
    q = log_q.exp()
    slope = log_p.exp() - q
    divergence = torch.where(q > 0, q * (log_q - log_p), 0.0).sum(-1)
    # where all tokens are kept the tail's logsumexp is -inf, and every t_i is to be 0
    logits.sub_(tail.masked_fill(tail.isneginf(), 0.0)).exp_().mul_(slope[:, -1:])
    logits.scatter_(-1, ids, slope[:, :-1])
    return divergence
