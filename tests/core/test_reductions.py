"""The settings in which a score, bias, map or normaliser is another one: the reductions of the papers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattn.core.attend as ja
from jaxattn import Partial, attend, merge, part

B, T, S, N, H = 2, 6, 8, 4, 4
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


QUERY, KEY, VALUE = normal(B, T, N, H), normal(B, S, 2, H), normal(B, S, 2, H)
MASK = ja.Causal() & ~ja.Sinks(1)  # the first row sees nothing
call = partial(attend, QUERY, KEY, VALUE, mask=MASK, return_lse=True)
PLAIN = jax.tree.map(np.asarray, call())
EPS = 100 * np.finfo(np.float32).eps


def assert_same(a, b, atol=EPS):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        size = max(1, np.abs(y).max(where=np.isfinite(y), initial=0))
        np.testing.assert_allclose(x, y, rtol=0, atol=atol * size)


EYE = np.eye(N, dtype=np.float32)
IDENTITY = np.zeros((N, 3, 5), np.float32)
IDENTITY[:, -1, 2] = 1
GROUPS = np.arange(S) % 3

# name: arguments under which attend is plain softmax attention, out and lse
PLAIN_WHEN = {
    "Dot with its scale": {"score": ja.Dot(H**-0.5)},
    "Bilinear with I/√H": {"score": ja.Bilinear(np.eye(H, dtype=np.float32) / np.sqrt(H))},
    "a bias of 0": {"bias": ja.Bias(np.zeros((T, S), np.float32))},
    "a bias of 0 buckets": {"bias": ja.RelativeBias(np.zeros((N, 8), np.float32), 20)},
    "a key bias of 0": {"bias": ja.KeyBias(np.zeros((1, S), np.float32))},
    "a very wide log window": {"bias": ja.LogGaussian(np.zeros((1, T), np.float32), 1e6)},
    "a very high cap": {"score_maps": (ja.SoftCap(1e5),)},
    "an infinite cap": {"score_maps": (ja.SoftCap(float("inf")),)},
    "temperature 1": {"score_maps": (ja.Temperature(1.0),)},
    "heads mixed by the identity": {"score_maps": (ja.MixHeads(EYE),), "weight_maps": (ja.MixHeads(EYE),)},
    "identity kernels": {"score_maps": (ja.Convolution(IDENTITY),), "weight_maps": (ja.Convolution(IDENTITY[:1]),)},
    "the largest S weights": {"weight_maps": (ja.TopKWeights(S),)},
    "nothing dropped": {"weight_maps": (ja.DropTopK(4, 0.0, jax.random.key(0)),)},
    "a very wide window": {"weight_maps": (ja.GaussianWindow(np.zeros((1, T), np.float32), 1e6),)},
    "a null logit of −∞": {"normalize": ja.Softmax(np.full(N, -np.inf, np.float32))},
    "a softmax temperature of 1": {"normalize": ja.Softmax(temperature=1.0)},
    "the largest S scores": {"normalize": ja.TopK(S)},
}


@pytest.mark.parametrize("name", PLAIN_WHEN)
def test_it_is_plain_softmax_attention(name):
    assert_same(call(**PLAIN_WHEN[name]), PLAIN)


# name: two sets of arguments that mean the same
SAME = {
    "temperature is scale": ({"score_maps": (ja.Temperature(2.0),)}, {"score": ja.Dot(H**-0.5 / 2)}),
    "temperature is softmax's": (
        {"score_maps": (ja.Temperature(np.arange(1.0, 5, dtype=np.float32)),)},
        {"normalize": ja.Softmax(temperature=np.arange(1.0, 5, dtype=np.float32))},
    ),
    "Alibi is a bias of distances": (
        {"bias": ja.Alibi(np.float32([0.1, 0.2, 0.3, 0.4]))},
        {
            "bias": ja.Bias(
                -np.float32([0.1, 0.2, 0.3, 0.4])[:, None, None] * abs(np.arange(T)[:, None] - np.arange(S)).astype("f")
            )
        },
    ),
    "a key bias is a bias": (
        {"bias": ja.KeyBias(np.arange(S, dtype=np.float32)[None] / 5)},
        {"bias": ja.Bias(np.arange(S, dtype=np.float32) / 5)},
    ),
    "negative distance is a dot product and a key bias": (
        {"score": ja.NegativeDistance(0.5)},
        {"score": ja.Dot(1.0), "bias": ja.KeyBias(-np.square(np.repeat(KEY, 2, 2)).sum(-1).swapaxes(1, 2) / 2)},
    ),
    "without its LeakyReLU a pair sum does not see the query": (
        {"score": ja.PairSum(np.ones(H, np.float32), np.float32([0.5, -1, 0.2, 0.3]), 1.0)},
        {"score": ja.PairSum(np.zeros(H, np.float32), np.float32([0.5, -1, 0.2, 0.3]), 1.0)},
    ),
    "one kernel for keys is a dot product with convolved keys": (
        {"mask": None, "score_maps": (ja.Convolution(np.float32([[[0.5, 1.0, -0.3]]])),)},
        {
            "mask": None,
            "key": 0.5 * np.pad(KEY, [(0, 0), (1, 0), (0, 0), (0, 0)])[:, :-1]
            + KEY
            - 0.3 * np.pad(KEY, [(0, 0), (0, 1), (0, 0), (0, 0)])[:, 1:],
        },
    ),
    "one kernel for queries is a dot product with convolved queries": (
        {"mask": None, "score_maps": (ja.Convolution(np.float32([[[0.4], [1.0]]])),)},
        {"mask": None, "query": 0.4 * np.pad(QUERY, [(0, 0), (1, 0), (0, 0), (0, 0)])[:, :-1] + QUERY},
    ),
    "the largest score alone is the limit of cold": (
        {"normalize": ja.TopK(1)},
        {"normalize": ja.Softmax(temperature=1e-6)},
    ),
    "normalised sigmoid of very negative scores is softmax": ({"normalize": ja.Sigmoid(-30.0, True)}, {}),
    "all keys in one group: its mass scales the row": (
        {"weight_maps": (ja.Reallocate(np.zeros(S, np.int32), np.float32([0.25]), 1),)},
        {"normalize": ja.Softmax(), "scale_out": 0.25},
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_two_ways_to_say_it(name):
    results = []
    for options in SAME[name]:
        options = {"mask": MASK, "query": QUERY, "key": KEY} | options
        factor = options.pop("scale_out", 1.0)
        results.append(factor * attend(options.pop("query"), options.pop("key"), VALUE, **options))
    # −30 in a sigmoid rounds scores to 30 epsilons, and leaves e^(max s − 30) of the next term.
    assert_same(*results, atol=4 * EPS)


def test_a_permutation_of_heads_permutes_scores_and_not_values():
    order = np.array([2, 0, 3, 1])
    mixed = call(score_maps=(ja.MixHeads(EYE[order]),))
    key, value = np.repeat(KEY, 2, 2)[:, :, order], np.repeat(VALUE, 2, 2)
    out, extras = attend(QUERY[:, :, order], key, value, mask=MASK, return_lse=True)
    assert_same(mixed, (out, extras))


def test_graph_attention_ranks_keys_alike_for_every_query_and_a_network_does_not():
    """Veličković's score is static: LeakyReLU is monotone. The order after the sum breaks that (GATv2)."""

    def order(score):
        _, extras = attend(QUERY, KEY, VALUE, score=score, measures={"top": ja.TopWeights(S)})
        return np.asarray(extras["top"][1])  # [B, T, N, S]

    static = order(ja.PairSum(normal(N, H), normal(N, H)))
    assert (static == static[:, :1]).all()
    dynamic = order(ja.Neural(normal(2 * H, 16), normal(16), normal(16)))
    assert (dynamic != dynamic[:, :1]).any()


