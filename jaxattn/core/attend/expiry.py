"""Tokens that expire: each is seen up to a position of its own, and which one is learned (Neural Attention Search).

A token has one of three types: GLOBAL is seen for ever, LOCAL up to the next global token, which still sees it, and
WINDOW by a number of tokens after it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxattn.core.attend.mask import Mask, every_slot, tile_range
from jaxattn.core.attend.normalize import Normalize, safe_log
from jaxattn.core.checks import check_static_int
from jaxattn.core.numeric import ratio
from jaxattn.core.part import part
from jaxattn.core.table import take, take_pairs

GLOBAL: int = 0
"""The type of a token that is seen for ever."""

LOCAL: int = 1
"""The type of a token that is seen up to the next global one."""

WINDOW: int = 2
"""The type of a token that is seen for as many steps as the window has."""

NEVER: int = int(np.iinfo(np.int32).max)
"""The last position that sees a token which does not expire."""


OPEN: int = NEVER - 1
"""What stands for the last position that sees a local token, as long as no global token has come after it."""


def open_expiry(
    types: Int[Array, "*b t"], positions: Int[Array, "*#b t"], window: Int[Array, ""] | int
) -> Int[Array, "*b t"]:
    """Returns the last position that sees each token, as far as it is known when the token comes.

        GLOBAL: NEVER,   LOCAL: OPEN, up to a global token to come,   WINDOW: position + window

    Args:
        types: [..., T] of GLOBAL, LOCAL and WINDOW.
        positions: [..., T], where the tokens stand.
        window: The number of later tokens that see a token of type WINDOW, at least 0.
    """
    of_window = jnp.where(types == LOCAL, OPEN, jnp.asarray(positions) + window)
    return jnp.where(types == GLOBAL, NEVER, of_window).astype(jnp.int32)


def closed_expiry(expires: Int[Array, "*b t"]) -> Int[Array, "*b t"]:
    """Returns the last position that sees each token, `NEVER` for those that no later token ends.

    Args:
        expires: [..., T], as from `open_expiry`, of the tokens at positions 0..T−1.
    """
    places = jnp.arange(expires.shape[-1], dtype=jnp.int32)
    of_global = jnp.where(expires == NEVER, places, NEVER)
    following = jnp.concatenate([of_global[..., 1:], jnp.full_like(of_global[..., :1], NEVER)], -1)
    following = jax.lax.cummin(following, axis=expires.ndim - 1, reverse=True)
    return jnp.where(expires == OPEN, following, expires)


def token_expiry(types: Int[Array, "*b t"], window: int) -> Int[Array, "*b t"]:
    """Returns the last position that sees each token, `NEVER` for those that do not expire.

        GLOBAL: NEVER,   LOCAL: the position of the next global token,   WINDOW: j + window

    A local token without a global one after it does not expire yet: its number changes when that token comes.

    Args:
        types: [..., T] of GLOBAL, LOCAL and WINDOW, of the tokens at positions 0..T−1.
        window: The number of later tokens that see a token of type WINDOW, at least 0.

    Raises:
        TypeError: `window` is not an int.
        ValueError: `window` is negative.
    """
    check_static_int("token_expiry", "window", window, 0)
    types = jnp.asarray(types)
    return closed_expiry(open_expiry(types, jnp.arange(types.shape[-1], dtype=jnp.int32), window))


@part
class Expires(Mask):
    """Shows a key to the queries from its own position to the last that sees it: key ≤ query ≤ last[key].

    `Expires(token_expiry(types, window))` is the attention of Neural Attention Search (2025). A key is in no tile after
    its last query, so whoever keeps a cache may drop it there.

    Attributes:
        last: Integers [..., N, P] or [P], the last position that sees the key of each position. An axis of size 1 is
            shared by all heads or batch entries. Positions outside the table are not seen.
    """

    last: Int[Array, "*batch heads positions"] | Int[Array, " positions"]

    def _of(self, key: Any, grid: int) -> Any:
        last = jnp.asarray(self.last)
        return take(last.reshape((1,) * (2 - last.ndim) + last.shape), key, grid, fill=-1)

    def __call__(self, query, key):
        return (key <= query) & (query <= self._of(key, 2))

    def bounds(self, query, key):
        (first, last), (first_key, last_key) = tile_range(query), tile_range(key)
        expiry = self._of(key, 3)
        latest = jnp.where(key >= 0, expiry, -1).max(-1)
        possible = (first_key <= last) & (first <= latest)
        return possible, (last_key <= first) & every_slot(key, expiry >= last[..., None])

    def describe(self):
        return "from the key to the last position that sees it"


def _check_types(name: str, x: Any) -> None:
    """Raises ValueError if x is not [..., T, 3]."""
    if x.shape[-1] != 3 or x.ndim < 2:
        raise ValueError(f"{name} has shape {x.shape}: need [..., T, 3], of the types global, local and window")


def choose_types(
    logits: Float[Array, "*b t 3"], key: Any = None, *, temperature: float = 1.0
) -> Float[Array, "*b t 3"]:
    """Returns one type per token as a one-hot vector, with the gradient of a soft choice.

    With a random key the choice is drawn: the largest of logits + Gumbel noise, with the gradient of softmax((logits +
    noise) / temperature), and the first and the last token are global. Without one it is the largest logit, and the
    first token is global.

    Args:
        logits: [..., T, 3], of GLOBAL, LOCAL and WINDOW.
        key: A random key, for training.
        temperature: The temperature of the soft choice, above 0.

    Raises:
        ValueError: The logits are not of three types, or the temperature is not positive.
    """
    _check_types("logits", logits)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if key is not None:
        logits = logits + jax.random.gumbel(key, logits.shape, logits.dtype)
    soft = jax.nn.softmax(logits / temperature, -1)
    hard = jax.nn.one_hot(logits.argmax(-1), 3, dtype=soft.dtype)
    chosen = hard + (soft - jax.lax.stop_gradient(soft))
    places = jnp.arange(logits.shape[-2])[:, None]
    forced = (places == 0) | ((places == logits.shape[-2] - 1) & (key is not None))
    return jnp.where(forced, jax.nn.one_hot(GLOBAL, 3, dtype=soft.dtype), chosen)


def type_gates(choice: Float[Array, "*b t 3"], window: int) -> Float[Array, "*b t t"]:
    """Returns M_ij, how far query i sees key j under choices (G, L, S) of types; it is differentiable in the choices.

        M_ij = G_j + L_j Π_{j<m<i} (1 − G_m) + S_j [i − j ≤ window]   for j ≤ i, else 0

    For one-hot choices it is the mask `Expires(token_expiry(types, window))` as 0 and 1.

    Args:
        choice: [..., T, 3], as from `choose_types`.
        window: As of `token_expiry`.

    Raises:
        TypeError: `window` is not an int.
        ValueError: `window` is negative, or there are not three types.
    """
    check_static_int("type_gates", "window", window, 0)
    _check_types("choice", choice)
    is_global, is_local, in_window = jnp.moveaxis(choice, -1, 0)
    length = choice.shape[-2]
    places = jnp.arange(length)

    def row(alive: Array, i: Array) -> tuple[Array, Array]:
        """From Π over m < i to that over m < i + 1, for all keys before i."""
        closes = jnp.take(is_global, i, -1)[..., None]
        return jnp.where(places < i, alive * (1 - closes), alive), alive

    _, alive = jax.lax.scan(row, jnp.ones_like(is_global), places)
    behind = places[:, None] - places
    seen = is_global[..., None, :] + is_local[..., None, :] * jnp.moveaxis(alive, 0, -2)
    seen = seen + in_window[..., None, :] * (behind <= window)
    return jnp.where(behind >= 0, seen, 0)


def lifetime_pressure(choice: Float[Array, "*b t 3"]) -> Float[Array, "*b"]:
    """Returns Σ_j lifetime_j / T of the chosen types, with a gradient in the chosen entries alone.

    The lifetime of a global token at j is T − j, and that of a local one is the distance to the next global token, or
    to T − 1 if there is none. Windows cost nothing. Its gradient times λ is what the paper adds to that of the loss:
    add λ · `lifetime_pressure(choice)` to the loss.

    Args:
        choice: [..., T, 3], one-hot, as from `choose_types`.

    Raises:
        ValueError: There are not three types.
    """
    _check_types("choice", choice)
    length = choice.shape[-2]
    hard = jax.lax.stop_gradient(choice)
    places = jnp.arange(length)
    closes = jnp.minimum(token_expiry(hard.argmax(-1), 0), length - 1)
    costs = jnp.stack([jnp.broadcast_to(length - places, closes.shape), closes - places, jnp.zeros_like(closes)], -1)
    return (costs * hard * choice).sum((-1, -2)) / length


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def pressed(choice: Float[Array, "*b t 3"], strength: float) -> Float[Array, "*b t 3"]:
    """Returns the choice as it is, and adds strength · ∂ `lifetime_pressure` / ∂ choice to its gradient.

    So the pressure on lifetimes needs no place in a loss: it acts as if strength · Σ `lifetime_pressure(choice)` were
    added to whatever is differentiated. The paper adds it in the backward pass too.

    Args:
        choice: [..., T, 3], one-hot, as from `choose_types`.
        strength: λ, the price of one token that is kept for the whole length.
    """
    return choice


def _pressed_forward(choice: Array, strength: float) -> tuple[Array, Array]:
    return choice, choice


def _pressed_backward(strength: float, choice: Array, slope: Array) -> tuple[Array]:
    of_lifetimes = jax.grad(lambda choice: lifetime_pressure(choice).sum())(choice)
    return (slope + strength * of_lifetimes,)


pressed.defvjp(_pressed_forward, _pressed_backward)


@part
class GatedSoftmax(Normalize):
    """weight_ij = M_ij exp(s_ij) / Σ_k M_ik exp(s_ik): softmax over keys that are there in part.

        lse = log Σ_j M_ij exp(s_ij),   ∂ weight_ij / ∂ M_ij = p̃_ij (1 − weight_ij),   p̃_ij = exp(s_ij − lse_i)

    Gates of 0 have a gradient, by which a key that is not seen can come back; there p̃ is at most 1, since a hidden
    score may be larger than all others (Neural Attention Search, 2025). Gates of 1 are softmax.

    Attributes:
        gates: M ≥ 0, [..., N, P, R], by position of query and key, such as `type_gates` of each head. An axis of size 1
            is shared by heads or batch entries. Pairs outside have 0. Its memory is quadratic in length.
    """

    gates: Float[Array, "*batch heads p r"]

    def weights(self, scores, tile):
        gates = take_pairs(jnp.asarray(self.gates), tile.query, tile.key, 2, 0)
        gates = jnp.where(tile.visible, gates, 0).astype(scores.dtype)
        return _gated(jnp.where(tile.visible, scores, 0), gates)


@jax.custom_jvp
def _gated(scores: Array, gates: Array) -> tuple[Array, Array]:
    open_ = gates > 0
    top = jnp.where(open_, scores, -jnp.inf).max(-1, keepdims=True)
    top = jnp.where(jnp.isneginf(top), 0, top)
    mass = jnp.where(open_, gates * jnp.exp(jnp.where(open_, scores - top, 0)), 0)
    total = mass.sum(-1, keepdims=True)
    return ratio(mass, total), (safe_log(total) + top)[..., 0]


@_gated.defjvp
def _gated_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Any, Any]:
    (scores, gates), (d_scores, d_gates) = primals, tangents
    weights, lse = _gated(scores, gates)
    some = jnp.isfinite(lse)[..., None]
    hidden = jnp.exp(jnp.minimum(scores - jnp.where(some, lse[..., None], 0), 0))  # at most 1
    per_gate = jnp.where(some, jnp.where(gates > 0, ratio(weights, gates), hidden), 0)
    change = weights * d_scores + per_gate * d_gates
    total = change.sum(-1, keepdims=True)
    return (weights, lse), (change - weights * total, total[..., 0])
