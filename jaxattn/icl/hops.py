"""Retrieval along a chain: a lookup of a lookup, which needs depth logarithmic in the number of hops."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from jaxattn.core.checks import as_ids, check_static_int
from jaxattn.core.part import part
from jaxattn.icl.prompt import Prompt


@part
class RetrievalChain:
    """The pairs (i, π(i)) of a random permutation of n symbols in random order, a hop token h and a query q: π^h(q)?

    Tokens 0 .. n − 1 are symbols and n − 1 + h is the hop token; T = 2n + 2, and only the last answer counts. `hidden`
    holds h (after Mechanism and Emergence of Stacked Attention Heads, 2024; the layout is ours).

    Attributes:
        symbols: n, the number of symbols.
        hops: The largest number of hops, below n.
        mixed: Whether h is uniform from 1 to `hops`, the implicit curriculum, or always `hops`.
        single_cycle: Whether π is one cycle of all n symbols, so that π^h(q) is never q; else π is uniform.

    Raises:
        ValueError: `hops` is outside 1 .. n − 1.
    """

    symbols: int
    hops: int
    mixed: bool = True
    single_cycle: bool = False

    def __post_init__(self):
        check_static_int("RetrievalChain", "symbols", self.symbols, 2)
        check_static_int("RetrievalChain", "hops", self.hops, 1)
        if self.hops >= self.symbols:
            raise ValueError(f"RetrievalChain: hops is {self.hops} of {self.symbols} symbols: need fewer than symbols")

    @property
    def length(self) -> int:
        return 2 * self.symbols + 2

    def sample(self, key: PRNGKeyArray, batch: int) -> Prompt:
        x, answer, hops = jax.vmap(self._one)(jax.random.split(key, batch))
        last = jnp.arange(x.shape[1]) == x.shape[1] - 1
        y = jnp.where(last, answer[:, None], 0)
        return Prompt(x, y, jnp.broadcast_to(last.astype(float), x.shape), y, hops)

    def _one(self, key: PRNGKeyArray) -> tuple[Int[Array, " t"], Int[Array, ""], Int[Array, ""]]:
        for_map, for_order, for_hops, for_query = jax.random.split(key, 4)
        following = jax.random.permutation(for_map, self.symbols)
        if self.single_cycle:
            following = jnp.zeros_like(following).at[following].set(jnp.roll(following, -1))
        order = jax.random.permutation(for_order, self.symbols)
        hops = jax.random.randint(for_hops, (), 1 if self.mixed else self.hops, self.hops + 1)
        query = jax.random.randint(for_query, (), 0, self.symbols)
        pairs = jnp.stack([order, following[order]], -1).ravel()
        tokens = jnp.concatenate([pairs, jnp.stack([self.symbols - 1 + hops, query])])
        return tokens, _walk(following, query, hops), hops


def _walk(following: Int[Array, " n"], start: Int[Array, ""], hops: Int[Array, ""]) -> Int[Array, ""]:
    """Returns π^h(start)."""
    return jax.lax.fori_loop(0, hops, lambda _, at: following[at], start)


@part
class PointerChasing:
    """Reads the pairs of a `RetrievalChain` of n symbols and follows them h times: always right (other answers: 0).

    The answer is −1, which is no token, to a prompt that holds anything but n pairs of symbols, a hop and a symbol.

    Attributes:
        symbols: n, the number of symbols.
    """

    symbols: int

    def __call__(self, x: Int[Array, "b t"], y: Int[Array, "b t"]) -> Int[Array, "b t"]:
        def answer(tokens: Int[Array, " t"]) -> Int[Array, ""]:
            before, after = tokens[: 2 * self.symbols].reshape(-1, 2).T
            symbols, hops = jnp.append(tokens[: 2 * self.symbols], tokens[-1]), tokens[-2] - self.symbols + 1
            fits = ((symbols >= 0) & (symbols < self.symbols)).all() & (hops > 0)
            found = _walk(jnp.zeros_like(before).at[before].set(after), tokens[-1], jnp.where(fits, hops, 0))
            return jnp.where(fits, found, -1)

        x = as_ids(x)
        return jnp.zeros_like(x).at[:, -1].set(jax.vmap(answer)(x))


@part
class Echo:
    """Answers each token with itself: the shortcut of a `RetrievalChain`, right where the chain comes back to q."""

    def __call__(self, x: Int[Array, "b t"], y: Int[Array, "b t"]) -> Int[Array, "b t"]:
        return x


def echo_accuracy(symbols: int, hops: int) -> float:
    """Returns P(π^h(q) = q) for a uniform permutation of n symbols: the share of 1 .. n that divides h.

    The cycle of a symbol has every length from 1 to n with probability 1/n, and h steps end where they began if the
    length divides h: 1/n for one hop, 2/n for two.

    Args:
        symbols: n, at least 1.
        hops: h, at least 0.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is below its least value.
    """
    check_static_int("echo_accuracy", "symbols", symbols, 1)
    check_static_int("echo_accuracy", "hops", hops, 0)
    return sum(hops % cycle == 0 for cycle in range(1, symbols + 1)) / symbols


def horizon(layers: int) -> int:
    """Returns (3^t − 1) / 2, how far a token can see along a path of links after t layers of attention.

    The reach r_t follows r_{t+1} = 3 r_t + 1. A token that knows the path for r links to both sides reaches a token 2r
    + 1 links away, and inherits the path that it knows. A query of h hops is 2h links from its answer (token to its
    copy, copy to its neighbour), so t layers with no causal mask need horizon(t) ≥ 2h.

    Args:
        layers: t, at least 0.

    Raises:
        TypeError: `layers` is not an int.
        ValueError: `layers` is negative.
    """
    check_static_int("horizon", "layers", layers, 0)
    return (3**layers - 1) // 2
