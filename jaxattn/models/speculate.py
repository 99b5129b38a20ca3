"""Speculative decoding: a drafter guesses several tokens ahead, and one call of the model checks all of them."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from jaxattn.cache import Policy
from jaxattn.core.checks import check_static_int
from jaxattn.core.mesh import Axes, under_auto_axes
from jaxattn.core.part import part
from jaxattn.models.generate import Combine, Generation, Processor, check_processors, checked_runs
from jaxattn.models.sample import (
    check_drawn,
    check_draws,
    checked_key,
    checked_prompts,
    in_evaluation,
    likely,
    settings_of,
)
from jaxattn.models.state import can_roll_back, joined, reordered, rolled_back
from jaxattn.models.transformer import Transformer
from jaxattn.models.tree import Branches


@part
class Speculation(Generation):
    """The result of `speculate`: a `Generation`, and how often the model was called for it.

    Attributes:
        tokens: [B, M], the new tokens; −1 after the end of a sequence.
        lengths: [B], how many of them each sequence has, its end token included.
        calls: The number of calls of the model in each run, that of the prompts not counted.
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
        tree: Branches,
        draws: Draws,
        key: Key[Array, ""],
    ) -> tuple[Int[Array, "b chains depth"], Float[Array, "b chains depth vocabulary"] | None, Any]:
        """Guesses the tokens of a tree, as its chains; a plain guess at the next tokens is a tree of one chain.

        Args:
            state: From `start` or an earlier call; since then up to `tree.depth` + 1 tokens have joined each text.
            sequence: [B, P], the tokens by position, −1 where there is none yet.
            lengths: [B], the number of tokens.
            room: [B], how many guesses of a chain can be used. Others may be anything.
            tree: The shape of the tree: `tree.chains` chains of `tree.depth` guesses. Of nodes that chains share, one
                of them is read (`tree.of_node`).
            draws: How tokens are drawn.
            key: The key of the draws.

        Returns:
            A triple (tokens, probabilities, state). A token is −1 where there is no guess. The probabilities are those
            from which each token was drawn, given the tokens before it and its elder siblings; None for guesses that
            are not drawn.
        """


@part
class PromptLookup(Drafter):
    """Guesses that a text goes on as it did where its last words stood before (Saxena, 2023).

    The last n tokens are looked for in the text so far, for the largest n up to `longest` that is found, and the newest
    place is taken. A tree branches where the text went on in several ways, those of the next best places. No model is
    needed. Texts that repeat names, code or quotations gain; other texts lose little.

    Attributes:
        longest: The most tokens that are looked for, at least 1.

    Raises:
        TypeError: `longest` is no int.
        ValueError: `longest` is below 1.
    """

    longest: int = 3

    def __post_init__(self):
        check_static_int("PromptLookup", "longest", self.longest, 1)

    def __call__(self, state, sequence, lengths, room, tree, draws, key):
        places, last = jnp.arange(sequence.shape[1]), lengths[:, None] - 1
        agree, run = jnp.ones(sequence.shape, bool), jnp.zeros(sequence.shape, jnp.int32)
        for back in range(self.longest):
            wanted = jnp.take_along_axis(sequence, jnp.maximum(last - back, 0), 1)
            inside = (places >= back) & (last >= back)
            agree = agree & inside & (jnp.roll(sequence, back, 1) == wanted)
            run = run + agree
        worth = jnp.where((places < last) & (run > 0), run * len(places) + places, -1)[:, None]  # [B, 1, P]
        tokens, goes_on = [], jnp.broadcast_to(worth >= 0, (len(worth), tree.chains, len(places)))
        for step, children in enumerate(tree.children):
            # Behind the end of the text its guesses follow: a text with a period goes on with it.
            ahead = places + 1 + step % jnp.maximum(last - places, 1)
            coming = jnp.take_along_axis(sequence, jnp.minimum(ahead, len(places) - 1), 1)[:, None]
            left, token = goes_on, jnp.full(goes_on.shape[:2], -1)
            for child in range(children):
                best = jnp.where(left, worth, -1).argmax(-1, keepdims=True)
                guess = jnp.where(left.any(-1), jnp.take_along_axis(coming, best, 2)[..., 0], -1)
                token = jnp.where(tree.place[:, step] == child, guess, token)
                left = left & (coming != guess[..., None])
            tokens.append(token)
            goes_on = goes_on & (coming == token[..., None])
        return jnp.stack(tokens, -1), None, state