def test_equal_vectors_of_zero_average_the_neighbours():
    zero = np.zeros(H, np.float32)
    out = attend(QUERY, KEY, VALUE, score=ja.PairSum(zero, zero))
    assert_same(out, np.repeat(VALUE, 2, 2).mean(1, keepdims=True).repeat(T, 1))


def test_location_ignores_what_keys_hold():
    score = ja.Location(normal(S, H))
    assert_same(attend(QUERY, KEY, VALUE, score=score), attend(QUERY, 7 + 0 * KEY, VALUE, score=score))


def test_a_network_can_be_a_sum_of_absolute_values():
    """|q₀ − k₀| = relu(q₀ − k₀) + relu(k₀ − q₀): a score of the distance, which no dot product gives."""
    w1 = np.zeros((2 * H, 2), np.float32)
    w1[0], w1[H] = (1, -1), (-1, 1)
    score = ja.Neural(w1, np.zeros(2, np.float32), np.float32([-3, -3]))
    apart = abs(QUERY[:, :, :, None, 0] - np.repeat(KEY, 2, 2)[:, None, :, :, 0].swapaxes(-1, -2))  # [B, T, N, S]
    assert_same(
        attend(QUERY, KEY, VALUE, score=score, mask=MASK),
        attend(0 * QUERY, KEY, VALUE, bias=ja.Bias(-3 * apart.swapaxes(1, 2)), mask=MASK),
    )


