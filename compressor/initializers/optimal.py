"""The layer's optimum: the latents that damage the attention's output and scores least.

Attention is linear in V, so what a projection of V costs is W_o^h (I - D_h E) o_h with o_h the
attention's *output*. Its moments, not those of V, decide (DESIGN 3.1). Heads that share a latent
each average it with their own attention; there the tokens' moments stand for all (DESIGN 3.4).
Keys are weighed by the queries' second moment (DESIGN 3.3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vdcompress.initializers.base import Initializer
from vdcompress.latents.keys import KeyMetric, KeyProblem
from vdcompress.latents.lowrank import best_encoder, block_diagonal, regression_decoder
from vdcompress.latents.values import (
    Latents,
    ValueProblem,
    decoded,
    group_average,
    head_outputs,
    per_head,
)


def solve(problem: ValueProblem) -> Latents:
    """Solve every latent in closed form."""
    gram = problem.o_weight.mT @ problem.o_weight
    if problem.joined == 1:
        return solve_outputs(problem, gram)
    of_values = gram.unflatten(0, (-1, problem.sharing // problem.joined)).sum(1)
    return solve_tokens(problem, block_diagonal(of_values, problem.groups))


def solve_outputs(problem: ValueProblem, reading: Tensor) -> Latents:
    """Solve latents of single key/value heads by the moments of what their heads return.

    For heads that share a latent, the group's moments are averages over its heads; each head has
    a decoder of its own.

    Args:
        problem: the layer's V path.
        reading: how an error of each head's output is weighed, [H, d, d].
    """
    heads = head_outputs(problem)
    center = group_average(heads.mean, problem.sharing)
    weighed = reading.unflatten(0, (-1, problem.sharing)).sum(1)
    spread = group_average(heads.covariance, problem.sharing)
    encoder = best_encoder(weighed, spread, problem.width)
    encoders = per_head(encoder, problem.sharing)
    decoder = regression_decoder(encoders, heads.covariance)
    shift = heads.mean - per_head(center, problem.sharing)
    offset = heads.mean - torch.einsum("hdr,hre,he->hd", decoder, encoders, shift)
    return Latents(encoder, decoder, center, offset)


def solve_tokens(problem: ValueProblem, reading: Tensor) -> Latents:
    """Solve latents by the moments of the values of single tokens.

    Args:
        problem: the layer's V path.
        reading: how an error of each latent's stacked values is weighed, [g, n, n].
    """
    values = problem.values()
    encoder = best_encoder(reading, values.covariance, problem.width)
    decoder = regression_decoder(encoder, values.covariance)
    return decoded(problem, encoder, decoder, values.mean)


def keys(problem: KeyProblem) -> KeyMetric:
    """Weigh each head's keys by the second moment of the queries that meet them."""
    queries = problem.statistics.require("queries").second
    met = queries.unflatten(0, (-1, problem.sharing)).sum(1)
    return KeyMetric(block_diagonal(met, problem.groups), problem.keys())


INITIALIZER = Initializer(
    solve,
    needs=frozenset({"outputs"}),
    shared_needs=frozenset({"values"}),
    keys=keys,
    key_needs=frozenset({"keys", "queries"}),
    default_refit="local",
    default_alternate=2,
)
