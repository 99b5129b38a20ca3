"""Edges between the parts of a model: their scores from gradients, and runs in which only some of them carry the base.

Writers add to the residual stream: the embedding, every head, every feed-forward block. Readers read it: the queries,
keys and values of every head, every feed-forward block, and the output. An edge leads from a writer to a later reader.
Everything is computed from sites, so layers may be of different kinds as long as sites have the same shapes in all:
each adds what one attention writes, and then, or at the same time, what one feed-forward block writes, if it has one.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from jaxattn.core.part import part
from jaxattn.nn import MultiHeadAttention
from jaxattn.nn.tap import Layers
from jaxattn.trace.attribution import mean_along
from jaxattn.trace.edits import Add, Put
from jaxattn.trace.patching import Metric, check_layers_alone, same_shapes
from jaxattn.trace.sweep import compiled, run, unchanged

RECORDED = ("embed", "resid_pre", "resid", "q", "k", "v", "z", "attn_out", "mlp_out")


@part
class Circuit:
    """A number for every edge of a model, such as its score, or whether it is in a circuit.

    The writers come in the order embedding, heads of layer 0, heads of layer 1, ..., blocks of layer 0, 1, ...: there
    are W = 1 + L N + L of them. Where a writer is not before a reader there is no edge, and the number is 0; so it is
    from and to blocks in a model of attention alone.

    Attributes:
        query: [W, L, N], to the queries of each head.
        key: [W, L, K], to the keys of each key head.
        value: [W, L, K], to the values of each key head.
        mlp: [W, L], to each feed-forward block.
        output: [W], to the output.
    """

    query: Shaped[Array, "writers layers n"]
    key: Shaped[Array, "writers layers k"]
    value: Shaped[Array, "writers layers k"]
    mlp: Shaped[Array, "writers layers"]
    output: Shaped[Array, " writers"]

    @property
    def count(self) -> int:
        """The number of edges that are not 0."""
        return int(sum(jnp.count_nonzero(x) for x in jax.tree.leaves(self)))

    def names(self) -> list[str]:
        """Returns the names of the writers: "embed", "3.5" for head 5 of layer 3, "mlp 3"."""
        _, layers, heads = self.query.shape
        of_heads = [f"{layer}.{head}" for layer in range(layers) for head in range(heads)]
        return ["embed", *of_heads, *(f"mlp {layer}" for layer in range(layers))]


class _Parts(NamedTuple):
    """Functions of single layers, from one model and the arguments of its calls."""

    layers: int
    heads: int
    key_heads: int
    parallel: bool
    blocks: bool
    projected: Any  # (layer, residual stream) -> {"q", "k", "v"}
    attended: Any  # (layer, residual stream, {"q", "k", "v"}) -> z
    written: Any  # (layer, z) -> attn_out
    block: Any  # (layer, residual stream) -> mlp_out


def _parts(model: Any, records: dict[str, Any], options: dict[str, Any]) -> _Parts:
    for site, record in records.items():
        if isinstance(record, list):
            raise ValueError(f"the layers have {site!r} in different shapes, or not all of them: need the same in all")
    if records["embed"].shape != records["resid_pre"].shape[1:]:
        raise ValueError("the model has tokens of its own before the sequence: edges are not defined for them")
    zero = jnp.zeros_like(records["resid_pre"][0])
    row = model.tokens(zero, positions=options.get("positions"), mask=options.get("mask"))
    parallel, blocks = "resid_mid" not in records, "mlp_out" in model.sites

    def layer(number: Any, x: Array, sites: Sequence[str], edits: Any = None) -> dict[str, Array]:
        _, _, found = model.layers(
            x,
            row,
            context=options.get("context"),
            edits=edits or {},
            record=tuple(sites),
            start=number,
            stop=number + 1,
        )
        return {site: found[site][number] for site in sites}

    def block(number: Any, x: Array) -> Array:
        if not blocks:
            return zero
        if parallel:
            return layer(number, x, ("mlp_out",))["mlp_out"]
        return layer(number, zero, ("mlp_out",), {"resid_mid": Put(x)})["mlp_out"]

    return _Parts(
        len(records["resid_pre"]),
        records["q"].shape[-2],
        records["k"].shape[-2],
        parallel,
        blocks,
        lambda number, x: layer(number, x, ("q", "k", "v")),
        lambda number, x, qkv: layer(number, x, ("z",), {site: Put(value) for site, value in qkv.items()})["z"],
        lambda number, z: layer(number, zero, ("attn_out",), {"z": Put(z)})["attn_out"],
        block,
    )


def _recorded(model: Any) -> tuple[str, ...]:
    """Returns the sites to record, of a model whose stream is the sum of what the writers add."""
    check_layers_alone(model)
    first = 0
    for layers, length in zip(model.runs, model.lengths, strict=True):
        kinds, where = [branch.mixes for branch in layers.branches], f"layers[{first}] of the model has"
        if (sorted(kinds, reverse=True) if layers.parallel else kinds) not in ([True], [True, False]):
            raise ValueError(
                f"{where} {len(kinds)} branches: edges need one attention, and behind it or beside it at most one "
                "feed-forward block"
            )
        for branch in layers.branches:
            module = branch.module
            if branch.gate is not None:
                raise ValueError(f"{where} a gate of a branch (gate): edges need branches that add what they find")
            if branch.norm_sum is not None:
                raise ValueError(f"{where} a norm of the sum (norm_sum): edges need a stream to which layers only add")
            if branch.mixes and not (isinstance(module, MultiHeadAttention) and module.gate is None):
                raise ValueError(
                    f"{where} {type(module).__name__}, which does not write its z alone: edges need MultiHeadAttention "
                    "without a gate"
                )
        first += length
    if missing := [site for site in RECORDED if site not in (*model.sites, "mlp_out")]:
        raise ValueError(f"the model has no sites {missing}: edges need all of {list(RECORDED)}")
    return tuple(site for site in (*RECORDED, "resid_mid") if site in model.sites)


def _records(model: Any, inputs: Any, sites: Sequence[str], options: dict[str, Any]) -> dict[str, Any]:
    """Returns the records of a run, with blocks that write zeros in a model without any."""
    records = run(model, *inputs, record=sites, **options)[1]
    return {"mlp_out": jnp.zeros_like(records["resid_pre"])} | records


@unchanged()
def edge_attribution(
    model: Any, base: Any, source: Any, metric: Metric, *, steps: int | None = None, **options: Any
) -> Circuit:
    """Returns ⟨u_source − u_base, ∂metric/∂(input of v)⟩ for every edge u -> v (EAP; Syed et al., 2023).

    u is what the writer adds to the residual stream, summed over examples and tokens; the gradient is that at the input
    of the reader, before its norm, taken through the norm. The score of an edge is the first-order estimate of how much
    the metric grows if the reader, and no other, sees the writer of the source. The scores of all edges out of a writer
    add up to the gradient at the writer.

    With `steps` it is averaged over runs with embeddings between the two, as in `attribution` (EAP-IG; Hanna et al.,
    2024). Then the edges out of the embedding add up to metric(source) − metric(base), with an error of order steps⁻².

    Args:
        model: The model. A norm behind its attention is taken to first order.
        base: As of `attribution`.
        source: As of `attribution`.
        metric: As of `attribution`.
        steps: As of `attribution`.
        options: positions, mask or context, for all runs.

    Raises:
        ValueError: The two inputs differ in shape, `steps` is below 1, layers differ in shape, or a layer is not one
            attention without a gate and at most one feed-forward block, which add to the stream without a norm of the
            sum.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"steps is {steps}: need at least one gradient, or None for the one at the base")
    ours, theirs = same_shapes(base, source, options)
    sites = _recorded(model)
    at_base, at_source = (_records(model, inputs, sites, options) for inputs in (ours, theirs))
    parts = _parts(model, at_base, options)
    inner = "resid_pre" if parts.parallel else "resid_mid"

    def written(before: Any, after: Any) -> Array:
        """Returns what each writer adds in the source and not in the base, [W, B, T, D]."""

        def heads(given: Any) -> Array:
            number, z, change = given
            _, linear = jax.linearize(lambda z: parts.written(number, z), z)
            return jax.vmap(lambda on: linear(on[:, None] * change))(jnp.eye(parts.heads, dtype=change.dtype))

        change = after["z"] - before["z"]
        of_heads = jax.lax.map(heads, (jnp.arange(parts.layers), before["z"], change))
        of_blocks = after["mlp_out"] - before["mlp_out"]
        embed = (after["embed"] - before["embed"])[None]
        return jnp.concatenate([embed, of_heads.reshape(-1, *of_heads.shape[2:]), of_blocks])

    def scores(change: Array, embed: Array) -> Circuit:
        def value(added: Any) -> tuple[Array, Any]:
            edits: dict[str, Any] = {site: Layers(Add(x)) for site, x in added.items()}
            output, _, seen = model(*ours, edits={"embed": Put(embed), **edits}, record=sites, **options)
            return jnp.sum(metric(output)), seen

        inputs = ("q", "k", "v", *(("mlp_out",) if parts.blocks else ()), "resid")
        nothing = {site: jnp.zeros_like(at_base[site]) for site in inputs}
        gradient, seen = jax.grad(value, has_aux=True)(nothing)

        def of_layer(given: Any) -> dict[str, Array]:
            number, x, mid, down = given
            found = {}
            _, pull = jax.vjp(lambda x: parts.projected(number, x), x)
            for site in ("q", "k", "v"):
                zero = {name: jnp.zeros_like(down[name]) for name in ("q", "k", "v")}

                def product(on: Array, site: str = site, zero: Any = zero) -> Array:
                    (at_input,) = pull({**zero, site: on[:, None] * down[site]})
                    return jnp.einsum("wbtd,btd->w", change, at_input)

                found[site] = jax.lax.map(product, jnp.eye(down[site].shape[-2], dtype=down[site].dtype)).T
            if parts.blocks:
                _, pull_block = jax.vjp(lambda x: parts.block(number, x), mid)
                found["mlp_out"] = jnp.einsum("wbtd,btd->w", change, pull_block(down["mlp_out"])[0])
            else:
                found["mlp_out"] = jnp.zeros(len(change), change.dtype)
            return found

        numbers = jnp.arange(parts.layers)
        found = jax.lax.map(of_layer, (numbers, seen["resid_pre"], seen[inner], gradient))
        q, k, v, mlp = (jnp.moveaxis(found[site], 0, 1) for site in ("q", "k", "v", "mlp_out"))
        return Circuit(q, k, v, mlp, jnp.einsum("wbtd,btd->w", change, gradient["resid"][-1]))

    def mean(before: Any, after: Any) -> Circuit:
        change = written(before, after)
        if steps is None:
            found = scores(change, before["embed"])
        else:
            found = mean_along(lambda embed: scores(change, embed), before["embed"], after["embed"], steps)
        return jax.tree.map(lambda x, there: jnp.where(there, x, 0), found, _edges(parts))

    return compiled(mean, at_base, at_source)


