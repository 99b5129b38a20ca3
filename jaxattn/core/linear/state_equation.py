"""One state equation for attention, state-space models and gated recurrences, as the Dynamical Systems Framework has it
(Understanding the differences in foundation models, Sieber et al., 2024):

    h_t = Λ_t h_{t−1} + B_t u_t,    y_t = C_t h_t + D_t u_t

A state h [K, V] holds K numbers for each of the V channels of the input, Λ is a diagonal over K, B_t u_t is key_t
value_tᵀ and C_t reads with the query. `linear_attention` computes this equation. The functions here give its arguments
for a mechanism in its own terms, so that mechanisms can be compared: how the decay and the size of the write depend on
each other, and how large the state is.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.core.linear.api import LinearState, append_one, divide, linear_attention, mixing_matrix
from jaxattn.core.linear.feature import Features, TaylorFeatures


class StateEquation(NamedTuple):
    """h_t = diag(e^{log_decay_t}) h_{t−1} + key_t value_tᵀ,  y_t = h_tᵀ query_t + skip ⊙ value_t.

    Attributes:
        query: [..., T, N, K].
        key: [..., T, N, K].
        value: [..., T, N, V].
        log_decay: [..., T, N] or [..., T, N, K].
        skip: Anything that broadcasts against the values, or None.
        divided: The last of the V columns is a normaliser that depends on the query, which no decay can stand for. y is
            the other columns over it.
    """

    query: Float[Array, "*b t n k"]
    key: Float[Array, "*b t n k"]
    value: Float[Array, "*b t n v"]
    log_decay: Float[Array, "..."] | None = None
    skip: Float[Array, "..."] | None = None
    divided: bool = False

    def __call__(
        self, state: LinearState | None = None, **options: Any
    ) -> tuple[Float[Array, "*b t n v"], LinearState]:
        """Computes the equation by `linear_attention`.

        Args:
            state: The state to start from.
            **options: Other arguments of `linear_attention`, such as `form` and `segment_ids`.

        Returns:
            A pair (y, last state).
        """
        query, key, value, log_decay, skip, divided = self
        y, state = linear_attention(query, key, value, log_decay=log_decay, state=state, **options)
        if skip is not None:
            y = y + skip * value
        return divide(y) if divided else y, state

    def matrix(self) -> Float[Array, "*b n t t"]:
        """Returns A_ij = C_i (Π_{s = j+1 .. i} Λ_s) B_j, with y_i = Σ_j A_ij u_j apart from the skip.

        Rows are normalised if `divided`.
        """
        matrix = mixing_matrix(self.query, self.key, log_decay=self.log_decay)
        return divide(jnp.concatenate([matrix, matrix.sum(-1, keepdims=True)], -1)) if self.divided else matrix

    @property
    def state_size(self) -> int:
        """The numbers of the state per head, K V."""
        return self.key.shape[-1] * self.value.shape[-1]


def attention_equation(
    features: Features, query: Float[Array, "*b t n h"], key: Float[Array, "*b t n h"], value: Float[Array, "*b t n v"]
) -> StateEquation:
    """Σ_{j ≤ t} φ(q_t)·ψ(k_j) v_j / Σ_{j ≤ t} φ(q_t)·ψ(k_j): no decay, and a normaliser that depends on the query."""
    phi, psi = features(query, key)
    return StateEquation(phi, psi, append_one(value), divided=True)


def softmax_equation(
    query: Float[Array, "*b t n h"], key: Float[Array, "*b t n h"], value: Float[Array, "*b t n v"], degree: int
) -> StateEquation:
    """Softmax attention, whose state is infinite, cut off at tensor powers of the key of some degree P.

    exp(s) = Σ_p s^p / p! with s = q·k / √H: an error of at most |s|^{P+1} e^{|s|} / (P + 1)! per weight before
    division, for a state of C(H + P, P) numbers per value channel.
    """
    return attention_equation(TaylorFeatures(degree), query, key, value)


def normalized_equation(
    query: Float[Array, "*b t n k"],
    key: Float[Array, "*b t n k"],
    value: Float[Array, "*b t n v"],
    log_normalizer: Float[Array, "*b t n"],
) -> StateEquation:
    """Σ_{j ≤ t} (q_t·k_j) v_j / η_t for a normaliser η > 0 that does not depend on the query, as a decay:

        Λ_t = η_{t−1} / η_t,    B_t u_t = k_t v_tᵀ / η_t,    C_t = q_t

    Normalised attention of the paper makes η_t = e^{w · u_t} of the input. With the running sum of a latent's weights
    the equation is Latte. Where η falls, Λ would be above 1: the decay has only the rises of log η, and the query the
    rest, so that the state is larger by as much and y the same.

    Args:
        query: [..., T, N, K].
        key: [..., T, N, K].
        value: [..., T, N, V].
        log_normalizer: log η, [..., T, N].
    """
    rises = jnp.maximum(jnp.diff(log_normalizer, axis=-2, prepend=log_normalizer[..., :1, :]), 0)
    risen = log_normalizer[..., :1, :] + jnp.cumsum(rises, -2)
    query = query * jnp.exp(risen - log_normalizer)[..., None]
    return StateEquation(query, key * jnp.exp(-risen)[..., None], value, -rises)


def state_space_equation(
    step: Float[Array, "*b t n"],
    rate: Float[Array, "n k"],
    write: Float[Array, "*b t n k"],
    read: Float[Array, "*b t n k"],
    signal: Float[Array, "*b t n"],
    skip: Float[Array, " n"] | None = None,
) -> StateEquation:
    """Mamba's selective scan, a head per channel and V = 1: Λ_t = e^{−Δ_t a}, B_t u_t = Δ_t B s_t, C_t, D.

    The step couples decay and input: a token that forgets much writes much.

    Args:
        step: Δ ≥ 0, [..., T, N].
        rate: a ≥ 0, [N, K].
        write: B, [..., T, N, K].
        read: C, [..., T, N, K].
        signal: s, [..., T, N].
        skip: D, [N] or None.
    """
    log_decay = -step[..., None] * rate
    skip = None if skip is None else skip[:, None]
    return StateEquation(read, write * step[..., None], signal[..., None], log_decay, skip)


def gated_rnn_equation(
    forget: Float[Array, "*b t n"], write: Float[Array, "*b t n"], signal: Float[Array, "*b t n"]
) -> StateEquation:
    """A gated RNN that is linear in its state (quasi-LSTM): h_t = σ(f_t) h_{t−1} + σ(i_t) u_t and y = h.

    The state is one number per channel. Decay and input do not depend on each other.

    Args:
        forget: f, the logits of the forget gate, [..., T, N].
        write: i, the logits of the input gate, [..., T, N].
        signal: u, [..., T, N].
    """
    one = jnp.ones((*signal.shape, 1), signal.dtype)
    return StateEquation(one, jax.nn.sigmoid(write)[..., None], signal[..., None], jax.nn.log_sigmoid(forget))
