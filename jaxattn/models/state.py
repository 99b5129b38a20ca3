"""What decoders do to the state of a whole model between two calls: forget the newest tokens, and change the rows."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Bool, Int

from jaxattn.cache import Store
from jaxattn.nn.attention import Context, KeyValue


def reordered(state: Any, rows: Int[Array, " r"]) -> Any:
    """Returns the state of a model whose row i is row rows[i] of `state`. Every mixer's state can be reordered.

    Args:
        state: From `init_state` or a call of the model.
        rows: [R], rows of the state, in any number; the new state has R rows.
    """

    def moved(x: Any) -> Any:
        return jax.tree.map(lambda x: x[:, rows], x)

    def of_context(context: Context) -> Context:
        batch = len(context.x)

        def of_rows(x: Any) -> Any:  # what rows share has an axis of size 1, and stays
            return x[rows] if batch > 1 and x.ndim > 1 and len(x) == batch else x

        return Context(context.x[rows], jax.tree.map(of_rows, context.tokens))

    return _mapped(lambda store: store.reordered(rows), moved, moved, state, of_context=of_context)


def replaced(state: Any, rows: Int[Array, " r"], other: Any) -> Any:
    """Returns the state of a model with these rows taken by the R rows of another state of the same capacity.

    Raises:
        ValueError: The state keeps a context, which is that of all its rows.
    """

    def put(x: Any, new: Any) -> Any:
        return jax.tree.map(lambda x, new: x.at[:, rows].set(new), x, new)

    def refused(context: Context) -> Context:
        raise ValueError("the state keeps the context of all its rows: need a model that reads no context")

    return _mapped(lambda store, new: store.replaced(rows, new), put, put, state, other, of_context=refused)


def rolled_back(state: Any, count: Int[Array, " b"]) -> Any:
    """Returns the state of a model without the newest `count` [B] positions of each row, at least 0.

    The next call gives the same logits as after a state that has never read these tokens.

    Raises:
        ValueError: A store evicts or rounds tokens, or a mixer keeps a state of fixed size, such as a recurrence. Keep
            the state from before the tokens instead, and read again those that stay.
    """

    def refused(state: Any) -> Any:
        raise ValueError(
            "the state of a recurrent mixer holds no single tokens, so none can be taken back: keep the state from "
            "before them, and read again those that stay"
        )

    return _mapped(lambda store: store.rolled_back(store.last - count), lambda keys: keys, refused, state)


def joined(state: Any, chosen: Bool[Array, "b t"]) -> Any:
    """Returns the state of a model that has read a tree of drafts, after the chosen [B, T] nodes have joined the text.

    They are a path from a root, such as `longest_path`. The other nodes are gone.
    """

    def refused(state: Any) -> Any:
        raise ValueError("the state of a recurrent mixer holds no nodes: need a state after model(..., parents=...)")

    return _mapped(lambda store: store.joined(chosen), lambda keys: keys, refused, state)


def can_roll_back(state: Any) -> bool:
    """Returns whether `rolled_back` takes the state, or the shapes of one."""
    if isinstance(state, Store):
        return state.rolls_back
    if state is None or isinstance(state, KeyValue | Context):
        return True
    return _is_several(state) and all(map(can_roll_back, state))


def _is_several(state: Any) -> bool:
    """Returns whether this is a plain tuple of states."""
    return isinstance(state, tuple) and not hasattr(state, "_fields")


def _mapped(
    of_store: Callable[..., Any],
    of_keys: Callable[..., Any],
    of_other: Callable[..., Any],
    state: Any,
    *others: Any,
    of_context: Callable[[Context], Context] = lambda context: context,
) -> Any:
    """Applies a function to each store, keys of a context, or other state of a mixer, whose first axis is layers.

    A context that a state keeps for all layers (`absorb`) has no axis of layers, and a function of its own. With
    `others`, states of the same structure, the functions take one of each.
    """
    if state is None:
        return None
    if isinstance(state, Context):
        return of_context(state)
    if isinstance(state, Store):
        return jax.vmap(of_store)(state, *others)
    if isinstance(state, KeyValue):
        return of_keys(state, *others)
    if _is_several(state):
        pairs = zip(state, *others, strict=True)
        return tuple(_mapped(of_store, of_keys, of_other, *each, of_context=of_context) for each in pairs)
    return of_other(state, *others)
