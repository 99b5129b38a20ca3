"""Histories of attention to pages, and forecasts that are fitted to them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Int

from jaxattn.core.attend.measure import BlockMax
from jaxattn.core.checks import check_static_int
from jaxattn.models.sample import in_evaluation
from jaxattn.nn.learned import AttentionForecast


def attention_history(
    model: Any, tokens: Int[ArrayLike, "b t"], size: int = 16
) -> Float[Array, "layers b n t p"] | list[Float[Array, "b n t p"]]:
    """Returns the largest weight in each page of `size` tokens, of every query of every head: [L, B, N, T, P].

    The result is a list by layer where layers differ. Dropout is off.
    """
    tokens = jnp.asarray(tokens)
    record = {"history": ("weights", BlockMax(size, -(-tokens.shape[1] // size)))}
    found = nnx.jit(lambda m, x: m(x, record=record)[2])(in_evaluation(model), tokens)["history"]
    return jax.tree.map(lambda x: x.swapaxes(-2, -3), found)


def fit_forecast(
    module: AttentionForecast,
    histories: Float[ArrayLike, "*m t p"],
    *,
    window: int = 64,
    steps: int = 500,
    batch: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> Float[np.ndarray, " steps"]:
    """Fits the forecast to histories, in place: mean squared error of the next row, given the `window` rows before.

    Each step of Adam draws `batch` histories, and a place in each.

    Args:
        module: The owner of the forecast.
        histories: [..., T, P], as from `attention_history`, with T above `window`.
        window: R, the number of rows that a forecast sees: `steps` of `cache.Forecasted`.
        steps: The number of updates.
        batch: The number of windows per update.
        learning_rate: That of Adam.
        seed: The seed of the windows.

    Returns:
        The loss before each update.

    Raises:
        TypeError or ValueError: A number is below 1, or the histories are too short.
    """
    for name, number in (("window", window), ("steps", steps), ("batch", batch)):
        check_static_int("fit_forecast", name, number, 1)
    rows = jnp.asarray(histories)
    rows = rows.reshape(-1, *rows.shape[-2:])
    if rows.shape[1] <= window:
        raise ValueError(f"histories have {rows.shape[1]} rows: need more than the window, {window}")
    graph, arrays = nnx.split(module)
    optimizer = optax.adam(learning_rate)

    def loss(arrays: Any, key: Array) -> Array:
        which, first = jax.random.split(key)
        which = jax.random.randint(which, (batch,), 0, len(rows))
        first = jax.random.randint(first, (batch,), 0, rows.shape[1] - window)
        seen = rows[which[:, None], first[:, None] + jnp.arange(window + 1)]
        found = nnx.merge(graph, arrays)()(seen[:, :-1])
        return ((found - seen[:, -1]) ** 2).mean()

    @jax.jit
    def fitted(arrays: Any) -> Any:
        def update(carry: Any, key: Array) -> Any:
            arrays, state = carry
            value, gradient = jax.value_and_grad(loss)(arrays, key)
            updates, state = optimizer.update(gradient, state, arrays)
            return (optax.apply_updates(arrays, updates), state), value

        keys = jax.random.split(jax.random.key(seed), steps)
        (arrays, _), values = jax.lax.scan(update, (arrays, optimizer.init(arrays)), keys)
        return arrays, values

    arrays, values = fitted(arrays)
    nnx.update(module, arrays)
    return np.asarray(values)
