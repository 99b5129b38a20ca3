"""What heads can represent, against simulation, enumeration and constructions, in float64."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import attend
from jaxattn.icl import capacity


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def sphere(rng, *shape):
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def stochastic(rng, count):
    scores = np.exp(rng.normal(size=(count, count)))
    return scores / scores.sum(-1, keepdims=True)


def weights_of(x, maps):
    query, key = (x @ each for each in maps)
    return attend(query[:, None], key[:, None], jnp.eye(len(x))[:, None])[:, 0]


# Head size.


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("width", [8, 12])
def test_any_weights_of_n_keys_are_met_by_head_dim_n_minus_1_and_not_by_less(count, width):
    rng = np.random.default_rng(count)
    x, weights = jnp.asarray(rng.normal(size=(count, width))), jnp.asarray(stochastic(rng, count))
    assert capacity.head_dim_for(weights) == count - 1
    for head_dim in range(max(count - 2, 1), count + 3):
        error = abs(weights_of(x, capacity.maps_for_weights(x, weights, head_dim)) - weights).max()
        assert error < 1e-12 if head_dim >= count - 1 else error > 1e-3


def test_weights_of_low_rank_need_no_more():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(7, 2)) @ rng.normal(size=(2, 7)) + rng.normal(size=(7, 1))  # the last term is not seen
    weights = jax.nn.softmax(jnp.asarray(scores), -1)
    assert capacity.head_dim_for(weights) == 2
    x = jnp.asarray(rng.normal(size=(7, 9)))
    np.testing.assert_allclose(weights_of(x, capacity.maps_for_weights(x, weights, 2)), weights, rtol=0, atol=1e-12)
    assert capacity.head_dim_for(jnp.full((5, 5), 0.2)) == 0


def test_what_no_head_can_be_is_refused():
    weights = jnp.full((4, 4), 0.25)
    with pytest.raises(ValueError, match="weights has numbers that are not positive"):
        capacity.head_dim_for(jnp.eye(4))
    with pytest.raises(ValueError, match=r"x has shape \(4, 3\) and weights \(4, 4\): need"):
        capacity.maps_for_weights(jnp.ones((4, 3)), weights, 2)
    with pytest.raises(ValueError, match="head_dim must be at least 1, got 0"):
        capacity.maps_for_weights(jnp.ones((4, 4)), weights, 0)


# Counts.


@pytest.mark.parametrize(("heads", "context"), [(1, 1), (1, 5), (2, 5), (4, 5), (8, 5), (4, 10)])
def test_the_rank_of_what_heads_read_is_what_they_can_memorise(heads, context):
    rng = np.random.default_rng(0)
    queries = heads * (context + 1) + 4
    query, key, value = (jnp.asarray(rng.normal(size=(length, heads, 16))) for length in (queries, context, context))
    read = np.asarray(attend(query, key, value)).reshape(queries, -1)
    sizes = np.linalg.svd(read, compute_uv=False)
    assert (sizes > 1e-9 * sizes[0]).sum() == capacity.memorised(heads, context)


# Heads of rank 1, of two points.


def hard_heads(rng, queries, keys, samples):
    points, target = sphere(rng, samples, 2, keys.shape[-1]), sphere(rng, samples, keys.shape[-1])
    chosen = ((points @ keys.T) * (target @ queries.T)[:, None]).argmax(1)  # [samples, heads]
    return np.take_along_axis(points, chosen[..., None], 1), points, target


@pytest.mark.parametrize("dim", [2, 3, 8])
def test_products_of_heads_of_rank_1_are_their_means_over_points(dim):
    rng = np.random.default_rng(dim)
    queries, keys = sphere(rng, 2, 4, dim)
    read, *_ = hard_heads(rng, queries, keys, 40_000)
    for i, j in itertools.combinations_with_replacement(range(4), 2):
        values = (read[:, i] * read[:, j]).sum(-1)
        expected = capacity.rank_one_product(queries[i], keys[i], queries[j], keys[j])
        # An arcsin at 1 turns a rounding error of 1e-16 into one of 1e-8.
        assert abs(values.mean() - expected) <= 5 * values.std() / 200 + 1e-7


def test_products_with_the_nearer_point_and_the_best_sum_of_heads_are_those_of_simulation():
    rng = np.random.default_rng(1)
    queries, keys = sphere(rng, 2, 6, 2)
    read, points, target = hard_heads(rng, queries, keys, 40_000)
    nearer = np.take_along_axis(points, (points @ target[..., None]).argmax(1)[:, None], 1)[:, 0]
    values = (read * nearer[:, None]).sum(-1)
    targets = capacity.rank_one_target(queries, keys)
    assert (abs(values.mean(0) - targets) <= 5 * values.std(0) / 200).all()
    products = capacity.rank_one_product(queries[:, None], keys[:, None], queries, keys)
    best = np.linalg.solve(np.asarray(products), np.asarray(targets))
    errors = ((np.einsum("shd,h->sd", read, best) - nearer) ** 2).sum(-1)
    assert abs(errors.mean() - capacity.combination_error(products, targets)) <= 5 * errors.std() / 200
    with pytest.raises(ValueError, match="query has 3 coordinates and key 3: need 2, the plane"):
        capacity.rank_one_target(jnp.ones(3), jnp.ones(3))


# Sparse distributed memory.


@pytest.mark.parametrize(("bits", "radius"), [(1, 0), (1, 1), (6, 2), (8, 3), (8, 8)])
def test_overlaps_are_counted_by_enumeration(bits, radius):
    addresses = np.array(list(itertools.product([0, 1], repeat=bits)))
    for distance, log in enumerate(capacity.log_overlap(bits, radius)):
        other = np.arange(bits) < distance
        count = ((addresses.sum(1) <= radius) & ((addresses != other).sum(1) <= radius)).sum()
        assert np.exp(log) == pytest.approx(count, rel=1e-12)


@pytest.mark.parametrize(("bits", "radius"), [(64, 15), (64, 5), (63, 31)])
def test_overlaps_are_the_size_of_a_ball_less_a_sum_over_odd_distances(bits, radius):
    """Another formula of the paper, in whole numbers."""
    ball = sum(math.comb(bits, a) for a in range(radius + 1))
    for distance, log in enumerate(capacity.log_overlap(bits, radius)):
        odd = range(1, distance + 1, 2)
        lost = sum(
            math.comb(j - 1, (j - 1) // 2) * math.comb(bits - j, radius - (j - 1) // 2)
            for j in odd
            if radius >= (j - 1) // 2
        )
        assert np.exp(log) == pytest.approx(ball - lost, rel=1e-9)


@pytest.mark.parametrize(("radius", "beta", "share"), [(5, 32.9, 0.970), (11, 19.3, 0.965), (15, 13.8, 0.949)])
def test_the_log_of_the_overlap_is_nearly_linear_in_the_cosine(radius, beta, share):
    """Over all distances at which there is one, of 64 bits: its slope, and the share of the variance explained."""
    log = capacity.log_overlap(64, radius)
    log, cosine = log[log > -np.inf], 1 - 2 * np.arange(2 * radius + 1) / 64
    slope, offset = np.polyfit(cosine, log, 1)
    assert slope == pytest.approx(beta, abs=0.06)
    assert 1 - (log - slope * cosine - offset).var() / log.var() == pytest.approx(share, abs=0.001)
