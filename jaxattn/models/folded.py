"""Folded context: a decoder that reads segment after segment and carries condensed token states from one to the next.

Depth is taken as time: the states of earlier tokens go in at the bottom again, together with the next segment, so that
memory does not grow with the context. After "Folded context condensation in path integral formalism for infinite
context transformers" (2024), of which not all is known: the carry is as defined below, and no more of the paper.
"""

from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxattn import nn
from jaxattn.core.attend.mask import Causal, Mask, Sinks
from jaxattn.core.checks import check_array
from jaxattn.models.config import TransformerConfig
from jaxattn.models.replace import map_mixers
from jaxattn.models.transformer import Transformer
from jaxattn.nn.norm import RMSNorm
from jaxattn.nn.packing import scan_segments, where_row
from jaxattn.nn.parameter import linear_map, undecayed
from jaxattn.nn.spec import Spec
from jaxattn.nn.tokens import Tokens

Condense = Literal["fold", "queries"]


class FoldedDecoder(nnx.Module):
    """logits [B, T, vocabulary] of a decoder that runs on [Z_{s−1}; X_s] for every segment X_s of a few tokens.

        [Z'; X'] = layers([W norm(Z_{s−1}); X_s])     X sees all of Z and itself causally, Z sees Z
        Z_s = X'                                      condense = "fold", with as many states as a segment has tokens
        Z_s = attention(queries, [Z'; X'])            condense = "queries", with `carry` learned queries

    Z_0 is learned and W starts as the identity. Cost per segment is that of attention over carry + segment tokens,
    memory is constant, and the context has no bound. Positions count within [Z; X], so they do not grow either. With a
    state, tokens are read one by one.

    Args:
        config: The config of the decoder, whose layers have causal attention. The attention is opened for Z.
        segment: The number of tokens of a segment.
        carry: The number of states in Z; by default `segment`.
        condense: "fold" or "queries".
        bptt: The number of segments that gradients go back through the carry.
        documents: The number of documents that may be packed in a row.
        rngs: Streams for the initial parameters.

    Raises:
        ValueError: Layers are other than causal attention, the config is not that of a causal model of tokens without
            added positions, there are meta tokens, a size is below 1, `condense` is unknown, or the carry does not fit
            "fold".
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        segment: int,
        carry: int | None = None,
        condense: Condense = "fold",
        bptt: int = 4,
        documents: int = 8,
        rngs: nnx.Rngs,
    ):
        carry = segment if carry is None else carry
        if min(segment, carry, bptt) < 1:
            raise ValueError(f"segment, carry and bptt must be at least 1, got {segment}, {carry} and {bptt}")
        if condense not in get_args(Condense):
            raise ValueError(f"condense is {condense!r}: need one of {', '.join(get_args(Condense))}")
        if condense == "fold" and carry != segment:
            raise ValueError(f"carry is {carry}: condense='fold' carries as many states as a segment has, {segment}")
        plain = config.positions is None and config.embed_norm is None and config.embed_width is None
        if config.embed.target is not nn.TokenEmbedding or not plain or not config.causal:
            raise ValueError(
                "config must be of a causal model of tokens without added positions: need a TokenEmbedding, "
                "positions=None, embed_norm=None, embed_width=None and causal=True"
            )
        if config.meta_tokens:
            raise ValueError("config has meta tokens: the carry is what stands before a segment")
        heads = []

        def opened(number: int, mixer: Spec) -> Spec:
            if mixer.target is not nn.MultiHeadAttention or mixer.arguments.get("mask") not in (None, Causal()):
                raise ValueError(f"config.layers[{number}] is no causal attention: need nn.MultiHeadAttention")
            heads.append(mixer.arguments["heads"])
            return mixer.replace(mask=Causal() | Sinks(carry))

        self.decoder = Transformer(replace(map_mixers(config, opened), causal=False), rngs=rngs)
        self._config = config
        self.segment, self.carry, self.bptt, self.documents = segment, carry, bptt, documents
        self.start = undecayed(jax.random.normal(rngs.params(), (carry, config.width)), None, "width")
        self.norm = RMSNorm(config.width)
        identity = nnx.initializers.constant(jnp.eye(config.width))
        self.enter = linear_map(config.width, config.width, None, rngs, ("width", None), start=identity)
        given: dict[str, Any] = {"position": None, "rngs": rngs}
        pooled, queries = condense == "queries", (carry, config.width)
        self.queries = undecayed(jax.random.normal(rngs.params(), queries), None, "width") if pooled else None
        self.pool = nn.MultiHeadAttention(config.width, heads[0], **given) if pooled else None

    @property
    def config(self) -> TransformerConfig:
        """The config of the decoder, as it was given."""
        return self._config

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        *,
        positions: Int[Array, "#b t"] | None = None,
        mask: Mask | None = None,
        state: dict[str, Any] | None = None,
        record: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "b t vocabulary"], Any, dict[str, Array]]:
        """Returns the triple (logits, state, {}), as `Transformer`.

        Args:
            tokens: [B, T], ints.
            positions: The positions, of which only padding (−1) is read.
            mask: `Documents(ids)` or `Causal()`.
            state: From `init_state` or an earlier call when decoding.
            record: Empty, since a decoder that runs segment by segment records nothing.

        Raises:
            TypeError: The tokens are not integers [batch, length].
            ValueError: The mask is another, documents come together with a state, or there are records.
        """
        check_array("tokens", tokens)
        if tokens.ndim != 2 or 0 in tokens.shape or not jnp.issubdtype(tokens.dtype, jnp.integer):
            got = f"{tokens.dtype}{tokens.shape}"
            raise TypeError(f"tokens must be integers [batch, length], not empty, got {got}")
        if record:
            raise ValueError(f"record is {record}: a decoder that runs segment by segment records nothing")
        row = Tokens.of(tokens, positions=positions, mask=mask)
        segments, seen = row.segments(len(tokens)), row.seen(len(tokens))
        if segments is not None and state is not None:
            raise ValueError("mask has documents and a state is given: need one or the other")
        x = self.decoder.embed(tokens, positions)
        if state is None:
            given: dict[str, Any] = {"size": self.segment, "documents": self.documents, "bptt": self.bptt}
            x = scan_segments(self._segment, self._start(len(x)), x, seen, segments, **given)
        else:
            x, state = self._tokens(x, seen, state)
        x = x if self.decoder.norm is None else self.decoder.norm(x)
        return x if self.decoder.head is None else self.decoder.head(x, self.decoder.embed), state, {}

    def init_state(self, batch: int, capacity: int) -> dict[str, Any]:
        """Returns the state before any token; its size does not depend on `capacity`."""
        tops, keys = self._opened(self._start(batch))
        return {"tops": tops, "keys": keys, "count": jnp.zeros(batch, jnp.int32)}

    def _start(self, batch: int) -> Float[Array, "b m d"]:
        return jnp.broadcast_to(self.start[...], (batch, *self.start.shape))

    def _segment(self, carry: Array, x: Float[Array, "b w d"], filled: Bool[Array, "b w"]) -> tuple[Array, Array]:
        """Returns (Z_s, X')."""
        batch = len(x)
        of_carry = jnp.broadcast_to(jnp.arange(self.carry), (batch, self.carry))
        of_x = jnp.where(filled, self.carry + jnp.arange(self.segment), -1)
        both = jnp.concatenate([self.enter(self.norm(carry)), x], 1)
        tokens = Tokens.of(both, positions=jnp.concatenate([of_carry, of_x], 1))
        tops, _, _ = self.decoder.layers(both, tokens)
        return self._condense(tops), tops[:, self.carry :]

    def _condense(self, tops: Float[Array, "b m+w d"]) -> Float[Array, "b m d"]:
        if self.queries is None or self.pool is None:
            return tops[:, self.carry :]
        queries = jnp.broadcast_to(self.queries[...], (len(tops), *self.queries.shape))
        return self.pool(queries, context=tops)[0]

    def _opened(self, carry: Float[Array, "b m d"]) -> tuple[Array, Any]:
        """Returns (top states, keys) of a segment that holds the carry alone."""
        keys = self.decoder.init_state(len(carry), self.carry + self.segment)
        tops, keys, _ = self.decoder.layers(self.enter(self.norm(carry)), state=keys)
        return jnp.pad(tops, ((0, 0), (0, self.segment), (0, 0))), keys

    def _tokens(self, x: Float[Array, "b t d"], seen: Bool[Array, "b t"], state: dict[str, Any]) -> tuple[Array, Any]:
        """Returns (y, state), read token by token."""
        row = jnp.arange(len(x))

        def one(state: dict[str, Any], given: tuple[Array, Array]) -> tuple[dict[str, Any], Array]:
            x, seen = given
            place = state["count"] % self.segment
            opens = seen & (place == 0) & (state["count"] > 0)
            held = state["tops"], state["keys"]

            def opened() -> tuple[Array, Any]:
                tops, keys = self._opened(self._condense(held[0]))
                each_layer = jax.vmap(where_row, (None, 0, 0))
                return where_row(opens, tops, held[0]), jax.tree.map(partial(each_layer, opens), keys, held[1])

            tops, keys = jax.lax.cond(opens.any(), opened, lambda: held)
            tokens = Tokens.of(x[:, None], positions=jnp.where(seen, self.carry + place, -1)[:, None])
            top, keys, _ = self.decoder.layers(x[:, None], tokens, state=keys)
            tops = tops.at[row, jnp.where(seen, self.carry + place, tops.shape[1])].set(top[:, 0], mode="drop")
            return {"tops": tops, "keys": keys, "count": state["count"] + seen}, top[:, 0]

        state, y = jax.lax.scan(one, state, (jnp.moveaxis(x, 1, 0), seen.T))
        return jnp.moveaxis(y, 0, 1), state
