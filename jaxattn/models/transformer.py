"""The model that decoders, encoders and vision models are configurations of: embedding, layers, final norm, head."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from jaxattn import nn
from jaxattn.cache import Policy, check_room
from jaxattn.core.attend.graph import Ancestors
from jaxattn.core.attend.mask import Causal, Documents, anded, as_mask, documents_of
from jaxattn.core.attend.measure import Measure
from jaxattn.core.checks import check_array
from jaxattn.models.config import Branch, Layer, TransformerConfig
from jaxattn.models.remat import remade
from jaxattn.nn.parameter import linear_map, undecayed
from jaxattn.nn.recurrent import as_mixer
from jaxattn.nn.spec import built, owned, part_of
from jaxattn.nn.tap import OF_MODEL, At, Tap, as_edits, as_records, scanned
from jaxattn.nn.tokens import Tokens

DOCUMENTS = 8  # how many of them may be packed in a row behind meta tokens: each has its own


class Residual(nnx.Module):
    """x + scale ⊙ gate(norm(x), norm_after(module(norm(x)))), and then norm_sum of that, from a `Branch`.

    Args:
        spec: The branch.
        features: D, the channels of x.
        dtype: The dtype of the computation.
        rngs: Streams for the initial parameters.
    """

    def __init__(self, spec: Branch, features: int, dtype: Any, rngs: nnx.Rngs):
        sizes: dict[str, Any] = {"features": features, "dtype": dtype, "rngs": rngs}
        self.norm = built(spec.norm, **sizes)
        self.module: Any = as_mixer(spec.module, **sizes)
        self.norm_after = built(spec.norm_after, **sizes)
        self.gate: Any = built(spec.gate, **sizes)
        self.norm_sum = built(spec.norm_sum, features=features, rngs=rngs)  # in the dtype of the residual stream
        self.scale = None if spec.scale is None else undecayed(jnp.full(features, float(spec.scale)))
        self.name = spec.name

    @property
    def mixes(self) -> bool:
        """Whether it moves information between tokens."""
        return isinstance(self.module, nn.Mixer)

    @property
    def adds(self) -> str:
        """The site of its result, which is added to the residual stream."""
        return self.site("attn_out" if self.mixes else "mlp_out")

    def site(self, name: str) -> str:
        """Returns the name that a site has in the layer."""
        return f"{self.name}.{name}" if self.name else name

    @property
    def inside(self) -> tuple[str, ...]:
        """The sites of the module, without that of its result."""
        known = self.mixes or isinstance(self.module, nn.FeedForward)
        return tuple(site for site in self.module.sites if site != "attn_out") if known else ()

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites of the branch, in the order in which it comes to them."""
        before = (self._scale,) if _tells(self.norm) else ()
        after = (self._scale,) if self.norm is None and _tells(self.norm_sum) else ()
        return (*before, *map(self.site, self.inside), self.adds, *after)

    @property
    def recorded_only(self) -> tuple[str, ...]:
        """The sites of the branch that take no edits."""
        return tuple(map(self.site, self.module.recorded_only)) if self.mixes else ()

    @property
    def _scale(self) -> str:
        return self.site("mixer_norm_scale" if self.mixes else "mlp_norm_scale")

    def added(self, x, tokens, tap, state, context, give):
        """Returns a pair: the result that is added to x, and the state.

        Args:
            x: [B, T, D].
            tokens: As of `nn.Mixer`.
            tap: Edits and records.
            state: As of `nn.Mixer`.
            context: As of `nn.Mixer`.
            give: A dict that takes the keys for layers without their own, or None.
        """
        inside = tap.renamed({self.site(name): name for name in self.inside})
        y = read = x if self.norm is None else _normed(self.norm, x, tap, self._scale)
        if self.mixes:
            more = {} if give is None else {"give": give}
            y, state = self.module(y, tokens, inside, state, context, **more)
        else:
            y = self.module(y, inside) if isinstance(self.module, nn.FeedForward) else self.module(y)
        y = y if self.norm_after is None else self.norm_after(y)
        y = y if self.gate is None else self.gate(read, y)
        return tap(self.adds, y if self.scale is None else self.scale[...] * y), state

    def closed(self, x, tap):
        """Returns the sum as the next branch reads it."""
        if self.norm_sum is None:
            return x
        return _normed(self.norm_sum, x, tap, self._scale) if self.norm is None else self.norm_sum(x)


