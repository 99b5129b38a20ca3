"""Speculative decoding: a drafter guesses several tokens ahead, and one call of the model checks all of them."""

import abc
import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from jaxattn.cache import Policy
from jaxattn.core.checks import check_int, check_static_int
from jaxattn.core.mesh import Axes, under_auto_axes
from jaxattn.core.part import part
from jaxattn.models.generate import Generation
from jaxattn.models.sample import (
    check_drawn,
    check_draws,
    checked_key,
    checked_prompts,
    in_evaluation,
    likely,
    settings_of,
)
from jaxattn.models.state import can_roll_back, rolled_back
from jaxattn.models.transformer import Transformer


@part
class Speculation(Generation):
    """The result of `speculate`: a `Generation`, and how often the model was called for it.

    Attributes:
        tokens: [B, M], the new tokens; −1 after the end of a sequence.
        lengths: [B], how many of them each sequence has, its end token included.
        calls: The number of calls of the model, that of the prompts not counted.
        accepted: [B], how many of the new tokens were drafts.
    """

    calls: Int[Array, ""] | int = 0
    accepted: Int[Array, " b"] | int = 0


@dataclasses.dataclass(frozen=True)
class Draws:
    """How tokens are drawn: the settings of `sample`, for a drafter that draws as the model does."""

    temperature: Any
    top_k: Any
    top_p: Any

    def probabilities(self, logits: Float[Array, "*b vocabulary"]) -> Float[Array, "*b vocabulary"]:
        """Returns the probabilities of `sample`; all 0 where no token can be drawn."""
        kept = likely(logits, self.temperature, self.top_k, self.top_p)
        return jnp.where(kept.max(-1, keepdims=True) == -jnp.inf, 0.0, jax.nn.softmax(kept, -1))


class Drafter(abc.ABC):
    """The base class of parts that guess the next tokens of a text."""

    def start(self, sequence: Int[Array, "b p"], lengths: Int[Array, " b"], width: int) -> Any:
        """Returns the state of the drafter for texts that begin so; by default there is none.

        Args:
            sequence: [B, P], the tokens by position, −1 where there is none yet.
            lengths: [B], the number of tokens.
            width: A number that no length exceeds.
        """
        return ()

    @abc.abstractmethod
    def __call__(
        self,
        state: Any,
        sequence: Int[Array, "b p"],
        lengths: Int[Array, " b"],
        room: Int[Array, " b"],
        count: int,
        draws: Draws,
        key: Key[Array, ""],
    ) -> tuple[Int[Array, "b count"], Float[Array, "b count vocabulary"] | None, Any]:
        """Guesses `count` tokens.

        Args:
            state: From `start` or an earlier call; since then up to `count` + 1 tokens have joined each text.
            sequence: [B, P], the tokens by position, −1 where there is none yet.
            lengths: [B], the number of tokens.
            room: [B], how many guesses can be used. Others may be anything.
            count: The number of guesses.
            draws: How tokens are drawn.
            key: The key of the draws.

        Returns:
            A triple (tokens, probabilities, state). A token is −1 where there is no guess. The probabilities are those
            from which each token was drawn, given the tokens before it; None for guesses that are not drawn.
        """


@part
class PromptLookup(Drafter):
    """Guesses that a text goes on as it did where its last words stood before (Saxena, 2023).

    The last n tokens are looked for in the text so far, for the largest n up to `longest` that is found, and the newest
    place is taken. No model is needed. Texts that repeat names, code or quotations gain; other texts lose little.

    Attributes:
        longest: The most tokens that are looked for, at least 1.

    Raises:
        TypeError: `longest` is no int.
        ValueError: `longest` is below 1.
    """

    longest: int = 3

    def __post_init__(self):
        check_static_int("PromptLookup", "longest", self.longest, 1)

    def __call__(self, state, sequence, lengths, room, count, draws, key):
        places, last = jnp.arange(sequence.shape[1]), lengths[:, None] - 1
        agree, run = jnp.ones(sequence.shape, bool), jnp.zeros(sequence.shape, jnp.int32)
        for back in range(self.longest):
            wanted = jnp.take_along_axis(sequence, jnp.maximum(last - back, 0), 1)
            inside = (places >= back) & (last >= back)
            agree = agree & inside & (jnp.roll(sequence, back, 1) == wanted)
            run = run + agree
        run = jnp.where(places < last, run, 0)
        newest = (run * len(places) + places).argmax(1)[:, None]
        found = jnp.take_along_axis(run, newest, 1) > 0
        # Behind the end of the text its guesses follow: a text with a period goes on with it.
        ahead = newest + 1 + jnp.arange(count) % jnp.maximum(last - newest, 1)
        return jnp.where(found, jnp.take_along_axis(sequence, ahead, 1), -1), None, state


