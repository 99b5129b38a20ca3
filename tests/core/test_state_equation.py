"""Softmax, linear attention, a state-space model and a gated RNN are one state equation with different entries."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import lambertw

from jaxattn.core.linear import (
    Elu1Features,
    StateEquation,
    attention_equation,
    gated_rnn_equation,
    mixing_matrix,
    normalized_equation,
    softmax_equation,
    state_space_equation,
)

B, T, N, H, V = 2, 19, 3, 4, 5
QUERY, KEY, VALUE, GATE, OTHER = (
    np.random.default_rng(seed).normal(size=shape)
    for seed, shape in enumerate([(B, T, N, H)] * 2 + [(B, T, N, V)] + [(B, T, N)] * 2)
)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-9 * abs(np.asarray(expected)).max())


def causal(weights):
    """Rows over the keys so far, normalised."""
    weights = weights * np.tri(T)
    return weights / weights.sum(-1, keepdims=True)


def test_linear_attention_is_a_state_without_decay():
    phi, psi = (np.where(x > 0, x + 1, np.exp(x)) for x in (QUERY, KEY))
    weights = causal(np.einsum("btnk,bsnk->bnts", phi, psi))
    equation = attention_equation(Elu1Features(), QUERY, KEY, VALUE)
    assert_close(equation()[0], np.einsum("bnts,bsnv->btnv", weights, VALUE))
    assert_close(equation.matrix(), weights)


def test_softmax_is_the_limit_of_states_that_grow():
    """Within the error of the series in a weight and in the sum of its row; the state is C(H + P, P) per column."""
    query = QUERY / 3
    scores = np.einsum("btnk,bsnk->bnts", query, KEY) / H**0.5
    exact, total = causal(np.exp(scores)), (np.exp(scores) * np.tri(T)).sum(-1, keepdims=True)
    worst = []
    for degree in (2, 4, 6):
        equation = softmax_equation(query, KEY, VALUE, degree)
        assert equation.state_size == math.comb(H + degree, degree) * (V + 1)
        error = abs(scores) ** (degree + 1) * np.exp(abs(scores)) / math.factorial(degree + 1) * np.tri(T)
        of_row = error.sum(-1, keepdims=True)
        assert (of_row < total).all()
        matrix = np.asarray(equation.matrix())
        assert (abs(matrix - exact) <= (error + exact * of_row) / (total - of_row) + 1e-12).all()
        assert_close(equation()[0], np.einsum("bnts,bsnv->btnv", matrix, VALUE))
        worst.append(abs(matrix - exact).max())
    assert worst[0] > worst[1] > worst[2]


@pytest.mark.parametrize("rising", [True, False])
def test_a_normaliser_without_the_query_is_a_decay(rising):
    log_normalizer = np.logaddexp.accumulate(GATE, axis=1) if rising else GATE
    equation = normalized_equation(QUERY, KEY, VALUE, log_normalizer)
    weights = np.einsum("btnk,bsnk->bnts", QUERY, KEY) * np.tri(T)
    weights = weights * np.exp(-np.moveaxis(log_normalizer, -1, 1))[..., None]
    assert_close(equation()[0], np.einsum("bnts,bsnv->btnv", weights, VALUE))
    assert_close(equation.matrix(), weights)
    if rising:  # then it is the equation of the paper: Λ = η_{t−1} / η_t, and the query as it was
        assert_close(np.exp(equation.log_decay[:, 1:]), np.exp(-np.diff(log_normalizer, axis=1)))
        assert_close(equation.query, QUERY)


def test_a_selective_scan_is_its_recurrence():
    step, rate, skip = np.logaddexp(0, GATE), np.arange(1.0, H + 1)[None] * np.ones((N, 1)), np.arange(1.0, N + 1)
    h, y = np.zeros((B, N, H)), np.zeros((B, T, N, 1))
    for t in range(T):
        h = np.exp(-step[:, t, :, None] * rate) * h + (step * OTHER)[:, t, :, None] * KEY[:, t]
        y[:, t, :, 0] = (QUERY[:, t] * h).sum(-1) + skip * OTHER[:, t]
    equation = state_space_equation(step, rate, KEY, QUERY, OTHER, skip)
    assert_close(equation()[0], y)
    assert equation.state_size == H


def test_a_gated_rnn_is_its_recurrence():
    h, y = np.zeros((B, N)), np.zeros((B, T, N, 1))
    for t in range(T):
        h = h / (1 + np.exp(-GATE[:, t])) + VALUE[:, t, :, 0] / (1 + np.exp(-OTHER[:, t]))
        y[:, t, :, 0] = h
    equation = gated_rnn_equation(GATE, OTHER, VALUE[..., 0])
    assert_close(equation()[0], y)
    assert_close(equation(form="step")[0], y)


def test_a_selective_scan_with_rate_one_is_a_gated_rnn_that_writes_what_it_forgets():
    """exp(−softplus(x)) = σ(−x): the forget gate; and the input gate is softplus(x) = −log of it."""
    one = np.ones((B, T, N, 1))
    scan = state_space_equation(np.logaddexp(0, GATE), np.ones((N, 1)), one, one, OTHER)
    gated = gated_rnn_equation(-GATE, np.zeros_like(GATE), OTHER)
    assert_close(scan.log_decay[..., 0], gated.log_decay)
    tied = gated._replace(key=-gated.log_decay[..., None])
    assert_close(scan()[0], tied()[0])


def test_attention_and_the_scan_coincide_where_their_couplings_do():
    """η_{t−1} / η_t = e^{−a Δ_t} and 1 / η_t = Δ_t: so Δ_t e^{a Δ_t} = Δ_{t−1}, which Lambert's W solves."""
    step, a = [0.8], 0.3
    for _ in range(T - 1):
        step.append(float(lambertw(a * step[-1]).real) / a)
    step = np.broadcast_to(np.asarray(step)[None, :, None], (B, T, N))
    scan = state_space_equation(step, np.full((N, H), a), KEY, QUERY, VALUE[..., 0])
    attention = normalized_equation(QUERY, KEY, VALUE[..., :1], -np.log(step))
    assert_close(np.exp(attention.log_decay[:, 1:]), np.exp(scan.log_decay[:, 1:, :, 0]))
    assert_close(attention()[0], scan()[0])


def test_the_matrix_is_the_product_of_decays_between_write_and_read():
    decay = np.exp(-np.logaddexp(0, QUERY))
    equation = StateEquation(QUERY, KEY, VALUE, np.log(decay))
    expected = np.zeros((B, N, T, T))
    for i in range(T):
        for j in range(i + 1):
            kept = decay[:, j + 1 : i + 1].prod(1)
            expected[:, :, i, j] = (QUERY[:, i] * kept * KEY[:, j]).sum(-1)
    assert_close(equation.matrix(), expected)
    assert_close(equation.matrix(), mixing_matrix(QUERY, KEY, log_decay=jnp.log(decay)))
    first, state = equation._replace(**{name: getattr(equation, name)[:, :7] for name in equation._fields[:4]})()
    rest, _ = equation._replace(**{name: getattr(equation, name)[:, 7:] for name in equation._fields[:4]})(state)
    assert_close(np.concatenate([first, rest], 1), np.einsum("bnts,bsnv->btnv", expected, VALUE))