def test_the_first_query_has_no_past_to_discount():
    plain, temporal = call(mask=None), call(mask=None, score_maps=(ja.Temporal(),))
    assert_same(temporal[0][:, 0], plain[0][:, 0])
    assert np.abs(temporal[0][:, 1:] - plain[0][:, 1:]).max() > 0.01


def test_under_temporal_attention_equal_queries_are_uniform_after_the_first():
    query = QUERY[:, :1].repeat(T, 1)
    out = attend(query, KEY, VALUE, score_maps=(ja.Temporal(),))
    # e_t / Σ_{j<t} e_j = 1 / (t − 1), whatever the key.
    assert_same(out[:, 1:], np.repeat(VALUE, 2, 2).mean(1, keepdims=True).repeat(T - 1, 1))


def test_a_constant_on_a_keys_scores_changes_only_the_first_query_that_sees_it():
    bias = ja.KeyBias(np.where(np.arange(S) == 3, 2.0, 0)[None].astype(np.float32))
    a, b = (attend(QUERY, KEY, VALUE, mask=ja.Causal(), bias=x, score_maps=(ja.Temporal(),)) for x in (None, bias))
    changed = np.abs(a - b).max((0, 2, 3)) > EPS
    np.testing.assert_array_equal(changed, np.arange(T) == 3)


def test_reallocate_merges_the_groups_under_new_masses():
    """o' = Σ_g m'_g o_g, with o_g the attention over group g alone; and a bias of log m'_g / m_g."""
    masses = np.float32([0.2, 0.7, 0.1])
    groups = [MASK & ja.Explicit(np.broadcast_to(g == GROUPS, (1, T, S))) for g in range(3)]
    outs = [attend(QUERY, KEY, VALUE, mask=mask) for mask in groups]
    moved = attend(QUERY, KEY, VALUE, mask=MASK, weight_maps=(ja.Reallocate(GROUPS, masses, 3),))
    rows = np.arange(T) > 3  # those that see all groups
    assert_same(moved[:, rows], sum(m * o for m, o in zip(masses, outs, strict=True))[:, rows])


def test_the_number_of_groups_is_that_of_masses_or_known_ids():
    assert ja.Mass(GROUPS).size == 3
    assert ja.Reallocate(GROUPS, np.ones((N, 1, 5), np.float32)).size == 5
    assert ja.Reallocate(GROUPS, Powers(jnp.float32(1))).size == 3
    with pytest.raises(ValueError, match="Mass: groups is traced, so their number is not known: need size="):
        jax.jit(lambda groups: ja.Mass(groups).size)(GROUPS)


