"""Every score under every normaliser: shapes, sums of rows, what a mask hides, and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import Causal, Dot, Entmax15, Sigmoid, Softmax, Sparsemax
from jaxattn.core.attend import (
    Additive,
    Bilinear,
    Elu1,
    LinearWeights,
    Location,
    NegativeDistance,
    Neural,
    PairSum,
    Relu,
    ReluSquared,
    TopK,
    attend,
    attention_weights,
)

T, N, H = 5, 2, 4
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


SCORES = {
    "dot": Dot(),
    "distance": NegativeDistance(),
    "general": Bilinear(normal(N, H, H)),
    "additive": Additive(normal(H, 3), normal(H, 3), normal(3)),
    "network": Neural(normal(2 * H, 6), normal(6), normal(6)),
    "sum": PairSum(normal(N, H), normal(N, H)),
    "location": Location(normal(T, H)),
}
SUM_TO_ONE = {
    "softmax": Softmax(),
    "entmax": Entmax15(),
    "sparsemax": Sparsemax(),
    "top 2": TopK(2),
    "relu": Relu(normalized=True),
    "relu squared": ReluSquared(normalized=True),
    "elu + 1": Elu1(normalized=True),
    "sigmoid, normalised": Sigmoid(normalized=True),
}
DO_NOT = {
    "off by one": Softmax(null_logit=jnp.zeros(N)),
    "sigmoid": Sigmoid(-1.5),
    "linear": LinearWeights(normalized=False),
}
QUERY, KEY, VALUE = normal(T, N, H), normal(T, N, H), normal(T, N, 3)


@pytest.mark.parametrize("name", [*SUM_TO_ONE, *DO_NOT])
def test_rows_are_weights_of_visible_keys_and_gradients_are_finite_behind_a_mask(name):
    normalize = (SUM_TO_ONE | DO_NOT)[name]

    @jax.jit
    def all_scores(query, key, value):
        weights = {
            kind: attention_weights(query, key, score=s, normalize=normalize, mask=Causal())[0]
            for kind, s in SCORES.items()
        }
        read = {
            kind: attend(query, key, value, score=s, normalize=normalize, mask=Causal()) for kind, s in SCORES.items()
        }
        return weights, read

    hidden = KEY.at[-1].set(jnp.nan), VALUE.at[-1].set(jnp.nan)  # the last key is seen by the last query alone
    weights, read = all_scores(QUERY, *hidden)
    for kind in SCORES:
        w, out = np.asarray(weights[kind]), np.asarray(read[kind])
        assert w.shape == (N, T, T)
        assert out.shape == (T, N, 3)
        assert (w[:, :-1][:, ~np.tri(T, dtype=bool)[:-1]] == 0).all()
        np.testing.assert_allclose(out[:-1], np.einsum("nts,snv->tnv", w[:, :-1, :-1], VALUE[:-1]), atol=1e-5)
        sums = w[:, :-1].sum(-1)
        if name in SUM_TO_ONE:  # rectified scores may all be 0
            rectified = name.startswith("relu") and sums.min() == 0
            np.testing.assert_allclose(np.where(sums == 0, 1, sums) if rectified else sums, 1, rtol=1e-5)
        elif name == "off by one":
            assert (sums < 1).all()

    slopes = jax.jit(jax.grad(lambda *x: sum(r[:-1].sum() for r in all_scores(*x)[1].values()), (0, 1, 2)))(
        QUERY, *hidden
    )
    assert all(bool(jnp.isfinite(x[:-1]).all()) for x in slopes)
    assert not any(bool(x[-1].any()) for x in slopes)