@part
class ModelDrafter(Drafter):
    """Guesses as a model continues; siblings in a tree are drawn without replacement (Kool et al., 2019).

    Each call first reads the tokens that have joined the texts, and then guesses in a copy of its state, which has a
    row for every chain. So nothing has to be taken back, and any mixer and store will do. At temperature 0 siblings are
    the tokens of the largest logits.

    Attributes:
        graph: The structure of the model.
        arrays: Its arrays.
        store: The policy of its stores.
        capacity: The number of positions of its state.
        context: The context that its cross-attention reads, or None.
        edits: Its edits.
        chains: The number of rows that a text may take, for which a pool of pages has room.
    """

    graph: Any
    arrays: Any
    store: Policy | None
    capacity: int
    context: Any = None
    edits: Any = dataclasses.field(default_factory=dict)
    chains: int = 1

    def start(self, sequence, lengths, width):
        places, batch = jnp.arange(width), len(sequence)
        kept_by = {} if self.store is None else {"store": self.store}
        positions = jnp.where(places < lengths[:, None] - 1, places, -1)
        empty = nnx.merge(self.graph, self.arrays).init_state(batch * self.chains, self.capacity, **kept_by)
        empty = reordered(empty, jnp.arange(batch))
        return self._read(sequence[:, :width], positions, empty, context=self.context)[1], lengths - 1

    def _read(self, tokens, positions, state, **options):
        model = nnx.merge(self.graph, self.arrays)
        return model(tokens, positions=positions, state=state, edits=self.edits, **options)[:2]

    def __call__(self, state, sequence, lengths, room, tree, draws, key):
        held, read = state
        batch, last = len(sequence), lengths[:, None] - 1
        places = read[:, None] + jnp.arange(tree.depth + 1)
        new = jnp.take_along_axis(sequence, jnp.minimum(places, sequence.shape[1] - 1), 1)
        alone = {} if self.edits else {"logits_at": last}  # edits may be of the logits of all tokens
        logits, held = self._read(new, jnp.where(places <= last, places, -1), held, **alone)
        logits = logits if alone else jnp.take_along_axis(logits, (last - read[:, None])[..., None], 1)
        vocabulary = logits.shape[-1]

        def drawn(logits, step, place, first_alike):
            """Returns guesses [B, L] and their probabilities, from logits [B, L, V] of chains."""
            probabilities = draws.probabilities(logits)
            noise = jax.random.gumbel(jax.random.fold_in(key, step), (batch, tree.chains, vocabulary))
            order = jnp.log(probabilities) + noise[:, first_alike]  # chains that are alike so far have one order
            order = jnp.where(draws.temperature == 0, logits.astype(jnp.float32), order)
            for number in range(tree.most - 1):
                elder = jax.nn.one_hot(order.argmax(-1), vocabulary, dtype=bool)
                order = jnp.where(elder & (place > number)[:, None], -jnp.inf, order)
            there = (probabilities > 0).any(-1) & (order.max(-1) > -jnp.inf)
            token = jnp.where(there, order.argmax(-1), -1)
            left = jnp.where(order > -jnp.inf, probabilities, 0.0)
            left = left / jnp.where(there, left.sum(-1), 1.0)[..., None]
            return token, jnp.where(draws.temperature == 0, jax.nn.one_hot(token, vocabulary), left)

        def one_more(carry, of_step):
            (token, _), ahead = carry
            step, place, first_alike = of_step
            positions = jnp.where((step < room)[:, None], last + step, -1)
            positions = jnp.repeat(positions, tree.chains, 0)
            logits, ahead = self._read(token.reshape(-1, 1), positions, ahead)
            guess = drawn(logits.reshape(batch, tree.chains, vocabulary), step, place, first_alike)
            return (guess, ahead), guess

        steps = jnp.arange(tree.depth), jnp.asarray(tree.place.T), jnp.asarray(tree.first_alike.T)
        logits = jnp.broadcast_to(logits, (batch, tree.chains, vocabulary))
        first = drawn(logits, *(x[0] for x in steps))
        ahead = held if tree.chains == 1 else reordered(held, jnp.repeat(jnp.arange(batch), tree.chains))
        _, others = jax.lax.scan(one_more, (first, ahead), tuple(x[1:] for x in steps))
        tokens, probabilities = (
            jnp.moveaxis(jnp.concatenate([x[None], more]), 0, 2) for x, more in zip(first, others, strict=True)
        )
        return tokens, probabilities, (held, lengths)