@part
class Powers:
    """m -> mᵗ / Σ mᵗ, as a user would write it: split-softmax is t below 1 for a span and the rest."""

    power: jax.Array

    def __call__(self, masses):
        raised = jnp.where(masses > 0, jnp.where(masses > 0, masses, 1) ** self.power, 0)
        return raised / jnp.where(raised.sum(-1, keepdims=True) > 0, raised.sum(-1, keepdims=True), 1)


def test_reallocate_takes_a_function_of_the_masses_and_differentiates_it():
    def out(power):
        return call(weight_maps=(ja.Reallocate(GROUPS, Powers(power), 3),))[0]

    assert_same(out(jnp.float32(1)), PLAIN[0])
    slope = jax.grad(lambda power: out(power)[0, 4].sum())(jnp.float32(1))
    step = 1e-2
    difference = (out(jnp.float32(1 + step))[0, 4].sum() - out(jnp.float32(1 - step))[0, 4].sum()) / (2 * step)
    np.testing.assert_allclose(slope, difference, rtol=0, atol=1e-3)


def test_the_gaussian_window_is_the_bias_without_normalising_again():
    centres = (np.arange(T) * 0.8)[None].astype(np.float32)
    total = {"total": ja.Mass(np.zeros(S, np.int32), 1)}
    windowed, extras = call(weight_maps=(ja.GaussianWindow(centres, 1.5),), mask=None, measures=total)
    biased, _ = call(bias=ja.LogGaussian(centres, 1.5), mask=None)
    assert_same(windowed / extras["total"], biased)
    assert (extras["total"] < 1).all()


@pytest.mark.parametrize("normalize", [ja.Sparsemax(), ja.Entmax15()])
def test_sparse_normalisers_are_one_hot_when_a_key_is_far_ahead_and_uniform_when_none_is(normalize):
    ahead = np.zeros((1, S, 1, 1), np.float32)
    ahead[0, 2] = 2.1  # sparsemax needs a lead of 1, 1.5-entmax of 2
    out = attend(np.ones((1, 1, 1, 1), np.float32), ahead, VALUE[:1, :, :1], normalize=normalize, score=ja.Dot(1.0))
    assert_same(out[0, 0], VALUE[0, 2, :1])
    out = attend(np.ones((1, 1, 1, 1), np.float32), 0 * ahead, VALUE[:1, :, :1], normalize=normalize)
    assert_same(out[0, 0, 0], VALUE[0, :, 0].mean(0))


def test_entmax_lies_between_softmax_and_sparsemax():
    counts = [
        int((np.asarray(ja.attention_weights(QUERY, KEY, score=ja.Dot(2.0), normalize=each)[0]) > 0).sum())
        for each in (ja.Softmax(), ja.Entmax15(), ja.Sparsemax())
    ]
    assert counts[0] == B * N * T * S
    assert counts[0] > counts[1] > counts[2] >= B * N * T


def test_linear_weights_are_linear_attention():
    """out = (Σ_j v_j k_jᵀ) q / √H: one matrix per head, whatever the number of keys."""
    key, value = np.repeat(KEY, 2, 2), np.repeat(VALUE, 2, 2)
    memory = np.einsum("bsnv,bsnh->bnvh", value, key)
    assert_same(
        attend(QUERY, KEY, VALUE, normalize=ja.LinearWeights()),
        np.einsum("bnvh,btnh->btnv", memory, QUERY) / np.sqrt(H),
    )


def test_weights_of_elementwise_normalisers_depend_on_their_own_key_alone():
    other = KEY.copy()
    other[:, 3] += 1
    for normalize in (ja.Sigmoid(), ja.Relu(), ja.ReluSquared(), ja.Elu1(), ja.LinearWeights()):
        weights = [ja.attention_weights(QUERY, key, normalize=normalize)[0] for key in (KEY, other)]
        same = np.abs(weights[0] - weights[1]).max((0, 1, 2)) == 0
        np.testing.assert_array_equal(same, np.arange(S) != 3)


