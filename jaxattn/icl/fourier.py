"""Modular addition by Fourier features: the logits that it gives, and how much of given logits and tables it explains.

A network that has grokked addition mod p keeps few frequencies k of the embedding, and its logits are sums of
cos(2π k (a + b − c) / p) (Nanda et al., 2023; Gromov, 2023).
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxattn.core.checks import check_static_int


def fourier_logits(modulus: int, frequencies: Sequence[int]) -> Float[Array, "p p p"]:
    """Returns L[a, b, c] = Σ_k cos(2π k (a + b − c) / p), largest at c = (a + b) mod p.

    With all k from 1 to (p − 1) / 2 of an odd p it is (p − 1) / 2 there and −1/2 elsewhere. Other c tie with the right
    one if all the k and p have a common divisor.

    Args:
        modulus: p, at least 2.
        frequencies: The k, each from 1 to p / 2.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is out of range, or there is no frequency.
    """
    check_frequencies("fourier_logits", modulus, frequencies)
    number = np.arange(modulus)
    apart = (number[:, None, None] + number[:, None] - number) % modulus
    of_difference = jnp.cos(2 * jnp.pi / modulus * jnp.asarray(np.outer(frequencies, number) % modulus)).sum(0)
    return of_difference[apart]


def check_frequencies(owner: str, modulus: int, frequencies: Sequence[int]) -> None:
    """Raises unless the frequencies are those of a table of p numbers, without the constant."""
    check_static_int(owner, "modulus", modulus, 2)
    for k in frequencies:
        check_static_int(owner, "frequencies", k, 1)
    if not len(frequencies) or max(frequencies) > modulus // 2:
        raise ValueError(f"{owner}: frequencies is {tuple(frequencies)}: need some from 1 to {modulus // 2}")


def trigonometric_shares(logits: Float[Array, "p p p"]) -> Float[Array, " k"]:
    """Returns for k = 1 .. ⌊p/2⌋ the share of the squared size of logits that is along cos(2π k (a + b − c) / p).

        s_k = ⟨L, u_k⟩² / (‖u_k‖² ‖L‖²),   u_k[a, b, c] = cos(2π k (a + b − c) / p)

    L has the mean over c taken away, which a softmax does not see. The u_k are orthogonal, so the sum of shares, at
    most 1, is what the trigonometric form explains. Logits that are all equal have shares of 0.

    Args:
        logits: L [a, b, c], of all pairs.

    Raises:
        ValueError: The axes are not of one size, 2 or more.
    """
    size = logits.shape[0] if logits.ndim == 3 else 0
    if logits.shape != (size,) * 3 or size < 2:
        raise ValueError(f"logits has shape {logits.shape}: need [p, p, p], p at least 2")
    logits = logits - logits.mean(-1, keepdims=True)
    number = np.arange(size)
    answers = (number[:, None, None] + number[:, None] - number) % size  # c at which a + b − c is the last axis
    by_difference = jnp.take_along_axis(logits, jnp.asarray(answers), -1).sum((0, 1))
    waves = np.cos(2 * np.pi / size * (np.outer(np.arange(1, size // 2 + 1), number) % size))
    along = (jnp.asarray(waves, logits.dtype) @ by_difference) ** 2 / (size**2 * (waves**2).sum(-1))
    total = (logits**2).sum()
    return jnp.where(total > 0, along / jnp.where(total > 0, total, 1), 0)


def fourier_shares(table: Float[Array, "p d"]) -> Float[Array, " k"]:
    """Returns for k = 1 .. ⌊p/2⌋ the share of frequency k in the squared size of a table over numbers mod p.

    The mean over the numbers, frequency 0, is left out of the whole. Shares sum to 1, or are 0 for a constant table.

    Args:
        table: [p, D], such as the embedding of the numbers.

    Raises:
        ValueError: There are fewer than 2 numbers.
    """
    if table.ndim != 2 or len(table) < 2:
        raise ValueError(f"table has shape {table.shape}: need [p, D], p at least 2")
    power = (jnp.abs(jnp.fft.rfft(table, axis=0)) ** 2).sum(-1)[1:]
    twice = jnp.arange(1, len(power) + 1) * 2 != len(table)  # k and p − k, but for k = p / 2
    power = jnp.where(twice, 2, 1) * power
    total = power.sum()
    return jnp.where(total > 0, power / jnp.where(total > 0, total, 1), 0)
