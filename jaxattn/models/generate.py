"""Generation: prefill, then one compiled loop of sampling and decoding."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Int, Key

from jaxattn.cache import Policy
from jaxattn.core.mesh import Axes, under_auto_axes
from jaxattn.core.part import part
from jaxattn.models.sample import (
    check_drawn,
    check_draws,
    checked_key,
    checked_prompts,
    in_evaluation,
    sample,
    settings_of,
)
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
    prompts, lengths = checked_prompts(model, prompts, lengths, max_new_tokens)
    check_draws(temperature, top_k, top_p, end_token, model.config.vocabulary)
    runs = checked_runs(edits, combine)
    check_processors(processors)
    key = checked_key(key, temperature)
    graph, arrays = nnx.split(in_evaluation(model))
    scalars = settings_of(temperature, top_k, top_p, end_token)
    names = tuple(as_records(record).items())
    # Reducers and measures are parts, so that they go into the program as arrays and not as constants.
    asked, sites = {name: reducer for name, (_, reducer) in names}, tuple((name, site) for name, (site, _) in names)
    parts = runs, asked, tuple(processors), combine, store, context
    dynamic = (arrays, prompts, lengths, key, parts, *scalars)
    new, lost = under_auto_axes(lambda given: _generate(graph, int(max_new_tokens), sites, *given), dynamic, Axes)
    check_drawn(new.lengths, lost)
    return new


def checked_runs(edits: Any, combine: Any) -> tuple[Mapping[str, Any], ...]:
    """Returns the edits of each run, or raises ValueError where runs and `combine` do not fit."""
    runs = (edits,) if isinstance(edits, Mapping) else tuple(edits)
    if not runs:
        raise ValueError("edits is an empty list of runs: need {} for none, or a list of two or more")
    if len(runs) > 1 and combine is None:
        raise ValueError(f"edits has {len(runs)} runs but combine is None: need a part such as Contrast(0.5)")
    if combine is not None and (len(runs) < 2 or not isinstance(combine, Combine)):
        raise ValueError(
            f"combine is {combine!r} for {len(runs)} runs: need a Combine, and a list of two edits or more"
        )
    return runs


def check_processors(processors: Sequence[Any]) -> None:
    """Raises TypeError if one of these is no `Processor`."""
    for processor in processors:
        if not isinstance(processor, Processor):
            raise TypeError(f"processors must be a tuple of parts such as RepetitionPenalty(1.2), got {processor!r}")


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
