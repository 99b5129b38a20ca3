"""Edits of values: additions, factors and replacements, at all tokens or at some.

Arrays broadcast against the value of the site, [B, T, ...]: [D] changes every token, and [B, T, D] each its own. Edits
that depend on where a token stands find it by its position, so that they are the same in one full pass and token by
token.
"""

from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxattn.core.attend.maps import Need
from jaxattn.core.attend.mask import Mask
from jaxattn.core.attend.tile import Tile
from jaxattn.core.part import part
from jaxattn.core.table import on_shared_axis, take_pairs
from jaxattn.nn.tap import Edit
from jaxattn.nn.tokens import Tokens
from jaxattn.trace.reducers import check_places


@part
class Add(Edit):
    """value + vector.

    Attributes:
        vector: The vector, which broadcasts against the value.
    """

    vector: Float[Array, "..."] | float

    scores_need: ClassVar[Need] = "tile"

    def __call__(self, value, where):
        return value + jnp.asarray(self.vector).astype(value.dtype)


@part
class Scale(Edit):
    """value · factor; a factor of 1 is the identity.

    Attributes:
        factor: The factor, which broadcasts against the value. [N, 1] with zeros at the site z switches heads off.
    """

    factor: Float[Array, "..."] | float

    scores_need: ClassVar[Need] = "tile"
    weights_need: ClassVar[Need] = "tile"

    def __call__(self, value, where):
        return value * jnp.asarray(self.factor).astype(value.dtype)


@part
class Mix(Edit):
    """value + amount · (other − value): 0 is the identity, and 1 puts the other value in its place.

    The gradient in the amount at 0 is the first-order effect of the replacement (attribution patching).

    Attributes:
        other: The other value, such as the record of another run; it broadcasts against the value.
        amount: How much of it; it broadcasts against the value.
    """

    other: Float[Array, "..."] | float
    amount: Float[Array, "..."] | float = 1.0

    def __call__(self, value, where):
        other = jnp.asarray(self.other).astype(value.dtype)
        return value + jnp.asarray(self.amount).astype(value.dtype) * (other - value)


@part
class Put(Edit):
    """The vector in place of the value where `on`, by default everywhere; both broadcast against the value.

    Attributes:
        vector: The vector.
        on: Where the vector stands; None for everywhere.
    """

    vector: Float[Array, "..."]
    on: Bool[Array, "..."] | None = None

    scores_need: ClassVar[Need] = "tile"

    def __call__(self, value, where):
        on = True if self.on is None else jnp.asarray(self.on)
        return jnp.where(on, jnp.asarray(self.vector).astype(value.dtype), value)


@part
class Patch(Edit):
    """The value of a token at position positions[p] becomes values[..., p, ...]; other tokens keep theirs.

    Attributes:
        positions: [P], each at most once.
        values: [P, ...] or [B, P, ...], as recorded by `TokensAt(positions)`.

    Raises:
        ValueError: A position is known and negative.
    """

    positions: Int[Array, " p"]
    values: Float[Array, "..."]

    of_tokens: ClassVar[bool] = True

    def __post_init__(self):
        check_places("Patch: positions", self.positions)

    def __call__(self, value, where):
        here = _here(where, self.positions)  # [1 or B, T, P]
        values = jnp.asarray(self.values, value.dtype)
        values = values.reshape((1,) * (value.ndim - values.ndim) + values.shape)
        index = jnp.broadcast_to(here.argmax(-1), (*value.shape[:1], *here.shape[1:2]))
        index = index.reshape(*index.shape, *(1,) * (value.ndim - 2))
        found = jnp.take_along_axis(jnp.broadcast_to(values, (*value.shape[:1], *values.shape[1:])), index, 1)
        return jnp.where(here.any(-1).reshape(*here.shape[:2], *(1,) * (value.ndim - 2)), found, value)