@part
class ModelDrafter(Drafter):
    """Guesses as a model continues.

    Each call first reads the tokens that have joined the texts, and then guesses in a copy of its state. So nothing has
    to be taken back, and any mixer and store will do.

    Attributes:
        graph: The structure of the model.
        arrays: Its arrays.
        store: The policy of its stores.
        capacity: The number of positions of its state.
    """

    graph: Any
    arrays: Any
    store: Policy | None
    capacity: int

    def start(self, sequence, lengths, width):
        model, places = nnx.merge(self.graph, self.arrays), jnp.arange(width)
        kept_by = {} if self.store is None else {"store": self.store}
        positions = jnp.where(places < lengths[:, None] - 1, places, -1)
        empty = model.init_state(len(sequence), self.capacity, **kept_by)
        return model(sequence[:, :width], positions=positions, state=empty)[1], lengths - 1

    def __call__(self, state, sequence, lengths, room, count, draws, key):
        held, read = state
        model, last = nnx.merge(self.graph, self.arrays), lengths[:, None] - 1
        places = read[:, None] + jnp.arange(count + 1)
        new = jnp.take_along_axis(sequence, jnp.minimum(places, sequence.shape[1] - 1), 1)
        logits, held, _ = model(new, positions=jnp.where(places <= last, places, -1), state=held, logits_at=last)

        def drawn(logits: Array, step: Array | int) -> tuple[Array, Array]:
            probabilities = draws.probabilities(logits[:, 0])
            token = jax.random.categorical(jax.random.fold_in(key, step), jnp.log(probabilities))
            return jnp.where((probabilities > 0).any(-1), token, -1), probabilities

        def one_more(carry, step):
            (token, _), ahead = carry
            positions = jnp.where((step < room)[:, None], last + step, -1)
            logits, ahead, _ = nnx.merge(self.graph, self.arrays)(token[:, None], positions=positions, state=ahead)
            guess = drawn(logits, step)
            return (guess, ahead), guess

        first = drawn(logits, 0)
        _, others = jax.lax.scan(one_more, (first, held), jnp.arange(1, count))
        tokens, probabilities = (
            jnp.moveaxis(jnp.concatenate([x[None], more]), 0, 1) for x, more in zip(first, others, strict=True)
        )
        return tokens, probabilities, (held, lengths)


def verdict(
    target: Float[Array, "*b k+1 vocabulary"], draft: Float[Array, "*b k vocabulary"], tokens: Int[Array, "*b k"]
) -> tuple[Float[Array, "*b k"], Float[Array, "*b k+1 vocabulary"]]:
    """Returns how likely each draft is accepted, and from what is drawn where one is not (Leviathan et al., 2023):

        a_i = min(1, p_i(x_i) / q_i(x_i)),    r_i = max(p_i − q_i, 0) / Σ max(p_i − q_i, 0),    r_k = p_k

    Drafts are accepted one after the other until the first is not, that of number i, and one token is drawn from r_i,
    or from r_k after all. Whatever q is, the tokens are distributed as p.

    Args:
        target: p, the probabilities of the model at each draft, given those before it, and behind the last.
        draft: q, the probabilities from which the drafts were drawn.
        tokens: x, the drafts. −1 is none: the probability is 0, and r is p.
    """
    there = (tokens >= 0)[..., None]
    draft = jnp.where(there, draft, 0.0)
    p, q = (jnp.take_along_axis(x, jnp.maximum(tokens, 0)[..., None], -1)[..., 0] for x in (target[..., :-1, :], draft))
    accept = jnp.where(there[..., 0], jnp.minimum(1.0, p / jnp.where(q > 0, q, 1.0)), 0.0)
    above = jnp.maximum(target[..., :-1, :] - draft, 0.0)
    mass = above.sum(-1, keepdims=True)
    rest = jnp.where(mass > 0, above / jnp.where(mass > 0, mass, 1.0), target[..., :-1, :])
    return accept, jnp.concatenate([rest, target[..., -1:, :]], -2)


