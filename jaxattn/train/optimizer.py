"""The optimiser: clipping, AdamW or Muon, decay where it belongs, and a schedule, all from optax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax
from optax import contrib

# Flax wraps an array in a variable, which shows as a last step of the path with one of these names.
_WRAPPERS = {"value", "raw_value"}


@dataclass(frozen=True)
class OptimizerConfig:
    """What the optimiser is made of.

    Attributes:
        name: The rule: adamw; or muon (orthogonalised momentum) for `kernel` matrices, with AdamW for all else.
        learning_rate: The peak learning rate, reached at the end of the warm-up.
        warmup_steps: Steps over which the learning rate rises linearly.
        final_fraction: The learning rate at the last step, as a fraction of the peak, between 0 and 1.
        weight_decay: Decoupled weight decay: each step takes learning_rate * weight_decay of a decayed parameter away.
        undecayed: Parameters with one of these last names are not decayed: norm scales, biases, sink logits.
        beta1: Decay of the first moment's running mean (of the momentum, for muon).
        beta2: Decay of the second moment's running mean.
        eps: Added to the root of the second moment before dividing by it.
        clip_norm: Gradients whose global norm exceeds this are scaled down to it; null for no clipping.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    undecayed: tuple[str, ...] = ("scale", "bias", "null_logit")
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float | None = 1.0


def parameter_name(path: tuple[Any, ...]) -> str:
    """The last name on a `jax.tree_util` path, past the wrapper that Flax puts around an array."""
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    while len(names) > 1 and names[-1] in _WRAPPERS:
        names.pop()
    return names[-1] if names else ""


def decay_mask(params: Any, undecayed: tuple[str, ...] = OptimizerConfig.undecayed) -> Any:
    """A pytree of booleans like `params`: False where the parameter's last name is in `undecayed`.

    The rule goes by name and not by the number of axes: a norm scale is a vector, but the scales of layers that are
    scanned are stacked to a matrix, which looks like a kernel.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: parameter_name(path) not in undecayed, params)


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate of step t = 0, 1, ..., with W warm-up steps, peak p and final fraction f.

    p · (t+1) / (W+1) for t ≤ W, then p · (f + (1−f) · (1 + cos(π · (t−W) / (steps−W))) / 2): no step is wasted on a
    rate of 0, the peak is reached at t = W, and p · f at t = steps.
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (config.warmup_steps + 1),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=steps,
        end_value=config.learning_rate * config.final_fraction,
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """θ ← θ − ηₜ · (direction(clip(gradient)) + weight_decay · θ), with ηₜ and the decayed θ of the functions above.

    `adamw`: Loshchilov and Hutter, 2019. `muon`: Jordan et al., 2024; it serves parameters named `kernel` with at
    least two axes, whose last two axes it takes as the matrix (leading ones are layers), and scales its updates so
    that a learning rate fit for AdamW fits it too (Liu et al., 2025). Its momentum is `beta1`, in Nesterov's form,
    also for the parameters that it leaves to AdamW.

    Raises `ValueError` naming the field of a config that makes no sense.
    """
    _check(config, steps)
    if config.name == "adamw":
        direction = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    else:
        # At a rate of -1 and without decay optax's Muon is the direction alone. Its own decay of what AdamW serves
        # knows no mask.
        direction = contrib.muon(
            -1.0,
            beta=config.beta1,
            eps=config.eps,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=0.2,  # the root mean square of a typical Adam update, from Liu et al.
        )
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    decay = optax.add_decayed_weights(config.weight_decay, lambda params: decay_mask(params, config.undecayed))
    return optax.chain(clip, direction, decay, optax.scale_by_learning_rate(learning_rate(config, steps)))


def _matrices(params: Any) -> Any:
    matrix = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: matrix if parameter_name(path) == "kernel" and leaf.ndim >= 2 else None, params
    )


def _check(config: OptimizerConfig, steps: int) -> None:
    if config.name not in ("adamw", "muon"):
        raise ValueError(f"name is {config.name!r}: need 'adamw' or 'muon'")
    if not config.learning_rate > 0:
        raise ValueError(f"learning_rate is {config.learning_rate}: need a number above 0")
    if not 0 <= config.warmup_steps < steps:
        raise ValueError(
            f"warmup_steps is {config.warmup_steps} of {steps} steps: need 0 or more, and fewer than all steps"
        )
    if not 0 <= config.final_fraction <= 1:
        raise ValueError(f"final_fraction is {config.final_fraction}: need a number from 0 to 1")
    if config.weight_decay < 0:
        raise ValueError(f"weight_decay is {config.weight_decay}: need 0 or more")
    for name, beta in (("beta1", config.beta1), ("beta2", config.beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name} is {beta}: need a number from 0 to below 1")
    if not config.eps > 0:
        raise ValueError(f"eps is {config.eps}: need a number above 0")
    if config.clip_norm is not None and not config.clip_norm > 0:
        raise ValueError(f"clip_norm is {config.clip_norm}: need a number above 0, or null for no clipping")
