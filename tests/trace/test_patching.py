"""Interchange interventions and paths: identities that hold for any model, and loops that spell the runs out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from looked_at import ATTENTION, FEED, B, D, K, L, N, T, V, last, model, prompts

from jaxattn import nn, trace
from jaxattn.models import Branch, Layer, Spec, Transformer, TransformerConfig

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def test_the_whole_stream_carries_all_and_a_run_itself_nothing():
    base, source = prompts()
    grid = trace.positions(model(), jnp.arange(T))
    everywhere = dataclasses.replace(grid, positions=None, shape=(L, 1), there=jnp.ones((L, 1), bool))
    for other, share in ((source, 1.0), (base, np.nan)):
        effects = trace.interchange(model(), base, other, last, everywhere)
        np.testing.assert_allclose(effects.share, np.full((L, 1), share), **CLOSE)
    assert abs(effects.metric - effects.base).max() < 1e-12


@pytest.mark.parametrize(
    "site", ["k", "weights", *(pytest.param(site, marks=pytest.mark.slow) for site in ("z", "q_rotated"))]
)
def test_a_patch_is_the_run_with_the_other_value(site):
    base, source = prompts()
    grid = trace.heads(model(), site=site)
    found = trace.interchange(model(), base, source, lambda logits: logits[:, -1], grid, chunk=3)
    assert found.metric.shape == (L, K if site == "k" else N, B, V)
    mine, other = (model()(x, record=(site,))[2][site] for x in (base, source))
    axis = 1 if site == "weights" else 2

    @jax.jit
    def run(layer, value):
        edit = trace.Layers(trace.Put(value)) if axis == 2 else trace.Layers(trace.Pairs(jnp.zeros(L), value))
        return model()(base, edits={site: dataclasses.replace(edit, on=jnp.arange(L) == layer)})[0][:, -1]

    for layer, head in ((0, 1), (2, grid.shape[1] - 1)):
        one = jnp.moveaxis(
            jnp.moveaxis(mine, axis + 1, 0).at[head].set(jnp.moveaxis(other, axis + 1, 0)[head]), 0, axis + 1
        )
        np.testing.assert_allclose(found.metric[layer, head], run(layer, one), **CLOSE)


def test_causal_tracing_restores_what_noise_took():
    """The inputs are the same, and the base has noise in its embedding: the stream of the last layer restores all."""
    base, _ = prompts()
    noise = jnp.asarray(np.random.default_rng(3).standard_normal((T, D)) * (np.arange(T) < 3)[:, None])
    noisy = {"embed": trace.Add(noise), "mlp_out": {0: trace.Scale(0.5)}}
    grid = trace.positions(model(), [0, T - 1], site="resid")
    both = [
        trace.interchange(model(), base, base, last, grid, restart=restart, base_edits=noisy)
        for restart in (True, False)
    ]
    np.testing.assert_allclose(both[0].metric, both[1].metric, **CLOSE)
    np.testing.assert_allclose(both[0].base, last(model()(base, edits=noisy)[0]), **CLOSE)
    np.testing.assert_allclose(both[0].source, last(model()(base)[0]), **CLOSE)
    np.testing.assert_allclose(both[0].share[L - 1], [0, 1], **CLOSE)


def test_restarting_in_the_middle_changes_nothing():
    base, source = prompts()
    grid = trace.positions(model(), [1, 4], site="mlp_out")
    places = jnp.stack([jnp.arange(T), jnp.maximum(jnp.arange(T) - 1, -1)])
    both = [
        trace.interchange(model(), base, source, last, grid, restart=restart, positions=places)
        for restart in (True, False)
    ]
    np.testing.assert_allclose(both[0].metric, both[1].metric, **CLOSE)
    assert np.ptp(both[0].metric) > 1e-4


def test_the_direct_path_of_every_head_is_its_part_of_the_output():
    """With all else frozen, the last norm too, the logits move by head_out/σ through the unembedding: by hand."""
    made = model()
    base, source = prompts()
    found = trace.path(made, base, source, lambda x: x, trace.heads(made), {}, freeze_norms=True, chunk=4)
    records = [made(x, record=("z", "final_norm_scale"))[2] for x in (base, source)]
    change = records[1]["z"] - records[0]["z"]  # [L, B, T, N, H]
    out = made.runs[0].branches[0].module.out.kernel[...].reshape(L, N, -1, D)
    heads = jnp.einsum("lbtnh,lnhd->lnbtd", change, out) / records[0]["final_norm_scale"]
    expected = (heads * made.norm.scale[...]) @ made.embed.table[...].T
    np.testing.assert_allclose(found.metric - found.base, expected, **CLOSE)


def test_a_path_into_keys_is_what_the_keys_make_of_it():
    """From head 2 of layer 0 to the keys of key head 1 of layer 1, with every step by hand."""
    made = model()
    base, source = prompts()
    receivers = {"k": jnp.zeros((L, K), bool).at[1, 1].set(True)}
    found = trace.path(made, base, source, last, trace.heads(made), receivers, chunk=2)
    z, other, kept = (made(x, record=("z", "mlp_out", "attn_out"))[2] for x in (base, source, base))
    patched = z["z"][0].at[:, :, 2].set(other["z"][0][:, :, 2])
    freeze = {"z": {0: trace.Put(patched)}, "mlp_out": {0: trace.Put(kept["mlp_out"][0])}}
    keys = made(base, edits=freeze, record=("k",))[2]["k"][1]
    mine = made(base, record=("k",))[2]["k"][1].at[:, :, 1].set(keys[:, :, 1])
    np.testing.assert_allclose(found.metric[0, 2], last(made(base, edits={"k": {1: trace.Put(mine)}})[0]), **CLOSE)
    np.testing.assert_allclose(found.metric[1:], jnp.full((L - 1, N), found.base), **CLOSE)  # they come too late


def test_with_nothing_frozen_the_path_to_the_output_is_the_patch():
    base, source = prompts()
    grid = trace.heads(model(), site="q")
    whole = trace.path(model(), base, source, last, grid, {}, frozen=())
    np.testing.assert_allclose(whole.metric, trace.interchange(model(), base, source, last, grid).metric, **CLOSE)


def test_bad_input_says_what_is_wrong():
    base, source = prompts()
    with pytest.raises(ValueError, match=r"base has inputs of shapes \[\(2, 7\)\] and source of \[\(2, 6\)\]"):
        trace.interchange(model(), base, source[:, :6], last, trace.heads(model()))
    with pytest.raises(TypeError, match="base must be an array"):
        trace.interchange(model(), "text", source, last, trace.heads(model()))
    with pytest.raises(ValueError, match=r"receivers has the sites \['mlp_out'\], which are frozen"):
        trace.path(model(), base, source, last, trace.heads(model()), {"mlp_out": jnp.ones(L, bool)})
    with pytest.raises(ValueError, match=r"receivers\['k'\] has shape \(3, 4\)"):
        trace.path(model(), base, source, last, trace.heads(model()), {"k": jnp.ones((L, N), bool)})


def test_shares_of_pytrees_and_of_booleans():
    found = trace.Effects(
        {"loss": jnp.array([1.0, 2.5]), "right": jnp.array([True, False])},
        {"loss": jnp.array(1.0), "right": jnp.array(False)},
        {"loss": jnp.array(3.0), "right": jnp.array(True)},
    ).share
    np.testing.assert_array_equal(found["loss"], [0, 0.75])
    np.testing.assert_array_equal(found["right"], [1, 0])


def test_names_of_other_libraries_are_the_same_sites():
    """Behind a head of the only layer there is nothing but the output, so its path is its patch, frozen or not."""
    base, source = prompts()
    made = Transformer(TransformerConfig(V, T, D, [Layer([Branch(ATTENTION)])], dtype="float64"), rngs=nnx.Rngs(0))
    expected = trace.interchange(made, base, source, last, trace.heads(made)).metric
    grid = dataclasses.replace(trace.heads(made), site="attn.hook_z")
    for frozen in (None, ("attn.hook_z", "z")):
        found = trace.path(made, base, source, last, grid, {}, frozen=frozen).metric
        np.testing.assert_allclose(found, expected, rtol=1e-10)
    with pytest.raises(ValueError, match="which are frozen"):
        trace.path(made, base, source, last, grid, {"attn.hook_z": jnp.ones((1, N), bool)}, frozen=("z",))
    with pytest.raises(ValueError, match="receivers has the site 'weights'"):
        trace.path(made, base, source, last, grid, {"attn.hook_pattern": jnp.ones(1, bool)})


def test_options_of_the_function_itself_are_refused():
    base, source = prompts()
    for function, more in ((trace.interchange, (trace.heads(model()),)), (trace.attribution, ())):
        with pytest.raises(TypeError, match=r"options has \['edits'\]"):
            function(model(), base, source, last, *more, edits={})


def test_heads_that_read_a_context_pass_no_direct_effect_on():
    """What a head of the only layer adds reaches the output itself, and not the queries of cross-attention."""
    cross = Spec(nn.MultiHeadAttention, heads=2, keys_from="context", position=None)
    layer = Layer([Branch(ATTENTION), Branch(cross, name="cross"), Branch(FEED)])
    made = Transformer(TransformerConfig(V, T, D, [layer], dtype="float64"), rngs=nnx.Rngs(0))
    (base, source), context = prompts(), jnp.ones((B, 3, D)) * jnp.arange(D)
    found = trace.path(
        made, base, source, last, trace.heads(made, inputs=(base,), context=context), {}, context=context
    )
    before, after = (made(x, context=context, record=("z", "resid"))[2] for x in (base, source))
    out = made.runs[0].branches[0].module.out.kernel[...][0].reshape(N, -1, D)
    change = jnp.einsum("btnh,nhd->nbtd", (after["z"] - before["z"])[0], out)
    expected = [last(made(base, context=context, edits={"resid": trace.Add(x)})[0]) for x in change]
    np.testing.assert_allclose(found.metric[0], expected, rtol=1e-9)
    assert trace.heads(made, site="cross.attn.hook_z", inputs=(base,), context=context).heads == 2
