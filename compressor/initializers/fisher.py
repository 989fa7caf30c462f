"""The loss's own metric: latents that change what the model predicts least.

An error e of a key or a value changes the loss by g^T e with g the loss's gradient there, and the
expected square of that, with labels drawn from the model itself, is twice the divergence of its
predictions to second order. So errors are weighed by E[g g^T], over all heads of a latent jointly:
what every reader of every token makes of it, later layers included, heads that nothing listens to
left out (Kronecker-factored Fisher information: Martens and Grosse 2015, arXiv 1503.05671).
"""

from __future__ import annotations

from vdcompress.initializers.base import Initializer
from vdcompress.initializers.optimal import solve_outputs, solve_tokens
from vdcompress.latents.keys import KeyMetric, KeyProblem
from vdcompress.latents.values import Latents, ValueProblem


def solve(problem: ValueProblem) -> Latents:
    """Solve by outputs where each key/value head has a latent, by tokens where they share one."""
    statistics = problem.statistics
    if problem.joined == 1:
        return solve_outputs(problem, statistics.require("output_gradients").second)
    gradients = statistics.require("value_gradients").blocks(problem.groups)
    return solve_tokens(problem, gradients.second)


def keys(problem: KeyProblem) -> KeyMetric:
    """Weigh the stacked keys of a latent by the gradients of the loss there."""
    gradients = problem.statistics.require("key_gradients").blocks(problem.groups)
    return KeyMetric(gradients.second, problem.keys())


INITIALIZER = Initializer(
    solve,
    needs=frozenset({"outputs", "output_gradients"}),
    shared_needs=frozenset({"values", "value_gradients"}),
    keys=keys,
    key_needs=frozenset({"keys", "key_gradients"}),
    default_refit="local",
    default_alternate=4,
)
