"""Masks of nodes: a graph or a tree says who sees whom, and positions are the numbers of nodes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxattn.core.attend.mask import Causal, Mask, every_slot, tile_range
from jaxattn.core.checks import check_entries
from jaxattn.core.part import part
from jaxattn.core.table import take


@part
class Graph(Mask):
    """Shows a query the keys in its list: key ∈ neighbours[..., n, query position, :].

    The memory is P · D, where the table of an `Explicit` holds every pair. A node sees itself only if its list says so.
    Positions outside the lists see nothing.

    Attributes:
        neighbours: Integers [..., N or 1, P, D], the positions of at most D keys per node, padded with −1.
    """

    neighbours: Int[Array, "*batch heads nodes degree"]

    @classmethod
    def from_edges(cls, senders: Any, receivers: Any, nodes: int) -> "Graph":
        """The graph in which receivers[e] sees senders[e] for every edge e.

        Args:
            senders: Integers [E] that are known, not traced.
            receivers: Integers [E], likewise.
            nodes: The number of nodes.

        Raises:
            TypeError: The ends of edges are not integers.
            ValueError: An edge is to or from a node that is not one of 0..nodes−1, or the arrays do not match.
        """
        ends = np.asarray(senders), np.asarray(receivers)
        if ends[0].shape != ends[1].shape or ends[0].ndim != 1:
            raise ValueError(f"senders and receivers have shapes {ends[0].shape}, {ends[1].shape}: need [E] for both")
        if any(end.size and not np.issubdtype(end.dtype, np.integer) for end in ends):
            raise TypeError(f"senders and receivers must be integers, got {ends[0].dtype} and {ends[1].dtype}")
        receiver, sender = np.unique(np.stack([ends[1], ends[0]]).astype(np.int64), axis=1)
        if len(receiver) and not (0 <= min(receiver.min(), sender.min()) <= max(receiver.max(), sender.max()) < nodes):
            raise ValueError(f"edges must be between the nodes 0..{nodes - 1}")
        degree = np.bincount(receiver, minlength=nodes)
        place = np.arange(len(receiver)) - np.repeat(np.cumsum(degree) - degree, degree)
        neighbours = np.full((1, nodes, max(degree.max(initial=0), 1)), -1, np.int32)
        neighbours[0, receiver, place] = sender
        return cls(jnp.asarray(neighbours))

    @classmethod
    def from_adjacency(cls, adjacency: Any) -> "Graph":
        """The graph in which node i sees node j where adjacency[..., i, j].

        Args:
            adjacency: [P, R] or [..., N or 1, P, R], known, not traced.

        Raises:
            ValueError: The array has fewer than two axes.
        """
        adjacency = np.asarray(adjacency, bool)
        if adjacency.ndim < 2:
            raise ValueError(f"adjacency has shape {adjacency.shape}: need [P, R] or [..., N or 1, P, R]")
        adjacency = adjacency[None] if adjacency.ndim == 2 else adjacency
        degree = max(adjacency.sum(-1).max(initial=0), 1)
        order = np.argsort(~adjacency, axis=-1, kind="stable")[..., :degree]
        return cls(jnp.asarray(np.where(np.take_along_axis(adjacency, order, -1), order, -1).astype(np.int32)))

    def _of(self, query: Any) -> Array:
        """Returns the lists [..., n, T, D] of queries [..., 1, T, 1]."""
        neighbours = jnp.asarray(self.neighbours)
        *lead, nodes, degree = neighbours.shape
        check_entries("Graph", "neighbours", neighbours[..., 0], query)
        inside = (query >= 0) & (query < nodes)
        index = jnp.where(inside, jnp.where(inside, query, 0) * degree + np.arange(degree), -1)
        return take(neighbours.reshape(*lead, nodes * degree), index, grid=2, fill=-1)

    def __call__(self, query, key):
        return (self._of(query)[..., :, None, :] == key[..., None]).any(-1)

    def bounds(self, query, key):
        first_key, last_key = (x[..., None] for x in tile_range(key))  # [..., 1, 1, KB, 1]

        def one_row_of_tiles(query):  # [..., 1, bq, 1]: all tiles at once would be QB · KB lists
            seen = self._of(query)
            seen = seen.reshape(*seen.shape[:-2], 1, 1, -1)
            return ((seen >= first_key) & (seen <= last_key)).any(-1)

        rows = jnp.moveaxis(jnp.asarray(query), -3, 0).swapaxes(-1, -2)
        possible = jax.lax.map(one_row_of_tiles, rows)  # [QB, ..., n, 1, KB]
        return jnp.moveaxis(possible, 0, -2)[..., 0, :, :], np.False_

    def describe(self):
        return "neighbours in a graph"


@part
class Ancestors(Mask):
    """Shows a node itself and its ancestors: the mask of a tree of drafts (SpecInfer, Miao et al., 2024).

    Nodes are told apart by their position (siblings would share a depth), so the query and key positions of the call
    are node numbers. Position embeddings use the depth of a node. A chain is `Causal()`.

    In a walk that meets each node before its children, the descendants of node j are the nodes met at steps
    enter_j .. exit_j − 1. So j is i or an ancestor of i iff enter_j ≤ enter_i < exit_j. The memory is linear in M, and
    pointer doubling finds the steps in log M rounds.

    Attributes:
        parents: Integers [..., M], the parent of each node, which comes before it, parents[i] < i, or −1 for a root.
            Several roots make a forest.
    """

    parents: Int[Array, "*batch nodes"]

    @property
    def depths(self) -> Int[Array, "*batch nodes"]:
        """How many ancestors each node has: its place in the text is that of its root plus this."""
        parents = jnp.asarray(self.parents)
        return jax.vmap(_depths)(parents.reshape(-1, parents.shape[-1])).reshape(parents.shape)

    def _of(self, query, key, grid):
        """Returns (enter of queries, enter of keys, exit of keys); outside the tree −1, 0, 0, which no node sees."""
        parents = jnp.asarray(self.parents)
        check_entries("Ancestors", "parents", parents, query, key)
        enter, after = jax.vmap(_walk)(parents.reshape(-1, parents.shape[-1]))
        enter, after = (x.reshape(*parents.shape[:-1], 1, -1) for x in (enter, after))
        return take(enter, query, grid, fill=-1), take(enter, key, grid, fill=0), take(after, key, grid, fill=0)

    def __call__(self, query, key):
        enter, enter_key, exit_key = self._of(query, key, grid=2)
        return (enter_key <= enter) & (enter < exit_key)

    def bounds(self, query, key):
        enter, enter_key, exit_key = self._of(query, key, grid=3)
        (first, last), inside = tile_range(enter), exit_key > 0
        (first_enter, last_enter), (first_exit, last_exit) = tile_range(enter_key, inside), tile_range(exit_key, inside)
        # Ancestors have smaller numbers, which rules out half of the tiles of any tree; ranges of steps the rest.
        possible = Causal().bounds(query, key)[0] & (first_enter <= last) & (first < last_exit)
        shown = every_slot(query, enter >= 0) & every_slot(key, inside)
        return possible, shown & (last_enter <= first) & (last < first_exit)

    def describe(self):
        return "itself and its ancestors"


def _depths(parents: Int[Array, " m"]) -> Int[Array, " m"]:
    """Returns the number of ancestors of every node."""
    nodes = parents.shape[0]
    jump = jnp.append(jnp.where(parents < 0, nodes, parents), nodes)  # node `nodes` is above the roots
    depth = (jump < nodes).astype(jnp.int32)
    for _ in range(max(nodes - 1, 1).bit_length()):  # jump goes 2^round up, depth counts the steps of it
        depth, jump = depth + depth[jump], jump[jump]
    return depth[:-1]


def _walk(parents: Int[Array, " m"]) -> tuple[Int[Array, " m"], Int[Array, " m"]]:
    """Returns (enter, exit) of every node of a forest in preorder, children in the order of their numbers."""
    nodes = parents.shape[0]
    rounds = max(nodes - 1, 1).bit_length()
    parents = jnp.maximum(parents, -1)
    start = jnp.append(jnp.where(parents < 0, nodes, parents), nodes)  # node `nodes` is above the roots
    size, jump = jnp.ones(nodes + 1, jnp.int32).at[-1].set(0), start
    for _ in range(rounds):  # size counts descendants nearer than 2^round, jump goes 2^round up
        size, jump = size.at[jump].add(size).at[-1].set(0), jump[jump]
    size = size[:-1]
    order = jnp.argsort(parents, stable=True)
    before = jnp.cumsum(size[order]) - size[order]
    siblings = before - before[jnp.searchsorted(parents[order], parents[order])]
    enter = jnp.append(jnp.zeros_like(size).at[order].set(siblings) + (parents >= 0), 0)
    jump = start
    for _ in range(rounds):  # enter adds up the steps along the way to the root
        enter, jump = enter + jnp.where(jump < nodes, enter[jump], 0), jump[jump]
    return enter[:-1], enter[:-1] + size
