"""One inner batch of a memory that learns while it reads: its gradients, the reads of its tokens, the state after them.

All gradients of the batch are taken at the same weights. Those of one layer are then outer products x_j δ_jᵀ of the
layer's input for key j and the wanted change of its output. So a layer with the weights of token i, applied to x, is

    e^{a_i} Aᵀ x + f_i Sᵀ x − Σ_j Γ_ij (x · x_j) δ_j

for the weights A and momentum S before the batch: linear attention once more, and no token's weights are ever made.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.core.linear.decay import decay_matrix, ends
from jaxattn.core.matmul import precision, product
from jaxattn.core.memory.inner import InnerLoss, Link, Memory
from jaxattn.core.mesh import vary_like

FastRead = Literal["auto", "dual", "materialize", "start"]
Weights = tuple[Float[Array, "... n i o"], ...]


class Batch(NamedTuple):
    """An inner batch in P ≥ inner_batch slots: [..., N, P, X], and [..., N, P, 1] for one number per token.

    Slots without a token are zero, in `token` too. The marks that end a batch or start a segment are [..., 1, 1, 1].
    """

    query: Array
    key: Array
    value: Array
    rate: Array
    log_decay: Array
    log_momentum: Array | None
    row_rate: Array | None
    token: Array
    resets: Array | None
    completes: Array


class Factors(NamedTuple):
    """A_i = kept_i A + carried_i S − Σ_j written_ij u_j, and S after the batch = through S − Σ_j into_j u_j."""

    kept: Float[Array, "... n p 1"]
    written: Float[Array, "... n p p"]
    carried: Any  # [..., N, P, 1]; this and the next two are None without momentum
    through: Any  # [..., N, 1, 1]
    into: Any  # [..., N, P, 1]


def learn(
    memory: Memory,
    loss: InnerLoss,
    link: Link,
    initial: Weights,
    read: FastRead,
    dtype: Any,
    size: int,
    carry: Any,
    given: Batch,
) -> tuple[Any, Array]:
    """Computes one inner batch, and returns (start, dual, momentum) after it and the reads of its tokens."""
    given = jax.tree.map(lambda x: x if x.dtype == bool else x.astype(dtype), given)
    start, dual, momentum = carry
    if (resets := given.resets) is not None:
        start, dual = (tuple(jnp.where(resets, a, b) for a, b in zip(initial, x, strict=True)) for x in (start, dual))
        momentum = jax.tree.map(lambda x: jnp.where(resets, 0, x), momentum)
    weights = tuple(map(link, start))
    inputs, slopes = _gradients(memory, loss, weights, given.key, given.value)
    factors = _factors(given)
    changes = tuple(zip(inputs, slopes, strict=True))

    def linear(i: int, x: Array) -> Array:
        if read == "start":
            return product(x, weights[i])
        if read == "materialize":
            per_slot = partial(jnp.moveaxis, source=-3, destination=0)
            now = per_slot(factors.kept[..., None]) * dual[i]
            if momentum is not None:
                now = now + per_slot(factors.carried[..., None]) * momentum[i]
            now = now - _einsum("...ij,...jk,...jv->i...kv", factors.written, *changes[i])
            if given.row_rate is not None:
                now = start[i] + per_slot(given.row_rate[..., None]) * (now - start[i])
            return _einsum("...ik,i...kv->...iv", x, link(now))
        xs, deltas = changes[i]
        out = factors.kept * product(x, dual[i]) - product(factors.written * product(x, xs.swapaxes(-1, -2)), deltas)
        if momentum is not None:
            out = out + factors.carried * product(x, momentum[i])
        if given.row_rate is not None:
            before = product(x, start[i])
            out = before + given.row_rate * (out - before)
        return out

    out = memory(linear, given.query)

    def learned(step: Array, changes: tuple[Array, Array]) -> Array:
        xs, deltas = changes
        return product((step * xs).swapaxes(-1, -2), deltas)

    def last(x: Array) -> Array:
        return x[..., -1:, :]

    step = last(factors.written).swapaxes(-1, -2)
    dual = tuple(last(factors.kept) * a - learned(step, x) for a, x in zip(dual, changes, strict=True))
    if momentum is not None:
        dual = tuple(a + last(factors.carried) * s for a, s in zip(dual, momentum, strict=True))
        pairs = zip(momentum, changes, strict=True)
        momentum = tuple(factors.through * s - learned(factors.into, x) for s, x in pairs)
    if given.row_rate is not None:
        row = jnp.where(given.completes, given.row_rate[..., size - 1 : size, :], 1)
        dual = tuple(a + row * (b - a) for a, b in zip(start, dual, strict=True))
    start = tuple(jnp.where(given.completes, b, a) for a, b in zip(start, dual, strict=True))
    return (start, dual, momentum), out


def _gradients(
    memory: Memory, loss: InnerLoss, weights: Weights, key: Array, value: Array
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Returns inputs x_j [..., N, P, in] and slopes δ_j [..., N, P, out] per fast weight: ∂ℓ_j/∂W = x_j δ_jᵀ."""

    def tapped(taps: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
        inputs: dict[int, Array] = {}

        def linear(i: int, x: Array) -> Array:
            inputs[i] = x
            return product(x, weights[i]) + taps[i]

        out = memory(linear, key)
        return out, tuple(inputs[i] for i in range(len(weights)))

    taps = tuple(jnp.zeros((*key.shape[:-1], w.shape[-1]), w.dtype) for w in weights)
    taps = vary_like(taps, (key, value, weights))  # or `shard_map` would add their slopes up over the devices
    prediction, pull, inputs = jax.vjp(tapped, taps, has_aux=True)
    return inputs, pull(loss.gradient(prediction, value).astype(prediction.dtype))[0]


def _factors(given: Batch) -> Factors:
    matrix, kept, rate = decay_matrix(given.log_decay), ends(given.log_decay)[0], given.rate.swapaxes(-1, -2)
    if given.log_momentum is None:
        return Factors(kept, matrix * rate, None, None, None)
    # Slots without a token add no momentum to the weights.
    through, after = ends(given.log_momentum)
    written = product(matrix, given.token * decay_matrix(given.log_momentum) * rate)
    carried = product(matrix, given.token * through)
    return Factors(kept, written, carried, through[..., -1:, :], after * given.rate)


def _einsum(subscripts: str, *arrays: Array) -> Array:
    return jnp.einsum(subscripts, *arrays, precision=precision(*arrays))
