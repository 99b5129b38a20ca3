"""Runs of a model as functions of edits: one run, and tables of runs that each edit another place.

Nothing here knows what a model is made of. A model is a module that is called as `Transformer` is: with `edits=` and
`record=`, and for sweeps that restart in the middle with `start=`. It returns (output, state, records).
"""

import abc
import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import errors, nnx
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import Array, Bool, Int

from jaxattn.core.part import part
from jaxattn.nn.tap import OF_MODEL, Layers, bare_site, site_of
from jaxattn.trace.edits import Cut, OnlyAt, Scale


def run(model: Any, *inputs: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Returns the pair (output, records) of one compiled call of the model.

    Calls that differ in numbers only share one program: inputs of the same shapes, edits of the same kinds at the same
    sites, records of the same names. The model stays as it is: dropout, in training, is the same in every call.

    Args:
        model: The model.
        inputs: Its inputs.
        options: Other arguments of the model, such as `edits`, `record`, `positions`, `mask` or `start`.

    Raises:
        TypeError: An argument is neither made of arrays nor can it be hashed, such as a set.
    """
    graph, state = nnx.split(model)
    leaves, structure = jax.tree.flatten((inputs, options))
    for leaf in leaves:
        if not _is_number(leaf) and type(leaf).__hash__ is None:
            raise TypeError(
                f"an argument of run holds {leaf!r}: need arrays, numbers, parts, and tuples or dicts of them"
            )
    numbers = [leaf if _is_number(leaf) else None for leaf in leaves]
    others = tuple(None if _is_number(leaf) else leaf for leaf in leaves)
    return _run(graph, structure, others, state, numbers)


def _is_number(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") or isinstance(leaf, float | complex) or type(leaf) is int


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(graph: Any, structure: Any, others: Any, state: Any, numbers: Any) -> tuple[Any, dict[str, Any]]:
    leaves = [other if number is None else number for other, number in zip(others, numbers, strict=True)]
    inputs, options = jax.tree.unflatten(structure, leaves)
    output, _, records = nnx.merge(graph, state)(*inputs, **options)
    return output, records


@contextlib.contextmanager
def unchanged() -> Iterator[None]:
    """Raises ValueError, as a decorator of functions that trace a model, where the model would change in it."""
    try:
        yield
    except errors.TraceContextError as error:
        raise ValueError(
            "the model draws random numbers, as dropout does in training, and so changes in a run: need model.eval()"
        ) from error


def compiled(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns function(*arguments), from one program to which the arrays that the function closes over are arguments.

    To `jax.jit` they would be constants: the weights of a model would be copied into the program, and folded there.
    """
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)

    def with_constants(constants: Any, leaves: Any) -> Any:
        return jaxpr_as_fun(ClosedJaxpr(jaxpr.jaxpr, constants))(*leaves)

    found = jax.jit(with_constants)(jaxpr.consts, jax.tree.leaves(arguments))
    return jax.tree.unflatten(jax.tree.structure(shapes), found)


class Grid(abc.ABC):
    """The base class of tables of edits: one run for each cell, in which the edit acts there and nowhere else.

    Attributes:
        shape: The sizes of the table, layers first.
        axes: The names of its axes, such as ("layer", "head").
        there: [L, cells of a layer], whether the model has the place.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    there: Bool[Array, "layers cells"]

    @abc.abstractmethod
    def at(self, layer: Int[Array, ""], cell: Int[Array, ""]) -> dict[str, Any]:
        """Returns the edits of a cell, for the argument `edits` of the model."""

    def of_layer(self, edit: Any, layer: Int[Array, ""]) -> Layers:
        """Returns the edit in one layer; its arrays have no layer axis."""
        count = self.shape[0]
        by_layer = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x))), edit)
        return Layers(by_layer, jnp.arange(count) == layer)


@part
class Places(Grid):
    """An edit of a site, by layer and head, by layer and position, or by all three.

    Attributes:
        site: The site.
        edit: The edit, shared by all layers, or `Layers(edit)` if its arrays have a layer axis.
        heads: The number of heads of the site; None if the edit is of all of them.
        positions: [P], the positions; None if the edit is of all of them.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    there: Bool[Array, "layers cells"]
    site: str
    edit: Any
    heads: int | None = None
    positions: Int[Array, " p"] | None = None

    def at(self, layer, cell):
        edit = self.edit
        if isinstance(edit, Layers):
            edit = jax.tree.map(lambda x: jnp.asarray(x)[layer], edit.edit)
        head, position = None, None
        if self.positions is not None:
            cell, place = jnp.divmod(cell, len(self.positions))
            position = self.positions[place][None]
        if self.heads is not None:
            pairs = bare_site(self.site) in ("scores", "weights")
            head = jnp.arange(self.heads) == cell if pairs else cell[None]
        return {self.site: self.of_layer(OnlyAt(edit, position, head), layer)}


