"""Keys that are read in pieces, or a prefix that is read once for a batch, give what one call gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import Alibi, Causal, Sigmoid, SoftCap, Softmax, Window, attend
from jaxattn.core.attend import attend_cascade, attend_split

B, T, P, S, N, K = 3, 2, 5, 7, 4, 2
EPS = float(np.finfo(np.float32).eps)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


QUERY, NULL = normal(B, T, N, 4, seed=1), normal(N, seed=2)
PREFIX, OWN = (
    (normal(*shape, K, 4, seed=seed), normal(*shape, 1, 3, seed=seed + 1)) for shape, seed in (((P,), 3), ((B, S), 5))
)
AT = np.array([[8, 9], [5, 6], [11, -1]])  # the place of each query in the whole
PLACES = np.where(np.arange(S) < np.array([5, 2, 7])[:, None], P + np.arange(S), -1)
D_OUT, D_LSE = normal(B, T, N, 3, seed=7), normal(B, T, N, seed=8)
OPTIONS = {
    "plain": {"mask": Causal()},
    "window": {"mask": Causal() & Window(4), "bias": Alibi.geometric(N), "score_maps": (SoftCap(2.0),)},
    "null": {"mask": Causal(), "normalize": Softmax(NULL, 0.7)},
}


def assert_close(got, expected):
    """Within 200 roundings of the largest: a dozen keys, in a few merged sums."""
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(got), finite)
    atol = 200 * EPS * max(1.0, abs(np.asarray(expected)[finite]).max(initial=0))
    np.testing.assert_allclose(np.asarray(got)[finite], np.asarray(expected)[finite], rtol=0, atol=atol)


def with_gradients(call, *arrays):
    def results(*arrays):
        out, extras = call(*arrays)
        return out, extras["lse"]

    values, pull = jax.vjp(results, *arrays)
    cotangents = D_OUT, jnp.where(jnp.isfinite(values[1]), D_LSE, 0)
    return [*values, *jax.tree.leaves(pull(cotangents))]


@pytest.mark.parametrize("name", OPTIONS)
def test_a_shared_prefix_is_a_prefix_of_every_row(name):
    """Values and gradients; that of the prefix is the sum over the rows, which are ragged. A query is padding."""
    options = OPTIONS[name] | {"return_lse": True}

    @jax.jit
    def shared(query, prefix, own):
        return attend_cascade(query, prefix, *own, query_positions=AT, key_positions=PLACES, **options)

    @jax.jit
    def repeated(query, prefix, own):
        whole = (jnp.concatenate([jnp.broadcast_to(x, (B, *x.shape)), y], 1) for x, y in zip(prefix, own, strict=True))
        places = np.concatenate([np.tile(np.arange(P), (B, 1)), PLACES], 1)
        return attend(query, *whole, query_positions=AT, key_positions=places, implementation="dense", **options)

    for got, expected in zip(*(with_gradients(f, QUERY, PREFIX, OWN) for f in (shared, repeated)), strict=True):
        assert_close(got, expected)


def test_nothing_behind_the_prefix_is_the_prefix_alone():
    places = np.full((B, S), -1)
    held = (np.full_like(x, np.nan) for x in OWN)
    out = attend_cascade(QUERY, PREFIX, *held, query_positions=AT, key_positions=places, mask=Causal())
    assert_close(out, attend(QUERY, *(np.tile(x, (B, 1, 1, 1)) for x in PREFIX), query_positions=AT, mask=Causal()))


@pytest.mark.parametrize("name", OPTIONS)
def test_the_number_of_splits_does_not_matter(name):
    """From one piece to one key each, where some pieces and one whole row hold nothing that is seen."""
    options = OPTIONS[name] | {"return_lse": True, "query_positions": AT - 5, "key_positions": PLACES - 5}
    whole = with_gradients(lambda *x: attend(*x, implementation="dense", **options), QUERY, *OWN)
    for splits in (1, 2, 3, S):
        got = with_gradients(lambda *x, n=splits: attend_split(*x, splits=n, **options), QUERY, *OWN)
        for x, expected in zip(got, whole, strict=True):
            assert_close(x, expected)


def test_a_split_per_key_is_softmax_by_definition():
    query, key, value = QUERY[0, :1, :1], OWN[0][0, :, :1], OWN[1][0]
    scores = key[:, 0].astype(float) @ query[0, 0] / 2
    weights = np.exp(scores) / np.exp(scores).sum()
    assert_close(attend_split(query, key, value, splits=S)[0, 0], weights @ value[:, 0])


def test_what_does_not_merge_is_refused():
    at = {"query_positions": AT, "key_positions": PLACES}
    for call, error, message in (
        (lambda: attend_split(QUERY, *OWN, splits=0), ValueError, "splits is 0 of 7 keys: need from 1 to 7"),
        (lambda: attend_split(QUERY, *OWN, splits=2.0), TypeError, r"splits must be an int, got 2\.0"),
        (lambda: attend_split(QUERY, *OWN, splits=2, normalize=Sigmoid()), ValueError, "normalize is Sigmoid, whose"),
        (
            lambda: attend_split(QUERY, *OWN, splits=2, key_positions=np.zeros((B, S, K), int)),
            ValueError,
            r"key_positions has shape \(3, 7, 2\): need \[\.\.\., 7\]",
        ),
        (lambda: attend_cascade(QUERY, PREFIX, *OWN, **at, measures={"x": 1}), ValueError, "measures is given, which"),
        (lambda: attend_cascade(QUERY, OWN, *OWN, **at), ValueError, r"prefix has keys \(3, 7, 2, 4\) and query has"),
    ):
        with pytest.raises(error, match=message):
            call()
