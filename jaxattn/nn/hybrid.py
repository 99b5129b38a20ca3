"""Mixers made of mixers: side by side on the same input, or one after the other."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from jaxattn.core.attend.mask import Causal, Mask
from jaxattn.core.attend.position import Position, Rotary
from jaxattn.nn.attention import KeysFrom, MultiHeadAttention
from jaxattn.nn.mixer import Mixer
from jaxattn.nn.norm import RMSNorm
from jaxattn.nn.parameter import linear_map
from jaxattn.nn.recurrent import as_mixer
from jaxattn.nn.state_space import S6

Fuse = Literal["mean", "gate"]


class Parallel(Mixer):
    """y = W_o fuse(norm_1(mixer_1(x)), norm_2(mixer_2(x)), …): several mixers side by side on the same input.

    Each branch is RMS-normed with learned gains, because branches differ in size. The state holds one state per mixer.
    The sites are those of the first mixer, except that `attn_out` is y. Keys of another layer (`context`) go to the
    first mixer too.

    Args:
        features: D, the channels of x and y.
        mixers: At least two mixers, mechanisms or specs of them.
        fuse: "mean" (Hymba, Dong et al., 2024), or "gate": the first times the sigmoid of each other (Titans, Behrouz
            et al., 2025).
        channels: The channels of the mixers' outputs, D if not given. W_o stands only where they are not D.
        use_bias: Whether W_o has a bias.
        eps: The eps of the norms.
        dtype: The dtype of the computation; parameters are float32.
        rngs: Streams for the initial parameters.

    Raises:
        ValueError: There are fewer than two mixers, or `fuse` is unknown.
    """

    def __init__(
        self,
        features: int,
        mixers: Sequence[Any],
        *,
        fuse: Fuse = "mean",
        channels: int | None = None,
        use_bias: bool = False,
        eps: float = 1e-6,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        if len(mixers) < 2:
            raise ValueError(f"mixers holds {len(mixers)}: need at least 2")
        if fuse not in get_args(Fuse):
            raise ValueError(f"fuse is {fuse!r}: need one of {', '.join(get_args(Fuse))}")
        channels = features if channels is None else channels
        sizes = {"features": features, "dtype": dtype, "rngs": rngs}
        self.mixers, self.fuse = nnx.List([as_mixer(mixer, **sizes) for mixer in mixers]), fuse
        if any(mixer.keys_from == "context" for mixer in self.mixers):
            raise ValueError("mixers holds cross-attention, which needs a branch of its own in a layer")
        self.norms = nnx.List([RMSNorm(channels, eps=eps, dtype=dtype) for _ in mixers])
        self.out = (
            linear_map(channels, features, dtype, rngs, (None, "width"), use_bias=use_bias)
            if channels != features
            else None
        )

    @property
    def keys_from(self) -> str:  # type: ignore[override]
        """The `keys_from` of the first mixer."""
        return self.mixers[0].keys_from

    @property
    def echo(self) -> bool:  # type: ignore[override]
        """The `echo` of the first mixer."""
        return self.mixers[0].echo

    @property
    def sites(self) -> tuple[str, ...]:  # type: ignore[override]
        """The sites of the first mixer."""
        return self.mixers[0].sites

    @property
    def recorded_only(self) -> tuple[str, ...]:  # type: ignore[override]
        """The sites of the first mixer that take no edits."""
        return self.mixers[0].recorded_only

    def __call__(self, x, tokens=None, tap=None, state=None, context=None, give=None):
        """Returns (y, state) as any mixer; all branches see the same tokens."""
        tokens, tap = self.started(x, tokens, tap, state)
        branches: list[Any] = []
        states: list[Any] = []
        for i, (mixer, norm) in enumerate(zip(self.mixers, self.norms, strict=True)):
            held = None if state is None else state[i]
            if i:
                y, held = mixer(x, tokens, None, held)
            else:
                more: dict[str, Any] = {} if give is None else {"give": give}
                y, held = mixer(x, tokens, tap.only(set(self.sites) - {"attn_out"}), held, context, **more)
            branches.append(norm(y))
            states.append(held)
        first, *others = branches
        if self.fuse == "mean":
            y = sum(others, first) / len(branches)
        else:
            y = first * jnp.prod(jnp.stack([nnx.sigmoid(each) for each in others]), 0)
        y = tap("attn_out", y if self.out is None else self.out(y))
        return y, None if state is None else tuple(states)

    def reached(self, state: tuple[Any, ...]) -> Int[Array, " b"]:
        """Returns the position after the last token, of the last mixer: the first may hold none."""
        return self.mixers[-1].reached(state[-1])

    def init_state(self, batch: int, capacity: int, store: Any = None) -> tuple[Any, ...]:
        """Returns the states of the mixers."""
        return tuple(mixer.init_state(batch, capacity, store) for mixer in self.mixers)


def hymba_heads(
    features: int,
    heads: int,
    *,
    key_heads: int | None = None,
    mask: Mask | None = Causal(),
    state: int = 16,
    convolution: int = 3,
    position: Position | None = Rotary(),
    keys_from: KeysFrom = "self",
    eps: float = 1e-6,
    use_bias: bool = True,
    dtype: Any = None,
    rngs: nnx.Rngs,
) -> Parallel:
    """Makes attention and state-space heads on the same input, normed and averaged (Hymba, Dong et al., 2024).

        y = W_o (norm(attention(x)) + norm(s6(x))) / 2 + b,  both of them of 2 D channels.

    Args:
        features: D, the channels of x and y.
        heads: N, the number of query heads, of 2 D / N channels each.
        key_heads: The number of key and value heads, a divisor of N; by default N.
        mask: The mask of the attention; the paper's is `Causal() & (Window(w) | Sinks(meta_tokens))` in most layers.
        state: The numbers per channel that the state-space heads hold.
        convolution: The width of the convolution of the state-space heads.
        position: The positions of the attention.
        keys_from: "self", or "layer" for the keys and values of the layer before.
        eps: The eps of all norms.
        use_bias: Whether the projections of both and W_o have biases, as in the authors' code.
        dtype: The dtype of the computation; parameters are float32.
        rngs: Streams for the initial parameters.

    Raises:
        ValueError: `heads` is no divisor of 2 D, or `key_heads` of `heads`.
    """
    inner = 2 * features
    if heads < 1 or inner % heads:
        raise ValueError(f"heads is {heads}: need a divisor of {inner}, twice the width")
    given: dict[str, Any] = {"project": False, "use_bias": use_bias, "dtype": dtype, "rngs": rngs}
    attention = MultiHeadAttention(
        features, heads, key_heads=key_heads, head_dim=inner // heads, position=position, mask=mask,
        keys_from=keys_from, **given,
    )  # fmt: skip
    s6 = S6(features, inner=inner, state=state, convolution=convolution, norm=True, eps=eps, **given)
    return Parallel(features, [attention, s6], channels=inner, use_bias=use_bias, eps=eps, dtype=dtype, rngs=rngs)


class Chain(Mixer):
    """y = mixer_n(… mixer_1(x)): several mixers as one layer, one after the other.

    The state holds one state per mixer. The sites are those of the last mixer.

    Args:
        mixers: At least one mixer or mechanism, from the first to the last.

    Raises:
        ValueError: There are no mixers.
    """

    def __init__(self, mixers: Sequence[Any]):
        if not mixers:
            raise ValueError("mixers is empty: need at least 1")
        self.mixers = nnx.List([as_mixer(mixer) for mixer in mixers])

    @property
    def sites(self) -> tuple[str, ...]:  # type: ignore[override]
        """The sites of the last mixer."""
        return self.mixers[-1].sites

    @property
    def recorded_only(self) -> tuple[str, ...]:  # type: ignore[override]
        """The sites of the last mixer that take no edits."""
        return self.mixers[-1].recorded_only

    def __call__(self, x, tokens=None, tap=None, state=None, context=None):
        """Returns (y, state) as any mixer; all see the same tokens, and none a context."""
        if context is not None:
            raise ValueError("context is given: mixers one after the other see only their own tokens")
        tokens, tap = self.started(x, tokens, tap, state)
        states: list[Any] = []
        for i, mixer in enumerate(self.mixers):
            held = None if state is None else state[i]
            x, held = mixer(x, tokens, tap if i == len(self.mixers) - 1 else None, held)
            states.append(held)
        return x, None if state is None else tuple(states)

    def reached(self, state: tuple[Any, ...]) -> Int[Array, " b"]:
        """Returns the position after the last token."""
        return self.mixers[-1].reached(state[-1])

    def init_state(self, batch: int, capacity: int, store: Any = None) -> tuple[Any, ...]:
        """Returns the states of the mixers."""
        return tuple(mixer.init_state(batch, capacity, store) for mixer in self.mixers)
