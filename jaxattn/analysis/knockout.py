"""What attention brings from chosen tokens, and what the model loses when it no longer reads them."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxattn.analysis.lens import direct_attribution
from jaxattn.core.attend.mask import Explicit
from jaxattn.trace.edits import Pairs


def token_lens(
    model: Any,
    inputs: Any,
    metric: Callable[[Array], Array],
    groups: Int[Array, "b s"],
    size: int,
    **options: Any,
) -> Float[Array, "layers b groups"]:
    """Returns what each layer's attention writes into a metric from each group of tokens, [L, B, G] (2025).

        u = concat_n (Σ_{j in group} A_tj v_j) W_O,  read by W_U with the scale of the last norm as it is in this run

    With the logit of one token after position t as the metric, it is the token lens of Yan et al.: what reading the
    subject, or an answer that was given before, does to that token. Groups that hold all tokens add up to what
    attention writes but for its bias, as `direct_attribution` has it.

    Args:
        model: As of `direct_attribution`.
        inputs: Its inputs.
        metric: From the logits to one number, linear, such as `lambda logits: logits[:, t, token].sum()`.
        groups: [B, S], the group of each token that may be read, 0 .. size − 1; −1 for none.
        size: G.
        options: As of `direct_attribution`. Groups are by place in the row.

    Raises:
        ValueError: As of `direct_attribution`, or groups do not fit the inputs.
    """
    parts = direct_attribution(model, inputs, metric, sources=True, **options)
    assert parts.sources is not None
    groups = jnp.asarray(groups)
    if groups.shape != parts.heads.shape[1:3]:
        raise ValueError(f"groups has shape {groups.shape}: need {parts.heads.shape[1:3]}, that of the tokens")
    member = jax.nn.one_hot(groups, size, dtype=parts.sources.dtype)
    return jnp.einsum("lbns,bsg->lbg", parts.sources, member, precision="highest")


def knockout(
    hidden: Bool[Array, "*b queries keys"],
    *,
    how: Literal["hide", "zero"] = "hide",
    heads: Bool[Array, " n"] | None = None,
) -> dict[str, Any]:
    """Returns the edits by which some tokens do not read some others, in all layers.

    Args:
        hidden: [P, R] or [B, P, R], by position, which query does not read which key. Positions outside the table stay
            as they are only with "zero"; give the table for all of them.
        how: "hide": the rest of the row is normalised as if the keys were not there. "zero": the weights become 0, and
            the rest of the row keeps its own. Which of both Yan et al. (2025) do is not known to us.
        heads: [N], in which heads; None for all.

    Raises:
        ValueError: `how` is neither.
    """
    if how not in ("hide", "zero"):
        raise ValueError(f"how is {how!r}: need 'hide' or 'zero'")
    table = jnp.asarray(hidden, bool)[..., None, :, :]
    if heads is not None:
        table = table & jnp.asarray(heads)[:, None, None]
    table = table[0] if table.ndim == 3 and table.shape[0] == 1 else table
    return {"scores": Explicit(~table)} if how == "hide" else {"weights": Pairs(jnp.where(table, 0.0, 1.0))}
