"""Where a text is held that a model knows by heart: gradients by part, single tokens replaced, and sparse updates.

(Stoehr et al., 2024.)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxattn.analysis.heads import check_heads, check_unpadded
from jaxattn.core.attend.measure import Measure
from jaxattn.core.numeric import ratio
from jaxattn.core.part import part
from jaxattn.core.table import take
from jaxattn.trace import run


def gradient_sizes(gradients: Any) -> dict[str, Float[Array, "*layers"]]:
    """Returns the mean |∂L/∂w| of every parameter by its path: [L] for those of layers, and one number for others.

    Means, and not sums, so that parts of different sizes can be compared.

    Args:
        gradients: The gradients of a loss in `nnx.state(model, nnx.Param)`.
    """
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(gradients)):
        names = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
        axes = tuple(range(1, leaf.ndim)) if names[0] == "runs" else None
        found[".".join(names)] = jnp.abs(leaf).mean(axes)
    return found


def largest_gradients(gradients: Any, share: float) -> Any:
    """Returns a pytree of booleans: the entries with the largest |∂L/∂w| of all parameters together.

    Args:
        gradients: A pytree of arrays.
        share: The share of all entries that is chosen, from 0 to 1; rounded to a number of entries. Ties count in.

    Raises:
        ValueError: The share is out of range.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}: need a number from 0 to 1")
    sizes = [jnp.abs(leaf).reshape(-1) for leaf in jax.tree.leaves(gradients)]
    flat = jnp.concatenate(sizes)
    count = round(share * flat.size)
    least = jnp.inf if count == 0 else jnp.sort(flat)[flat.size - count]
    return jax.tree.map(lambda leaf: jnp.abs(leaf) >= least, gradients)


def masked_update(updates: Any, mask: Any) -> Any:
    """Returns the updates where the mask is on, and 0 elsewhere: all ones are ordinary training, zeros change nothing.

    Args:
        updates: A pytree of arrays, such as those of an optimiser.
        mask: The same of booleans, such as `largest_gradients` of the first step.
    """
    return jax.tree.map(lambda update, on: jnp.where(on, update, 0), updates, mask)


class Replaced(NamedTuple):
    """What replacing single tokens of a prefix does to its continuation.

    Attributes:
        loss: [P], the rise of the mean −log p of the continuation, in nats.
        matched: [P], how many tokens of the continuation are the most likely ones before the first that is not.
        before: How many are without any replacement.
    """

    loss: Float[Array, " p"]
    matched: Int[Array, " p"]
    before: Int[Array, ""]


def replace_tokens(
    model: Any, tokens: Int[Array, " t"], prefix: int, replacement: Int[Array, " p"], **options: Any
) -> Replaced:
    """Returns the effect of replacing each token of a prefix by another, one at a time.

    Args:
        model: A decoder.
        tokens: [T], a prefix and its continuation.
        prefix: P, the tokens of the prefix, from 1 to T − 1.
        replacement: [P], such as the second most likely token at each place, or random ones.
        options: Other arguments of the model.

    Raises:
        ValueError: The prefix is out of range, or there are not as many replacements.
    """
    tokens, replacement = jnp.asarray(tokens), jnp.asarray(replacement)
    if not 1 <= prefix < len(tokens) or replacement.shape != (prefix,):
        raise ValueError(
            f"prefix is {prefix} of {len(tokens)} tokens, with {replacement.shape} replacements: need 1 to "
            f"{len(tokens) - 1}, and one replacement for each"
        )
    rows = jnp.tile(tokens, (prefix + 1, 1))
    rows = rows.at[jnp.arange(prefix), jnp.arange(prefix)].set(replacement)  # the last row is as it was
    logits, _ = run(model, rows, logits_at=jnp.arange(prefix - 1, len(tokens) - 1), **options)
    wanted = tokens[prefix:]
    loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), wanted[None, :, None], -1)[..., 0].mean(-1)
    right = jnp.cumprod(logits.argmax(-1) == wanted, -1).sum(-1)
    return Replaced(loss[:-1] - loss[-1], right[:-1], right[-1])


@part
class _Correlation(Measure):
    """Pearson's correlation over visible keys of a row's weights with numbers by position, NaN without spread."""

    values: Float[Array, "*b p"]

    def __call__(self, view, tile):
        on = tile.shown(view.weights.shape)
        x = take(jnp.asarray(self.values)[..., None, :], tile.key, 2, fill=0).astype(view.weights.dtype)
        count = jnp.maximum(on.sum(-1, keepdims=True), 1)

        def centred(x: Array) -> Array:
            x = jnp.where(on, x, 0)
            return jnp.where(on, x - x.sum(-1, keepdims=True) / count, 0)

        ours, theirs = centred(view.weights), centred(jnp.broadcast_to(x, view.weights.shape))
        both = jnp.square(ours).sum(-1) * jnp.square(theirs).sum(-1)
        # Equal weights have no spread but for rounding.
        some = jnp.square(ours).sum(-1) > 1e-12 * jnp.square(jnp.where(on, view.weights, 0)).sum(-1)
        return jnp.where(some & (both > 0), ratio((ours * theirs).sum(-1), jnp.sqrt(both)), jnp.nan)


def rarity_correlation(
    model: Any, tokens: Int[Array, "b t"], log_frequency: Float[Array, " v"], **options: Any
) -> Float[Array, "layers n"]:
    """Returns how well a head's weights follow the rarity −log frequency of tokens: a correlation, mean over rows.

    A head that looks at rare tokens is near 1; by chance it is near 0. Rows of equal weights or of equally rare tokens
    do not count, and a head without any other row has NaN.

    Args:
        model: A decoder.
        tokens: [B, T].
        log_frequency: [V], the logarithm of how frequent each token is.
        options: Other arguments of the model, without `positions`.

    Raises:
        ValueError: Layers have different numbers of heads, or not all have weights, or the model has tokens of its own
            before the sequence.
    """
    check_unpadded(options)
    tokens = jnp.asarray(tokens)
    measure = _Correlation(-jnp.asarray(log_frequency)[tokens])
    _, records = run(model, tokens, record={"rare": ("weights", measure)}, **options)
    check_heads(records["rare"], tokens.shape[1])
    return jnp.nanmean(records["rare"], (1, 2))
