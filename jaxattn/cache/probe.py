"""Pages chosen by one query for the whole window of the last tokens (ActQKV, 2025)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxattn.cache.select import Remembered, Select, mean_key
from jaxattn.core.attend.position import Position
from jaxattn.core.attend.probe import probe_query
from jaxattn.core.checks import check_static_int
from jaxattn.core.part import part


@part
class ActQKV(Select):
    """Reads the pages whose mean key the probe of the last queries matches best (ActQKV, Xiao et al., 2025).

        p · mean of the page's keys,   p = Σ_i w_i q_i over the last `window` queries,   w = weigh(activation_bias(q))

    So queries that stand out in the window count more (`probe_query`), and the pages change less from step to step than
    those of the newest query alone. With a window of 1 the probe is the query, and the policy is `MeanKeys`. The worth
    to a key head is the largest over the query heads that read it. The page of the newest token is always read.

    Queries of different positions are turned by different angles, and a sum of them means little. With the `position`
    of the layer, those of the window are turned on to the place of the newest. Under `key_position=Rank()` queries and
    keys are compared as they are before any turn, and `position` stays None.

    The paper also shares a budget over the layers, as `allocate` does. Here all layers read as many pages.

    Attributes:
        pages: The number of pages that are read, at least 1.
        size: The number of slots per page, at least 1.
        window: The number of last queries, the newest among them, at least 1.
        position: The `Rotary` of the layer without a scaling that changes lengths; None where queries are not turned.
        weigh: As of `probe_query`.

    Raises:
        TypeError: A number is not an int, or `position` is no `Position`.
        ValueError: A number is below 1.
    """

    pages: int
    size: int = 16
    window: int = 32
    position: Position | None = None
    weigh: Callable[..., Any] = jax.nn.softmax

    needs_turned = False

    def __post_init__(self):
        for name in ("pages", "size", "window"):
            check_static_int("ActQKV", name, getattr(self, name), 1)
        if not isinstance(self.position, Position | None):
            raise TypeError(f"ActQKV: position is {self.position!r}: need a part such as Rotary(10000.0), or None")

    def summarise(self, key, there):
        return mean_key(key, there)

    def start(self, sizes):
        query = jnp.zeros((sizes.batch, self.window, sizes.queries, sizes.width))
        return Remembered({}, {"query": query, "asked": jnp.full((sizes.batch, self.window), -1)})

    def score(self, query, store):
        rows, now = store.remembered.rows, store.last[:, None]
        # The newest are first, and this step is not among them yet.
        newest = query.reshape(len(query), 1, -1, query.shape[-1]).astype(rows["query"].dtype)
        window = jnp.concatenate([newest, rows["query"][:, :-1]], 1)
        asked = jnp.concatenate([now, rows["asked"][:, :-1]], 1)
        if self.position is not None:
            window = self.position(window, jnp.where(asked < 0, 0, now - asked))
        probe = probe_query(window, asked >= 0, self.weigh).reshape(query.shape)
        mean = store.summary
        return jnp.einsum("bkgh,bpkh->bpkg", probe.astype(mean.dtype), mean, precision="highest").max(-1)

    def observe(self, remembered, step):
        rows = remembered.rows
        asked = jnp.concatenate([step.asked, rows["asked"]], 1)
        query = jnp.concatenate([step.query.astype(rows["query"].dtype), rows["query"]], 1)
        last = (-asked).argsort(1)[:, : self.window]
        asked = jnp.take_along_axis(asked, last, 1)
        query = jnp.take_along_axis(query, last[..., None, None], 1)
        return Remembered({}, {"query": jnp.where((asked < 0)[..., None, None], 0, query), "asked": asked})