def verdict(
    target: Float[Array, "*b m vocabulary"],
    draft: Float[Array, "*b m vocabulary"],
    tokens: Int[Array, "*b m"],
    siblings: Int[Any, "k m"],
) -> tuple[Float[Array, "*b m"], Float[Array, "*b m vocabulary"]]:
    """Returns how likely each draft is accepted, and what is drawn from behind a node none of whose children was.

    The children c_1 .. c_k of a node are tried one after the other. With p the probabilities of the model behind the
    node, and q_j those from which c_j was drawn, given that its elder siblings are other tokens,

        r_1 = p,    a_j = min(1, r_j(c_j) / q_j(c_j)),    r_{j+1} = max(r_j − q_j, 0) / Σ max(r_j − q_j, 0)

    a_j is how likely c_j is accepted where its elder siblings were not, and r_{k+1} is what is drawn from where none
    is. The walk goes on at the child that is accepted. Whatever the q are, the tokens are distributed as p (Leviathan
    et al., 2023, for a chain; recursive rejection sampling, Jeon et al., 2024, for a tree).

    Args:
        target: p, the probabilities of the model behind each node, given those on the way to it.
        draft: q, the probabilities from which each node was drawn; that of node 0 is not used.
        tokens: The token of each node. −1 is none: it is never accepted.
        siblings: The first child of every node, the second, and so on; M where there is none.
    """
    accept, rest = jnp.zeros(tokens.shape, target.dtype), target
    draft = jnp.where((tokens >= 0)[..., None], draft, 0.0)
    for children in siblings:
        token = jnp.take(tokens, children, -1, fill_value=-1)
        q = jnp.take(draft, children, -2, fill_value=0.0)
        at_token = jnp.maximum(token, 0)[..., None]
        r_token, q_token = (jnp.take_along_axis(x, at_token, -1)[..., 0] for x in (rest, q))
        chance = jnp.minimum(1.0, r_token / jnp.where(q_token > 0, q_token, 1.0))
        accept = accept.at[..., children].set(jnp.where(token >= 0, chance, 0.0), mode="drop")
        above = jnp.maximum(rest - q, 0.0)
        mass = above.sum(-1, keepdims=True)
        changes = (token >= 0)[..., None] & (mass > 0)
        rest = jnp.where(changes, above / jnp.where(mass > 0, mass, 1.0), rest)
    return accept, rest


