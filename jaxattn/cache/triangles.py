"""Tokens chosen by whole spans of a text, which are found as triangles of attention (Ltri-LLM, 2024)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxattn.cache.select import Remembered, Select
from jaxattn.cache.storage import take_slots, write_slots
from jaxattn.core.attend.spans import interval_nms, span_of_tokens, triangle_scores
from jaxattn.core.checks import check_range, check_static_int
from jaxattn.core.matmul import accumulator
from jaxattn.core.part import part


@part
class Ltri(Select):
    """Reads the spans whose mean key the queries match best, token by token (Ltri-LLM, Tang et al., 2024).

    The text is cut in windows of `window` positions. When a window is full, the attention A of its tokens to each
    other, averaged over the heads, is searched for triangles that are denser than those of a uniform row i by a factor:

        Σ_{i=x..y} Σ_{j=x..i} (A_ij − factor / (i + 1)) > 0

    (`triangle_scores`). The best of them without the others (`interval_nms`) and what lies between them are the spans
    (`span_of_tokens`). A span is worth q · mean of its keys, the largest over the query heads that read a key head. The
    best spans are read, as many as there is room for, and of the last one its first tokens. The first `sinks` tokens,
    and those of the window that is not full, are always read.

    The paper has one to several vectors for each span, lets the heads of a layer vote, and keeps what won for a while.
    Here a span has one vector, and each key head chooses by itself and anew. The vector of a span is held on each of
    its tokens, so that eviction leaves the others as they are: the policy saves reading values, and not keys.

    Attributes:
        pages: The number of tokens that are read, at least `sinks` + `window`.
        window: The number of tokens among which spans are found, at least 1.
        sinks: The number of first tokens, at least 0.
        count: The largest number of triangles of a window, at least 1.
        overlap: As of `interval_nms`.
        factor: How much denser than a uniform row a span is, above 1. At 1 a window that attends uniformly would be a
            span or not by rounding alone.
        least: The least number of tokens of a triangle, at least 1.
        most: The largest number; None for any.
        scale: The scale of the scores, by default H^−½.

    Raises:
        TypeError: A static number is not an int.
        ValueError: A number is out of range, where it is known.
    """

    pages: int
    window: int = 64
    sinks: int = 4
    count: int = 8
    overlap: float = 0.3
    factor: Float[Array, ""] | float = 1.1
    least: int = 2
    most: int | None = None
    scale: float | None = None

    needs_turned = False

    def __post_init__(self):
        for name, least in (("window", 1), ("sinks", 0), ("count", 1), ("least", 1)):
            check_static_int("Ltri", name, getattr(self, name), least)
        check_static_int("Ltri", "pages", self.pages, self.sinks + self.window)
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"Ltri: overlap is {self.overlap}: need a number from 0 to 1")
        if self.most is not None:
            check_static_int("Ltri", "most", self.most, self.least)
        check_range("Ltri: factor", self.factor, lambda x: x > 1, "above 1")

    @property
    def size(self):  # type: ignore[override]
        return 1

    def start(self, sizes):
        batch, slots, heads, width, queries = sizes
        marks = {"vector": jnp.zeros((batch, slots, heads, width)), "full": jnp.zeros((batch, slots, heads), bool)}
        window = {
            "query": jnp.zeros((batch, self.window, queries, width)),
            "key": jnp.zeros((batch, self.window, heads, width)),
            "there": jnp.zeros((batch, self.window, 1), bool),
        }
        return Remembered(marks, {**window, "until": jnp.full(batch, -1)})

    def score(self, query, store):
        marks = store.remembered.slots
        vector = marks["vector"]
        worth = jnp.einsum("bkgh,bckh->bckg", query.astype(vector.dtype), vector, precision="highest").max(-1)
        return jnp.where(marks["full"] & (store.positions >= self.sinks), worth, jnp.inf)

    def observe(self, remembered, step):
        (marks, rows), size = remembered, self.window
        until = rows["until"]
        first = (until + 1) // size * size  # of the window that was not full
        room = -(-(size + step.asked.shape[1] - 1) // size) * size

        def placed(name: str, new: Array, positions: Int[Array, "b s g"]) -> Array:
            """Returns what is known of the tokens from `first` on, the new ones at their positions."""
            held = rows[name]
            held = jnp.pad(held, [(0, 0), (0, room - size)] + [(0, 0)] * (held.ndim - 2))
            is_new = positions > until[:, None, None]
            return write_slots(held, jnp.where(is_new, positions - first[:, None, None], room), new)

        asked = step.asked[..., None]
        query, key = placed("query", step.query, asked), placed("key", step.key, step.key_positions)
        there = placed("there", jnp.ones(asked.shape, bool), asked)
        until = jnp.maximum(until, step.asked.max(1))
        done = (until + 1 - first) // size * size  # tokens in full windows
        vectors = jax.lax.cond(
            (done > 0).any(), lambda: self._vectors(query, key, there[..., 0]), lambda: jnp.zeros_like(key)
        )
        at = step.positions - first[:, None, None]
        found = (step.positions >= 0) & (at >= 0) & (at < done[:, None, None])
        vector = take_slots(vectors, jnp.where(found, at, 0))
        marks = {
            "vector": jnp.where(found[..., None], vector, marks["vector"]),
            "full": marks["full"] | found,
        }

        def rest(x: Array) -> Array:
            x = jnp.pad(x, [(0, 0), (0, size)] + [(0, 0)] * (x.ndim - 2))
            index = done[:, None] + jnp.arange(size)
            return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), 1)

        window = {"query": rest(query), "key": rest(key), "there": rest(there)}
        return Remembered(marks, {**window, "until": until})

    def _vectors(
        self, query: Float[Array, "b t n h"], key: Float[Array, "b t k h"], there: Bool[Array, "b t"]
    ) -> Float[Array, "b t k h"]:
        """Returns the mean key of the span of each token, window by window."""
        (batch, length, heads, width), size = key.shape, self.window
        query = query.reshape(-1, size, heads, query.shape[2] // heads, width)
        keys, there = key.reshape(-1, size, heads, width), there.reshape(-1, size)
        seen = there[:, :, None] & there[:, None] & jnp.tri(size, dtype=bool)
        scale = width**-0.5 if self.scale is None else self.scale
        scores: Any = jnp.einsum("btkgh,bskh->bkgts", query, keys, precision="highest")
        scores = jnp.where(seen[:, None, None], scale * scores.astype(accumulator(key)), -jnp.inf)
        some = seen.any(-1)[:, None, None, :, None]
        weights = jnp.where(some, jax.nn.softmax(jnp.where(some, scores, 0), -1), 0).mean((1, 2))
        uniform = jnp.where(seen, self.factor / jnp.maximum(seen.sum(-1, keepdims=True), 1), 0)
        found = interval_nms(triangle_scores(weights, uniform), self.overlap, self.count, self.least, self.most)
        number = span_of_tokens(found, size)
        same = (number[:, :, None] == number[:, None]) & there[:, None]
        mean = same / jnp.maximum(same.sum(-1, keepdims=True), 1)
        vectors = jnp.einsum("bts,bskh->btkh", mean.astype(keys.dtype), keys, precision="highest")
        return vectors.reshape(batch, length, heads, width)
