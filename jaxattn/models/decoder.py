"""The decoder-only language model: embedding, pre-norm layers from a list of specs, output projection."""

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxattn import nn
from jaxattn.cache import check_room
from jaxattn.core.attend.mask import Mask
from jaxattn.core.checks import as_ids, check_array
from jaxattn.models.config import DecoderConfig, Layer
from jaxattn.nn import EDITED, SITES, Recorder
from jaxattn.nn.parameter import linear_map, rms_norm, undecayed

DOCUMENTS = 8  # how many of them may be packed in a row behind meta tokens: each has its own


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + feed_forward(norm(x)), if there is one."""

    def __init__(self, spec: Layer, features: int, eps: float, dtype: Any, rngs: nnx.Rngs):
        self.deterministic = False
        self.mixer_norm = rms_norm(features, eps, dtype, rngs)
        self.mixer = spec.mixer.build(features, dtype, rngs)
        after = spec.feed_forward
        self.feed_forward_norm = None if after is None else rms_norm(features, eps, dtype, rngs)
        self.feed_forward = None if after is None else after.build(features, dtype, rngs)

    def __call__(self, x, positions, mask, state, record, shared, edits):
        tap = Recorder(record, (*SITES, "kv"), edits)
        y, state, records = self.mixer(
            self.mixer_norm(x), context=shared, positions=positions, mask=mask, state=state, record=tuple(tap.record)
        )
        x = x + tap("attn_out", y)
        if self.feed_forward is None or self.feed_forward_norm is None:
            y = jnp.zeros_like(x)
        else:
            y = self.feed_forward(self.feed_forward_norm(x))
        x = tap("resid", x + tap("mlp_out", y))
        return x, state, records | tap.records


class Decoder(nnx.Module):
    """logits [B, T, vocabulary] of the next token at every position, from tokens [B, T], or vectors [B, T, inputs].

    Layers with equal specs that stand side by side are one module with a leading layer axis on its arrays, scanned.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed: Any = _embedding(config, rngs)
        runs = [(spec, len(list(run))) for spec, run in itertools.groupby(config.layers)]
        self.lengths = tuple(length for _, length in runs)
        self.reads = tuple(spec.mixer.keys == "shared" for spec, _ in runs)  # keys of a run before
        self.runs = nnx.List([_stack(spec, length, config, rngs) for spec, length in runs])
        meta = (config.meta_tokens, config.width)
        self.meta = undecayed(jax.random.normal(rngs.params(), meta) * 0.02) if config.meta_tokens else None
        self.final_norm = rms_norm(config.width, config.eps, None, rngs)
        self.head = None if config.tied else linear_map(config.width, config.vocabulary, None, rngs, role="decayed")

    def __call__(
        self,
        tokens: Int[Array, "b t"] | Float[Array, "b t inputs"],
        *,
        positions: Int[Array, "#b t"] | None = None,
        mask: Mask | None = None,
        state: Any = None,
        record: tuple[str, ...] = (),
        edits: Mapping[str, Any] = {},
    ) -> tuple[Float[Array, "b t vocabulary"], Any, dict[str, Array]]:
        """(logits, state, records).

        positions [B, T] or [T] (default 0..T−1, or after the last one in `state`; −1 is padding); mask is and-ed with
        each layer's own (for packed documents: `Documents(ids)`); state from `init_state` when decoding; record names
        sites of `nn.SITES`, each returned with a leading layer axis (but `embed`). Tokens outside the
        vocabulary, negative ones among them, give NaN logits there and wherever they are seen; those of padding are not
        read. With meta tokens, records of the layers cover the row that begins with them, and a packed row may hold 8
        documents: one of more is NaN.

        edits: site of `nn.EDITED` -> a part that is called on the value there, [B, T, D], and says what to go on with;
        its arrays carry a leading layer axis, so that each layer has its own.

        Raises TypeError for tokens that are no array of the right kind, and ValueError for none, unknown sites, edits
        without a layer axis, and if a site's shape differs between layers.
        """
        check_array("tokens", tokens)
        given, inputs = f"{tokens.dtype}{list(tokens.shape)}", self.config.inputs
        if inputs and (not jnp.issubdtype(tokens.dtype, jnp.floating) or tokens.shape[2:] != (inputs,)):
            raise TypeError(f"tokens must be vectors [batch, length, {inputs}], got {given}")
        if not inputs and (not jnp.issubdtype(tokens.dtype, jnp.integer) or tokens.ndim != 2):
            raise TypeError(f"tokens must be integers [batch, length], got {given}")
        if 0 in tokens.shape:
            raise ValueError(f"tokens has shape {tokens.shape}: need at least one row of at least one token")
        self._check_edits(edits)
        tap = Recorder(record)
        x = tap("embed", self.embed(tokens) if inputs else self.embedded(tokens, positions))
        if self.meta is None:
            x, state, records = self.layers(x, positions=positions, mask=mask, state=state, record=record, edits=edits)
        elif state is None:
            longer = nn.with_prefix(self.meta[...], x, positions, mask, DOCUMENTS)
            x, _, records = self.layers(
                longer.x, positions=longer.positions, mask=longer.mask, record=record, edits=edits
            )
            x = longer.strip(x)
        else:
            positions = None if positions is None else nn.after_prefix(positions, self.config.meta_tokens)
            x, state, records = self.layers(x, positions=positions, mask=mask, state=state, record=record, edits=edits)
        logits = self.final_norm(x)
        logits = self.embed.attend(logits) if self.head is None else self.head(logits)
        return logits, state, tap.records | records

    def embedded(self, tokens: Int[Array, "b t"], positions: Int[Array, "#b t"] | None) -> Float[Array, "b t d"]:
        """The embedding of each token: NaN outside the vocabulary, and that of token 0 where that is padding (−1)."""
        tokens = as_ids(tokens)
        inside = (tokens >= 0) & (tokens < self.embed.num_embeddings)
        x = self.embed(jnp.where(inside, tokens, 0))  # its own look-up counts negative ones from the end
        fine = inside if positions is None else inside | (positions < 0)
        return jnp.where(fine[..., None], x, jnp.nan)

    def layers(
        self,
        x: Float[Array, "b t d"],
        *,
        positions: Int[Array, "#b t"] | None = None,
        mask: Mask | None = None,
        state: Any = None,
        record: tuple[str, ...] = (),
        edits: Mapping[str, Any] = {},
    ) -> tuple[Float[Array, "b t d"], Any, dict[str, Array]]:
        """(x after all layers, state, records): the model between embedding and final norm, without its meta tokens."""
        check_room(state, positions, x.shape[1])  # here, since the layers are traced
        states, recorded = [], []
        shared: nn.KeyValue | None = None
        first = 0
        for number, (run, length) in enumerate(zip(self.runs, self.lengths, strict=True)):
            gives = not self.reads[number] and self.reads[number + 1 : number + 2] == (True,)
            asked, given = (*record, "kv") if gives else record, shared if self.reads[number] else None

            # Scanned as plain arrays: unlike `nnx.scan` this also works where the model is a constant of a JAX loop.
            graph, arrays = nnx.split(run)

            def layer(x, slices, graph=graph, asked=asked, given=given):
                arrays, state, edits = slices
                block = nnx.merge(graph, arrays)
                x, state, records = block(x, positions, mask, state, asked, given, edits)
                return x, (state, records, nnx.state(block, nnx.RngCount))

            own = jax.tree.map(lambda each, first=first, last=first + length: each[first:last], dict(edits))
            x, (new_state, records, counts) = jax.lax.scan(
                layer, x, (arrays, None if state is None else state[number], own)
            )
            first += length
            if not run.deterministic:
                nnx.update(run, counts)
            if gives:
                shared = jax.tree.map(lambda x: x[-1], records.pop("kv"))
            states.append(new_state)
            recorded.append(records)
        return x, None if state is None else tuple(states), _join(recorded)

    def _check_edits(self, edits: Mapping[str, Any]) -> None:
        if unknown := set(edits) - set(EDITED):
            raise ValueError(f"edits names {sorted(unknown)}: need some of {list(EDITED)}")
        for site, edit in edits.items():
            for leaf in jax.tree.leaves(edit):
                shape = getattr(leaf, "shape", repr(leaf))
                if shape[:1] != (sum(self.lengths),):
                    raise ValueError(
                        f"edits[{site!r}] has a leaf {shape}: need a part of arrays, {sum(self.lengths)} layers first"
                    )

    def init_state(self, batch: int, capacity: int) -> Any:
        """What decoding sequences of at most `capacity` tokens starts from: a pytree, one entry per run of layers.

        A token beyond the capacity raises ValueError where its position is known, and its logits are NaN under `jit`,
        but for models whose every layer is a window or has a state of fixed size: they go on.
        """

        def stacked(run: Block, length: int) -> Any:
            graph, arrays = nnx.split(run)
            one = nnx.merge(graph, jax.tree.map(lambda x: x[0], arrays)).mixer.init_state(batch, capacity)
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (length, *x.shape)), one)

        capacity += self.config.meta_tokens
        state = tuple(stacked(run, length) for run, length in zip(self.runs, self.lengths, strict=True))
        if self.meta is None:
            return state
        meta = jnp.broadcast_to(self.meta[...], (batch, *self.meta.shape))
        return self.layers(meta, state=state)[1]


