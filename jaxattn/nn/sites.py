"""The named places inside a model at which values can be recorded, and some of them changed."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxattn.core.part import part

Value = TypeVar("Value")

SITES = {
    "embed": "[B, T, D] token embeddings",
    "q": "[B, T, N, H] queries, before rotation",
    "k": "[B, S, K, H] keys of this call's tokens, before rotation",
    "v": "[B, S, K, H] values of this call's tokens",
    "scores": "[B, N, T, S] scores after bias, score maps and mask (hidden: −inf)",
    "weights": "[B, N, T, S] attention weights after weight maps, before dropout",
    "z": "[B, T, N, H] what each head reads, before the output projection",
    "attn_out": "[B, T, D] what attention adds to the residual stream",
    "mlp_out": "[B, T, D] what the feed-forward block adds to it",
    "resid": "[B, T, D] the residual stream after the layer",
}
"""Site -> what it holds. Inside a `Decoder` every site but `embed` carries a leading layer axis."""


EDITED = ("attn_out", "mlp_out", "resid")
"""The sites at which a `Decoder` takes edits."""


@part
class Add:
    """An edit: value + vector, for a vector that broadcasts against the value [B, T, D]. In a `Decoder` it carries a
    leading layer axis, so [L, D] adds to every token, and [L, T, D] to each its own."""

    vector: Float[Array, "..."]

    def __call__(self, value: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return value + self.vector.astype(value.dtype)


@part
class Put:
    """An edit: the vector in place of the value where `on`; both broadcast against it, and carry a layer axis first."""

    vector: Float[Array, "..."]
    on: Bool[Array, "..."]

    def __call__(self, value: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return jnp.where(self.on, self.vector.astype(value.dtype), value)


class Recorder:
    """Changes values by the edits of their sites, and keeps those it was asked for: `value = recorder(site, value)`.

    `sites` are those there are, `SITES` unless given. An edit is a function value -> value; what is kept is its result.
    Raises ValueError for a name that is no site: a record that is silently missing is the classic failure.
    """

    def __init__(
        self, record: Iterable[str], sites: Iterable[str] = SITES, edits: Mapping[str, Callable[[Any], Any]] = {}
    ):
        self.record, self.edits = frozenset(record), edits
        if unknown := self.record - set(sites):
            raise ValueError(f"record names unknown sites {sorted(unknown)}: need some of {list(sites)}")
        self.records: dict[str, Any] = {}

    def wants(self, *sites: str) -> bool:
        """Whether any of these sites was asked for, where a value would have to be computed for the record alone."""
        return not self.record.isdisjoint(sites)

    def __call__(self, site: str, value: Value) -> Value:
        if site in self.edits:
            value = self.edits[site](value)
        if site in self.record:
            self.records[site] = value
        return value
