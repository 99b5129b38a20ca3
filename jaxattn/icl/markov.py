"""Random Markov chains as a language that must be learned in context, and their Bayes predictor in closed form."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxattn.core.checks import as_ids, check_all_positive, check_static_int
from jaxattn.core.part import part
from jaxattn.icl.prompt import Prompt


@part
class MarkovChain:
    """BOS s₁ s₂ ...: each prompt from its own random chain over V states; the next token is asked for everywhere.

    P(s_t | the `order` states before) is one of V^order rows, each ~ Dirichlet(concentration, ..., concentration)
    (`hidden`, [B, V^order, V]); the first `order` states are uniform. States are 0 .. V − 1 and BOS is V.

    Attributes:
        states: V, at least 1.
        length: The number of tokens, at least 1.
        order: The number of states that the next one depends on, at least 0.
        concentration: The parameter of the Dirichlet prior, positive.

    Raises:
        TypeError: `states`, `length` or `order` is not an int.
        ValueError: `states` or `length` is below 1, `order` is negative, or `concentration` is not positive.
    """

    states: int
    length: int
    order: int = 1
    concentration: Float[Array, ""] | float = 1.0

    def __post_init__(self):
        check_static_int("MarkovChain", "states", self.states, 1)
        check_static_int("MarkovChain", "length", self.length, 1)
        check_static_int("MarkovChain", "order", self.order, 0)
        check_all_positive("MarkovChain", "concentration", self.concentration)

    def with_length(self, length: int) -> "MarkovChain":
        """Returns the same task with prompts of another length."""
        return dataclasses.replace(self, length=length)

    def sample(self, key: PRNGKeyArray, batch: int) -> Prompt:
        string, rows = jax.vmap(self._one)(jax.random.split(key, batch))
        x = jnp.pad(string[:, :-1], ((0, 0), (1, 0)), constant_values=self.states)
        return Prompt(x, string, jnp.ones(string.shape), string, rows)

    def _one(self, key: PRNGKeyArray) -> tuple[Int[Array, " t"], Float[Array, "c v"]]:
        for_rows, for_states = jax.random.split(key)
        contexts = self.states**self.order
        rows = jax.random.dirichlet(for_rows, jnp.full(self.states, self.concentration), (contexts,))

        def step(context: Array, drawn: tuple[Array, Array]) -> tuple[Array, Array]:
            index, noise = drawn
            logits = jnp.where(index < self.order, 0, jnp.log(rows[context]))
            state = (logits + noise).argmax(-1)
            return (context * self.states + state) % contexts, state

        noise = jax.random.gumbel(for_states, (self.length, self.states))
        _, string = jax.lax.scan(step, jnp.zeros((), int), (jnp.arange(self.length), noise))
        return string, rows


@part
class MarkovBayes:
    """log P(next token | tokens so far) under a Dirichlet prior: log (n_cj + α) / (n_c + V α), [B, T, V].

    n_cj counts how often state j followed the last `order` states before, and n_c is its sum over j. This is the Bayes
    predictor of the `MarkovChain` of the same order and concentration α. Order 0 counts states alone: the answer of a
    model that has learned how frequent each is (the unigram), a phase on the way to order 1.

    After a token that is neither a state nor BOS (V) the answers are NaN.

    In attention's terms the predictor has uniform weights on the earlier positions with the same context, and reads the
    tokens that followed there.

    Attributes:
        states: V, at least 1.
        order: The order of the chain, at least 0.
        concentration: α, positive.
    """

    states: int
    order: int = 1
    concentration: Float[Array, ""] | float = 1.0

    def __post_init__(self):
        check_static_int("MarkovBayes", "states", self.states, 1)
        check_static_int("MarkovBayes", "order", self.order, 0)
        check_all_positive("MarkovBayes", "concentration", self.concentration)

    def __call__(self, x: Int[Array, "b t"], y: Int[Array, "b t"]) -> Float[Array, "b t v"]:
        x, index = as_ids(x), jnp.arange(x.shape[1])
        contexts = x[:, jnp.maximum(index[:, None] - jnp.arange(self.order), 0)]
        whole = index >= self.order  # whether the context is of states alone
        same = (contexts[:, :, None] == contexts[:, None]).all(-1) & whole & whole[:, None] & (index < index[:, None])
        followed = jax.nn.one_hot(x[:, 1:], self.states)
        counts = jnp.einsum("bts,bsv->btv", same[..., :-1].astype(followed.dtype), followed) + self.concentration
        strange = jax.lax.cummax(((x < 0) | (x > self.states)).astype(jnp.int32), axis=1)
        return jnp.where(strange[..., None] > 0, jnp.nan, jnp.log(counts / counts.sum(-1, keepdims=True)))
