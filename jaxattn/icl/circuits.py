"""One layer of attention with weights written by hand that adds, counts, sorts, measures depth, or takes parities.

The stream holds [features of the token | position, one-hot]. Heads read it, and a position-wise map finishes. Scores
are 0 or beta, so that with a large beta a head is uniform over the places where they are beta.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxattn.core.attend.mask import Causal
from jaxattn.core.checks import as_ids, check_static_int
from jaxattn.core.merged import SoftmaxHeads
from jaxattn.core.part import part
from jaxattn.icl.fourier import check_frequencies


@part
class OneLayerCircuit:
    """y_t = finish(read_t, t), with what softmax heads read of [table[token] | position].

    Attributes:
        heads: The heads.
        table: [V, E], features of tokens.
        finish: A part, finish(read [..., T, M], positions [T]) -> [..., T] or [..., T, C].
        causal: Whether a token sees only itself and those before it.
    """

    heads: SoftmaxHeads
    table: Float[Array, "v e"]
    finish: Any
    causal: bool = True

    def stream(self, tokens: Int[Array, "*b t"]) -> Float[Array, "*b t d"]:
        """Returns what the heads read. Tokens outside the vocabulary are NaN.

        Raises:
            ValueError: The sequence has more tokens than the circuit has positions.
        """
        length = self.heads.kq.shape[1] - self.table.shape[1]
        if tokens.shape[-1] > length:
            raise ValueError(f"tokens has {tokens.shape[-1]} positions: need at most {length}")
        tokens = as_ids(tokens)
        inside = (tokens >= 0) & (tokens < len(self.table))
        features = jnp.where(inside[..., None], self.table[jnp.where(inside, tokens, 0)], jnp.nan)
        places = jnp.broadcast_to(jnp.eye(length)[: tokens.shape[-1]], (*tokens.shape, length))
        return jnp.concatenate([features, places], -1)

    def __call__(self, tokens: Int[Array, "*b t"]) -> Float[Array, "..."]:
        """Returns the answer at every token, [..., T] or [..., T, C]."""
        z = self.stream(tokens)
        return self.finish(self.heads(z, z, mask=self._mask), jnp.arange(tokens.shape[-1]))

    def weights(self, tokens: Int[Array, "*b t"]) -> Float[Array, "*b h t t"]:
        """Returns the attention weights."""
        z = self.stream(tokens)
        return self.heads.weights(z, z, mask=self._mask)

    @property
    def _mask(self) -> Causal | None:
        return Causal() if self.causal else None


@part
class _Clock:
    """cos and sin of the sum of two angles, by a product of what two heads read; then logits by `unembed` [C, 2K]."""

    unembed: Float[Array, "c f"]

    def __call__(self, read, positions):
        cos_a, sin_a, cos_b, sin_b = jnp.split(read, 4, -1)
        both = jnp.concatenate([cos_a * cos_b - sin_a * sin_b, sin_a * cos_b + cos_a * sin_b], -1)
        return both @ self.unembed.T


@part
class _OthersPerFirst:
    """1 / w − 1: with equal weights on the first token and on c others, c."""

    def __call__(self, read, positions):
        return 1 / read[..., 0] - 1


@part
class _Sum:
    """(t + 1) · mean: the sum of what was seen."""

    def __call__(self, read, positions):
        return read[..., 0] * (positions + 1)


@part
class _Unequal:
    """4 m (1 − m): 1 where the mean of two bits is 1/2, else 0."""

    def __call__(self, read, positions):
        return 4 * read[..., 0] * (1 - read[..., 0])


@part
class _Quantile:
    """The least letter whose cumulative share is above (t − n + 1/2) / n, n letters being in the string."""

    string: int

    def __call__(self, read, positions):
        reached = jnp.cumsum(read, -1) * self.string > (positions - self.string + 0.5)[:, None]
        return (~reached).sum(-1)


def adding_circuit(modulus: int, frequencies: Sequence[int], beta: Float[Array, ""] | float = 50.0) -> OneLayerCircuit:
    """Two heads that add a and b mod p, read at the last of the tokens a b =, with the logits of `fourier_logits`.

    Numbers are embedded as cos and sin of 2π k a / p. Head 1 attends to a, head 2 to b, and the product of what they
    read turns one angle by the other, as a network does that has grokked the task (Nanda et al., 2023).

    Args:
        modulus: p, at least 2.
        frequencies: The k, each from 1 to p / 2.
        beta: The score.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is out of range, or there is no frequency.
    """
    check_frequencies("adding_circuit", modulus, frequencies)
    angle = 2 * jnp.pi / modulus * jnp.asarray(np.outer(np.arange(modulus), frequencies) % modulus)
    numbers = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)
    width = numbers.shape[1]
    kq, ov = jnp.zeros((2, width + 3, width + 3)), jnp.zeros((2, 2 * width, width + 3))
    for head in range(2):
        kq = kq.at[head, width + head, width:].set(beta)
        ov = ov.at[head, head * width : (head + 1) * width, :width].set(jnp.eye(width))
    return OneLayerCircuit(SoftmaxHeads(kq, ov), jnp.pad(numbers, ((0, 1), (0, 0))), _Clock(numbers))


def counting_circuit(
    letters: int, length: int, beta: Float[Array, ""] | float = 50.0, *, causal: bool = True
) -> OneLayerCircuit:
    """One head that counts how often a letter occurs, in the layout of `Histogram` (Weiss et al., 2021).

    It attends with the score beta to copies of its own token and to the first token, and reads 1 from the first alone:
    with c copies that is w = 1 / (c + 1), and 1 / w − 1 is the count.

    Args:
        letters: The number of letters, at least 1; the token after them is the first.
        length: The number of positions, at least 1.
        beta: The score.
        causal: Whether only the letters so far are counted.

    Raises:
        TypeError: A size is not an int.
        ValueError: A size is below 1.
    """
    check_static_int("counting_circuit", "letters", letters, 1)
    check_static_int("counting_circuit", "length", length, 1)
    width, first = letters + 1 + length, letters
    same = jnp.zeros((width, width)).at[: letters + 1, : letters + 1].set(beta * jnp.eye(letters + 1))
    kq = same.at[first, : letters + 1].set(beta)
    ov = jnp.zeros((1, 1, width)).at[0, 0, first].set(1)
    return OneLayerCircuit(SoftmaxHeads(kq[None], ov), jnp.eye(letters + 1), _OthersPerFirst(), causal)


def sorting_circuit(letters: int, string: int, beta: Float[Array, ""] | float = 50.0) -> OneLayerCircuit:
    """One head that is uniform over the string of a `Sorting`, and reads how often each letter occurs.

    Place i has the least letter whose cumulative share of the string is above (i + 1/2) / n.

    Args:
        letters: The number of letters, at least 1; the token after them is the mark.
        string: n, at least 1.
        beta: The score.

    Raises:
        TypeError: A size is not an int.
        ValueError: A size is below 1.
    """
    check_static_int("sorting_circuit", "letters", letters, 1)
    check_static_int("sorting_circuit", "string", string, 1)
    width = letters + 1 + 2 * string
    places = letters + 1 + jnp.arange(2 * string)
    kq = jnp.zeros((1, width, width)).at[0, places[:string, None], places].set(beta)
    ov = jnp.zeros((1, letters, width)).at[0, jnp.arange(letters), jnp.arange(letters)].set(1)
    return OneLayerCircuit(SoftmaxHeads(kq, ov), jnp.eye(letters + 1), _Quantile(string))


def depth_circuit(kinds: int, length: int) -> OneLayerCircuit:
    """One head that measures how many brackets of a `Dyck` are open: uniform attention to +1 and −1.

    The mean over t + 1 tokens times t + 1 is the depth (Yao et al., 2021).

    Args:
        kinds: The kinds of brackets, at least 1.
        length: The number of positions, at least 1.

    Raises:
        TypeError: A size is not an int.
        ValueError: A size is below 1.
    """
    check_static_int("depth_circuit", "kinds", kinds, 1)
    check_static_int("depth_circuit", "length", length, 1)
    table = jnp.repeat(jnp.array([1.0, -1.0, 0.0]), jnp.array([kinds, kinds, 1]))[:, None]
    ov = jnp.zeros((1, 1, 1 + length)).at[0, 0, 0].set(1)
    return OneLayerCircuit(SoftmaxHeads(jnp.zeros((1, 1 + length, 1 + length)), ov), table, _Sum())


def parity_circuit(length: int, beta: Float[Array, ""] | float = 50.0) -> OneLayerCircuit:
    """One head that continues the interleaved format of `BitParity`: it is uniform over the offsets 0 and −1.

    The mean m of b_i and p_{i−1} is 1/2 where they differ, so p_i = 4 m (1 − m). At other tokens than bits the answer
    has no meaning.

    Args:
        length: The number of positions, at least 1.
        beta: The score.

    Raises:
        TypeError: `length` is not an int.
        ValueError: `length` is below 1.
    """
    check_static_int("parity_circuit", "length", length, 1)
    kq = jnp.pad(beta * (jnp.eye(length) + jnp.eye(length, k=1)), ((1, 0), (1, 0)))
    ov = jnp.zeros((1, 1, 1 + length)).at[0, 0, 0].set(1)
    table = jnp.array([0.0, 1, 0, 0, 0])[:, None]
    return OneLayerCircuit(SoftmaxHeads(kq[None], ov), table, _Unequal())
