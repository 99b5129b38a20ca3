"""Multi-head attention in float64 NumPy, one batch entry, query and head at a time, for the tests of `jaxattn.nn`.

Beside every result stands its *magnitude*: the same sum with every summand replaced by its absolute value. What passes
on an error of its input passes the magnitude on to first order: a score summand of size m is an error of m·ε in the
weight, an angle p·θ one of p·ε in a rotated channel. An algorithm that rounds each step to epsilon has an error of a
few epsilons times the magnitude.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

FACTOR = 20  # epsilons times the magnitude: a handful of roundings in each of four steps
EPS = float(np.finfo(np.float32).eps)


def randomise(module, seed=0, scale=0.3):
    """Adds noise to every parameter: no bias, gain or null logit is left at 0 or 1, where it would do nothing."""
    rng = np.random.default_rng(seed)

    def noisy(leaf):
        return jnp.asarray(np.asarray(leaf) + (scale * rng.standard_normal(leaf.shape)).astype(leaf.dtype))

    nnx.update(module, jax.tree.map(noisy, nnx.state(module, nnx.Param)))
    return module


def assert_close(actual, expected, magnitude=None, factor=FACTOR):
    """|actual − expected| ≤ factor · ε · magnitude; by default the magnitude is the largest |expected| (normwise)."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    magnitude = abs(expected).max() if magnitude is None else magnitude
    assert actual.shape == expected.shape
    error = abs(actual - expected) / (factor * EPS * magnitude + np.finfo(np.float64).tiny)
    assert (error <= 1).all(), f"largest error is {error.max():.3g} times the tolerance"  # also fails for NaN


def linear(layer, x, x_size):
    kernel = np.asarray(layer.kernel[...], np.float64)
    bias = np.zeros(kernel.shape[1]) if layer.bias is None else np.asarray(layer.bias[...], np.float64)
    return x @ kernel + bias, x_size @ abs(kernel) + abs(bias)


def rms_norm(layer, x, x_size):
    gain, square = np.asarray(layer.scale[...], np.float64), (x**2).mean(-1, keepdims=True) + 1e-6
    y = x / np.sqrt(square) * gain
    return y, x_size / np.sqrt(square) * abs(gain) + abs(y) * ((abs(x) * x_size).mean(-1, keepdims=True) / square)


def rotate(x, x_size, positions, base, fraction):
    """Channels i and i + R/2 are the real and imaginary part of a number that is turned by position · base^(−2i/R)."""
    half = round(fraction * x.shape[-1]) // 2
    x, x_size = x.copy(), x_size.copy()
    for b, t, n in np.ndindex(*x.shape[:-1]):
        for i in range(half):
            turn = np.exp(1j * positions[b, t] * float(base) ** (-i / half))
            turned = complex(x[b, t, n, i], x[b, t, n, i + half]) * turn
            x[b, t, n, i], x[b, t, n, i + half] = turned.real, turned.imag
            both = (x_size[b, t, n, i] + x_size[b, t, n, i + half]) * (1 + abs(positions[b, t]))
            x_size[b, t, n, i] = x_size[b, t, n, i + half] = both
    return x, x_size


def multi_head(
    module, x, visible, *, heads, key_heads, head_dim, context=None, positions=None, rotary=None, fraction=1.0,
    qk_norm=False, gate=False, slopes=None, sigmoid=False, null_logit=None,
):  # fmt: skip
    """(y, magnitude) [B, T, D] with the weights of `module`; `visible(query position, key position)`."""
    x = np.asarray(x, np.float64)
    source = x if context is None else np.asarray(context, np.float64)
    batch, length, size = x.shape[0], x.shape[1], source.shape[1]
    positions = np.broadcast_to(np.arange(length) if positions is None else positions, (batch, length))
    key_positions = positions if context is None else np.broadcast_to(np.arange(size), (batch, size))

    def project(layer, x, count):
        return [y.reshape(*y.shape[:-1], count, head_dim) for y in linear(layer, x, abs(x))]

    q, k, v = project(module.query, x, heads), project(module.key, source, key_heads), None
    v, v_size = project(module.value, source, key_heads)
    if qk_norm:
        q, k = rms_norm(module.query_norm, *q), rms_norm(module.key_norm, *k)
    if rotary is not None:
        q, k = rotate(*q, positions, rotary, fraction), rotate(*k, key_positions, rotary, fraction)
    (q, q_size), (k, k_size) = q, k

    z, z_size = np.zeros((2, batch, length, heads, head_dim))
    for b, t, n in np.ndindex(batch, length, heads):
        p, group = positions[b, t], n // (heads // key_heads)
        seen = [s for s, r in enumerate(key_positions[b]) if p >= 0 and r >= 0 and visible(p, r)]
        if not seen:
            continue
        distance = abs(p - key_positions[b, seen])
        bias = 0.0 if slopes is None else -float(slopes[n]) * distance
        scores = k[b, seen, group] @ q[b, t, n] / np.sqrt(head_dim) + bias
        error = 1 + (k_size[b, seen, group] @ q_size[b, t, n] / np.sqrt(head_dim) + abs(bias)).max()
        null = 0.0 if null_logit is None else np.exp(float(null_logit[n]))
        weights = 1 / (1 + np.exp(-scores)) if sigmoid else np.exp(scores) / (np.exp(scores).sum() + null)
        z[b, t, n], z_size[b, t, n] = weights @ v[b, seen, group], weights @ v_size[b, seen, group] * error
    z, z_size = z.reshape(batch, length, -1), z_size.reshape(batch, length, -1)
    if gate:
        g, g_size = linear(module.gate, x, abs(x))
        z, z_size = z / (1 + np.exp(-g)), z_size / (1 + np.exp(-g)) * (1 + g_size)
    return linear(module.out, z, z_size)
