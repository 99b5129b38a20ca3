"""Multi-head attention: projections around `attend`, with every slot an argument."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxattn.cache import Policy, Recent, Store, by_position, empty, unseen
from jaxattn.cache.store import Held
from jaxattn.core.attend.api import Implementation
from jaxattn.core.attend.bias import Bias, as_bias
from jaxattn.core.attend.choose import Choice
from jaxattn.core.attend.graph import Ancestors
from jaxattn.core.attend.maps import Dropout
from jaxattn.core.attend.mask import Explicit, as_mask, visible
from jaxattn.core.attend.normalize import Softmax
from jaxattn.core.attend.position import Position, Rotary
from jaxattn.core.attend.score import Dot
from jaxattn.core.attend.slots import Slots
from jaxattn.core.attend.tile import Tile
from jaxattn.core.checks import check_array
from jaxattn.nn.mechanisms import ShortConvolution
from jaxattn.nn.mixer import Mixer
from jaxattn.nn.parameter import Axis, linear_map
from jaxattn.nn.recurrent import Past
from jaxattn.nn.sharding import attend_in_shards
from jaxattn.nn.spec import Spec, built, owned, part_of
from jaxattn.nn.tap import Tap, Whole
from jaxattn.nn.tokens import Tokens


class KeyValue(NamedTuple):
    """Keys and values as attention meets them, for layers that share those of an earlier one.

    The keys are rotated. With a state, keys and values are all that the state holds.

    Attributes:
        key: [B, S, K, H].
        value: [B, S, K, H].
        positions: The positions of the keys, or None for 0, 1, ...
    """

    key: Float[Array, "b s k h"]
    value: Float[Array, "b s k h"]
    positions: Int[Array, "#b s g"] | None


class Context(NamedTuple):
    """Another sequence that attention reads.

    Attributes:
        x: [B, S, C].
        tokens: What stands where in the sequence; by default 0..S−1.
    """

    x: Float[Array, "b s c"]
    tokens: Tokens | None = None


KeysFrom = Literal["self", "layer", "context"]


class MultiHeadAttention(Mixer):
    """y = W_o concat_n(z_n),  z = attend(q, k, v),  q = W_q x,  k = W_k c,  v = W_v c,  with c = context or x.

    Slots take a part, a module that owns `nnx.Param`s and returns a part when called without arguments (see
    `jaxattn.nn.learned`), or a `Spec` of what makes either from features, heads, key_heads and head_dim. Arrays of a
    part that is given directly are constants: they are not trained.

    Args:
        features: D, the channels of x and y.
        heads: N, the number of query heads.
        key_heads: K, the number of key and value heads, a divisor of N; by default N.
        head_dim: H, the channels per head. The default is D / N, but H may be independent of both.
        keys_from: The source of keys and values: "self"; "layer", the layer before, so that there are no W_k and W_v
            and `context` is the `KeyValue` of that layer; "context", another sequence (cross-attention).
        context_features: The channels of `context`; by default D.
        position: The way in which queries and keys are told where they stand, such as `Rotary(10000.0)`; None for not
            at all.
        qk_norm: A norm of queries and keys over H, before they are turned, such as `Spec(nn.RMSNorm)`; over all heads
            together with `Spec(nn.AcrossHeads)`.
        gate: Whether z is multiplied by σ(W_g x) before W_o.
        project: Whether there is W_o; y has N·H channels without.
        dropout: The rate of dropout on the attention weights, active unless `deterministic` (see `nnx.Module.train` and
            `eval`).
        convolution: The width of a short causal convolution of q, k and v per channel, after their projection; 0 for
            none.
        use_bias: Whether the maps have biases: all, none, or those of the named ones of "query", "key", "value", "out"
            and "gate".
        score: The part that says how well a query matches a key.
        bias: The numbers added to scores; also an array or a function of positions, as in `attend`.
        mask: Which keys a query may see; also an array or a function of positions. In packed rows (`Documents`) the
            mask is meant within each document, so that `Sinks(4)` are the first of each.
        choice: A choice of blocks, such as `MoBA(512, 3)`, whose mask joins that of the call. It is made among all keys
            of a call with several tokens, in training and in reading a prompt. A call with one token, as in decoding,
            makes none, and reads what its store selects. A choice is causal, also where `mask` is not.
        normalize: The part that turns scores into weights.
        score_maps: A tuple of maps of the scores, applied in order.
        weight_maps: A tuple of maps of the weights, applied in order.
        implementation: As in `attend`.
        dtype: The dtype of the computation; parameters are float32.
        rngs: Streams for the initial parameters, and `dropout`.

    Raises:
        ValueError: Sizes do not divide or are out of range, cross-attention has positions or a choice, `keys_from` or a
            name of a bias is unknown, a convolution has keys that are not those of x, or dropout has no stream.
        TypeError: Maps are not in a tuple, or `position` or `choice` is of another kind.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        key_heads: int | None = None,
        head_dim: int | None = None,
        keys_from: KeysFrom = "self",
        context_features: int | None = None,
        position: Position | None = Rotary(),
        qk_norm: Spec | None = None,
        gate: bool = False,
        project: bool = True,
        dropout: float = 0.0,
        convolution: int = 0,
        use_bias: bool | Sequence[str] = False,
        score: Any = Dot(),
        bias: Any = None,
        mask: Any = None,
        choice: Spec | Choice | None = None,
        normalize: Any = Softmax(),
        score_maps: Sequence[Any] = (),
        weight_maps: Sequence[Any] = (),
        implementation: Implementation = "auto",
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        key_heads = heads if key_heads is None else key_heads
        if heads < 1:
            raise ValueError(f"heads must be at least 1, got {heads}")
        if head_dim is None and features % heads:
            raise ValueError(f"features {features} is no multiple of heads {heads}: choose another, or give head_dim")
        if key_heads < 1 or heads % key_heads:
            raise ValueError(f"key_heads is {key_heads} but heads is {heads}: need a divisor of {heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        if keys_from not in get_args(KeysFrom):
            raise ValueError(f"keys_from is {keys_from!r}: need one of {', '.join(get_args(KeysFrom))}")
        head_dim = features // heads if head_dim is None else head_dim
        if head_dim < 1:
            raise ValueError(f"head_dim must be at least 1, got {head_dim}")
        if position is not None:
            if not isinstance(position, Position):
                raise TypeError(f"position must be a part such as Rotary(10000.0), or None, got {position!r}")
            position.check(head_dim)
            if keys_from == "context" or context_features is not None:
                raise ValueError(f"position is {position} for keys of another sequence: need position=None")
        if not (choice is None or isinstance(choice, Spec | Choice)):
            raise TypeError(f"choice must be a part such as MoBA(512, 3), or None, got {choice!r}")
        if choice is not None and keys_from == "context":
            raise ValueError(f"choice is {choice} for keys of another sequence: need choice=None, since it is causal")
        if not (qk_norm is None or isinstance(qk_norm, Spec)):
            raise TypeError(f"qk_norm must be a spec such as Spec(nn.RMSNorm), or None, got {qk_norm!r}")
        own_keys = keys_from != "layer"
        if convolution and keys_from != "self":
            raise ValueError(f"convolution is {convolution} but keys_from is {keys_from!r}: need keys of x, or 0")
        for name, maps in (("score_maps", score_maps), ("weight_maps", weight_maps)):
            if not isinstance(maps, list | tuple):
                raise TypeError(f"{name} must be a tuple such as (SoftCap(50.0),), got {type(maps).__name__}")
        names = ("query", "key", "value", "out", "gate")
        biased = (names if use_bias else ()) if isinstance(use_bias, bool) else tuple(use_bias)
        if unknown := sorted(set(biased) - set(names)):
            raise ValueError(f"use_bias names {unknown}: need True, False, or some of {list(names)}")

        self.heads, self.key_heads, self.head_dim, self.keys_from = heads, key_heads, head_dim, keys_from
        self.position = nnx.data(position)
        self.dropout, self.deterministic = dropout, False
        self.implementation: Implementation = implementation
        self.dtype = dtype
        sizes = {"features": features, "heads": heads, "key_heads": key_heads, "head_dim": head_dim}
        score, bias, mask, normalize, *maps = (
            built(slot, **sizes, dtype=dtype, rngs=rngs)
            for slot in (score, bias, mask, normalize, *score_maps, *weight_maps)
        )
        mask = mask if isinstance(mask, nnx.Module) else as_mask(mask)
        self.score, self.bias, self.mask, self.normalize = (owned(slot) for slot in (score, bias, mask, normalize))
        self.choice = owned(built(choice, **sizes, dtype=dtype, rngs=rngs))
        self.score_maps = nnx.data(tuple(maps[: len(score_maps)]))
        self.weight_maps = nnx.data(tuple(maps[len(score_maps) :]))

        def linear(name: str, inputs: int, outputs: int, *axes: Axis) -> nnx.Linear:
            return linear_map(inputs, outputs, dtype, rngs, axes, use_bias=name in biased)

        context_features = features if context_features is None else context_features
        by_head, by_key_head = ("heads", heads), ("key_heads", key_heads)
        self.query = linear("query", features, heads * head_dim, "width", by_head)
        self.key = linear("key", context_features, key_heads * head_dim, "width", by_key_head) if own_keys else None
        self.value = linear("value", context_features, key_heads * head_dim, "width", by_key_head) if own_keys else None
        self.out = linear("out", heads * head_dim, features, by_head, "width") if project else None
        sides = {"query": by_head, "key": by_key_head, "value": by_key_head}
        self.convolution = nnx.Dict(
            {
                name: ShortConvolution(side[1] * head_dim, convolution, axis=side, rngs=rngs)
                for name, side in sides.items()
            }
            if convolution
            else {}
        )
        self.gate = linear("gate", features, heads * head_dim, "width", by_head) if gate else None
        norm_sizes = {"features": head_dim, "dtype": dtype, "rngs": rngs}
        self.query_norm = built(qk_norm, heads=heads, **norm_sizes)
        self.key_norm = built(qk_norm, heads=key_heads, **norm_sizes) if own_keys else None
        if dropout and "dropout" not in rngs and "default" not in rngs:
            raise ValueError(
                f"dropout is {dropout} but rngs has no such stream: need nnx.Rngs(0) or nnx.Rngs(dropout=0)"
            )
        self.stream = nnx.data(rngs["dropout"].fork() if dropout else None)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        tokens: Tokens | None = None,
        tap: Tap | None = None,
        state: Store | tuple[()] | None = None,
        context: Context | KeyValue | Array | None = None,
        give: dict[str, Any] | None = None,
    ) -> tuple[Float[Array, "b t d"], Store | tuple[()] | None]:
        """Runs self-attention over x, or cross-attention from x to `context`, or to the keys of another layer.

        With a state, cross-attention computes the keys of the context once: a call with `context` puts them into the
        state, and later calls without one read them there.

        Args:
            x: [B, T, D].
            tokens: What stands where; by default 0..T−1, and with a state the places after the last that it holds.
                Their mask is and-ed with the module's own.
            tap: Edits and records at the sites of this class. Its measures are taken in the one call to `attend`.
            state: A state from `init_state` or an earlier call: the new tokens are appended to it and see what it
                holds.
            context: Another sequence for cross-attention, or with keys_from="layer" the `KeyValue` of that layer.
            give: A dict that takes under "keys" the `KeyValue` for layers without keys of their own.

        Returns:
            A pair (y, state): y [B, T, D], and the state after these tokens.

        Raises:
            ValueError: A site is unknown, an input has another width, `context` does not fit `keys_from`, or there is a
                state under a map that reads other queries (`Temporal`, a `Convolution` of more than one query), which a
                cache of keys does not keep. A store that evicts also refuses documents under a mask that is meant
                within each document. A choice refuses documents, and for several tokens a state that keeps other tokens
                in each head. With `convolution`, there is a context, or documents together with a state, or a
                mask of the tokens other than None, `Causal()` and `Documents(ids)`, which say which tokens follow each
                other.
        """
        check_array("x", x)
        store: Any = state if self.keys_from == "self" else None  # others hold no tokens of x
        tokens, tap = self.started(x, tokens, tap, store)
        source = self._source(x, context, state)
        own = part_of(self.mask)
        within_documents = tokens.documents is not None and own is not None and not own.is_relative
        if store is not None and store.retain.evicts and within_documents:
            raise ValueError(
                f"mask has documents, within which the mask of the layer is meant, but the state keeps tokens by their "
                f"place in the row ({type(store.retain).__name__}): need init_state(..., store=Policy())"
            )
        x = tokens.clean(x)
        convolved = self._past(x, tokens, {} if store is None else store.past) if self.convolution else None

        query = tap("q", self.queries(x, convolved))
        turns_at_read = store is not None and not store.key_position.at_write and self.position is not None
        if turns_at_read and (give is not None or tap.wants("k_rotated")):
            raise ValueError(
                f"the state turns keys when they are read ({type(store.key_position).__name__}): need "
                "Policy(key_position=Absolute()) for the site 'k_rotated', and for layers that share keys"
            )
        if not turns_at_read:
            query = tap("q_rotated", self.turn(query, tokens.positions))
        if isinstance(source, KeyValue):
            keys: Any = source
        else:
            at = tokens if source is None else tokens_of(source)
            key, value = self.keys_and_values(x if source is None else at.clean(source.x), convolved)
            of_keys = tap.at(at)
            key, value = of_keys("k", key), of_keys("v", value)
            key = key if turns_at_read else of_keys("k_rotated", self.turn(key, at.positions))
            keys = KeyValue(key, value, None if at.known is None else at.known[..., None])
            if self.keys_from == "context":
                state = None if state is None else keys
            elif store is not None:
                put = store.append if tokens.parents is None else store.beside
                store = put(key, value, jnp.broadcast_to(tokens.positions, x.shape[:2]))
                keys = store.read(query)
        held = keys  # as the store keeps them
        if turns_at_read:
            query, keys = self._turned_at_read(query, keys, tokens, store)
            query = tap("q_rotated", query)
        if give is not None:
            give["keys"] = KeyValue(*keys[:3])
        z, measured = self.attended(query, keys, tokens, tap, store)
        y = tap("attn_out", self.merge(tap("z", z), x))
        if store is None:
            return y, state
        if tokens.parents is not None:  # the nodes stay beside the store until some of them join it
            return y, store
        store = store.observe(measured, held)
        return y, store if convolved is None else dataclasses.replace(store, past=convolved.kept)

    @property
    def sites(self) -> tuple[str, ...]:  # type: ignore[override]
        """The sites of attention; without own keys none of keys and values."""
        keys = () if self.keys_from == "layer" else ("k", "v", "k_rotated", "read")
        return ("q", "q_rotated", *keys, "scores", "weights", "lse", "z", "attn_out")

    recorded_only: ClassVar = ("read", "lse")

    @property
    def reads_trees(self) -> bool:
        """Whether tokens may be the nodes of a tree: unless a convolution goes before the keys."""
        return not self.convolution

    def _source(self, x: Array, context: Any, state: Any) -> Context | KeyValue | None:
        """Returns the context as it is read, checked: that of this call, or the keys of an earlier one in the state."""
        context = Context(context) if hasattr(context, "dtype") else context
        if self.keys_from == "context":
            context = state if context is None and isinstance(state, KeyValue) else context
            if context is None or (isinstance(context, KeyValue) and context is not state):
                raise ValueError("context is None: cross-attention needs another sequence, [batch, length, channels]")
        elif (self.keys_from == "layer") != isinstance(context, KeyValue):
            raise ValueError("context must be the KeyValue of another layer where keys_from='layer', and only there")
        elif isinstance(context, KeyValue) and context.key.shape[-2:] != (self.key_heads, self.head_dim):
            heads, width = context.key.shape[-2:]
            raise ValueError(
                f"context has {heads} key heads of {width} channels, but this layer reads {self.key_heads} of "
                f"{self.head_dim}: need the same"
            )
        elif isinstance(context, Context) and (state is not None or self.position is not None):
            raise ValueError("cross-attention takes no state and no positions: need keys_from='context'")
        elif context is not None and self.convolution:
            raise ValueError("context is given: a convolution sees only tokens of one sequence, need convolution=0")
        read = context.x if isinstance(context, Context) else x
        projects = None if isinstance(context, KeyValue) else self.key
        for name, given, project in (("x", x, self.query), ("context", read, projects)):
            if project is not None and (given.ndim != 3 or given.shape[-1] != project.in_features):
                raise ValueError(f"{name} has shape {given.shape}: need [batch, length, {project.in_features}]")
        return context

    def slots(self, tokens: Tokens) -> Slots:
        """Returns the slots of the call to `attend`, as they are without dropout, edits and records.

        Args:
            tokens: What stands where: their mask and bias join those of the module.
        """
        biases = [bias for bias in (as_bias(part_of(self.bias)), tokens.bias) if bias is not None]
        return Slots(
            score=part_of(self.score),
            bias=sum(biases[1:], biases[0]) if biases else None,
            score_maps=tuple(map(part_of, self.score_maps)),
            mask=tokens.shows(part_of(self.mask)),
            normalize=part_of(self.normalize),
            weight_maps=tuple(map(part_of, self.weight_maps)),
        )

    def attended(
        self, query: Array, keys: KeyValue | Held, tokens: Tokens, tap: Tap, store: Store | None
    ) -> tuple[Array, dict[str, Array]]:
        """Returns what heads read of these keys.

        Args:
            query: [B, T, N, H], as queries meet keys.
            keys: What they attend to.
            tokens: What stands where.
            tap: Edits and records at the sites scores, weights, lse and read.
            store: The store from which the keys come, or None.

        Returns:
            The reads of the heads [B, T, N, H], and the measures that the store observes, one per slot and key head.
        """
        own = self.slots(tokens)
        if store is not None:
            measures = {f"store.{name}": x for name, x in store.measures.items()}
            own = dataclasses.replace(own, measures=measures)
        if self.stream is not None and not self.deterministic:
            own = dataclasses.replace(own, dropout=Dropout(self.dropout, self.stream()))
        lost = None  # which tokens need one that the store had no slot for
        if store is not None and isinstance(tokens.positions, jax.core.Tracer) and not store.retain.evicts:
            positions = jnp.broadcast_to(tokens.positions, query.shape[:2])
            lost = unseen(store, positions, own.mask)[..., None, None]
            query = jnp.where(lost, jnp.nan, query)
        own = self._chosen(own, query, keys, tokens, store)
        slots, lse = tap.join(own)
        if store is not None:
            _check_rows_alone(slots.score_maps, slots.weight_maps)
        options: dict[str, Any] = {"return_lse": lse, "implementation": self.implementation}
        # With a state positions are known to be where they are only as long as none is held before them.
        at = tokens.known if store is None else tokens.positions
        options |= {"query_positions": _one_or_all(at), "key_positions": _places(keys.positions)}
        if tokens.parents is not None and self.keys_from != "context":
            slots, of_tree = _in_tree(slots, tokens, keys)
            options |= of_tree
        result = attend_in_shards(query, keys.key, keys.value, slots, **options)
        z, extras = result if lse or slots.measures else (result, {})
        if tap.wants("read"):
            places = jnp.arange(keys.key.shape[1])[None, :, None] if keys.positions is None else keys.positions
            tap("read", jnp.broadcast_to(places, (len(query), *places.shape[1:])))
        if store is not None and isinstance(keys, Held) and (store.retain.evicts or keys.slots is not None):
            for name, (site, reducer) in tap.asked.items():
                if site in ("scores", "weights") and isinstance(reducer, Whole):
                    fill = 0.0 if site == "weights" else -jnp.inf
                    rows = by_position(extras[name].swapaxes(1, 2), keys.positions, store.span, fill)
                    extras[name] = rows.swapaxes(1, 2)
        tap.keep(extras)
        z = z if lost is None else jnp.where(lost, jnp.nan, z)  # also where the mask hides every key
        by_group = {name: x for name, x in extras.items() if name.startswith("store.")}
        return z, {
            name.removeprefix("store."): x.reshape(*x.shape[:-1], self.key_heads, -1).sum(-1)
            for name, x in by_group.items()
        }

    def _chosen(self, own: Slots, query: Array, keys: KeyValue | Held, tokens: Tokens, store: Store | None) -> Slots:
        """Returns the slots with the mask of the blocks that are chosen, if any are."""
        choice = part_of(self.choice)
        if choice is None or query.shape[1] == 1:
            return own
        if tokens.documents is not None:
            raise ValueError(
                f"mask has documents, but the choice {type(choice).__name__} counts blocks from the start of a row: "
                "need one document per row, or choice=None"
            )
        places = _places(keys.positions)
        if places is not None and places.ndim == 3:
            raise ValueError(
                f"the state keeps other tokens in each head, and the choice {type(choice).__name__} needs the same in "
                "all: need a store that keeps all tokens of a prompt, such as Policy(), or choice=None"
            )
        at = tokens.known if store is None else tokens.positions
        mask = choice(query, keys.key, query_positions=_one_or_all(at), key_positions=places)
        return dataclasses.replace(own, mask=mask if own.mask is None else own.mask & mask)

    def reached(self, state: Store) -> Int[Array, " b"]:
        """Returns the positions at which the tokens that the state holds end."""
        return state.last + 1

    def init_state(self, batch: int, capacity: int, store: Policy | None = None) -> Store | tuple[()]:
        """Makes a store without tokens, for positions below `capacity`; nothing for keys that are not those of x.

        Args:
            batch: B.
            capacity: The number of positions that can be held, and recorded.
            store: The policy that says which tokens are kept and read. The default keeps all that the mask lets a query
                see: for a window that fits into the capacity a ring, which goes on beyond it.

        Raises:
            ValueError: A size or the policy does not fit.
        """
        if self.keys_from != "self":
            return ()
        if store is None:
            own, store = part_of(self.mask), Policy()
            shown = capacity + 1 if own is None or own.reach is None else max(sum(own.reach), own.reach.first + 1)
            if shown <= capacity:
                store = Policy(Recent(own.reach.first), shown)
        shape, dtype = (self.key_heads, self.head_dim), self.dtype or jnp.float32
        past = {
            name: jnp.zeros((batch, each.weight.shape[0] - 1, each.weight.shape[1]), dtype)
            for name, each in self.convolution.items()
        }
        return dataclasses.replace(empty(batch, capacity, shape, shape, dtype, store), past=past)

    def queries(self, x: Float[Array, "b t d"], past: Past | None = None) -> Float[Array, "b t n h"]:
        """Returns q of x, convolved and normed if this attention does that, before rotation.

        Args:
            x: [B, T, D].
            past: What a convolution sees of earlier tokens; None: nothing, the sequence begins here.
        """
        query = self._split(self._convolved("query", self.query(x), past), self.heads)
        return query if self.query_norm is None else self.query_norm(query)

    def keys_and_values(
        self, source: Float[Array, "b s c"], past: Past | None = None
    ) -> tuple[Float[Array, "b s k h"], Float[Array, "b s k h"]]:
        """Returns (k, v) of the source, convolved and, keys alone, normed as in `queries`."""
        maps = {name: each for name, each in (("key", self.key), ("value", self.value)) if each is not None}
        projected = (self._convolved(name, project(source), past) for name, project in maps.items())
        key, value = (self._split(y, self.key_heads) for y in projected)
        return key if self.key_norm is None else self.key_norm(key), value

    def merge(self, z: Float[Array, "b t n h"], x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Returns y from what the heads read: side by side, gated by x, projected."""
        merged = z.reshape(*z.shape[:-2], -1)
        if self.gate is not None:
            merged = merged * nnx.sigmoid(self.gate(x))
        return merged if self.out is None else self.out(merged)

    def turn(self, x: Float[Array, "b t n h"], positions: Int[Array, "#b t"]) -> Float[Array, "b t n h"]:
        """Returns queries or keys as they meet each other, from their positions [1 or B, T] or [T]."""
        return x if self.position is None else self.position(x, _one_or_all(positions))

    def _turned_at_read(self, query: Array, keys: Held, tokens: Tokens, store: Store) -> tuple[Array, Held]:
        """Returns queries and keys turned to the places that the store gives them, which may differ by key head."""
        of_queries = jnp.broadcast_to(tokens.positions[..., None], (*query.shape[:2], keys.positions.shape[-1]))

        def turned(x: Array, positions: Array) -> Array:
            places = store.key_position(keys.positions, positions)
            by_head = jnp.moveaxis(x.reshape(*x.shape[:2], places.shape[-1], -1, x.shape[-1]), 2, 1)
            return jnp.moveaxis(self.turn(by_head, jnp.moveaxis(places, 2, 1)), 1, 2).reshape(x.shape)

        return turned(query, of_queries), keys._replace(key=turned(keys.key, keys.positions))

    def _past(self, x: Array, tokens: Tokens, held: dict[str, Array]) -> Past:
        """Returns the past of the convolutions, without padding and other documents."""
        segments = tokens.segments(x.shape[0])
        if segments is not None and held:
            raise ValueError("mask has documents and a state is given: need one or the other under a convolution")
        return Past(held, tokens.seen(x.shape[0]), segments, padded=tokens.padded)

    def _convolved(self, name: str, x: Float[Array, "b t c"], past: Past | None) -> Float[Array, "b t c"]:
        if not self.convolution:
            return x
        past = Past({}, jnp.ones(x.shape[:2], bool), None, padded=False) if past is None else past
        return self.convolution[name](name, x, past)

    def _split(self, x: Array, heads: int) -> Array:
        return x.reshape(*x.shape[:-1], heads, self.head_dim)


def tokens_of(context: Context) -> Tokens:
    """Returns what stands where in the context."""
    return Tokens.of(context.x) if context.tokens is None else context.tokens


def _in_tree(slots: Slots, tokens: Tokens, keys: KeyValue | Held) -> tuple[Slots, dict[str, Any]]:
    """Returns the slots and positions of a call whose queries, and last keys, are nodes of a tree.

    Siblings stand at one position, so nodes are told apart by their number: queries and keys are numbered, and mask and
    bias are tables of what they are at the positions.
    """
    parents, held = jnp.asarray(tokens.parents), len(keys.key[0]) - tokens.length
    at = jnp.broadcast_to(tokens.positions, (len(keys.key), tokens.length))
    of_keys = at if keys.positions is None else jnp.broadcast_to(keys.positions[..., 0], keys.key.shape[:2])
    query, key = at[:, None, :, None], of_keys[:, None, None, :]
    of_tree = Ancestors(parents).to_array(tokens.length)
    of_tree = jnp.pad(of_tree, [(0, 0)] * (of_tree.ndim - 1) + [(held, 0)], constant_values=True)
    shown = visible(slots.mask, query, key) & of_tree
    bias = None if slots.bias is None else Bias(slots.bias(Tile(query, key, shown)))
    numbered = [jnp.where(x < 0, -1, jnp.arange(x.shape[1])) for x in (at, of_keys)]
    places = dict(zip(("query_positions", "key_positions"), numbered, strict=True))
    return dataclasses.replace(slots, mask=Explicit(shown), bias=bias), places


def _one_or_all(positions: Any) -> Any:
    """Returns positions that all rows share as [T]."""
    return positions[0] if positions is not None and positions.ndim == 2 and positions.shape[0] == 1 else positions


def _places(positions: Any) -> Any:
    """Returns positions of keys [B, S, 1 or K] as `attend` takes them: [B, S], or by key head."""
    return positions if positions is None or positions.shape[-1] > 1 else _one_or_all(positions[..., 0])


def _check_rows_alone(score_maps: tuple, weight_maps: tuple) -> None:
    """Raises ValueError for a map of which a row of scores or weights needs other rows than itself."""
    needs = [("score_maps", each, each.scores_need) for each in score_maps]
    needs += [("weight_maps", each, each.weights_need) for each in weight_maps]
    for slot, each, need in needs:
        if need == "matrix" or each.halo:
            raise ValueError(
                f"{slot}={each.kind} reads the scores of other queries, which a state does not hold: "
                "need state=None, or maps that look at one query at a time"
            )
