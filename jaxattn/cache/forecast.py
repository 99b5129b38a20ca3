"""Pages chosen by a forecast of their attention, from what they got in the last steps (AttentionPredictor, 2025)."""

import abc
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.cache.select import Remembered, Select, paged
from jaxattn.core.attend.measure import Latest
from jaxattn.core.checks import check_range, check_static_int
from jaxattn.core.matmul import precision
from jaxattn.core.part import part


class Forecast(abc.ABC):
    """The base class of forecasts of the next step's attention to each page."""

    @abc.abstractmethod
    def __call__(self, history: Float[Array, "*b r p"]) -> Float[Array, "*b p"]:
        """Returns the worth of each page from the attention to it in the last R steps, the newest last."""


@part
class LastRow(Forecast):
    """The next step attends as the last one did."""

    def __call__(self, history):
        return history[..., -1, :]


@part
class MeanOverTime(Forecast):
    """The next step attends as the mean of the last R steps: heavy hitters within a window."""

    def __call__(self, history):
        return history.mean(-2)


@part
class Convolutions(Forecast):
    """A small convolutional network over (steps, pages), which all layers and heads share:

        h = relu(K₁ ∗ x),   g = relu(K₂ ∗ h),   score_p = w · mean over steps of g_p

    Both convolutions are 3 × 3 with zeros beyond the edges, as is a bias after each. Away from the edges, shifted pages
    have shifted scores. `nn.AttentionForecast` owns the arrays.

    Attributes:
        first: K₁ [3, 3, 1, C₁].
        first_bias: [C₁].
        second: K₂ [3, 3, C₁, C₂].
        second_bias: [C₂].
        weight: w [C₂].
    """

    first: Float[Array, "3 3 1 c"]
    first_bias: Float[Array, " c"]
    second: Float[Array, "3 3 c d"]
    second_bias: Float[Array, " d"]
    weight: Float[Array, " d"]

    def __call__(self, history):
        x = history.reshape(-1, *history.shape[-2:], 1).astype(self.first.dtype)
        for kernel, bias in ((self.first, self.first_bias), (self.second, self.second_bias)):
            layout, exact = ("NHWC", "HWIO", "NHWC"), precision(kernel)
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout, precision=exact)
            x = jax.nn.relu(x + bias)
        return (x.mean(1) @ self.weight).reshape(*history.shape[:-2], history.shape[-1])


@part
class Forecasted(Select):
    """Reads the pages for which a forecast of the attention is largest (AttentionPredictor, Yang et al., 2025).

    The history of a page is the largest weight of its tokens in each of the last `steps` steps, for the query heads
    that read a key head together. The history of a prompt is that of its last queries. A step puts its own weights into
    the history, in which pages that were not read have 0; every `every`-th step reads everything and so corrects it.
    The first `sinks` tokens and the last `recent` ones are read always: their pages are among the `pages`, and are 0 in
    what the forecast sees. A page keeps its history when a token in it is evicted.

    In the paper each query head chooses by itself.

    Attributes:
        forecast: The forecast, such as `LastRow()`, or what an `nn.AttentionForecast` returns.
        pages: The number of pages that are read, at least 1.
        size: The number of slots per page, at least 1.
        steps: R, at least 1.
        every: The number of steps from one that reads everything to the next, at least 1.
        sinks: The number of first tokens, at least 0.
        recent: The number of last tokens, at least 1.

    Raises:
        TypeError: A static number is not an int, or `forecast` is no `Forecast`.
        ValueError: A number is below its least value, where it is known.
    """

    forecast: Forecast
    pages: int
    size: int = 16
    steps: int = 64
    every: Int[Array, ""] | int = 5
    sinks: Int[Array, ""] | int = 64
    recent: Int[Array, ""] | int = 64

    needs_turned = False

    def __post_init__(self):
        if not isinstance(self.forecast, Forecast):
            raise TypeError(f"Forecasted: forecast is {self.forecast!r}: need a Forecast such as LastRow()")
        for name in ("pages", "size", "steps"):
            check_static_int("Forecasted", name, getattr(self, name), 1)
        check_range("Forecasted: every", self.every, lambda x: x >= 1, "at least 1")
        check_range("Forecasted: sinks", self.sinks, lambda x: x >= 0, "at least 0")
        check_range("Forecasted: recent", self.recent, lambda x: x >= 1, "at least 1")

    def start(self, sizes):
        history = jnp.zeros((sizes.batch, self.steps, sizes.slots // self.size, sizes.heads))
        return Remembered({}, {"history": history, "since": jnp.zeros(sizes.batch, jnp.int32)})

    def measures(self, now, queries):
        return {"weights": Latest(now, min(queries, self.steps))}

    def whole(self, query, store):
        return (store.remembered.rows["since"] + 1 >= self.every)[:, None]

    def score(self, query, store):
        positions, now = store.positions, store.last[:, None, None]
        ever = (positions >= 0) & ((positions < self.sinks) | (positions > now - self.recent))
        ever = paged(ever, self.size).any(2)  # [B, P, G]
        history = jnp.where(ever[:, None], 0, store.remembered.rows["history"])
        scores: Any = self.forecast(jnp.moveaxis(history, -1, 1))  # [B, K, P]
        return jnp.where(ever, jnp.inf, jnp.moveaxis(scores, 1, -1))

    def observe(self, remembered, step):
        rows, new = remembered.rows, step.measured["weights"].max(3)[..., ::-1]  # [B, C, K, R of the call]
        new = jnp.moveaxis(paged(new, self.size).max(2), -1, 1)
        came = jnp.minimum((step.asked >= 0).sum(1), new.shape[1])
        # The newest `came` rows are of this call, and before them stand the newest of earlier ones.
        both, age = jnp.concatenate([rows["history"], new], 1), jnp.arange(self.steps)[::-1]
        index = jnp.where(age < came[:, None], both.shape[1] - 1 - age, self.steps - 1 - (age - came[:, None]))
        history = jnp.take_along_axis(both, index[:, :, None, None], 1)
        return Remembered({}, {"history": history, "since": jnp.where(step.whole[:, 0], 0, rows["since"] + 1)})
