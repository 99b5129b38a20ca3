"""Recurrent mixers: one protocol, a state of fixed size, and every mechanism what its paper says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mixers import B, D, N, T, X, alone, assert_close, build, call, run, start

from jaxattn import Causal, Documents, Window, models, nn
from jaxattn.core.attend.position import rotary
from jaxattn.core.linear import LogNormalFeatures, StandardizedFeatures, TaylorFeatures, UnitFeatures
from jaxattn.core.linear.gate import (
    bounded_decay,
    inverse_softplus,
    lower_bounded_decay,
    retention,
    running_softmax,
    softplus_decay,
)
from jaxattn.core.memory import Huber, SoftmaxLink
from jaxattn.nn import Recurrent

SPECS = {
    "elu + 1": models.Spec(nn.LinearAttention, heads=N),
    "taylor": models.Spec(nn.LinearAttention, heads=N, feature_map=TaylorFeatures(2), key_dim=4, convolution=3),
    "hedgehog": models.Spec(nn.LinearAttention, heads=N, feature_map=models.Spec(nn.HedgehogMap), rotary_base=100.0),
    "performer": models.Spec(nn.LinearAttention, heads=N, feature_map=models.Spec(nn.RandomFeatureMap)),
    "plain": models.Spec(nn.LinearAttention, heads=N, normalize=False, gate="sigmoid"),
    "retnet": models.Spec(nn.RetNet, heads=N, convolution=3),
    "gla": models.Spec(nn.GLA, heads=N, rank=2, convolution=2),
    "hgrn2": models.Spec(nn.HGRN2, heads=N, lower_bound=0.3, convolution=2),
    "deltanet": models.Spec(nn.DeltaNet, heads=N),
    "gated deltanet": models.Spec(nn.DeltaNet, heads=N, decay="head", negative=True, convolution=2),
    "kimi delta": models.Spec(nn.DeltaNet, heads=N, decay="channel", rank=2),
    "mamba2": models.Spec(nn.Mamba2, heads=N, state=4),
    "mimetic": models.Spec(nn.Mamba2, heads=N, state=4, mimetic=True),
    "rwkv7": models.Spec(nn.RWKV7, heads=N, rank=2),
    "channel mix": models.Spec(nn.ChannelMix, hidden=7),
    "latte": models.Spec(nn.Latte, heads=N, latents=3, convolution=3),
    "latte macchiato": models.Spec(nn.Latte, heads=N, latents=3, window=3, rotary_base=100.0),
    "s6": models.Spec(nn.S6, inner=12, state=3, norm=True),
    "convolution": models.Spec(nn.GatedConvolution, expand=2),
    "titans": models.Spec(nn.NeuralMemory, heads=N, hidden=(6,), inner_batch=4),
    "yaad": models.Spec(
        nn.NeuralMemory, heads=N, hidden=(6,), loss=Huber(0.5), momentum=False, residual=True, inner_batch=4
    ),
    "memora": models.Spec(nn.NeuralMemory, heads=N, hidden=(), link=SoftmaxLink(), momentum=False, inner_batch=3),
    "ttt": models.Spec(nn.TTT, heads=N, inner_batch=4),
    "deep ttt": models.Spec(nn.TTT, heads=N, deep=True, inner_batch=4),
}
# One of each kind of memory. Laws that others keep by the same code are among the slow tests for them.
FIRST = ("taylor", "gla", "gated deltanet", "rwkv7", "latte macchiato", "s6", "convolution", "titans", "ttt")
OF_A_KIND = [pytest.param(name, marks=() if name in FIRST else pytest.mark.slow) for name in SPECS]


@pytest.mark.parametrize("name", SPECS)
def test_decoding_is_the_whole_pass_at_a_state_of_fixed_size(name):
    """A prompt with padding at the right, then one token at a time; a finished row gets padding and does not move."""
    mixer = build(SPECS[name])
    whole = jnp.stack(alone(mixer, *X))
    lengths = jnp.array([4, 6])
    places = jnp.arange(6)
    state = start(mixer, B, 100)
    there = places < lengths[:, None]
    prompt = jnp.where(there[..., None], X[:, :6], jnp.nan)  # padding may hold anything
    y, after, _ = run(mixer, prompt, positions=jnp.where(there, places, -1), state=state)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert_close(y[0, :4], whole[0, :4])
    assert_close(y[1], whole[1, :6])
    state = after
    for step in range(4):
        places = lengths + step
        token = jnp.take_along_axis(X, places[:, None, None], 1)
        y, state, _ = run(mixer, token, positions=places[:, None], state=state)
        assert_close(y[:, 0], whole[jnp.arange(B), places])
    _, idle, _ = run(mixer, token * jnp.nan, positions=jnp.full((B, 1), -1), state=state)
    jax.tree.map(np.testing.assert_array_equal, idle, state)


@pytest.mark.parametrize("name", OF_A_KIND)
def test_packed_documents_are_separate_runs_and_the_future_is_not_seen(name):
    mixer = build(SPECS[name])
    ids = jnp.array([[3] * 4 + [5] * 7, [0] * 11])
    y, _, _ = run(mixer, X, mask=Documents(ids))
    assert_close(y[0], jnp.concatenate(alone(mixer, X[0, :4], X[0, 4:])))
    whole = jnp.stack(alone(mixer, *X))
    assert_close(y[1], whole[1])
    changed = jnp.stack(alone(mixer, *X.at[:, 6:].multiply(-2)))
    np.testing.assert_array_equal(changed[:, :6], whole[:, :6])
    assert (changed[:, 6:] != whole[:, 6:]).any()


def test_values_of_the_first_layer_reach_the_later_ones():
    """Also in a packed row, behind padding, and in decoding: as if each document stood alone."""
    first, later = (models.Spec(nn.RWKV7, heads=N, rank=2, keys_from=source) for source in ("self", "layer"))
    layers = [models.pre_norm(each, None) for each in (first, later, later)]
    config = models.TransformerConfig(vocabulary=7, length=T, width=D, layers=layers)
    decoder = models.Transformer(config, rngs=nnx.Rngs(0))
    assert decoder.lengths == (1, 2)
    tokens = jnp.arange(2 * T).reshape(2, T) % 7
    call = nnx.jit(lambda decoder, tokens, **options: decoder(tokens, **options)[:2])
    places = jnp.arange(T)
    whole, _ = call(decoder, tokens, positions=places[None], state=decoder.init_state(2, T))
    begun = jnp.where(places < 6, places, -1)[None]
    _, state = call(decoder, tokens, positions=begun, state=decoder.init_state(2, T))
    rest = jnp.where(places < T - 6, places + 6, -1)[None]
    decoded, _ = call(decoder, jnp.roll(tokens, -6, 1), positions=rest, state=state)
    assert_close(decoded[:, : T - 6], whole[:, 6:])
    packed = jnp.concatenate([tokens[:, :4], tokens[:, :7]], 1)
    both, _ = call(decoder, packed, mask=Documents(jnp.array([[0] * 4 + [1] * 7] * 2)))
    assert_close(both, jnp.concatenate([whole[:, :4], whole[:, :7]], 1))
    mixer = build(later)
    with pytest.raises(ValueError, match="context is None: need what the layer before gave"):
        mixer(X)
    with pytest.raises(ValueError, match=r"context has shape \(2, 11, 3\): need values of the same heads, \(2, 11, 16"):
        mixer(X, context=X[..., :3])
    with pytest.raises(ValueError, match="keys_from is 'context': need 'self' or 'layer'"):
        build(later.replace(keys_from="context"))


@pytest.mark.parametrize(
    "feature_map", [UnitFeatures(), StandardizedFeatures(TaylorFeatures(2, scale=1.0)), LogNormalFeatures(2.0, 2.0)]
)
def test_maps_with_plain_numbers_stand_in_a_spec(feature_map):
    spec = models.Spec(nn.LinearAttention, heads=N, feature_map=feature_map, key_dim=4)
    config = models.TransformerConfig(vocabulary=5, length=T, width=D, layers=[models.pre_norm(spec)] * 2)
    decoder = models.Transformer(config, rngs=nnx.Rngs(0))
    tokens = jnp.arange(T)[None] % 5
    whole, _, _ = nnx.jit(lambda decoder, tokens: decoder(tokens))(decoder, tokens)
    (first, state, _), piece = decoder(tokens[:, :6], state=decoder.init_state(1, T)), tokens[:, 6:]
    assert_close(jnp.concatenate([first, decoder(piece, state=state)[0]], 1), whole)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (models.Spec(nn.Latte, heads=N, latents=0), "query has 2 heads of 0 channels: need at least 1 of each"),
        (models.Spec(nn.DeltaNet, heads=N, key_dim=0), "query has 2 heads of 0 channels"),
        (models.Spec(nn.RetNet, heads=N, value_dim=0), "value has 2 heads of 0 channels"),
        (models.Spec(nn.TTT, heads=N, inner_batch=0), "TTT: inner_batch must be at least 1, got 0"),
        (models.Spec(nn.NeuralMemory, heads=N, hidden=(0,)), "NeuralMemory: hidden must be at least 1, got 0"),
    ],
)
def test_sizes_of_nothing_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        nn.as_mixer(spec, features=D, dtype=jnp.float32, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", OF_A_KIND)
def test_padding_is_not_there_wherever_it_stands(name):
    """In front, in gaps, and in packed documents; what it holds does not matter."""
    mixer = build(SPECS[name])
    places = [[-1, -1, 0, 1, 2, -1, 3, -1, -1, 4, 5], [0, -1, 1, 2, 3, 4, -1, -1, -1, 5, 6]]
    seen, positions = np.array(places) >= 0, jnp.array(places)
    x = jnp.where(seen[..., None], X, 1e3)
    y, _, _ = run(mixer, x, positions=positions)
    first, second = alone(mixer, x[0][seen[0]], x[1][seen[1]])
    assert_close(y[0][seen[0]], first)
    assert_close(y[1][seen[1]], second)
    documents = np.array([[0] * 6 + [1] * 5] * 2)
    in_row = jnp.where(seen, jnp.arange(T), -1)
    y, _, _ = run(mixer, x, positions=in_row, mask=Documents(jnp.asarray(documents)))
    for row in range(2):
        pieces = [x[row][seen[row] & (documents[row] == each)] for each in range(2)]
        assert_close(y[row][seen[row]], jnp.concatenate(alone(mixer, *pieces)))


@pytest.mark.parametrize("name", ["deltanet", "rwkv7", "latte macchiato", "convolution", "ttt"])
def test_padding_between_two_calls_is_not_there(name):
    mixer = build(SPECS[name])
    _, state, _ = run(mixer, X[:, :5], state=start(mixer, B, T))
    places = jnp.array([[-1, -1, 5, 6, 7], [-1, 5, -1, 6, 7]])
    x = jnp.take_along_axis(X, jnp.maximum(places, 0)[..., None], 1)
    y, _, _ = run(mixer, x, positions=places, state=state)
    for row, whole in enumerate(alone(mixer, *X)):
        assert_close(y[row][places[row] >= 0], whole[5:8])


@pytest.mark.parametrize("name", SPECS)
def test_every_parameter_has_a_gradient(name):
    mixer = build(SPECS[name])
    graph, params, rest = nnx.split(mixer, nnx.Param, ...)
    slopes = jax.jit(jax.grad(lambda p: jnp.sin(nnx.merge(graph, p, rest)(X)[0]).sum()))(params)
    for path, leaf in jax.tree.leaves_with_path(slopes):
        assert np.isfinite(leaf).all(), path
        assert (np.abs(leaf) > 0).any(), path


@pytest.mark.parametrize("name", SPECS)
def test_states_keep_their_types_in_bfloat16(name):
    """So that they can be carried by a loop; the memory stays float32."""
    mixer = nn.as_mixer(SPECS[name], features=D, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    state = start(mixer, B, 9)
    x = X.astype(jnp.bfloat16)
    y, after = jax.eval_shape(lambda x, state: call(mixer, x, state=state)[:2], x, state)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
    assert y.dtype in (jnp.bfloat16, jnp.float32)
    assert all(leaf.dtype in (jnp.float32, jnp.int32) for leaf in jax.tree.leaves(after["memory"]))


@pytest.mark.parametrize("name", ["rwkv7", "s6", "kimi delta"])
def test_splitting_and_merging_a_mixer_changes_nothing(name):
    """Merging puts the entries of a `nnx.Dict` into another order: none may be told by its place."""
    mixer = nn.as_mixer(SPECS[name], features=D, dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert_close(nnx.merge(*nnx.split(mixer))(X)[0], mixer(X)[0])


def test_weights_read_the_values():
    mixer = build(SPECS["gated deltanet"])
    _, _, records = run(mixer, X, record=("weights", "v", "z", "q", "attn_out"))
    assert_close(
        np.einsum("bnts,bsnv->btnv", *(np.asarray(records[x], np.float64) for x in ("weights", "v"))), records["z"]
    )


def test_normalised_features_are_attention_with_their_kernel():
    mixer = build(SPECS["taylor"])
    _, _, records = run(mixer, X, record=("q", "k", "v", "attn_out"))
    q, k, v = (np.asarray(records[name], np.float64) for name in "qkv")
    weights = np.einsum("btnf,bsnf->bnts", q, k) * np.tri(T)
    z = np.einsum("bnts,bsnv->btnv", weights / weights.sum(-1, keepdims=True), v[..., :-1])
    assert_close(z.reshape(B, T, D) @ np.asarray(mixer.mechanism.out.out.kernel[...], np.float64), records["attn_out"])


def test_latte_is_a_softmax_over_time_of_each_latent():
    mixer = build(SPECS["latte"].replace(convolution=0))
    project = {name: np.asarray(m.kernel[...], np.float64) for name, m in mixer.mechanism.project.linear.items()}
    x = np.asarray(X, np.float64)
    q, a, v = ((x @ project[name]).reshape(B, T, N, -1) for name in ("query", "key", "value"))
    of_token = np.exp(q) / np.exp(q).sum(-1, keepdims=True)
    over_time = np.exp(a)[:, None] * np.tri(T)[None, :, :, None, None]
    over_time /= over_time.sum(2, keepdims=True)
    weights = np.einsum("btnl,btsnl->bnts", of_token, over_time)
    np.testing.assert_allclose(weights.sum(-1), 1)
    _, _, records = run(mixer, X, record=("weights", "z"))
    assert_close(records["weights"], weights)
    assert_close(records["z"], np.einsum("bnts,bsnv->btnv", weights, v))


def test_latte_with_a_window_has_one_latent_that_is_local_attention():
    mixer = build(SPECS["latte macchiato"])
    m = mixer.mechanism
    _, _, records = run(mixer, X, record=("z", "q", "attn_out"))
    logits = np.asarray(m.project.linear["query"](X), np.float64).reshape(B, T, N, 4)
    mixture = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert_close(records["q"], mixture[..., :-1])
    q, k, v = (
        each(X).reshape(B, T, N, -1)
        for each in (m.local.linear["query"], m.local.linear["key"], m.project.linear["value"])
    )
    q, k, v = (np.asarray(x, np.float64) for x in (*(rotary(x, jnp.arange(T), 100.0) for x in (q, k)), v))
    near = np.tri(T, dtype=bool) & ~np.tri(T, k=-3, dtype=bool)
    weights = np.where(near, np.exp(np.einsum("btnh,bsnh->bnts", q, k) / (D // N) ** 0.5), 0)
    local = np.einsum("bnts,bsnv->btnv", weights / weights.sum(-1, keepdims=True), v)
    z = np.asarray(records["z"], np.float64) + mixture[..., -1:] * local
    assert_close(records["attn_out"], z.reshape(B, T, D) @ np.asarray(m.out.out.kernel[...], np.float64))


def test_latte_over_all_tokens_ends_as_the_causal_one_does():
    """The last token sees the same in both; padding is seen by neither, and others see what comes after them."""
    causal = build(SPECS["latte"])
    both = Recurrent(causal.mechanism)
    past, _, _ = run(causal, X)
    causal.mechanism.causal = False
    whole, _, records = run(both, X, record=("weights",))
    assert_close(whole[:, -1], past[:, -1])
    np.testing.assert_allclose(records["weights"].sum(-1), 1, rtol=100 * np.finfo(np.float32).eps)
    positions = jnp.where(jnp.arange(T) < 7, jnp.arange(T), -1)
    assert_close(run(both, X, positions=positions)[0][:, :7], run(both, X[:, :7])[0])
    for given in ({"mask": Causal()}, {"state": both.init_state(B, T)}):
        with pytest.raises(ValueError, match="is given, but this mixer reads all of a row at once: need None"):
            call(both, X, **given)


def test_s6_is_its_recurrence():
    mixer = build(SPECS["s6"])
    m = mixer.mechanism
    signal = np.asarray(m.convolution("signal", m.signal(X), nn.Past({}, jnp.ones((B, T), bool), None)), np.float64)

    def selected(name):
        x = signal @ np.asarray(m.selection[name].kernel[...], np.float64)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(m.norms[name].scale[...])

    step = np.logaddexp(0, selected("step") @ np.asarray(m.step.kernel[...]) + np.asarray(m.step_bias[...]))
    rate = np.exp(np.asarray(m.a_log[...], np.float64))
    h, y = np.zeros((B, 12, 3)), np.zeros((B, T, 12))
    for t in range(T):
        kept = np.exp(-step[:, t, :, None] * rate)
        h = kept * h + (step * signal)[:, t, :, None] * selected("key")[:, t, None]
        y[:, t] = (h * selected("query")[:, t, None]).sum(-1)
    gate = np.asarray(m.gate(X), np.float64)
    y = (y + np.asarray(m.skip[...]) * signal) * gate / (1 + np.exp(-gate))
    assert_close(run(mixer, X)[0], y @ np.asarray(m.out.kernel[...], np.float64))


def test_mamba2_is_its_recurrence():
    mixer = build(SPECS["mamba2"])
    m = mixer.mechanism
    _, _, records = run(mixer, X, record=("q", "k", "v", "attn_out"))
    b, c = (np.asarray(records[name], np.float64)[:, :, 0] for name in "kq")
    softplus = np.logaddexp(0, np.asarray(m.step(X) + m.step_bias[...], np.float64))
    value, decay = np.asarray(records["v"], np.float64), np.exp(-np.exp(np.asarray(m.a_log[...])) * softplus)
    memory, y = np.zeros((B, N, 4, D)), np.zeros((B, T, N, D))
    for t in range(T):
        memory = decay[:, t, :, None, None] * memory + b[:, t, None, :, None] * value[:, t, :, None]
        y[:, t] = np.einsum("bk,bnkv->bnv", c[:, t], memory)
    y += np.asarray(m.skip[...])[:, None] * value / softplus[..., None]
    gate = np.asarray(m.gate(X), np.float64)
    y = y.reshape(gate.shape) * gate / (1 + np.exp(-gate))
    normed = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(m.norm.scale[...])
    assert_close(records["attn_out"], normed @ np.asarray(m.out.kernel[...], np.float64))


def test_mimetic_initialization_is_linear_attention_of_the_tokens_with_themselves():
    """A_ij = b_i · b_j but for decays of 1e−3 per token; at the start, not after noise, and before convolutions."""
    mixer = nn.as_mixer(SPECS["mimetic"].replace(convolution=0), features=D, dtype=jnp.float32, rngs=nnx.Rngs(0))
    _, _, records = run(mixer, X, record=("weights", "k", "q"))
    np.testing.assert_array_equal(records["q"], records["k"])
    key = np.asarray(records["k"], np.float64)[:, :, 0]
    expected = np.einsum("btk,bsk->bts", key, key) * np.tri(T)
    np.testing.assert_allclose(records["weights"][:, 0], expected, rtol=0, atol=1.01e-3 * T * abs(expected).max())


def test_rwkv7_is_its_recurrence():
    mixer = build(SPECS["rwkv7"])
    past = nn.Past({}, jnp.ones((B, T), bool), None)
    inputs, _ = mixer.mechanism.inputs(X, jnp.zeros((B, T), int), past)
    r, k, v, g = (np.asarray(x, np.float64) for x in inputs[:4])
    removed, rate = -np.asarray(inputs.erase.read, np.float64), np.asarray(inputs.erase.write, np.float64)
    assert ((g < 0) & (g > -(np.e**-0.5))).all()
    np.testing.assert_allclose(np.linalg.norm(removed, axis=-1), 1, atol=1e-3)
    memory, z = np.zeros((B, N, D // N, D // N)), np.zeros((B, T, N, D // N))
    for t in range(T):
        held = np.einsum("bnk,bnkv->bnv", removed[:, t], memory)
        memory = np.exp(g[:, t])[..., None] * memory - np.einsum("bnk,bnv->bnkv", rate[:, t], held)
        memory = memory + np.einsum("bnk,bnv->bnkv", k[:, t], v[:, t])
        z[:, t] = np.einsum("bnk,bnkv->bnv", r[:, t], memory)
    assert_close(run(mixer, X, record=("z",))[2]["z"], z)


def test_gates_are_the_formulas_and_stay_in_their_range():
    x = jnp.linspace(-200, 200, 41)
    sigmoid = 1 / (1 + np.exp(-np.asarray(x, np.float64)))
    np.testing.assert_allclose(retention(3), np.log([1 - 2.0**-5, 1 - 2.0**-6, 1 - 2.0**-7]), rtol=1e-6)
    np.testing.assert_allclose(
        softplus_decay(0.0, x), -np.logaddexp(0, np.asarray(x, np.float64)), rtol=1e-5, atol=1e-30
    )
    np.testing.assert_allclose(bounded_decay(x, -5.0), -5 * sigmoid, rtol=1e-4, atol=1e-30)
    np.testing.assert_allclose(lower_bounded_decay(x, 0.3), np.log(0.3 + 0.7 * sigmoid), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lower_bounded_decay(x, 0.0), jax.nn.log_sigmoid(x), rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(jax.nn.softplus(inverse_softplus(jnp.array([0.01, 1, 5.0]))), [0.01, 1, 5], rtol=1e-5)
    for gate in (softplus_decay, lambda _, x: lower_bounded_decay(x, 0.3), lambda _, x: bounded_decay(x, -5.0)):
        value, slope = jax.vmap(jax.value_and_grad(lambda x, gate=gate: gate(0.0, x)))(x)
        assert (value <= 0).all()
        assert np.isfinite(slope).all()
    np.testing.assert_allclose(inverse_softplus(jnp.array([1e-6, 89.0, 800.0])), [np.log(1e-6), 89, 800], rtol=1e-5)
    floors = jnp.array([-1.0, -5.0])
    np.testing.assert_allclose(bounded_decay(jnp.zeros(2), floors), floors / 2)
    for made, message in (
        (lambda: bounded_decay(x, 1.0), r"floor holds 1\.0: need numbers below 0"),
        (lambda: lower_bounded_decay(x, 1.5), r"bound holds 1\.5: need numbers from 0 to below 1"),
        (lambda: lower_bounded_decay(x, -0.5), r"bound holds -0\.5: need numbers from 0 to below 1"),
        (lambda: inverse_softplus(-1.0), r"x holds -1\.0: need numbers above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            made()


def test_a_running_softmax_does_not_depend_on_a_constant_and_takes_missing_tokens():
    scores = jax.random.normal(jax.random.key(3), (T, N, 3)).at[0].set(-jnp.inf).at[4].set(-jnp.inf)
    key, log_decay, after = jax.jit(running_softmax)(scores)
    shifted = jax.jit(running_softmax)(scores + 500.0)
    assert_close(shifted[0], key, 1e4)  # the scores themselves are rounded at 500
    assert (key[0] == 0).all()
    assert (key[4] == 0).all()
    assert ((log_decay[1:] <= 0) & (log_decay[1:] > -np.inf) | (log_decay[1:] == -np.inf)).all()
    np.testing.assert_allclose(after, jax.nn.logsumexp(scores, axis=0), rtol=1e-5)
    slope = jax.jit(jax.grad(lambda s: sum(jnp.where(jnp.isfinite(x), x, 0).sum() for x in running_softmax(s))))(scores)
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("name", ["taylor", "gated deltanet", "mamba2", "latte"])
def test_a_decoder_of_them_generates_what_its_whole_pass_says(name):
    """Beside softmax layers; greedy tokens from the constant-memory state are the argmax of one pass."""
    layers = (models.pre_norm(SPECS[name]),) * 2 + (models.pre_norm(models.Spec(nn.MultiHeadAttention, heads=N)),)
    config = models.TransformerConfig(vocabulary=17, length=24, width=D, layers=layers)
    model = models.Transformer(config, rngs=nnx.Rngs(0))
    prompts, lengths = jax.random.randint(jax.random.key(4), (2, 6), 0, 17), jnp.array([6, 3])
    out = models.generate(model, prompts, lengths, max_new_tokens=5, temperature=0.0)
    for row, length in enumerate(lengths.tolist()):
        tokens = jnp.concatenate([prompts[row, :length], out.tokens[row]])[None]
        logits, _, _ = nnx.jit(lambda model, tokens: model(tokens))(model, tokens)
        np.testing.assert_array_equal(logits[0, length - 1 : -1].argmax(-1), out.tokens[row])


@pytest.mark.parametrize("name", SPECS)
def test_specs_are_plain_data(name):
    spec = SPECS[name]
    config = models.TransformerConfig(layers=(models.pre_norm(spec), models.Layer()))
    assert models.from_plain(models.to_plain(config)) == config
    size = {nn.S6: "state", nn.GatedConvolution: "width", nn.ChannelMix: "hidden"}.get(spec.target, "heads")
    assert hash(spec.replace(**{size: 9})) != hash(spec)
    assert isinstance(nn.as_mixer(spec, features=D, dtype=jnp.float32, rngs=nnx.Rngs(0)), Recurrent)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(X[..., :3]), r"x has shape \(2, 11, 3\): need \[batch, length, 16\]"),
        (lambda m: call(m, X, context=X), "context is given: a recurrent mixer sees only its own tokens"),
        (
            lambda m: call(m, X, mask=Window(3)),
            r"mask is Window: a recurrence or convolution takes None, Causal\(\) or Documents",
        ),
        (lambda m: call(m, X, mask=Documents(jnp.zeros(5, int))), "mask is Documents: .* with one id per token"),
        (
            lambda m: call(m, X, mask=Causal() & Documents(jnp.zeros(T, int)), state=m.init_state(B, 9)),
            "need one or the other",
        ),
        (
            lambda m: call(m, X, record=("scores",)),
            "record 'scores' .*, which Recurrent does not have: need one of",
        ),
    ],
)
def test_calls_that_a_memory_cannot_serve_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(build(SPECS["retnet"]))


def test_a_memory_that_learns_has_no_weights_and_takes_so_many_documents():
    mixer = nn.as_mixer(SPECS["yaad"].replace(documents=1), features=D, dtype=jnp.float32, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="record has 'weights'"):
        call(mixer, X, record=("weights",))
    ids = jnp.array([[0] * 5 + [1] * 6, [0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 7]])
    y, _, _ = run(mixer, X, mask=Documents(ids))
    assert np.isfinite(y[0]).all()
    assert np.isnan(y[1]).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.GLA(D, 3, rngs=nnx.Rngs(0)), "features 16 is no multiple of heads 3"),
        (lambda: nn.GLA(D, 2, rank=0, rngs=nnx.Rngs(0)), "rank must be at least 1, got 0"),
        (
            lambda: nn.DeltaNet(D, 2, decay="token", rngs=nnx.Rngs(0)),
            "decay is 'token': need 'none', 'head' or 'channel'",
        ),
        (lambda: nn.HGRN2(D, 2, lower_bound=1.0, rngs=nnx.Rngs(0)), "lower_bound must be at least 0 and below 1"),
        (lambda: nn.LinearAttention(D, 2, gate="relu", rngs=nnx.Rngs(0)), "gate is 'relu': need 'silu', 'sigmoid'"),
        (lambda: nn.ShortConvolution(4, 0, rngs=nnx.Rngs(0)), "convolution must be at least 1 token wide, got 0"),
        (
            lambda: nn.NeuralMemory(D, 2, max_rate=0.0, rngs=nnx.Rngs(0)),
            r"max_rate must be positive, got 0\.0",
        ),
        (lambda: nn.TTT(D, 2, base_rate=-1.0, rngs=nnx.Rngs(0)), r"base_rate must be positive, got -1\.0"),
    ],
)
def test_mechanisms_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["gla", "deltanet", "rwkv7"])
def test_padding_by_ids_is_not_there_either(name):
    """Tokens without a document inside one do not cut it in two."""
    mixer = build(SPECS[name])
    ids = np.array([[0, 0, -1, 0, 0, -1, 0, 1, -1, 1, 1]] * B)
    x = jnp.where(ids[..., None] < 0, 1e3, X)
    known = nnx.jit(lambda mixer, x: call(mixer, x, mask=Documents(ids))[0])(mixer, x)
    for row in range(B):
        pieces = [X[row][ids[row] == each] for each in range(2)]
        assert_close(known[row][ids[row] >= 0], jnp.concatenate(alone(mixer, *pieces)))
    assert np.isnan(run(mixer, x, mask=Documents(jnp.asarray(ids)))[0]).any()  # not known when the program is made


def test_weights_of_a_memory_with_a_state_are_refused():
    mixer = build(SPECS["deltanet"])
    with pytest.raises(ValueError, match="record has 'weights', which leave out what a state holds"):
        call(mixer, X, record=("weights",), state=start(mixer, B, T))


def test_a_module_that_has_the_two_methods_is_a_mechanism():
    """It need not be derived from the base class."""
    mixer = build(SPECS["gla"])

    class Plain(nnx.Module):
        def __init__(self, inner):
            self.inner, self.in_features = inner, inner.in_features

        def inputs(self, x, positions, past):
            return self.inner.inputs(x, positions, past)

        def output(self, read, rest):
            return self.inner.output(read, rest)

    plain = nn.Recurrent(Plain(mixer.mechanism))
    assert plain.keys_from == "none"
    np.testing.assert_array_equal(run(plain, X)[0], run(mixer, X)[0])
