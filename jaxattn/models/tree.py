"""Trees of drafts: several guesses at the next tokens share their beginnings, and one call of the model reads all."""

import dataclasses
import math
from collections.abc import Sequence
from functools import cached_property

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxattn.core.attend.graph import Ancestors
from jaxattn.core.checks import check_int


@dataclasses.dataclass(frozen=True)
class Branches:
    """A tree of guesses behind one token, in which all nodes of a depth have as many children.

    (3, 2, 1) is three guesses at the next token, two behind each of these, and one behind each of those. The tree is as
    many chains as it has leaves, here 6 of 3 guesses; chains that begin alike share nodes. Node 0 is the token before
    the guesses, and nodes are numbered depth by depth.

    Attributes:
        children: The number of children by depth, each at least 1.
    """

    children: tuple[int, ...]

    @classmethod
    def of(cls, ahead: int | Sequence[int]) -> "Branches":
        """Returns the tree of these numbers of children, or the chain of so many guesses.

        Raises:
            TypeError: A number is no int.
            ValueError: A number is below 1, or there is none.
        """
        numbers = (ahead,) if not isinstance(ahead, Sequence) else ahead
        for number in numbers:
            check_int("ahead", number)
        if min(numbers, default=0) < 1:
            raise ValueError(
                f"ahead is {ahead}: need at least 1 guess in each round, or for a tree at least 1 at each depth"
            )
        return cls(tuple(map(int, numbers)) if isinstance(ahead, Sequence) else (1,) * int(ahead))

    @property
    def depth(self) -> int:
        """The number of guesses in each chain."""
        return len(self.children)

    @property
    def chains(self) -> int:
        """The number of chains, L."""
        return math.prod(self.children)

    @property
    def most(self) -> int:
        """The most children of a node."""
        return max(self.children)

    @cached_property
    def by_chain(self) -> Int[np.ndarray, "chains depth"]:
        """The nodes of each chain."""
        counts = np.cumprod(self.children)
        before = 1 + np.cumsum(counts) - counts
        return before + np.arange(self.chains)[:, None] // (self.chains // counts)

    @cached_property
    def place(self) -> Int[np.ndarray, "chains depth"]:
        """Which child of the node before each node of each chain is, counted from 0."""
        return np.arange(self.chains)[:, None] // (self.chains // np.cumprod(self.children)) % np.array(self.children)

    @cached_property
    def first_alike(self) -> Int[np.ndarray, "chains depth"]:
        """The first chain that has the same nodes before each depth."""
        counts = self.chains // np.concatenate([[1], np.cumprod(self.children)[:-1]])
        return np.arange(self.chains)[:, None] // counts * counts

    @cached_property
    def of_node(self) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
        """A chain and a depth, from 0, of each node but node 0."""
        _, at = np.unique(self.by_chain, return_index=True)
        return at // self.depth, at % self.depth

    @cached_property
    def parents(self) -> Int[np.ndarray, " m"]:
        """The node before each node, −1 for node 0."""
        before = np.pad(self.by_chain, ((0, 0), (1, 0)))
        return np.concatenate([[-1], before[self.of_node]])

    @cached_property
    def depths(self) -> Int[np.ndarray, " m"]:
        """The depth of each node, 0 of node 0."""
        return np.concatenate([[0], 1 + self.of_node[1]])

    @cached_property
    def above(self) -> Bool[np.ndarray, "m m"]:
        """Which nodes are each node itself or its ancestors."""
        above = np.eye(len(self.parents), dtype=bool)
        for node, parent in enumerate(self.parents[1:], 1):
            above[node] |= above[parent]
        return above

    @cached_property
    def elder(self) -> Bool[np.ndarray, "m m"]:
        """Which nodes are siblings of each node, and come before it."""
        return np.tril(self.parents[:, None] == self.parents, -1)

    @cached_property
    def siblings(self) -> Int[np.ndarray, "k m"]:
        """The first child of every node, the second, and so on; the number of nodes where there is none."""
        found = np.full((self.most, len(self.parents)), len(self.parents))
        found[self.elder.sum(1)[1:], self.parents[1:]] = np.arange(1, len(self.parents))
        return found


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
