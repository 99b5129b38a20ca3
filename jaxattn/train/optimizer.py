"""The optimiser: clipping, AdamW or Muon, decay where it belongs, a schedule, averages, scaling; all from optax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from optax import contrib

from jaxattn.core.role import Role

Roles = Any
"""A `Role` for each parameter, in a pytree like the parameters or a prefix of theirs, or a function that makes one of
them."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The settings of the optimiser.

    Attributes:
        name: The rule: adamw; muon (orthogonalised momentum) for hidden matrices, with AdamW for all else; or
            schedule_free: AdamW whose parameters are averaged, with the schedule constant.
        learning_rate: The peak learning rate, reached at the end of the warm-up.
        warmup_steps: Steps over which the learning rate rises linearly.
        schedule: The learning rate after the warm-up: cosine falls to the last step; constant stays, so that a run can
            be made longer; stable stays, and falls linearly over the last part of the steps.
        decay_fraction: The part of all steps over which the schedule stable falls, between 0 and 1.
        final_fraction: The learning rate at the last step, as a fraction of the peak, between 0 and 1. The schedule
            constant has none.
        weight_decay: Decoupled weight decay: each step takes learning_rate * weight_decay of a decayed parameter away.
            Which parameters are decayed is said where they are made (`decay_mask`).
        beta1: Decay of the first moment's running mean (of the momentum, for muon; for schedule_free the part of the
            average in the parameters that gradients are taken at).
        beta2: Decay of the second moment's running mean.
        eps: Added to the root of the second moment before dividing by it.
        clip_norm: Gradients whose global norm exceeds this are scaled down to it; null for no clipping.
    """

    name: Literal["adamw", "muon", "schedule_free"] = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    schedule: Literal["cosine", "constant", "stable"] = "cosine"
    decay_fraction: float = 0.2
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float | None = 1.0


def parameter_roles(params: Any) -> Any:
    """Returns a pytree of strings like `params`: the `Role` of each parameter for an optimiser.

    The role is the `role` in the metadata of the `nnx.Variable` that holds the array; the modules of `jaxattn` set it
    for all of theirs. Without one a parameter is "decayed". Such are arrays without a variable, as in a dict, and
    variables of modules from elsewhere, also their biases and norms.

    `nnx.Param(x, role="undecayed")` or `nnx.Linear(..., bias_metadata={"role": "undecayed"})` set the role of your own
    parameters. You can also give `make_optimizer` the roles.
    """

    def role(node: Any) -> Any:
        said = node.get_metadata().get("role", "decayed") if isinstance(node, nnx.Variable) else "decayed"
        return jax.tree.map(lambda _: said, node)

    return jax.tree.map(role, params, is_leaf=lambda node: isinstance(node, nnx.Variable))


def decay_mask(params: Any, roles: Roles = parameter_roles) -> Any:
    """Returns a pytree of booleans like `params`: whether a parameter decays, True for all roles but "undecayed".

    Args:
        params: The parameters.
        roles: Their roles, by default those that they say themselves, `parameter_roles`.

    Raises:
        ValueError: A role is not a `Role`.
    """
    return jax.tree.map(lambda role: role != "undecayed", _roles(params, roles))


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate of step t = 0, 1, ..., with W warm-up steps, peak p and final fraction f:

        p · (t+1) / (W+1)                                              for t ≤ W, then
        p · (f + (1−f) · (1 + cos(π · (t−W) / (steps−W))) / 2)         for cosine,
        p                                                              for constant, and for stable until S,
        p · (1 − (1−f) · (t−S) / (steps−S)),  S = `decay_start`,       for stable from there on

    No step is wasted on a rate of 0, the peak is reached at t = W, and p · f at t = steps. Warmup-stable-decay is that
    of Hu et al. (MiniCPM, 2024), with a straight line.
    """
    peak, end = config.learning_rate, config.learning_rate * config.final_fraction
    if config.schedule != "cosine":
        start = peak / (config.warmup_steps + 1)
        stable = optax.linear_schedule(start, peak, config.warmup_steps) if config.warmup_steps else lambda _: peak
        if config.schedule == "constant":
            return stable
        begin = decay_start(config, steps)
        return optax.join_schedules([stable, optax.linear_schedule(peak, end, steps - begin)], [begin])
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / (config.warmup_steps + 1),
        peak_value=peak,
        warmup_steps=config.warmup_steps,
        decay_steps=steps,
        end_value=end,
    )