def test_partials_of_disjoint_keys_merge_under_every_position_dependent_part():
    """Any split of the keys, with a bias, a score map and a score that read positions."""
    options = {"bias": ja.RelativeBias(normal(N, 8), 12), "score_maps": (ja.SoftCap(2.0),), "mask": MASK}
    whole = call(**options)

    def part(keys):
        out, extras = attend(
            QUERY, KEY[:, keys], VALUE[:, keys], key_positions=jnp.asarray(keys, jnp.int32), return_lse=True, **options
        )
        return Partial(out, extras["lse"])

    order = np.random.default_rng(1).permutation(S)
    merged = merge(part(order[:3]), merge(part(order[3:4]), part(order[4:])))
    assert_same((merged.out, merged.lse), (whole[0], whole[1]["lse"]))


def test_key_positions_by_head_are_calls_of_single_heads():
    """A cache that has evicted other keys for other heads: each key head has its own positions."""
    places = np.stack([np.random.default_rng(seed).permutation(12)[:S] for seed in range(4)]).reshape(B, 2, S)
    places = np.where(places > 9, -1, places).swapaxes(1, 2).astype(np.int32)  # [B, S, K]
    options = {"mask": ja.Causal() & (ja.Window(3) | ja.Sinks(2)), "bias": ja.Alibi(np.float32([0.1, 0.2, 0.3, 0.4]))}
    for implementation in ("dense", "rows", "tiled"):
        out = attend(QUERY, KEY, VALUE, key_positions=places, implementation=implementation, block=4, **options)
        for b in range(B):
            for k in range(2):
                alone = options | {"bias": ja.Alibi(options["bias"].slopes[2 * k : 2 * k + 2])}
                one = attend(
                    QUERY[b, :, 2 * k : 2 * k + 2], KEY[b, :, k : k + 1], VALUE[b, :, k : k + 1],
                    key_positions=places[b, :, k], **alone,
                )  # fmt: skip
                assert_same(out[b, :, 2 * k : 2 * k + 2], one)


def test_t5_buckets_are_the_published_ones():
    """32 buckets up to distance 128: 0..15 exact, then growing; two directions share them, 16 each."""
    causal = ja.RelativeBias(np.zeros((1, 32), np.float32))
    np.testing.assert_array_equal(causal.bucket(np.arange(17)), [*range(16), 16])
    np.testing.assert_array_equal(causal.bucket(np.array([-5, 127, 128, 1000])), [0, 31, 31, 31])
    both = ja.RelativeBias(np.zeros((1, 32), np.float32), bidirectional=True)
    np.testing.assert_array_equal(
        both.bucket(np.array([0, 7, 8, 127, 500, -1, -7, -500])), [0, 7, 8, 15, 15, 17, 23, 31]
    )
    # 7 of them, up to 45: 0 to 2 exact, then from 3·15^(k/4) on: 3, 5.9, 11.6, 22.9.
    odd = ja.RelativeBias(np.zeros((1, 7), np.float32), 45)
    distances = np.array([0, 1, 2, 3, 5, 6, 11, 12, 22, 23, 45, 100])
    np.testing.assert_array_equal(odd.bucket(distances), [0, 1, 2, 3, 3, 4, 4, 5, 5, 6, 6, 6])


