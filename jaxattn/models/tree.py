"""Trees of drafts: several guesses at the next tokens share their beginnings, and one call of the model reads all."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxattn.core.attend.graph import Ancestors


def longest_path(
    parents: Int[Array, "#b m"], tokens: Int[Array, "b m"], choices: Int[Array, "b m"]
) -> Bool[Array, "b m"]:
    """Returns the nodes of the longest path down from a root on which each token is what the model chose before it.

        logits, nodes, _ = model(tokens, parents=parents, state=state)
        path = models.longest_path(parents, tokens, logits.argmax(-1))
        state = models.joined(nodes, path)

    A root stands for a token that is given, such as the last of the text. Of equally long paths the first is taken
    (SpecInfer, Miao et al., 2024).

    Args:
        parents: [1 or B, M], the node before each node, a smaller number, or −1 for a root.
        tokens: [B, M], the token of each node.
        choices: [B, M], the token that the model chose behind each node.
    """
    parents = jnp.broadcast_to(parents, tokens.shape)
    tree = Ancestors(parents)
    right = (parents < 0) | (tokens == jnp.take_along_axis(choices, jnp.maximum(parents, 0), 1))
    above = tree.to_array(tokens.shape[1])[:, 0]  # [B, M, M], itself and its ancestors
    reached = (right[:, None, :] | ~above).all(-1)
    end = jnp.where(reached, tree.depths, -1).argmax(1)
    return jnp.take_along_axis(above, end[:, None, None], 1)[:, 0]