def decay_start(config: OptimizerConfig, steps: int) -> int:
    """Returns the step from which the learning rate depends on the number of all steps."""
    if config.schedule == "constant":
        return steps
    return (
        config.warmup_steps
        if config.schedule == "cosine"
        else max(config.warmup_steps, steps - round(config.decay_fraction * steps))
    )


def make_optimizer(
    config: OptimizerConfig, steps: int, *, roles: Roles = parameter_roles
) -> optax.GradientTransformation:
    """θ ← θ − ηₜ · (direction(clip(gradient)) + weight_decay · θ), with ηₜ and the decayed θ of the functions above.

    `adamw` is the rule of Loshchilov and Hutter (2019). `muon` is that of Jordan et al. (2024), for parameters whose
    role is "hidden", with

        m ← β m + g,   direction = orthogonalised(g + β m)

    β = `beta1` and no correction of the bias. Five steps of Newton-Schulz take the last two axes as the matrix (leading
    ones are layers). Other than theirs, updates are scaled to a root mean square of 0.2, so that a learning rate fit
    for AdamW fits them too (Liu et al., 2025), and computed in the parameters' own type. AdamW serves all else.

    `schedule_free` is that of Defazio et al. (2024), around AdamW without momentum: z goes down the gradients at
    y = (1 − β) z + β x, with β = `beta1`, and x is the mean of z so far, weighted by squares of the learning rate. The
    parameters of the state are y. Evaluations, loaded checkpoints and results have x, the `evaluation_params`.

    Args:
        config: The settings.
        steps: The number of steps of the run.
        roles: The role of each parameter, by default those that they say themselves, `parameter_roles`. A dict of
            arrays says nothing, so all of it is decayed: give e.g. `{"bias": "undecayed", "kernel": "hidden"}` for one.

    Raises:
        ValueError: A field of the config makes no sense; the message names it. At `init`, a role is not a `Role`, muon
            has no hidden matrix, or a hidden parameter has fewer than two axes.
    """
    _check(config, steps)
    if config.name != "muon":
        beta1 = config.beta1 if config.name == "adamw" else 0.0
        direction = optax.scale_by_adam(beta1, config.beta2, config.eps)
    else:
        direction = optax.chain(
            optax.masked(optax.trace(config.beta1, nesterov=True), lambda params: _hidden(params, roles)),
            # optax's own momentum corrects the bias of Nesterov's average. At beta 0 it passes on what it is given; at
            # a rate of -1 and without decay the rest is the direction alone: its decay for AdamW knows no mask.
            contrib.muon(
                -1.0,
                beta=0.0,
                nesterov=False,
                eps=config.eps,
                adam_b1=config.beta1,
                adam_b2=config.beta2,
                muon_weight_dimension_numbers=lambda params: _matrices(params, roles),
                consistent_rms=0.2,  # the root mean square of a typical Adam update, from Liu et al.
            ),
        )
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    decay = optax.add_decayed_weights(config.weight_decay, lambda params: decay_mask(params, roles))
    rate = learning_rate(config, steps)
    rule = optax.chain(clip, direction, decay, optax.scale_by_learning_rate(rate))
    return contrib.schedule_free(rule, rate, b1=config.beta1) if config.name == "schedule_free" else rule


def evaluation_params(opt_state: Any, params: Any) -> Any:
    """Returns the parameters that are to be used: those that a schedule-free optimiser averages, else `params`.

    Args:
        opt_state: The state of any optimiser of optax, such as a chain with `optax.contrib.schedule_free` in it.
        params: The parameters that it trains.
    """
    averaging = _states(opt_state, contrib.ScheduleFreeState)
    return contrib.schedule_free_eval_params(averaging[0], params) if averaging else params


class LossScale(NamedTuple):
    """The state of `loss_scaling`.

    Attributes:
        scale: The factor of the loss in the next step.
        finite_steps: Steps since it changed.
        inner: The state of the optimiser.
    """

    scale: jax.Array
    finite_steps: jax.Array
    inner: Any


