"""Reading the residual stream in the vocabulary: lenses, and the exact parts of a logit."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.core.part import part
from jaxattn.trace import Put, run
from jaxattn.trace.patching import as_inputs, check_layers_alone
from jaxattn.trace.sweep import compiled, unchanged


@part
class TunedLens:
    """x -> x + x W_l + b_l for the stream before layer l, which is then read as the last one (Belrose et al., 2023).

    At zero it is the logit lens. `lens_loss` is what it is trained by.

    Attributes:
        weight: [L, D, D].
        bias: [L, D].
    """

    weight: Float[Array, "layers d d"]
    bias: Float[Array, "layers d"]

    @classmethod
    def zero(cls, layers: int, width: int) -> "TunedLens":
        """Returns the lens that changes nothing."""
        return cls(jnp.zeros((layers, width, width)), jnp.zeros((layers, width)))


@unchanged()
def lens(
    model: Any,
    inputs: Any,
    read: Callable[[Array], Any] = jax.nn.log_softmax,
    *,
    tuned: TunedLens | None = None,
    **options: Any,
) -> Any:
    """Returns what the output would be if the model ended before each layer (logit lens; nostalgebraist, 2020).

    The stream before layer l goes through the last norm and the head. Entry l of the result is of the stream before
    layer l; entry L is the output itself. Position t speaks about token t + 1.

    Args:
        model: The model.
        inputs: Its inputs: tokens, or a tuple of inputs.
        read: From logits [B, T, vocabulary] to what is kept of them; all L + 1 of them would be much. For instance
            `lambda logits: jax.lax.top_k(jax.nn.softmax(logits), 5)`.
        tuned: Maps by layer that are applied before, [L, ...].
        options: Other arguments of the model.

    Returns:
        What `read` returns, with a leading axis of L + 1.
    """
    inputs = as_inputs("inputs", inputs, options, ("record", "start", "state"))
    _, records = run(model, *inputs, record=("resid_pre", "resid"), **options)
    if isinstance(records["resid_pre"], list):
        raise ValueError("the layers have residual streams of different shapes")
    before, last = records["resid_pre"], records["resid"][-1]

    def all_layers(before: Array, last: Array, tuned: Any) -> Any:
        def one(x: Array) -> Any:
            return read(model(*inputs, start=(len(before), x), **options)[0])

        if tuned is not None:
            before = before + jnp.einsum("lbtd,lde->lbte", before, tuned.weight) + tuned.bias[:, None, None]
        return jax.lax.map(one, jnp.concatenate([before, last[None]]))

    return compiled(all_layers, before, last, tuned)


@unchanged()
def lens_loss(tuned: TunedLens, model: Any, inputs: Any, **options: Any) -> Float[Array, " layers"]:
    """Returns the mean over tokens of KL(output ‖ lens) in nats for every layer, [L]: what a `TunedLens` lowers.

    Args:
        tuned: The lens.
        model: The model.
        inputs: Its inputs.
        options: Other arguments of the model.
    """
    inputs = as_inputs("inputs", inputs, options, ("record", "start", "state"))
    logits, _, records = model(*inputs, record=("resid_pre",), **options)
    target = jax.lax.stop_gradient(jax.nn.log_softmax(logits))
    before = jax.lax.stop_gradient(records["resid_pre"])

    def of_layer(given: Any) -> Array:
        x, weight, bias = given
        logits, *_ = model(*inputs, start=(len(before), x + x @ weight + bias), **options)
        return (jnp.exp(target) * (target - jax.nn.log_softmax(logits))).sum(-1).mean()

    return jax.lax.map(of_layer, (before, tuned.weight, tuned.bias))


class Attribution(NamedTuple):
    """The parts of a metric that is linear in the logits: they add up to it, but for rounding.

    Attributes:
        embed: [B, T], of what goes into the first layer.
        heads: [L, B, T, N], of each head.
        attention_bias: [L, B, T], of what attention adds whatever its heads read.
        mlp: [L, B, T], of each feed-forward block.
        constant: [], of biases behind the last layer: the metric of a stream of zeros.
        sources: [L, B, N, S], of each token that the heads read, summed over the reading ones; None if not asked for.
    """

    embed: Array
    heads: Array
    attention_bias: Array
    mlp: Array
    constant: Array
    sources: Array | None

    def total(self) -> Array:
        """Returns the sum of all parts."""
        return self.constant + sum(x.sum() for x in (self.embed, self.heads, self.attention_bias, self.mlp))


@unchanged()
def direct_attribution(
    model: Any, inputs: Any, metric: Callable[[Array], Array], *, sources: bool = False, **options: Any
) -> Attribution:
    """Returns what each part of the model writes into a metric of the logits directly (direct logit attribution).

    The stream before the last norm is the sum of what the embedding, the heads and the blocks add. With the scale of
    the last norm as it is in this run, the logits are an affine function of the stream, so a metric that is linear in
    the logits, such as their difference, splits exactly: Σ parts = metric. That function includes LayerNorm's centring.

    Args:
        model: The model. Its layers add to the stream, without norms of the sum or behind attention.
        inputs: Its inputs: tokens, or a tuple of inputs.
        metric: From the logits to one number, linear. That the parts add up to it is checked, but not under `jit`.
        sources: Whether heads are split further by the token that they read, Σ_j A_ij v_j, of which weights T x S per
            head are held.
        options: Other arguments of the model.

    Raises:
        ValueError: The parts do not add up to the metric: it is not linear in the logits (as under capped logits), or
            the model has a norm or a gate behind its attention, a norm of the sum, or further branches. Or the metric
            is not one number, the model has no heads, or tokens of its own before the sequence.
    """
    inputs = as_inputs("inputs", inputs, options)
    check_layers_alone(model)
    if "z" not in model.sites:
        raise ValueError(f"the model has no site 'z', which heads read: it has {list(model.sites)}")
    scale = ("final_norm_scale",) if "final_norm_scale" in model.sites else ()
    record = ("embed", "resid_pre", "z", "attn_out", "mlp_out", "resid", *scale, *(("weights", "v") if sources else ()))
    record = tuple(site for site in record if site in model.sites)
    logits, seen = run(model, *inputs, record=record, **options)
    if lists := [site for site, value in seen.items() if isinstance(value, list)]:
        raise ValueError(f"the layers have {lists} in different shapes, or not all of them: need the same in all")
    value, layers = metric(logits), len(seen["resid"])
    if jnp.shape(value) != ():
        raise ValueError(f"metric has the shape {jnp.shape(value)}: need one number, such as a mean over examples")
    if seen["embed"].shape != seen["resid_pre"].shape[1:]:
        raise ValueError("the model has tokens of its own before the sequence: its parts are not told apart")
    edits = {site: Put(seen[site]) for site in scale}
    row = model.tokens(seen["embed"], positions=options.get("positions"), mask=options.get("mask"))
    zero = jnp.zeros_like(seen["resid"][-1])

    def of_stream(x: Array) -> Array:
        return metric(model(*inputs, start=(layers, x), edits=edits, **options)[0])

    def split(seen: Any) -> Any:
        constant, pull = jax.vjp(of_stream, zero)
        (direction,) = pull(jnp.ones_like(constant))  # [B, T, D]

        def of_layer(given: Any) -> Any:
            number, z, written, weights, v = given

            def out(z: Array) -> Array:
                more = {"context": options.get("context"), "start": number, "stop": number + 1}
                found = model.layers(zero, row, edits={"z": Put(z)}, record=("attn_out",), **more)[2]
                return found["attn_out"][number]

            bias, pull = jax.vjp(out, jnp.zeros_like(z))
            (at_z,) = pull(direction.astype(bias.dtype))
            at_z = at_z.astype(direction.dtype)  # [B, T, N, H], as what follows also where z is bfloat16
            by_source = None
            if weights is not None:
                values = jnp.repeat(v, z.shape[-2] // v.shape[-2], -2)
                by_source = jnp.einsum("bnts,bsnh,btnh->bns", weights, values, at_z)
            squares = jnp.square(z * at_z).sum() + jnp.square(written * direction).sum()
            return (z * at_z).sum(-1), (bias * direction).sum(-1), by_source, squares

        numbers = jnp.arange(layers)
        given = numbers, seen["z"], seen["attn_out"], seen.get("weights"), seen.get("v")
        heads, bias, by_source, squares = jax.lax.map(of_layer, given)
        mlp = (seen["mlp_out"] * direction).sum(-1) if "mlp_out" in seen else jnp.zeros((layers, *zero.shape[:2]))
        parts = Attribution((seen["embed"] * direction).sum(-1), heads, bias, mlp, constant, by_source)
        return parts, jnp.sqrt(squares.sum())

    found, spread = compiled(split, seen)
    if isinstance(value, jax.core.Tracer):
        return found
    sizes = sum(abs(x).sum() for x in (found.embed, found.heads, found.attention_bias, found.mlp)) + abs(value)
    # Sums are of the dtype of the metric. What a layer of another dtype computes is rounded apart in every entry.
    rounding = 100 * layers * jnp.finfo(value.dtype).eps * sizes + 16 * jnp.finfo(seen["z"].dtype).eps * spread
    if not jnp.isfinite(value):
        raise ValueError(f"the metric is {value}: need logits that are numbers, as of tokens of the vocabulary")
    if not abs(found.total() - value) <= rounding:
        raise ValueError(
            f"the parts add up to {found.total()} and the metric is {value}: need a metric that is linear in the "
            "logits, and layers that add to the stream what one attention and one block write, "
            "without a norm behind attention or of the sum, and without a gate"
        )
    return found
