"""Three nested softmaxes: their shares, the saddle that they start at, and the flow down from it, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import icl

SIZES = [(8, 16, 1), (8, 16, 4), (1, 2, 1), (5, 3, 5)]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def by_hand(logits, items, labels, burst):
    """(loss, its gradient) of the formulas as they are written, and the chain rule."""
    beta, alpha, xi = logits
    q = np.exp(beta) / (np.exp(beta) + items)
    p = burst * np.exp(alpha * q) / (burst * np.exp(alpha * q) + 2 * items + 1 - burst)
    r = np.exp(xi * p) / (np.exp(xi * p) + labels - 1)
    of_p = -(1 - r) * xi * p * (1 - p)
    return -np.log(r), np.array([of_p * alpha * q * (1 - q), of_p * q, -(1 - r) * p])


@pytest.mark.parametrize("sizes", SIZES)
def test_loss_and_gradient_are_those_of_the_formulas(sizes):
    loss = icl.NestedSoftmaxes(*sizes)
    for logits in np.random.default_rng(0).normal(size=(20, 3)) * 3:
        value, slope = by_hand(logits, *sizes)
        np.testing.assert_allclose(loss(logits), value, rtol=1e-12)
        np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(logits)), slope, rtol=1e-10, atol=1e-14)
    many = np.random.default_rng(1).normal(size=(4, 2, 3))
    np.testing.assert_allclose(loss(many)[3, 1], loss(many[3, 1]), rtol=1e-14)


def test_logits_of_0_are_uniform_attention_and_chance():
    shares = icl.NestedSoftmaxes(8, 16, 4).shares(jnp.zeros(3))
    np.testing.assert_allclose(shares, [1 / 9, 4 / 17, 1 / 16], rtol=1e-14)
    np.testing.assert_allclose(icl.NestedSoftmaxes(8, 16, 4)(jnp.zeros(3)), np.log(16), rtol=1e-14)


@pytest.mark.parametrize("sizes", SIZES)
def test_where_a_later_logit_is_0_earlier_ones_have_no_slope(sizes):
    slope = jax.grad(icl.NestedSoftmaxes(*sizes))
    assert slope(jnp.array([0.7, 0.0, 2.0]))[0] == 0
    assert (slope(jnp.array([0.7, 1.3, 0.0]))[:2] == 0).all()
    assert slope(jnp.zeros(3))[2] < 0


def test_large_logits_stay_finite():
    loss = icl.NestedSoftmaxes(8, 16)
    for logits in ([1e4, 1e4, 1e4], [-1e4, -1e4, -1e4], [1e4, 1e4, -1e4]):
        assert np.isfinite(loss(jnp.array(logits)))
        assert np.isfinite(jax.grad(loss)(jnp.array(logits))).all()


def test_the_flow_of_a_bowl_is_exponential_and_of_order_4():
    """θ' = −a θ: θ = e^(−a t), and an error that falls 16-fold with twice the steps."""
    rates = jnp.array([0.5, 2.0])

    def bowl(x):
        return (rates * x**2).sum() / 2

    exact = np.exp(-np.asarray(rates) * 3)
    errors = [abs(icl.gradient_flow(bowl, jnp.ones(2), 3.0, n).logits[-1] - exact).max() for n in (40, 80)]
    assert 14 < errors[0] / errors[1] < 18
    path = icl.gradient_flow(bowl, jnp.ones(2), 3.0, 300)
    assert path.time[0] == 0
    assert path.time[-1] == pytest.approx(3.0)
    np.testing.assert_allclose(path.loss[-1], bowl(exact), rtol=1e-8)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        icl.gradient_flow(bowl, jnp.ones(2), 3.0, 0)
    with pytest.raises(ValueError, match="time must be positive, got -1"):
        icl.gradient_flow(bowl, jnp.ones(2), -1.0)


def test_times_are_the_first_at_which_a_share_is_left():
    flow = icl.Flow(jnp.arange(4.0), jnp.zeros((4, 1)), jnp.array([2.0, 1.8, 0.9, 1.2]))
    assert [float(flow.when(share)) for share in (1.0, 0.9, 0.5, 0.1)] == [0, 1, 2, np.inf]
    lost = icl.Flow(jnp.arange(3.0), jnp.zeros((3, 1)), jnp.array([2.0, 1.0, jnp.nan]))
    assert lost.when(0.5) == 1
    assert np.isnan(lost.when(0.1))  # the path ended in NaN: whether the loss would have been so low is not known


def test_the_flow_waits_and_then_falls_at_once_in_the_order_of_use():
    """8 items, 16 labels: the loss keeps nine tenths until 75, and falls from half to a tenth within 2."""
    flow = icl.gradient_flow(icl.NestedSoftmaxes(8, 16), jnp.zeros(3), 120.0, 6000)
    assert (np.diff(flow.loss) <= 1e-12).all()
    high, half, low = (float(flow.when(share)) for share in (0.9, 0.5, 0.1))
    assert high == pytest.approx(75, abs=1)
    assert half == pytest.approx(90, abs=1)
    assert low == pytest.approx(92, abs=1)
    beta, alpha, xi = flow.logits[np.searchsorted(flow.time, high)]
    assert xi > alpha > beta > 0


def test_sizes_that_are_none_are_refused():
    with pytest.raises(ValueError, match="labels must be at least 2, got 1"):
        icl.NestedSoftmaxes(8, 1)
    with pytest.raises(ValueError, match="burst is 9 of 8 items: need at most as many"):
        icl.NestedSoftmaxes(8, 4, 9)