@pytest.mark.parametrize(
    ("make", "exception", "message"),
    [
        (lambda: ja.SoftCap(0.0), ValueError, "SoftCap: cap must be positive, got 0.0"),
        (lambda: ja.Temperature(-1.0), ValueError, "Temperature: temperature must be positive, got -1.0"),
        (lambda: ja.Softmax(temperature=0.0), ValueError, "Softmax: temperature must be positive, got 0.0"),
        (lambda: ja.Gumbel(jax.random.key(0), 0.0), ValueError, "Gumbel: temperature must be positive"),
        (lambda: ja.TopK(0), ValueError, "TopK: k must be at least 1, got 0"),
        (lambda: ja.TopKWeights(2.5), TypeError, "TopKWeights: k must be an int, got 2.5"),
        (lambda: ja.DropTopK(3, 1.0, jax.random.key(0)), ValueError, "DropTopK: rate must be at least 0 and below 1"),
        (lambda: ja.TopWeights(0), ValueError, "TopWeights: k must be at least 1"),
        (lambda: ja.LagProfile(0), ValueError, "LagProfile: lags must be at least 1"),
        (lambda: ja.Mass(GROUPS, 0), ValueError, "Mass: size must be at least 1"),
        (lambda: ja.LogGaussian(np.zeros((1, T), np.float32), -1.0), ValueError, "LogGaussian: sigma must be positive"),
        (
            lambda: call(bias=ja.RelativeBias(np.zeros((N, 7), np.float32), bidirectional=True)),
            ValueError,
            "RelativeBias: table has 7 buckets",
        ),
        (
            lambda: call(score_maps=(ja.MixHeads(np.eye(3, dtype=np.float32)),)),
            ValueError,
            r"MixHeads: weight has shape \(3, 3\): need \(4, 4\)",
        ),
        (
            lambda: call(score_maps=(ja.Convolution(np.zeros((4, 2, 2), np.float32)),)),
            ValueError,
            "Convolution: kernel has shape",
        ),
        (lambda: call(score_maps=(ja.Causal(),)), TypeError, "score_maps must be a tuple of maps such as"),
        (lambda: call(score_maps=ja.SoftCap(5.0)), TypeError, "score_maps must be a tuple of maps such as"),
        (lambda: call(measures=ja.Entropy()), TypeError, "measures must be a dict such as .*, got Entropy"),
        (lambda: call(normalize=ja.Softmax), TypeError, "normalize is the class Softmax: need one of its parts"),
        (lambda: call(score=ja.Dot), TypeError, r"score is the class Dot: need one of its parts, Dot\(...\)"),
        (
            lambda: call(score_maps=(ja.Temperature(np.ones(3, np.float32)),)),
            ValueError,
            r"temperature has shape \(3,\): need one per head, \(4,\)",
        ),
        (
            lambda: call(normalize=ja.Sigmoid(np.ones(3, np.float32))),
            ValueError,
            r"bias has shape \(3,\): need one per head",
        ),
        (
            lambda: call(
                score=ja.Neural(np.zeros((5, 3), np.float32), np.zeros(3, np.float32), np.zeros(3, np.float32))
            ),
            ValueError,
            r"Neural: w1 has shape \(5, 3\)",
        ),
        (
            lambda: call(score_maps=(ja.Temporal(),), implementation="rows"),
            NotImplementedError,
            "'rows' cannot serve score_maps=Temporal: it needs all queries and keys at once",
        ),
        (lambda: call(implementation="fused"), NotImplementedError, "'fused' cannot serve platform cpu"),
        (
            lambda: call(key_positions=np.zeros((B, S, 3), np.int32)),
            ValueError,
            r"key_positions has shape \(2, 8, 3\): by key head need \(2, 8, 2\)",
        ),
    ],
)
def test_what_means_nothing_is_refused(make, exception, message):
    with pytest.raises(exception, match=message):
        make()


