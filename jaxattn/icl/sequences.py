"""Tasks of tokens that are solved by looking back (recall of pairs, copying, repeated blocks), and predictors for them.

A task of tokens is sampled as `task.sample(key, batch) -> Prompt` with tokens x [B, T], the tokens y [B, T] that are
asked for at the same positions, and weights [B, T]. Losses of language models take `Prompt.tokens()`. A predictor of
tokens is called as `predictor(x, y) -> [B, T]`, and looks at the tokens up to each position alone.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxattn.core.checks import check_probability, check_static_int
from jaxattn.core.part import part
from jaxattn.icl.prompt import Prompt
from jaxattn.icl.task import happens


@part
class AssociativeRecall:
    """Multi-query associative recall: k₁ v₁ ... k_n v_n, then each key again, its value the target there.

    Token 0 fills the rest, 1 .. keys are keys, and those after them values. Keys of a row differ, and so do its values.
    The part after the pairs is cut into slots of two tokens; the n slots that hold a query are drawn without
    replacement with probability ∝ gap^(power − 1), gap = 1, 2, ... counted from the pairs (Zoology, 2023).

    Attributes:
        pairs: n, the number of key-value pairs, each asked for once.
        length: T, the number of tokens: even, 4 per pair or more.
        keys: The number of different keys, at least as many as pairs.
        values: The number of different values, likewise.
        power: 1 draws slots uniformly, less draws them towards the pairs.
        random_fill: Whether random tokens of the whole vocabulary take the place of 0: some are keys or values.

    Raises:
        ValueError: Pairs do not fit.
    """

    pairs: int
    length: int
    keys: int
    values: int
    power: Float[Array, ""] | float = 0.01
    random_fill: bool = False

    def __post_init__(self):
        for name in ("pairs", "length", "keys", "values"):
            check_static_int("AssociativeRecall", name, getattr(self, name), 1)
        if self.length % 2 or self.length < 4 * self.pairs:
            given = f"length is {self.length} for {self.pairs} pairs"
            raise ValueError(f"AssociativeRecall: {given}: need an even number, 4 per pair or more")
        for name in ("keys", "values"):
            if getattr(self, name) < self.pairs:
                given = f"{name} is {getattr(self, name)} for {self.pairs} pairs"
                raise ValueError(f"AssociativeRecall: {given}: need at least as many")

    def sample(self, key: PRNGKeyArray, batch: int) -> Prompt:
        for_keys, for_values, for_slots = jax.random.split(key, 3)

        def some(key: PRNGKeyArray, count: int) -> Int[Array, "b n"]:
            return jax.random.uniform(key, (batch, count)).argsort(-1)[:, : self.pairs].astype(jnp.int32)

        asked = 1 + some(for_keys, self.keys)
        answers = 1 + self.keys + some(for_values, self.values)
        context = jnp.stack([asked, answers], -1).reshape(batch, 2 * self.pairs)
        gaps = jnp.arange(1, (self.length - 2 * self.pairs) // 2 + 1)
        # The largest of log-probabilities with Gumbel noise are a draw without replacement.
        noisy = (self.power - 1) * jnp.log(gaps) + jax.random.gumbel(for_slots, (batch, len(gaps)))
        places = 2 * self.pairs + 2 * noisy.argsort(-1, descending=True)[:, : self.pairs]
        row = jnp.arange(batch)[:, None]
        empty = jnp.zeros((batch, self.length), jnp.int32)
        fill = empty
        if self.random_fill:
            for_fill = jax.random.fold_in(key, 3)
            fill = jax.random.randint(for_fill, empty.shape, 0, 1 + self.keys + self.values, jnp.int32)
        targets = empty.at[row, places].set(answers)
        return Prompt(
            x=fill.at[:, : 2 * self.pairs].set(context).at[row, places].set(asked),
            y=targets,
            weights=jnp.zeros((batch, self.length)).at[row, places].set(1.0),
            clean=targets,
        )


@part
class Copying:
    """Strings s₁ ... s_n, an end mark, and the string again, its letters the targets: T = 2n.

    Letters are 0 .. letters − 1, drawn independently, and the mark is the token after them.

    Attributes:
        letters: The number of different letters, at least 1.
        string: n, at least 1.

    Raises:
        TypeError: A size is not an int.
        ValueError: A size is below 1.
    """

    letters: int
    string: int

    def __post_init__(self):
        check_static_int("Copying", "letters", self.letters, 1)
        check_static_int("Copying", "string", self.string, 1)

    @property
    def length(self) -> int:
        return 2 * self.string

    def sample(self, key: PRNGKeyArray, batch: int) -> Prompt:
        string = jax.random.randint(key, (batch, self.string), 0, self.letters)
        return answered(string, string, self.letters)


def answered(string: Int[Array, "b n"], answer: Int[Array, "b n"], mark: int) -> Prompt:
    """Returns prompts of a string, a mark, and an answer as long as the string, whose letters are the targets: 2n."""
    between = jnp.full((len(string), 1), mark, string.dtype)
    targets = jnp.concatenate([jnp.zeros_like(string), answer], -1)
    second = jnp.arange(targets.shape[1]) >= string.shape[1]
    return Prompt(
        x=jnp.concatenate([string, between, answer[:, :-1]], -1),
        y=targets,
        weights=jnp.broadcast_to(second.astype(float), targets.shape),
        clean=targets,
    )


@part
class RepeatedBlock:
    """BOS b₁ ... b_p b₁ ... b_p b₁ ...: a block of different random letters, over and over; what comes next?

    The period p is uniform from `shortest` to `longest` in each row (`hidden`), so that no fixed distance solves the
    task. Letters are 0 .. letters − 1 and BOS is the token after them. Answers count where the letter asked for stood
    behind the token at hand before, as an induction head can know (Olsson et al., 2022).

    All letters of a block differ, so that the one some places back tells what comes next as well as the last does. With
    jumps it does not.

    Attributes:
        letters: The number of different letters.
        length: The number of tokens, at least longest + 2.
        shortest: The least period, at least 1.
        longest: The largest period, from `shortest` to `letters`.
        jump: The probability that a letter is any of the block, and the block goes on from there.

    Raises:
        TypeError: A size is not an int.
        ValueError: 1 ≤ shortest ≤ longest ≤ letters or length ≥ longest + 2 does not hold, or `jump` is no probability.
    """

    letters: int
    length: int
    shortest: int
    longest: int
    jump: Float[Array, ""] | float = 0.0

    def __post_init__(self):
        check_static_int("RepeatedBlock", "shortest", self.shortest, 1)
        if not self.shortest <= self.longest <= self.letters:
            raise ValueError(
                f"RepeatedBlock: longest is {self.longest}: need one from shortest, {self.shortest}, to letters, "
                f"{self.letters}"
            )
        check_static_int("RepeatedBlock", "length", self.length, self.longest + 2)
        check_probability("RepeatedBlock: jump", self.jump)

    def with_length(self, length: int) -> "RepeatedBlock":
        """Returns the same task with prompts of another length."""
        return dataclasses.replace(self, length=length)

    def sample(self, key: PRNGKeyArray, batch: int) -> Prompt:
        for_letters, for_period = jax.random.split(key)
        block = jax.random.uniform(for_letters, (batch, self.letters)).argsort(-1)
        period = jax.random.randint(for_period, (batch, 1), self.shortest, self.longest + 1)
        index = jnp.arange(self.length)
        for_whether, for_where = jax.random.split(jax.random.fold_in(key, 2))
        jumps = happens(for_whether, self.jump, (batch, self.length))
        to = jax.random.randint(for_where, (batch, self.length), 0, period)
        last = jax.lax.cummax(jnp.where(jumps, index, -1), axis=1)  # the last jump, −1 for none
        begun = jnp.where(last < 0, 0, jnp.take_along_axis(to, jnp.maximum(last, 0), 1))
        string = jnp.take_along_axis(block, (begun + index - jnp.maximum(last, 0)) % period, 1)
        x = jnp.pad(string[:, :-1], ((0, 0), (1, 0)), constant_values=self.letters)
        same = (x[:, :, None] == x[:, None]) & (string[:, :, None] == string[:, None])
        known = (same & (index < index[:, None])).any(-1)
        return Prompt(x, string, known.astype(float), string, period[:, 0])


@part
class Lookup:
    """Answers the token that followed the last earlier occurrence of the token at hand, or 0 if it has none.

    An induction head does the same (Olsson et al., 2022). The answer is exact where a token is always followed by the
    same: in `AssociativeRecall` without random fill, and in `RepeatedBlock`.
    """

    def __call__(self, x: Int[Array, "b t"], y: Int[Array, "b t"]) -> Int[Array, "b t"]:
        index = jnp.arange(x.shape[1])
        earlier = (x[:, :, None] == x[:, None]) & (index < index[:, None])
        last = jnp.where(earlier, index, -1).max(-1)
        return jnp.where(last >= 0, jnp.take_along_axis(x, last + 1, 1), 0)


def additive_memory_accuracy(pairs: int, key_dim: int, value_dim: int, candidates: int) -> float:
    """Returns how often an additive memory S = Σ_j k_j v_jᵀ of n random pairs recalls the right one of V values.

    Keys and value embeddings are random of length 1, and the answer to k_i is the embedding closest to Sᵀ k_i. With
    s² = (n − 1) / (d_k d_v), the right logit is x ~ N(1, s²), that of another stored value N(0, σ_in²), and that of one
    not stored N(0, σ_out²), σ_in² = 1/d_k + 1/d_v + s², σ_out² = 1/d_v + s²: the accuracy is
    E Φ(x/σ_in)^{n−1} Φ(x/σ_out)^{V−n}.

    The logits are taken for independent, which makes the result an estimate, some points low where it is far from 1.

    Args:
        pairs: n, at least 1.
        key_dim: d_k, at least 1.
        value_dim: d_v, at least 1.
        candidates: V, at least n.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is below its least value.
    """
    for name, value in (("pairs", pairs), ("key_dim", key_dim), ("value_dim", value_dim)):
        check_static_int("additive_memory_accuracy", name, value, 1)
    check_static_int("additive_memory_accuracy", "candidates", candidates, pairs)
    crosstalk = (pairs - 1) / (key_dim * value_dim)
    nodes, weights = np.polynomial.hermite_e.hermegauss(128)
    x = 1 + np.sqrt(crosstalk) * nodes
    inside, outside = np.sqrt(1 / key_dim + 1 / value_dim + crosstalk), np.sqrt(1 / value_dim + crosstalk)
    log_right = (pairs - 1) * jax.scipy.stats.norm.logcdf(x / inside)
    log_right += (candidates - pairs) * jax.scipy.stats.norm.logcdf(x / outside)
    return float(weights @ np.exp(np.asarray(log_right)) / weights.sum())
