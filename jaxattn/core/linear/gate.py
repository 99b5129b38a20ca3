"""Gates: log decays of memories, always at most 0, from the outputs of a network.

Each function keeps a sum or a softplus where the plain formula would take the log of a number near 0 or 1.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxattn.core.checks import check_range


def retention(heads: int) -> Float[Array, " n"]:
    """Returns log(1 − 2^(−5−n)) for head n: memories of some 32, 64, 128, ... tokens. RetNet (Sun et al., 2023)."""
    return jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(heads))))


def softplus_decay(a_log: Float[Array, "..."], step: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns −exp(a_log) softplus(step), the decay of a state-space model with A = −exp(a_log) in time softplus(step).

    Mamba (Gu & Dao, 2023), Mamba-2 (Dao & Gu, 2024) and gated delta networks (Yang et al., 2024) use it. With a_log = 0
    it is log σ(−step).
    """
    return -jnp.exp(a_log) * jax.nn.softplus(step)


def bounded_decay(x: Float[Array, "..."], floor: Float[Array, "..."] | float) -> Float[Array, "..."]:
    """Returns floor σ(x), between floor and 0: −e^{−1/2} in RWKV-7 (Peng et al., 2025), −5 in Kimi Linear (2025).

    Args:
        x: The logits.
        floor: The lower bound, below 0.

    Raises:
        ValueError: `floor` is not below 0.
    """
    check_range("floor", floor, lambda x: x < 0, "below 0")
    return floor * jax.nn.sigmoid(x)


def lower_bounded_decay(x: Float[Array, "..."], bound: Float[Array, "..."] | float) -> Float[Array, "..."]:
    """Returns log(γ + (1 − γ) σ(x)) for the lower bound γ of the forget gate. HGRN-2 (Qin et al., 2024).

    Args:
        x: The logits.
        bound: γ in [0, 1).

    Raises:
        ValueError: `bound` is outside that range.
    """
    check_range("bound", bound, lambda x: (x >= 0) & (x < 1), "from 0 to below 1")
    bound = jnp.asarray(bound, jnp.result_type(x))
    safe = jnp.where(bound > 0, bound, 1)
    log_bound = jnp.where(bound > 0, jnp.log(safe), -jnp.inf)
    return jnp.minimum(jnp.logaddexp(log_bound, jnp.log1p(-bound) + jax.nn.log_sigmoid(x)), 0)


@jax.jit
def running_softmax(
    scores: Float[Array, "*b t n l"],
    before: Float[Array, "*b n l"] | None = None,
    starts: Bool[Array, "*#b t"] | None = None,
) -> tuple[Float[Array, "*b t n l"], Float[Array, "*b t n l"], Float[Array, "*b n l"]]:
    """Computes a softmax over all tokens so far, per latent, as a decaying memory. Latte (Dolga et al., 2024).

        z_t = log Σ_{s ≤ t} exp(a_s),   key_t = exp(a_t − z_t),   log_decay_t = z_{t−1} − z_t,   after = z_T

    Linear attention of key and log_decay then reads Σ_s exp(a_s) v_s / Σ_s exp(a_s). The sum is never made, and no
    exponent is positive.

    Args:
        scores: a [..., T, N, L]. A score of −inf is a token that is not there.
        before: The `after` of earlier tokens, [..., N, L].
        starts: Booleans [..., T] that mark tokens which begin a new sequence.

    Returns:
        A triple (key, log_decay, after).
    """
    first = jnp.full_like(scores[..., 0, :, :], -jnp.inf) if before is None else before.astype(scores.dtype)
    reset = jnp.zeros(scores.shape[:-2], bool) if starts is None else jnp.broadcast_to(starts, scores.shape[:-2])
    entries = jnp.concatenate([first[..., None, :, :], scores], -3)
    resets = jnp.concatenate([jnp.zeros_like(reset[..., :1]), reset], -1)[..., None, None]

    def join(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        return _logaddexp(jnp.where(right[1], -jnp.inf, left[0]), right[0]), left[1] | right[1]

    total, _ = jax.lax.associative_scan(join, (entries, resets), axis=scores.ndim - 3)
    last, total = total[..., :-1, :, :], total[..., 1:, :, :]
    last = jnp.where(resets[..., 1:, :, :], -jnp.inf, last)
    some = jnp.isfinite(total)
    finite = jnp.where(some, total, 0)
    key = jnp.exp(jnp.where(some, jnp.minimum(scores - finite, 0), -jnp.inf))
    kept = jnp.isfinite(last)
    log_decay = jnp.where(kept, jnp.minimum(jnp.where(kept, last, 0) - finite, 0), jnp.where(some, -jnp.inf, 0.0))
    return key, log_decay, total[..., -1, :, :]


def _logaddexp(a: Array, b: Array) -> Array:
    """Returns log(e^a + e^b) with derivatives that are finite where both are −inf."""
    top = jax.lax.stop_gradient(jnp.maximum(a, b))
    top = jnp.where(jnp.isfinite(top), top, 0)
    total = jnp.exp(a - top) + jnp.exp(b - top)
    some = total > 0
    return jnp.where(some, jnp.log(jnp.where(some, total, 1)) + top, -jnp.inf)


def inverse_softplus(x: Float[Array, "..."] | float) -> Float[Array, "..."]:
    """Returns log(e^x − 1) for x > 0: the bias for which softplus starts at x.

    Raises:
        ValueError: x is not positive.
    """
    check_range("x", x, lambda x: x > 0, "above 0")
    return x + jnp.log(-jnp.expm1(-jnp.asarray(x, float)))
