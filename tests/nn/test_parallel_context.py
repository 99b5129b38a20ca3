"""A store whose keys begin anew in each piece: one call reads what pieces that were encoded apart would give."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from multi_head import randomise

from jaxattn import Causal, attend
from jaxattn.cache import AtPieces, HeavyHitters, Policy
from jaxattn.core.attend import READER, SHARED, Pieces, piece_places
from jaxattn.nn import MultiHeadAttention, Tokens

B, D, N, K = 2, 16, 4, 2
IDS = np.array([SHARED] * 2 + [0] * 5 + [1] * 3 + [2] * 4 + [READER] * 3)
P, MORE = len(IDS), 2  # tokens beyond the table are readers too
X = jnp.asarray(np.random.default_rng(0).standard_normal((B, P + MORE, D)), jnp.float32)
EPS = float(np.finfo(np.float32).eps)


def assert_same(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=300 * EPS * abs(np.asarray(expected)).max())


@nnx.jit
def read(module, x, store, positions, mask):
    return module(x, Tokens.of(x, positions=positions, mask=mask), None, store)


def test_pieces_in_one_row_are_pieces_that_were_read_apart():
    """Each behind the prefix, by a module without any of this; readers attend to all of their keys, as they stood."""
    module = randomise(MultiHeadAttention(D, N, key_heads=K, mask=Causal(), rngs=nnx.Rngs(0)))
    mask = Pieces(jnp.asarray(IDS))
    policy = Policy(key_position=AtPieces(jnp.asarray(IDS)))

    store, pieces, first = module.init_state(B, P + MORE, policy), [], 0
    for size in (4, 10, 1, 2, 1, 1):  # pieces of calls are no pieces of context
        y, store = read(module, X[:, first : first + size], store, jnp.arange(first, first + size), mask)
        pieces.append(y)
        first += size
    y = np.concatenate(pieces, 1)

    prefix, keys, values = IDS == SHARED, [], []
    for piece in range(3):
        rows = np.flatnonzero(prefix | (piece == IDS))
        apart, _ = module(X[:, rows])
        assert_same(y[:, rows], apart)
        key, value = module.keys_and_values(X[:, rows])
        skip = 0 if piece == 0 else prefix.sum()
        keys.append(module.turn(key, jnp.arange(len(rows)))[:, skip:])
        values.append(value[:, skip:])
    rows = np.arange(P - 3, P + MORE)
    places = jnp.arange(7, 7 + len(rows))  # behind the prefix and the longest piece
    np.testing.assert_array_equal(piece_places(jnp.asarray(IDS))[P - 3 :], places[:3])
    key, value = module.keys_and_values(X[:, rows])
    keys, values = jnp.concatenate([*keys, module.turn(key, places)], 1), jnp.concatenate([*values, value], 1)
    z = attend(module.turn(module.queries(X[:, rows]), places), keys, values, mask=Causal(),
               query_positions=jnp.asarray(rows), key_positions=jnp.arange(P + MORE))  # fmt: skip
    assert_same(y[:, rows], module.merge(z, X[:, rows]))


def test_one_piece_is_the_plain_text_and_evicting_keeps_the_places():
    """Also where the rows of a batch have other pieces, and heads keep other tokens."""
    module = randomise(MultiHeadAttention(D, N, key_heads=K, mask=Causal(), rngs=nnx.Rngs(0)))
    one = jnp.asarray(np.stack([np.where(IDS >= 0, 0, IDS), np.full(P, READER)]))
    for policy in (Policy(), Policy(HeavyHitters(1, 2), 8)):
        pieces = Policy(policy.retain, policy.slots, key_position=AtPieces(one))
        stores = [module.init_state(B, P, each) for each in (policy, pieces)]
        for first, last in ((0, 12), (12, 13), (13, 14), (14, P)):
            x, at = X[:, first:last], jnp.arange(first, last)
            plain, stores[0] = read(module, x, stores[0], at, None)
            y, stores[1] = read(module, x, stores[1], at, Pieces(one))
            assert_same(y, plain)
