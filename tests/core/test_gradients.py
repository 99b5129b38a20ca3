"""Gradients against finite differences in float64: reverse mode everywhere, forward mode through dense and rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BY_HEAD
from jax.test_util import check_grads

from jaxattn import Alibi, Bias, Causal, Dot, Explicit, Partial, Sigmoid, Softmax, attend, merge

T, S = 6, 7
HOLES = Explicit(jnp.asarray(BY_HEAD[:, :T, :S])) & ~(Causal() & ~Causal())


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


CASES = {
    "softmax": (Dot(np.float64(0.6)), Bias(normal(1, T, S - 1, seed=4)), Softmax(normal(4, seed=5))),
    "sigmoid": (Dot(np.float64(0.6)), Alibi(abs(normal(4, seed=6))), Sigmoid()),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("implementation", "modes"), [("dense", ("fwd", "rev")), ("rows", ("fwd", "rev")), ("tiled", ("rev",))]
)
def test_gradients_are_finite_differences(name, implementation, modes):
    """Of (out, lse) in every array, with rows that see nothing (their lse is −∞, a constant, or the null logit)."""
    arrays = normal(T, 4, 4, seed=1), normal(S, 2, 4, seed=2), normal(S, 1, 3, seed=3)

    @jax.jit
    def call(query, key, value, parts):
        score, bias, normalize = parts
        options = {"score": score, "bias": bias, "normalize": normalize, "mask": HOLES, "return_lse": True}
        out, extras = attend(query, key, value, block=(4, 3), implementation=implementation, **options)
        return out, jnp.where(jnp.isneginf(extras["lse"]), 0, extras["lse"])

    with jax.enable_x64(True):
        assert (call(*arrays, CASES[name])[0] == 0).all(-1).any()
        check_grads(call, (*arrays, CASES[name]), order=1, modes=modes)


@pytest.mark.parametrize("modes", ["fwd", "rev"])
def test_gradients_of_merge_are_finite_differences(modes):
    with jax.enable_x64(True):
        a, b = ((jnp.asarray(normal(3, 2, 4, seed=seed)), jnp.asarray(normal(3, 2, seed=seed + 1))) for seed in (1, 3))
        b = b[0], b[1].at[0].set(-jnp.inf)  # a constant: the difference quotient there has no meaning

        @jax.jit
        def call(a, b_out, b_lse):
            merged = merge(Partial(*a), Partial(b_out, jnp.concatenate([b[1][:1], b_lse])))
            return merged.out, merged.lse

        check_grads(call, (a, b[0], b[1][1:]), order=1, modes=(modes,))
