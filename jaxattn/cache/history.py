"""A learned policy that looks at nothing but the attention that each token has received over time (NAMM)."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxattn.cache.retain import Retain
from jaxattn.core.attend.api import attend
from jaxattn.core.attend.measure import Latest
from jaxattn.core.checks import check_range, check_static_int
from jaxattn.core.part import part

Affine = tuple[Float[Array, "inputs outputs"], Float[Array, " outputs"]]  # x W + b


@part
class HistoryScorer:
    """Scores tokens by their features x, each in view of the newer ones: the network of NAMM (Cetin et al., 2025).

        a = softmax(q kᵀ / √H) v over keys that are no older,   (r, m) = a W_o + b_o,   x' = x ∘ (1 + m) + r
        score = relu(x' W_h + b_h) W_s + b_s

    A score never depends on the features of an older token. All numbers are arrays, so that a population of scorers
    is one scorer whose arrays have one more axis, under `jax.vmap`.

    Attributes:
        center: [F], taken from the features of attention before they are divided by `spread` [F].
        spread: [F], the size of those features.
        query: W [E, H] and b [H] of q, with E = F + the channels of recency.
        key: As `query`, of k.
        value: As `query`, of v.
        mix: W_o [H, 2 E] and b_o.
        hidden: W_h [E, H] and b_h.
        score: W_s [H, 1] and b_s.
    """

    center: Float[Array, " f"]
    spread: Float[Array, " f"]
    query: Affine
    key: Affine
    value: Affine
    mix: Affine
    hidden: Affine
    score: Affine

    @classmethod
    def zeros(cls, window: int = 32, recency: int = 8, hidden: int = 32) -> "HistoryScorer":
        """Returns a scorer whose weights are 0, where evolution starts: every score is 0.

        Args:
            window: As of `ByHistory`: F = window / 2 + 1.
            recency: The channels that say how old a token is, an even number from 0.
            hidden: H, at least 1.

        Raises:
            ValueError: A number is out of range.
        """
        for name, size, least in (("window", window, 2), ("recency", recency, 0), ("hidden", hidden, 1)):
            check_static_int("HistoryScorer", name, size, least)
        if recency % 2:
            raise ValueError(f"HistoryScorer: recency is {recency}: need an even number, a sine and a cosine each")
        bins = window // 2 + 1
        width = bins + recency

        def affine(inputs: int, outputs: int) -> Affine:
            return jnp.zeros((inputs, outputs)), jnp.zeros(outputs)

        query, key, value, into = (affine(width, hidden) for _ in range(4))
        mix, score = affine(hidden, 2 * width), affine(hidden, 1)
        return cls(jnp.zeros(bins), jnp.ones(bins), query, key, value, mix, into, score)

    def __call__(
        self, spectrum: Float[Array, "*b c f"], positions: Int[Array, "*b c"], now: Int[Array, "*#b 1"]
    ) -> Float[Array, "*b c"]:
        """Returns one score per token.

        Args:
            spectrum: [..., C, F], as `ByHistory` keeps it.
            positions: [..., C], where the tokens stand; −1: an empty slot, which no other token sees.
            now: [..., 1], the position of the newest token.
        """
        x = jnp.concatenate([(spectrum - self.center) / self.spread, self._age(now - positions)], -1)
        query, key, value = (_affine(x, each)[..., None, :] for each in (self.query, self.key, self.value))
        at = jnp.asarray(positions)
        seen = attend(query, key, value, mask=_no_older, query_positions=at, key_positions=at)[..., 0, :]
        shift, scale = jnp.split(_affine(seen, self.mix), 2, -1)
        x = x * (1 + scale) + shift
        return _affine(jax.nn.relu(_affine(x, self.hidden)), self.score)[..., 0]

    def _age(self, age: Int[Array, "*b c"]) -> Float[Array, "*b c r"]:
        """Returns sines and cosines of the age, at wavelengths from 2π to 10000 · 2π."""
        half = (self.query[0].shape[-2] - self.center.shape[-1]) // 2
        angles = age[..., None] * 10000.0 ** -(jnp.arange(half) / max(half, 1))
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


def _affine(x: Array, weights: Affine) -> Array:
    return jnp.matmul(x, weights[0], precision="highest") + weights[1]


def _no_older(query: Array, key: Array) -> Array:
    """The mask by which a token sees itself and newer ones."""
    return key >= query


@part
class ByHistory(Retain):
    """Keeps by key head the tokens whose attention over time has a positive score (NAMM, Cetin et al., 2025).

    The attention that a token gets from one query after another is a signal, in sum over the query heads that read the
    key head. Frames of the last `window` numbers end at every position p with p + 1 a multiple of `hop`, with zeros
    before the token came. Their spectra |DFT(Hann ∘ frame)| are averaged, the newer the more:

        z ← γ^hop z + (1 − γ^hop) spectrum

    Whenever a multiple of `every` tokens is there, each token gets a score, and those without a positive one go. The
    newest token stays. Between decisions, when slots are full, the lowest score goes, and tokens that have no score yet
    go last, the oldest first. A scorer does not depend on the number or width of heads, so one that was evolved with a
    model can serve another.

    A call of several tokens decides at its end, and measures the weights of all its queries, [S, T] by head: read long
    prompts in pieces. With a `select`, a frame that ends while a token is not read counts as 0, and tokens are scored
    among those that are read. Nothing of this has a gradient. Evolve the arrays instead.

    Attributes:
        scorer: The network.
        every: The number of tokens from one decision to the next, at least 1.
        window: The length of a frame, an even number from 2.
        hop: The number of tokens from one frame to the next, at least 1 and at most `window`.
        decay: γ, from 0 to 1.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is out of range, or the scorer is for another window.
    """

    scorer: HistoryScorer
    every: int = 512
    window: int = 32
    hop: int = 16
    decay: Float[Array, ""] | float = 0.99

    by_head: ClassVar[bool] = True

    def __post_init__(self):
        for name, least in (("every", 1), ("window", 2), ("hop", 1)):
            check_static_int("ByHistory", name, getattr(self, name), least)
        if self.window % 2 or self.hop > self.window:
            raise ValueError(
                f"ByHistory: window is {self.window} and hop {self.hop}: need an even window, at least as long as hop"
            )
        check_range("ByHistory: decay", self.decay, lambda x: (x >= 0) & (x <= 1), "from 0 to 1")
        if (bins := self.scorer.center.shape[-1]) != self.window // 2 + 1:
            raise ValueError(f"ByHistory: scorer reads {bins} features, but a window of {self.window} has "
                             f"{self.window // 2 + 1}: need HistoryScorer.zeros(window={self.window})")  # fmt: skip

    def measures(self, now, queries):
        return {"signal": Latest(now, queries)}

    def start(self, shape):
        return {
            "score": jnp.full(shape, jnp.inf),
            "signal": jnp.zeros((*shape, self.window)),  # the last numbers, the newest first
            "spectrum": jnp.zeros((*shape, self.window // 2 + 1)),
            "until": jnp.full(shape, -2, jnp.int32),  # the position up to which a slot was measured; −2: just come
        }

    def keep(self, positions, statistics, now):
        return jnp.broadcast_to(statistics["score"], positions.shape)

    def observe(self, statistics, attended):
        positions, now = attended.positions, attended.now
        until = jnp.where(statistics["until"] == -2, positions - 1, statistics["until"])
        measured = jax.lax.stop_gradient(jnp.moveaxis(attended.measured["signal"], 2, -1))  # [B, S, K, queries]
        measured = measured.astype(statistics["signal"].dtype)
        signal = joined(measured, statistics["signal"], now - until)
        spectrum = self.averaged(statistics["spectrum"], signal, now, now - until, measured.shape[-1])
        due = (now + 1) // self.every > (until + 1) // self.every

        def scored(_: None) -> Array:
            by_head = jnp.moveaxis(spectrum, 1, 2), jnp.moveaxis(positions, 1, 2)
            score = jnp.moveaxis(self.scorer(*by_head, now), 2, 1)
            score = jnp.where(score > 0, score, jnp.where(positions == now, jnp.inf, -jnp.inf))
            return jnp.where(due, score.astype(statistics["score"].dtype), statistics["score"])

        return {
            "score": jax.lax.cond((due & (positions >= 0)).any(), scored, lambda _: statistics["score"], None),
            "signal": signal[..., : self.window],
            "spectrum": spectrum,
            "until": jnp.broadcast_to(now, until.shape),
        }

    def averaged(
        self, spectrum: Array, signal: Array, now: Int[Array, "b 1 1"], new: Int[Array, "b s k"], queries: int
    ) -> Float[Array, "b s k f"]:
        """Returns the average of spectra after `new` numbers, of which those of the last `queries` were measured.

        Args:
            spectrum: [B, S, K, F], the average before.
            signal: [B, S, K, queries + window], as from `joined`.
            now: [B, 1, 1], the position of the newest number.
            new: [B, S, K], how many numbers have come.
            queries: The number of queries of the call.
        """
        ends = (now + 1) // self.hop  # the number of frames that ended by now; the last `lag` ago, [B, 1, 1, F']
        lag = ((now + 1) % self.hop)[..., None] + self.hop * jnp.arange(-(-queries // self.hop))
        # A Hann window that is periodic, and the one-sided discrete Fourier transform.
        time = np.arange(self.window)
        angles = 2 * np.pi * np.outer(time, np.arange(self.window // 2 + 1)) / self.window
        hann = (0.5 - 0.5 * np.cos(2 * np.pi * time / self.window))[:, None]
        frames = lag[..., None] + self.window - 1 - time  # [B, 1, 1, F', window], from old to new
        flat = frames.reshape(len(frames), 1, 1, -1)
        at = jnp.broadcast_to(jnp.minimum(flat, signal.shape[-1] - 1), (*signal.shape[:-1], flat.shape[-1]))
        taken = jnp.take_along_axis(signal, at, -1).reshape(*signal.shape[:-1], -1, self.window)
        real, imaginary = (
            jnp.matmul(taken, jnp.asarray(hann * wave, signal.dtype), precision="highest")
            for wave in (np.cos(angles), np.sin(angles))
        )
        size = jnp.sqrt(real**2 + imaginary**2)
        there = lag < jnp.minimum(new, queries)[..., None]  # [B, S, K, F']
        by_frame = jnp.asarray(self.decay) ** self.hop
        weights = jnp.where(there, (1 - by_frame) * by_frame ** jnp.arange(lag.shape[-1]), 0)
        ended = jnp.maximum(ends - (now - new + 1) // self.hop, 0)
        return by_frame ** ended[..., None] * spectrum + (weights[..., None] * size).sum(-2)


def joined(
    measured: Float[Array, "b s k t"], before: Float[Array, "b s k w"], new: Int[Array, "b s k"]
) -> Float[Array, "b s k u"]:
    """Returns a signal of t + w numbers, the newest first: `new` numbers of `measured`, and behind them the old ones.

    Args:
        measured: [B, S, K, T], the newest number first.
        before: [B, S, K, W], the signal before.
        new: [B, S, K], how many numbers have come. Where it is larger than T, zeros stand for those that are missing.
    """
    count, window = measured.shape[-1], before.shape[-1]
    lag = jnp.arange(count + window)
    padded = jnp.pad(measured, [(0, 0)] * 3 + [(0, window)])
    old = lag - new[..., None]
    kept = jnp.take_along_axis(before, jnp.clip(old, 0, window - 1), -1)
    return jnp.where(old < 0, padded, jnp.where(old < window, kept, 0))