SMALL = {
    "normalised sigmoid": {"bias": ja.Bias(np.float32(-60)), "normalize": ja.Sigmoid(normalized=True)},
    "normalised elu": {"bias": ja.Bias(np.float32(-60)), "normalize": ja.Elu1(normalized=True)},
    "a group without mass": {
        "bias": ja.KeyBias(np.where(GROUPS > 0, -60, 0)[None].astype(np.float32)),
        "weight_maps": (ja.Reallocate(GROUPS, np.float32([0.4, 0.3, 0.3])),),
    },
    "the remaining mass is nothing": {
        "bias": ja.KeyBias(np.where(GROUPS > 0, -60, 0)[None].astype(np.float32)),
        "weight_maps": (ja.DropTopK(4, 0.9, jax.random.key(0)),),
    },
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("implementation", ["dense", "rows", "tiled"])
def test_tiny_totals_have_finite_gradients(name, implementation):
    """Totals of e^−60: their squares are below the least float32, the gradients are those of float64."""
    if implementation == "tiled" and "weight_maps" in SMALL[name]:
        pytest.skip("needs rows")

    def loss(query, key, value):
        out = attend(query, key, value, mask=MASK, implementation=implementation, **SMALL[name])
        return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum()

    found = jax.grad(loss, argnums=(0, 1, 2))(QUERY, KEY, VALUE)
    with jax.enable_x64(True):
        exact = jax.grad(loss, argnums=(0, 1, 2))(*(x.astype(np.float64) for x in (QUERY, KEY, VALUE)))
    # A score of −60 is rounded to 60 epsilons, and so is its weight.
    assert_same(found, jax.tree.map(np.asarray, exact), atol=60 * EPS)


@pytest.mark.parametrize("shift", [-60, -86, -87, -88, -90, -120])
def test_tiny_totals_have_finite_gradients_down_to_nothing(shift):
    """Where float32 rounds totals to denormals, then to 0; second derivatives where squares of totals are in range."""

    def loss(query, normalize, shift):
        bias = ja.Bias(np.float32(shift))
        out, extras = attend(
            QUERY + query, KEY, VALUE, bias=bias, normalize=normalize, implementation="rows", return_lse=True
        )
        return (out**2).sum() + jnp.where(jnp.isneginf(extras["lse"]), 0, extras["lse"]).sum()

    for normalize in (ja.Sigmoid(normalized=True), ja.Elu1(True)):
        assert np.isfinite(jax.grad(loss)(0 * QUERY, normalize, shift)).all()
        curvature = jax.jvp(
            lambda query, each=normalize: jax.grad(loss)(query, each, shift / 4), (0 * QUERY,), (QUERY,)
        )
        assert all(np.isfinite(x).all() for x in curvature)


def test_maps_of_rows_are_not_served_a_tile_at_a_time():
    for each in (
        ja.TopKWeights(2),
        ja.DropTopK(3, 0.5, jax.random.key(0)),
        ja.Reallocate(GROUPS, np.ones(3, np.float32)),
    ):
        with pytest.raises(NotImplementedError, match=f"cannot serve score_maps={type(each).__name__}: it needs whole"):
            call(score_maps=(each,), implementation="tiled")
        assert_same(call(score_maps=(each,), implementation="rows"), call(score_maps=(each,), implementation="dense"))


def test_masses_by_query_position_are_a_table():
    masses = np.random.default_rng(2).dirichlet(np.ones(3), (N, T)).astype(np.float32)
    dense, by_rows = (
        call(weight_maps=(ja.Reallocate(GROUPS, masses),), implementation=name, block=4) for name in ("dense", "rows")
    )
    assert_same(by_rows, dense)
    groups = {"mass": ja.Mass(GROUPS)}
    _, extras = call(weight_maps=(ja.Reallocate(GROUPS, masses),), measures=groups)
    assert_same(extras["mass"][:, 4:], np.broadcast_to(masses.swapaxes(0, 1), (B, T, N, 3))[:, 4:])


def test_negative_distance_does_not_change_when_everything_moves():
    """Also far from the origin, where squares are 10⁶ times the distances."""
    there = [np.float32(x + 1000) for x in (QUERY, KEY)]
    back = [x - 1000 for x in there]
    places = jnp.arange(S).at[jnp.array([2, 5])].set(-1)  # empty slots hold zeros, far from everything
    options = {"score": ja.NegativeDistance(0.5), "mask": MASK, "key_positions": places}
    assert_same(*(attend(*x, VALUE, **options) for x in (there, back)))


@pytest.mark.parametrize("hidden", [(4, 128), (64, 2)])
def test_a_network_on_pairs_never_holds_its_hidden_layers_for_all_pairs(hidden):
    """By XLA's account: a tenth of T x S x hidden, forward and backward."""
    first, second = hidden
    x = jax.ShapeDtypeStruct((1, 1024, 2, 4), jnp.float32)
    shapes = (8, first), (first,), (first, second), (second,), (second,)
    score = ja.Neural(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))

    def loss(x, score):
        return attend(x, x, x, score=score).sum()

    memory = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, score).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * 1024 * 1024 * max(hidden) * 4 / 10


