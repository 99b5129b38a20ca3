"""Tables of edits: a sweep is the loop over its cells, whatever its chunk and wherever its runs begin."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from looked_at import B, D, K, L, N, T, last, model, prompts

from jaxattn import Entropy, nn, trace
from jaxattn.models import Spec, Transformer, TransformerConfig, pre_norm

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        model()  # made here: not while a function that calls it is traced
        yield


def plain(**options):
    return model()(prompts()[0], **options)


def loss(edits, start=None):
    return last(plain(edits=edits, start=start)[0])


def one_by_one(edits_of, *sizes):
    """The loop: one call of the model for each cell, with an edit of one layer that spells out what it does."""
    model()  # is made here and kept, so that it is not made inside of `jit`
    run = jax.jit(lambda edits: last(plain(edits=edits)[0]))
    return np.array([run(edits_of(*cell)) for cell in np.ndindex(*sizes)]).reshape(sizes)


def test_a_run_is_a_call_of_the_model():
    base, _ = prompts()
    record = {"q": "q", "entropy": ("weights", Entropy())}
    edits = {"z": {1: trace.Scale(0.5)}, "embed": lambda value, where: value * 2}
    logits, records = trace.run(model(), base, edits=edits, record=record)
    expected, _, kept = plain(edits=edits, record=record)
    np.testing.assert_allclose(logits, expected, **CLOSE)
    np.testing.assert_allclose(records["entropy"], kept["entropy"], **CLOSE)
    np.testing.assert_allclose(records["q"], kept["q"], **CLOSE)


def test_numbers_of_a_run_do_not_compile_it_anew():
    base, source = prompts()
    from jaxattn.trace.sweep import _run

    trace.run(model(), base, edits={"z": {1: trace.Scale(0.25)}})
    before = _run._cache_size()
    trace.run(model(), source, edits={"z": {1: trace.Scale(0.75)}})
    assert _run._cache_size() == before


@pytest.mark.parametrize("chunk", [3, *(pytest.param(chunk, marks=pytest.mark.slow) for chunk in (1, 50))])
def test_ablating_every_head_is_the_loop(chunk):
    expected = one_by_one(lambda layer, head: {"z": {layer: trace.Scale(1.0 - jnp.eye(N)[head][:, None])}}, L, N)
    grid = trace.heads(model())
    assert (grid.shape, grid.axes) == ((L, N), ("layer", "head"))
    np.testing.assert_allclose(jax.jit(lambda: trace.sweep(loss, grid, chunk=chunk))(), expected, **CLOSE)
    assert np.ptp(expected) > 1e-3
    resid = plain(record=("resid_pre",))[2]["resid_pre"]
    np.testing.assert_allclose(trace.sweep(loss, grid, chunk=chunk, resid_pre=resid), expected, **CLOSE)


def test_weights_are_no_constants_of_the_program():
    """JAX warns of constants beyond a size, as those of a plain `jit` are."""
    before, made = jax.config.jax_captured_constants_warn_bytes, model()
    jax.config.update("jax_captured_constants_warn_bytes", 10_000)
    try:
        with pytest.warns(UserWarning, match="constants"):
            jax.jit(lambda: last(made(prompts()[0])[0]))()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trace.sweep(loss, trace.heads(made), chunk=2)
    finally:
        jax.config.update("jax_captured_constants_warn_bytes", before)


def test_edits_with_arrays_by_layer_and_key_heads():
    mean = plain(record={"mean": ("v", trace.MeanOfTokens())})[2]["mean"]  # [L, K, H]
    grid = trace.heads(model(), trace.Layers(trace.Put(mean)), site="v", positions=[2, T - 1])
    assert (grid.shape, grid.axes) == ((L, K, 2), ("layer", "head", "position"))

    def edit(layer, head, place):
        on = jnp.zeros((T, K, 1), bool).at[(2, T - 1)[place], head].set(True)
        return {"v": {layer: trace.Put(mean[layer], on)}}

    expected = one_by_one(edit, L, K, 2)
    np.testing.assert_allclose(trace.sweep(loss, grid, chunk=4), expected, **CLOSE)


def test_positions_are_those_of_tokens():
    """Of padded rows: position 2 is slot 3 in the first row and slot 4 in the second."""
    base, _ = prompts()
    places = jnp.stack([jnp.arange(T) - 1, jnp.arange(T) - 2]).clip(-1)
    grid = trace.positions(model(), [2], trace.Scale(0.0), site="mlp_out")

    def padded(edits):
        return model()(base, positions=places, edits=edits)[0]

    found = trace.sweep(padded, grid)
    assert found.shape == (L, 1, B, T, 11)
    for layer in range(L):
        on = (places == 2)[..., None]
        expected = padded({"mlp_out": {layer: trace.Put(jnp.zeros(D), on)}})
        np.testing.assert_allclose(found[layer, 0], expected, **CLOSE)


def test_cutting_every_edge_is_the_loop():
    grid = trace.edges(model(), [5, 6, 3], [2, 0, 3])
    assert (grid.shape, grid.axes) == ((L, N, 3), ("layer", "head", "edge"))
    table = np.ones((L, N, 3, N, T, T), bool)
    for layer, head, edge in np.ndindex(L, N, 3):
        table[layer, head, edge, head, (5, 6, 3)[edge], (2, 0, 3)[edge]] = False
    from jaxattn import Explicit

    expected = one_by_one(lambda *cell: {"scores": {cell[0]: Explicit(jnp.asarray(table[cell]))}}, L, N, 3)
    np.testing.assert_allclose(trace.sweep(loss, grid, chunk=5), expected, **CLOSE)


def test_edits_that_are_stacked():
    """Without a grid every entry of the leading axis is a run."""
    strength = jnp.linspace(0.0, 2.0, 5)
    found = trace.sweep(lambda s: {"loss": loss({"attn_out": trace.Scale(s)})}, strength, chunk=2)
    expected = [loss({"attn_out": trace.Scale(s)}) for s in strength]
    np.testing.assert_allclose(found["loss"], expected, **CLOSE)


def test_layers_without_the_site_are_nan():
    """The second layer is recurrent and rotates no queries, the third has more heads."""
    layers = [
        pre_norm(Spec(nn.MultiHeadAttention, heads=heads), Spec(nn.FeedForward, hidden=8))
        if heads
        else pre_norm(Spec(nn.Mamba2, heads=2), Spec(nn.FeedForward, hidden=8))
        for heads in (2, 0, 4)
    ]
    mixed = Transformer(TransformerConfig(11, T, 16, layers), rngs=nnx.Rngs(0))
    mixed.eval()
    tokens = prompts()[0]

    def of(edits):
        logits = mixed(tokens, edits=edits)[0]
        return {"loss": last(logits), "tokens": logits[:, -1].argmax(-1)}

    grid = trace.heads(mixed, site="q_rotated")
    assert grid.shape == (3, 4)
    found = jax.tree.map(np.asarray, jax.jit(lambda: trace.sweep(of, grid))())
    assert (np.isnan(found["tokens"]) == np.isnan(found["loss"])[..., None]).all()  # also numbers that are whole
    one = of({"q_rotated": {0: trace.Scale(jnp.eye(2)[0][:, None])}})
    np.testing.assert_array_equal(found["tokens"][0, 1], one["tokens"])
    found = found["loss"]
    assert (np.isnan(found) == [[False, False, True, True], [True] * 4, [False] * 4]).all()
    np.testing.assert_allclose(found[0, 1], one["loss"], rtol=1e-5)


@pytest.mark.parametrize("kind", ["sequential", pytest.param("parallel", marks=pytest.mark.slow)])
def test_a_run_can_begin_and_end_in_the_middle(kind):
    base, other = prompts()
    made = model(kind)
    logits, _, records = made(base, record=("resid_pre", "q", "resid"))
    for layer in (0, 1, L):
        x = records["resid"][-1] if layer == L else records["resid_pre"][layer]
        again, _, seen = jax.jit(lambda layer, x: made(other, start=(layer, x), record=("q",)))(layer, x)
        np.testing.assert_allclose(again, logits, **CLOSE)  # of the other tokens nothing is read
        assert np.isnan(seen["q"][:layer]).all()
        np.testing.assert_allclose(seen["q"][layer:], records["q"][layer:], **CLOSE)
    x, _, seen = made.layers(records["resid_pre"][1], start=1, stop=2, record=("resid",))
    np.testing.assert_allclose(x, records["resid"][1], **CLOSE)
    assert np.isnan(seen["resid"][::2]).all()


def test_a_start_that_is_no_layer_is_not_a_number():
    """`run` hands numbers on traced, so that nothing can be raised."""
    x = jnp.ones((B, T, D))
    for start, right in ((L, True), (L + 1, False), (-1, False)):
        logits, _ = trace.run(model(), prompts()[0], start=(start, x))
        assert np.isfinite(logits).all() if right else np.isnan(logits).all()


def test_keys_of_another_layer_are_not_needed_behind_the_last():
    layers = [
        pre_norm(Spec(nn.MultiHeadAttention, heads=2, keys_from=keys), Spec(nn.FeedForward, hidden=8))
        for keys in ("self", "layer")
    ]
    made = Transformer(TransformerConfig(11, T, 16, layers), rngs=nnx.Rngs(0))
    logits, _, seen = made(prompts()[0], record=("resid",))
    np.testing.assert_allclose(made(prompts()[0], start=(2, seen["resid"][-1]))[0], logits, rtol=1e-6)
    with pytest.raises(ValueError, match="restart=False"):
        made(prompts()[0], start=(1, seen["resid"][0]))


def test_a_model_in_training_is_refused():
    layer = pre_norm(Spec(nn.MultiHeadAttention, heads=2, dropout=0.5), Spec(nn.FeedForward, hidden=8))
    made = Transformer(TransformerConfig(11, T, 16, [layer] * 2), rngs=nnx.Rngs(0, dropout=1))
    base, source = prompts()
    with pytest.raises(ValueError, match=r"need model\.eval\(\)"):
        trace.sweep(lambda edits: last(made(base, edits=edits)[0]), trace.heads(made))
    with pytest.raises(ValueError, match=r"need model\.eval\(\)"):
        trace.attribution(made, base, source, last)


def test_layers_that_are_left_out_draw_no_random_numbers():
    """The counts of dropout go on in the layers that ran alone."""
    layer = pre_norm(Spec(nn.MultiHeadAttention, heads=2, dropout=0.5), Spec(nn.FeedForward, hidden=8))
    made = Transformer(TransformerConfig(11, T, 16, [layer] * 3), rngs=nnx.Rngs(0, dropout=1))
    x = jnp.ones((1, T, 16))

    def counts():
        return [int(c) for c in jax.tree.leaves(nnx.state(made.runs[0], nnx.RngCount))[0].reshape(-1)]

    before = counts()
    made.layers(x, start=1, stop=2)
    after = counts()
    assert [b - a for a, b in zip(before, after, strict=True)].count(0) == 2
    assert sum(after) > sum(before)


def test_bad_input_says_what_is_wrong():
    with pytest.raises(TypeError, match=r"an argument of run holds \{'z'\}: need arrays"):
        trace.run(model(), prompts()[0], record={"z"})
    with pytest.raises(ValueError, match="site is 'resid', which has no heads"):
        trace.heads(model(), site="resid")
    with pytest.raises(ValueError, match="unknown site 'zz'"):
        trace.heads(model(), site="zz")
    with pytest.raises(ValueError, match="site is 'embed', which a model has once"):
        trace.positions(model(), [1], site="embed")
    with pytest.raises(ValueError, match="positions has -1: need positions from 0"):
        trace.positions(model(), [0, -1])
    with pytest.raises(TypeError, match="positions must be whole numbers, got bool"):
        trace.heads(model(), positions=jnp.ones(T, bool))
    with pytest.raises(ValueError, match="keys has -2: need positions from 0"):
        trace.edges(model(), [1], [-2])
    with pytest.raises(ValueError, match="chunk is 0"):
        trace.sweep(loss, trace.heads(model()), chunk=0)
    with pytest.raises(ValueError, match="need 3 layers first"):
        trace.sweep(loss, trace.heads(model()), resid_pre=jnp.zeros((2, B, T, D)))
    with pytest.raises(ValueError, match="leading axes"):
        trace.sweep(loss, (jnp.zeros(3), jnp.zeros(2)))
    with pytest.raises(ValueError, match="is no Grid"):
        trace.sweep(loss, jnp.zeros(3), resid_pre=jnp.zeros((L, B, T, D)))
    with pytest.raises(ValueError, match="need one position each"):
        trace.edges(model(), [1, 2], [0])
    with pytest.raises(ValueError, match="start is 4: need a layer from 0 to 3"):
        plain(start=(4, jnp.zeros((B, T, D))))
    with pytest.raises(ValueError, match=r"residual stream of shape \(2, 7, 3\): need \(2, 7, 24\)"):
        plain(start=(1, jnp.zeros((B, T, 3))))
    with pytest.raises(ValueError, match="of the site 'embed'"):
        plain(start=(1, jnp.zeros((B, T, D))), record=("embed",))
    with pytest.raises(ValueError, match="there is a state"):
        plain(start=(1, jnp.zeros((B, T, D))), state=model().init_state(B, T))
