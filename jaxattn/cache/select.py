"""Which pages of a store a single query reads."""

import abc
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxattn.core.checks import check_static_int
from jaxattn.core.matmul import accumulator
from jaxattn.core.part import part


class Select(abc.ABC):
    """The base class of policies that choose pages of slots by a summary of their keys.

    Attributes:
        pages: The number of pages that are read for each key head; a store of no more pages is read in whole.
        size: The number of slots per page.
        needs_turned: Whether keys must be summarised as they meet the queries.
    """

    pages: int
    size: int
    needs_turned: ClassVar[bool] = True

    @abc.abstractmethod
    def summarise(self, key: Float[Array, "b p s k h"], there: Bool[Array, "b p s k"]) -> Any:
        """Returns a pytree of arrays [B, P, K, ...] that stands for the keys of each page, leaving out empty slots."""

    @abc.abstractmethod
    def score(self, query: Float[Array, "b k g h"], summary: Any) -> Float[Array, "b p k"]:
        """Returns the worth of each page to the queries of the G heads that read a key head."""


@part
class Quest(Select):
    """Reads the pages with the largest bound on q·k over their keys (Quest, Tang et al., 2024):

        Σ_c max(q_c min_c, q_c max_c)

    The bound of a key head is the largest of its query heads'. The page of the newest token is always read.

    Attributes:
        pages: The number of pages that are read, at least 1.
        size: The number of slots per page, at least 1.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is below 1.
    """

    pages: int
    size: int = 16

    def __post_init__(self):
        check_static_int("Quest", "pages", self.pages, 1)
        check_static_int("Quest", "size", self.size, 1)

    def summarise(self, key, there):
        least = jnp.where(there[..., None], key, jnp.inf).min(2)
        most = jnp.where(there[..., None], key, -jnp.inf).max(2)
        empty = ~there.any(2)[..., None]
        return {"least": jnp.where(empty, 0, least), "most": jnp.where(empty, 0, most)}

    def score(self, query, summary):
        sides = (query[:, None] * summary[side][..., None, :] for side in ("least", "most"))  # [B, P, K, G, H]
        return jnp.maximum(*sides).sum(-1).max(-1)


@part
class MeanKeys(Select):
    """Reads the pages whose mean key the queries match best: MoBA in decoding (Lu et al., 2025).

        q · mean of the page's keys

    The worth to a key head is the largest over the query heads that read it, or, as NSA has it, their sum. In the paper
    each query head chooses by itself; here those that read one key head read the same pages. The page of the newest
    token is always read, and is one of the `pages`.

    Attributes:
        pages: The number of pages that are read, at least 1.
        size: The number of slots per page, at least 1.
        over_heads: "max" or "sum".

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is below 1, or `over_heads` is unknown.
    """

    pages: int
    size: int = 16
    over_heads: Literal["max", "sum"] = "max"

    def __post_init__(self):
        check_static_int("MeanKeys", "pages", self.pages, 1)
        check_static_int("MeanKeys", "size", self.size, 1)
        if self.over_heads not in ("max", "sum"):
            raise ValueError(f"MeanKeys: over_heads is {self.over_heads!r}: need 'max' or 'sum'")

    def summarise(self, key, there):
        total = jnp.where(there[..., None], key, 0).sum(2, dtype=accumulator(key))
        return total / jnp.maximum(there.sum(2), 1)[..., None]

    def score(self, query, summary):
        scores = jnp.einsum("bkgh,bpkh->bpkg", query.astype(summary.dtype), summary, precision="highest")
        return scores.max(-1) if self.over_heads == "max" else scores.sum(-1)


def chosen(scores: Float[Array, "b p k"], pages: int, positions: Int[Array, "b p s g"]) -> Int[Array, "b n k"]:
    """Returns the pages to read: those of the largest scores, and that of the newest token; empty ones last."""
    newest = positions.max(2)
    worth = jnp.where(newest < 0, -jnp.inf, scores)
    worth = jnp.where(newest == newest.max(1, keepdims=True), jnp.inf, worth)
    return jnp.moveaxis(jax.lax.top_k(jnp.moveaxis(worth, 1, -1), pages)[1], -1, 1)