def _embedding(config: DecoderConfig, rngs: nnx.Rngs) -> nnx.Embed | nnx.Linear:
    if config.inputs:
        return linear_map(config.inputs, config.width, None, rngs, use_bias=True, role="decayed")
    return nnx.Embed(
        config.vocabulary,
        config.width,
        embedding_init=nnx.initializers.normal(0.02),
        embedding_metadata={"role": "decayed"},
        rngs=rngs,
    )


def _stack(spec: Layer, length: int, config: DecoderConfig, rngs: nnx.Rngs) -> Block:
    """`length` layers of one spec as one module, every array with a leading layer axis."""

    @nnx.split_rngs(splits=length)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs: nnx.Rngs) -> Block:
        return Block(spec, config.width, config.eps, jnp.dtype(config.dtype), rngs)

    return create(rngs)


def _join(recorded: list[dict[str, Array]]) -> dict[str, Array]:
    """Records of runs [layers, ...] as records of the model [L, ...]."""
    joined = {}
    for site in recorded[0]:
        if not all(site in records for records in recorded):
            raise ValueError(f"record {site!r} is not there in every layer: need sites that all of them have")
        values = [records[site] for records in recorded]
        shapes = {value.shape[1:] for value in values}
        if len(shapes) > 1:
            raise ValueError(f"record {site!r} has different shapes in different layers, {sorted(shapes)}")
        joined[site] = jnp.concatenate(values)
    return joined
