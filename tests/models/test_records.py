"""Records: what a decoder says it computed is what it computed."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import (
    ATTENTION,
    CONTEXT,
    EPS,
    FEED,
    HEADS,
    PLAIN,
    STREAMING,
    VOCABULARY,
    WIDTH,
    assert_close,
    decoder,
    run,
    tokens,
)

from jaxattn import Causal, Entropy, Window, nn, trace
from jaxattn.models import Spec, pre_norm
from jaxattn.nn import SITES
from jaxattn.nn.tap import OF_MODEL

B, T, H, L = 3, CONTEXT, WIDTH // HEADS, 3
WINDOWED = pre_norm(ATTENTION.replace(mask=Causal() & Window(2)), FEED)
EVERYTHING = tuple(site for site in SITES if site != "latent")


@pytest.fixture(scope="module")
def model():
    return decoder((PLAIN, PLAIN, WINDOWED))


@pytest.fixture(scope="module")
def seen(model):
    logits, _, records = run(model, tokens(), record=EVERYTHING)
    return np.asarray(logits, np.float64), {site: np.asarray(value, np.float64) for site, value in records.items()}


def kernels(model, name):
    """[L, ...] the kernels of a projection, over all layers."""
    return np.concatenate([np.asarray(getattr(run.mixers[0], name).kernel[...], np.float64) for run in model.runs])


def test_every_site_has_its_documented_shape(seen):
    sizes = {
        "1": 1,
        "F": 16,
        "vocabulary": VOCABULARY,
        "B": B,
        "T": T,
        "S": T,
        "N": HEADS,
        "K": HEADS,
        "H": H,
        "D": WIDTH,
    }
    shapes = {
        site: tuple(sizes[axis] for axis in SITES[site][1 : SITES[site].index("]")].split(", ")) for site in EVERYTHING
    }
    layered = {site: shape if site in OF_MODEL else (L, *shape) for site, shape in shapes.items()}
    assert {site: value.shape for site, value in seen[1].items()} == layered


def test_weights_are_the_softmax_of_the_scores(seen):
    scores, weights = seen[1]["scores"], seen[1]["weights"]
    unnormalised = np.exp(scores)
    expected = unnormalised / unnormalised.sum(-1, keepdims=True)
    np.testing.assert_allclose(weights, expected, rtol=20 * EPS * (1 + abs(scores[np.isfinite(scores)]).max()), atol=0)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=0, atol=T * EPS)


def test_hidden_scores_are_minus_infinity_and_only_those(seen):
    p, r = np.mgrid[:T, :T]
    visible = np.stack([r <= p, r <= p, (r <= p) & (r >= p - 2)])
    np.testing.assert_array_equal(
        np.isfinite(seen[1]["scores"]), np.broadcast_to(visible[:, None, None], (L, B, HEADS, T, T))
    )
    assert (seen[1]["scores"][~np.isfinite(seen[1]["scores"])] == -np.inf).all()


def test_scores_are_products_of_the_rotated_queries_and_keys(seen):
    """Rotation by the positions leaves q·k a function of the distance: Re Σ q̄ᵢ kᵢ exp(i (r − p) θᵢ)."""
    q, k = (x[..., : H // 2] + 1j * x[..., H // 2 :] for x in (seen[1]["q"], seen[1]["k"]))
    p, r = np.mgrid[:T, :T]
    turn = np.exp(1j * (r - p)[..., None] * 10000.0 ** (-np.arange(H // 2) / (H // 2)))
    expected = np.einsum("lbtni,lbsni,tsi->lbnts", q.conj(), k, turn).real / np.sqrt(H)
    shown = np.isfinite(seen[1]["scores"])
    magnitude = np.einsum("lbtni,lbsni->lbnts", abs(q), abs(k)) / np.sqrt(H) * 2 * (1 + T)
    assert (abs(seen[1]["scores"][shown] - expected[shown]) <= 20 * EPS * magnitude[shown]).all()


def test_z_is_the_weighted_mean_of_the_values_and_attn_out_its_projection(model, seen):
    records = seen[1]
    assert_close(records["z"], np.einsum("lbnts,lbsnh->lbtnh", records["weights"], records["v"]), factor=20)
    merged = records["z"].reshape(L, B, T, -1)
    assert_close(records["attn_out"], np.einsum("lbtx,lxd->lbtd", merged, kernels(model, "out")), factor=20)


def test_queries_keys_and_values_are_projections_of_the_normalised_stream(model, seen):
    records = seen[1]
    before = np.concatenate([records["embed"][None], records["resid"][:-1]])
    gain = np.concatenate([np.asarray(run.branches[0].norm.scale[...], np.float64) for run in model.runs])
    normed = before / np.sqrt((before**2).mean(-1, keepdims=True) + 1e-6) * gain[:, None, None]
    for site, name in (("q", "query"), ("k", "key"), ("v", "value")):
        expected = np.einsum("lbtd,ldx->lbtx", normed, kernels(model, name))
        assert_close(records[site].reshape(L, B, T, -1), expected, factor=20)


def test_the_stream_is_the_embedding_plus_what_each_block_adds(model, seen):
    records = seen[1]
    np.testing.assert_array_equal(records["embed"], np.asarray(model.embed.table[...])[tokens()])
    before = np.concatenate([records["embed"][None], records["resid"][:-1]])
    parts = [before, records["attn_out"], records["mlp_out"]]
    # Two additions, each rounded once.
    assert (abs(records["resid"] - sum(parts)) <= EPS * sum(map(abs, parts))).all()


def test_the_logits_are_read_from_the_last_of_the_stream(model, seen):
    logits, records = seen
    last = records["resid"][-1]
    normed = last / np.sqrt((last**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(model.norm.scale[...])
    assert_close(logits, normed @ np.asarray(model.embed.table[...], np.float64).T, factor=20)


@pytest.mark.parametrize("record", [(), ("resid",), ("weights",)], ids=str)
def test_recording_changes_nothing(model, seen, record):
    logits, _, records = run(model, tokens(), record=record)
    assert_close(logits, seen[0], factor=20 * L)
    assert set(records) == set(record)
    for site in record:
        assert_close(records[site], seen[1][site], factor=20 * L)


def test_records_of_a_decoding_step_are_those_of_its_tokens(model, seen):
    state = model.init_state(B, T)
    _, state, _ = run(model, tokens()[:, :7], state=state)
    positions = jnp.full((B, 1), 7)
    _, _, records = run(model, tokens()[:, 7:8], positions=positions, state=state, record=("resid", "z", "weights"))
    for site in ("resid", "z"):
        assert_close(records[site], seen[1][site][:, :, 7:8], factor=20 * L)
    assert_close(records["weights"], seen[1]["weights"][:, :, :, 7:8], factor=20 * L)


def test_unknown_sites_are_refused(model):
    with pytest.raises(ValueError, match=r"record names the unknown site 'residual': need one of \['embed'"):
        model(tokens(), record=("residual",))


def test_layers_of_different_shapes_have_a_list_of_records_and_one_array_of_the_stream():
    model = decoder((PLAIN, STREAMING, STREAMING))
    logits, _, records = run(model, tokens(), record=("k", "resid"))
    assert [x.shape for x in records["k"]] == [(B, T, HEADS, H), (B, T, 2, 6), (B, T, 2, 6)]
    assert records["resid"].shape == (3, B, T, WIDTH)
    assert logits.shape == (B, T, VOCABULARY)


def test_a_layer_without_the_site_has_none():
    model = decoder((PLAIN, pre_norm(Spec(nn.LinearAttention, heads=HEADS), None), PLAIN))
    _, _, records = run(model, tokens(), record=("scores", "mlp_pre", "resid"))
    for site in ("scores", "mlp_pre"):
        assert [x is None for x in records[site]] == [False, True, False]
    assert records["resid"].shape == (3, B, T, WIDTH)
    with pytest.raises(ValueError, match="record 'lse' is of 'lse', which no layer has: need one of"):
        decoder((pre_norm(Spec(nn.LinearAttention, heads=HEADS), None),))(tokens(), record=("lse",))


def test_a_reducer_keeps_a_part_and_names_of_other_libraries_mean_the_same_site(model, seen):
    places, direction = jnp.array([3, 0]), jnp.asarray(np.random.default_rng(0).standard_normal(WIDTH), jnp.float32)
    record = {
        "at": ("resid", trace.TokensAt(places)),
        "mean": ("hook_mlp_out", trace.MeanOfTokens()),
        "along": ("hook_resid_post", trace.Along(direction)),
        "entropy": ("attn.hook_pattern", Entropy()),
    }
    found = nnx.jit(lambda model: model(tokens(), record=record))(model)[2]
    assert_close(found["at"], seen[1]["resid"][:, :, [3, 0]], factor=20 * L)
    assert_close(found["mean"], seen[1]["mlp_out"].mean((1, 2)), factor=20 * L)
    assert_close(found["along"], seen[1]["resid"] @ np.asarray(direction, np.float64), factor=20 * L)
    p = seen[1]["weights"]
    entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)
    assert_close(found["entropy"], entropy.swapaxes(2, 3), factor=20 * L)


def test_the_parts_between_sites_are_what_they_say(model, seen):
    """Norms divide by the scale, the residual stream in the middle is a sum, and lse is that of the scores."""
    records = seen[1]
    np.testing.assert_array_equal(records["resid_pre"][1:], records["resid"][:-1])
    assert_close(records["resid_mid"], records["resid_pre"] + records["attn_out"], factor=2)
    for site, of in (("mixer_norm_scale", "resid_pre"), ("mlp_norm_scale", "resid_mid")):
        assert_close(records[site], np.sqrt((records[of] ** 2).mean(-1, keepdims=True) + 1e-6), factor=4)
    last = records["resid"][-1]
    assert_close(records["final_norm_scale"], np.sqrt((last**2).mean(-1, keepdims=True) + 1e-6), factor=4)
    gain = np.asarray(model.norm.scale[...], np.float64)
    assert_close(records["final_norm"], last / records["final_norm_scale"] * gain, factor=20)
    np.testing.assert_allclose(seen[0], records["logits"], rtol=0, atol=0)
    expected = np.log(np.exp(records["scores"]).sum(-1)).swapaxes(2, 3)
    np.testing.assert_allclose(records["lse"], expected, rtol=1e-5, atol=1e-5)
    rotated = np.einsum("lbtnh,lbsnh->lbnts", records["q_rotated"], records["k_rotated"]) / np.sqrt(H)
    shown = np.isfinite(records["scores"])
    np.testing.assert_allclose(records["scores"][shown], rotated[shown], rtol=1e-4, atol=1e-4)
    down = np.concatenate([np.asarray(run.branches[1].module.down.kernel[...], np.float64) for run in model.runs])
    assert_close(records["mlp_out"], np.einsum("lbtf,lfd->lbtd", records["mlp_post"], down), factor=20)
