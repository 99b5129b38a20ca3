"""Tasks with an exact algorithm: modular addition, parity, histograms, sorting and brackets, and who solves them.

Each task has a predictor of its own that is always right and shares no code with it. `jaxattn.icl.circuits` has
attention layers that carry some of these algorithms out.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from jaxattn.core.checks import as_ids, check_static_int
from jaxattn.core.part import part
from jaxattn.icl.prompt import Prompt
from jaxattn.icl.sequences import Lookup, answered

Format = Literal["direct", "scratchpad", "interleaved", "mnemonic"]


@part
class ModularAddition:
    """Prompts a b = with the answer (a + b) mod p, of one side of a fixed split of the p² pairs (Power et al., 2022).

    Tokens 0 .. p − 1 are numbers and p is the equals sign; T = 3, and the last answer counts. `hidden` holds (a, b).

    Attributes:
        modulus: p, at least 2.
        share: The share of the pairs that is for training; at least one pair is on either side.
        held_out: Whether prompts are of the other pairs.
        seed: Of the split. Tasks with one seed agree about it, on every machine.

    Raises:
        TypeError: An integer is none.
        ValueError: An integer is too small, or a side of the split is empty.
    """

    modulus: int
    share: float = 0.5
    held_out: bool = False
    seed: int = 0

    def __post_init__(self):
        check_static_int("ModularAddition", "modulus", self.modulus, 2)
        check_static_int("ModularAddition", "seed", self.seed, 0)
        if not 1 <= round(self.share * self.modulus**2) < self.modulus**2:
            raise ValueError(
                f"ModularAddition: share is {self.share} of {self.modulus**2} pairs: need one or more on each side"
            )

    @property
    def length(self) -> int:
        return 3

    @property
    def vocabulary(self) -> int:
        return self.modulus + 1

    def pairs(self) -> Int[np.ndarray, "n 2"]:
        """Returns the pairs (a, b) of this side of the split, in a fixed order."""
        order = np.random.default_rng(self.seed).permutation(self.modulus**2)
        cut = round(self.share * self.modulus**2)
        chosen = order[cut:] if self.held_out else order[:cut]
        return np.stack([chosen // self.modulus, chosen % self.modulus], -1).astype(np.int32)

    def prompts(self, pairs: Int[Array, "n 2"]) -> Prompt:
        """Returns the prompts of these pairs."""
        pairs = jnp.asarray(pairs).astype(jnp.int32)
        equals = jnp.full((len(pairs), 1), self.modulus, jnp.int32)
        last = jnp.arange(3) == 2
        answer = jnp.where(last, pairs.sum(-1, keepdims=True) % self.modulus, 0)
        weights = jnp.broadcast_to(last.astype(float), answer.shape)
        return Prompt(jnp.concatenate([pairs, equals], -1), answer, weights, answer, pairs)

    def every(self) -> Prompt:
        """Returns the prompts of all pairs of this side: the whole batch, which draws nothing."""
        return self.prompts(jnp.asarray(self.pairs()))

    def sample(self, key: PRNGKeyArray, batch: int) -> Prompt:
        pairs = jnp.asarray(self.pairs())
        return self.prompts(pairs[jax.random.randint(key, (batch,), 0, len(pairs))])


@part
class AddModulo:
    """Answers a `ModularAddition` from a table that counts up by one (other answers: 0).

    Attributes:
        modulus: p.
    """

    modulus: int

    def __call__(self, x: Int[Array, "b t"], y: Int[Array, "b t"]) -> Int[Array, "b t"]:
        count = np.arange(self.modulus)
        table = jnp.asarray(np.stack([np.roll(count, -a) for a in count]))
        x = as_ids(x)
        return jnp.zeros_like(x).at[:, 2].set(table.astype(x.dtype)[x[:, 0], x[:, 1]])


@part
class BitParity:
    """Parity of n random bits b, n drawn from `shortest` to `longest`; p_i = b₁ xor .. xor b_i.

    The four formats differ in how the bit of a step is found (after Ebrahimi et al., 2024; the layouts are ours):

        direct:       > b₁ .. b_n =                                answer p_n after the equals sign
        scratchpad:   > b₁ .. b_n = p₁ .. p_{n−1}                  answers p₁ .. p_n: step i looks n tokens back
        interleaved:  > b₁ p₁ b₂ p₂ .. b_n                         the answer to b_i is p_i: offsets 0 and −1
        mnemonic:     > m₁ b₁ .. m_n b_n = m₁ p₁ .. p_{n−1} m_n    the answer to m_i is p_i: by content

    Tokens 0 and 1 are bits and parities, 2 is >, 3 is =, 4 fills the row, and the rest are anchors m, which differ in a
    row and are given. `hidden` holds n.

    Attributes:
        format: One of the four.
        shortest: The least n, at least 1.
        longest: The largest n.
        anchors: The number of different anchors, at least `longest` in the mnemonic format; there are none in others.

    Raises:
        TypeError: A size is not an int.
        ValueError: A size is out of range, or the format is another.
    """

    format: Format
    shortest: int
    longest: int
    anchors: int = 0

    def __post_init__(self):
        if self.format not in get_args(Format):
            raise ValueError(f"BitParity: format is {self.format!r}: need one of {', '.join(get_args(Format))}")
        check_static_int("BitParity", "shortest", self.shortest, 1)
        check_static_int("BitParity", "longest", self.longest, self.shortest)
        check_static_int("BitParity", "anchors", self.anchors, self.longest if self.format == "mnemonic" else 0)
        if self.format != "mnemonic" and self.anchors:
            raise ValueError(f"BitParity: anchors is {self.anchors} in the format {self.format!r}: need 0")

    @property
    def length(self) -> int:
        n = self.longest
        return {"direct": n + 2, "scratchpad": 2 * n + 1, "interleaved": 2 * n, "mnemonic": 4 * n + 1}[self.format]

    @property
    def vocabulary(self) -> int:
        return 5 + self.anchors

    def with_bits(self, bits: int) -> "BitParity":
        """Returns the same task with so many bits in every prompt."""
        return dataclasses.replace(self, shortest=bits, longest=bits)

    def sample(self, key: PRNGKeyArray, batch: int) -> Prompt:
        for_bits, for_count, for_anchors = jax.random.split(key, 3)
        bits = jax.random.bernoulli(for_bits, shape=(batch, self.longest)).astype(jnp.int32)
        count = jax.random.randint(for_count, (batch, 1), self.shortest, self.longest + 1)
        sums = jnp.cumsum(bits, -1) % 2
        place = jnp.arange(self.length) - 1  # after the first token

        def entry(table: Int[Array, "b n"], index: Int[Array, "#b t"]) -> Int[Array, "b t"]:
            index = jnp.broadcast_to(jnp.clip(index, 0, self.longest - 1), (batch, self.length))
            return jnp.take_along_axis(table, index, 1)

        of_bits = jnp.where(place < count, entry(bits, place), 4)
        after = place - count - 1  # after the equals sign
        match self.format:
            case "direct":
                x, asked, y = of_bits, after == -1, entry(sums, count - 1)
                x = jnp.where(after == -1, 3, x)
            case "scratchpad":
                x = jnp.where(after < 0, of_bits, jnp.where(after < count - 1, entry(sums, after), 4))
                x = jnp.where(after == -1, 3, x)
                asked, y = (after >= -1) & (after < count - 1), entry(sums, after + 1)
            case "interleaved":
                inside = place < 2 * count - 1
                x = jnp.where(place % 2 == 0, entry(bits, place // 2), entry(sums, place // 2))
                x = jnp.where(inside, x, 4)
                asked, y = inside & (place % 2 == 0), entry(sums, place // 2)
            case _:
                after = place - 2 * count - 1
                marks = 5 + jax.random.uniform(for_anchors, (batch, self.anchors)).argsort(-1)[:, : self.longest]
                first = jnp.where(place % 2 == 0, entry(marks, place // 2), entry(bits, place // 2))
                second = jnp.where(after % 2 == 0, entry(marks, after // 2), entry(sums, after // 2))
                inside = (after >= 0) & (after < 2 * count - 1)
                x = jnp.where(after < -1, first, jnp.where(inside, second, 4))
                x = jnp.where(after == -1, 3, x)
                asked, y = inside & (after % 2 == 0), entry(sums, after // 2)
        asked = asked & (place >= 0)
        x, y = jnp.where(place < 0, 2, x).astype(jnp.int32), jnp.where(asked, y, 0)
        return Prompt(x, y, asked.astype(float), y, count[:, 0])


@part
class ParityRule:
    """Answers a `BitParity` by p_i = b_i xor p_{i−1}, with the p_{i−1} that the prompt shows; the first step has none.

    The bit is found at an index, at the token itself, or after the earlier copy of the anchor; the direct format takes
    the sum of all bits.

    Attributes:
        format: The format of the prompts.
    """

    format: Format

    def __call__(self, x: Int[Array, "b t"], y: Int[Array, "b t"]) -> Int[Array, "b t"]:
        x = as_ids(x)
        if self.format == "direct":
            return jnp.cumsum(jnp.where(x == 1, 1, 0), -1) % 2
        shown = jnp.pad(x, ((0, 0), (1, 0)), constant_values=2)[:, :-1]
        if self.format == "interleaved":
            found = x
        elif self.format == "mnemonic":
            found = Lookup()(x, y)
        else:
            since = jnp.arange(x.shape[1]) - (x == 3).argmax(-1)[:, None]
            found, shown = jnp.take_along_axis(x, jnp.clip(since + 1, 0, x.shape[1] - 1), 1), x
        return jnp.where(found == 1, 1, 0) ^ jnp.where(shown == 1, 1, 0)


@part
class Histogram:
    """A start token > and a random string: how often is this letter in the string? (Weiss et al., 2021.)

    Tokens 0 .. letters − 1 are letters and `letters` is the first token, of which nothing is asked. Answers are the
    numbers themselves.

    Attributes:
        letters: The number of different letters, at least 1.
        string: The number of letters in a string, at least 1.
        causal: Whether only the letters so far are counted, this one included; else all.

    Raises:
        TypeError: A size is not an int.
        ValueError: A size is below 1.
    """

    letters: int
    string: int
    causal: bool = True

    def __post_init__(self):
        check_static_int("Histogram", "letters", self.letters, 1)
        check_static_int("Histogram", "string", self.string, 1)

    @property
    def length(self) -> int:
        return self.string + 1

    @property
    def vocabulary(self) -> int:
        return max(self.letters, self.string) + 1

    def sample(self, key: PRNGKeyArray, batch: int) -> Prompt:
        string = jax.random.randint(key, (batch, self.string), 0, self.letters, jnp.int32)
        seen = jnp.cumsum(jax.nn.one_hot(string, self.letters, dtype=jnp.int32), 1)
        counts = seen if self.causal else jnp.broadcast_to(seen[:, -1:], seen.shape)
        y = jnp.take_along_axis(counts, string[..., None], -1)[..., 0]
        x, y = (jnp.pad(z, ((0, 0), (1, 0)), constant_values=fill) for z, fill in ((string, self.letters), (y, 0)))
        weights = jnp.broadcast_to((jnp.arange(self.length) > 0).astype(float), x.shape)
        return Prompt(x, y, weights, y)


@part
class Tally:
    """Answers a `Histogram` by comparing every two tokens (at the first token: 0).

    Attributes:
        causal: Whether only the tokens so far are counted.
    """

    causal: bool = True

    def __call__(self, x: Int[Array, "b t"], y: Int[Array, "b t"]) -> Int[Array, "b t"]:
        equal = x[:, :, None] == x[:, None]
        index = jnp.arange(x.shape[1])
        if self.causal:
            equal = equal & (index <= index[:, None])
        return jnp.where(index > 0, equal.sum(-1), 0)


@part
class Sorting:
    """A random string, an end mark, and the string in order, its letters the targets: T = 2n (Weiss et al., 2021).

    Letters are 0 .. letters − 1, drawn independently, so that some come again; the mark is the token after them.

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
        check_static_int("Sorting", "letters", self.letters, 1)
        check_static_int("Sorting", "string", self.string, 1)

    @property
    def length(self) -> int:
        return 2 * self.string

    @property
    def vocabulary(self) -> int:
        return self.letters + 1

    def sample(self, key: PRNGKeyArray, batch: int) -> Prompt:
        string = jax.random.randint(key, (batch, self.string), 0, self.letters, jnp.int32)
        return answered(string, jnp.sort(string, -1), self.letters)


