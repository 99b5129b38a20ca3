"""Multi-head latent attention: one small vector per token, of which all heads make their keys and values."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxattn.cache import Policy, Store, empty
from jaxattn.core.attend.absorb import absorb_q, expand_v
from jaxattn.core.attend.api import Implementation
from jaxattn.core.attend.normalize import Softmax
from jaxattn.core.attend.position import Position, Rotary
from jaxattn.core.attend.score import Dot
from jaxattn.core.checks import check_array
from jaxattn.nn.attending import AttentionMixer, head_size, one_or_all
from jaxattn.nn.norm import RMSNorm
from jaxattn.nn.parameter import linear_map
from jaxattn.nn.spec import Spec, built
from jaxattn.nn.tap import Tap
from jaxattn.nn.tokens import Tokens

Form = Literal["auto", "naive", "absorbed"]


class _Keys(NamedTuple):
    """Keys and values of one call without a state."""

    key: Array
    value: Array
    positions: Array | None


class LatentAttention(AttentionMixer):
    """Multi-head latent attention, of DeepSeek-V2 and V3 (2024).

        c_t = norm(W_c x_t)  [R],   k^R_t = turn(W_r x_t)  [H_r],   one of each for all heads
        k_n = [W_k,n c ; k^R],   v_n = W_v,n c,   q_n = [q^C_n ; turn(q^R_n)] = W_q,n x
        z_n = Σ_s softmax_s(q_n · k_ns / √(H + H_r)) v_ns,   y = W_o concat_n(z_n)

    A state holds [c ; k^R] alone: R + H_r numbers per token, where `MultiHeadAttention` holds 2 K H. The result has two
    forms, which are equal but for rounding. The naive form makes all keys and values. The absorbed form turns queries
    into q̃_n = W_k,nᵀ q^C_n, attends to [c ; k^R] as the one key and value of all heads, and applies W_v to what was
    read (`absorb_q`, `expand_v`). Per query it has more to multiply, and per key less.

    With rotary_dim=0, no norm and R ≥ 2 K H the class holds every grouped-query attention without positions.

    Args:
        features: D, the channels of x and y.
        heads: N, the number of heads.
        rank: R, the channels of c; by default 4 H.
        head_dim: H, the channels of q^C and of what c adds to a key; by default D / N.
        value_dim: The channels of a value; by default H.
        rotary_dim: H_r, the channels of the shared key and of q^R, which alone are turned; by default H / 2. 0 for
            none.
        query_rank: The rank of W_q, made of two maps with a norm between them; None for one map.
        position: The way in which q^R and k^R are told where they stand; None for not at all.
        norm: The norm of c, and of queries at their rank; None for none.
        scale: The factor of the scores, by default (H + H_r)^−½. Models whose positions are stretched by `Yarn`
            multiply it by a factor of their own.
        form: "naive", "absorbed", or "auto" for the one with fewer multiplications: for long calls the naive one, and
            for single tokens with a state the absorbed one.
        dropout: As of `MultiHeadAttention`, like all that follows.
        bias: The numbers added to scores.
        mask: Which keys a query may see.
        normalize: The part that turns scores into weights.
        score_maps: A tuple of maps of the scores, applied in order.
        weight_maps: A tuple of maps of the weights, applied in order.
        implementation: As in `attend`.
        dtype: The dtype of the computation; parameters are float32.
        rngs: Streams for the initial parameters, and `dropout`.

    Raises:
        ValueError: Sizes do not divide or are out of range, `form` is unknown, or dropout has no stream.
        TypeError: Maps are not in a tuple, or `position` or `norm` is of another kind.
    """

    recorded_only: ClassVar = ("read", "lse")
    key_heads = 1

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        rank: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        rotary_dim: int | None = None,
        query_rank: int | None = None,
        position: Position | None = Rotary(),
        norm: Spec | None = Spec(RMSNorm),
        scale: float | None = None,
        form: Form = "auto",
        dropout: float = 0.0,
        bias: Any = None,
        mask: Any = None,
        normalize: Any = Softmax(),
        score_maps: Sequence[Any] = (),
        weight_maps: Sequence[Any] = (),
        implementation: Implementation = "auto",
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        head_dim = head_size(features, heads, head_dim)
        rank = 4 * head_dim if rank is None else rank
        value_dim = head_dim if value_dim is None else value_dim
        rotary_dim = head_dim // 2 if rotary_dim is None else rotary_dim
        sizes = {"rank": rank, "value_dim": value_dim, "query_rank": query_rank}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if rotary_dim < 0:
            raise ValueError(f"rotary_dim must be at least 0, got {rotary_dim}")
        if form not in get_args(Form):
            raise ValueError(f"form is {form!r}: need one of {', '.join(get_args(Form))}")
        if not (position is None or isinstance(position, Position)):
            raise TypeError(f"position must be a part such as Rotary(10000.0), or None, got {position!r}")
        if not (norm is None or isinstance(norm, Spec)):
            raise TypeError(f"norm must be a spec such as Spec(nn.RMSNorm), or None, got {norm!r}")
        if position is not None and rotary_dim:
            position.check(rotary_dim)
        if scale is not None and not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {scale}")

        self.heads, self.rank, self.head_dim, self.value_dim, self.rotary_dim = (
            heads, rank, head_dim, value_dim, rotary_dim,
        )  # fmt: skip
        self.position = nnx.data(position if rotary_dim else None)
        self.form: Form = form
        self.implementation: Implementation = implementation
        self.dtype = dtype
        whole = head_dim + rotary_dim
        self._fill(
            {"features": features, "heads": heads, "key_heads": heads, "head_dim": whole},
            score=Dot(whole**-0.5 if scale is None else scale), bias=bias, mask=mask, normalize=normalize,
            score_maps=score_maps, weight_maps=weight_maps, dtype=dtype, rngs=rngs,
        )  # fmt: skip

        def linear(inputs: Any, outputs: Any, *axes: Any) -> nnx.Linear:
            return linear_map(inputs, outputs, dtype, rngs, axes)

        by_head = ("heads", heads)
        low = query_rank is not None
        self.query_down = linear(features, query_rank, "width", None) if low else None
        self.query_norm = built(norm, features=query_rank, dtype=dtype, rngs=rngs) if low else None
        self.query = linear(query_rank or features, heads * whole, None if low else "width", by_head)
        self.latent = linear(features, rank, "width", None)
        self.latent_norm = built(norm, features=rank, dtype=dtype, rngs=rngs)
        self.rotary_key = linear(features, rotary_dim, "width", None) if rotary_dim else None
        self.key = linear(rank, heads * head_dim, None, by_head)
        self.value = linear(rank, heads * value_dim, None, by_head)
        self.out = linear(heads * value_dim, features, by_head, "width")
        self._drop(dropout, rngs)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        tokens: Tokens | None = None,
        tap: Tap | None = None,
        state: Store | None = None,
        context: None = None,
    ) -> tuple[Float[Array, "b t d"], Store | None]:
        """Returns (y, state) as any mixer.

        At the sites of keys stands the key that all heads share, [B, S, 1, H_r], and at `latent` c, [B, S, R]: they are
        what later tokens read of a state.

        Args:
            x: [B, T, D].
            tokens: As of `MultiHeadAttention`.
            tap: Edits and records at the sites of this class.
            state: As of `MultiHeadAttention`.
            context: None: there is no cross-attention of this kind.

        Raises:
            ValueError: A site is unknown, x has another width, there is a context, or as of `MultiHeadAttention` the
                state does not go with a map or with documents.
        """
        check_array("x", x)
        if x.ndim != 3 or x.shape[-1] != self.latent.in_features:
            raise ValueError(f"x has shape {x.shape}: need [batch, length, {self.latent.in_features}]")
        if context is not None:
            raise ValueError("context is given, but latent attention reads only its own tokens: need None")
        tokens, tap = self.started(x, tokens, tap, state)
        store: Any = state
        if store is not None:
            self._check_documents(tokens, store)
        at_read = store is not None and not store.key_position.at_write and self.position is not None
        if at_read and tap.wants("k_rotated"):
            raise ValueError(
                f"the state turns keys when they are read ({type(store.key_position).__name__}): need "
                "Policy(key_position=Absolute()) for the site 'k_rotated'"
            )
        x = tokens.clean(x)

        query = tap("q", self.queries(x))
        query = query if at_read else tap("q_rotated", self.turn(query, tokens.positions))
        key = tap("latent", self.latents(x))[..., None, :]
        if self.rotary_key is not None:
            shared = tap("k", self.rotary_key(x)[..., None, :])
            shared = shared if at_read else tap("k_rotated", self._turned(shared, tokens.positions))
            key = jnp.concatenate([key, shared], -1)
        held: Any = _Keys(key, key[..., :0], None if tokens.known is None else tokens.known[..., None])
        if store is not None:
            store = store.append(key, held.value, jnp.broadcast_to(tokens.positions, x.shape[:2]))

        def reads(held: Any, tap: Tap) -> tuple[Array, dict[str, Array]]:
            """Returns what heads read of these keys, and what is measured."""
            asks, keys = query, held
            if at_read:
                asks, keys = self._turned_at_read(query, held, tokens, store)
                asks = tap("q_rotated", asks)
            if not self._absorbs(asks.shape[1], keys.key.shape[1]):
                return self.attended(asks, self._expanded(keys), tokens, tap, store)
            both = keys._replace(value=keys.key)
            z, measured = self.attended(self.absorbed(asks), both, tokens, tap, store)
            return expand_v(z[..., : self.rank], self._weight(self.value, z)), measured

        if store is None:
            z, _ = reads(held, tap)
        else:
            z, store = self.from_store(store, self.absorbed(query), tokens, tap, reads)
        z = tap("z", z)
        y = tap("attn_out", self.out(z.reshape(*z.shape[:-2], -1)))
        return y, store

    @property
    def sites(self) -> tuple[str, ...]:  # type: ignore[override]
        """The sites of attention; without a shared key none of it."""
        shared = () if self.rotary_key is None else ("k", "k_rotated")
        return ("q", "q_rotated", "latent", *shared, "read", "scores", "weights", "lse", "z", "attn_out")

    def init_state(self, batch: int, capacity: int, store: Policy | None = None) -> Store:
        """Makes a store without tokens, with one key head [c ; k^R] and values of no channels.

        Args:
            batch: B.
            capacity: As of `MultiHeadAttention`.
            store: As of `MultiHeadAttention`. What is kept by head is kept for all heads together: there is one.

        Raises:
            ValueError: A size or the policy does not fit.
        """
        shape, dtype = (1, self.rank + self.rotary_dim), self.dtype or jnp.float32
        return empty(batch, capacity, shape, (1, 0), dtype, self._policy(capacity, store), self.heads)

    def queries(self, x: Float[Array, "b t d"]) -> Float[Array, "b t n h"]:
        """Returns [q^C ; q^R] of x, [B, T, N, H + H_r], before it is turned."""
        if self.query_down is not None:
            x = self.query_down(x)
            x = x if self.query_norm is None else self.query_norm(x)
        return self._split(self.query(x))

    def latents(self, x: Float[Array, "b t d"]) -> Float[Array, "b t r"]:
        """Returns c of x, [B, T, R]."""
        latent = self.latent(x)
        return latent if self.latent_norm is None else self.latent_norm(latent)

    def turn(self, x: Float[Array, "b t n h"], positions: Int[Array, "#b t"]) -> Float[Array, "b t n h"]:
        """Returns queries or keys with their last H_r channels turned, from positions [1 or B, T] or [T]."""
        if self.position is None:
            return x
        straight, turned = jnp.split(x, [x.shape[-1] - self.rotary_dim], -1)
        return jnp.concatenate([straight, self._turned(turned, positions)], -1)

    def absorbed(self, query: Float[Array, "b t n h"]) -> Float[Array, "b t n r"]:
        """Returns the queries [q̃ ; q^R] as they meet [c ; k^R], [B, T, N, R + H_r]."""
        straight, turned = jnp.split(query, [self.head_dim], -1)
        return jnp.concatenate([absorb_q(straight, self._weight(self.key, query)), turned], -1)

    def _expanded(self, keys: Any) -> Any:
        """Returns the keys and values of every head."""
        latent, shared = jnp.split(keys.key[..., 0, :], [self.rank], -1)
        key, value = self._split(self.key(latent)), self._split(self.value(latent))
        shared = jnp.broadcast_to(shared[..., None, :], (*key.shape[:-1], self.rotary_dim))
        return keys._replace(key=jnp.concatenate([key, shared], -1), value=value)

    def _absorbs(self, queries: int, keys: int) -> bool:
        """Returns whether a call takes the absorbed form: by default where there is less to multiply."""
        if self.form != "auto":
            return self.form == "absorbed"
        made = self.head_dim + self.value_dim
        pairs = queries * keys
        naive = pairs * (made + self.rotary_dim) + keys * self.rank * made
        absorbed = pairs * 2 * (self.rank + self.rotary_dim) + queries * self.rank * made
        return absorbed < naive

    def _turned(self, x: Array, positions: Array) -> Array:
        return x if self.position is None else self.position(x, one_or_all(positions))

    def _weight(self, project: nnx.Linear, like: Array) -> Float[Array, "r n h"]:
        weight = project.kernel[...]
        return weight.reshape(self.rank, self.heads, -1).astype(like.dtype)

    def _split(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.heads, -1)
