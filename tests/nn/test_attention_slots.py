"""Maps and measures of a module are those of `attend`, and maps that read other queries refuse a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mixers import call
from multi_head import assert_close, randomise

from jaxattn import Causal, Entropy, Mass, Received, SoftCap, Temperature, attend
from jaxattn.core.attend import Convolution, LagProfile, Temporal, TopKWeights, TopWeights
from jaxattn.nn import HeadMixing, KeyQueryConvolution, MultiHeadAttention
from jaxattn.trace import Scale, TokensAt

D, T, B = 16, 7, 2
MEASURES = {"entropy": Entropy(), "lags": LagProfile(3), "halves": Mass(jnp.array([0, 0, 0, 1, 1, 1, 1]), 2)}
RECORD = {name: ("weights", measure) for name, measure in MEASURES.items()}


def run(module, x, record=(), **options):
    return nnx.jit(lambda module, x, options: call(module, x, record=record, **options))(module, x, options)


def inputs(length=T):
    return jnp.asarray(np.random.default_rng(5).standard_normal((B, length, D)), jnp.float32)


def build(**options):
    return randomise(MultiHeadAttention(D, 4, position=None, mask=Causal(), **options, rngs=nnx.Rngs(0)))


def test_maps_are_applied_in_order_and_parts_stand_beside_modules():
    maps = {"score_maps": (HeadMixing(4), SoftCap(0.5)), "weight_maps": (TopKWeights(2), HeadMixing(4))}
    module = build(**maps)
    _, _, seen = run(module, inputs(), record=("q", "k", "v", "z", "scores", "weights"))
    before, after = (module.score_maps[0](), SoftCap(0.5)), (TopKWeights(2), module.weight_maps[1]())
    expected = attend(seen["q"], seen["k"], seen["v"], mask=Causal(), score_maps=before, weight_maps=after)
    assert_close(seen["z"], expected)
    assert_close(seen["z"], jnp.einsum("bnts,bsnh->btnh", seen["weights"], seen["v"]))
    visible = np.isfinite(seen["scores"])
    np.testing.assert_array_equal(visible, np.broadcast_to(np.tri(T, dtype=bool), visible.shape))
    assert np.abs(seen["scores"][visible]).max() <= 0.5
    swapped = attend(seen["q"], seen["k"], seen["v"], mask=Causal(), score_maps=before[::-1], weight_maps=after[::-1])
    assert np.abs(np.asarray(swapped - expected)).max() > 1e-3


def test_arrays_of_maps_belong_to_the_module_and_are_not_trained():
    kernel = jnp.full((4, 2, 3), 0.25)
    held = jax.tree.leaves(nnx.split(build(score_maps=(Convolution(kernel),)), nnx.Param, ...)[2])
    assert [leaf.shape for leaf in held if leaf.ndim == 3] == [(4, 2, 3)]


def test_a_measure_is_recorded_under_its_own_name_when_asked_for():
    module = build()
    y, _, records = run(module, inputs(), record=RECORD | {"q": "q", "k": "k", "v": "v"})
    _, expected = attend(records["q"], records["k"], records["v"], mask=Causal(), measures=MEASURES)
    for name in MEASURES:
        assert_close(records[name], expected[name])
    quiet, _, nothing = run(module, inputs())
    assert_close(quiet, y)
    assert nothing == {}
    assert set(run(module, inputs(), record={"lags": RECORD["lags"]})[2]) == {"lags"}


def test_a_measure_may_give_several_arrays():
    _, _, records = run(build(), inputs(), record={"top": ("weights", TopWeights(2)), "weights": "weights"})
    weights, positions = records["top"]
    assert_close(weights, jnp.sort(records["weights"], -1)[..., :-3:-1].swapaxes(1, 2))
    assert positions.shape == (B, T, 4, 2)


def test_what_is_measured_has_a_gradient():
    """A step up the gradient of the mean entropy raises it."""

    @nnx.jit
    def mean_entropy(module, x):
        return call(module, x, record=RECORD)[2]["entropy"].mean()

    module = build()
    before, gradient = nnx.value_and_grad(mean_entropy)(module, inputs())
    nnx.update(module, jax.tree.map(lambda p, g: p + 0.1 * g, nnx.state(module, nnx.Param), gradient))
    assert mean_entropy(module, inputs()) > before + 1e-4


def test_maps_of_single_rows_and_measures_decode_through_a_cache():
    maps = {"score_maps": (SoftCap(0.5), HeadMixing(4)), "weight_maps": (TopKWeights(2),)}
    module = build(**maps)
    x, record = inputs(), {"entropy": ("weights", Entropy()), "received": ("weights", Received())}
    y, _, whole = run(module, x, record)
    state, pieces = module.init_state(B, T), []
    for t in range(T):
        piece, state, records = run(module, x[:, t : t + 1], record, state=state)
        pieces.append((piece, records))
    assert_close(jnp.concatenate([piece for piece, _ in pieces], 1), y)
    assert_close(jnp.concatenate([records["entropy"] for _, records in pieces], 1), whole["entropy"])
    assert_close(sum(records["received"] for _, records in pieces), whole["received"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_maps": (SoftCap(5.0), Temporal())}, "score_maps=Temporal reads the scores of other queries"),
        ({"weight_maps": (Temporal(),)}, "weight_maps=Temporal reads the scores of other queries"),
        ({"score_maps": (KeyQueryConvolution(4, 2, 3),)}, "score_maps=Convolution reads the scores of other queries"),
        ({"weight_maps": (KeyQueryConvolution(1, 2, 1),)}, "weight_maps=Convolution reads the scores of other queries"),
    ],
)
def test_maps_that_read_other_queries_refuse_a_state(options, message):
    module = build(**options)
    with pytest.raises(ValueError, match=f"{message}, which a state does not hold: need state=None"):
        call(module, inputs(), state=module.init_state(B, T))


def test_a_convolution_of_keys_alone_decodes_through_a_cache():
    module = build(score_maps=(KeyQueryConvolution(4, 1, 3),))
    y, _, _ = run(module, inputs())
    first, state, _ = run(module, inputs()[:, :4], state=module.init_state(B, T))
    rest, _, _ = run(module, inputs()[:, 4:], state=state)
    assert_close(jnp.concatenate([first, rest], 1), y)


def test_maps_outside_a_tuple_are_refused():
    with pytest.raises(TypeError, match=r"score_maps must be a tuple such as \(SoftCap\(50.0\),\), got Temperature"):
        build(score_maps=Temperature(2.0))
    with pytest.raises(TypeError, match=r"weight_maps must be a tuple .* got HeadMixing"):
        build(weight_maps=HeadMixing(4))


@pytest.mark.parametrize("site", ["lse", "read"])
def test_what_can_only_be_recorded_takes_no_edits(site):
    with pytest.raises(ValueError, match=f"edits has the site '{site}', which MultiHeadAttention can only record"):
        call(build(), inputs(), edits={site: Scale(0.0)})


@pytest.mark.parametrize(
    ("record", "error", "message"),
    [
        ("weights", TypeError, "record is the text 'weights': need a tuple of sites"),
        (("entropie",), ValueError, r"record names the unknown site 'entropie': need one of \['embed'"),
        (("mlp_out",), ValueError, "record 'mlp_out' is of the site 'mlp_out', which MultiHeadAttention does not have"),
        ({"store.mass": "z"}, ValueError, "record is named 'store.mass': names that begin with"),
        ({"h": ("z", Entropy())}, TypeError, "record 'h' is of 'z', where it needs a reducer"),
        ({"h": ("weights", TokensAt(jnp.arange(2)))}, TypeError, "record 'h' is of weights, where it needs a measure"),
    ],
)
def test_records_that_mean_nothing_are_refused(record, error, message):
    with pytest.raises(error, match=message):
        call(build(), inputs(), record=record)
