"""What a feed-forward block makes of what the heads fetched: its output as a sum of theirs and one direction."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.analysis.factors import ov
from jaxattn.core.numeric import ratio
from jaxattn.trace import run
from jaxattn.trace.patching import as_inputs
from jaxattn.trace.reducers import TokensAt


class VectorFit(NamedTuple):
    """target ≈ Σ_c coefficient_c basis_c + constant, with one number for each vector of the basis.

    Attributes:
        coefficient: [..., C].
        constant: [..., D], the same for all examples; zeros if it was left out.
        r2: [...], 1 − Σ ‖target − fit‖² / Σ ‖target‖². It is not centred, so that fits with and without a constant can
            be compared. NaN for a target of zeros.
    """

    coefficient: Float[Array, "*l c"]
    constant: Float[Array, "*l d"]
    r2: Float[Array, "*l"]


def regress_vectors(
    target: Float[Array, "examples d"],
    basis: Float[Array, "c examples d"],
    *,
    constant: bool = True,
    penalty: float = 0.0,
) -> VectorFit:
    """Returns the least Σ_x ‖y(x) − Σ_c β_c b_c(x) − d‖² + penalty ‖β‖², with scalars β and one vector d.

    It is least squares over all examples and channels at once. A further vector never lowers R² where nothing is
    penalised.

    Args:
        target: y, [E, D].
        basis: b, [C, E, D].
        constant: Whether there is a d.
        penalty: At least 0. Vectors that depend on each other linearly need one above 0.

    Raises:
        ValueError: Shapes do not fit, or the penalty is negative.
    """
    if basis.shape[1:] != target.shape:
        raise ValueError(f"basis has shape {basis.shape}: need [vectors, *{target.shape}], as the target")
    if not penalty >= 0:
        raise ValueError(f"penalty is {penalty}: need at least 0")
    middle = (lambda x: x.mean(-2, keepdims=True)) if constant else (lambda x: jnp.zeros_like(x[..., :1, :]))
    y, b = target - middle(target), basis - middle(basis)
    gram = jnp.einsum("ced,fed->cf", b, b, precision="highest") + penalty * jnp.eye(len(b), dtype=b.dtype)
    beta = jnp.linalg.lstsq(gram, jnp.einsum("ced,ed->c", b, y, precision="highest"))[0]
    direction = (middle(target) - jnp.tensordot(beta, middle(basis), 1))[0]
    rest = target - jnp.tensordot(beta, basis, 1) - direction
    whole = jnp.square(target).sum()
    return VectorFit(beta, direction, jnp.where(whole > 0, 1 - ratio(jnp.square(rest).sum(), whole), jnp.nan))


def block_regression(
    model: Any, inputs: Any, at: int, *, constant: bool = True, penalty: float = 1e-3, **options: Any
) -> VectorFit:
    """Returns for every layer how its feed-forward block's output depends on what the heads and the stream gave it:

        mlp_out(x) ≈ Σ_n β_n z_n(x) W_O,n + β_r resid_pre(x) + d

    over prompts x, at one position. β_n above 0 amplifies what head n wrote, below 0 erases it, and d is what the block
    adds whatever the prompt says: the direction of the task (arXiv 2403.19521). The basis is reconstructed from an
    outline of that paper; its exact form is not known to us.

    Args:
        model: As of `ov`, with a feed-forward block in every layer.
        inputs: Prompts of one relation, [B, T].
        at: The position, such as that of the last token.
        constant: Whether there is a d.
        penalty: As of `regress_vectors`, times the mean square of the basis: heads and stream nearly depend on each
            other.
        options: Other arguments of the model.

    Returns:
        [L, N + 1] coefficients, those of the heads and then that of the stream; [L, D]; [L].

    Raises:
        ValueError: As of `ov`, or layers have other sites.
    """
    inputs = as_inputs("inputs", inputs, options, ("record",))
    here = TokensAt(jnp.asarray([at]))
    record = {site: (site, here) for site in ("z", "resid_pre", "mlp_out")}
    _, seen = run(model, *inputs, record=record, **options)
    for site, values in seen.items():
        if isinstance(values, list):
            raise ValueError(f"the layers have {site!r} in different shapes, or not all of them: need the same in all")
    out = ov(model).right  # [L, N, H, D]

    def of_layer(given: Any) -> VectorFit:
        z, out, stream, target = given  # [B, N, H], [N, H, D], [B, D], [B, D]
        heads = jnp.einsum("bnh,nhd->nbd", z, out, precision="highest")
        basis = jnp.concatenate([heads, stream[None]])
        size = jnp.square(basis).sum((1, 2)).mean()
        scaled = basis / jnp.sqrt(jnp.where(size > 0, size, 1))
        found = regress_vectors(target, scaled, constant=constant, penalty=penalty)
        return found._replace(coefficient=found.coefficient / jnp.sqrt(jnp.where(size > 0, size, 1)))

    given = seen["z"][:, :, 0], out, seen["resid_pre"][:, :, 0], seen["mlp_out"][:, :, 0]
    return jax.lax.map(of_layer, given)