@part
class Edges(Grid):
    """Knocked-out edges of attention, by layer, head and edge.

    Attributes:
        heads: The number of heads.
        queries: [E], the position of the query of each edge.
        keys: [E], the position of its key.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    there: Bool[Array, "layers cells"]
    heads: int
    queries: Int[Array, " edges"]
    keys: Int[Array, " edges"]

    def at(self, layer, cell):
        head, edge = jnp.divmod(cell, len(self.queries))
        cut = Cut(self.queries[edge][None], self.keys[edge][None], jnp.arange(self.heads) == head)
        return {"scores": self.of_layer(cut, layer)}


def heads(
    model: Any,
    edit: Any = Scale(0.0),  # noqa: B008, a frozen part
    *,
    site: str = "z",
    positions: Any = None,
    inputs: Sequence[Any] | None = None,
    **options: Any,
) -> Places:
    """Returns the table layers x heads of an edit of single heads; by default each is ablated, its z becomes 0.

    At k and v heads are key heads. Layers without the site have cells that are NaN in the results.

    Args:
        model: The model.
        edit: The edit, shared by all layers, or `Layers(edit)` if its arrays have a layer axis. `Put` of a mean is mean
            ablation, `Put` of the record of another run is a patch.
        site: A site with heads.
        positions: [P], a third axis of the table: single positions, from 0. All of them by default.
        inputs: Inputs of the model, of which only shapes are read; by default a single token.
        options: Other arguments of the model without which it does not run, such as `context`.

    Raises:
        ValueError: The site is unknown, no layer has it, it has no heads, or a position is negative.
    """
    site = site_of("site", site)
    shapes = _by_layer(model, site, inputs, options)
    axis = -3 if bare_site(site) in ("scores", "weights") else -2
    if bare_site(site) not in ("scores", "weights", "q", "k", "v", "q_rotated", "k_rotated", "z"):
        raise ValueError(f"site is {site!r}, which has no heads: need one such as 'z', 'q', 'k' or 'v'")
    counts = [0 if shape is None else shape[axis] for shape in shapes]
    return _places(site, edit, counts, positions)


def positions(
    model: Any,
    positions: Any,
    edit: Any = Scale(0.0),  # noqa: B008, a frozen part
    *,
    site: str = "resid_pre",
    inputs: Sequence[Any] | None = None,
    **options: Any,
) -> Places:
    """Returns the table layers x positions of an edit of single tokens; by default the value of the site becomes 0.

    Args:
        model: The model.
        positions: [P], positions of tokens, from 0. Where no token stands nothing is edited.
        edit: As of `heads`.
        site: A site of tokens, such as resid_pre, attn_out or mlp_out.
        inputs: As of `heads`.
        options: As of `heads`.

    Raises:
        ValueError: The site is unknown, no layer has it, or a position is negative.
    """
    site = site_of("site", site)
    counts = [0 if shape is None else 1 for shape in _by_layer(model, site, inputs, options)]
    return _places(site, edit, counts, positions, by_head=False)


def edges(model: Any, queries: Any, keys: Any, *, inputs: Sequence[Any] | None = None, **options: Any) -> Edges:
    """Returns the table layers x heads x edges of knocked-out edges: a query does not see a key, in one head.

    Args:
        model: The model.
        queries: [E], the position of the query of each edge.
        keys: [E], the position of its key.
        inputs: As of `heads`.
        options: As of `heads`.

    Raises:
        ValueError: There are not as many queries as keys, one is negative, or no layer has scores.
    """
    queries, keys = _positions("queries", queries), _positions("keys", keys)
    if queries.shape != keys.shape or queries.ndim != 1:
        raise ValueError(f"queries has shape {queries.shape} and keys {keys.shape}: need one position each per edge")
    counts = [0 if shape is None else shape[-3] for shape in _by_layer(model, "scores", inputs, options)]
    width = max(counts)
    there = jnp.repeat(jnp.arange(width) < jnp.asarray(counts)[:, None], len(queries), 1)
    shape = (len(counts), width, len(queries))
    return Edges(shape, ("layer", "head", "edge"), there, width, queries, keys)


def _places(site: str, edit: Any, counts: list[int], positions: Any, by_head: bool = True) -> Places:
    width = max(counts)
    sizes, axes = [len(counts)], ["layer"]
    if by_head:
        sizes, axes = [*sizes, width], [*axes, "head"]
    there = jnp.arange(width) < jnp.asarray(counts)[:, None]
    if positions is not None:
        positions = _positions("positions", positions)
        sizes, axes = [*sizes, len(positions)], [*axes, "position"]
        there = jnp.repeat(there, len(positions), 1)
    return Places(tuple(sizes), tuple(axes), there, site, edit, width if by_head else None, positions)


def _positions(name: str, given: Any) -> Int[Array, " p"]:
    positions = jnp.atleast_1d(jnp.asarray(given))
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(f"{name} must be whole numbers, got {positions.dtype}")
    if not isinstance(positions, jax.core.Tracer) and (np.asarray(positions) < 0).any():
        raise ValueError(f"{name} has {np.asarray(positions).min()}: need positions from 0, as the last of T is T - 1")
    return positions


def _by_layer(model: Any, site: str, inputs: Sequence[Any] | None, options: Any) -> list[tuple[int, ...] | None]:
    """Returns the shape of a site in every layer, None in layers that do not have it."""
    if site in OF_MODEL:
        raise ValueError(f"site is {site!r}, which a model has once: need a site of layers, such as 'resid_pre'")
    inputs = (jnp.zeros((1, 1), jnp.int32),) if inputs is None else tuple(inputs)
    graph, state = nnx.split(model)

    def seen(state: Any, inputs: Any) -> Any:
        return nnx.merge(graph, state)(*inputs, record=(site,), **options)[2]

    record = jax.eval_shape(seen, state, inputs)[site]
    if isinstance(record, list):
        return [None if each is None else each.shape for each in record]
    return [record.shape[1:]] * record.shape[0]


@unchanged()
def sweep(F: Callable[..., Any], edits: Any, *, chunk: int = 1, resid_pre: Any = None) -> Any:
    """Returns F of every one of many edits, computed by one compiled program.

    Args:
        F: From edits to a number, an array or a pytree of them, such as a loss of `model(tokens, edits=edits)[0]`. It
            may close over the model. With `resid_pre` it is called as F(edits, start=...), and hands `start` to the
            model.
        edits: A `Grid`, such as `heads(model)`; or edits whose arrays have a leading axis, one entry for each run.
        chunk: How many runs are computed at once. More are faster as long as they fit the memory.
        resid_pre: [L, B, T, D], the record of `resid_pre` of the run without the edits of the grid. Each run then
            begins at the layer that it edits, which saves half of the layers.

    Returns:
        What F returns, with the axes of the grid in front, NaN at places that the model does not have (whole numbers
        and booleans of F become floats where there are such places); or with the leading axis of the edits.

    Raises:
        ValueError: `chunk` is below 1, the arrays of the edits do not have the same leading axis, `resid_pre` is given
            without a grid or has not as many layers, or the model draws random numbers.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}: need at least one run at once")
    if not isinstance(edits, Grid):
        sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(edits)}
        if len(sizes) != 1 or sizes == {()}:
            raise ValueError(f"edits has arrays with the leading axes {sorted(sizes)}: need one, the same in all")
        if resid_pre is not None:
            raise ValueError("resid_pre is given, but edits is no Grid, which says the layer of each run")
        return compiled(lambda edits: _mapped(F, edits, chunk), edits)

    grid, count = edits, edits.shape[0]
    layers, cells = jnp.arange(count), jnp.arange(edits.there.shape[1])
    if resid_pre is None:

        def every(grid):
            pairs = jnp.repeat(layers, len(cells)), jnp.tile(cells, count)
            return _mapped(lambda pair: F(grid.at(*pair)), pairs, chunk)

        found = compiled(every, grid)
    else:
        if jnp.shape(resid_pre)[:1] != (count,):
            raise ValueError(f"resid_pre has shape {jnp.shape(resid_pre)}: need {count} layers first")

        def restarted(grid, resid_pre):
            def of_layer(given):
                layer, resid = given
                return _mapped(lambda cell: F(grid.at(layer, cell), start=(layer, resid)), cells, chunk)

            return jax.lax.map(of_layer, (layers, resid_pre))

        found = compiled(restarted, grid, jnp.asarray(resid_pre))

    def shaped(x: Array) -> Array:
        rest = x.shape[1:] if resid_pre is None else x.shape[2:]
        x = x.reshape(*grid.shape, *rest)
        everywhere = not isinstance(grid.there, jax.core.Tracer) and np.asarray(grid.there).all()
        return x if everywhere else jnp.where(grid.there.reshape(*grid.shape, *(1,) * len(rest)), x, jnp.nan)

    return jax.tree.map(shaped, found)


def _mapped(function: Callable[[Any], Any], items: Any, chunk: int) -> Any:
    """Returns the function of every item, `chunk` at once; the last chunk is filled up, so that one program does."""
    count = jax.tree.leaves(items)[0].shape[0]
    chunk = min(chunk, count)
    index = jnp.minimum(jnp.arange(-(-count // chunk) * chunk), count - 1).reshape(-1, chunk)
    chunks = jax.tree.map(lambda x: jnp.asarray(x)[index], items)
    found = jax.lax.map(jax.vmap(function), chunks)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], found)
