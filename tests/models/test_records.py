"""Records: what a decoder says it computed is what it computed."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONTEXT, EPS, HEADS, PLAIN, STREAMING, VOCABULARY, WIDTH, assert_close, decoder, run, tokens

from jaxattn import Causal, Window
from jaxattn.models import Layer
from jaxattn.nn import SITES

B, T, H, L = 3, CONTEXT, WIDTH // HEADS, 3
WINDOWED = Layer(dataclasses.replace(PLAIN.mixer, mask=Causal() & Window(2)), PLAIN.feed_forward)
EVERYTHING = tuple(SITES)


@pytest.fixture(scope="module")
def model():
    return decoder((PLAIN, PLAIN, WINDOWED))


@pytest.fixture(scope="module")
def seen(model):
    logits, _, records = run(model, tokens(), record=EVERYTHING)
    return np.asarray(logits, np.float64), {site: np.asarray(value, np.float64) for site, value in records.items()}


def kernels(model, name):
    """[L, ...] the kernels of a projection, over all layers."""
    return np.concatenate([np.asarray(getattr(run.mixer, name).kernel[...], np.float64) for run in model.runs])


def test_every_site_has_its_documented_shape(seen):
    sizes = {"B": B, "T": T, "S": T, "N": HEADS, "K": HEADS, "H": H, "D": WIDTH}
    shapes = {
        site: tuple(sizes[axis] for axis in text[1 : text.index("]")].split(", ")) for site, text in SITES.items()
    }
    layered = {site: shape if site == "embed" else (L, *shape) for site, shape in shapes.items()}
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
    gain = np.concatenate([np.asarray(run.mixer_norm.scale[...], np.float64) for run in model.runs])
    normed = before / np.sqrt((before**2).mean(-1, keepdims=True) + 1e-6) * gain[:, None, None]
    for site, name in (("q", "query"), ("k", "key"), ("v", "value")):
        expected = np.einsum("lbtd,ldx->lbtx", normed, kernels(model, name))
        assert_close(records[site].reshape(L, B, T, -1), expected, factor=20)


def test_the_stream_is_the_embedding_plus_what_each_block_adds(model, seen):
    records = seen[1]
    np.testing.assert_array_equal(records["embed"], np.asarray(model.embed.embedding[...])[tokens()])
    before = np.concatenate([records["embed"][None], records["resid"][:-1]])
    parts = [before, records["attn_out"], records["mlp_out"]]
    # Two additions, each rounded once.
    assert (abs(records["resid"] - sum(parts)) <= EPS * sum(map(abs, parts))).all()


def test_the_logits_are_read_from_the_last_of_the_stream(model, seen):
    logits, records = seen
    last = records["resid"][-1]
    normed = last / np.sqrt((last**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(model.final_norm.scale[...])
    assert_close(logits, normed @ np.asarray(model.embed.embedding[...], np.float64).T, factor=20)


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
    with pytest.raises(ValueError, match=r"record names unknown sites \['residual'\]: need some of \['embed'"):
        model(tokens(), record=("residual",))


def test_layers_of_different_shapes_have_no_common_record_of_their_keys_but_one_of_the_stream():
    model = decoder((PLAIN, STREAMING))
    with pytest.raises(ValueError, match=r"record 'k' has different shapes in different layers, \[.*2, 6\).*4, 4\)\]"):
        run(model, tokens(), record=("k",))
    fewer = Layer(dataclasses.replace(PLAIN.mixer, heads=2), PLAIN.feed_forward)
    model = decoder((PLAIN, fewer))
    with pytest.raises(ValueError, match="record 'weights' has different shapes in different layers"):
        run(model, tokens(), record=("weights",))
    logits, _, records = run(model, tokens(), record=("resid",))
    assert records["resid"].shape == (2, B, T, WIDTH)
    assert logits.shape == (B, T, VOCABULARY)
