"""The decoder-only language model: embedding, pre-norm layers from a list of specs, output projection."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxattn import nn
from jaxattn.cache import Policy, check_room
from jaxattn.core.attend.measure import Measure
from jaxattn.core.checks import as_ids, check_array
from jaxattn.models.config import DecoderConfig, Layer
from jaxattn.nn.parameter import linear_map, normed, rms_norm, undecayed
from jaxattn.nn.tap import OF_MODEL, SITES, At, Tap, as_edits, as_records, scanned
from jaxattn.nn.tokens import Tokens

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

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites of the layer, in the order in which it comes to them."""
        before, after = ("resid_pre", "mixer_norm_scale"), ("attn_out", "resid_mid")
        inside = tuple(site for site in self.mixer.sites if site != "attn_out")
        block = ("mlp_norm_scale", "mlp_pre", "mlp_post") if self.feed_forward is not None else ()
        return (*before, *inside, *after, *block, "mlp_out", "resid")

    @property
    def edited(self) -> tuple[str, ...]:
        """The sites that take edits."""
        return tuple(site for site in self.sites if site not in self.mixer.recorded_only)

    def keeps(self, site: str, reducer: Any) -> bool:
        """Whether this layer has such a record. Measures are of the weights of attention."""
        return site in self.sites and ("scores" in self.sites or not isinstance(reducer, Measure))

    def __call__(self, x, tokens, tap, state, shared, give):
        inside = tap.only(set(self.mixer.sites) - {"attn_out"})
        x = tap("resid_pre", x)
        more = {} if give is None else {"give": give}
        y, state = self.mixer(
            normed(self.mixer_norm, x, tap, "mixer_norm_scale"), tokens, inside, state, shared, **more
        )
        x = tap("resid_mid", x + tap("attn_out", y))
        if self.feed_forward is None or self.feed_forward_norm is None:
            y = jnp.zeros_like(x)
        else:
            y = self.feed_forward(normed(self.feed_forward_norm, x, tap, "mlp_norm_scale"), tap)
        return tap("resid", x + tap("mlp_out", y)), state


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
        mask: Any = None,
        state: Any = None,
        edits: Mapping[str, Any] = {},
        record: Any = (),
    ) -> tuple[Float[Array, "b t vocabulary"], Any, dict[str, Any]]:
        """(logits, state, records).

        Args:
            tokens: [B, T] ints, or [B, T, inputs] vectors. Tokens outside the vocabulary, negative ones among them,
                give NaN logits there and wherever they are seen; those of padding are not read.
            positions: [B, T] or [T], default 0..T−1, or after the last one in `state`; −1 is padding.
            mask: And-ed with each layer's own; `Documents(ids)` for packed documents.
            state: From `init_state` when decoding.
            edits: Site of `trace.SITES` -> what is changed there: an edit, or several in a tuple that act one after
                the other. An edit is shared by all layers that have the site; `Layers(edit)` has arrays by layer, and
                {layer: edit} acts in single layers.
            record: Names of sites, each kept whole; or name -> (site, reducer). Records of layers have a leading layer
                axis; they are a list by layer, with None for layers without the site, where shapes differ.

        With meta tokens, what is recorded in the layers covers the row that begins with them, and edits leave them as
        they are. A packed row may then hold 8 documents: one of more is NaN.

        Raises:
            TypeError: For tokens that are no array of the right kind, and for what is no edit or reducer.
            ValueError: For no tokens, unknown sites, sites that no layer has, edits without a layer axis, and layers
                that there are not.
        """
        check_array("tokens", tokens)
        given, inputs = f"{tokens.dtype}{list(tokens.shape)}", self.config.inputs
        if inputs and (not jnp.issubdtype(tokens.dtype, jnp.floating) or tokens.shape[2:] != (inputs,)):
            raise TypeError(f"tokens must be vectors [batch, length, {inputs}], got {given}")
        if not inputs and (not jnp.issubdtype(tokens.dtype, jnp.integer) or tokens.ndim != 2):
            raise TypeError(f"tokens must be integers [batch, length], got {given}")
        if 0 in tokens.shape:
            raise ValueError(f"tokens has shape {tokens.shape}: need at least one row of at least one token")
        after = None if state is None else self.reached(state)
        row = Tokens.of(tokens, positions=positions, mask=mask, after=after)
        changes, asked = as_edits(edits, sum(self.lengths)), as_records(record)
        of_model = {site: each for site, each in changes.items() if site in OF_MODEL}
        tap = Tap(of_model, {name: each for name, each in asked.items() if each[0] in OF_MODEL}).at(row)
        x = tap("embed", self.embed(tokens) if inputs else self.embedded(tokens, positions))
        strip: Callable[[Array], Array] = lambda y: y  # noqa: E731
        if self.meta is not None and state is None:
            x, row, strip = nn.with_prefix(self.meta[...], x, row, DOCUMENTS)
        elif self.meta is not None:
            row = nn.behind_prefix(row, len(tokens), self.config.meta_tokens)
        asked = {name: each for name, each in asked.items() if each[0] not in OF_MODEL}
        changes = {site: each for site, each in changes.items() if site not in OF_MODEL}
        x, state, records = self.layers(x, row, state=state, edits=changes, record=asked)
        x = tap("final_norm", normed(self.final_norm, strip(x), tap, "final_norm_scale"))
        logits = tap("logits", self.embed.attend(x) if self.head is None else self.head(x))
        return logits, state, tap.records | records

    def reached(self, state: Any) -> Int[Array, " b"]:
        """The position after the last token that a state holds, not counting meta tokens."""
        graph, arrays = nnx.split(self.runs[0])
        first = nnx.merge(graph, jax.tree.map(lambda x: x[0], arrays))
        return first.mixer.reached(jax.tree.map(lambda x: x[0], state[0])) - self.config.meta_tokens

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
        tokens: Tokens | None = None,
        *,
        state: Any = None,
        edits: Mapping[str, Any] = {},
        record: Any = (),
    ) -> tuple[Float[Array, "b t d"], Any, dict[str, Any]]:
        """(x after all layers, state, records): the model between embedding and final norm, without its meta tokens."""
        if tokens is None:
            after = None if state is None else self.reached(state) + self.config.meta_tokens
            tokens = Tokens.of(x, after=after)
        check_room(state, tokens.positions)  # here, since the layers are traced
        changes, asked = as_edits(edits, sum(self.lengths)), as_records(record)
        self._check_sites(changes, asked)
        states, recorded = [], []
        shared: nn.KeyValue | None = None
        first = 0
        for number, (run, length) in enumerate(zip(self.runs, self.lengths, strict=True)):
            gives = not self.reads[number] and self.reads[number + 1 : number + 2] == (True,)
            given = shared if self.reads[number] else None
            of_run = {name: each for name, each in asked.items() if run.keeps(*each)}
            sliced, edits_of = scanned(changes, first, length, run.edited)

            # Scanned as plain arrays: unlike `nnx.scan` this also works where the model is a constant of a JAX loop.
            graph, arrays = nnx.split(run)

            def layer(carry, slices, graph=graph, given=given, of_run=of_run, edits_of=edits_of, gives=gives):
                x, keys = carry
                arrays, state, edits = slices
                block = nnx.merge(graph, arrays)
                tap = Tap(edits_of(edits), of_run).at(tokens)
                give: dict[str, Any] | None = {} if gives else None
                x, state = block(x, tokens, tap, state, given, give)
                keys = keys if give is None else give["keys"]
                return (x, keys), (state, tap.records, nnx.state(block, nnx.RngCount))

            own = arrays, None if state is None else state[number], sliced
            keys = None
            if gives:  # what the carry begins with has the shapes of what the first layer gives
                one = jax.tree.map(lambda x: x[0], own)
                shapes = jax.eval_shape(lambda x, one, layer=layer: layer((x, None), one)[0][1], x, one)
                keys = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            (x, keys), (new_state, records, counts) = jax.lax.scan(layer, (x, keys), own)
            shared = keys if gives else shared  # several runs may read the same keys
            first += length
            if not run.deterministic:
                nnx.update(run, counts)
            states.append(new_state)
            recorded.append(records)
        return x, None if state is None else tuple(states), _join(recorded, self.lengths)

    @property
    def sites(self) -> tuple[str, ...]:
        """All sites of the model."""
        return tuple(site for site in SITES if site in OF_MODEL or any(site in run.sites for run in self.runs))

    def _check_sites(self, edits: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        by_layer = [run.edited for run, length in zip(self.runs, self.lengths, strict=True) for _ in range(length)]
        for name, (site, reducer) in record.items():
            if not any(run.keeps(site, reducer) for run in self.runs):
                raise ValueError(f"record {name!r} is of {site!r}, which no layer has: need one of {list(self.sites)}")
        for site, entries in edits.items():
            for entry in entries:
                one = isinstance(entry, At)
                if not any(site in sites for sites in (by_layer[entry.layer : entry.layer + 1] if one else by_layer)):
                    where = f"layer {entry.layer} does not have" if one else "no layer has"
                    raise ValueError(f"edits has the site {site!r}, which {where}: need one of {list(self.sites)}")

    def init_state(self, batch: int, capacity: int, store: Policy | None = None) -> Any:
        """What decoding sequences of at most `capacity` tokens starts from: a pytree, one entry per run of layers.

        A token beyond the capacity raises ValueError where its position is known, and its logits are NaN under `jit`,
        but for models whose every layer is a window or has a state of fixed size: they go on.
        """

        def stacked(run: Block, length: int) -> Any:
            graph, arrays = nnx.split(run)
            one = nnx.merge(graph, jax.tree.map(lambda x: x[0], arrays)).mixer.init_state(batch, capacity, store)
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


def _join(recorded: list[dict[str, Any]], lengths: tuple[int, ...]) -> dict[str, Any]:
    """Records of runs [layers, ...] as records of the model: [L, ...] where shapes agree, else a list by layer."""
    joined: dict[str, Any] = {}
    for name in dict.fromkeys(itertools.chain(*recorded)):
        of_runs = [records.get(name) for records in recorded]
        kinds = {tuple((x.shape[1:], x.dtype) for x in jax.tree.leaves(each)) for each in of_runs}
        if None not in of_runs and len(kinds) == 1:
            joined[name] = jax.tree.map(lambda *x: jnp.concatenate(x), *of_runs)
            continue
        joined[name] = [
            None if each is None else jax.tree.map(lambda x, layer=layer: x[layer], each)
            for each, length in zip(of_runs, lengths, strict=True)
            for layer in range(length)
        ]
    return joined
