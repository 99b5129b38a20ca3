"""Any mask of any shape in any call: rows and tiled are dense, with all gradients, whatever hypothesis thinks of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import jaxattn.core.attend as ja
from jaxattn import attend

SMALL = st.integers(0, 9)
IDS = st.lists(st.integers(-1, 3), min_size=24, max_size=24).map(np.array)
ATOMS = st.one_of(
    st.just(ja.Causal()),
    st.builds(ja.Window, SMALL, SMALL),
    st.builds(ja.Sinks, SMALL),
    st.builds(ja.Documents, IDS),
    st.builds(lambda n: ja.Lengths(np.asarray(n)), SMALL),
    st.builds(ja.Dilated, st.integers(1, 4)),
    st.builds(ja.Chunked, st.integers(1, 6)),
    st.builds(ja.Prefix, SMALL),
    st.builds(lambda a, b: ja.PerHead((ja.Window(a), ja.Causal(), ja.Window(b, 2), ja.Sinks(a))), SMALL, SMALL),
)
MASKS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a: ~a, inner),
    ),
    max_leaves=3,
)
PARTS = {
    "softmax": {"score_maps": (ja.SoftCap(3.0),), "bias": ja.Alibi(np.float32([0.1, 0.2, 0.3, 0.4]))},
    "sink": {
        "normalize": ja.Softmax(np.float32([0, 1, -1, 2])),
        "bias": ja.RelativeBias(np.ones((4, 4), np.float32), 9),
    },
    "elu": {
        "normalize": ja.Elu1(True),
        "score": ja.NegativeDistance(0.1),
        "bias": ja.Bias(np.ones((20, 1), np.float32)),
    },
}


@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(
    mask=MASKS,
    lengths=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    block=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    heads=st.sampled_from([(4, 4, 4), (4, 2, 1), (4, 1, 2)]),
    batch=st.sampled_from([(), (2,), (1, 2)]),
    parts=st.sampled_from(sorted(PARTS)),
    scattered=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rows_and_tiled_are_dense(mask, lengths, block, heads, batch, parts, scattered, seed):
    rng = np.random.default_rng(seed)
    (t, s), (n, k, kv) = lengths, heads
    shapes = (*batch, t, n, 3), (*batch, s, k, 3), (*batch, s, kv, 2), (*batch, t, n, 2), (*batch, t, n)
    query, key, value, d_out, d_lse = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    places = [None, None]
    if scattered:
        places = [rng.permutation(24)[:size].astype(np.int32) - (rng.random(size) < 0.2) * 24 for size in (t, s)]
        places = [jnp.asarray(np.maximum(place, -1), jnp.int32) for place in places]

    def call(implementation):
        def run(query, key, value, options):
            options = options | {"mask": mask, "query_positions": places[0], "key_positions": places[1]}
            out, extras = attend(
                query, key, value, return_lse=True, block=block, implementation=implementation, **options
            )
            return out, extras["lse"]

        results, pull = jax.vjp(run, query, key, value, PARTS[parts])
        return results, pull((d_out, d_lse))

    dense, *others = jax.jit(lambda: [call(name) for name in ("dense", "rows", "tiled")])()
    assert not any(np.isnan(x).any() for x in jax.tree.leaves(dense) if x.dtype != jax.dtypes.float0)
    for other in others:
        for x, y in zip(*map(jax.tree.leaves, (other, dense)), strict=True):
            if x.dtype != jax.dtypes.float0:  # sums of at most B·N·T·S terms near 1, both signs, in another order
                size = max(1, np.abs(y).max(where=np.isfinite(y), initial=0))
                bound = 10 * np.sqrt(2 * n * t * s) * np.finfo(np.float32).eps * size
                np.testing.assert_allclose(x, y, rtol=0, atol=bound)