def _edges(parts: _Parts) -> Circuit:
    """Returns which edges there are: a writer is at a time before the reader, and there are blocks or none."""
    layers, heads = parts.layers, parts.heads
    attention = 2 * np.arange(layers)
    block = attention if parts.parallel else attention + 1
    writer = np.concatenate([[-1], np.repeat(attention, heads), block])
    of_heads = writer[:, None, None] < attention[:, None]
    by_key_head = np.broadcast_to(of_heads, (len(writer), layers, parts.key_heads))
    there = (
        np.broadcast_to(of_heads, (len(writer), layers, heads)),
        by_key_head,
        by_key_head,
        (writer[:, None] < block) & parts.blocks,
        (np.arange(len(writer)) <= layers * heads) | parts.blocks,
    )
    return Circuit(*map(jnp.asarray, there))


@unchanged()
def with_edges(model: Any, base: Any, source: Any, kept: Circuit, **options: Any) -> Array:
    """Returns the output of a run on the base in which all edges that are not kept carry the source.

    What a reader sees is the sum of what all writers before it add: as it is in this run for edges that are kept, as it
    is in the source for all others. With all edges that is the run on the base, with none the run on the source.

    Args:
        model: As of `edge_attribution`.
        base: The inputs whose values the edges carry that are kept: tokens, or a tuple of inputs.
        source: The inputs whose values the others carry, of the same shapes.
        kept: The edges that are kept, True.
        options: As of `edge_attribution`.

    Raises:
        ValueError: As of `edge_attribution`.
    """
    ours, theirs = same_shapes(base, source, options)
    sites = _recorded(model)
    at_base, at_source = (_records(model, inputs, sites, options) for inputs in (ours, theirs))
    parts = _parts(model, at_base, options)

    def seen(kept: Array, change: Array, there: Array) -> Array:
        """Returns the input of readers, [..., B, T, D], from kept [W, ...] and there [B, T, D]."""
        return there + jnp.tensordot(jnp.moveaxis(kept, 0, -1).astype(change.dtype), change, 1)

    def layer(change: Array, given: Any) -> tuple[Array, None]:
        number, of_layer, there = given
        qkv = {}
        for site, on in zip(("q", "k", "v"), of_layer[:3], strict=True):
            inputs = seen(on, change, there["resid_pre"])
            each = jax.lax.map(lambda x, site=site: parts.projected(number, x)[site], inputs)  # [heads, B, T, heads, H]
            qkv[site] = jnp.moveaxis(jnp.diagonal(each, axis1=0, axis2=3), -1, 2)
        z = parts.attended(number, there["resid_pre"], qkv)
        # Heads become those of this run one after the other, so that they add up behind a norm too.
        first = jnp.tri(parts.heads + 1, parts.heads, -1, dtype=bool)[:, :, None]
        each = jax.lax.map(lambda on: parts.written(number, jnp.where(on, z, there["z"])), first)
        one = jnp.diff(each.astype(change.dtype), axis=0)
        change = jax.lax.dynamic_update_slice_in_dim(change, one, 1 + number * parts.heads, 0)
        inputs = seen(of_layer[3], change, there["resid_pre" if parts.parallel else "resid_mid"])
        new = parts.block(number, inputs).astype(change.dtype) - there["mlp_out"]
        place = 1 + parts.layers * parts.heads + number
        return jax.lax.dynamic_update_slice_in_dim(change, new[None], place, 0), None

    def output(before: Any, after: Any, kept: Circuit) -> Array:
        kept = jax.tree.map(lambda x, there: jnp.asarray(x, bool) & there, kept, _edges(parts))
        change = jnp.zeros((len(kept.output), *before["embed"].shape), before["embed"].dtype)
        change = change.at[0].set(before["embed"] - after["embed"])
        of_layers = tuple(jnp.moveaxis(x, 1, 0) for x in (kept.query, kept.key, kept.value, kept.mlp))
        inner = {site: value for site, value in after.items() if site != "embed"}
        change, _ = jax.lax.scan(layer, change, (jnp.arange(parts.layers), of_layers, inner))
        resid = seen(kept.output, change, after["resid"][-1])
        return model(*ours, start=(parts.layers, resid), **options)[0]

    return compiled(output, at_base, at_source, kept)


