"""What a model loses under a policy of its stores, in attention, loss and answers, for the memory that it saves."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Bool, Float, Int
from rich.console import Console

from jaxattn.cache import Policy
from jaxattn.models.sample import in_evaluation
from jaxattn.models.transformer import Transformer
from jaxattn.nn.attention import MultiHeadAttention
from jaxattn.nn.tap import Tap
from jaxattn.nn.tokens import Tokens


class UnderPolicy(NamedTuple):
    """How a model reads a text under a policy.

    Attributes:
        memory: Bytes of the whole state.
        loss: The mean of −log p(next token) over the tokens that are read one by one, in nats.
        accuracy: [B], the share of the asked tokens that are the likeliest ones; NaN if none is asked for.
        lost: [L, N], the mean of `lost_mass` over batch and tokens after the prompt.
    """

    memory: int
    loss: float
    accuracy: Float[np.ndarray, " b"]
    lost: Float[np.ndarray, "layers n"]


def lost_mass(
    model: Transformer,
    tokens: Int[ArrayLike, "b t"],
    policy: Policy,
    *,
    prompt: int,
    positions: Int[ArrayLike, "#b t"] | None = None,
) -> Float[Array, "layers b t n"]:
    """Returns the share of attention that falls on keys which a store under the policy would not read.

        lost_t = 1 − exp(lse_t of the keys that are read − lse_t of all visible keys)

    One pass of the model gives queries, keys and values of all layers, as they are with nothing evicted. The store of
    each layer then takes the prompt at once and the other tokens one by one. So the figure is the loss of the policy
    alone, without what a changed layer does to later ones. Memory is linear in length. Dropout is off.

    Args:
        model: A decoder whose layers each have one attention of their own keys.
        tokens: [B, T].
        policy: The policy. Keys must stand where they were read, `key_position=Absolute()`.
        prompt: The number of tokens that come at once, at least 1 and below T. Nothing is lost of them.
        positions: As of the model; −1 is padding.

    Returns:
        [L, B, T, N]: 0 within the prompt and at padding.

    Raises:
        ValueError: `prompt` does not fit, the key position is another, or a layer has no such attention.
    """
    tokens, positions = _checked(model, tokens, prompt, positions)
    return _lost_by_layer(_layers(model, tokens, positions), prompt, positions, policy)


def _layers(model: Transformer, tokens: Array, positions: Array) -> list[tuple[Any, Any, list[Array]]]:
    """Returns the attention of each layer, as graph and arrays, and its queries, keys, values and lse of one pass."""
    model, layers = in_evaluation(model), []
    for run, length in zip(model.runs, model.lengths, strict=True):
        found = [branch for branch in run.branches if branch.mixes]
        if (
            len(found) != 1
            or not isinstance(found[0].module, MultiHeadAttention)
            or found[0].module.keys_from != "self"
        ):
            raise ValueError(
                "a layer has no attention, or several, or reads the keys of another: need one with its own"
            )
        graph, arrays = nnx.split(found[0].module)
        layers += [(graph, jax.tree.map(lambda x, i=i: x[i], arrays), found[0].site) for i in range(length)]
    names = [tuple(site(name) for name in ("q_rotated", "k_rotated", "v", "lse")) for _, _, site in layers]
    recorded = sorted({site for of_layer in names for site in of_layer})
    _, _, records = nnx.jit(lambda m, x: m(x, positions=positions, record=tuple(recorded)))(model, tokens)
    return [
        (graph, arrays, [records[site][number] for site in sites])
        for number, ((graph, arrays, _), sites) in enumerate(zip(layers, names, strict=True))
    ]


def _lost_by_layer(layers: Any, prompt: int, positions: Array, policy: Policy) -> Float[Array, "layers b t n"]:
    """Returns `lost_mass` from what `_layers` returned."""
    if not policy.key_position.at_write:
        raise ValueError(
            f"policy has key_position={type(policy.key_position).__name__}, which turns keys when they are read: need "
            "Absolute()"
        )
    return jnp.stack([_lost(graph, prompt, arrays, records, positions, policy) for graph, arrays, records in layers])


@partial(jax.jit, static_argnums=(0, 1))
def _lost(graph, prompt, arrays, records, positions, policy):
    mixer = nnx.merge(graph, arrays)
    query, key, value, whole = records
    batch, length = query.shape[:2]
    positions = jnp.broadcast_to(positions, (batch, length))

    def taken(store, piece):
        """Returns the store after this piece, and the lse [B, T, N] of what its queries read."""
        query, key, value, positions = piece
        store = store.append(key, value, positions)
        tap, tokens = Tap(record=("lse",)), Tokens.of(query, positions=positions)

        def reads(held, tap):
            return mixer.attended(query, held, tokens, tap, store)

        _, store = mixer.from_store(store, query, tokens, tap, reads)
        return store, tap.records["lse"]

    def cut(first, last):
        return tuple(x[:, first:last] for x in (query, key, value, positions))

    store, _ = taken(mixer.init_state(batch, length, policy), cut(0, prompt))
    one_by_one = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0)[:, :, None], cut(prompt, length))
    _, kept = jax.lax.scan(taken, store, one_by_one)
    kept = jnp.moveaxis(kept[:, :, 0], 0, 1)
    after = whole[:, prompt:]
    share = jnp.where(after == -jnp.inf, 1, jnp.exp(kept - jnp.where(after == -jnp.inf, 0, after)))
    return jnp.pad(jnp.maximum(1 - share, 0), [(0, 0), (prompt, 0), (0, 0)])


def compare_stores(
    model: Transformer,
    tokens: Int[ArrayLike, "b t"],
    policies: Mapping[str, Policy],
    *,
    prompt: int,
    positions: Int[ArrayLike, "#b t"] | None = None,
    answers: Bool[ArrayLike, "b t"] | None = None,
    lost: bool = True,
    console: Console | None = None,
) -> dict[str, UnderPolicy]:
    """Reads a text under each policy, the prompt at once and the other tokens one by one, each given as it stands.

    Dropout is off.

    Args:
        model: As in `lost_mass`.
        tokens: [B, T].
        policies: Name -> policy, such as {"all": Policy(), "1/8": Policy(Recent(4), slots=T // 8)}.
        prompt: As in `lost_mass`.
        positions: As of the model; −1 is padding.
        answers: The tokens that `accuracy` asks for, behind the first one of the prompt. None asks for none.
        lost: Whether `lost_mass` is computed too. Without, `lost` of the results is empty and the model may be any
            decoder.
        console: The console on which each policy is named before its turn. None names none.

    Returns:
        Name -> memory, loss, accuracy and lost mass.

    Raises:
        ValueError: As `lost_mass`.
    """
    tokens, positions = _checked(model, tokens, prompt, positions)
    positions = jnp.broadcast_to(positions, tokens.shape)
    asked = jnp.zeros(tokens.shape, bool) if answers is None else jnp.asarray(answers)
    graph, arrays = nnx.split(in_evaluation(model))
    layers = _layers(model, tokens, positions) if lost else None  # one pass for all policies
    counted = (positions >= 0)[:, prompt:, None]
    results = {}
    for name, policy in policies.items():
        if console is not None:
            console.print(name)
        state = model.init_state(tokens.shape[0], tokens.shape[1], policy)
        loss, right = _read(graph, prompt, arrays, tokens, positions, asked, state)
        mean = np.zeros((0, 0))
        if layers is not None:
            by_head = _lost_by_layer(layers, prompt, positions, policy)[:, :, prompt:]
            mean = np.asarray((by_head * counted).sum((1, 2)) / counted.sum())
        memory = sum(x.nbytes for x in jax.tree.leaves(state))
        results[name] = UnderPolicy(memory, float(loss), np.asarray(right), mean)
    return results


@partial(jax.jit, static_argnums=(0, 1))
def _read(graph, prompt, arrays, tokens, positions, asked, state):
    def step(state, piece):
        tokens, positions = piece
        logits, state, _ = nnx.merge(graph, arrays)(tokens, positions=positions, state=state)
        return state, logits

    state, first = step(state, (tokens[:, :prompt], positions[:, :prompt]))

    def one(state, piece):
        token, position, following, ask = piece
        state, logits = step(state, (token[:, None], position[:, None]))
        return state, scored(logits[:, 0], following, ask)

    def scored(logits, following, ask):
        """Returns (−log p of the tokens that follow, whether they are right), 0 where none is asked for."""
        of_token = jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), following[:, None], -1)[:, 0]
        return -of_token, jnp.where(ask, logits.argmax(-1) == following, False)

    counts = positions >= 0
    pieces = (x[:, prompt:-1].T for x in (tokens, positions)), (x[:, prompt + 1 :].T for x in (tokens, asked))
    _, (loss, right) = jax.lax.scan(one, state, (*pieces[0], *pieces[1]))
    _, early = jax.vmap(scored, 1, 1)(first, tokens[:, 1 : prompt + 1], asked[:, 1 : prompt + 1])
    count = counts[:, prompt + 1 :].T
    total = jnp.where(count, loss, 0).sum() / jnp.maximum(count.sum(), 1)
    count_asked = asked[:, 1:].sum(1)
    return total, (right.sum(0) + early.sum(1)) / jnp.where(count_asked > 0, count_asked, jnp.nan)


def _checked(model: Any, tokens: Any, prompt: Any, positions: Any) -> tuple[Array, Array]:
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or not 1 <= prompt < tokens.shape[1]:
        raise ValueError(
            f"prompt is {prompt} of tokens {tokens.shape}: need [batch, length], and 1 to length − 1 at once"
        )
    if model.config.meta_tokens:
        raise ValueError(
            f"model has {model.config.meta_tokens} tokens of its own before the text: need a model without"
        )
    positions = jnp.arange(tokens.shape[1]) if positions is None else jnp.asarray(positions)
    return tokens, positions
