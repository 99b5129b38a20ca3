"""What a head does to pairs of tokens, from its weights alone: how often the target is among the tokens it promotes.

MAPS (Elhelo and Geva, 2024) calls a list of pairs a relation: countries and capitals, words and their opposites, each
token and itself.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.analysis.factors import ov, token_table, unembedding
from jaxattn.analysis.heads import check_unpadded
from jaxattn.trace import run
from jaxattn.trace.edits import Put
from jaxattn.trace.patching import check_layers_alone
from jaxattn.trace.reducers import TokensAt
from jaxattn.trace.sweep import compiled


def hit_rate(logits: Float[Array, "*b pairs vocabulary"], targets: Int[Array, " pairs"], k: int) -> Float[Array, "*b"]:
    """Returns the share of pairs whose target is among the k largest logits of its row; by chance k / V.

    A target hits if at most k logits, its own among them, are as large as its own or larger. A row of equal logits hits
    nothing, and neither does one with NaN there.

    Args:
        logits: [..., pairs, V].
        targets: [pairs].
        k: At least 1, and below V.

    Raises:
        ValueError: `k` is out of range.
    """
    if not 1 <= k < logits.shape[-1]:
        raise ValueError(f"k is {k}: need 1 to {logits.shape[-1] - 1}, below the size of the vocabulary")
    own = jnp.take_along_axis(logits, jnp.broadcast_to(targets[:, None], (*logits.shape[:-1], 1)), -1)
    ahead = (logits >= own).sum(-1)  # with itself and its equals
    return jnp.where(jnp.isnan(own[..., 0]), False, ahead <= k).mean(-1)


def token_vectors(model: Any, *, first_block: bool = True) -> Float[Array, "v d"]:
    """Returns what stands for each token where heads read: the embedding, or what the first block makes of it.

        E' = MLP_0(norm_0(E)),  in place of E and not added to it

    as MAPS takes it for heads behind layer 0, since early blocks enrich the tokens of many models.

    Args:
        model: A decoder with a table of tokens, whose first layer has a feed-forward block behind its attention.
        first_block: False for the embedding itself.

    Raises:
        ValueError: The model has no table of tokens, or its first layer no such block.
        TypeError: The layers cannot be called alone.
    """
    table = token_table(model)
    if not first_block:
        return table
    check_layers_alone(model)
    if "mlp_out" not in model.sites or "resid_mid" not in model.sites:
        raise ValueError("model has no feed-forward block behind its attention: need one, or first_block=False")
    rows = table[:, None]  # each token is a text of its own, so that no attention is computed between them
    tokens = model.tokens(jnp.zeros_like(rows))

    def block(x: Array) -> Array:
        more = {"edits": {"resid_mid": Put(x)}, "record": ("mlp_out",), "start": 0, "stop": 1}
        return model.layers(jnp.zeros_like(x), tokens, **more)[2]["mlp_out"][0]

    return compiled(block, rows)[:, 0]


class Relation(NamedTuple):
    """How often heads map the sources of a relation to its targets.

    Attributes:
        score: [L, N], the share of pairs whose target is among the k tokens that are promoted most.
        suppression: [L, N], among the k that are suppressed most.
        chance: k / V.
    """

    score: Float[Array, "layers n"]
    suppression: Float[Array, "layers n"]
    chance: float


def relation_scores(
    model: Any, sources: Int[Array, " pairs"], targets: Int[Array, " pairs"], *, k: int = 10, first_block: bool = True
) -> Relation:
    """Returns for every head how often the target is in the top k of E'[source] W_V W_O W_U (MAPS, 2024).

    No text is read, and there is no norm before W_U but for the gain of the last one. Layer 0 reads the embedding E,
    later layers E' (`token_vectors`). The paper takes k = 10, and 1 for copying, and 30 pairs of single tokens or more.

    Args:
        model: As of `ov`, with a table of tokens and a head.
        sources: Tokens.
        targets: Tokens, one for each source.
        k: As of `hit_rate`.
        first_block: Whether later layers read E'; False for models without a first block, or whose first block does
            not enrich.

    Raises:
        ValueError: As of `ov` and `token_vectors`, there are not as many targets as sources, or `k` is out of range.
    """
    sources, targets = jnp.asarray(sources), jnp.asarray(targets)
    if sources.shape != targets.shape or sources.ndim != 1 or not len(sources):
        raise ValueError(f"sources has shape {sources.shape} and targets {targets.shape}: need pairs, one or more")
    logits = _promoted(model, sources, first_block)
    score, suppression = (hit_rate(sign * logits, targets, k) for sign in (1, -1))
    return Relation(score, suppression, k / logits.shape[-1])


def _promoted(model: Any, sources: Array, first_block: bool) -> Float[Array, "l n pairs v"]:
    plain = token_vectors(model, first_block=False)[sources]
    later = token_vectors(model)[sources] if first_block else plain
    values, unembed = ov(model), unembedding(model)
    layers = len(values.left)
    x = jnp.stack([plain, *[later] * (layers - 1)])  # [L, pairs, D]

    def of_layer(given: Any) -> Array:
        x, left, right = given
        return jnp.einsum("pd,ndh,nhe->npe", x, left, right, precision="highest") @ unembed

    return jax.lax.map(of_layer, (x, values.left, values.right))


def salient_tokens(
    model: Any, layer: int, head: int, *, sources: int = 10, targets: int = 5, first_block: bool = True
) -> tuple[Int[Array, " sources"], Int[Array, "sources targets"]]:
    """Returns the tokens that a head changes most, by ‖E' W_V W_O‖ / ‖E'‖, and those that it promotes most for each.

    Args:
        model: As of `relation_scores`.
        layer: The layer.
        head: The head.
        sources: How many tokens.
        targets: How many promoted tokens of each.
        first_block: As of `relation_scores`.
    """
    vectors = token_vectors(model, first_block=first_block and layer > 0)
    values = ov(model)[layer, head]
    written = vectors @ values.left @ values.right
    size = jnp.linalg.norm(vectors, axis=-1)
    change = jnp.where(size > 0, jnp.linalg.norm(written, axis=-1) / jnp.where(size > 0, size, 1), 0)
    top = jax.lax.top_k(change, sources)[1]
    return top, jax.lax.top_k(written[top] @ unembedding(model), targets)[1]


def dynamic_scores(
    model: Any,
    tokens: Int[Array, "b t"],
    targets: Int[Array, " b"],
    *,
    k: int = 10,
    sources: Int[Array, " b"] | None = None,
    **options: Any,
) -> Float[Array, "layers n"]:
    """Returns how often the target is in the top k of what a head writes at the last token of real prompts, [L, N].

    It is what `relation_scores` are held against. What a head writes is z W_O, read by W_U with the gain of the last
    norm.

    Args:
        model: As of `relation_scores`.
        tokens: [B, T], prompts.
        targets: [B], the token that each should promote.
        k: As of `hit_rate`.
        sources: [B], the position of the source in each prompt: then z is the value of that token alone, as if the head
            looked at nothing else. Later layers see what they see without.
        options: Other arguments of the model, without `positions`.

    Raises:
        ValueError: As of `ov`, or `k` is out of range, or layers have different numbers of heads.
    """
    check_unpadded(options)
    last = jnp.asarray([tokens.shape[1] - 1])
    record = {"z": ("z", TokensAt(last))} if sources is None else {"v": "v"}
    _, records = run(model, jnp.asarray(tokens), record=record, **options)
    values, unembed = ov(model), unembedding(model)
    if sources is None:
        z = records["z"][:, :, 0]  # [L, B, N, H]
    else:
        at = jnp.asarray(sources)[None, :, None, None, None]
        v = jnp.take_along_axis(records["v"], at, 2)[:, :, 0]
        z = jnp.repeat(v, values.right.shape[1] // v.shape[-2], -2)

    def of_layer(given: Any) -> Array:
        z, right = given
        return hit_rate(jnp.einsum("bnh,nhe->nbe", z, right, precision="highest") @ unembed, jnp.asarray(targets), k)

    return jax.lax.map(of_layer, (z, values.right))
