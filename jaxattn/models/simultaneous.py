"""Simultaneous translation: an encoder-decoder that writes while it reads, and policies that say when it writes."""

import abc
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxattn.core.attend.measure import Mass
from jaxattn.core.checks import check_int, check_range, check_static_int
from jaxattn.core.part import part
from jaxattn.models.encoder_decoder import EncoderDecoder
from jaxattn.models.generate import Generation, generate
from jaxattn.models.sample import in_evaluation


@part
class Simultaneous:
    """The result of `simultaneous`.

    Attributes:
        tokens: [B, M], the new tokens; −1 after the end of a text.
        lengths: [B], how many of them each text has, its end token included.
        read: [B, M], how many frames had been read when each token was written; −1 after the end of a text.
    """

    tokens: Int[Array, "b m"]
    lengths: Int[Array, " b"]
    read: Int[Array, "b m"]


def first_crossing(mass: Float[Array, "*b t"], alpha: float | Array) -> Int[Array, "*b"]:
    """Returns how many tokens stand before the first with mass >= α; all of them where none reaches it.

    Args:
        mass: [..., T].
        alpha: α, a number.
    """
    crosses = mass >= alpha
    return jnp.where(crosses.any(-1), crosses.argmax(-1), mass.shape[-1])


class WritePolicy(abc.ABC):
    """The base class of parts that say how many of some drafted tokens are written before more is read."""

    def record(self, read: Int[Array, " b"], length: int) -> Mapping[str, Any]:
        """Returns what the decoder has to record while it drafts; by default nothing.

        Args:
            read: [B], how many frames of each row have been read.
            length: The number of frames, those that are not read yet included.
        """
        return {}

    @abc.abstractmethod
    def __call__(
        self, draft: Generation, last: Int[Array, " b"], written: Int[Array, " b"], chunks: int
    ) -> Int[Array, " b"]:
        """Returns how many of the drafted tokens are written.

        Args:
            draft: The drafted tokens, and the records of this policy.
            last: [B], the number of the last token of each prompt.
            written: [B], how many tokens have been written.
            chunks: How many chunks have been read.
        """


@part
class EDAtt(WritePolicy):
    """Writes until a token leans on the newest frames (EDAtt, Papi et al., 2023).

        write y_1 .. y_{j−1},   j the first with Σ_{f in the last λ frames} A_jf >= α

    A is the cross-attention of one layer where it predicts a token, averaged over heads. The last frame is left out,
    since attention rests on it whatever it is, and λ frames are counted before it. Weights stay as they are. With α > 1
    everything is written after each chunk, and with α <= 0 nothing before the end.

    Attributes:
        alpha: α.
        frames: λ, at least 1.
        layer: The layer whose cross-attention is looked at; −1 is the last.
        site: The site of its weights.

    Raises:
        TypeError: `frames` is no int.
        ValueError: `frames` is below 1, or `alpha` is NaN.
    """

    alpha: Float[Array, ""] | float
    frames: int = 2
    layer: int = -1
    site: str = "cross.weights"

    def __post_init__(self):
        check_range("EDAtt: alpha", self.alpha, lambda x: x == x, "that are no NaN")
        check_static_int("EDAtt", "frames", self.frames, 1)

    def record(self, read, length):
        frame, end = jnp.arange(length), jnp.asarray(read)[:, None] - 1
        newest = (frame < end) & (frame >= end - self.frames)
        return {"mass": (self.site, Mass(jnp.where(newest, 0, -1), 1))}

    def __call__(self, draft, last, written, chunks):
        before = self._mass(draft.prompt_records["mass"])  # [B, T] of the prompts, whose last token predicts the first
        first = jnp.take_along_axis(before, last[:, None], 1)
        later = jax.vmap(self._mass, in_axes=0)(draft.records["mass"])[:, :, 0].T  # [B, M], token j predicts j + 1
        return first_crossing(jnp.concatenate([first, later[:, :-1]], 1), self.alpha)

    def _mass(self, recorded: Any) -> Float[Array, "b t"]:
        """Returns the mean over heads of the layer, from records [L, B, T, N, 1] or a list of them by layer."""
        return recorded[self.layer][..., 0].mean(-1)


@part
class WaitK(WritePolicy):
    """Reads k chunks, and then writes a token for each chunk more (wait-k, Ma et al., 2019).

    Attributes:
        k: k, at least 1.

    Raises:
        TypeError: `k` is no int.
        ValueError: `k` is below 1.
    """

    k: int = 3

    def __post_init__(self):
        check_static_int("WaitK", "k", self.k, 1)

    def __call__(self, draft, last, written, chunks):
        return jnp.clip(chunks - self.k + 1 - written, 0, draft.tokens.shape[1])