def loss_scaling(
    optimizer: optax.GradientTransformation, scale: float = 2.0**15, period: int = 2000
) -> optax.GradientTransformationExtraArgs:
    """Returns an optimiser for models that compute in float16 (Micikevicius et al., 2018).

    `make_step` multiplies the loss by the scale, and divides the gradient by it: so small gradients are no zeros in
    float16. A step whose gradient overflows changes nothing but the scale, which it halves; `period` steps without one
    double it. At a scale of 1 a gradient that is not finite is an error as ever.

    Args:
        optimizer: The optimiser of gradients that are finite.
        scale: The first factor, at least 1.
        period: The number of steps, at least 1.

    Raises:
        ValueError: A number makes no sense.
    """
    if not 1 <= scale < float("inf"):
        raise ValueError(f"scale is {scale}: need a number from 1 on")
    if period < 1:
        raise ValueError(f"period is {period}: need at least 1 step")
    guarded = optax.apply_if_finite(optimizer, max_consecutive_errors=2**31 - 1)

    def init(params: Any) -> LossScale:
        return LossScale(jnp.float32(scale), jnp.int32(0), guarded.init(params))

    def update(updates: Any, state: LossScale, params: Any = None, **extra: Any) -> tuple[Any, LossScale]:
        updates, inner = guarded.update(updates, state.inner, params, **extra)
        count = jnp.where(inner.last_finite, state.finite_steps + 1, 0)
        grown = jnp.where(count == period, 2 * state.scale, state.scale)
        following = jnp.where(inner.last_finite, grown, jnp.maximum(state.scale / 2, 1))
        return updates, LossScale(following, count % period, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def loss_scale(opt_state: Any) -> jax.Array | None:
    """Returns the factor of the loss that `loss_scaling` asks for, or None if it is not there."""
    scaling = _states(opt_state, LossScale)
    return scaling[0].scale if scaling else None


def _states(opt_state: Any, kind: type) -> list[Any]:
    """Returns the states of one kind among those of an optimiser."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda leaf: isinstance(leaf, kind))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]


def _roles(params: Any, roles: Roles) -> Any:
    """Returns the role of each leaf of the parameters."""
    said = roles(params) if callable(roles) else roles
    for role in jax.tree.leaves(said, is_leaf=lambda role: role is None):
        if role not in get_args(Role):
            raise ValueError(f"roles holds {role!r}: need one of {', '.join(get_args(Role))}")
    try:
        return jax.tree.map(lambda role, node: jax.tree.map(lambda _: role, node), said, params)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"roles must be a pytree like the parameters, or a prefix of theirs: {reason}") from error


def _hidden(params: Any, roles: Roles) -> Any:
    """Returns which parameters Muon serves."""
    hidden = jax.tree.map(lambda role: role == "hidden", _roles(params, roles))
    if not any(jax.tree.leaves(hidden)):
        raise ValueError("name is 'muon' but no parameter is a hidden matrix: need roles that say which are")
    for is_hidden, leaf in zip(jax.tree.leaves(hidden), jax.tree.leaves(params), strict=True):
        if is_hidden and leaf.ndim < 2:
            raise ValueError(f"roles says that a parameter of shape {leaf.shape} is a hidden matrix: need two axes")
    return hidden


def _matrices(params: Any, roles: Roles) -> Any:
    matrix = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return jax.tree.map(lambda hidden: matrix if hidden else None, _hidden(params, roles))


def _check(config: OptimizerConfig, steps: int) -> None:
    if config.name not in ("adamw", "muon", "schedule_free"):
        raise ValueError(f"name is {config.name!r}: need 'adamw', 'muon' or 'schedule_free'")
    if config.name == "schedule_free" and config.schedule != "constant":
        raise ValueError(f"schedule is {config.schedule!r} with 'schedule_free': need 'constant'")
    if config.name == "schedule_free" and config.beta1 == 0:
        raise ValueError("beta1 is 0 with 'schedule_free': need a number above 0")
    if not config.learning_rate > 0:
        raise ValueError(f"learning_rate is {config.learning_rate}: need a number above 0")
    if not 0 <= config.warmup_steps < steps:
        raise ValueError(
            f"warmup_steps is {config.warmup_steps} of {steps} steps: need 0 or more, and fewer than all steps"
        )
    if config.schedule not in ("cosine", "constant", "stable"):
        raise ValueError(f"schedule is {config.schedule!r}: need 'cosine', 'constant' or 'stable'")
    if not 0 < config.decay_fraction <= 1:
        raise ValueError(f"decay_fraction is {config.decay_fraction}: need a number above 0, and 1 at most")
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
