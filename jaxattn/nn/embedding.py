"""The ends of a model: tables of tokens, maps of vectors, patches and audio frames, positions, and heads.

The first layer reads `embed(inputs, positions, types)` [B, T, D]; `positions` and `types` may be None.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxattn.core.attend.position import LearnedPositions, sinusoidal
from jaxattn.core.checks import as_ids, check_array
from jaxattn.nn.feed_forward import Activation, activated
from jaxattn.nn.norm import LayerNorm
from jaxattn.nn.parameter import decayed, linear_map, over_rows, undecayed
from jaxattn.nn.sharding import constrained
from jaxattn.nn.tokens import Tokens


class TokenEmbedding(nnx.Module):
    """x_t = scale · table[token_t] + type_table[type_t].

    Args:
        vocabulary: The number of token ids.
        features: D, the channels.
        types: The number of token types, such as the two segments of BERT; 0 for none.
        scale: The factor of the table, such as √D in Gemma.
        rngs: Streams for the initial parameters.
    """

    def __init__(self, vocabulary: int, features: int, *, types: int = 0, scale: float = 1.0, rngs: nnx.Rngs):
        self.scale = scale
        self.table = decayed(_small(rngs, vocabulary, features), "vocabulary", "width")
        self.types = decayed(_small(rngs, types, features), None, "width") if types else None

    def __call__(
        self,
        inputs: Int[Array, "b t"],
        positions: Int[Array, "#b t"] | None = None,
        types: Int[Array, "#b t"] | None = None,
    ) -> Float[Array, "b t d"]:
        """Returns x of tokens [B, T].

        Args:
            inputs: Token ids. An id outside the vocabulary gives NaN, unless its position says that it is padding.
            positions: The positions of the tokens; −1 is padding.
            types: The type of each token, by default 0; one that is not in the table gives NaN.

        Raises:
            TypeError: The tokens are not integers [batch, length], or the types are not integers.
            ValueError: There are types, but no table of them.
        """
        check_array("tokens", inputs)
        if not jnp.issubdtype(inputs.dtype, jnp.integer) or inputs.ndim != 2:
            raise TypeError(f"tokens must be integers [batch, length], got {_said(inputs)}")
        padding = jnp.zeros((), bool) if positions is None else Tokens.of(inputs, positions=positions).positions < 0
        table = constrained(self.table[...], ("vocabulary", None))  # else devices would exchange rows of all tokens
        x = self.scale * _rows(table, as_ids(inputs), padding)
        if self.types is None:
            if types is not None:
                raise ValueError("types are given, but the embedding has no table of them: need types=None")
            return x
        types = jnp.zeros((1, inputs.shape[1]), jnp.int32) if types is None else types
        if not hasattr(types, "dtype") or not jnp.issubdtype(types.dtype, jnp.integer):
            raise TypeError(f"types must be integers [batch, length], got {types!r}")
        return x + _rows(self.types[...], as_ids(types), padding)


class VectorEmbedding(nnx.Module):
    """x_t = W input_t + b, of vectors.

    Args:
        inputs: C, the channels of the vectors.
        features: D, the channels of x.
        rngs: Streams for the initial parameters.

    Raises:
        ValueError: `inputs` is below 1.
    """

    def __init__(self, inputs: int, features: int, *, rngs: nnx.Rngs):
        if inputs < 1:
            raise ValueError(f"inputs must be at least 1, got {inputs}")
        self.channels = inputs
        self.map = linear_map(inputs, features, None, rngs, (None, "width"), use_bias=True, role="decayed")

    def __call__(self, inputs: Float[Array, "b t c"], positions: Any = None, types: Any = None) -> Array:
        """Returns x of vectors [B, T, C].

        Raises:
            TypeError: `inputs` is not such an array.
            ValueError: There are types, which vectors do not have.
        """
        check_array("inputs", inputs)
        _check_inputs(inputs, 3, self.channels, "vectors [batch, length, {}]", types)
        return self.map(inputs)


class PatchEmbedding(nnx.Module):
    """x = [c; W patch_1 + b; W patch_2 + b; …] of an image, row by row (ViT, Dosovitskiy et al., 2021).

    Args:
        features: D, the channels of x.
        patch: The height and the width of a patch, in pixels.
        channels: The channels of the image.
        class_token: Whether a learned token c stands before the patches.
        size: The height and the width that an image must have, where positions were learned for it; None for any.
        rngs: Streams for the initial parameters.

    Raises:
        ValueError: `patch` is not two numbers from 1 on.
    """

    def __init__(
        self,
        features: int,
        *,
        patch: Sequence[int] = (16, 16),
        channels: int = 3,
        class_token: bool = True,
        size: Sequence[int] | None = None,
        rngs: nnx.Rngs,
    ):
        if len(patch) != 2 or min(patch) < 1:
            raise ValueError(f"patch is {patch}: need the height and the width of a patch, from 1 on")
        self.patch, self.channels, self.size = tuple(patch), channels, None if size is None else tuple(size)
        inputs = patch[0] * patch[1] * channels
        self.map = linear_map(inputs, features, None, rngs, (None, "width"), use_bias=True, role="decayed")
        self.class_token = decayed(_small(rngs, 1, features), None, "width") if class_token else None

    def __call__(self, inputs: Float[Array, "b y x c"], positions: Any = None, types: Any = None) -> Array:
        """Returns x of images [B, height, width, channels].

        Raises:
            TypeError: `inputs` is not such an array.
            ValueError: The image has another size, the patches do not fill it, or there are types, which patches do not
                have.
        """
        check_array("inputs", inputs)
        _check_inputs(inputs, 4, self.channels, "images [batch, height, width, {}]", types)
        batch, height, width, _ = inputs.shape
        high, wide = self.patch
        if height % high or width % wide:
            raise ValueError(f"inputs are images of {height} by {width}: need multiples of the patch, {high} by {wide}")
        if self.size not in (None, (height, width)):
            raise ValueError(
                f"inputs are images of {height} by {width}: need {self.size}, for which there are positions"
            )
        patches = inputs.reshape(batch, height // high, high, width // wide, wide, self.channels).swapaxes(2, 3)
        x = self.map(patches.reshape(batch, (height // high) * (width // wide), -1))
        if self.class_token is None:
            return x
        first = jnp.broadcast_to(self.class_token[...], (batch, 1, x.shape[-1])).astype(x.dtype)
        return jnp.concatenate([first, x], 1)


class AudioEmbedding(nnx.Module):
    """x = gelu(conv₂(gelu(conv₁(frames)))): two convolutions over 3 frames, the second with stride 2.

    The frames are log-mel frames as Whisper reads them (Radford et al., 2023); T frames become ⌈T / 2⌉ vectors.

    Args:
        features: D, the channels of x.
        channels: The number of mel bins.
        rngs: Streams for the initial parameters.
    """

    def __init__(self, features: int, *, channels: int = 80, rngs: nnx.Rngs):
        self.channels = channels
        said: dict[str, Any] = {
            "kernel_metadata": {"role": "decayed", "axes": (None, None, "width")},
            "bias_metadata": {"role": "undecayed", "axes": ("width",)},
        }
        self.first = nnx.Conv(channels, features, 3, padding=1, **said, rngs=rngs)
        self.second = nnx.Conv(features, features, 3, strides=2, padding=1, **said, rngs=rngs)

    def __call__(self, inputs: Float[Array, "b t c"], positions: Any = None, types: Any = None) -> Array:
        """Returns x of frames [B, T, channels].

        Raises:
            TypeError: `inputs` is not such an array.
            ValueError: There are types, which frames do not have.
        """
        check_array("inputs", inputs)
        _check_inputs(inputs, 3, self.channels, "frames [batch, length, {}]", types)
        return nnx.gelu(self.second(nnx.gelu(self.first(inputs), approximate=False)), approximate=False)


class PositionEmbedding(nnx.Module):
    """A learned vector for each of `length` positions, which is added to the input (Gehring et al., 2017).

    Args:
        length: The number of positions.
        features: D, the channels.
        offset: The number of rows of the table before that of position 0, which no token reads (2 in RoBERTa).
        rngs: Streams for the initial parameters.
    """

    def __init__(self, length: int, features: int, *, offset: int = 0, rngs: nnx.Rngs):
        self.length, self.offset = length, offset
        self.table = decayed(_small(rngs, offset + length, features), None, "width")

    def __call__(self, positions: Int[Array, "#b t"]) -> Float[Array, "#b t d"]:
        """Returns the vectors to add at these positions: 0 at −1 (padding), and NaN beyond the table.

        Raises:
            ValueError: There are more tokens than the table has positions.
        """
        x = LearnedPositions(self.table[self.offset :])(positions)
        return jnp.where((positions >= self.length)[..., None], jnp.nan, x)


class SinusoidalEmbedding(nnx.Module):
    """The `sinusoidal` positions, which are added to the input (Vaswani et al., 2017).

    Args:
        features: D, the channels.
        base: The base of the wavelengths.
    """

    def __init__(self, features: int, *, base: float = 10000.0):
        self.features, self.base = features, base

    def __call__(self, positions: Int[Array, "#b t"]) -> Float[Array, "#b t d"]:
        """Returns the vectors to add at these positions: 0 at −1 (padding)."""
        return sinusoidal(positions, self.features, self.base)


class Head(nnx.Module):
    """logits = scale · W x + b, and with a cap c, c tanh(logits / c).

    Args:
        features: D, the channels of x.
        vocabulary: The number of outputs.
        tied: Whether W is the table of the `TokenEmbedding` (Press & Wolf, 2017).
        use_bias: Whether there is b.
        scale: The factor of x, such as D^−½ in T5.
        cap: c, the cap (Gemma 2, 2024), above 0; None for none.
        rngs: Streams for the initial parameters.

    Raises:
        ValueError: `cap` is not positive.
    """

    def __init__(
        self,
        features: int,
        vocabulary: int,
        *,
        tied: bool = False,
        use_bias: bool = False,
        scale: float = 1.0,
        cap: float | None = None,
        rngs: nnx.Rngs,
    ):
        if cap is not None and not cap > 0:
            raise ValueError(f"cap must be positive, or None, got {cap}")
        self.tied, self.scale, self.cap = tied, scale, cap
        self.map = (
            None if tied else linear_map(features, vocabulary, None, rngs, ("width", "vocabulary"), role="decayed")
        )
        self.bias = undecayed(jnp.zeros(vocabulary), "vocabulary") if use_bias else None

    def __call__(
        self, x: Float[Array, "b t d"], embed: Any, tokens: Tokens | None = None
    ) -> Float[Array, "b t vocabulary"]:
        """Returns the logits.

        Args:
            x: [B, T, D].
            embed: The embedding of the model, whose table a tied head uses.
            tokens: Not used.
        """
        x = x if self.scale == 1 else x * self.scale
        tied = lambda x: jnp.einsum("...d,vd->...v", x, embed.table[...])  # noqa: E731
        logits: Any = over_rows(tied, x) if self.map is None else self.map(x)
        logits = logits if self.bias is None else logits + self.bias[...]
        return logits if self.cap is None else self.cap * jnp.tanh(logits / self.cap)


class MaskedTokenHead(nnx.Module):
    """logits = E norm(f(W x + b)) + c with the table E of the `TokenEmbedding`: BERT's guess of each token (2019).

    Args:
        features: D, the channels of x.
        vocabulary: The number of outputs.
        inner: The channels of E, D if not given.
        activation: f, as of `FeedForward`.
        eps: The eps of the LayerNorm.
        rngs: Streams for the initial parameters.
    """

    tied = True

    def __init__(
        self,
        features: int,
        vocabulary: int,
        *,
        inner: int | None = None,
        activation: Activation = "gelu",
        eps: float = 1e-12,
        rngs: nnx.Rngs,
    ):
        inner = features if inner is None else inner
        self.activation: Activation = activation
        self.map = linear_map(features, inner, None, rngs, ("width", None), use_bias=True)
        self.norm = LayerNorm(inner, eps=eps)
        self.bias = undecayed(jnp.zeros(vocabulary), "vocabulary")

    def __call__(
        self, x: Float[Array, "b t d"], embed: Any, tokens: Tokens | None = None
    ) -> Float[Array, "b t vocabulary"]:
        """Returns the logits.

        Args:
            x: [B, T, D].
            embed: The embedding of the model, whose table is E.
            tokens: Not used.
        """
        guess = self.norm(activated(self.map(x), self.activation))
        return jnp.einsum("...d,vd->...v", guess, embed.table[...]) + self.bias[...]


class Pooler(nnx.Module):
    """h = tanh(W x_0 + b) of the first token: the vector [B, D] that BERT makes of a text (Devlin et al., 2019).

    With `classes` the result is V h + c, one logit per class [B, classes], as in models that rank or sort texts.

    Args:
        features: D, the channels.
        classes: The number of classes; None for h itself.
        rngs: Streams for the initial parameters.
    """

    def __init__(self, features: int, *, classes: int | None = None, rngs: nnx.Rngs):
        self.map = linear_map(features, features, None, rngs, ("width", None), use_bias=True)
        self.classes = (
            linear_map(features, classes, None, rngs, ("width", None), use_bias=True, role="decayed")
            if classes
            else None
        )

    def __call__(self, x: Float[Array, "b t d"], embed: Any, tokens: Tokens | None = None) -> Float[Array, "b d"]:
        """Returns the vector, or the logits, of each row.

        Args:
            x: [B, T, D].
            embed: Not used.
            tokens: The tokens of the row, whose first is the first that is no padding.
        """
        first = jnp.zeros(len(x), int) if tokens is None else tokens.seen(len(x)).argmax(1)
        pooled = jnp.tanh(self.map(jnp.take_along_axis(x, first[:, None, None], 1)[:, 0]))
        return pooled if self.classes is None else self.classes(pooled)


def _small(rngs: nnx.Rngs, *shape: int) -> Array:
    return 0.02 * jax.random.normal(rngs.params(), shape)


def _rows(table: Float[Array, "v d"], ids: Int[Array, "#b t"], padding: Array) -> Float[Array, "b t d"]:
    """Returns rows of the table; NaN outside it, and row 0 there for padding."""
    inside = (ids >= 0) & (ids < len(table))
    return jnp.where((inside | padding)[..., None], table[jnp.where(inside, ids, 0)], jnp.nan)


def _check_inputs(inputs: Any, axes: int, channels: int, form: str, types: Any) -> None:
    form = form.format(channels)
    if not jnp.issubdtype(inputs.dtype, jnp.floating) or inputs.ndim != axes or inputs.shape[-1] != channels:
        raise TypeError(f"inputs must be {form}, got {_said(inputs)}")
    if types is not None:
        raise ValueError(f"types are given, but inputs are {form}: need types=None")


def _said(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}"
