"""The named places inside a model at which values can be recorded."""

from collections.abc import Iterable
from typing import Any, TypeVar

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


class Recorder:
    """Keeps the values of the sites it was asked for; `value = recorder(site, value)` passes every value through.

    `sites` are those there are, `SITES` unless given.
    Raises ValueError for a name that is no site: a record that is silently missing is the classic failure.
    """

    def __init__(self, record: Iterable[str], sites: Iterable[str] = SITES):
        self.record = frozenset(record)
        if unknown := self.record - set(sites):
            raise ValueError(f"record names unknown sites {sorted(unknown)}: need some of {list(sites)}")
        self.records: dict[str, Any] = {}

    def wants(self, *sites: str) -> bool:
        """Whether any of these sites was asked for, where a value would have to be computed for the record alone."""
        return not self.record.isdisjoint(sites)

    def __call__(self, site: str, value: Value) -> Value:
        if site in self.record:
            self.records[site] = value
        return value