def speculate(
    model: Transformer,
    draft: Transformer | Drafter | None,
    prompts: Int[Any, "b p"],
    lengths: Int[Any, " b"] | None = None,
    *,
    max_new_tokens: int,
    ahead: int = 4,
    key: Key[Array, ""] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    end_token: int | None = None,
    store: Policy | None = None,
    draft_store: Policy | None = None,
) -> Speculation:
    """Continues each prompt as `generate` does, with fewer calls of the model (Leviathan et al., 2023).

        models.speculate(model, models.PromptLookup(), prompts, max_new_tokens=64, temperature=0.0)

    A drafter guesses `ahead` tokens, and one call of the model reads all of them. Each row keeps the guesses that the
    model would have drawn, and one token more. The tokens are distributed exactly as those of `generate`, and at
    temperature 0 they are the same, up to rounding where two tokens are nearly tied. The whole loop is one compiled
    program. Mixers with a state of fixed size cannot take tokens back: models that have them read accepted tokens a
    second time, which is another call.

    Args:
        model: The decoder.
        draft: A smaller decoder of the same vocabulary; a part that guesses, such as `PromptLookup()`; or None: the
            model itself guesses, under the cheaper store `draft_store`.
        prompts: As of `generate`.
        lengths: As of `generate`.
        max_new_tokens: As of `generate`.
        ahead: The number of guesses in each round, at least 1.
        key: As of `generate`.
        temperature: As of `generate`, for guesses of a model too.
        top_k: As `temperature`.
        top_p: As `temperature`.
        end_token: As of `generate`.
        store: The policy by which attention of the model keeps tokens. It must keep and read everything, as a rejected
            token has to be forgotten; that is the default, also for layers with a window.
        draft_store: The policy by which attention of the drafting model keeps and reads tokens.

    Raises:
        ValueError: As of `generate`; or the draft has another vocabulary or too short a length, `ahead` is below 1,
            `store` evicts, selects or rounds, or stores and `draft` do not fit.
        TypeError: As of `generate`; or `draft` is of another kind, or `ahead` is no int.
        FloatingPointError: As of `generate`.
    """
    prompts, lengths = checked_prompts(model, prompts, lengths, max_new_tokens)
    check_draws(temperature, top_k, top_p, end_token, model.config.vocabulary)
    key = checked_key(key, temperature)
    check_int("ahead", ahead)
    if ahead < 1:
        raise ValueError(f"ahead is {ahead}: need at least 1 guess in each round")
    store = Policy() if store is None else store
    if store.retain.evicts or store.select is not None or not store.storage.exact:
        kind = type(store.retain if store.retain.evicts else store.select or store.storage).__name__
        raise ValueError(
            f"store has {kind}, under which several tokens at once do not read what each alone would: need a policy "
            "that keeps and reads everything"
        )
    if draft is None and draft_store is None:
        raise ValueError(
            "draft is None and draft_store too: need a drafter, or a cheaper store under which model drafts"
        )
    graph, arrays = nnx.split(in_evaluation(model))
    capacity = prompts.shape[1] + max_new_tokens
    if isinstance(draft, Drafter):
        if draft_store is not None:
            raise ValueError(
                f"draft_store is given, but draft is {type(draft).__name__}, which has no store: need None"
            )
        drafter: Drafter = draft
    elif draft is None or isinstance(draft, Transformer):
        drafting = model if draft is None else draft
        if drafting.config.vocabulary != model.config.vocabulary:
            raise ValueError(
                f"draft has a vocabulary of {drafting.config.vocabulary} and model one of {model.config.vocabulary}: "
                "need the same tokens"
            )
        checked_prompts(drafting, prompts, lengths, max_new_tokens)
        drafter = ModelDrafter(*nnx.split(in_evaluation(drafting)), draft_store, capacity)
    else:
        raise TypeError(f"draft must be a Transformer, a Drafter such as PromptLookup(), or None, got {draft!r}")
    scalars = settings_of(temperature, top_k, top_p, end_token)
    dynamic = (arrays, prompts, lengths, key, drafter, store, *scalars)
    new, lost = under_auto_axes(lambda given: _speculate(graph, int(max_new_tokens), int(ahead), *given), dynamic, Axes)
    check_drawn(new.lengths, lost)
    return new