@part
class CountingSort:
    """Answers a `Sorting`: place i has the least letter v such that more than i letters are at most v (else: 0).

    Attributes:
        letters: The number of different letters.
        string: n, the number of letters in a string.
    """

    letters: int
    string: int

    def __call__(self, x: Int[Array, "b t"], y: Int[Array, "b t"]) -> Int[Array, "b t"]:
        most = (x[:, : self.string, None] <= jnp.arange(self.letters)).sum(1)  # [B, letters]
        place = jnp.arange(x.shape[1]) - self.string
        found = (most[:, None] <= place[:, None]).sum(-1)
        return jnp.where(place >= 0, found, 0)


@part
class Dyck:
    """A start token > and brackets of k kinds, never deeper than m: which closes? (Dyck-(k, m), Hewitt et al., 2020.)

    Tokens 0 .. k − 1 open, k .. 2k − 1 close them, 2k is the first token. A bracket of a random kind opens where none
    is open, one closes at depth m, and in between either happens with probability 1/2. Every target is the next token,
    and those that close a bracket count: what was seen settles their kind. `hidden` holds the depth after each token.

    Attributes:
        kinds: k, at least 1.
        depth: m, at least 1.
        length: T, at least 2.

    Raises:
        TypeError: A size is not an int.
        ValueError: A size is too small.
    """

    kinds: int
    depth: int
    length: int

    def __post_init__(self):
        check_static_int("Dyck", "kinds", self.kinds, 1)
        check_static_int("Dyck", "depth", self.depth, 1)
        check_static_int("Dyck", "length", self.length, 2)

    @property
    def vocabulary(self) -> int:
        return 2 * self.kinds + 1

    def sample(self, key: PRNGKeyArray, batch: int) -> Prompt:
        for_kinds, for_turns = jax.random.split(key)
        shape = (self.length, batch)
        kinds = jax.random.randint(for_kinds, shape, 0, self.kinds, jnp.int32)
        turns = jax.random.bernoulli(for_turns, shape=shape)
        row = jnp.arange(batch)

        def step(state, drawn):
            stack, height = state
            kind, turn = drawn
            opens = (height == 0) | ((height < self.depth) & turn)
            token = jnp.where(opens, kind, self.kinds + stack[row, height - 1])
            stack = stack.at[row, jnp.where(opens, height, self.depth)].set(kind)  # the last place is for nothing
            height = height + jnp.where(opens, 1, -1)
            return (stack, height), (token, height)

        start = jnp.zeros((batch, self.depth + 1), jnp.int32), jnp.zeros(batch, jnp.int32)
        _, (tokens, heights) = jax.lax.scan(step, start, (kinds, turns))
        y = tokens.T
        x = jnp.pad(y[:, :-1], ((0, 0), (1, 0)), constant_values=2 * self.kinds)
        depths = jnp.pad(heights.T[:, :-1], ((0, 0), (1, 0)))
        return Prompt(x, y, (y >= self.kinds).astype(float), y, depths)


