"""A call cut into pieces: the query heads that read one key head each, or one batch entry each.

Parts are cut along the axes that the annotations of their fields call `heads` and `*batch`, at any depth in a part. An
axis of size 1 is shared by all pieces, and so is an array that has no axis of the name.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxattn.core.attend.call import Call, Wrong, WrongKeys
from jaxattn.core.attend.dense import weigh
from jaxattn.core.attend.mask import Mask, PerHead
from jaxattn.core.attend.measure import LinearMeasure
from jaxattn.core.mesh import mesh_axes, vary
from jaxattn.core.part import part


class Named(NamedTuple):
    """The axes of an array that pieces are cut along: the first `batch` ones, and those called `heads`."""

    batch: int
    heads: tuple[int, ...]


def named_axes(hint: Any, rank: int) -> Named:
    """Returns the axes that the annotation of a field names, for an array of this rank; none where it names none."""
    for names in dimensions(hint):
        variadic = next((i for i, name in enumerate(names) if name.startswith("*") or name == "..."), None)
        more = rank - len(names)
        if more != 0 if variadic is None else more < -1:
            continue
        later = [more if variadic is not None and i > variadic else 0 for i in range(len(names))]
        heads = [i + later[i] for i, name in enumerate(names) if name == "heads"]
        return Named(more + 1 if names[:1] == ["*batch"] else 0, tuple(heads))
    return Named(0, ())


def dimensions(hint: Any) -> list[list[str]]:
    """Returns the names of the axes in every array type inside an annotation."""
    if hasattr(hint, "dim_str"):
        return [hint.dim_str.replace("#", "").split()]
    return [names for inner in typing.get_args(hint) for names in dimensions(inner)]


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def hinted_leaves(tree: Any) -> list[tuple[str, Array, Any]]:
    """Returns the leaves of a pytree of parts, as `jax.tree.leaves` orders them: (where, leaf, annotation or None)."""
    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        owner, hint = tree, None
        for key in path:
            if isinstance(key, jax.tree_util.GetAttrKey):
                kind: Any = type(owner)
                owner, hint = getattr(owner, key.name), _hints(kind).get(key.name)
            elif isinstance(key, jax.tree_util.SequenceKey | jax.tree_util.DictKey):
                owner = owner[key.idx if isinstance(key, jax.tree_util.SequenceKey) else key.key]
            else:  # inside a pytree of another library: what its axes are is not said
                hint = None
                break
        found.append((jax.tree_util.keystr(path), leaf, hint))
    return found


def _leaves(tree: Any) -> list[tuple[Array, Named]]:
    """Returns the leaves with their named axes."""
    return [(leaf, named_axes(hint, np.ndim(leaf))) for _, leaf, hint in hinted_leaves(tree)]


class Pieces(NamedTuple):
    """A call of which some leaves, the `stacked` ones, have a leading axis with an entry for each piece."""

    leaves: list[Any]
    stacked: list[bool]
    structure: Any

    def each(self, function: Callable[..., Any], *more: Any) -> Any:
        """Calls function(piece, *more of the piece) on one piece after the other and stacks the results in front."""
        stacked = [x for x, is_stacked in zip(self.leaves, self.stacked, strict=True) if is_stacked]
        return jax.lax.map(lambda xs: function(self._with(xs[0]), *xs[1:]), (stacked, *more))

    def first(self) -> Call:
        """Returns the first piece."""
        return self._with([x[0] for x, is_stacked in zip(self.leaves, self.stacked, strict=True) if is_stacked])

    def _with(self, leaves: list[Any]) -> Call:
        own = iter(leaves)
        pairs = zip(self.leaves, self.stacked, strict=True)
        return self.structure.unflatten([next(own) if is_stacked else x for x, is_stacked in pairs])


def _pieces(call: Call, take: Callable[[Any, Named], Any]) -> Pieces:
    """Cuts a call; `take` gives the pieces of an array along a leading axis, or None for one that all pieces share."""
    named = _leaves(call)
    taken = [take(*each) for each in named]
    leaves = [x if pieces is None else pieces for (x, _), pieces in zip(named, taken, strict=True)]
    return Pieces(leaves, [x is not None for x in taken], jax.tree.structure(call))


def by_heads(call: Call, groups: int) -> Pieces:
    """Cuts a call into groups of heads.

    Args:
        call: The call.
        groups: The number of groups: a multiple of K and of Kv that divides N.

    Raises:
        ValueError: An array of a part has more than one axis of heads.
    """
    heads = call.query.shape[-2]

    def take(x: Any, named: Named) -> Any:
        if len(named.heads) > 1:
            raise ValueError(f"an array of shape {np.shape(x)} has {len(named.heads)} axes of heads, which it mixes")
        size = x.shape[named.heads[0]] if named.heads else 1
        if size == 1:
            return None
        axis = named.heads[0]
        if size % groups:  # key or value heads that several groups read
            x, size = jnp.repeat(x, groups // size, axis), groups
        return jnp.moveaxis(x.reshape(*x.shape[:axis], groups, size // groups, *x.shape[axis + 1 :]), axis, 0)

    def chosen(mask: Any) -> Any:
        if not isinstance(mask, PerHead):
            return mask
        size = heads // groups
        masks = [_of_head(each, n, heads) for n, each in enumerate(mask.masks)]
        by_group = tuple(PerHead(tuple(masks[i : i + size])) for i in range(0, len(masks), size))
        return _OneOf(by_group, jnp.arange(heads, dtype=jnp.int32) // size)

    mask = jax.tree.map(chosen, call.slots.mask, is_leaf=lambda x: isinstance(x, PerHead))
    return _pieces(dataclasses.replace(call, slots=dataclasses.replace(call.slots, mask=mask)), take)


def by_entries(call: Call) -> Pieces:
    """Cuts a call into its batch entries. Each piece has as many batch axes as the call, of size 1."""
    batch = call.query.shape[:-3]

    def take(x: Any, named: Named) -> Any:
        sizes, rest = np.shape(x)[: named.batch], np.shape(x)[named.batch :]
        if all(size == 1 for size in sizes):
            return None
        x = jnp.broadcast_to(x.reshape(*(1,) * (len(batch) - len(sizes)), *sizes, *rest), (*batch, *rest))
        return x.reshape(-1, *(1,) * len(batch), *rest)

    return _pieces(call, take)


def _of_head(mask: Mask, head: int, heads: int) -> Mask:
    """Returns the mask of head `head`, as a mask for one head."""
    leaves = [
        jax.lax.slice_in_dim(x, head, head + 1, axis=named.heads[0])
        if named.heads and x.shape[named.heads[0]] == heads
        else x
        for x, named in _leaves(mask)
    ]
    return jax.tree.unflatten(jax.tree.structure(mask), leaves)


@part
class _OneOf(Mask):
    """The mask of one group of heads, masks[which]; all entries of `which` are equal."""

    masks: tuple[Mask, ...]
    which: Int[Array, " heads"]

    def __call__(self, query, key):
        shown = [jax.eval_shape(mask, query, key).shape for mask in self.masks]
        shape, axes = np.broadcast_shapes(*shown), mesh_axes((self.masks, query, key))
        branches = [
            lambda query, key, mask=mask: vary(jnp.broadcast_to(mask(query, key), shape), axes) for mask in self.masks
        ]
        return jax.lax.switch(self.which[0], branches, query, key)


def refusal(call: Call, pieces: Callable[[Call], Pieces]) -> str | None:
    """Returns why this call cannot be cut so, or None if it can be.

    A call cannot be cut if a part lets heads read each other, or if the arrays of a part do not say which of their axes
    are cut.
    """
    for slot in ("score_maps", "weight_maps"):
        for each in getattr(call.slots, slot):
            if not each.heads_apart:
                return f"{slot}={each.kind} may let heads read each other"

    def weights(call: Call) -> Any:
        piece = pieces(call).first()
        view, _, _ = weigh(piece, Wrong(None, WrongKeys(None, None, None)))
        *batch, length, heads, _ = piece.query.shape
        for measure in piece.slots.measures.values():
            if isinstance(measure, LinearMeasure):
                jnp.broadcast_to(measure.columns(piece.key_positions)[..., 0], (*batch, heads, piece.key.shape[-3]))
        return view.weights, jnp.zeros((*batch, heads, length, piece.key.shape[-3]), bool)

    try:
        found, wanted = jax.eval_shape(weights, call)
    except (TypeError, ValueError) as error:
        return f"a part does not fit a piece of the call: {str(error).strip().splitlines()[0]}"
    if found.shape != wanted.shape:
        return f"the weights of a piece have shape {found.shape} where its arrays are for {wanted.shape}"
    return None