def speculate(
    model: Transformer,
    draft: Transformer | Drafter | None,
    prompts: Int[Any, "b p"],
    lengths: Int[Any, " b"] | None = None,
    *,
    max_new_tokens: int,
    ahead: int | Sequence[int] = 4,
    key: Key[Array, ""] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    end_token: int | None = None,
    edits: Mapping[str, Any] | Sequence[Mapping[str, Any]] = {},
    processors: Sequence[Processor] = (),
    combine: Combine | None = None,
    store: Policy | None = None,
    draft_store: Policy | None = None,
    context: Any = None,
) -> Speculation:
    """Continues each prompt as `generate` does, with fewer calls of the model (Leviathan et al., 2023).

        models.speculate(model, models.PromptLookup(), prompts, max_new_tokens=64, temperature=0.0)

    A drafter guesses several tokens ahead, and one call of the model reads all of them. Each row keeps the guesses that
    the model would have drawn, and one token more. The tokens are distributed exactly as those of `generate`, and at
    temperature 0 they are the same, up to rounding where two tokens are nearly tied. The whole loop is one compiled
    program. Mixers with a state of fixed size cannot take tokens back: models that have them read accepted tokens a
    second time, which is another call.

    Args:
        model: The decoder.
        draft: A smaller decoder of the same vocabulary; a part that guesses, such as `PromptLookup()`; or None: the
            model itself guesses, under the cheaper store `draft_store`, with the same edits.
        prompts: As of `generate`.
        lengths: As of `generate`.
        max_new_tokens: As of `generate`.
        ahead: The number of guesses in each round, at least 1. Or a tree of guesses (SpecInfer, Miao et al., 2024), by
            the number of guesses behind each guess: (3, 2, 1) is 3 guesses at the next token, 2 behind each of them,
            and 1 behind each of those; 15 tokens to read, of which up to 3 are kept.
        key: As of `generate`.
        temperature: As of `generate`, for guesses of a model too.
        top_k: As `temperature`.
        top_p: As `temperature`.
        end_token: As of `generate`.
        edits: As of `generate`, of one run or of several. They are of the model alone, unless it drafts for itself:
            then it has those of the first run. Each run is a call more for every round of guesses.
        processors: As of `generate`. They change the logits of the model, and none of a drafter.
        combine: As of `generate`.
        store: The policy by which attention of the model keeps tokens. It must keep and read everything, as a rejected
            token has to be forgotten; that is the default, also for layers with a window.
        draft_store: The policy by which attention of the drafting model keeps and reads tokens.
        context: As of `generate`. A drafting model with cross-attention reads it too.

    Raises:
        ValueError: As of `generate`; or the draft has another vocabulary or too short a length, a number of `ahead` is
            below 1, `store` evicts, selects or rounds, stores and `draft` do not fit, or `ahead` is a tree and the
            model reads none or has edits.
        TypeError: As of `generate`; or `draft` is of another kind, or `ahead` holds no ints.
        FloatingPointError: As of `generate`.
    """
    prompts, lengths = checked_prompts(model, prompts, lengths, max_new_tokens)
    check_draws(temperature, top_k, top_p, end_token, model.config.vocabulary)
    key = checked_key(key, temperature)
    check_processors(processors)
    runs = checked_runs(edits, combine)
    tree = Branches.of(ahead)
    store = Policy() if store is None else store
    if store.retain.evicts or store.select is not None or not store.storage.exact:
        kind = type(store.retain if store.retain.evicts else store.select or store.storage).__name__
        raise ValueError(
            f"store has {kind}, under which several tokens at once do not read what each alone would: need a policy "
            "that keeps and reads everything"
        )
    if tree.most > 1:
        blind = [type(mixer).__name__ for run in model.runs for mixer in run.mixers if not mixer.reads_trees]
        if blind or any(runs):
            why = f"{blind[0]} of the model reads none" if blind else "edits tell tokens apart by their position"
            raise ValueError(f"ahead is {ahead}, a tree, but {why}: need a number of guesses, such as {tree.depth}")
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
        split = nnx.split(in_evaluation(drafting))
        read = context if drafting.crosses else None
        of_draft = dict(runs[0]) if draft is None else {}
        drafter = ModelDrafter(*split, draft_store, capacity, read, of_draft, tree.chains)
    else:
        raise TypeError(f"draft must be a Transformer, a Drafter such as PromptLookup(), or None, got {draft!r}")
    scalars = settings_of(temperature, top_k, top_p, end_token)
    parts = drafter, store, tuple(map(dict, runs)), tuple(processors), combine, context
    dynamic = (arrays, prompts, lengths, key, parts, *scalars)
    new, lost = under_auto_axes(lambda given: _speculate(graph, int(max_new_tokens), tree, *given), dynamic, Axes)
    check_drawn(new.lengths, lost)
    return new


