"""What replacements of attention do with long texts: what they weigh, how far they look, and how their errors add up.

The questions are those of Qin et al. (2022). Their measures are not known here; these follow from the abstract.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.core.attend.measure import Measure
from jaxattn.core.part import part
from jaxattn.trace import run
from jaxattn.trace.patching import as_inputs, check_layers_alone


@part
class FarMass(Measure):
    """The weight of keys more than some positions away, Σ_{j: |i − j| > δ} w_ij, for each δ. [..., T, N, D]

    What a pattern allows bounds it: a window of fewer positions has 0.

    Attributes:
        distances: [D], δ.
    """

    distances: Int[Array, " d"]

    def __call__(self, view, tile):
        apart = abs(tile.query - tile.key)[..., None, :]
        far = (apart > jnp.asarray(self.distances)[:, None]) & tile.shown(view.weights.shape)[..., None, :]
        return jnp.where(far, view.weights[..., None, :], 0).sum(-1)


def implied_weights(
    function: Callable[[Float[Array, "*b s n v"]], Float[Array, "*b t n v"]], shape: tuple[int, ...]
) -> Float[Array, "*b n t s"]:
    """Returns the weights of any layer that is linear in its values: what it makes of a value at one key alone.

        w_ij = out_i for values that are 1 at key j and 0 elsewhere

    For softmax attention these are its weights. Those of kernels with signed features may be negative, so that they
    have no entropy: report their mass and how much of it is negative.

    Args:
        function: From values [..., S, N, V] to outputs [..., T, N, V], as attention with fixed queries and keys. Each
            head reads its own values, so of grouped heads repeat the values before.
        shape: Of the values, [..., S, N, V].
    """
    *_, keys, _, _ = shape

    def at(key: Array) -> Array:
        value = jnp.broadcast_to((jnp.arange(keys) == key).astype(float)[:, None, None], shape)
        return function(value)[..., 0]  # [..., T, N]

    return jnp.moveaxis(jax.lax.map(at, jnp.arange(keys)), 0, -1).swapaxes(-2, -3)


class AccumulatedError(NamedTuple):
    """How far a model is from itself with the first ℓ layers replaced, ℓ = 0 .. L.

    Attributes:
        stream: [L + 1], ‖h_approx − h_exact‖ / ‖h_exact‖ behind the last layer, norms over all tokens that are no
            padding; 0 at ℓ = 0.
        metric: [L + 1, ...], the metric with ℓ layers replaced.
    """

    stream: Array
    metric: Array


def accumulated_error(
    exact: Any, approximate: Any, inputs: Any, metric: Callable[[Any], Array], **options: Any
) -> AccumulatedError:
    """Returns how the error of an approximation grows with the number of layers that have it.

    One set of weights runs with its own attention, and with an approximation of it in the first ℓ layers, such as
    `models.replace_mixers` makes it.

    Args:
        exact: The model.
        approximate: The same model with other mixers, whose stream has the same shape.
        inputs: Inputs of both: tokens, or a tuple of inputs.
        metric: From the output to a number or an array, such as a loss.
        options: Other arguments of both models. Padding has position −1 in `positions`.

    Raises:
        ValueError: The models have different numbers of layers, or streams of other shapes.
    """
    inputs = as_inputs("inputs", inputs, options)
    for model in (exact, approximate):
        check_layers_alone(model)
    ours, theirs = (run(model, *inputs, record=("resid_pre", "resid"), **options) for model in (exact, approximate))
    streams = [x[1]["resid_pre"] for x in (ours, theirs)]
    if streams[0].shape != streams[1].shape:
        raise ValueError(f"exact has streams of {streams[0].shape}, approximate of {streams[1].shape}: need the same")
    places = options.get("positions")
    seen = jnp.ones((1, 1, 1), bool) if places is None else (jnp.atleast_2d(jnp.asarray(places)) >= 0)[..., None]
    last = ours[1]["resid"][-1]
    ends, metrics = [last], [metric(ours[0])]
    layers = len(streams[0])
    for layer in range(1, layers):
        output, records = run(exact, *inputs, start=(layer, streams[1][layer]), record=("resid",), **options)
        ends, metrics = [*ends, records["resid"][-1]], [*metrics, metric(output)]
    ends, metrics = [*ends, theirs[1]["resid"][-1]], [*metrics, metric(theirs[0])]

    def size(x: Array) -> Array:
        return jnp.sqrt(jnp.where(seen, x.astype(jnp.float32) ** 2, 0).sum())

    return AccumulatedError(jnp.stack([size(end - last) / size(last) for end in ends]), jnp.stack(metrics))
