"""What heads are: detectors of kinds of heads by name, each with its chance level, and the table of what they find.

Names of kinds follow the survey of Zheng et al. (2024). A score without its chance level says nothing: 0.03 is much for
one key of a thousand, and nothing for one of thirty.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxattn.analysis.factors import copying
from jaxattn.analysis.heads import check_heads, check_unpadded
from jaxattn.core.attend.api import attend
from jaxattn.core.attend.mask import Causal
from jaxattn.core.attend.measure import AtKeys, AtLags, Matching, Measure
from jaxattn.core.checks import check_static_int
from jaxattn.trace import run
from jaxattn.trace.patching import as_inputs


class Copies(NamedTuple):
    """Texts of random tokens that come again after a period that differs from row to row, none of them three times.

    A head that looks back a fixed number of tokens cannot follow them.

    Attributes:
        tokens: [B, T].
        period: [B], from half of T on.
        start: The number of first tokens before the block: 1 if every text begins with the same token, else 0.
    """

    tokens: Int[Array, "b t"]
    period: Int[Array, " b"]
    start: int

    @property
    def again(self) -> Bool[Array, "b t"]:
        """Which tokens stood in the first copy: the queries that detectors look at."""
        return jnp.arange(self.tokens.shape[1]) >= self.start + self.period[:, None]

    def first_copy(self, shift: int = 0) -> Int[Array, "b t"]:
        """Returns the tokens of the first copy, `shift` places further back, and −1 elsewhere: marks for `Matching`."""
        place = jnp.arange(self.tokens.shape[1]) - shift
        there = (place >= self.start) & (place < self.start + self.period[:, None])
        return jnp.where(there, jnp.roll(self.tokens, shift, 1), -1)


def copies(key: PRNGKeyArray, batch: int, length: int, vocabulary: int, *, first: int | None = None) -> Copies:
    """Returns texts of random tokens that repeat, with a period from ⌈n/2⌉ to ⌊3n/4⌋ of the n = `length` tokens.

    Tokens of a block differ where the vocabulary is large enough.

    Args:
        key: The key.
        batch: B.
        length: How many random tokens a text has, at least 4.
        vocabulary: Tokens are from 0 .. vocabulary − 1.
        first: A token that every text begins with, before them.
    """
    check_static_int("copies", "length", length, 4)
    longest = 3 * length // 4
    for_tokens, for_period = jax.random.split(key)
    if vocabulary >= longest:
        drawn = [jax.random.choice(each, vocabulary, (longest,), False) for each in jax.random.split(for_tokens, batch)]
        block = jnp.stack(drawn)
    else:
        block = jax.random.randint(for_tokens, (batch, longest), 0, vocabulary)
    period = jax.random.randint(for_period, (batch,), -(-length // 2), longest + 1)
    tokens = jnp.take_along_axis(block, jnp.arange(length) % period[:, None], 1)
    if first is not None:
        tokens = jnp.concatenate([jnp.full((batch, 1), first, tokens.dtype), tokens], 1)
    return Copies(tokens, period, int(first is not None))


@dataclass(frozen=True)
class Detector:
    """What makes a head one of a kind: where it looks, or any other score of heads.

    Attributes:
        says: What such a head does, in words.
        measure: From `Copies` to a measure of weights, one number per query. The score is its mean over the queries of
            the second copy, and chance that of equal weights on all tokens that a query sees.
        score: score(model, copies) -> [L, N], in place of a measure.
        chance: What `score` is for a head that is none of the kind.
    """

    says: str
    measure: Callable[[Copies], Measure] | None = None
    score: Callable[[Any, Copies], Any] | None = None
    chance: float = 0.0

    def __post_init__(self):
        if (self.measure is None) == (self.score is None):
            raise ValueError("Detector has both a measure and a score, or none of them: need one of them")


DETECTORS: dict[str, Detector] = {
    "previous token": Detector("looks at the token before", lambda given: AtLags((1,))),
    "current token": Detector("looks at its own token", lambda given: AtLags((0,))),
    "sink": Detector("looks at the first token", lambda given: AtKeys((0,))),
    "duplicate token": Detector(
        "looks at the earlier copy of its token", lambda given: Matching(given.tokens, given.first_copy())
    ),
    "induction": Detector(
        "looks behind the earlier copy of its token", lambda given: Matching(given.tokens, given.first_copy(1))
    ),
    "copying": Detector(
        "raises the logit of what it reads, by the eigenvalues of W_E OV W_U", score=lambda model, given: copying(model)
    ),
}
"""The detectors of `detect`. To add one, give `detect` a dict with one more entry."""


class Found(NamedTuple):
    """The scores of all heads by one detector.

    Attributes:
        score: [L, N], 1 for a head that does nothing else.
        chance: The score of a head that does not do it.
    """

    score: Float[np.ndarray, "layers n"]
    chance: float

    @property
    def over_chance(self) -> Float[np.ndarray, "layers n"]:
        """(score − chance) / (1 − chance): 0 by chance, 1 at most."""
        return (self.score - self.chance) / (1 - self.chance)


def detect(
    model: Any,
    key: PRNGKeyArray,
    detectors: Mapping[str, Detector] = DETECTORS,
    *,
    vocabulary: int | None = None,
    batch: int = 8,
    length: int = 64,
    first: int | None = None,
    **options: Any,
) -> dict[str, Found]:
    """Returns what each detector says of each head, on random tokens that repeat with a period of each row's own.

    A row of the second copy has each token once before, so that a head of a kind can have all of its weight there. In
    models without trained weights scores are at chance: with 8 rows of 64 tokens none of 320 heads of random decoders
    was more than 0.1 over chance where it looks. With a first token 5 of 320 were: 4 as sinks, since they prefer the
    content of that token, and 1 that looks at its own token (0.105). None was more than 0.3 over chance. The
    eigenvalues of `copying` are few, and near chance on average over many heads only.

    Args:
        model: A decoder.
        key: The key of the tokens.
        detectors: The detectors by name.
        vocabulary: The number of tokens that are drawn from; by default those of the model.
        batch: How many texts.
        length: How many random tokens a text has.
        first: A token that every text begins with, such as the one by which texts begin in training.
        options: Other arguments of the model, without `positions`.

    Raises:
        ValueError: Layers have different numbers of heads, or not all have weights, or the model has tokens of its own
            before the sequence. A detector of weights raises what its score does.
    """
    check_unpadded(options)
    vocabulary = model.config.vocabulary if vocabulary is None else vocabulary
    given = copies(key, batch, length, vocabulary, first=first)
    measures = {name: each.measure(given) for name, each in detectors.items() if each.measure is not None}
    record = {name: ("weights", measure) for name, measure in measures.items()}
    inputs = as_inputs("tokens", given.tokens, options, ("record",))
    _, records = run(model, *inputs, record=record, **options)
    size = given.tokens.shape[1]
    flat = jnp.zeros((batch, size, 1, 1))
    _, uniform = attend(flat, flat, flat, mask=Causal(), measures=measures)
    again = given.again[:, :, None]

    def mean(values: Array, axes: int) -> Array:
        """The mean over batch and queries of [..., B, T, N] or [..., B, T, N, 1]."""
        return jnp.where(again, values.reshape(values.shape[:axes]), 0).sum((-3, -2)) / again.sum()

    found = {}
    for name, detector in detectors.items():
        if detector.score is not None:
            found[name] = Found(np.asarray(detector.score(model, given)), detector.chance)
            continue
        check_heads(records[name], size)
        found[name] = Found(np.asarray(mean(records[name], 4)), float(mean(uniform[name], 3)[0]))
    return found


def label_heads(
    found: Mapping[str, Found], threshold: float = 0.4, *, without: tuple[str, ...] = ("copying",)
) -> list[list[str]]:
    """Returns the name of each head's kind, [L][N]: the one furthest over chance, or "" below the threshold.

    The label is a summary: report it with the score and the chance level, since kinds overlap.

    Args:
        found: As `detect` returns it.
        threshold: The least (score − chance) / (1 − chance) of a label.
        without: Names that give no label, such as those that say what a head writes and not where it looks.
    """
    names = [name for name in found if name not in without]
    table = np.stack([found[name].over_chance for name in names])
    table = np.where(np.isnan(table), -np.inf, table)
    best, found_any = table.argmax(0), table.max(0) >= threshold
    return [
        [names[number] if some else "" for number, some in zip(*row, strict=True)]
        for row in zip(best, found_any, strict=True)
    ]