@partial(jax.jit, static_argnums=(0, 1, 2))
def _speculate(graph, max_new_tokens, tree, arrays, prompts, lengths, key, parts, temperature, top_k, top_p, end_token):
    drafter, store, runs, processors, combine, context = parts
    batch, width = prompts.shape
    capacity, steps, branches = width + max_new_tokens, jnp.arange(tree.depth + 1), tree.most > 1
    rows, draws, depths = jnp.arange(batch)[:, None], Draws(temperature, top_k, top_p), tree.depths
    vocabulary = nnx.merge(graph, arrays).config.vocabulary

    def read(tokens, positions, states, **options):
        """Returns the logits that are drawn from, and the states of all runs."""
        said, after = [], []
        for edits, state in zip(runs, states, strict=True):
            own = options | ({"edits": edits} if edits else {})
            logits, state, _ = nnx.merge(graph, arrays)(tokens, positions=positions, state=state, **own)
            said.append(logits)
            after.append(state)
        logits = said[0] if combine is None else jax.vmap(combine, 2, 1)(jnp.stack(said))  # token by token
        return logits, tuple(after)

    def processed(logits, tokens, sequence, reached):
        """Returns the logits behind each node, after the texts that end there went through the processors."""
        on_the_way = np.where(tree.above, depths, 0)  # [M, M], 0 also for the token that is in the text already
        places = jnp.where(on_the_way > 0, reached[:, None, None] + on_the_way - 1, capacity)
        texts = jnp.broadcast_to(sequence[:, None], (*tokens.shape, capacity))
        nodes = jnp.arange(tokens.shape[1])[:, None]
        texts = texts.at[rows[..., None], nodes, places].set(tokens[:, None], mode="drop")
        for processor in processors:
            logits = jax.vmap(processor, 1, 1)(logits, texts)
        return logits

    places = jnp.arange(width)
    sequence = jnp.full((batch, capacity), -1, jnp.int32)
    sequence = sequence.at[:, :width].set(jnp.where(places < lengths[:, None], prompts, -1).astype(jnp.int32))
    # The state holds all tokens but the last, which the next call reads together with the drafts.
    start = nnx.merge(graph, arrays).init_state(batch, capacity, store=store)
    given = {} if context is None else {"context": context}
    starts = (start,) * len(runs)
    _, states = read(prompts, jnp.where(places < lengths[:, None] - 1, places, -1), starts, **given)
    takes_back, limits = branches or can_roll_back(states), lengths + max_new_tokens

    def unfinished(carry):
        return ~carry["done"].all()

    def one_round(carry):
        sequence, reached, done = carry["sequence"], carry["reached"], carry["done"]
        of_round = jax.random.split(jax.random.fold_in(key, carry["calls"]), 3)
        room = jnp.where(done, 0, jnp.minimum(limits - reached - 1, tree.depth))
        chains, probabilities, drafter_state = drafter(
            carry["drafter"], sequence, reached, room, tree, draws, of_round[0]
        )
        last = jnp.take_along_axis(sequence, reached[:, None] - 1, 1)
        tokens = jnp.concatenate([last, chains[:, *tree.of_node]], 1)
        there = (tokens >= 0) & (depths <= room[:, None]) & ~done[:, None]
        there = (there[:, None, :] | ~tree.above).all(-1)  # and all nodes on the way to it
        tokens = jnp.where(there, tokens, -1)
        if probabilities is None:
            drawn_from = jax.nn.one_hot(tokens, vocabulary)
        else:
            drawn_from = jnp.pad(probabilities[:, *tree.of_node], ((0, 0), (1, 0), (0, 0)))

        positions = jnp.where(there, reached[:, None] - 1 + depths, -1)
        logits, states = read(tokens, positions, carry["states"], **({"parents": tree.parents} if branches else {}))
        logits = processed(logits, tokens, sequence, reached) if processors else logits
        accept, rest = verdict(draws.probabilities(logits), drawn_from, tokens, tree.siblings)
        accepted = jax.random.uniform(of_round[1], accept.shape) < accept
        accepted &= ~(accepted[:, None, :] & tree.elder).any(-1)  # of siblings the first
        path = there & ((accepted | (depths == 0))[:, None, :] | ~tree.above).all(-1)
        kept = (path & (depths > 0)).sum(1)
        by_depth = (path[:, None, :] & (depths == steps[:, None])).argmax(-1)  # the nodes of the path
        end = jnp.take_along_axis(by_depth, kept[:, None], 1)
        rest = jnp.take_along_axis(rest, end[..., None], 1)[:, 0]
        token = jax.random.categorical(of_round[2], jnp.log(rest))
        token = jnp.where((rest > 0).any(-1), token, -1)[:, None]
        if branches:
            states = tuple(joined(state, path) for state in states)
        elif takes_back:
            back = (there & (depths > 0)).sum(1) - kept
            states = tuple(rolled_back(state, back) for state in states)
        else:
            states = read(tokens, jnp.where(path, positions, -1), carry["states"])[1]

        guesses = jnp.pad(jnp.take_along_axis(tokens, by_depth[:, 1:], 1), ((0, 0), (0, 1)))
        new = jnp.where(steps < kept[:, None], guesses, jnp.where(steps == kept[:, None], token, -1))
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
            "states": states,
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
            "states": states,
            "drafter": drafter.start(sequence, lengths.astype(jnp.int32), width),
        },
    )
    tokens = jnp.take_along_axis(end["sequence"], lengths[:, None] + jnp.arange(max_new_tokens), 1)
    ended = (end_token >= 0) & (tokens == end_token).any(-1)
    count = end["reached"] - lengths
    return Speculation(tokens, count, {}, {}, end["calls"], end["accepted"]), (count < max_new_tokens) & ~ended