@part
class BracketMatching:
    """Answers a `Dyck` with what closes the last bracket that opened to the depth at hand (where none is open: 0).

    Two layers of attention can do that: the depth by a mean, the match by equal depths (Yao et al., 2021).

    Attributes:
        kinds: k, the kinds of brackets.
    """

    kinds: int

    def __call__(self, x: Int[Array, "b t"], y: Int[Array, "b t"]) -> Int[Array, "b t"]:
        x = as_ids(x)
        opens, closes = x < self.kinds, (x >= self.kinds) & (x < 2 * self.kinds)
        depth = jnp.cumsum(opens.astype(jnp.int32) - closes, -1)
        index = jnp.arange(x.shape[1])
        same = opens[:, None] & (depth[:, None] == depth[:, :, None]) & (index <= index[:, None])
        last = jnp.where(same, index, 0).max(-1)
        return jnp.where(depth > 0, self.kinds + jnp.take_along_axis(x, last, 1), 0)


def answered_freely(
    predictor: Callable[[Int[Array, "b t"], Int[Array, "b t"]], Int[Array, "b t"]], prompt: Prompt
) -> Int[Array, "b t"]:
    """Returns the answers to a prompt of tokens when the predictor reads its own answers, and not the right ones.

    Where an answer counts and the next token of the prompt is that answer, the predictor's own stands in its place from
    there on. So one wrong step of a scratchpad can spoil all that follow. The predictor is called once per place; give
    one that is compiled. It is given zeros for y.

    Args:
        predictor: predictor(x, y) -> tokens [B, T].
        prompt: The prompt, known and not traced.

    Raises:
        ValueError: The prompt is not of tokens [B, T].
    """
    if prompt.x.ndim != 2 or not jnp.issubdtype(prompt.x.dtype, jnp.integer):
        raise ValueError(f"prompt.x is {prompt.x.dtype}{list(prompt.x.shape)}: need tokens, integers [B, T]")
    x, hidden = jnp.asarray(prompt.x), jnp.zeros_like(prompt.y)
    counts = np.asarray(prompt.weights) > 0
    fed = counts[:, :-1] & (np.asarray(prompt.y)[:, :-1] == np.asarray(prompt.x)[:, 1:])
    for place in np.flatnonzero(fed.any(0)):
        own = predictor(x, hidden)[:, place]
        x = x.at[:, place + 1].set(jnp.where(fed[:, place], own, x[:, place + 1]))
    return predictor(x, hidden)
