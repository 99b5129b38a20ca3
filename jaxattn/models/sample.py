"""One draw of a token from logits, and the checks of what text a model continues and how."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from jaxattn.core.checks import check_int, check_range


def sample(
    logits: Float[Array, "*b vocabulary"],
    key: Key[Array, ""],
    temperature: float | Array = 1.0,
    top_k: int | Array | None = None,
    top_p: float | Array | None = None,
) -> Int[Array, "*b"]:
    """Draws from softmax(logits / temperature) restricted to likely tokens; temperature 0 is the greedy choice.

    Where the logits hold NaN, or leave no token possible, the result is −1. Tied logits stay or go together.
    Temperature, `top_k` and `top_p` may be scalar arrays: nothing recompiles.

    Args:
        logits: [..., vocabulary].
        key: The key of the draws.
        temperature: The temperature, at least 0.
        top_k: k, from 1 on: the k largest logits are kept.
        top_p: p, above 0 and at most 1: of those the smallest set of largest probabilities that reaches p is kept
            (nucleus sampling, Holtzman et al., 2020), never less than one token.

    Raises:
        TypeError: `top_k` is no integer, or a setting is no number.
        ValueError: A setting is out of range, where it is known.
    """
    _check_settings(temperature, top_k, top_p)
    kept = likely(logits, temperature, top_k, top_p)
    drawn = jax.random.categorical(key, kept)
    return jnp.where(kept.max(-1) == -jnp.inf, -1, drawn).astype(jnp.int32)


def likely(
    logits: Float[Array, "*b vocabulary"],
    temperature: float | Array = 1.0,
    top_k: int | Array | None = None,
    top_p: float | Array | None = None,
) -> Float[Array, "*b vocabulary"]:
    """Returns the logits whose softmax `sample` draws from, −inf for tokens that it does not draw.

    Temperature 0 leaves the first of the largest logits alone. All are −inf where no token can be drawn.
    """
    logits = logits.astype(jnp.float32)
    greedy, largest = logits.argmax(-1), logits.max(-1)
    strange = jnp.isnan(largest) | (largest == -jnp.inf) | ((largest == jnp.inf) & (temperature != 0))
    logits = logits - logits.max(-1, keepdims=True)  # at most 0: no temperature is so small that they overflow to +inf
    logits = logits / jnp.where(temperature == 0, 1.0, temperature)
    order = jnp.sort(logits, axis=-1, descending=True)
    floor = jnp.full(logits.shape[:-1], -jnp.inf)
    if top_k is not None:
        index = jnp.clip(jnp.asarray(top_k) - 1, 0, logits.shape[-1] - 1)
        floor = jnp.take(order, index, axis=-1)
        order = jnp.where(order >= floor[..., None], order, -jnp.inf)
    if top_p is not None:
        probabilities = jax.nn.softmax(order, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = (before < top_p) | (top_p >= 1) | (jnp.arange(order.shape[-1]) == 0)
        floor = jnp.maximum(floor, jnp.where(kept, order, jnp.inf).min(-1))
    one = jnp.where(jnp.arange(logits.shape[-1]) == greedy[..., None], 0.0, -jnp.inf)
    drawn = jnp.where(logits >= floor[..., None], logits, -jnp.inf)
    return jnp.where(strange[..., None], -jnp.inf, jnp.where(temperature == 0, one, drawn))


def _check_kinds(temperature: Any, top_k: Any, top_p: Any) -> None:
    if top_k is not None and not jnp.issubdtype(jnp.result_type(top_k), jnp.integer):
        raise TypeError(f"top_k must be an int, got {top_k!r}")
    for name, x in (("temperature", temperature), ("top_p", top_p)):
        if x is not None and not isinstance(x, int | float | np.number | np.ndarray | jax.Array):
            raise TypeError(f"{name} must be a number, got {x!r}")


def _check_settings(temperature: Any, top_k: Any, top_p: Any) -> None:
    _check_kinds(temperature, top_k, top_p)
    check_range("temperature", temperature, lambda x: x >= 0, "from 0 on")
    check_range("top_k", top_k, lambda x: x >= 1, "from 1 on")
    check_range("top_p", top_p, lambda x: (x > 0) & (x <= 1), "above 0, and at most 1")


def checked_prompts(
    model: Any, prompts: Any, lengths: Any, max_new_tokens: Any
) -> tuple[Int[Array, "b p"], Int[Array, " b"]]:
    """Returns prompts and their lengths as arrays, or raises what `generate` says that it raises for them."""
    if not model.config.causal:
        raise ValueError("model is not causal: only a model whose tokens see no later ones can continue a text")
    if isinstance(prompts, str | bytes):
        raise TypeError(f"prompts is text, {prompts[:20]!r}: need integers [batch, length], as train.encode makes them")
    try:
        prompts = jnp.asarray(np.asarray(prompts) if isinstance(prompts, list | tuple) else prompts)
    except (TypeError, ValueError):
        raise ValueError(
            "prompts is ragged, or holds what is no integer: need integers [batch, length], short rows padded on the "
            "right and `lengths` to tell"
        ) from None
    check_int("max_new_tokens", max_new_tokens)
    if prompts.ndim != 2 or 0 in prompts.shape or not jnp.issubdtype(prompts.dtype, jnp.integer):
        raise ValueError(f"prompts must be integers [batch, length], not empty, got {prompts.dtype}{prompts.shape}")
    batch, length = prompts.shape
    lengths = jnp.full(batch, length, jnp.int32) if lengths is None else jnp.asarray(lengths)
    whole = jnp.issubdtype(lengths.dtype, jnp.integer)
    if not whole or lengths.shape != (batch,) or int(lengths.min()) < 1 or int(lengths.max()) > length:
        raise ValueError(f"lengths must be {batch} numbers from 1 to {length}, got {np.asarray(lengths).tolist()}")
    given = np.asarray(prompts)[np.arange(length) < np.asarray(lengths)[:, None]]
    if given.min() < 0 or given.max() >= model.config.vocabulary:
        raise ValueError(
            f"prompts has tokens from {given.min()} to {given.max()}: need 0 to {model.config.vocabulary - 1}"
        )
    room, longest = model.config.length, int(lengths.max())
    if longest >= room:
        raise ValueError(f"prompts has {longest} tokens: no room for new ones in the model's length of {room}")
    if max_new_tokens < 1 or longest + max_new_tokens > room:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens} after a prompt of {longest}: "
            f"need 1 to {room - longest}, so that both fit the model's length of {room}"
        )
    return prompts, lengths


def check_draws(temperature: Any, top_k: Any, top_p: Any, end_token: Any, vocabulary: int) -> None:
    """Raises what `generate` says that it raises for these settings."""
    if top_k is not None:
        check_int("top_k", top_k)
    check_end_token(end_token, vocabulary)
    _check_kinds(temperature, top_k, top_p)
    if not temperature >= 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(
            f"need temperature >= 0, top_k >= 1 and 0 < top_p <= 1, got {temperature}, {top_k} and {top_p}"
        )


def check_end_token(end_token: Any, vocabulary: int) -> None:
    """Raises TypeError or ValueError if this is no token, and not None."""
    if end_token is not None:
        check_int("end_token", end_token)
        if not 0 <= end_token < vocabulary:
            raise ValueError(f"end_token is {end_token}: need one from 0 to {vocabulary - 1}, or None")


def checked_key(key: Any, temperature: Any) -> Key[Array, ""]:
    """Returns the key of the draws; one that is never looked at where there are none."""
    if key is not None and not _is_key(key):
        raise TypeError(f"key must be a random key such as jax.random.key(0), got {key!r}")
    if key is None and temperature > 0:
        raise ValueError("key is None: need a random key unless temperature is 0")
    return jax.random.key(0) if key is None else key


def _is_key(key: Any) -> bool:
    """Returns whether `key` is one random key, new-style or raw."""
    if not isinstance(key, jax.Array):
        return False
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key.shape == () if typed else key.dtype == jnp.uint32 and key.ndim == 1


def settings_of(temperature: Any, top_k: Any, top_p: Any, end_token: Any) -> tuple[Array | None, ...]:
    """Returns the settings as arrays, with −1 for no end token.

    Each has one dtype, whatever number was given: a temperature of 0 and one of 0.7 run the same program.
    """
    end_token = -1 if end_token is None else end_token
    given = (temperature, jnp.float32), (top_k, jnp.int32), (top_p, jnp.float32), (end_token, jnp.int32)
    return tuple(None if value is None else jnp.asarray(value, dtype) for value, dtype in given)


def check_drawn(lengths: Int[Array, " b"], lost: Bool[Array, " b"]) -> None:
    """Raises FloatingPointError if a sequence has ended since no token could be drawn.

    Args:
        lengths: [B], the number of new tokens.
        lost: [B], which sequences have ended too early.
    """
    if lost.any():
        row = int(lost.argmax())
        raise FloatingPointError(
            f"no token can be drawn after {int(lengths[row])} new tokens of prompt {row}: the logits of the model "
            "are NaN or infinite, as its parameters may be"
        )


def in_evaluation(model: nnx.Module) -> Any:
    """Returns the model with dropout off; the mode of the given one stays."""
    evaluation = nnx.merge(*nnx.split(model))
    evaluation.eval()
    return evaluation
