"""nn.LatentAttention: both of its forms against a loop in float64, its cache, its stores, and what it can represent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mixers import call
from multi_head import randomise, rotate

from jaxattn import Alibi, Causal, Dot, Explicit, PerHead, Sinks, Window, attend, nn
from jaxattn.cache import HeavyHitters, Paged, Policy, Quantised, Quest, Rank, Recent
from jaxattn.core.attend import absorb_q, expand_v
from jaxattn.models import Spec, Transformer, TransformerConfig, from_plain, generate, pre_norm, to_plain
from jaxattn.nn import LatentAttention, MultiHeadAttention

B, T, D, N, H, HR, HV, R, RQ = 2, 7, 16, 4, 3, 2, 5, 6, 8
SIZES = {"rank": R, "head_dim": H, "value_dim": HV, "rotary_dim": HR, "query_rank": RQ}
EPS = float(np.finfo(np.float32).eps)
X = np.random.default_rng(1).standard_normal((B, T, D)).astype(np.float32)
POSITIONS = np.array([[-1, -1, 0, 1, 2, 3, 4], np.arange(T)])
WINDOWS = Causal() & (PerHead(tuple(map(Window, (0, 1, 3, 6)))) | Sinks(1))


def made(form="auto", **options):
    return randomise(LatentAttention(D, N, **SIZES | options, form=form, rngs=nnx.Rngs(0)))


def widened(module):
    """The module with parameters, and so a computation, in float64."""
    nnx.update(module, jax.tree.map(lambda x: x.astype(np.float64), nnx.state(module, nnx.Param)))
    return module


def oracle(module, x, positions, shows):
    """y [B, T, D] by the equations, one row, query and head at a time."""

    def weight(layer):
        return np.asarray(layer.kernel[...], np.float64)

    def normed(layer, x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(layer.scale[...], np.float64)

    def turned(x):
        return rotate(x, abs(x), positions, 1e4, 1.0)[0]

    c = normed(module.latent_norm, x @ weight(module.latent))
    shared = turned((x @ weight(module.rotary_key))[:, :, None])[:, :, 0]
    q = (normed(module.query_norm, x @ weight(module.query_down)) @ weight(module.query)).reshape(B, T, N, H + HR)
    q_turned = turned(q[..., H:])
    up_k, up_v = weight(module.key).reshape(R, N, H), weight(module.value).reshape(R, N, HV)
    z = np.zeros((B, T, N, HV))
    for b, t, n in np.ndindex(B, T, N):
        here = positions[b, t]
        seen = [s for s, there in enumerate(positions[b]) if here >= 0 and there >= 0 and shows(n, here, there)]
        scores = [(q[b, t, n, :H] @ (c[b, s] @ up_k[:, n]) + q_turned[b, t, n] @ shared[b, s]) for s in seen]
        weights = np.exp(np.array(scores) / np.sqrt(H + HR))
        z[b, t, n] = sum(w * (c[b, s] @ up_v[:, n]) for w, s in zip(weights / weights.sum(), seen, strict=True))
    return z.reshape(B, T, -1) @ weight(module.out)


def test_both_forms_are_the_equations_with_equal_gradients():
    """In float64, with padding and a window per head."""

    def shows(n, t, s):
        return s <= t and (s >= t - (0, 1, 3, 6)[n] or s == 0)

    with jax.enable_x64(True):
        x = jnp.asarray(np.where(POSITIONS[..., None] < 0, np.nan, X).astype(np.float64))
        seen = POSITIONS >= 0
        found = []
        for form in ("naive", "absorbed"):
            graph, params, rest = nnx.split(widened(made(form, mask=WINDOWS, dtype=jnp.float64)), nnx.Param, ...)

            def loss(params, x, graph=graph, rest=rest):
                y = call(nnx.merge(graph, params, rest), x, positions=jnp.asarray(POSITIONS))[0]
                return jnp.sin(jnp.where(seen[..., None], y, 0)).sum(), y

            found.append(jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x))
        ((_, naive), slopes), ((_, absorbed), slopes2) = found
        expected = oracle(nnx.merge(graph, params, rest), np.where(seen[..., None], X, 0.0), POSITIONS, shows)
        for y in (naive, absorbed):
            np.testing.assert_allclose(np.asarray(y)[seen], expected[seen], rtol=1e-11, atol=1e-12)
        for a, b in zip(jax.tree.leaves(slopes), jax.tree.leaves(slopes2), strict=True):
            assert np.isfinite(a).all()
            assert abs(a).max() > 0
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11)


def test_it_holds_any_grouped_attention_at_a_rank_of_its_keys_and_values():
    """c = [all keys; all values], without norm and shared key: each head takes its own from there."""
    attention = randomise(MultiHeadAttention(D, N, key_heads=2, position=None, mask=Causal(), rngs=nnx.Rngs(0)))
    width = 2 * (D // N)
    module = LatentAttention(
        D, N, rank=2 * width, head_dim=D // N, rotary_dim=0, norm=None, mask=Causal(), rngs=nnx.Rngs(1)
    )
    module.query.kernel[...], module.out.kernel[...] = attention.query.kernel[...], attention.out.kernel[...]
    module.latent.kernel[...] = jnp.concatenate([attention.key.kernel[...], attention.value.kernel[...]], 1)
    of_head = np.zeros((2, 2, D // N, N, D // N), np.float32)  # key or value, key head, channel of it, head, channel
    for n in range(N):
        of_head[:, n // 2, :, n] = np.eye(D // N)
    module.key.kernel[...], module.value.kernel[...] = (
        (of_head * np.eye(2)[which][:, None, None, None, None]).reshape(2 * width, -1) for which in (0, 1)
    )
    expected, _ = attention(X)
    np.testing.assert_allclose(module(X)[0], expected, rtol=0, atol=20 * EPS * abs(expected).max())
    assert module.sites == ("q", "q_rotated", "latent", "read", "scores", "weights", "lse", "z", "attn_out")


def test_a_token_takes_rank_and_rotary_channels_in_a_state_and_nothing_more():
    """Beside its position: an int32."""

    def size(module, capacity):
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(module.init_state(1, capacity)))

    for dtype, bytes_ in ((jnp.float32, 4), (jnp.bfloat16, 2)):
        module = made(dtype=dtype)
        assert size(module, 100) - size(module, 60) == 40 * ((R + HR) * bytes_ + 4)


def test_only_distances_between_positions_count():
    module = made(mask=Causal())
    y, moved = (call(module, X, positions=jnp.arange(T) + start)[0] for start in (0, 50))
    np.testing.assert_allclose(moved, y, rtol=0, atol=1000 * EPS)  # angles are 50 times as large


STORES = {
    "sinks and recent": Policy(Recent(1), 4),
    "heavy hitters": Policy(HeavyHitters(1, 2), 4),
    "a budget": Policy(HeavyHitters(1, 2), 6, budget=jnp.array(4)),
    "pages": Policy(select=Quest(2, 2)),
    "heavy hitters in a pool": Policy(HeavyHitters(1, 2), 4, storage=Paged(2)),
    "in bits": Policy(Recent(1), 4, storage=Quantised(16, 2, 2)),
}


@pytest.mark.parametrize("form", ["naive", "absorbed"])
def test_a_store_equals_a_pass_under_the_mask_of_what_was_read(form):
    """Replay, a prompt of 3 tokens and then token by token, with NaN in empty slots."""
    module, length = made(form, mask=Causal()), 10
    x = jnp.asarray(np.random.default_rng(2).standard_normal((B, length, D)), jnp.float32)
    step = nnx.jit(lambda module, x, state: call(module, x, state=state, record=("read", "weights")))
    for name, policy in STORES.items():
        state, pieces, seen = module.init_state(B, length, policy), [], np.zeros((B, length, length), bool)
        for first, last in [(0, 3), *((t, t + 1) for t in range(3, length))]:
            y, state, records = step(module, x[:, first:last], state)
            pieces.append(y)
            for b in range(B):
                read = np.asarray(records["read"])[b, :, 0]
                seen[b, first:last, read[read >= 0]] = True
        dense, _, _ = call(module, x, mask=Explicit(jnp.asarray(seen)[:, None]))
        eps = EPS + (2.0**-17 if name == "in bits" else 0)
        np.testing.assert_allclose(jnp.concatenate(pieces, 1), dense, rtol=0, atol=100 * eps * abs(dense).max())
        assert seen[:, 5:].sum(-1).max() <= 4, name
        assert records["weights"].shape == (B, N, 1, length)


@pytest.mark.parametrize("form", ["naive", "absorbed"])
def test_keys_turned_at_read_are_those_turned_at_write_where_only_distances_count(form):
    """A ring holds neighbours: their ranks are their positions but for a shift."""
    module, found = made(form, mask=Causal()), []
    for key_position in ({}, {"key_position": Rank()}):
        state, pieces = module.init_state(B, T, Policy(Recent(0), 3, **key_position)), []
        for t in range(T):
            y, state, _ = call(module, X[:, t : t + 1], state=state)
            pieces.append(y)
        found.append(jnp.concatenate(pieces, 1))
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=300 * EPS * abs(found[0]).max())
    state = module.init_state(B, T, Policy(key_position=Rank()))
    with pytest.raises(ValueError, match=r"turns keys when they are read \(Rank\)"):
        call(module, X, state=state, record=("k_rotated",))


@pytest.mark.parametrize("tokens", [1, 64])
def test_by_default_the_form_is_the_one_with_fewer_multiplications(tokens):
    def flops(form):
        module = LatentAttention(64, 4, rank=32, form=form, rngs=nnx.Rngs(0))
        state, x = module.init_state(1, 128, Policy(Recent(4), 128)), jnp.ones((1, tokens, 64))
        graph, arrays = nnx.split(module)
        run = jax.jit(lambda arrays, x, state: nnx.merge(graph, arrays)(x, state=state)[0])
        return run.lower(arrays, x, state).compile().cost_analysis()["flops"]

    counted = {form: flops(form) for form in ("auto", "naive", "absorbed")}
    assert counted["auto"] == min(counted.values())
    assert (counted["absorbed"] < counted["naive"]) == (tokens == 1)


def test_a_model_of_it_is_written_as_data_and_generates_what_it_computes():
    layers = [pre_norm(Spec(LatentAttention, heads=2, rank=6, bias=Spec(Alibi.geometric), mask=Window(4)))] * 2
    config = TransformerConfig(11, 16, D, layers)
    assert from_plain(to_plain(config)) == config
    model = Transformer(config, rngs=nnx.Rngs(0))
    prompt = np.random.default_rng(0).integers(0, 11, (B, 5))
    said = np.asarray(generate(model, prompt, max_new_tokens=4, temperature=0).tokens)
    tokens = np.concatenate([prompt, said], 1)
    logits = model(tokens)[0]
    np.testing.assert_array_equal(logits[:, 4:-1].argmax(-1), said)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_moved_projection_changes_no_score_and_no_read(groups):
    """Attention over the inputs of the projections, for grouped heads, leading axes, and one key head."""
    rng = np.random.default_rng(3)
    x, query = rng.standard_normal((3, 1, 6, 1, D)), rng.standard_normal((3, 2, 5, 4, H))
    to_key, to_value = rng.standard_normal((D, groups, H)), rng.standard_normal((D, groups, HV))
    with jax.enable_x64(True):
        x = jnp.broadcast_to(x, (3, 2, 6, 1, D))
        key, value = (jnp.einsum("...sc,ckh->...skh", x[..., 0, :], w) for w in (to_key, to_value))
        expected = attend(query, key, value, mask=Causal())
        read = attend(absorb_q(query, to_key), x, x, score=Dot(H**-0.5), mask=Causal())
        np.testing.assert_allclose(expand_v(read, to_value), expected, rtol=1e-12, atol=1e-13)
    with pytest.raises(ValueError, match=r"weight has shape \(16, 3, 3\) but query has \(3, 2, 5, 4, 3\): need"):
        absorb_q(query, rng.standard_normal((D, 3, H)))
    with pytest.raises(ValueError, match=r"need \[C, K, H\] with C = 16 and K a divisor of its 4 heads"):
        expand_v(np.ones((2, 4, D)), rng.standard_normal((H, 4, HV)))


def test_errors_name_what_is_wrong():
    for options, message in (
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"rotary_dim": -1}, "rotary_dim must be at least 0, got -1"),
        ({"rotary_dim": 3}, "fraction 1.0 of head dim 3"),
        ({"form": "fast"}, "form is 'fast': need one of auto, naive, absorbed"),
        ({"scale": 0.0}, "scale must be positive and finite, got 0.0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            made(**options)
    with pytest.raises(TypeError, match=r"norm must be a spec such as Spec\(nn.RMSNorm\), or None, got 1"):
        made(norm=1)
    module = made()
    with pytest.raises(ValueError, match=r"x has shape \(2, 7, 5\): need \[batch, length, 16\]"):
        module(X[..., :5])
    with pytest.raises(ValueError, match="context is given, but latent attention reads only its own tokens"):
        module(X, context=X)
    layers = [Spec(LatentAttention, heads=2), Spec(MultiHeadAttention, heads=2, keys_from="layer")]
    config = TransformerConfig(11, 16, D, list(map(pre_norm, layers)))
    with pytest.raises(ValueError, match=r"layers\[1\] shares the keys of the layer before it, which has none"):
        Transformer(config, rngs=nnx.Rngs(0))
    assert nn.as_mixer(Spec(LatentAttention, heads=2), features=D, dtype=None, rngs=nnx.Rngs(0)).rank == 4 * D // 2