def simultaneous(
    model: EncoderDecoder,
    inputs: Any,
    prompt: Int[Any, " p"],
    policy: WritePolicy,
    *,
    chunk: int,
    max_new_tokens: int,
    lengths: Int[Any, " b"] | None = None,
    end_token: int | None = None,
    ahead: int = 8,
) -> Simultaneous:
    """Writes a text while the source is read in chunks of frames.

        models.simultaneous(model, frames, [start], models.EDAtt(0.1), chunk=8, max_new_tokens=64, end_token=end)

    After each chunk the encoder reads anew all that has come, and the decoder drafts greedily behind what has been
    written. The policy says how much of the draft is written. The rest is forgotten. Nothing that was written changes.
    An end token is written only after the whole source was read; then everything is written. There is one program for
    the encoder and one for the decoder.

    Args:
        model: The encoder and the decoder.
        inputs: [B, S, ...], the whole source, of which the model sees a growing part.
        prompt: [P], the tokens that every text begins with.
        policy: When tokens are written, such as `EDAtt(0.1)`.
        chunk: The number of frames that are read at a time, at least 1.
        max_new_tokens: M, the most tokens of a text.
        lengths: [B], how much of each row is source; all of it by default.
        end_token: As of `generate`.
        ahead: The most tokens that are drafted in one call; where all of them are written, more are drafted.

    Raises:
        ValueError: A size is out of range, or as of `generate`; the prompt, M and `ahead` have to fit the length of the
            decoder.
        TypeError: `policy` is no `WritePolicy`, or a size is no int.
    """
    if not isinstance(policy, WritePolicy):
        raise TypeError(f"policy must be a WritePolicy such as EDAtt(0.1), got {policy!r}")
    for name, given in (("chunk", chunk), ("max_new_tokens", max_new_tokens), ("ahead", ahead)):
        check_int(name, given)
        if given < 1:
            raise ValueError(f"{name} is {given}: need at least 1")
    batch, frames = np.shape(inputs)[:2]
    start = np.asarray(prompt)
    sizes = np.full(batch, frames) if lengths is None else np.asarray(lengths)
    if start.ndim != 1 or sizes.shape != (batch,) or sizes.min() < 1 or sizes.max() > frames:
        raise ValueError(
            f"prompt has shape {start.shape} and lengths are {sizes.tolist()}: need tokens [P], and {batch} numbers "
            f"from 1 to {frames}"
        )
    room = model.decoder.config.length
    if len(start) + max_new_tokens + ahead > room:
        raise ValueError(
            f"prompt has {len(start)} tokens, max_new_tokens is {max_new_tokens} and ahead {ahead}: need at most "
            f"{room} together, the length of the decoder"
        )
    model = in_evaluation(model)
    graph, arrays = nnx.split(model)
    width = len(start) + max_new_tokens
    text = np.zeros((batch, width), np.int32)
    text[:, : len(start)] = start
    written, ended = np.zeros(batch, int), np.zeros(batch, bool)
    read = np.full((batch, max_new_tokens), -1, np.int32)
    chunks = -(-frames // chunk)
    for number in range(1, chunks + 1):
        come = np.minimum(sizes, number * chunk)
        context = _encoded(graph, arrays, inputs, np.where(np.arange(frames) < come[:, None], np.arange(frames), -1))
        whole, waiting = come == sizes, ended | (written == max_new_tokens)
        while not waiting.all():
            begun = len(start) + written
            draft = generate(
                model.decoder,
                text,
                begun,
                max_new_tokens=ahead,
                temperature=0.0,
                end_token=end_token,
                context=context,
                record=policy.record(jnp.asarray(come), frames),
            )
            tokens, drafted = np.asarray(draft.tokens), np.asarray(draft.lengths)
            takes = np.asarray(policy(draft, jnp.asarray(begun - 1), jnp.asarray(written), number))
            ends = np.asarray((tokens == end_token).any(1)) if end_token is not None else np.zeros(batch, bool)
            takes = np.where(whole, drafted, np.minimum(takes, drafted - ends))
            takes = np.where(waiting, 0, np.minimum(takes, max_new_tokens - written))
            for row, count in enumerate(takes):
                place = slice(written[row], written[row] + count)
                text[row, len(start) :][place], read[row, place] = tokens[row, :count], come[row]
            ended |= whole & ends & (takes == drafted)
            written += takes
            waiting |= ended | (takes < ahead) | (written == max_new_tokens)
    new = np.where(read >= 0, text[:, len(start) :], -1)
    return Simultaneous(jnp.asarray(new), jnp.asarray(written), jnp.asarray(read))


@partial(jax.jit, static_argnums=0)
def _encoded(graph, arrays, inputs, positions):
    return nnx.merge(graph, arrays).encode(inputs, positions=positions)[0]


def average_lagging(read: Int[Array, "b m"], lengths: Int[Array, " b"], source: Int[Array, " b"]) -> Float[Array, " b"]:
    """Returns by how many frames each text lags behind an ideal one that is written at an even pace (Ma et al., 2019):

        AL = 1 / τ Σ_{j=1..τ} g_j − (j − 1) |x| / |y|,   τ the first j with g_j = |x|

    Args:
        read: g [B, M], the frames that had been read when each token was written; −1 for no token.
        lengths: |y| [B], the number of tokens, at least 1.
        source: |x| [B], the number of frames.
    """
    number = jnp.arange(read.shape[1])
    there = number < lengths[:, None]
    over = (read >= source[:, None]) & there
    last = jnp.where(over.any(1), over.argmax(1), lengths - 1)[:, None]
    lag = read - number * (source / jnp.maximum(lengths, 1))[:, None]
    return jnp.where(number <= last, lag, 0).sum(1) / (last[:, 0] + 1)
