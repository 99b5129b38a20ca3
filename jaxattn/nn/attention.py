"""Multi-head attention: projections around `attend`, with every slot an argument."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxattn.cache import Policy, Store, Unexpired, empty
from jaxattn.core.attend.absorb import absorb_q, expand_v
from jaxattn.core.attend.api import Implementation
from jaxattn.core.attend.choose import Choice
from jaxattn.core.attend.crossbatch import crossbatch_kv
from jaxattn.core.attend.normalize import Softmax
from jaxattn.core.attend.partial import Partial, merge
from jaxattn.core.attend.position import Position, Rotary
from jaxattn.core.attend.score import Dot
from jaxattn.core.attend.slots import Slots
from jaxattn.core.checks import check_array
from jaxattn.nn.attending import AttentionMixer, head_size, one_or_all
from jaxattn.nn.mechanisms import ShortConvolution, SmearedKeys
from jaxattn.nn.parameter import Axis, linear_map
from jaxattn.nn.recurrent import Past
from jaxattn.nn.sharding import attend_in_shards
from jaxattn.nn.spec import Spec, built, part_of
from jaxattn.nn.tap import Tap
from jaxattn.nn.token_types import shown_by
from jaxattn.nn.tokens import Tokens


class KeyValue(NamedTuple):
    """Keys and values as attention meets them, for layers that share those of an earlier one.

    The keys are rotated. With a state, keys and values are all that the state holds.

    Attributes:
        key: [B, S, K, H].
        value: [B, S, K, H].
        positions: The positions of the keys, or None for 0, 1, ...
        query: [B, T, N, H], the queries of the call as they meet the keys, for layers that share the attention too; a
            model leaves them out where none does.
    """

    key: Float[Array, "b s k h"]
    value: Float[Array, "b s k h"]
    positions: Int[Array, "#b s g"] | None
    query: Float[Array, "b t n h"] | None = None


class Context(NamedTuple):
    """Another sequence that attention reads.

    Attributes:
        x: [B, S, C].
        tokens: What stands where in the sequence; by default 0..S−1.
    """

    x: Float[Array, "b s c"]
    tokens: Tokens | None = None


KeysFrom = Literal["self", "layer", "context"]


class MultiHeadAttention(AttentionMixer):
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
        echo: Whether a layer with keys_from="layer" takes the queries of that layer too, and has values of its own: it
            attends as that layer does, with neither W_q nor W_k (EchoAtt, 2024). Its score, bias, mask, normaliser and
            maps should be those of that layer, and its `position` is not used. A state holds its values alone, in the
            slots in which that layer holds its keys.
        context_features: The channels of `context`; by default D.
        position: The way in which queries and keys are told where they stand, such as `Rotary(10000.0)`; None for not
            at all. "auto" is `Rotary()`, and None in cross-attention, where positions of two sequences say nothing of
            each other. Where they do, as those of one text that two models read, name the part: keys are turned at the
            positions of the context.
        qk_norm: A norm of queries and keys over H, before they are turned, such as `Spec(nn.RMSNorm)`; over all heads
            together with `Spec(nn.AcrossHeads)`.
        gate: Whether z is multiplied by σ(W_g x) before W_o.
        project: Whether there is W_o; y has N·H channels without.
        absorb: Whether cross-attention reads the context itself (EL-attention, Yan et al., 2021): W_k acts on queries
            and W_v on what they read, with the same result. Nothing is computed per token of the context, so that there
            are no keys and values to keep: a state stays empty, and a `Transformer` keeps the context once for all
            layers. Each query has more to multiply. Scores and lse are without the biases of keys.
        crossbatch: Offsets of other rows of the batch that a row also attends to in training, as a memory whose keys
            are turned to position 0, in one softmax with its own tokens (`crossbatch_kv`; Focused Transformer, 2023).
            Rows before the first do not exist. It is active without a state, unless `deterministic`. Edits and records
            of scores and weights are of the tokens of the row. To decode with such a memory, give a store
            `cache.MemoryAtStart(window)`.
        dropout: The rate of dropout on the attention weights, active unless `deterministic` (see `nnx.Module.train` and
            `eval`).
        convolution: The width of a short causal convolution of q, k and v per channel, after their projection; 0 for
            none.
        smear: Whether each key is mixed with that of the token before, `SmearedKeys`, in place of a convolution.
        types: A spec of types of tokens, `Spec(nn.TokenTypes, window=16)`: each token is seen by all later ones, up to
            the next global one, or by a few (Neural Attention Search, 2025). A state drops what has expired: its policy
            is `Policy(Unexpired(), slots)`.
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
        ValueError: Sizes do not divide or are out of range, cross-attention has a choice, or absorbs W_k and has
            positions, `keys_from` or a name of a bias is unknown, a convolution has keys that are not those of x,
            dropout has no stream, or with `absorb` the context is not all that keys and values are made of by W_k and
            W_v, or scores are no dot products. `types` stand with other keys than those of x, with `crossbatch`, or
            with another normaliser than Softmax.
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
        echo: bool = False,
        context_features: int | None = None,
        position: Position | Literal["auto"] | None = "auto",
        qk_norm: Spec | None = None,
        gate: bool = False,
        project: bool = True,
        absorb: bool = False,
        crossbatch: Sequence[int] = (),
        dropout: float = 0.0,
        convolution: int = 0,
        smear: bool = False,
        types: Spec | None = None,
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
        head_dim = head_size(features, heads, head_dim)
        if key_heads < 1 or heads % key_heads:
            raise ValueError(f"key_heads is {key_heads} but heads is {heads}: need a divisor of {heads}")
        if keys_from not in get_args(KeysFrom):
            raise ValueError(f"keys_from is {keys_from!r}: need one of {', '.join(get_args(KeysFrom))}")
        crosses = keys_from == "context" or context_features is not None
        if isinstance(position, str) and position == "auto":
            position = None if crosses else Rotary()
        if position is not None:
            if not isinstance(position, Position):
                raise TypeError(f"position must be a part such as Rotary(10000.0), 'auto' or None, got {position!r}")
            position.check(head_dim)
            if crosses and (absorb or keys_from != "context"):
                raise ValueError(
                    f"position is {position} for keys of another sequence: need position=None, or keys_from='context' "
                    "and absorb=False, whose keys are turned at the positions of the context"
                )
        if not (choice is None or isinstance(choice, Spec | Choice)):
            raise TypeError(f"choice must be a part such as MoBA(512, 3), or None, got {choice!r}")
        if choice is not None and keys_from == "context":
            raise ValueError(f"choice is {choice} for keys of another sequence: need choice=None, since it is causal")
        if not (qk_norm is None or isinstance(qk_norm, Spec)):
            raise TypeError(f"qk_norm must be a spec such as Spec(nn.RMSNorm), or None, got {qk_norm!r}")
        own_keys = keys_from != "layer"
        if echo and (own_keys or qk_norm is not None):
            raise ValueError(
                f"echo is True but keys_from is {keys_from!r} and qk_norm {qk_norm}: need keys_from='layer', whose "
                "queries and keys are normed already"
            )
        if smear and convolution:
            raise ValueError(f"smear is True and convolution {convolution}: need one of them")
        near = f"convolution is {convolution}" if convolution else "smear is True" if smear else ""
        if near and keys_from != "self":
            raise ValueError(f"{near} but keys_from is {keys_from!r}: need keys of x, or neither of both")
        names = ("query", "key", "value", "out", "gate")
        biased = (names if use_bias else ()) if isinstance(use_bias, bool) else tuple(use_bias)
        if unknown := sorted(set(biased) - set(names)):
            raise ValueError(f"use_bias names {unknown}: need True, False, or some of {list(names)}")
        if absorb:
            maps = (*score_maps, *weight_maps)
            _check_absorbs(keys_from, score, qk_norm, set(biased) & {"key", "value"}, normalize, maps, dropout)
            score = Dot(head_dim**-0.5) if score.scale is None else score

        self.absorb, self.echo, self.crossbatch = absorb, echo, tuple(crossbatch)
        self.heads, self.key_heads, self.head_dim, self.keys_from = heads, key_heads, head_dim, keys_from
        self.position = nnx.data(position)
        self.implementation: Implementation = implementation
        self.dtype = dtype
        sizes = {"features": features, "heads": heads, "key_heads": key_heads, "head_dim": head_dim}
        self._fill(
            sizes, score=score, bias=bias, mask=mask, normalize=normalize, score_maps=score_maps,
            weight_maps=weight_maps, dtype=dtype, rngs=rngs, choice=choice,
        )  # fmt: skip
        if crossbatch:
            joins = isinstance(part_of(self.normalize), Softmax) and not weight_maps and not dropout and not near
            if keys_from != "self" or min(crossbatch) < 1 or not joins:
                raise ValueError(
                    f"crossbatch is {tuple(crossbatch)}: need offsets from 1 on, keys_from='self', Softmax, and no "
                    "weight_maps, dropout, convolution or smear"
                )

        plain = part_of(self.normalize)
        if types is not None and not (isinstance(plain, Softmax) and plain.null_logit is None):
            raise ValueError(f"types is {types} but normalize is {plain}: need Softmax() without a null logit")
        if types is not None and (keys_from != "self" or self.crossbatch):
            raise ValueError(
                f"types is {types} with keys_from={keys_from!r} and crossbatch={self.crossbatch}: need keys of x alone"
            )

        def linear(name: str, inputs: int, outputs: int, *axes: Axis) -> nnx.Linear:
            return linear_map(inputs, outputs, dtype, rngs, axes, use_bias=name in biased)

        context_features = features if context_features is None else context_features
        by_head, by_key_head = ("heads", heads), ("key_heads", key_heads)
        self.query: Any = None if echo else linear("query", features, heads * head_dim, "width", by_head)
        of_keys: Any = (context_features, key_heads * head_dim, "width", by_key_head)
        self.key: Any = linear("key", *of_keys) if own_keys else None
        self.value: Any = linear("value", *of_keys) if own_keys or echo else None
        self.out = linear("out", heads * head_dim, features, by_head, "width") if project else None
        sides = {"query": by_head, "key": by_key_head, "value": by_key_head}
        self.convolution: Any = nnx.Dict(
            {
                name: ShortConvolution(side[1] * head_dim, convolution, axis=side, rngs=rngs)
                for name, side in sides.items()
            }
            if convolution
            else {"key": SmearedKeys(key_heads, head_dim)}
            if smear
            else {}
        )
        self.types = built(types, **sizes, dtype=dtype, rngs=rngs)
        self.gate = linear("gate", features, heads * head_dim, "width", by_head) if gate else None
        norm_sizes = {"features": head_dim, "dtype": dtype, "rngs": rngs}
        self.query_norm = built(qk_norm, heads=heads, **norm_sizes)
        self.key_norm = built(qk_norm, heads=key_heads, **norm_sizes) if own_keys else None
        self._drop(dropout, rngs)

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
                other. With `types`, another layer takes the keys, or there are several tokens at positions that
                are known to be beyond their number, or with a state beyond its capacity; where such positions are not
                known, the row is NaN.
        """
        check_array("x", x)
        store: Any = state if self.keys_from == "self" or self.echo else None  # others hold no tokens of x
        tokens, tap = self.started(x, tokens, tap, store)
        source = self._source(x, context, state)
        keys: Any
        if store is not None:
            self._check_documents(tokens, store)
        x = tokens.clean(x)
        convolved = self._past(x, tokens, {} if store is None else store.past) if self.convolution else None
        drawn = self.types is not None and store is None and not self.deterministic
        facts = {}
        if self.types is not None:
            if give is not None:
                raise ValueError("another layer takes the keys, but not when they expire: need types=None in this one")
            facts = {} if drawn else {"expires": self.types.expiry(x, tokens)}

        if self.echo:
            query, keys, held, store = self._echoed(source, x, tokens, tap, store)
            z, measured = self.attended(query, keys, tokens, tap, store)
            y = tap("attn_out", self.merge(tap("z", z), x))
            return y, state if store is None else store.observe(measured, held)
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
            keys = source
        elif self.absorb and isinstance(source, Context):
            at = tokens_of(source)
            read = at.clean(source.x)[:, :, None]
            keys = KeyValue(read, read, None if at.known is None else at.known[..., None])
        else:
            at = tokens if source is None else tokens_of(source)
            key, value = self.keys_and_values(x if source is None else at.clean(source.x), convolved)
            of_keys = tap.at(at)
            key, value = of_keys("k", key), of_keys("v", value)
            unturned = key
            key = key if turns_at_read else of_keys("k_rotated", self.turn(key, at.positions))
            keys = KeyValue(key, value, None if at.known is None else at.known[..., None])
            if self.keys_from == "context":
                state = None if state is None else keys
            elif store is not None:
                put = store.append if tokens.parents is None else store.beside
                store = put(key, value, jnp.broadcast_to(tokens.positions, x.shape[:2]), facts)

        def reads(held: Any, tap: Tap) -> tuple[Array, dict[str, Array]]:
            """Returns what heads read of these keys, and what is measured."""
            asks, keys = query, held
            if turns_at_read:
                asks, keys = self._turned_at_read(query, held, tokens, store)
                asks = tap("q_rotated", asks)
            if give is not None:
                give["keys"] = KeyValue(keys.key, keys.value, keys.positions, asks)
            if self.types is not None and (store is None or x.shape[1] > 1):
                own, asks = self._typed(x, asks, tokens, held, None if drawn else facts["expires"], store)
                return self.attended(asks, keys, tokens, tap, store, own=own)
            if self.crossbatch and store is None and not self.deterministic:
                return self._attend_across(asks, keys, unturned, tokens, tap)
            attends = self._attend_absorbed if self.absorb else self.attended
            return attends(asks, keys, tokens, tap, store)

        if store is None:
            z, _ = reads(keys, tap)
        else:
            if give is not None and store.select is not None and store.select.decides:
                raise ValueError(
                    f"the state decides by step what is read ({type(store.select).__name__}), which layers that share "
                    "keys cannot follow: need a policy that always reads as many keys"
                )
            z, store = self.from_store(store, query, tokens, tap, reads)
        y = tap("attn_out", self.merge(tap("z", z), x))
        if store is None:
            return y, state
        if tokens.parents is not None:  # the nodes stay beside the store until some of them join it
            return y, store
        return y, store if convolved is None else dataclasses.replace(store, past=convolved.kept)

    @property
    def sites(self) -> tuple[str, ...]:  # type: ignore[override]
        """The sites of attention; without own keys none of keys, and without own queries none of queries."""
        if self.echo:
            return "v", "read", "scores", "weights", "lse", "z", "attn_out"
        keys = () if self.keys_from == "layer" else ("read",) if self.absorb else ("k", "v", "k_rotated", "read")
        return ("q", "q_rotated", *keys, "scores", "weights", "lse", "z", "attn_out")

    recorded_only: ClassVar = ("read", "lse")

    @property
    def reads_trees(self) -> bool:
        """Whether tokens may be the nodes of a tree.

        A convolution before the keys, a choice of blocks and types tell tokens apart by their positions, which siblings
        share.
        A layer that attends as another one keeps no nodes beside its store.
        """
        return not (self.convolution or self.echo) and self.choice is None and self.types is None

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
        elif self.echo and (context.query is None or context.query.shape[2] != self.heads):
            found = "no queries" if context.query is None else f"queries of {context.query.shape[2]} heads"
            raise ValueError(f"context has {found}, but this layer attends with those of {self.heads} heads")
        elif isinstance(context, Context) and (state is not None or self.position is not None):
            raise ValueError("cross-attention takes no state and no positions: need keys_from='context'")
        elif context is not None and self.convolution:
            raise ValueError("context is given: a convolution sees only tokens of one sequence, need no context")
        read = context.x if isinstance(context, Context) else x
        projects = None if isinstance(context, KeyValue) else self.key
        for name, given, project in (("x", x, self.value if self.echo else self.query), ("context", read, projects)):
            if project is not None and (given.ndim != 3 or given.shape[-1] != project.in_features):
                raise ValueError(f"{name} has shape {given.shape}: need [batch, length, {project.in_features}]")
        return context

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
        if self.keys_from != "self" and not self.echo:
            return ()
        policy = self._policy(capacity, store)
        if self.echo and policy.select is not None:
            raise ValueError(
                f"store selects by keys ({type(policy.select).__name__}), and layers with echo=True hold none: need "
                "select=None"
            )
        shape, dtype = (self.key_heads, self.head_dim), self.dtype or jnp.float32
        past = {
            name: jnp.zeros((batch, each.weight.shape[0] - 1, each.weight.shape[1]), dtype)
            for name, each in self.convolution.items()
        }
        key_shape = (self.key_heads, 0) if self.echo else shape
        return dataclasses.replace(empty(batch, capacity, key_shape, shape, dtype, policy, self.heads), past=past)

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

    def _echoed(self, donor: Any, x: Array, tokens: Tokens, tap: Tap, store: Store | None) -> tuple[Any, ...]:
        """Returns the queries and keys of the layer before with values of this one, what is held, and the store."""
        value = tap("v", self._split(self.value(x), self.key_heads))
        if store is None:
            return donor.query, donor._replace(value=value), None, None
        store = store.append(value[..., :0], value, jnp.broadcast_to(tokens.positions, x.shape[:2]))
        held = store.read(donor.query)
        if held.positions.shape != donor.positions.shape:
            raise ValueError(
                f"state has slots of shape {held.positions.shape} but the layer that it attends as has "
                f"{donor.positions.shape}: need the same mask in both layers"
            )
        same = (held.positions == donor.positions).all((1, 2))  # where they kept different tokens, NaN tells
        query = jnp.where(same[:, None, None, None], donor.query, jnp.nan)
        return query, held._replace(key=donor.key), held, store

    def _attend_across(
        self, query: Array, keys: KeyValue, unturned: Array, tokens: Tokens, tap: Tap
    ) -> tuple[Array, dict[str, Array]]:
        """Does what `attended` does, with other rows of the batch as a memory."""
        if tokens.documents is not None:
            raise ValueError("mask has documents, but with crossbatch the rows of a batch are texts: need one per row")
        z, found = self.attended(query, keys, tokens, tap, None, with_lse=True)
        at_start = self.turn(unturned, jnp.zeros_like(tokens.positions))
        there = jnp.where(tokens.seen(len(query)), 0, -1)
        memory = crossbatch_kv(at_start, keys.value, self.crossbatch, positions=there)
        own = self.slots(tokens)
        plain: Any = own.normalize
        plain = dataclasses.replace(plain, null_logit=None)  # which is among the weights of the row already
        slots = dataclasses.replace(own, mask=None, bias=None, normalize=plain)
        options: dict[str, Any] = {"key_positions": memory.positions, "return_lse": True}
        read, extras = attend_in_shards(
            query, memory.key, memory.value, slots, implementation=self.implementation, **options
        )
        return merge(Partial(z, found["lse"]), Partial(read, extras["lse"])).out, {}

    def _typed(
        self, x: Array, query: Array, tokens: Tokens, held: Any, expiry: Array | None, store: Store | None
    ) -> tuple[Slots, Array]:
        """Returns the slots of a call in which types say what is seen, and the queries, NaN in rows beyond its tables.

        Types are drawn where `expiry` is None. One token with a state needs no mask: the store has dropped the others.
        """
        own, size = self.slots(tokens), tokens.length if store is None else store.span
        positions = tokens.positions
        if not isinstance(positions, jax.core.Tracer) and (last := int(np.max(np.asarray(positions)))) >= size:
            raise ValueError(
                f"positions reaches {last}, but types are told apart below {size}: need positions up to there"
            )
        query = jnp.where((positions >= size).any(-1)[:, None, None, None], jnp.nan, query)
        if expiry is None:
            return dataclasses.replace(own, normalize=self.types.gates(x, tokens, self.heads)), query
        places = positions[..., None] if store is None else held.positions
        expiry = expiry if store is None else store.all_statistics["expires"]
        mask = shown_by(expiry, places, size, self.heads)
        return dataclasses.replace(own, mask=mask if own.mask is None else own.mask & mask), query

    def _policy(self, capacity: int, store: Policy | None) -> Policy:
        if self.types is None:
            return super()._policy(capacity, store)
        policy = Policy(Unexpired(), capacity) if store is None else store
        if "expires" not in policy.retain.facts:
            kind = type(policy.retain).__name__
            raise ValueError(
                f"store keeps tokens by {kind}, but types say when they expire: need Policy(Unexpired(), slots)"
            )
        return policy

    def _attend_absorbed(
        self, query: Array, inputs: KeyValue, tokens: Tokens, tap: Tap, store: None
    ) -> tuple[Array, dict[str, Array]]:
        """Does what `attended` does, for the inputs of W_k and W_v, [B, S, 1, C], in place of keys and values."""
        maps = self.key, self.value
        of_key, of_value = (
            each.kernel[...].astype(query.dtype).reshape(-1, self.key_heads, self.head_dim) for each in maps
        )
        bias = maps[1].bias
        z, found = self.attended(absorb_q(query, of_key), inputs, tokens, tap, store, with_lse=bias is not None)
        z = expand_v(z, of_value)
        if bias is None:
            return z, {}
        by_head = jnp.repeat(bias[...].astype(z.dtype).reshape(self.key_heads, -1), self.heads // self.key_heads, 0)
        return z + jnp.where(found["lse"][..., None] == -jnp.inf, 0, by_head), {}  # nothing where no key is seen

    def merge(self, z: Float[Array, "b t n h"], x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Returns y from what the heads read: side by side, gated by x, projected."""
        merged = z.reshape(*z.shape[:-2], -1)
        if self.gate is not None:
            merged = merged * nnx.sigmoid(self.gate(x))
        return merged if self.out is None else self.out(merged)

    def turn(self, x: Float[Array, "b t n h"], positions: Int[Array, "#b t"]) -> Float[Array, "b t n h"]:
        """Returns queries or keys as they meet each other, from their positions [1 or B, T] or [T]."""
        return x if self.position is None else self.position(x, one_or_all(positions))

    def _past(self, x: Array, tokens: Tokens, held: dict[str, Array]) -> Past:
        """Returns the past of the convolutions, without padding and other documents."""
        segments = tokens.segments(x.shape[0])
        if segments is not None and held:
            raise ValueError("mask has documents and a state is given: need one or the other under a convolution")
        return Past(held, tokens.seen(x.shape[0]), segments, padded=tokens.padded)

    def _convolved(self, name: str, x: Float[Array, "b t c"], past: Past | None) -> Float[Array, "b t c"]:
        if name not in self.convolution:
            return x
        past = Past({}, jnp.ones(x.shape[:2], bool), None, padded=False) if past is None else past
        return self.convolution[name](name, x, past)

    def _split(self, x: Array, heads: int) -> Array:
        return x.reshape(*x.shape[:-1], heads, self.head_dim)


def _check_absorbs(
    keys_from: str, score: Any, qk_norm: Any, biased: set[str], normalize: Any, maps: tuple, dropout: float
) -> None:
    """Raises ValueError if W_k and W_v cannot be moved to queries and results."""
    if keys_from != "context":
        raise ValueError(f"absorb is True but keys_from is {keys_from!r}: need keys_from='context', or absorb=False")
    if not isinstance(score, Dot):
        raise ValueError(f"absorb is True but score is {score!r}: need Dot(), or absorb=False")
    if qk_norm is not None:
        raise ValueError(f"absorb is True but keys have the norm {qk_norm}: need qk_norm=None, or absorb=False")
    plain = isinstance(normalize, Softmax) and normalize.null_logit is None and not maps and not dropout
    if biased and not plain:
        raise ValueError(
            f"absorb is True and there are biases of {' and '.join(sorted(biased))}: need Softmax() without a null "
            "logit, maps or dropout, whose weights sum to 1, use_bias of others only, or absorb=False"
        )


def tokens_of(context: Context) -> Tokens:
    """Returns what stands where in the context."""
    return Tokens.of(context.x) if context.tokens is None else context.tokens
