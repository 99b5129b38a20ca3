"""No predictor reads its answer or what comes after: not in order to break a tie, nor by a rounding error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import icl
from jaxattn.core.merged import LinearSelfAttention, SoftmaxHeads
from jaxattn.icl.predict import Predictor

D, N, B = 2, 6, 3
NORMAL = jax.random.normal(jax.random.key(0), (3, D + 1, D + 1))
SIGNS = icl.FunctionTask(icl.Conjunction(), icl.Planted(icl.Signs(D)), N, noise=0.1)
PREDICTORS = {
    "zero": icl.Zero(),
    "averaging": icl.Averaging(),
    "least squares": icl.LeastSquares(),
    "ridge": icl.Ridge(0.1),
    "ridge with a covariance": icl.Ridge(0.1, jnp.array([[2.0, 1.0], [1.0, 1.0]])),
    "lasso": icl.Lasso(0.1),
    "gradient descent": icl.GradientDescent(0.1, 3),
    "preconditioned": icl.Preconditioned(0.1 * jnp.stack([jnp.eye(D)] * 2), 0.1 * jnp.stack([jnp.eye(D)] * 2)),
    "debiased": icl.DebiasedDescent(0.1),
    "newton": icl.Newton(3),
    "network": icl.NetworkByAdam(hidden=4, steps=5),
    "neighbours": icl.KNearestNeighbours(2),
    "neighbours by cosine": icl.KNearestNeighbours(2, "cosine"),
    "majority": icl.MajorityLabel(),
    "tree": icl.GreedyTree(2),
    "tree with a threshold": icl.GreedyTree(2, 0.0),
    "Bayes": icl.BayesFinite.of(SIGNS),
    "GF(2)": icl.GF2Parity(),
    "linear layers": icl.LinearLayers((LinearSelfAttention(0.1 * NORMAL[0], 0.1 * NORMAL[1]),) * 2),
    "linear layers, running": icl.LinearLayers((LinearSelfAttention(0.1 * NORMAL[0], 0.1 * NORMAL[1], "running"),) * 2),
    "softmax layer": icl.SoftmaxLayer(SoftmaxHeads(NORMAL[:2], NORMAL[2, :2])),
}


def data(kind):
    key, other, for_y = jax.random.split(jax.random.key(3), 3)
    x, y = jax.random.normal(key, (B, N, D)), jax.random.rademacher(for_y, (B, N), float)
    if kind == "continuous":
        return x, jax.random.normal(for_y, (B, N))
    if kind == "tied":
        return jax.random.rademacher(key, (B, N, D), float), y
    return x[:, jax.random.randint(other, (N,), 0, 3)], y  # duplicated: half of the rows are others again


def test_every_predictor_is_tried():
    def kinds(parent):
        return {kind for each in parent.__subclasses__() for kind in (each, *kinds(each))}

    ours = {kind for kind in kinds(Predictor) if kind.__module__.startswith("jaxattn.")}
    assert ours == {type(predictor) for predictor in PREDICTORS.values()}


@pytest.mark.parametrize("kind", ["continuous", "tied", "duplicated"])
@pytest.mark.parametrize("name", PREDICTORS)
def test_an_answer_does_not_change_when_what_comes_after_does(name, kind):
    assert icl.leaks(PREDICTORS[name], *data(kind)) == 0


def test_a_tie_between_splits_is_not_broken_by_a_later_example():
    """Both coordinates split the first two examples as well; the last example moved in rank among all of them."""
    x, y = jnp.array([[[0, 1], [1, 0], [0.2, 0.3], [5, -5]]]), jnp.array([[0.0, 1.0, 0.0, 0.0]])
    for last in (jnp.array([5, -5]), jnp.array([-5, -5]), jnp.array([-5, 5]), jnp.array([0.1, 0.2])):
        for depth in (1, 2):
            tree = icl.GreedyTree(depth)
            np.testing.assert_array_equal(tree(x.at[0, 3].set(last), y)[:, :3], tree(x, y)[:, :3])
    assert icl.GreedyTree(1)(x, y)[0, 2] == 0  # the first coordinate: 0.2 is below 0.5


def test_what_reads_a_tie_later_on_leaks():
    """A rank among all rows, by which one of two equal examples is chosen: `leaks` finds it by flipping signs."""

    def tied(x, y):
        above = (x[:, :, None, 0] > x[:, None, :, 0]).sum(-1)  # of all rows
        return jnp.where(above % 2 == 0, 0.0, 1.0)

    assert icl.leaks(tied, *data("continuous")) > 0
