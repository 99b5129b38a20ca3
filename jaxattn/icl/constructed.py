"""Attention layers with weights written by hand: they take gradient steps, and continue sequences as they did before.

Each is a predictor or circuit of merged layers, whose weights can be trained, perturbed or looked at like any other.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.core.attend.mask import Causal
from jaxattn.core.checks import as_ids, check_static_int
from jaxattn.core.merged import LinearSelfAttention, SoftmaxHeads
from jaxattn.core.part import part
from jaxattn.icl.layers import LinearLayers, SoftmaxLayer

Form = Literal["von oswald", "ahn", "zhang"]


def _blocks(x: Float[Array, "d d"], y: Float[Array, ""] | float) -> Float[Array, "e e"]:
    """Returns diag(x, y)."""
    x = jnp.asarray(x)
    return jnp.zeros((len(x) + 1, len(x) + 1), x.dtype).at[:-1, :-1].set(x).at[-1, -1].set(y)


def one_gradient_step(dim: int, step: Float[Array, ""] | float, form: Form = "ahn") -> LinearLayers:
    """The layer of linear self-attention that is `GradientDescent(step)`, in the form of one of three papers.

    - "von oswald": W_K = W_Q = diag(I, 0) and W_V = step · diag(0, −1); the answer is minus the label (2023);
    - "ahn": P = diag(0, 1), Q = −step · diag(I, 0); the answer is minus the label (2023);
    - "zhang": W_KQ = diag(I, 0), W_PV = step · diag(0, 1) and the query is a key, which adds nothing to the label, for
      its own is 0; the answer is the label (2024).

    Args:
        dim: The number of coordinates of x, at least 1.
        step: The step size.
        form: One of the three above.

    Raises:
        TypeError: `dim` is not an int.
        ValueError: `dim` is below 1, or `form` is another.
    """
    check_static_int("one_gradient_step", "dim", dim, 1)
    eye, zero = jnp.eye(dim), jnp.zeros((dim, dim))
    if form == "von oswald":
        return LinearLayers((LinearSelfAttention(_blocks(eye, 0), step * _blocks(zero, -1)),), negate=True)
    if form == "ahn":
        return preconditioned_steps(step * eye)
    if form == "zhang":
        layer = LinearSelfAttention(_blocks(eye, 0), step * _blocks(zero, 1), mask_query=False)
        return LinearLayers((layer,))
    raise ValueError(f"one_gradient_step: form is {form!r}: need one of {get_args(Form)}")


def preconditioned_steps(
    gammas: Float[Array, "*l d d"], transforms: Float[Array, "l d d"] | None = None
) -> LinearLayers:
    """The L layers that are L steps of `Preconditioned(gammas, transforms)`: P_l = diag(B_l, 1), Q_l = −diag(Γ_lᵀ, 0).

    After l layers the label of example j is its residual y_j − w_l·x_j, and that of the question −w_l·x (Ahn et al.,
    2023). With transforms B_l the steps are GD++ (von Oswald et al., 2023).

    Args:
        gammas: Γ, [d, d] or [L, d, d].
        transforms: B, [L, d, d].

    Raises:
        ValueError: Shapes do not fit.
    """
    shape = jnp.shape(gammas)
    if len(shape) not in (2, 3) or shape[-1] != shape[-2]:
        raise ValueError(f"preconditioned_steps: gammas has shape {shape}: need [d, d] or [L, d, d]")
    if transforms is not None and jnp.shape(transforms) != shape:
        raise ValueError(f"preconditioned_steps: transforms has shape {jnp.shape(transforms)}: need {shape}")
    gammas = jnp.reshape(gammas, (-1, *shape[-2:]))
    moves = jnp.zeros_like(gammas) if transforms is None else jnp.reshape(transforms, gammas.shape)
    pairs = zip(gammas, moves, strict=True)
    layers = tuple(LinearSelfAttention(-_blocks(gamma.T, 0), _blocks(move, 1)) for gamma, move in pairs)
    return LinearLayers(layers, negate=True)


def debiased_gradient_step(
    dim: int, step: Float[Array, ""] | float, omega: Float[Array, ""] | float = 0.01
) -> SoftmaxLayer:
    """Two softmax heads with scores ± omega x_j·x and values ± step / (2 omega) y_j, nearly `DebiasedDescent(step)`.

    Σ_h μ_h = 0 takes ȳ away and Σ_h μ_h ω_h = step. Odd orders remain, so the error is O(omega²), and rounding errors
    are 1 / omega times as large (He et al., 2025).

    Args:
        dim: The number of coordinates of x, at least 1.
        step: The step size.
        omega: The size of the scores.

    Raises:
        TypeError: `dim` is not an int.
        ValueError: `dim` is below 1.
    """
    check_static_int("debiased_gradient_step", "dim", dim, 1)
    signs = jnp.array([1.0, -1.0])
    kq = jnp.stack([sign * omega * _blocks(jnp.eye(dim), 0) for sign in signs])
    ov = jnp.zeros((2, dim + 1)).at[:, -1].set(signs * step / (2 * omega))
    return SoftmaxLayer(SoftmaxHeads(kq, ov))


def superposed_gradient_steps(
    tasks: int, block: int, step: Float[Array, ""] | float, omega: Float[Array, ""] | float = 0.01
) -> SoftmaxLayer:
    """M + 1 softmax heads that take a debiased gradient step on each of M tasks, as of `BlockwiseLinear`.

    Head h has the score Σ_m ω_hm x_{j,S_m}·x_{S_m} and the values μ_h ∈ R^M on y_j ∈ R^M. To first order that is the
    M steps if Σ_h μ_h = 0 and Σ_h μ_h ω_hᵀ = step · I, which M heads cannot do and the corners of a simplex do: ω_h is
    `omega` times a corner and μ_h is parallel to it. The error is O(omega) (superposition, He et al., 2025).

    Args:
        tasks: M, at least 1.
        block: The number of coordinates of each task, at least 1.
        step: The step size.
        omega: The size of the scores.

    Raises:
        TypeError: `tasks` or `block` is not an int.
        ValueError: `tasks` or `block` is below 1.
    """
    check_static_int("superposed_gradient_steps", "tasks", tasks, 1)
    check_static_int("superposed_gradient_steps", "block", block, 1)
    # Its columns are an orthonormal basis of the vectors in R^(M + 1) that sum to 0, so for its rows, the corners,
    # Σ_h c_h = 0 and Σ_h c_h c_hᵀ = I.
    centred = jnp.eye(tasks + 1) - 1 / (tasks + 1)
    corners = jnp.linalg.svd(centred)[0][:, :tasks]
    scores = jnp.pad(jnp.repeat(omega * corners, block, axis=1), ((0, 0), (0, tasks)))
    values = step / omega * jax.vmap(jnp.diag)(corners)
    ov = jnp.pad(values, ((0, 0), (0, 0), (tasks * block, 0)))
    return SoftmaxLayer(SoftmaxHeads(jax.vmap(jnp.diag)(scores), ov))


@part
class InductionCircuit:
    """Two causal layers of softmax heads that add to a residual stream, from tokens to scores of the next token.

    The stream holds [token | position | previous token | output], one-hot. `induction_head` makes the circuit.
    """

    layers: tuple[SoftmaxHeads, ...]
    vocabulary: int
    length: int

    def streams(self, tokens: Int[Array, "*b t"]) -> list[Float[Array, "*b t d"]]:
        """Returns the residual stream before each layer and after the last. Tokens outside the vocabulary are NaN.

        Raises:
            ValueError: The sequence has more tokens than the circuit has positions.
        """
        if tokens.shape[-1] > self.length:
            raise ValueError(f"tokens has {tokens.shape[-1]} positions: need at most {self.length}")
        tokens = as_ids(tokens)
        inside = (tokens >= 0) & (tokens < self.vocabulary)
        symbols = jnp.where(inside[..., None], jax.nn.one_hot(tokens, self.vocabulary), jnp.nan)
        places = jnp.broadcast_to(jnp.eye(self.length)[: tokens.shape[-1]], (*tokens.shape, self.length))
        streams = [jnp.concatenate([symbols, places, jnp.zeros((*tokens.shape, 2 * self.vocabulary))], -1)]
        for layer in self.layers:
            streams.append(streams[-1] + layer(streams[-1], streams[-1], mask=Causal()))
        return streams

    def __call__(self, tokens: Int[Array, "*b t"]) -> Float[Array, "*b t v"]:
        """Returns how much each symbol was seen after earlier occurrences of the current one: shares that sum to 1."""
        return self.streams(tokens)[-1][..., -self.vocabulary :]

    def weights(self, tokens: Int[Array, "*b t"]) -> list[Float[Array, "*b h t t"]]:
        """Returns the attention weights of each layer."""
        pairs = zip(self.layers, self.streams(tokens)[:-1], strict=True)
        return [layer.weights(z, z, mask=Causal()) for layer, z in pairs]


def induction_head(vocabulary: int, length: int, beta: Float[Array, ""] | float = 50.0) -> InductionCircuit:
    """The circuit that completes [A][B] ... [A] with [B] (Olsson et al., 2022).

    In layer 1, position t attends to t − 1 with the score beta, and writes the token there into the slot of the
    previous token. In layer 2, the current token attends with the score beta where that slot holds the same token, and
    writes the tokens found there into the output. Scores other than these are 0.

    Sequences need a first token that never comes again: position 0 has none before it, attends to itself, and would
    pass for the successor of its own token.

    Args:
        vocabulary: The number of symbols, at least 1.
        length: The number of positions, at least 1.
        beta: The score.

    Raises:
        TypeError: A size is not an int.
        ValueError: A size is below 1.
    """
    check_static_int("induction_head", "vocabulary", vocabulary, 1)
    check_static_int("induction_head", "length", length, 1)
    width = 3 * vocabulary + length
    symbol = jnp.arange(vocabulary)
    token, place = symbol, vocabulary + jnp.arange(length)
    previous, output = vocabulary + length + symbol, 2 * vocabulary + length + symbol
    nothing = jnp.zeros((1, width, width))
    before = SoftmaxHeads(
        kq=nothing.at[0, place[:-1], place[1:]].set(beta),
        ov=nothing.at[0, previous, token].set(1),
    )
    again = SoftmaxHeads(
        kq=nothing.at[0, previous, token].set(beta),
        ov=nothing.at[0, output, token].set(1),
    )
    return InductionCircuit((before, again), vocabulary, length)