def _tells(norm: Any) -> bool:
    """Returns whether a norm says what it divides by."""
    return isinstance(norm, nn.RMSNorm | nn.LayerNorm)


def _normed(norm: Any, x: Array, tap: Tap, site: str) -> Array:
    return norm(x, tap, site) if _tells(norm) else norm(x)


class Block(nnx.Module):
    """Residual branches in sequence or in parallel, from a `Layer`.

    Args:
        spec: The layer.
        features: D, the channels of x.
        dtype: The dtype of the computation.
        rngs: Streams for the initial parameters.

    Raises:
        ValueError: Two branches have a site of the same name.
    """

    def __init__(self, spec: Layer, features: int, dtype: Any, rngs: nnx.Rngs):
        self.deterministic, self.parallel = False, spec.parallel
        self.branches = nnx.List([Residual(branch, features, dtype, rngs) for branch in spec.branches])
        for site in self.sites:
            if self.sites.count(site) > 1:
                raise ValueError(
                    f"branches have the site {site!r} {self.sites.count(site)} times: need Branch(..., name=...) for "
                    "all but one of them"
                )
        kinds = [mixer.keys_from for mixer in self.mixers]
        if "layer" in kinds and "self" in kinds:
            raise ValueError("a layer that reads the keys of another has keys of its own too: need one or the other")

    @property
    def mixers(self) -> list[Any]:
        """The mixers, each of which has a state."""
        return [branch.module for branch in self.branches if branch.mixes]

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites of the layer, in the order in which it comes to them."""
        found = ["resid_pre"]
        for number, branch in enumerate(self.branches):
            found += branch.sites
            if not self.parallel and branch.mixes and number < len(self.branches) - 1:
                found.append(branch.site("resid_mid"))
        return (*found, "resid")

    @property
    def edited(self) -> tuple[str, ...]:
        """The sites that take edits."""
        kept = {site for branch in self.branches for site in branch.recorded_only}
        return tuple(site for site in self.sites if site not in kept)

    def keeps(self, site: str, reducer: Any) -> bool:
        """Returns whether this layer has such a record. Measures are of the weights of attention."""
        branch, dot, _ = site.rpartition(".")
        scores = f"{branch}{dot}scores"
        return site in self.sites and (scores in self.sites or not isinstance(reducer, Measure))

    def __call__(self, x, tokens, tap, states, shared, give, context):
        x = total = tap("resid_pre", x)
        states = None if states is None else list(states)
        mixer = 0
        for number, branch in enumerate(self.branches):
            held, read, of, given = None, None, tokens, None
            if branch.mixes:
                held = None if states is None else states[mixer]
                kind = branch.module.keys_from
                read = {"layer": shared, "context": context}.get(kind)
                of = _across(tokens, context) if kind == "context" else tokens
                given = give if kind == "self" else None
            y, held = branch.added(x, of, tap, held, read, given)
            total = total + y
            if branch.mixes:
                if states is not None:
                    states[mixer] = held
                mixer += 1
            if not self.parallel:
                x = total = branch.closed(total, tap)
                if branch.mixes and number < len(self.branches) - 1:
                    x = total = tap(branch.site("resid_mid"), x)
        return tap("resid", total), None if states is None else tuple(states)


def _across(tokens: Tokens, context: Any) -> Tokens:
    """Returns the tokens as cross-attention sees them: of their mask only the document of each."""
    other = getattr(context, "tokens", None)
    ids, others = documents_of(tokens.mask), None if other is None else documents_of(other.mask)
    if context is None and ids is not None:
        raise ValueError("mask has documents but context is None: need the context, with its documents, in every call")
    if context is not None and (ids is None) != (others is None):
        raise ValueError("mask has documents on one side of cross-attention only: need them on both sides, or on none")
    mask = None if ids is None or others is None else Documents(ids, others)
    return dataclasses.replace(tokens, mask=mask, bias=None)


class Transformer(nnx.Module):
    """logits [B, T, vocabulary] from tokens [B, T], vectors, an image or frames, made from a `TransformerConfig`.

    Layers with equal specs that stand side by side are one module with a leading layer axis on its arrays, scanned.

    Args:
        config: The config of the model.
        rngs: Streams for the initial parameters, and `dropout`.

    Raises:
        ValueError: A tied head has no table of tokens, a layer reads the keys of a layer before that has none, `dtype`
            is float64 in a JAX of 32 bits, or a module refuses its arguments.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        if config.dtype == "float64" and jax.dtypes.canonicalize_dtype("float64") != "float64":
            raise ValueError(
                "dtype is 'float64' but JAX computes in 32 bits: need jax.config.update('jax_enable_x64', True)"
            )
        self.config = config
        sizes: dict[str, Any] = {"vocabulary": config.vocabulary, "length": config.length, "rngs": rngs}
        inner = config.width if config.embed_width is None else config.embed_width
        sizes |= {"features": inner}
        self.embed: Any = built(config.embed, **sizes)
        self.positions, self.embed_norm = built(config.positions, **sizes), built(config.embed_norm, **sizes)
        up = config.embed_width is not None
        options: dict[str, Any] = {"axes": (None, "width"), "use_bias": True, "role": "decayed"}
        self.embed_map = linear_map(inner, config.width, None, rngs, **options) if up else None
        sizes |= {"features": config.width}
        self.bias = owned(built(config.bias, **sizes))
        runs = [(spec, len(list(run))) for spec, run in itertools.groupby(config.layers)]
        self.lengths = tuple(length for _, length in runs)
        self.runs = nnx.List([_stack(spec, length, config, rngs) for spec, length in runs])
        known = {site for run in self.runs for site in run.sites} - {"scores", "weights", "lse", "read"}  # no values
        if not isinstance(config.remat, str) and (unknown := sorted(set(config.remat) - known)):
            raise ValueError(f"remat names {unknown}, which no layer has: need some of {sorted(known)}")
        kinds = [{mixer.keys_from for mixer in run.mixers} for run in self.runs]
        self.echoes = any(mixer.echo for run in self.runs for mixer in run.mixers)
        self.reads = tuple("layer" in kind for kind in kinds)  # keys of a run before
        for number, (before, kind) in enumerate(itertools.pairwise([set(), *kinds])):
            if "layer" in kind and not before & {"self", "layer"}:
                first = sum(self.lengths[:number])
                raise ValueError(f"layers[{first}] shares the keys of the layer before it, which has none")
            if "layer" in kind and [mixer.keys_from for mixer in self.runs[number - 1].mixers].count("self") > 1:
                raise ValueError("a layer shares its keys, but has several mixers with keys: need one")
        crossing = [mixer for run in self.runs for mixer in run.mixers if mixer.keys_from == "context"]
        self.crosses, self.absorbs = bool(crossing), any(mixer.absorb for mixer in crossing)
        if self.absorbs and not all(mixer.absorb for mixer in crossing):
            raise ValueError(
                "some layers of cross-attention have absorb=True, and others keep keys: need one or the other"
            )
        if self.crosses and config.meta_tokens:
            raise ValueError(
                f"meta_tokens is {config.meta_tokens} in a model with cross-attention, which they would read before "
                "there is a context: need 0"
            )
        meta = (config.meta_tokens, config.width)
        self.meta = (
            undecayed(jax.random.normal(rngs.params(), meta) * 0.02, None, "width") if config.meta_tokens else None
        )
        self.norm: Any = built(config.norm, **sizes)
        self.head: Any = built(config.head, **sizes)
        tied = isinstance(self.head, nn.Head | nn.MaskedTokenHead) and self.head.tied
        if tied and not isinstance(self.embed, nn.TokenEmbedding):
            raise ValueError(f"head is {config.head} but embed is {config.embed}: need tied=False without token ids")
        reads = self.head.map.out_features if isinstance(self.head, nn.MaskedTokenHead) else config.width
        if tied and reads != inner:
            raise ValueError(f"head is {config.head}, tied to an embedding of {inner} channels, but has {reads}")

    @nn.on_any_mesh
    def __call__(
        self,
        inputs: Shaped[Array, "b t ..."],
        *,
        positions: Int[Array, "#b t"] | None = None,
        mask: Any = None,
        types: Int[Array, "#b t"] | None = None,
        state: Any = None,
        context: Any = None,
        edits: Mapping[str, Any] = {},
        record: Any = (),
        start: tuple[Int[Array, ""] | int, Float[Array, "b s d"]] | None = None,
        logits_at: Int[Array, "#b p"] | Int[Array, " p"] | None = None,
        parents: Int[Array, "#b t"] | None = None,
    ) -> tuple[Float[Array, "b t vocabulary"], Any, dict[str, Any]]:
        """Runs the model.

        With meta tokens, records of the layers cover the row that begins with them, and edits leave them as they are. A
        packed row may then hold 8 documents: one of more is NaN.

        Args:
            inputs: The inputs of the embedding: by default tokens [B, T], ints. Tokens outside the vocabulary, negative
                ones among them, give NaN logits there and wherever they are seen; those of padding are not read.
            positions: [B, T] or [T], default 0..T−1, or after the last one in `state`; −1 is padding.
            mask: A mask, and-ed with each layer's own; `Documents(ids)` for packed documents.
            types: [B, T] or [1, T], token types for embeddings that have a table of them.
            state: From `init_state` or an earlier call when decoding.
            context: `nn.Context`, or an array [B, S, C], which cross-attention reads. With a state it is needed in the
                first call only: the state keeps its keys, or itself under `absorb`.
            edits: Site of `trace.SITES` -> the edit of that site, or several in a tuple that act one after the other.
                An edit is shared by all layers that have the site; `Layers(edit)` has arrays by layer, and {layer:
                edit} acts in single layers. Sites of a branch with a name are `name.site`.
            record: Names of sites, each kept whole; or name -> (site, reducer). Records of layers have a leading layer
                axis; they are a list by layer, with None for layers without the site, where shapes differ.
            start: A pair (layer, its `resid_pre`) from which the run begins, where earlier layers are as in a run
                before. They cost nothing then, their edits do nothing, and their records are NaN (integers: −1).
            logits_at: [P] or [B, P], the positions of the tokens whose logits are wanted, [B, P, vocabulary]; NaN where
                no token stands. All tokens by default. The last norm and the head are computed of these tokens alone,
                which saves much where the vocabulary is large.
            parents: [B, T] or [T] where the tokens are nodes of a tree of drafts (SpecInfer, Miao et al., 2024): the
                node before each, a smaller number, or −1 for a root. A node sees what the state holds, itself and its
                ancestors, and stands as many places behind the last token as it has ancestors. The state that comes
                back holds the nodes beside the text, until `joined` says which of them it takes.

        Returns:
            A triple (logits, state, records).

        Raises:
            TypeError: The embedding does not read such inputs, or a value is no edit or reducer.
            ValueError: The inputs are empty, a site is unknown, no layer has a site, edits have no layer axis, or a
                layer does not exist.
        """
        check_array("inputs", inputs)
        if not (context is None or hasattr(context, "dtype") or isinstance(context, nn.Context)):
            raise TypeError(f"context must be an array [batch, length, channels], or nn.Context, got {context!r}")
        if context is not None and not self.crosses:
            raise ValueError("context is given, but no layer reads it: need a branch with keys_from='context'")
        if 0 in inputs.shape:
            raise ValueError(f"inputs has shape {inputs.shape}: need at least one row of at least one token")
        changes, asked = as_edits(edits, sum(self.lengths)), as_records(record)
        if parents is not None:
            parents = jnp.atleast_2d(jnp.asarray(parents))
            if parents.shape[-1] != inputs.shape[1] or changes or asked or logits_at is not None:
                raise ValueError(
                    f"parents has shape {parents.shape} for {inputs.shape[1]} tokens: need one for each, and neither "
                    "edits, records nor logits_at, which tell tokens apart by their position"
                )
            if positions is None:
                after = 0 if state is None else self.reached(state)[:, None]
                positions = after + Ancestors(parents).depths
        x = self.embed(inputs, positions, types)
        row = self.tokens(x, positions=positions, mask=mask, state=state)
        row = row if parents is None else dataclasses.replace(row, parents=parents)
        of_model = {site: each for site, each in changes.items() if site in OF_MODEL}
        tap = Tap(of_model, {name: each for name, each in asked.items() if each[0] in OF_MODEL}).at(row)
        of_inputs = row  # without meta tokens
        table = self.positions.length if isinstance(self.positions, nn.PositionEmbedding) else row.length
        if row.in_order and row.documents is None and row.length > table:
            raise ValueError(f"there are {row.length} tokens: need at most {table}, the learned positions")
        x = x if self.positions is None else x + self.positions(row.places)
        x = x if self.embed_norm is None else self.embed_norm(x)
        x = tap("embed", x if self.embed_map is None else self.embed_map(x))
        strip: Callable[[Array], Array] = lambda y: y  # noqa: E731
        if self.meta is not None and state is None:
            x, row, strip = nn.with_prefix(self.meta[...], x, row, DOCUMENTS)
        elif self.meta is not None:
            row = nn.behind_prefix(row, len(x), self.config.meta_tokens)
        asked = {name: each for name, each in asked.items() if each[0] not in OF_MODEL}
        changes = {site: each for site, each in changes.items() if site not in OF_MODEL}
        from_layer: Any = 0
        if start is not None:
            from_layer, resid = start
            if jnp.shape(resid) != x.shape:
                raise ValueError(f"start has a residual stream of shape {jnp.shape(resid)}: need {x.shape}")
            if tap.sites & {"embed"}:
                raise ValueError("start leaves the embedding out, but there is an edit or a record of the site 'embed'")
            x = jnp.asarray(resid)
        x, state, records = self.layers(
            x, row, state=state, context=context, edits=changes, record=asked, start=from_layer
        )
        x = strip(x)
        if logits_at is not None:
            if not (self.head is None or isinstance(self.head, nn.Head | nn.MaskedTokenHead)):
                raise ValueError(f"logits_at is given, but the head is {type(self.head).__name__}, of all tokens")
            wanted = jnp.atleast_2d(jnp.asarray(logits_at))
            if wanted.ndim != 2 or len(wanted) not in (1, len(x)) or not jnp.issubdtype(wanted.dtype, jnp.integer):
                raise ValueError(
                    f"logits_at has shape {jnp.shape(logits_at)} and dtype {wanted.dtype}: need integers [P] or "
                    f"[{len(x)}, P]"
                )
            x, of_inputs = of_inputs.only(x, wanted, jnp.nan), of_inputs.moved(wanted)
            tap = tap.at(of_inputs)
        x = tap("final_norm", x if self.norm is None else _normed(self.norm, x, tap, "final_norm_scale"))
        logits = tap("logits", x if self.head is None else self.head(x, self.embed, of_inputs))
        return logits, state, tap.records | records

    def tokens(self, x: Float[Array, "b t d"], *, positions: Any = None, mask: Any = None, state: Any = None) -> Tokens:
        """Returns the tokens of one call, as all layers see them, with the mask and the bias that they share.

        Args:
            x: [B, T, D].
            positions: As of the model.
            mask: As of the model.
            state: As of the model.
        """
        after = None if state is None or positions is not None else self.reached(state)
        mask = as_mask(mask)
        if self.config.causal and not any(isinstance(term, Causal) for term in anded(mask)):
            mask = Causal() if mask is None else Causal() & mask
        row = Tokens.of(x, positions=positions, mask=mask, after=after)
        return row if self.bias is None else dataclasses.replace(row, bias=part_of(self.bias))

    def reached(self, state: Any) -> Int[Array, " b"]:
        """Returns the position after the last token that a state holds, not counting meta tokens."""
        for run, held in zip(self.runs, state[: len(self.runs)], strict=True):
            graph, arrays = nnx.split(run)
            mixers = nnx.merge(graph, jax.tree.map(lambda x: x[0], arrays)).mixers
            for mixer, each in zip(mixers, held, strict=True):
                if mixer.keys_from not in ("layer", "context"):
                    return mixer.reached(jax.tree.map(lambda x: x[0], each)) - self.config.meta_tokens
        raise ValueError("state holds no positions, as no mixer has any of its own: need positions=")

    def layers(
        self,
        x: Float[Array, "b t d"],
        tokens: Tokens | None = None,
        *,
        state: Any = None,
        context: Any = None,
        edits: Mapping[str, Any] = {},
        record: Any = (),
        start: Int[Array, ""] | int = 0,
        stop: Int[Array, ""] | int | None = None,
    ) -> tuple[Float[Array, "b t d"], Any, dict[str, Any]]:
        """Runs the model between embedding and final norm, without its meta tokens.

        Args:
            x: [B, T, D], the input of the first layer.
            tokens: The tokens of the call; by default made by the method `tokens`.
            state: As of the model.
            context: As of the model.
            edits: As of the model, at sites of layers.
            record: As of the model, at sites of layers.
            start: The first layer that runs, and reads x. Layers that do not run cost nothing, and their records are
                NaN (integers: −1). It may be traced, so that one program serves all layers.
            stop: The layer before which the run ends; None for after the last.

        Returns:
            A triple (x after the last of the layers that run, state, records).

        Raises:
            ValueError: Layers are left out where there is a state, or where a layer reads the keys of another.
        """
        count = sum(self.lengths)
        runs_all = isinstance(start, int) and start == 0 and stop is None
        runs_none = isinstance(start, int) and start == count
        if not runs_all:
            if state is not None:
                raise ValueError("start or stop leaves layers out, but there is a state, which needs all of them")
            if any(self.reads) and not runs_none:
                raise ValueError(
                    "start or stop leaves layers out, but a layer reads the keys of another: need runs of all layers, "
                    "such as interchange(..., restart=False)"
                )
            for name, end in (("start", start), ("stop", stop)):
                if isinstance(end, int) and not 0 <= end <= count:
                    raise ValueError(f"{name} is {end}: need a layer from 0 to {count}")
                if end is not None and hasattr(end, "dtype"):  # where it is not known, NaN tells a layer that is none
                    x = jnp.where((end >= 0) & (end <= count), x, jnp.nan)
        if tokens is None:
            tokens = self.tokens(x, state=state)
            tokens = tokens if state is None else tokens.moved(tokens.positions + self.config.meta_tokens)
        context = nn.Context(context) if hasattr(context, "dtype") else context
        if self.absorbs and state is not None:  # which keeps the context, once for all layers
            context = state[-1] if context is None else context
        check_room(state, tokens.positions)  # here, since the layers are traced
        changes, asked = as_edits(edits, sum(self.lengths)), as_records(record)
        self._check_sites(changes, asked)
        kept = () if isinstance(self.config.remat, str) else tuple(self.config.remat)
        # The residual stream, which the scan carries: at least float32, and as wide as what is added to it.
        x = x.astype(jnp.promote_types(jnp.promote_types(x.dtype, jnp.float32), self.config.dtype))
        states, recorded = [], []
        shared: nn.KeyValue | None = None
        first = 0
        for number, (run, length) in enumerate(zip(self.runs, self.lengths, strict=True)):
            gives = not self.reads[number] and self.reads[number + 1 : number + 2] == (True,)
            given = shared if self.reads[number] else None
            of_run = {name: each for name, each in asked.items() if run.keeps(*each)}
            sliced, edits_of = scanned(changes, first, length, run.edited)

            # Scanned as plain arrays: unlike `nnx.scan` this also works where the model is a constant of a JAX loop.
            graph, *split = nnx.split(run, nnx.Param, ...)
            params, rest = split
            every = jax.tree.map(lambda x: x[0], params) if self.config.shared else None

            def layer(
                carry, slices, graph=graph, every=every, given=given, of_run=of_run, edits_of=edits_of, gives=gives
            ):
                x, keys = carry
                params, rest, state, edits, _ = slices
                block = nnx.merge(graph, params if every is None else every, rest)
                tap = Tap(edits_of(edits), of_run).at(tokens).keeping(kept)
                give: dict[str, Any] | None = {} if gives else None
                x, state = block(x, tokens, tap, state, given, give, context)
                keys = keys if give is None else give["keys"]
                if isinstance(keys, nn.KeyValue) and not self.echoes:
                    keys = keys._replace(query=None)
                return (x, keys), (state, tap.records, nnx.state(block, nnx.RngCount))

            numbers = jnp.arange(first, first + length)
            held = None if state is None else state[number]
            own = (params if every is None else None), rest, held, sliced, numbers
            keys = None
            if gives:  # what the carry begins with has the shapes of what the first layer gives
                one = jax.tree.map(lambda x: x[0], own)
                shapes = jax.eval_shape(lambda x, one, layer=layer: layer((x, None), one)[0][1], x, one)
                keys = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            some = layer if runs_all else _between(layer, start, count if stop is None else stop)
            some = remade(some, self.config.remat)
            if held is not None and _keeps_state(layer, (x, keys), own):
                # Carried, a state is changed in place: as a result of the scan all of it would be written anew.
                in_place = (params if every is None else None), rest, None, sliced, numbers
                ((x, keys), new_state), (_, records, counts) = jax.lax.scan(
                    _in_place(some, first), ((x, keys), held), in_place
                )
            else:
                (x, keys), (new_state, records, counts) = jax.lax.scan(some, (x, keys), own)
            shared = keys if gives else shared  # several runs may read the same keys
            first += length
            if not run.deterministic:
                nnx.update(run, counts)
            states.append(new_state)
            recorded.append(records)
        kept_context = (context,) if self.absorbs else ()
        return x, None if state is None else (*states, *kept_context), _join(recorded, self.lengths)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites of the model, in the order in which it comes to them."""
        of_layers = dict.fromkeys(site for run in self.runs for site in run.sites)
        of_norm = ("final_norm_scale",) if _tells(self.norm) else ()
        return ("embed", *of_layers, *of_norm, "final_norm", "logits")

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
        """Returns the state that decoding starts from: by run of layers, the states of its mixers.

        A token beyond the capacity raises ValueError where its position is known, and its logits are NaN under `jit`,
        but for models whose every layer is a window or has a state of fixed size: they go on.

        Args:
            batch: B.
            capacity: The most tokens of a sequence.
            store: The policy by which attention keeps and reads earlier tokens.
        """

        def stacked(run: Block, length: int) -> Any:
            graph, arrays = nnx.split(run)
            mixers = nnx.merge(graph, jax.tree.map(lambda x: x[0], arrays)).mixers
            one = tuple(mixer.init_state(batch, capacity, store) for mixer in mixers)
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (length, *x.shape)), one)

        capacity += self.config.meta_tokens
        state = tuple(stacked(run, length) for run, length in zip(self.runs, self.lengths, strict=True))
        state += (None,) if self.absorbs else ()
        if self.meta is None:
            return state
        meta = jnp.broadcast_to(self.meta[...], (batch, *self.meta.shape))
        return self.layers(meta, state=state)[1]


def _keeps_state(layer: Callable[..., Any], carry: Any, slices: Any) -> bool:
    """Returns whether a layer hands on a state of the structure, shapes and dtypes that it was given."""
    one = jax.tree.map(lambda x: x[0], slices)
    _, (state, _, _) = jax.eval_shape(layer, carry, one)
    given, after = (jax.tree.map(lambda x: (x.shape, x.dtype), each) for each in (one[2], state))
    return bool(given == after)


def _in_place(layer: Callable[..., Any], first: int) -> Callable[..., Any]:
    """Returns the body of a scan that carries the states of all layers, from that of layer number `first` on."""

    def changed(carry, slices):
        carry, states = carry
        params, rest, _, edits, number = slices
        held = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number - first, keepdims=False), states)
        carry, (new, records, counts) = layer(carry, (params, rest, held, edits, number))
        states = jax.tree.map(
            lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, number - first, 0), states, new
        )
        return (carry, states), (None, records, counts)

    return changed


def _between(layer: Callable[..., Any], start: Any, stop: Any) -> Callable[..., Any]:
    """Returns the body of a scan that leaves out the layers before `start` and from `stop` on."""

    def left_out(carry, slices):
        _, (_, records, _) = jax.eval_shape(layer, carry, slices)
        records = jax.tree.map(lambda x: jnp.full(x.shape, _nothing(x.dtype), x.dtype), records)
        return carry, (None, records, nnx.filter_state(slices[1], nnx.RngCount))

    def some(carry, slices):
        number = slices[-1]
        return jax.lax.cond((number >= start) & (number < stop), layer, left_out, carry, slices)

    return some


def _nothing(dtype: Any) -> float | int:
    """Returns the value that stands for no record."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return jnp.nan
    return -1 if jnp.issubdtype(dtype, jnp.signedinteger) else 0


def _stack(spec: Layer, length: int, config: TransformerConfig, rngs: nnx.Rngs) -> Block:
    """Makes `length` layers of one spec as one module, every array with a leading layer axis: of 1 where shared."""

    @nnx.split_rngs(splits=length)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: None, "axes": "layers"})
    def create(rngs: nnx.Rngs) -> Block:
        return Block(spec, config.width, jnp.dtype(config.dtype), rngs)

    block = create(rngs)
    if config.shared:
        nnx.update(block, jax.tree.map(lambda x: x[:1], nnx.state(block, nnx.Param)))
    return block


def _join(recorded: list[dict[str, Any]], lengths: tuple[int, ...]) -> dict[str, Any]:
    """Returns records of runs [layers, ...] as those of the model: [L, ...] where shapes agree, else lists by layer."""
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