def largest(scores: Circuit, count: Any) -> Circuit:
    """Returns the edges with the largest absolute scores, True.

    Args:
        scores: The score of every edge.
        count: How many; it may be traced.
    """
    leaves, structure = jax.tree.flatten(scores)
    flat = jnp.abs(jnp.concatenate([x.reshape(-1) for x in leaves]))
    rank = jnp.argsort(jnp.argsort(-flat))
    kept = (rank < count) & (flat > 0)
    flags = jnp.split(kept, np.cumsum([x.size for x in leaves])[:-1])
    return jax.tree.unflatten(structure, [x.reshape(y.shape) for x, y in zip(flags, leaves, strict=True)])


class Faithfulness(NamedTuple):
    """How much of a metric circuits of several sizes keep.

    Attributes:
        counts: [C], how many edges each has.
        kept: [C], (metric(circuit) − metric(source)) / (metric(base) − metric(source)).
        random: [C], the same of as many edges drawn at random.
    """

    counts: Array
    kept: Array
    random: Array


def faithfulness(
    model: Any,
    base: Any,
    source: Any,
    metric: Metric,
    scores: Circuit,
    counts: Any,
    *,
    key: Array,
    **options: Any,
) -> Faithfulness:
    """Returns how much of the metric the edges with the largest scores keep, beside as many edges drawn at random.

    Args:
        model: As of `with_edges`.
        base: As of `with_edges`.
        source: As of `with_edges`.
        metric: From the output to a number.
        scores: The scores of the edges, as of `edge_attribution`.
        counts: [C], how many edges are kept.
        key: The key of the random edges.
        options: As of `with_edges`.
    """
    counts = jnp.asarray(counts)
    leaves, structure = jax.tree.flatten(scores)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        jnp.where(x == 0, 0, jax.random.uniform(k, x.shape, minval=0.5)) for k, x in zip(keys, leaves, strict=True)
    ]
    at_base, at_source = (metric(run(model, *inputs, **options)[0]) for inputs in same_shapes(base, source, options))

    def share(scores: Circuit, count: Array) -> Array:
        found = metric(with_edges(model, base, source, largest(scores, count), **options))
        return (found - at_source) / (at_base - at_source)

    def of_scores(scores: Circuit) -> Array:
        return jax.lax.map(lambda count: share(scores, count), counts)

    both = jax.tree.map(lambda *x: jnp.stack(x), scores, jax.tree.unflatten(structure, drawn))
    kept, random = compiled(lambda both: jax.lax.map(of_scores, both), both)
    return Faithfulness(counts, kept, random)
