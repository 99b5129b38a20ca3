"""How few directions of its queries, keys or values a head needs: runs in which they are projected on a few.

Directions are fitted on some prompts and tested on others. With all directions nothing changes, and with none a head
has the mean of them: mean ablation.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.core.part import part
from jaxattn.nn.tap import Edit, Layers


@part
class Project(Edit):
    """μ + (x − μ) Aᵀ A for each head, with orthonormal rows of A: what is left of x along a few directions.

    Attributes:
        mean: μ, [N, H].
        axes: A, [N, r, H].
    """

    mean: Float[Array, "n h"]
    axes: Float[Array, "n r h"]

    of_tokens = True

    def __call__(self, value, where):
        mean, axes = (jnp.asarray(x).astype(value.dtype) for x in (self.mean, self.axes))
        along = jnp.einsum("btnh,nrh->btnr", value - mean, axes, precision="highest")
        return mean + jnp.einsum("btnr,nrh->btnh", along, axes, precision="highest")


def head_subspaces(
    values: Float[Array, "layers examples n h"], rank: int, *, groups: int = 1
) -> tuple[Float[Array, "layers n h"], Float[Array, "layers n rank h"]]:
    """Returns the mean and the directions of largest variance of each head, [L, N, H] and [L, N, r, H].

    Args:
        values: [L, E, N, H], such as records of q at the last token, or of k at the labels of a question.
        rank: r, from 0 to H.
        groups: How many neighbouring examples are centred together before directions are looked for, such as the 4
            labels of a question (Lieberum et al., 2023); 1 for none. What all of them share is then in no direction.

    Raises:
        ValueError: The rank is out of range, or the examples are no multiple of the groups.
    """
    layers, examples, _, width = values.shape
    if not 0 <= rank <= width:
        raise ValueError(f"rank is {rank}: need 0 to {width}, the channels of a head")
    if groups < 1 or examples % groups:
        raise ValueError(f"groups is {groups} for {examples} examples: need a divisor of them")
    mean = values.mean(1)
    if groups > 1:
        parts = values.reshape(layers, examples // groups, groups, *values.shape[2:])
        spread = (parts - parts.mean(2, keepdims=True)).reshape(values.shape)
    else:
        spread = values - mean[:, None]
    scatter = jnp.einsum("lenh,leng->lnhg", spread, spread, precision="highest")
    axes = jnp.linalg.eigh(scatter)[1]  # columns, the largest last
    return mean, jnp.flip(axes.swapaxes(-1, -2), -2)[:, :, :rank]


def projected(subspaces: dict[str, tuple[Any, Any]]) -> dict[str, Layers]:
    """Returns the edits that project values on the subspaces of their heads, in all layers.

    Args:
        subspaces: Site, such as q, k or v -> what `head_subspaces` returns of it, with the heads of the site.
    """
    return {site: Layers(Project(mean, axes)) for site, (mean, axes) in subspaces.items()}


def label_logits(logits: Float[Array, "*b v"], labels: Int[Array, " m"]) -> Float[Array, "*b m"]:
    """Returns the logits of the labels of a question less their mean: a common shift of them is no answer.

    Args:
        logits: [..., V].
        labels: [M], tokens such as A, B, C and D.
    """
    chosen = logits[..., jnp.asarray(labels)]
    return chosen - chosen.mean(-1, keepdims=True)
