"""Layers that attend as an earlier one does (EchoAtt): what they compute, decode and learn, and which could be such."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxattn import Causal, Documents, Sinks, Window, attend, nn
from jaxattn.analysis import attention_similarity, similar_blocks
from jaxattn.cache import HeavyHitters, Policy, Quest, Recent
from jaxattn.models import (
    Spec,
    Transformer,
    TransformerConfig,
    fold_norms,
    from_plain,
    pre_norm,
    replace_mixers,
    share_attention,
    to_plain,
)
from jaxattn.train import distillation_loss, hidden_loss, imitation_loss, language_loss

B, T, D, N, K, V, L = 2, 10, 16, 4, 2, 11, 4
EPS = float(np.finfo(np.float32).eps)
MIXER = Spec(nn.MultiHeadAttention, heads=N, key_heads=K, qk_norm=Spec(nn.RMSNorm))
CONFIG = TransformerConfig(V, T, D, [pre_norm(MIXER, Spec(nn.FeedForward, hidden=12))] * L)
TOKENS = np.random.default_rng(0).integers(0, V, (B, T))


def close(actual, expected, factor=1000):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=factor * EPS * abs(expected).max())


@pytest.fixture(scope="module")
def model():
    return Transformer(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def shared(model):
    return share_attention(model, [(1, 2, 3)])


@nnx.jit(static_argnames="record")
def run(model, tokens, state=None, record=()):
    return model(tokens, state=state, record=record)


def test_echoes_attend_with_the_queries_and_keys_of_the_first(model, shared):
    """Values of their own, those that they had; nothing before has changed, and config and folding know the layers."""
    record = ("q_rotated", "k_rotated", "v", "z", "resid", "weights")
    _, _, seen = run(shared, TOKENS, record=record)
    _, _, before = run(model, TOKENS, record=record)
    np.testing.assert_array_equal(seen["resid"][:2], before["resid"][:2])
    for layer in (2, 3):
        assert seen["q_rotated"][layer] is None
        z = attend(seen["q_rotated"][1], seen["k_rotated"][1], seen["v"][layer], mask=Causal())
        close(seen["z"][layer], z)
        close(seen["weights"][layer], seen["weights"][1])
    kept, old = (each.branches[0].module.value.kernel[...] for each in (shared.runs[1], model.runs[0]))
    np.testing.assert_array_equal(kept, old[2:])
    counts = [sum(x.size for x in jax.tree.leaves(nnx.state(each, nnx.Param))) for each in (model, shared)]
    assert counts[0] - counts[1] == 2 * (D * D + D * K * D // N + 2 * D // N)  # W_q, W_k and the norms of two layers
    assert from_plain(to_plain(shared.config)) == shared.config
    close(run(fold_norms(shared), TOKENS)[0], run(shared, TOKENS)[0])


def test_a_layer_whose_teacher_attends_alike_is_the_same_function():
    """The second layer has the W_q and W_k of the first, and reads what it reads: its norm and mixer write nothing."""
    layers = [pre_norm(Spec(nn.MultiHeadAttention, heads=N, key_heads=K), None)] * 2
    model = Transformer(TransformerConfig(V, T, D, layers), rngs=nnx.Rngs(0))
    mixer = model.runs[0].branches[0].module
    for each in (mixer.query, mixer.key):
        each.kernel[...] = jnp.stack([each.kernel[0]] * 2)
    mixer.out.kernel[...] = mixer.out.kernel[...].at[0].set(0)
    close(run(share_attention(model, [(0, 1)]), TOKENS)[0], run(model, TOKENS)[0], 100)


POLICIES = {
    "all": None,
    "sinks and recent": Policy(Recent(1), 5),
    "heavy hitters": Policy(HeavyHitters(1, 2), 6),
}


@pytest.mark.parametrize("name", POLICIES)
def test_decoding_holds_values_alone_in_the_slots_of_the_keys(shared, name):
    """After a prompt, token by token. Where tokens are evicted, every layer of the block reads the same ones."""
    state, pieces = shared.init_state(B, T, POLICIES[name]), []
    for first, last in ((0, 4), *((t, t + 1) for t in range(4, T))):
        logits, state, records = run(shared, TOKENS[:, first:last], state, record=("read", "z", "resid"))
        pieces.append(logits)
        reads = [np.asarray(x) for x in records["read"]]
        np.testing.assert_array_equal(reads[2], reads[1])
        assert np.isfinite(logits).all()
    whole = run(shared, TOKENS)[0]
    close(pieces[0], whole[:, :4])
    if name == "all":
        close(jnp.concatenate(pieces, 1), whole)
        sizes = [sum(x[0].nbytes for x in jax.tree.leaves(each)) for each in state]
        assert sizes[0] - sizes[-1] == B * T * K * (D // N) * 4  # the keys of one layer
    else:
        assert abs(pieces[-1][:, 0] - whole[:, -1]).max() > 1e-4  # something was evicted


def test_a_window_is_a_ring_in_every_layer_of_a_block():
    layers = [pre_norm(Spec(nn.MultiHeadAttention, heads=N, mask=Causal() & (Window(2) | Sinks(1))), None)] * 3
    shared = share_attention(Transformer(TransformerConfig(V, 64, D, layers), rngs=nnx.Rngs(0)), [(1, 2)])
    state, pieces = shared.init_state(B, 6), []
    for t in range(T):  # beyond the capacity
        logits, state, _ = run(shared, TOKENS[:, t : t + 1], state)
        pieces.append(logits)
    close(jnp.concatenate(pieces, 1), run(shared, TOKENS)[0])


def test_the_maps_of_the_first_learn_from_all_layers_of_the_block(shared):
    """The gradient of its W_q has a part from each echo: with the values of an echo at zero that part is gone."""

    def slope(model):
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        weigh = jnp.asarray(np.random.default_rng(1).standard_normal((B, T, V)), jnp.float32)
        grads = jax.grad(lambda p: (nnx.merge(graph, p, rest)(TOKENS)[0] * weigh).sum())(params)
        return grads["runs"][0]["branches"][0]["module"]["query"]["kernel"][...][1]

    still = nnx.clone(shared)
    echoes = still.runs[1].branches[0].module
    echoes.value.kernel[...] = jnp.zeros_like(echoes.value.kernel[...])
    assert abs(slope(shared) - slope(still)).max() > 1e-3 * abs(slope(shared)).max()


def test_imitation_is_the_sum_of_its_terms_and_ends_at_the_teacher(model, shared):
    """Of packed rows with padding; the student that is the teacher has nothing left but the text."""
    documents = jnp.asarray(np.array([[0] * 4 + [1] * 6, [0] * 7 + [-1] * 3]))
    batch = {"tokens": jnp.asarray(np.where(documents < 0, -100, TOKENS)), "documents": documents}
    options = {"mask": Documents(documents), "record": ("resid",)}
    seen = [each(jnp.where(documents < 0, 0, TOKENS), **options) for each in (shared, model)]
    text, sums = language_loss(shared)[1](nnx.state(shared, nnx.Param), batch, None)
    inside = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)
    counts = {"weights": jnp.pad(inside, ((0, 0), (0, 1))).astype(jnp.float32)}
    logits, _ = distillation_loss(seen[0][0], seen[1][0], counts, 2.0)
    hidden, _ = hidden_loss(seen[0][2]["resid"], seen[1][2]["resid"], counts)
    factors = {"logits": 0.5, "hidden": 3.0, "text": 0.25}
    params, loss_fn = imitation_loss(shared, model, temperature=2.0, **factors)
    total, found = loss_fn(params, batch, None)
    close(total, 0.5 * logits + 3.0 * hidden + 0.25 * text, 100)
    close(found["logits_apart"], logits, 100)
    close(found["hidden_apart"], hidden, 100)
    close(found["nll"], sums["nll"], 100)
    params, loss_fn = imitation_loss(model, model, text=0.0)
    assert float(loss_fn(params, batch, None)[0]) == 0
    params, loss_fn = imitation_loss(model, model, hidden=0.0)
    assert "hidden_apart" not in loss_fn(params, batch, None)[1]
    for options, message in (
        ({"hidden": -1.0}, r"hidden holds -1\.0: need"),
        ({"temperature": 0.0}, "temperature holds"),
    ):
        with pytest.raises(ValueError, match=message):
            imitation_loss(shared, model, **options)


def test_similarity_is_the_mean_cosine_of_rows():
    rng = np.random.default_rng(0)
    weights = rng.random((3, B, N, 5, 6)) * np.tri(5, 6)
    weights[2, 0, 1, 3] = 0  # a row that sees nothing
    expected = np.zeros((3, 3))
    for one, other in np.ndindex(3, 3):
        rows = [
            (weights[one, b, n, t], weights[other, b, n, t])
            for b, n, t in itertools.product(range(B), range(N), range(2, 5))
        ]
        cosines = [a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in rows if a.any() and b.any()]
        expected[one, other] = np.mean(cosines)
    np.testing.assert_allclose(attention_similarity(jnp.asarray(weights), skip=2), expected, rtol=1e-5)
    assert attention_similarity(jnp.zeros((2, 1, 1, 3, 3))).tolist() == [[0, 0], [0, 0]]
    with pytest.raises(ValueError, match="skip is 5: need a number from 0 to 4"):
        attention_similarity(weights, skip=5)


def test_blocks_are_the_best_of_all_choices():
    rng = np.random.default_rng(1)
    for layers, size, count, edge in ((9, 2, 3, 1), (9, 3, 2, 1), (8, 2, 2, 0), (4, 3, 2, 1), (3, 2, 1, 1)):
        table = rng.random((layers, layers))
        starts = range(edge, layers - edge - size + 1)
        choices = [
            chosen for c in range(count + 1) for chosen in itertools.combinations(starts, c)
            if all(b - a >= size for a, b in itertools.pairwise(chosen))
        ]  # fmt: skip
        best = max(choices, key=lambda chosen: sum(table[first, first + 1 : first + size].mean() for first in chosen))
        found = similar_blocks(table, size=size, count=count, edge=edge)
        assert found == [tuple(range(first, first + size)) for first in best]
    with pytest.raises(ValueError, match="size must be at least 2, got 1"):
        similar_blocks(table, size=1, count=1)


def test_errors_name_what_is_wrong(model, shared):
    for blocks, message in (
        ([(1, 3)], r"blocks has \[1, 3\]: need at least 2 adjacent layers from 0 to 3"),
        ([(3, 4)], r"blocks has \[3, 4\]"),
        ([(2,)], r"blocks has \[2\]"),
        ([(0, 1), (1, 2)], "need blocks that share no layer"),
    ):
        with pytest.raises(ValueError, match=message):
            share_attention(model, blocks)
    with pytest.raises(ValueError, match=r"layers\[2\] is Spec.*: need MultiHeadAttention with keys of its own"):
        share_attention(shared, [(1, 2)])
    with pytest.raises(ValueError, match=r"store selects by keys \(Quest\), and layers with echo=True hold none"):
        shared.init_state(B, 12, Policy(select=Quest(2, 2)))
    with pytest.raises(ValueError, match="echo is True but keys_from is 'self'"):
        nn.MultiHeadAttention(D, N, echo=True, rngs=nnx.Rngs(0))
    echo = nn.MultiHeadAttention(D, N, keys_from="layer", echo=True, rngs=nnx.Rngs(0))
    x = jnp.ones((B, T, D))
    keys = nn.KeyValue(*(jnp.ones((B, T, N, D // N)),) * 2, None)
    with pytest.raises(ValueError, match="context has no queries, but this layer attends with those of 4 heads"):
        echo(x, context=keys)
    with pytest.raises(ValueError, match="context has queries of 8 heads, but"):
        echo(x, context=keys._replace(query=jnp.ones((B, T, 8, 4))))
    other = replace_mixers(shared, lambda layer, mixer: mixer.replace(mask=Window(2)) if layer == 3 else mixer)
    with pytest.raises(ValueError, match="need the same mask in both layers"):
        other(TOKENS, state=other.init_state(B, T))
