"""Which span each head needs: what a loss gains when keys are hidden, and rules of spans under a budget (MoA)."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxattn.cache import Spans
from jaxattn.core.attend.api import attend
from jaxattn.core.attend.mask import Causal
from jaxattn.core.attend.measure import Measure
from jaxattn.core.numeric import ratio
from jaxattn.core.part import part
from jaxattn.core.table import take


def removal_influence(weights: Float[Array, "*b t s"], cotangent: Float[Array, "*b t s"]) -> Float[Array, "*b t s"]:
    """Returns by how much a loss grows if query i no longer sees key j (MoA, Fu et al., 2025).

        ΔL_ij = −A_ij (G_ij − Σ_n G_in A_in) / (1 − A_ij),   G = ∂L / ∂A

    The row is divided by what is left of it, as softmax over the other keys is. The figure is exact where L is linear
    in what the head reads. A row of one key alone has 0.

    Args:
        weights: A, rows that sum to 1.
        cotangent: G.
    """
    centered = cotangent - (cotangent * weights).sum(-1, keepdims=True)
    return -ratio(weights * centered, 1 - weights)


@part
class SpanInfluence(Measure):
    """Σ over the pairs beyond a span of |`removal_influence`|, for each of a few spans. [..., N, R]

    A span shows the first `sinks` keys and the last `spans[r]` ones, the query's own included.

    Attributes:
        value: [..., N, P, V], the values by position of the keys, for each query head.
        cotangent: [..., N, P, V], the gradient of the loss in what the heads read, by position of the queries.
        spans: [R], numbers of tokens, at least 1.
        sinks: The number of first keys that each span shows.
    """

    value: Float[Array, "*batch heads positions v"]
    cotangent: Float[Array, "*batch heads positions v"]
    spans: Int[Array, " rules"]
    sinks: Int[Array, ""] | int = 4

    over: ClassVar[Literal["rows", "sum"]] = "sum"

    def __call__(self, view, tile):
        value = _at(self.value, tile.key[..., 0, :])
        slope = _at(self.cotangent, tile.query[..., 0])
        of_weights = jnp.einsum("...nth,...nsh->...nts", slope, value, precision="highest")
        shown = tile.shown(view.weights.shape)
        influence = abs(removal_influence(view.weights, of_weights.astype(view.weights.dtype)))
        age = tile.query - tile.key
        beyond = (age >= jnp.asarray(self.spans)[:, None, None, None, None]) & (tile.key >= self.sinks) & shown
        return jnp.moveaxis(jnp.where(beyond, influence, 0).sum((-2, -1)), 0, -1)


def _at(table: Float[Array, "*b n p v"], positions: Int[Array, "*b n s"]) -> Float[Array, "*b n s v"]:
    """Returns the rows of a table at these positions, 0 outside."""
    return jnp.moveaxis(take(jnp.moveaxis(table, -1, 0), positions, 1, 0), 0, -1)


def span_influence(
    query: Float[Array, "*b t n h"],
    key: Float[Array, "*b t k h"],
    value: Float[Array, "*b t k v"],
    cotangent: Float[Array, "*b t n v"],
    spans: Float[Any, " r"],
    *,
    sinks: int = 4,
    mask: Any = None,
    **options: Any,
) -> Float[Array, "*b n r"]:
    """Returns the loss that each head is expected to gain under each of these spans, Σ |`removal_influence`|.

    The pairs that count are those of the mask which a span of `cache.Spans` hides. Weights are computed block by block
    and never held, so memory is linear in length.

    Args:
        query: [..., T, N, H], as they meet keys: the site `q_rotated`.
        key: [..., T, K, H], the site `k_rotated`.
        value: [..., T, K, V], the site `v`.
        cotangent: [..., T, N, V], the gradient of the loss at the site `z`.
        spans: [R], numbers of tokens, rounded down; below 1 they count as 1, the query's own token.
        sinks: The number of first keys that each span shows.
        mask: The mask of the head; by default `Causal()`.
        options: Other arguments of `attend`.

    Raises:
        ValueError: The cotangent does not have the shape of what the heads read.
    """
    shape = (*query.shape[:-1], value.shape[-1])
    if cotangent.shape != shape:
        raise ValueError(f"cotangent has shape {cotangent.shape}: need {shape}, that of what the heads read")
    by_head = jnp.repeat(value, query.shape[-2] // value.shape[-2], -2)
    shown = jnp.maximum(jnp.floor(jnp.asarray(spans)), 1).astype(jnp.int32)
    measure = SpanInfluence(by_head.swapaxes(-3, -2), cotangent.swapaxes(-3, -2), shown, jnp.asarray(sinks))
    mask = Causal() if mask is None else mask
    return attend(query, key, value, mask=mask, measures={"spans": measure}, **options)[1]["spans"]


def elastic_rules(alphas: Sequence[float], betas: Sequence[float], lengths: Sequence[int]) -> Float[np.ndarray, "r 2"]:
    """Returns the pairs (α, β) of the grid whose span α + β n is above 0 and at most n at each of these lengths."""
    grid = np.array([(alpha, beta) for beta in betas for alpha in alphas], np.float64).reshape(-1, 2)
    spans = grid[:, :1] + grid[:, 1:] * np.asarray(lengths)
    return grid[((spans > 0) & (spans <= np.asarray(lengths))).all(1)]


def choose_rules(
    loss: Float[Any, "h r"],
    cost: Float[Any, "*c h r"],
    budget: Float[Any, "*c"],
    *,
    layer: Int[Any, " h"] | None = None,
    distinct: int | None = None,
) -> Int[np.ndarray, " h"]:
    """Returns one rule per head with the least total loss whose mean cost stays within the budget.

        min Σ_h loss[h, rule_h]   with   mean_h cost[h, rule_h] ≤ budget

    It is a knapsack with one choice per head, solved exactly as an integer program. Several costs, as the densities at
    several lengths, each have a budget of their own.

    Args:
        loss: [H, R], such as sums of `span_influence`. Where heads share a key head, give the sum of theirs: a store
            keeps tokens by key head.
        cost: [H, R], or [C, H, R] for C costs, such as the share of tokens that a head keeps.
        budget: One number, or [C].
        layer: [H], the number of the layer of each head; needed for `distinct`.
        distinct: The most rules that the heads of a layer share out among them; 2 in the paper. None for any number.

    Raises:
        ValueError: Shapes do not fit, a number is not finite, `distinct` comes without `layer`, or no choice of rules
            stays within the budget.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # JAX needs SciPy itself

    loss, cost, budget = (np.asarray(x, np.float64) for x in (loss, cost, budget))
    costs = cost.reshape(-1, *cost.shape[-2:])
    if loss.ndim != 2 or costs.shape[1:] != loss.shape or budget.shape != cost.shape[:-2]:
        raise ValueError(
            f"loss has shape {loss.shape}, cost {cost.shape} and budget {budget.shape}: need [heads, rules], the same "
            "behind at most one axis of costs, and one number for each cost"
        )
    if not all(np.isfinite(x).all() for x in (loss, cost, budget)):
        raise ValueError("loss, cost or budget holds a number that is not finite: need finite ones")
    if (distinct is not None) != (layer is not None):
        raise ValueError(f"distinct is {distinct} and layer {layer}: need both, or none")
    heads, rules = loss.shape
    layers = np.unique(np.zeros(heads) if layer is None else np.asarray(layer), return_inverse=True)[1]
    used = 0 if distinct is None else (layers.max() + 1) * rules  # whether any head of a layer takes a rule
    size = heads * rules
    wide = ((0, 0), (0, used))
    constraints = [
        LinearConstraint(np.pad(np.kron(np.eye(heads), np.ones(rules)), wide), 1, 1),
        LinearConstraint(np.pad(costs.reshape(-1, size) / heads, wide), -np.inf, budget.reshape(-1)),
    ]
    if distinct is not None:
        of_layer = np.kron(np.eye(layers.max() + 1)[layers], np.eye(rules))
        constraints.append(LinearConstraint(np.concatenate([np.eye(size), -of_layer], 1), -np.inf, 0))
        each = np.kron(np.eye(layers.max() + 1), np.ones(rules))
        constraints.append(LinearConstraint(np.pad(each, ((0, 0), (size, 0))), -np.inf, distinct))
    found = milp(
        np.pad(loss.reshape(-1), (0, used)), integrality=1, bounds=Bounds(0, 1), constraints=constraints,
        options={"mip_rel_gap": 0},
    )  # fmt: skip
    if found.x is None:
        least = costs.min(-1).mean(-1).tolist()
        raise ValueError(
            f"budget is {budget.tolist()}: no choice of rules stays within it; the least costs are {least}"
        )
    return found.x[:size].reshape(heads, rules).argmax(1)


def elastic_spans(rules: Float[Any, "r 2"], chosen: Int[Any, " k"], sinks: int = 4) -> Spans:
    """Returns the policy of a store whose key head k has rule chosen[k], (α, β) of `rules`."""
    alpha, beta = np.asarray(rules)[np.asarray(chosen)].T
    return Spans(jnp.asarray(alpha, jnp.float32), jnp.asarray(beta, jnp.float32), sinks)