@part
class OnlyAt(Edit):
    """The edit, at tokens that stand at these positions only, or in these heads only.

    Attributes:
        edit: The edit.
        positions: [P]; None for all. At scores and weights positions are those of queries.
        heads: Booleans [N], in which heads it acts, or the numbers of these heads [...]; None for all. Numbers also fit
            layers with fewer heads, where they mean none; at scores and weights booleans are needed.

    Raises:
        ValueError: A position is known and negative.
    """

    edit: Any
    positions: Int[Array, " p"] | None = None
    heads: Bool[Array, " heads"] | Int[Array, " chosen"] | None = None

    def __post_init__(self):
        check_places("OnlyAt: positions", self.positions)

    @property
    def scores_need(self):  # type: ignore[override]
        return self.edit.scores_need if isinstance(self.edit, Edit) else "rows"

    @property
    def weights_need(self):  # type: ignore[override]
        return self.edit.weights_need if isinstance(self.edit, Edit) else "rows"

    @property
    def of_tokens(self):  # type: ignore[override]
        return isinstance(self.edit, Edit) and self.edit.of_tokens

    def __call__(self, value, where):
        here, tile = jnp.ones((), bool), isinstance(where, Tile)
        if self.positions is not None:
            query = where.query if tile else where.positions
            here = ((query[..., None] == jnp.asarray(self.positions)) & (query >= 0)[..., None]).any(-1)
            here = here if tile else here.reshape(*here.shape, *(1,) * (value.ndim - 2))
        if self.heads is not None:
            on, axis = jnp.asarray(self.heads), -3 if tile else -2
            if on.dtype != bool:
                if tile:
                    raise TypeError(
                        f"heads has dtype {on.dtype} at scores or weights: need booleans, one for each head"
                    )
                on = (jnp.arange(value.shape[axis])[:, None] == on).any(-1)
            here = here & on.reshape(-1, *(1,) * (-1 - axis))
        return jnp.where(here, self.edit(value, where), value)


@part
class Pairs(Edit):
    """value · factor + addend at scores and weights, by tables over positions.

    A factor of 0 and the addend that another run recorded put the weights of that run in place. The gradient in the
    factor at 1 is the weight times the gradient in the weight.

    Attributes:
        factor: [..., N, P, R] or with fewer axes; axes of size 1 are shared. 1 at positions outside the table.
        addend: The same, or None; 0 at positions outside the table.
    """

    factor: Float[Array, "*batch heads p r"] | Float[Array, "p r"] | Float[Array, " r"] | Float[Array, ""]
    addend: Float[Array, "*batch heads p r"] | Float[Array, "p r"] | Float[Array, " r"] | Float[Array, ""] | None = None

    scores_need: ClassVar[Need] = "tile"

    def __call__(self, value, where):
        value = value * _looked_up(self.factor, where, 1).astype(value.dtype)
        if self.addend is None:
            return value
        return jnp.where(where.shown(value.shape), value + _looked_up(self.addend, where, 0).astype(value.dtype), value)


def _looked_up(table: Any, where: Tile, fill: float) -> Array:
    table = jnp.asarray(table)
    table = table.reshape((1,) * (3 - table.ndim) + table.shape)
    query, key = on_shared_axis(table.shape[-2], where.query, -2), on_shared_axis(table.shape[-1], where.key, -1)
    return take_pairs(table, query, key, grid=2, fill=fill)


@part
class Cut(Mask):
    """Hides keys at some positions from queries at some positions, in some heads: an edit of scores.

    The rest of the row is normalised as if the keys were not there.

    Attributes:
        queries: [P], positions of queries; None for all.
        keys: [R], positions of keys; None for all.
        heads: [N], in which heads; None for all.

    Raises:
        ValueError: A position is known and negative.
    """

    queries: Int[Array, " p"] | None = None
    keys: Int[Array, " r"] | None = None
    heads: Bool[Array, " heads"] | None = None

    def __post_init__(self):
        check_places("Cut: queries", self.queries)
        check_places("Cut: keys", self.keys)

    def __call__(self, query, key):
        cut = _among(query, self.queries) & _among(key, self.keys)
        return ~(cut if self.heads is None else cut & jnp.asarray(self.heads)[:, None, None])


def _among(positions: Int[Array, "..."], some: Int[Array, " p"] | None) -> Bool[Array, "..."]:
    if some is None:
        return jnp.ones(jnp.shape(positions), bool)
    return (positions[..., None] == jnp.asarray(some)).any(-1)


def _here(where: Tokens, positions: Int[Array, " p"]) -> Bool[Array, "#b t p"]:
    """Returns which tokens stand at which of these positions."""
    return (where.positions[..., None] == jnp.asarray(positions)) & (where.positions >= 0)[..., None]
