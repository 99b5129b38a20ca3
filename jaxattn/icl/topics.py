"""Documents of topics, read by a masked language model, and what its value matrix must be to know the topics."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxattn.core.checks import check_all_positive, check_probability, check_static_int
from jaxattn.core.numeric import ratio
from jaxattn.core.part import part
from jaxattn.icl.prompt import Prompt
from jaxattn.icl.task import happens


@part
class TopicDocuments:
    """Documents whose words are drawn from topics, some of them masked: which words were there?

    Each document has a mixture of topics (`hidden`, [B, topics]); a word is that of a topic drawn from the mixture, and
    uniform among its words: word w belongs to topic w // words. Positions are chosen at random, and count: of these a
    part is kept, a part has a random word, and all others have the mask, the token after the words (LDA with the masks
    of BERT; Li et al., 2023).

    Attributes:
        topics: The number of topics.
        words: The number of words of each.
        length: The number of words in a document.
        present: How many topics are in a document, drawn without replacement and in equal shares; None for mixtures
            from a Dirichlet distribution.
        concentration: The parameter of that distribution.
        chosen: The probability that a position is chosen.
        kept: The probability that a chosen position keeps its word.
        random: The probability that it has a random word.

    Raises:
        TypeError: A size is not an int.
        ValueError: A size is below 1, more topics are present than there are, `concentration` is not positive, or
            probabilities are not from 0 to 1, `kept` and `random` together.
    """

    topics: int
    words: int
    length: int
    present: int | None = None
    concentration: Float[Array, ""] | float = 0.1
    chosen: Float[Array, ""] | float = 0.15
    kept: Float[Array, ""] | float = 0.1
    random: Float[Array, ""] | float = 0.1

    def __post_init__(self):
        for name in ("topics", "words", "length"):
            check_static_int("TopicDocuments", name, getattr(self, name), 1)
        if self.present is not None:
            check_static_int("TopicDocuments", "present", self.present, 1)
            if self.present > self.topics:
                raise ValueError(
                    f"TopicDocuments: present is {self.present} of {self.topics} topics: need at most as many"
                )
        check_all_positive("TopicDocuments", "concentration", self.concentration)
        _check_rates("TopicDocuments", self.chosen, self.kept, self.random)

    @property
    def mask(self) -> int:
        """The token of the mask."""
        return self.topics * self.words

    def with_length(self, length: int) -> "TopicDocuments":
        """Returns the same task with documents of another length."""
        return dataclasses.replace(self, length=length)

    def sample(self, key: PRNGKeyArray, batch: int) -> Prompt:
        for_mixture, for_topic, for_word, for_choice, for_kind, for_random = jax.random.split(key, 6)
        if self.present is None:
            mixture = jax.random.dirichlet(for_mixture, jnp.full(self.topics, self.concentration), (batch,))
        else:
            rank = jax.random.uniform(for_mixture, (batch, self.topics)).argsort(-1).argsort(-1)
            mixture = (rank < self.present) / self.present
        shape = batch, self.length
        total = mixture.cumsum(-1)
        drawn = jax.random.uniform(for_topic, shape) * total[:, -1:]
        topic = (drawn[..., None] >= total[:, None, :-1]).sum(-1)
        text = topic * self.words + jax.random.randint(for_word, shape, 0, self.words)
        counts = happens(for_choice, self.chosen, shape)
        kind = jax.random.uniform(for_kind, shape)
        other = jax.random.randint(for_random, shape, 0, self.mask)
        seen = jnp.where(kind < self.kept, text, jnp.where(kind < self.kept + self.random, other, self.mask))
        return Prompt(jnp.where(counts, seen, text), text, counts.astype(float), text, mixture)


def _check_rates(owner: str, chosen, kept, random) -> None:
    for name, value in (("chosen", chosen), ("kept", kept), ("random", random)):
        check_probability(f"{owner}: {name}", value)
    if all(isinstance(x, int | float) for x in (kept, random)):
        check_probability(f"{owner}: kept + random", kept + random)


class TopicValues(NamedTuple):
    """The entries of a value matrix that is constant on blocks: what a word that is read says of a word.

    Attributes:
        same: Of words of its own topic, itself included.
        different: Of words of other topics.
        mask: What the mask says of any word.
    """

    same: Float[Array, ""]
    different: Float[Array, ""]
    mask: Float[Array, ""]

    def matrix(self, topics: int, words: int) -> Float[Array, "n m"]:
        """Returns the matrix, [words asked for, words and mask that are read]."""
        topic = jnp.arange(topics * words) // words
        blocks = jnp.where(topic[:, None] == topic, self.same, self.different)
        return jnp.concatenate([blocks, jnp.full((topics * words, 1), self.mask, blocks.dtype)], -1)


def topic_values(
    topics: int,
    words: int,
    *,
    chosen: Float[Array, ""] | float = 0.15,
    kept: Float[Array, ""] | float = 0.1,
    random: Float[Array, ""] | float = 0.1,
) -> TopicValues:
    """Returns the W of least norm by which uniform attention knows the topics of long documents (Li et al., 2023).

    Uniform attention reads the frequencies z of words, masked or not, and W z is the distribution P of the words of the
    document, for all documents, where

        z = a P + b on words, m on the mask,   a = 1 − p (1 − kept),   b = p random / n,   m = p (1 − kept − random)

    with n words and the probability p of being chosen. W is constant on blocks, and with T topics of v words

        W_different = (b − κ (a / v + T b)) / a²,   W_same = W_different + 1 / (v a),   W_mask = m (1 − T κ) / a²,
        κ = s v / (a² + T s v),   s = 2 a b + n b² + m².

    Args:
        topics: T, at least 1; fewer must be present in a document, or it says nothing.
        words: v, of each topic, at least 1.
        chosen: p, as in `TopicDocuments`.
        kept: As in `TopicDocuments`.
        random: As in `TopicDocuments`.

    Raises:
        TypeError: A number of topics or words is not an int.
        ValueError: It is below 1; or probabilities are out of range, or leave no word as it is (a = 0).
    """
    check_static_int("topic_values", "topics", topics, 1)
    check_static_int("topic_values", "words", words, 1)
    _check_rates("topic_values", chosen, kept, random)
    a, b = 1 - chosen * (1 - jnp.asarray(kept, float)), chosen * random / (topics * words)
    if not isinstance(a, jax.core.Tracer) and not float(a) > 0:
        raise ValueError(f"topic_values: chosen is {chosen} and kept {kept}, so no word is left: need some")
    mask = chosen * (1 - kept - random)
    s = 2 * a * b + topics * words * b**2 + mask**2
    kappa = s * words / (a**2 + topics * s * words)
    different = (b - kappa * (a / words + topics * b)) / a**2
    return TopicValues(different + 1 / (words * a), different, mask * (1 - topics * kappa) / a**2)


class BlockStatistic(NamedTuple):
    """Means of the entries of a matrix of tokens by tokens.

    Attributes:
        token: On the diagonal: a token and itself.
        same: Of two tokens of one group.
        different: Of two tokens of two groups.
    """

    token: Float[Array, "*b"]
    same: Float[Array, "*b"]
    different: Float[Array, "*b"]


def block_statistic(matrix: Float[Array, "*b n n"], groups: Int[Array, " n"]) -> BlockStatistic:
    """Returns the mean entries of a matrix by whether row and column are the same token, or of one group; 0 for none.

    Args:
        matrix: [..., n, n].
        groups: [n], the group of each token.

    Raises:
        ValueError: Shapes do not fit.
    """
    groups = jnp.asarray(groups)
    if groups.ndim != 1 or jnp.shape(matrix)[-2:] != (len(groups), len(groups)):
        raise ValueError(f"matrix has shape {jnp.shape(matrix)} and groups {groups.shape}: need [.., n, n] and [n]")
    itself, alike = jnp.eye(len(groups), dtype=bool), groups[:, None] == groups

    def mean(chosen: Array) -> Array:
        total = jnp.where(chosen, matrix, 0).sum((-2, -1))
        return ratio(total, chosen.sum().astype(total.dtype))

    return BlockStatistic(mean(itself), mean(alike & ~itself), mean(~alike))
