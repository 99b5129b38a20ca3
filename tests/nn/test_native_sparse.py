"""The mixer of native sparse attention: its call, its state, and its place in a model."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mixers import B, D, T, X, assert_close, build, run

from jaxattn import Documents, nn
from jaxattn.cache import Policy, Recent
from jaxattn.core.attend import native_sparse_attention
from jaxattn.models import Spec, Transformer, TransformerConfig, pre_norm

SIZES = {"size": 2, "blocks": 3, "window": 3}
SPEC = Spec(nn.NativeSparseAttention, heads=4, key_heads=2, **SIZES)


def test_the_mixer_is_its_function_between_projections():
    mixer = build(SPEC)
    y, _, seen = run(mixer, X, record=("q_rotated", "k_rotated", "v", "z", "attn_out"))
    gates = nnx.sigmoid(mixer.gates(X)).reshape(B, T, 4, 3)
    z = native_sparse_attention(*(seen[name] for name in ("q_rotated", "k_rotated", "v")), gates, **SIZES)
    assert_close(seen["z"], z)
    assert_close(y, mixer.attention.out(z.reshape(B, T, D)))


@pytest.mark.parametrize("cut", [(1,) * T, (4, 1, 6)], ids=str)
def test_decoding_chooses_as_one_pass_does(cut):
    mixer = build(SPEC)
    expected = run(mixer, X)[0]
    state, pieces, start = mixer.init_state(B, T + 2), [], 0
    for size in cut:
        y, state, _ = run(mixer, X[:, start : start + size], state=state)
        pieces.append(y)
        start += size
    assert_close(jnp.concatenate(pieces, 1), expected)


def test_padding_has_no_part():
    mixer = build(SPEC)
    positions = np.stack([np.r_[[-1] * 2, :T], np.r_[:T, [-1] * 2]])
    padded = np.full((B, T + 2, D), np.nan, np.float32)
    for b in range(B):
        padded[b, positions[b] >= 0] = X[b]
    y = run(mixer, jnp.asarray(padded), positions=jnp.asarray(positions))[0]
    assert_close(np.stack([y[b, positions[b] >= 0] for b in range(B)]), run(mixer, X)[0])


def test_a_model_of_it_learns_all_of_its_parameters():
    config = TransformerConfig(
        vocabulary=11, length=T, width=D, layers=[pre_norm(SPEC, Spec(nn.FeedForward, hidden=8))]
    )
    model = Transformer(config, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 11, (B, T))
    gradient = nnx.jit(nnx.grad(lambda model: (model(tokens)[0] ** 2).sum()))(model)
    assert all(np.abs(x[...]).max() > 0 for _, x in nnx.to_flat_state(gradient))


def test_what_the_mixer_refuses():
    mixer = build(SPEC)
    with pytest.raises(ValueError, match=r"mask has Documents: native sparse attention takes None or Causal\(\)"):
        run(mixer, X, mask=Documents(jnp.zeros(T, int)))
    with pytest.raises(ValueError, match="chooses among all tokens"):
        mixer.init_state(B, T, Policy(Recent(1), 4))
    with pytest.raises(ValueError, match="NativeSparseAttention: size must be at least 1, got 0"):
        build(SPEC.replace(size=0))
    with pytest.raises(ValueError, match="context is given"):
        run(mixer, X, context=X)
