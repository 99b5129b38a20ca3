"""The mixer of landmark attention: its call, what its state reads, and its place in a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mixers import B, D, T, X, assert_close, build, run

from jaxattn import Documents, nn
from jaxattn.cache import Landmarks, Policy, Quest, Recent
from jaxattn.core.attend import landmark_attention
from jaxattn.models import Spec, Transformer, TransformerConfig, pre_norm

SPEC = Spec(nn.LandmarkAttention, heads=4, key_heads=2, size=2, pages=1)


def test_the_mixer_is_its_function_between_projections():
    mixer = build(SPEC)
    y, _, seen = run(mixer, X, record=("q_rotated", "k_rotated", "v", "z", "attn_out"))
    z = landmark_attention(*(seen[name] for name in ("q_rotated", "k_rotated", "v")), 2, pages=1)
    assert_close(seen["z"], z)
    assert_close(y, mixer.attention.out(z.reshape(B, T, D)))


@pytest.mark.parametrize("store", [None, Policy()], ids=["by landmarks", "whole"])
@pytest.mark.parametrize("cut", [(1,) * T, (4, 1, T - 5)], ids=str)
def test_decoding_reads_what_one_pass_reads(cut, store):
    """Heads that share a key head choose apart; the rows are ragged."""
    mixer = build(SPEC)
    positions = np.stack([np.arange(T), np.r_[[-1] * 3, : T - 3]])
    positions = np.resize(positions, (B, T))
    seen = positions >= 0
    expected = run(mixer, X, positions=jnp.asarray(positions))[0]
    state, pieces, start = mixer.init_state(B, T, store), [], 0
    for size in cut:
        piece = slice(start, start + size)
        y, state, _ = run(mixer, X[:, piece], positions=jnp.asarray(positions[:, piece]), state=state)
        pieces.append(y)
        start += size
    found = jnp.concatenate(pieces, 1)
    assert_close(found[seen], expected[seen])
    if store is None:
        read = state.read(jnp.ones((B, 1, 4, D // 4)))
        assert read.key.shape[1] == 3 * 2 < T  # two heads with a page each, and the newest


def test_the_landmarks_of_a_store_are_those_of_its_keys():
    """A page is worth the best rank that one of the query heads gives it."""
    mixer = build(SPEC)
    _, state, _ = run(mixer, X, state=mixer.init_state(B, T))
    query = np.random.default_rng(0).standard_normal((B, 1, 4, D // 4)).astype(np.float32)
    read = np.asarray(state.read(jnp.asarray(query)).positions)
    key = np.asarray(state.key)
    for b, k in np.ndindex(B, 2):
        full = range(T // 2)
        best = [max(full, key=lambda p, n=n: key[b, 2 * p + 1, k] @ query[b, 0, n]) for n in (2 * k, 2 * k + 1)]
        pages = {int(p) // 2 for p in read[b, :, k] if p >= 0}
        assert {*best, (T - 1) // 2} <= pages


def test_a_model_of_it_learns_all_of_its_parameters():
    config = TransformerConfig(vocabulary=11, length=T, width=D, layers=[pre_norm(SPEC)])
    model = Transformer(config, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 11, (B, T))
    gradient = nnx.jit(nnx.grad(lambda model: (model(tokens)[0] ** 2).sum()))(model)
    assert all(np.abs(x[...]).max() > 0 for _, x in nnx.to_flat_state(gradient))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


def test_what_the_mixer_refuses():
    mixer = build(SPEC)
    for store in (Policy(Recent(1), 4), Policy(select=Quest(3, 2)), Policy(select=Landmarks(2, 2))):
        with pytest.raises(ValueError, match=r"such as Policy\(\), or Policy\(select=Landmarks\(3, 2\)\)"):
            mixer.init_state(B, T, store)
    with pytest.raises(ValueError, match="mask has Documents"):
        run(mixer, X, mask=Documents(jnp.zeros((B, T), jnp.int32)))
    with pytest.raises(ValueError, match="context is given"):
        mixer(X, context=X)
    with pytest.raises(ValueError, match="LandmarkAttention: size must be at least 2, got 1"):
        nn.LandmarkAttention(8, 2, size=1, rngs=nnx.Rngs(0))