def test_positions_far_outside_a_graph_see_nothing():
    graph = ja.Graph.from_adjacency(np.ones((4, 4), bool))
    assert not graph(jnp.array([2**30])[None, :, None], jnp.arange(4)[None, None]).any()


def test_parts_are_rebuilt_with_any_leaves():
    """As optax, vmap and tree maps do: a check of numbers is for the user who makes a part."""
    for each in (ja.Softmax(temperature=jnp.ones(4)), ja.Temperature(2.0), ja.LogGaussian(jnp.ones((1, 3)), 1.0)):
        assert all(x == 0 for x in jax.tree.leaves(jax.tree.map(lambda _: 0, each)))


def test_location_is_float32_for_half_precision():
    query, weight = (3000 * QUERY).astype(np.float16), (3000 * normal(S, H)).astype(np.float16)
    out = attend(query, KEY.astype(np.float16), VALUE.astype(np.float16), score=ja.Location(weight))
    assert np.isfinite(out).all()


@pytest.mark.parametrize(
    ("slots", "named"),
    [
        ({"score": ja.Bilinear(np.ones((3, 4), np.float32))}, "score=Bilinear does not fit"),
        (
            {"score": ja.Additive(*(np.ones((3, 2), np.float32),) * 2, np.ones(2, np.float32))},
            "score=Additive does not fit",
        ),
        ({"score": ja.PairSum(np.ones(3, np.float32), np.ones(4, np.float32))}, "score=PairSum does not fit"),
        ({"score": ja.Location(np.ones((7, 3), np.float32))}, "score=Location does not fit"),
        (
            {"weight_maps": (ja.GaussianWindow(np.ones((3, 6), np.float32), 1.0),)},
            "weight_maps=GaussianWindow does not fit",
        ),
        ({"mask": ja.Documents(np.zeros((3, 6), np.int32), np.zeros((2, 6), np.int32))}, "mask=Documents does not fit"),
        ({"measures": {"m": ja.Mass(np.zeros((3, 6), np.int32))}}, "measures: m=Mass does not fit"),
        ({"score": lambda q, k: q @ k.swapaxes(-1, -2)}, "score must be a Score such as"),
        ({"mask": ja.PerHead((ja.Causal(), 1, 2, 3))}, "PerHead"),
    ],
)
def test_a_part_that_does_not_fit_is_named(slots, named):
    with pytest.raises((TypeError, ValueError), match=named):
        call(**slots) if "mask" not in slots else attend(QUERY, KEY, VALUE, **slots)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: ja.Graph.from_edges([0.5, 1.0], [1, 0], 2), "senders and receivers must be integers, got float64"),
        (lambda: ja.rotary(QUERY, None), "positions must be integers, got None"),
        (
            lambda: ja.take_tokens(jnp.zeros((B, 2, 3), jnp.int32), KEY, VALUE, jnp.zeros(S)),
            "key_positions must be int",
        ),
        (lambda: ja.SoftCap("a"), "SoftCap: cap must be a number or an array, got 'a'"),
        (lambda: ja.DropTopK(2, None, jax.random.key(0)), "DropTopK: rate must be a number, got None"),
    ],
)
def test_what_is_no_integer_or_number_is_named(make, named):
    with pytest.raises(TypeError, match=named):
        make()


def test_masks_combine_with_masks_arrays_and_functions_only():
    with pytest.raises(TypeError, match="a mask combines with masks, arrays and functions, got int"):
        ja.Causal() & 3
    with pytest.raises(TypeError, match=r"a must be a Partial\(out, lse\), got"):
        merge(jnp.ones(3), jnp.ones(3))
