"""Generation: prefill, then one compiled loop of sampling and decoding."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Int, Key

from jaxattn.cache import Policy
from jaxattn.core.checks import check_int, check_range
from jaxattn.core.mesh import Axes, under_auto_axes
from jaxattn.core.part import part
from jaxattn.models.transformer import Transformer
from jaxattn.nn.tap import as_records, site_of

AT_END = {"final_norm_scale", "final_norm", "logits"}  # the sites behind the last layer


@part
class Generation:
    """The result of `generate`.

    Attributes:
        tokens: [B, M], the new tokens; −1 after the end of a sequence.
        lengths: [B], how many of them each sequence has, its end token included.
        records: Name -> [M, ...], the record made when each new token was read; 0 after all sequences have ended.
        prompt_records: Name -> the record made when the prompts were read.
    """

    tokens: Int[Array, "b m"]
    lengths: Int[Array, " b"]
    records: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prompt_records: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Processor(abc.ABC):
    """The base class of parts that change logits before a token is drawn from them."""

    @abc.abstractmethod
    def __call__(self, logits: Float[Array, "b vocabulary"], tokens: Int[Array, "b p"]) -> Float[Array, "b vocabulary"]:
        """Returns the logits to draw from.

        Args:
            logits: [B, vocabulary].
            tokens: [B, P], the tokens so far by position, prompt first; −1 where there is none yet.
        """


class Combine(abc.ABC):
    """The base class of parts that make one draw of several runs."""

    @abc.abstractmethod
    def __call__(self, logits: Float[Array, "r b vocabulary"]) -> Float[Array, "b vocabulary"]:
        """Returns the logits to draw from, from those of R runs that have read the same tokens."""


@part
class MinimumLength(Processor):
    """The end token is not drawn before a sequence has this many tokens, its prompt included.

    Attributes:
        end_token: The id of the end token.
        length: The number of tokens.
    """

    end_token: int
    length: Int[Array, ""] | int

    def __call__(self, logits, tokens):
        short = (tokens >= 0).sum(-1, keepdims=True) < self.length
        return jnp.where(short & (jnp.arange(logits.shape[-1]) == self.end_token), -jnp.inf, logits)


@part
class RepetitionPenalty(Processor):
    """Logits of tokens that the sequence has are divided by θ where positive and multiplied by it where negative.

    The penalty is that of CTRL (Keskar et al., 2019).

    Attributes:
        theta: θ; 1 is the identity, and above 1 repetitions are less likely.
    """

    theta: Float[Array, ""] | float

    def __call__(self, logits, tokens):
        batch = jnp.arange(len(tokens))[:, None]
        there = (
            jnp.zeros(logits.shape, bool)
            .at[batch, jnp.where(tokens >= 0, tokens, logits.shape[-1])]
            .set(True, mode="drop")
        )
        return jnp.where(there, jnp.where(logits > 0, logits / self.theta, logits * self.theta), logits)


@part
class Contrast(Combine):
    """(1 + α) log p₁ − α log p₂ of two runs, over tokens with p₁ >= β max p₁: contrastive decoding (Li et al., 2023).

    With α = 0 and β = 0 the result is the first run alone.

    Attributes:
        alpha: α.
        beta: β.
    """

    alpha: Float[Array, ""] | float = 0.5
    beta: Float[Array, ""] | float = 0.1

    def __call__(self, logits):
        if logits.shape[0] != 2:
            raise ValueError(f"Contrast: {logits.shape[0]} runs are given: need 2")
        first, second = jax.nn.log_softmax(logits.astype(jnp.float32))
        second = jnp.maximum(second, -1e30)  # what the second never says is not 0 · ∞
        likely = first >= jnp.log(self.beta) + first.max(-1, keepdims=True)
        return jnp.where(likely, (1 + self.alpha) * first - self.alpha * second, -jnp.inf)


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
        kept = (before < top_p) | (jnp.arange(order.shape[-1]) == 0)
        floor = jnp.maximum(floor, jnp.where(kept, order, jnp.inf).min(-1))
    drawn = jax.random.categorical(key, jnp.where(logits >= floor[..., None], logits, -jnp.inf))
    return jnp.where(strange, -1, jnp.where(temperature == 0, greedy, drawn)).astype(jnp.int32)


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


def generate(
    model: Transformer,
    prompts: Int[ArrayLike, "b p"],
    lengths: Int[ArrayLike, " b"] | None = None,
    *,
    max_new_tokens: int,
    key: Key[Array, ""] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    end_token: int | None = None,
    edits: Mapping[str, Any] | Sequence[Mapping[str, Any]] = {},
    record: Any = (),
    processors: Sequence[Processor] = (),
    combine: Combine | None = None,
    store: Policy | None = None,
    context: Any = None,
) -> Generation:
    """Continues each prompt by up to `max_new_tokens` tokens, until its `end_token`.

    The whole loop is one compiled program, kept for later calls with the same shapes. The loop stops when every
    sequence has ended. Dropout is off.

    Args:
        model: The decoder.
        prompts: [B, P], right-padded.
        lengths: [B], how much of each row is prompt; all of it by default.
        max_new_tokens: M, the most tokens to draw.
        key: The key of the draws; needed unless temperature is 0.
        temperature: See `sample`; 0 takes the likeliest token.
        top_k: See `sample`.
        top_p: See `sample`.
        end_token: The token after which a sequence has ended.
        edits: As of the model, for prompts and new tokens alike. Or a list of R of them: R runs, each with its own
            edits, that read the same tokens; `combine` makes one draw of their logits.
        record: As of the model, of the first run; it comes back in `records` and `prompt_records`.
        processors: Parts that change the logits before a token is drawn, one after the other.
        combine: The part that makes one draw of several runs, such as `Contrast(0.5)`.
        store: The policy by which attention keeps and reads earlier tokens, such as `Policy(HeavyHitters(), slots=64)`.
        context: The context that cross-attention reads, such as the vectors of `EncoderDecoder.encode`. Its keys are
            computed once.

    Raises:
        ValueError: Prompts are empty or ragged, tokens are unknown, lengths do not fit, the prompt and the new tokens
            exceed the model's length, sampling parameters are out of range, runs and `combine` do not fit, or the model
            is not causal.
        TypeError: Prompts are text, `max_new_tokens`, `top_k` or `end_token` is no int, `key` is no key, or a processor
            is no `Processor`.
        FloatingPointError: The model gives logits from which no token can be drawn, such as NaN.
    """
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
    if top_k is not None:
        check_int("top_k", top_k)
    if end_token is not None:
        check_int("end_token", end_token)
        if not 0 <= end_token < model.config.vocabulary:
            raise ValueError(f"end_token is {end_token}: need one from 0 to {model.config.vocabulary - 1}, or None")
    if key is not None and not _is_key(key):
        raise TypeError(f"key must be a random key such as jax.random.key(0), got {key!r}")
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
    _check_kinds(temperature, top_k, top_p)
    if not temperature >= 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(
            f"need temperature >= 0, top_k >= 1 and 0 < top_p <= 1, got {temperature}, {top_k} and {top_p}"
        )
    runs = (edits,) if isinstance(edits, Mapping) else tuple(edits)
    if not runs:
        raise ValueError("edits is an empty list of runs: need {} for none, or a list of two or more")
    if len(runs) > 1 and combine is None:
        raise ValueError(f"edits has {len(runs)} runs but combine is None: need a part such as Contrast(0.5)")
    if combine is not None and (len(runs) < 2 or not isinstance(combine, Combine)):
        raise ValueError(
            f"combine is {combine!r} for {len(runs)} runs: need a Combine, and a list of two edits or more"
        )
    for processor in processors:
        if not isinstance(processor, Processor):
            raise TypeError(f"processors must be a tuple of parts such as RepetitionPenalty(1.2), got {processor!r}")
    if key is None and temperature > 0:
        raise ValueError("key is None: need a random key unless temperature is 0")
    key = jax.random.key(0) if key is None else key
    evaluation = nnx.merge(*nnx.split(model))
    evaluation.eval()
    graph, arrays = nnx.split(evaluation)
    end_token = -1 if end_token is None else end_token
    # In one dtype each, whatever number was given: a temperature of 0 and one of 0.7 run the same program.
    settings = (temperature, jnp.float32), (top_k, jnp.int32), (top_p, jnp.float32), (end_token, jnp.int32)
    scalars = (None if value is None else jnp.asarray(value, dtype) for value, dtype in settings)
    names = tuple(as_records(record).items())
    # Reducers and measures are parts, so that they go into the program as arrays and not as constants.
    asked, sites = {name: reducer for name, (_, reducer) in names}, tuple((name, site) for name, (site, _) in names)
    parts = runs, asked, tuple(processors), combine, store, context
    dynamic = (arrays, prompts, lengths, key, parts, *scalars)
    new, lost = under_auto_axes(lambda given: _generate(graph, int(max_new_tokens), sites, *given), dynamic, Axes)
    if lost.any():
        row = int(lost.argmax())
        raise FloatingPointError(
            f"no token can be drawn after {int(new.lengths[row])} new tokens of prompt {row}: the logits of the model "
            "are NaN or infinite, as its parameters may be"
        )
    return new


def _is_key(key: Any) -> bool:
    """Returns whether `key` is one random key, new-style or raw."""
    if not isinstance(key, jax.Array):
        return False
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key.shape == () if typed else key.dtype == jnp.uint32 and key.ndim == 1


@partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(graph, max_new_tokens, sites, arrays, prompts, lengths, key, parts, temperature, top_k, top_p, end_token):
    runs, reducers, processors, combine, store, context = parts
    record = {name: (site, reducers[name]) for name, site in sites}
    batch, length = prompts.shape
    places = jnp.arange(length)

    touched = {site_of("edits", site) for edits in runs for site in edits} | {site for _, site in sites}
    alone = isinstance(nnx.merge(graph, arrays), Transformer) and not touched & AT_END  # else all tokens have logits

    def read(tokens, positions, states, context=None, last=None):
        """Returns (logits of every run [R, B, T, V], its states, records of the first)."""
        records: dict[str, Any] = {}
        said, after = [], []
        for number, (edits, state) in enumerate(zip(runs, states, strict=True)):
            options = ({"edits": edits} if edits else {}) | ({"record": record} if record and not number else {})
            options |= {} if context is None else {"context": context}
            options |= {} if last is None else {"logits_at": last}
            model = nnx.merge(graph, arrays)
            logits, state, found = model(tokens, positions=positions, state=state, **options)
            records = records if number else found
            said.append(logits)
            after.append(state)
        return jnp.stack(said), tuple(after), records

    def draw(logits, sequence, step):
        logits = logits[0] if combine is None else combine(logits)
        for processor in processors:
            logits = processor(logits, sequence)
        return sample(logits, jax.random.fold_in(key, step), temperature, top_k, top_p)

    kept_by = {} if store is None else {"store": store}
    start = nnx.merge(graph, arrays).init_state(batch, length + max_new_tokens, **kept_by)
    shown = places < lengths[:, None]
    last = (lengths - 1)[:, None]
    logits, states, prompt_records = read(
        prompts, jnp.where(shown, places, -1), (start,) * len(runs), context, last if alone else None
    )
    logits = logits if alone else jnp.take_along_axis(logits, last[None, :, :, None], axis=2)
    logits = logits[:, :, 0]
    sequence = jnp.full((batch, length + max_new_tokens), -1, jnp.int32)
    sequence = sequence.at[:, :length].set(jnp.where(shown, prompts, -1).astype(jnp.int32))
    one = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    shapes = jax.eval_shape(read, one, one, states)[2]
    kept = jax.tree.map(lambda x: jnp.zeros((max_new_tokens, *x.shape), x.dtype), shapes)

    def unfinished(carry):
        step, *_, done = carry
        return (step < max_new_tokens) & ~done.all()

    def one_token(carry):
        step, logits, states, tokens, sequence, kept, done = carry
        token = draw(logits, sequence, step)
        tokens = tokens.at[:, step].set(jnp.where(done, -1, token))
        positions = jnp.where(done, -1, lengths + step)
        place = jnp.where(done, sequence.shape[1], positions)
        sequence = sequence.at[jnp.arange(batch), place].set(token, mode="drop")
        logits, states, records = read(token[:, None], positions[:, None], states)
        kept = jax.tree.map(lambda all_, x: all_.at[step].set(x), kept, records)
        done = done | (token == end_token) | (token < 0)
        return step + 1, logits[:, :, 0], states, tokens, sequence, kept, done

    tokens, done = jnp.full((batch, max_new_tokens), -1, jnp.int32), jnp.zeros(batch, bool)
    first = (0, logits, states, tokens, sequence, kept, done)
    _, _, _, tokens, _, kept, _ = jax.lax.while_loop(unfinished, one_token, first)
    lengths = (tokens >= 0).sum(-1)
    ended = (end_token >= 0) & (tokens == end_token).any(-1)
    return Generation(tokens, lengths, kept, prompt_records), (lengths < max_new_tokens) & ~ended