@partial(jax.jit, static_argnums=(0, 1, 2))
def _speculate(
    graph, max_new_tokens, ahead, arrays, prompts, lengths, key, drafter, store, temperature, top_k, top_p, end_token
):
    batch, width = prompts.shape
    capacity, steps = width + max_new_tokens, jnp.arange(ahead + 1)
    rows, draws = jnp.arange(batch)[:, None], Draws(temperature, top_k, top_p)
    vocabulary = nnx.merge(graph, arrays).config.vocabulary

    def read(tokens, positions, state):
        return nnx.merge(graph, arrays)(tokens, positions=positions, state=state)[:2]

    places = jnp.arange(width)
    sequence = jnp.full((batch, capacity), -1, jnp.int32)
    sequence = sequence.at[:, :width].set(jnp.where(places < lengths[:, None], prompts, -1).astype(jnp.int32))
    # The state holds all tokens but the last, which the next call reads together with the drafts.
    start = nnx.merge(graph, arrays).init_state(batch, capacity, store=store)
    _, state = read(prompts, jnp.where(places < lengths[:, None] - 1, places, -1), start)
    takes_back, limits = can_roll_back(state), lengths + max_new_tokens

    def unfinished(carry):
        return ~carry["done"].all()

    def one_round(carry):
        sequence, reached, done = carry["sequence"], carry["reached"], carry["done"]
        of_round = jax.random.split(jax.random.fold_in(key, carry["calls"]), 3)
        room = jnp.where(done, 0, jnp.minimum(limits - reached - 1, ahead))
        drafts, probabilities, drafter_state = drafter(
            carry["drafter"], sequence, reached, room, ahead, draws, of_round[0]
        )
        count = jnp.minimum(jnp.cumprod(drafts >= 0, 1).sum(1), room)
        drafts = jnp.where(steps[:-1] < count[:, None], drafts, -1)
        if probabilities is None:
            probabilities = jax.nn.one_hot(drafts, vocabulary)

        tokens = jnp.concatenate([jnp.take_along_axis(sequence, reached[:, None] - 1, 1), drafts], 1)
        ahead_of = reached[:, None] - 1 + steps
        positions = jnp.where((steps <= count[:, None]) & ~done[:, None], ahead_of, -1)
        logits, state = read(tokens, positions, carry["state"])
        accept, rest = verdict(draws.probabilities(logits), probabilities, drafts)
        kept = jnp.cumprod(jax.random.uniform(of_round[1], accept.shape) < accept, 1).sum(1)
        rest = jnp.take_along_axis(rest, kept[:, None, None], 1)[:, 0]
        token = jax.random.categorical(of_round[2], jnp.log(rest))
        token = jnp.where((rest > 0).any(-1), token, -1)[:, None]
        if takes_back:
            state = rolled_back(state, count - kept)
        else:
            state = read(tokens, jnp.where(steps <= kept[:, None], positions, -1), carry["state"])[1]

        new = jnp.where(
            steps < kept[:, None], jnp.pad(drafts, ((0, 0), (0, 1))), jnp.where(steps == kept[:, None], token, -1)
        )
        ends = (new == end_token) & (end_token >= 0)
        new = jnp.where((jnp.cumsum(ends, 1) - ends > 0) | done[:, None], -1, new)
        more = (new >= 0).sum(1)
        where = jnp.where(new >= 0, reached[:, None] + steps, capacity)
        reached = reached + more
        return {
            "calls": carry["calls"] + (1 if takes_back else 2),
            "sequence": sequence.at[rows, where].set(new, mode="drop"),
            "reached": reached,
            "accepted": carry["accepted"] + jnp.minimum(kept, more),
            "done": done | ends.any(1) | (token[:, 0] < 0) | (reached >= limits),
            "state": state,
            "drafter": drafter_state,
        }

    end = jax.lax.while_loop(
        unfinished,
        one_round,
        {
            "calls": jnp.zeros((), jnp.int32),
            "sequence": sequence,
            "reached": lengths.astype(jnp.int32),
            "accepted": jnp.zeros(batch, jnp.int32),
            "done": jnp.zeros(batch, bool),
            "state": state,
            "drafter": drafter.start(sequence, lengths.astype(jnp.int32), width),
        },
    )
    tokens = jnp.take_along_axis(end["sequence"], lengths[:, None] + jnp.arange(max_new_tokens), 1)
    ended = (end_token >= 0) & (tokens == end_token).any(-1)
    count = end["reached"] - lengths
    return Speculation(tokens, count, {}, {}, end["calls"], end["accepted"]), (count < max_new_tokens) & ~ended
