"""What a transformer is made of: branches, embeddings, heads, a decoder that reads an encoder, other mixers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxattn import Alibi, Causal, Documents, Entropy, Explicit, Lengths, Window, attend, models, nn, trace
from jaxattn.core.attend.position import sinusoidal
from jaxattn.models import Branch, EncoderDecoder, Layer, Spec, Transformer, TransformerConfig, pre_norm

B, S, T, D, N, V = 2, 7, 5, 16, 2, 11
EPS = float(np.finfo(np.float32).eps)
ATTENTION, BLOCK = Spec(nn.MultiHeadAttention, heads=N), Spec(nn.FeedForward, hidden=12)
CROSS = Spec(nn.MultiHeadAttention, heads=N, position=None, keys_from="context")
READER = Layer([Branch(ATTENTION), Branch(CROSS, name="cross"), Branch(BLOCK)])
ENCODER = TransformerConfig(V, S, D, [pre_norm(ATTENTION, BLOCK)], causal=False, head=None)
DECODER = TransformerConfig(V, T, D, [READER] * 2)


def noisy(model):
    """Every parameter gets noise, so that none is neutral; in evaluation mode."""
    rng = np.random.default_rng(0)

    def changed(x):
        return jnp.asarray(np.asarray(x) + 0.3 * rng.standard_normal(x.shape).astype(np.float32))

    nnx.update(model, jax.tree.map(changed, nnx.state(model, nnx.Param)))
    model.eval()
    return model


def built(config):
    return noisy(Transformer(config, rngs=nnx.Rngs(0)))


@nnx.jit(static_argnames="record")
def run(model, *inputs, record=(), **options):
    return model(*inputs, record=record, **options)


def ids(length, seed=0, batch=B):
    return np.random.default_rng(seed).integers(0, V, (batch, length))


def close(actual, expected, factor=500):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=factor * EPS * max(abs(expected).max(), 1e-6))


@pytest.fixture(scope="module")
def both():
    return noisy(EncoderDecoder(ENCODER, DECODER, rngs=nnx.Rngs(0)))


def test_what_cross_attention_reads_is_attention_over_the_context(both):
    context, seen = both.encode(ids(S), record=("resid",))
    close(context.x, both.encoder.norm(seen["resid"][0]))
    record = (
        "cross.q",
        "cross.k",
        "cross.v",
        "cross.z",
        "cross.attn_out",
        "cross.resid_mid",
        "resid_mid",
        "cross.read",
    )
    _, _, seen = run(both.decoder, ids(T, 1), context=context, record=record)
    for layer in range(2):
        query, key, value = (seen[f"cross.{name}"][layer] for name in "qkv")
        assert key.shape == (B, S, N, D // N)
        close(seen["cross.z"][layer], attend(query, key, value))
        close(seen["cross.resid_mid"][layer], seen["resid_mid"][layer] + seen["cross.attn_out"][layer], 4)
    np.testing.assert_array_equal(seen["cross.read"][0, 0, :, 0], np.arange(S))


def test_edits_of_one_branch_leave_the_other_alone(both):
    """Cross-attention whose heads read nothing is a model that adds only W_o 0 there; decoding does the same."""
    context, _ = both.encode(ids(S))
    x = ids(T, 1)
    plain = run(both.decoder, x, context=context, record=("z",))[2]["z"]
    edits = {"cross.z": trace.Layers(trace.Scale(jnp.zeros((2, 1, 1)))), "z": {1: trace.Scale(0.5)}}
    logits, _, seen = run(both.decoder, x, context=context, edits=edits, record=("z", "cross.z"))
    np.testing.assert_array_equal(seen["cross.z"], 0)
    np.testing.assert_array_equal(seen["z"][0], plain[0])  # nothing before it has changed
    state = both.decoder.init_state(B, T)
    one, state, _ = run(both.decoder, x[:, :2], context=context, edits=edits, state=state)
    said = [one]
    for t in range(2, T):
        one, state, _ = run(both.decoder, x[:, t : t + 1], edits=edits, state=state)
        said.append(one)
    close(jnp.concatenate(said, 1), logits)


def test_padding_of_the_context_is_not_there(both):
    """On either side of it, and whatever token stands there."""
    x, short = ids(T, 1), ids(4, 2)
    expected = run(both, short, x)[0]
    for left in (0, 3):
        row, positions = np.full((B, S), V - 1), np.full((B, S), -1)
        row[:, left : left + 4], positions[:, left : left + 4] = short, np.arange(4)
        close(run(both, row, x, input_positions=positions)[0], expected)


def test_packed_pairs_are_each_pair_alone(both):
    """Two texts and what is read of each in one row; documents on one side only are refused."""
    first, second = (ids(4, 2, 1), ids(2, 3, 1)), (ids(3, 4, 1), ids(3, 5, 1))
    given, x = (np.concatenate(pair, 1) for pair in zip(first, second, strict=True))
    of_given, of_x = np.repeat([0, 1], [4, 3])[None], np.repeat([0, 1], [2, 3])[None]
    options = {"input_mask": Documents(jnp.asarray(of_given)), "mask": Documents(jnp.asarray(of_x))}
    packed = run(both, given, x, **options)[0]
    close(packed[:, :2], run(both, *first)[0])
    close(packed[:, 2:], run(both, *second)[0])
    with pytest.raises(ValueError, match="mask has documents on one side of cross-attention only"):
        both(given, x, mask=options["mask"])


def test_a_decoder_that_reads_says_what_it_lacks(both):
    with pytest.raises(ValueError, match="context is None: cross-attention needs another sequence"):
        both.decoder(ids(T))
    with pytest.raises(ValueError, match="context is None: cross-attention needs another sequence"):
        both.decoder(ids(1), state=both.decoder.init_state(B, T))
    with pytest.raises(ValueError, match=r"context has shape \(2, 7, 3\): need \[batch, length, 16\]"):
        both.decoder(ids(T), context=jnp.zeros((B, S, 3)))
    for encoder, decoder, share, message in (
        (dataclasses.replace(ENCODER, head=Spec(nn.Head)), DECODER, False, "encoder has the head"),
        (ENCODER, dataclasses.replace(DECODER, layers=[Layer()]), False, "decoder has no cross-attention"),
        (ENCODER, dataclasses.replace(DECODER, vocabulary=V + 1), True, "the embeddings of encoder and decoder differ"),
    ):
        with pytest.raises(ValueError, match=message):
            EncoderDecoder(encoder, decoder, share_embedding=share, rngs=nnx.Rngs(0))


def test_a_shared_embedding_is_one_parameter():
    model = EncoderDecoder(ENCODER, DECODER, share_embedding=True, rngs=nnx.Rngs(0))
    tables = [path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)) if path[-1] == "table"]
    assert len(tables) == 1
    gradient = nnx.jit(nnx.grad(lambda model: (model(ids(S), ids(T, 1))[0] ** 2).sum()))(model)
    assert len([path for path, _ in nnx.to_flat_state(gradient) if path[-1] == "table"]) == 1


def test_branches_are_residual():
    """Gains of 0 add nothing; without them a branch adds what its module gives, normed after if it is."""
    config = TransformerConfig(V, T, D, [Layer([Branch(ATTENTION, scale=0.0), Branch(BLOCK, scale=0.0)])])
    model = Transformer(config, rngs=nnx.Rngs(0))
    _, _, seen = run(model, ids(T), record=("embed", "resid"))
    np.testing.assert_array_equal(seen["resid"][0], seen["embed"])
    after = Spec(nn.RMSNorm, eps=0.5)
    model = built(dataclasses.replace(config, layers=[Layer([Branch(BLOCK, norm_after=after, scale=2.0)])]))
    _, _, seen = run(model, ids(T), record=("embed", "mlp_post", "mlp_out"))
    branch = nnx.merge(*(lambda pair: (pair[0], jax.tree.map(lambda x: x[0], pair[1])))(nnx.split(model.runs[0])))
    (branch,) = branch.branches
    inner = np.asarray(seen["mlp_post"][0] @ branch.module.down.kernel[...], np.float64)
    expected = inner / np.sqrt((inner**2).mean(-1, keepdims=True) + 0.5) * branch.norm_after.scale[...]
    close(seen["mlp_out"][0], expected * branch.scale[...])


def test_parallel_branches_read_the_same():
    layer = Layer([Branch(ATTENTION), Branch(BLOCK)], parallel=True)
    model = built(TransformerConfig(V, T, D, [layer]))
    assert "resid_mid" not in model.sites
    _, _, seen = run(model, ids(T), record=("embed", "attn_out", "mlp_out", "resid"))
    close(seen["resid"][0], seen["embed"] + seen["attn_out"][0] + seen["mlp_out"][0], 4)
    silent = run(model, ids(T), edits={"attn_out": trace.Scale(0.0)}, record=("mlp_out",))[2]["mlp_out"]
    np.testing.assert_array_equal(silent, seen["mlp_out"])


def test_a_model_is_causal_by_its_config_whatever_its_masks_say():
    x = ids(T)
    changed = x.copy()
    changed[:, -1] = (changed[:, -1] + 1) % V
    for mask in (None, Explicit(jnp.ones((T, T), bool))):
        layer = pre_norm(ATTENTION, BLOCK)
        for causal in (True, False):
            model = built(TransformerConfig(V, T, D, [layer], causal=causal))
            before, after = (np.asarray(run(model, each, mask=mask)[0]) for each in (x, changed))
            assert (before[:, :-1] == after[:, :-1]).all() == causal
    with pytest.raises(ValueError, match="model is not causal"):
        models.generate(built(dataclasses.replace(ENCODER, head=Spec(nn.Head))), x, max_new_tokens=1, temperature=0.0)


def test_positions_are_added_where_tokens_stand():
    """Learned and sinusoidal; a padded row is the row alone."""
    for spec in (Spec(nn.PositionEmbedding), Spec(nn.SinusoidalEmbedding)):
        plain = Spec(nn.MultiHeadAttention, heads=N, position=None)
        model = built(TransformerConfig(V, T, D, [pre_norm(plain, BLOCK)], positions=spec))
        x, positions = ids(T), np.array([[-1, 0, 1, 2, -1], [0, 1, 2, 3, 4]])
        logits = run(model, x, positions=positions)[0]
        close(logits[:1, 1:4], run(model, x[:1, 1:4])[0])
        close(logits[1:], run(model, x[1:])[0])
        embedded = run(model, x, record=("embed",))[2]["embed"]
        added = embedded - model.embed(x)
        if spec.target is nn.PositionEmbedding:
            close(added, jnp.broadcast_to(model.positions.table[...], added.shape))
        else:
            close(added, jnp.broadcast_to(sinusoidal(jnp.arange(T), D), added.shape))


def test_there_is_no_position_beyond_the_table():
    model = built(TransformerConfig(V, T, D, [pre_norm(ATTENTION, BLOCK)], positions=Spec(nn.PositionEmbedding)))
    with pytest.raises(ValueError, match="there are 6 tokens: need at most 5, the learned positions"):
        model(ids(T + 1))
    logits = model(ids(2), positions=np.array([3, 5]))[0]
    assert np.isfinite(logits[:, 0]).all()
    assert np.isnan(logits[:, 1]).all()


def test_token_types_are_added():
    model = built(TransformerConfig(V, T, D, [pre_norm(ATTENTION, BLOCK)], embed=Spec(nn.TokenEmbedding, types=2)))
    x, types = ids(T), np.array([[0, 0, 1, 1, 0]])
    added = run(model, x, types=types, record=("embed",))[2]["embed"] - run(model, x, record=("embed",))[2]["embed"]
    table = model.embed.types[...]
    close(added, jnp.broadcast_to((table[1] - table[0]) * types[..., None], added.shape))
    assert np.isnan(run(model, x, types=types + 1)[0][:, 2:]).all()
    with pytest.raises(ValueError, match="types are given, but the embedding has no table"):
        built(TransformerConfig(V, T, D))(x, types=types)
    with pytest.raises(TypeError, match="types must be integers"):
        model(x, types=types * 1.0)


def test_patches_are_cut_row_by_row():
    """An image and patches of unequal sides, patch by patch."""
    embed = noisy(nn.PatchEmbedding(D, patch=(2, 3), channels=4, rngs=nnx.Rngs(0)))
    images = np.random.default_rng(0).standard_normal((B, 4, 9, 4)).astype(np.float32)
    x = np.asarray(embed(images))
    assert x.shape == (B, 1 + 2 * 3, D)
    close(x[:, 0], jnp.broadcast_to(embed.class_token[...], (B, 1, D))[:, 0])
    kernel = np.asarray(embed.map.kernel[...], np.float64)
    for place, (row, column) in enumerate((r, c) for r in range(2) for c in range(3)):
        patch = images[:, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3].reshape(B, -1)
        close(x[:, 1 + place], patch.astype(np.float64) @ kernel + np.asarray(embed.map.bias[...]))
    with pytest.raises(ValueError, match="inputs are images of 4 by 10: need multiples of the patch, 2 by 3"):
        embed(np.zeros((B, 4, 10, 4), np.float32))
    with pytest.raises(TypeError, match=r"inputs must be images \[batch, height, width, 4\]"):
        embed(np.zeros((B, 4, 9, 3), np.float32))


def test_one_bias_serves_all_layers():
    """A table of its own in every layer that says the same makes the same model; both together are their sum."""
    shared = Spec(nn.RelativePositionBias, heads=N, buckets=6)
    plain = Spec(nn.MultiHeadAttention, heads=N, position=None)
    one = built(TransformerConfig(V, T, D, [pre_norm(plain, BLOCK)] * 2, bias=shared))
    many = built(TransformerConfig(V, T, D, [pre_norm(plain.replace(bias=shared), BLOCK)] * 2))
    params = dict(nnx.to_flat_state(nnx.state(one, nnx.Param)))
    table = params.pop(("bias", "table"))
    own = dict(nnx.to_flat_state(nnx.state(many, nnx.Param)))
    params |= {path: leaf for path, leaf in own.items() if path not in params}
    nnx.update(many, nnx.from_flat_state(params))
    many.runs[0].mixers[0].bias.table[...] = jnp.stack([table[...]] * 2)
    close(run(many, ids(T))[0], run(one, ids(T))[0])
    gradient = nnx.jit(nnx.grad(lambda model: (model(ids(T))[0] ** 2).sum()))(one)["bias"]["table"][...]
    assert np.abs(gradient).max() > 0
    steep = Spec(Alibi.geometric)
    doubled = built(
        TransformerConfig(V, T, D, [pre_norm(plain.replace(bias=steep), BLOCK)], bias=Spec(Alibi.geometric, heads=N))
    )
    _, _, seen = run(doubled, ids(T), record=("q", "k", "v", "z"))
    bias = Alibi(2 * Alibi.geometric(N).slopes)
    close(seen["z"][0], attend(*(seen[name][0] for name in "qkv"), bias=bias, mask=Causal()))


def test_replaced_mixers_keep_all_other_parameters():
    """Nothing replaced is the same model; a window in one of three equal layers makes three runs of one."""
    config = TransformerConfig(V, T, D, [pre_norm(ATTENTION, BLOCK)] * 3, positions=Spec(nn.PositionEmbedding))
    model, x = built(config), ids(T)
    same = models.replace_mixers(model, lambda layer, mixer: mixer)
    np.testing.assert_array_equal(run(same, x)[0], run(model, x)[0])
    assert same.runs[0].deterministic

    near = models.replace_mixers(model, lambda layer, mixer: mixer.replace(mask=Window(1)) if layer == 1 else mixer)
    assert near.lengths == (1, 1, 1)
    place = jnp.arange(T)
    hidden = Explicit(place[:, None] - place <= 1)
    close(run(near, x)[0], run(model, x, edits={"scores": {1: hidden}})[0])
    wide = models.replace_mixers(near, lambda layer, mixer: mixer.replace(mask=None))
    assert wide.lengths == (3,)
    close(run(wide, x)[0], run(model, x)[0])


def test_what_a_new_mixer_takes_is_said():
    model = built(TransformerConfig(V, T, D, [pre_norm(ATTENTION, BLOCK), pre_norm(Spec(nn.GLA, heads=N), BLOCK)]))

    def change(layer, mixer):
        return Spec(nn.DeltaNet, heads=N) if mixer.target is nn.MultiHeadAttention else mixer

    with pytest.raises(ValueError, match="Recurrent has other parameters than MultiHeadAttention: need `take`"):
        models.replace_mixers(model, change)
    taken = []
    new = models.replace_mixers(model, change, lambda new, old: taken.append((type(new), type(old))))
    assert taken == [(nn.Recurrent, nn.MultiHeadAttention)]
    kept = dict(nnx.to_flat_state(nnx.state(model.runs[1], nnx.Param)))
    for path, leaf in nnx.to_flat_state(nnx.state(new.runs[1], nnx.Param)):
        np.testing.assert_array_equal(leaf[...], kept[path][...])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Layer([]), ValueError, "branches is empty"),
        (lambda: Layer([ATTENTION]), TypeError, r"branches holds Spec\(.*\): need Branch"),
        (
            lambda: Layer([Branch(BLOCK, norm_sum=Spec(nn.RMSNorm))], parallel=True),
            ValueError,
            "norm_sum, but the branches are parallel",
        ),
        (lambda: TransformerConfig(layers=[ATTENTION]), TypeError, "layers holds Spec"),
        (
            lambda: Transformer(TransformerConfig(layers=[Layer([Branch(BLOCK)] * 2)]), rngs=nnx.Rngs(0)),
            ValueError,
            "branches have the site 'mlp_norm_scale' 2 times: need Branch",
        ),
        (
            lambda: Transformer(TransformerConfig(dtype="float64"), rngs=nnx.Rngs(0)),
            ValueError,
            "dtype is 'float64' but JAX computes in 32 bits",
        ),
        (
            lambda: Transformer(TransformerConfig(head=Spec(nn.Head, cap=0.0)), rngs=nnx.Rngs(0)),
            ValueError,
            r"cap must be positive, or None, got 0\.0",
        ),
        (
            lambda: built(DECODER)(ids(T), context=jnp.zeros((B, S, D)), record=("kross.z",)),
            ValueError,
            "record 'kross.z' is of 'kross.z', which no layer has: need one of .*'cross.z'",
        ),
        (
            lambda: built(DECODER)(ids(T), context=jnp.zeros((B, S, D)), edits={"cross.zz": trace.Scale(0.0)}),
            ValueError,
            "edits names the unknown site 'cross.zz'",
        ),
    ],
)
def test_what_makes_no_model_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("norms", [{"norm": None, "norm_sum": Spec(nn.LayerNorm)}, {}], ids=["post-norm", "pre-norm"])
def test_the_residual_stream_is_float32_whatever_is_narrow(norms):
    """Computation in bfloat16, and parameters in bfloat16; decoding does the same."""
    layer = Layer([Branch(ATTENTION, **norms), Branch(BLOCK, **norms)])
    config = TransformerConfig(V, T, D, [layer] * 2, dtype="bfloat16")
    model, x = built(config), ids(T)
    wide = built(dataclasses.replace(config, dtype="float32"))
    narrow = built(dataclasses.replace(config, dtype="float32"))
    params = nnx.state(narrow, nnx.Param)
    nnx.update(narrow, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))
    expected = run(wide, x)[0]
    for each in (model, narrow):
        logits, _, seen = run(each, x, record=("resid",))
        assert seen["resid"].dtype == jnp.float32
        np.testing.assert_allclose(logits, expected, atol=0.1 * abs(np.asarray(expected)).max())
    state, said = model.init_state(B, T), []
    for t in range(T):
        one, state, _ = run(model, x[:, t : t + 1], state=state)
        said.append(one)
    np.testing.assert_allclose(jnp.concatenate(said, 1), run(model, x)[0], atol=0.1 * abs(np.asarray(expected)).max())


def test_learned_positions_begin_anew_in_every_document():
    plain = Spec(nn.MultiHeadAttention, heads=N, position=None)
    model = built(TransformerConfig(V, T, D, [pre_norm(plain, BLOCK)], positions=Spec(nn.PositionEmbedding)))
    rows = np.concatenate([ids(3, 1, 1), ids(4, 2, 1)], 1)  # longer than the table, but no document is
    packed = run(model, rows, mask=Documents(jnp.array([[0, 0, 0, 1, 1, 1, 1]])))[0]
    close(packed[:, :3], run(model, rows[:, :3])[0])
    close(packed[:, 3:], run(model, rows[:, 3:])[0])


def test_a_vector_of_a_text_is_that_of_its_first_token():
    config = TransformerConfig(V, T, D, [pre_norm(ATTENTION, BLOCK)], causal=False, head=Spec(nn.Pooler))
    model, x = built(config), ids(T)
    positions = np.array([[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4]])
    pooled = run(model, x, positions=positions)[0]
    close(pooled[0], run(model, x[:1, 2:])[0][0])
    close(pooled[1], run(model, x[1:])[0][0])


def test_measures_at_scores_and_sites_that_a_module_has():
    """Also behind the name of a branch; a module without sites has none."""
    model = built(
        TransformerConfig(
            V,
            T,
            D,
            [Layer([Branch(ATTENTION, name="a"), Branch(Spec(nnx.Linear, in_features=D, out_features=D), name="b")])],
        )
    )
    x = ids(T)
    record = {"scores": ("a.scores", Entropy()), "weights": ("a.weights", Entropy())}
    seen = model(x, record=record)[2]
    np.testing.assert_array_equal(seen["scores"], seen["weights"])
    assert "b.mlp_out" in model.sites
    assert "b.mlp_pre" not in model.sites
    with pytest.raises(ValueError, match=r"record 'b\.mlp_pre' is of 'b\.mlp_pre', which no layer has"):
        model(x, record=("b.mlp_pre",))


def test_a_state_is_followed_from_the_first_mixer_that_holds_positions():
    """Behind a layer that only reads the context, and behind one that has no mixer at all."""
    context = jnp.asarray(np.random.default_rng(0).standard_normal((B, S, D)), jnp.float32)
    for first in (Layer([Branch(CROSS, name="cross")]), Layer([Branch(BLOCK)])):
        model, x = built(TransformerConfig(V, T, D, [first, pre_norm(ATTENTION, BLOCK)])), ids(T)
        options = {"context": context} if model.crosses else {}
        whole = run(model, x, **options)[0]
        state = model.init_state(B, T)
        one, state, _ = run(model, x[:, :3], state=state, **options)
        two, state, _ = run(model, x[:, 3:], state=state)
        close(jnp.concatenate([one, two], 1), whole)
        if model.crosses:
            drawn = models.generate(model, x[:, :2], max_new_tokens=2, temperature=0.0, context=context)
            np.testing.assert_array_equal(
                drawn.tokens[:, 0], run(model, x[:, :2], context=context)[0][:, -1].argmax(-1)
            )


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: built(dataclasses.replace(DECODER, meta_tokens=2)),
            ValueError,
            "meta_tokens is 2 in a model with cross-attention",
        ),
        (
            lambda: built(TransformerConfig(V, T, D, [pre_norm(Spec(nn.Parallel, mixers=(CROSS, ATTENTION)))])),
            ValueError,
            "mixers holds cross-attention, which needs a branch of its own",
        ),
        (
            lambda: built(TransformerConfig(V, T, D))(ids(T), context=jnp.zeros((B, S, D))),
            ValueError,
            "no layer reads it",
        ),
        (lambda: built(DECODER)(ids(T), context=(jnp.zeros((B, S, D)), {})), TypeError, "context must be an array"),
        (
            lambda: built(DECODER)(
                ids(T), mask=Documents(jnp.zeros((1, T), int)), state=built(DECODER).init_state(B, T)
            ),
            ValueError,
            "mask has documents but context is None",
        ),
        (
            lambda: built(
                TransformerConfig(
                    V,
                    T,
                    D,
                    [
                        pre_norm(ATTENTION),
                        Layer([Branch(ATTENTION.replace(keys_from="layer"), name="a"), Branch(ATTENTION)]),
                    ],
                )
            ),
            ValueError,
            "a layer that reads the keys of another has keys of its own too",
        ),
        (
            lambda: built(
                TransformerConfig(
                    V, T, D, [pre_norm(ATTENTION.replace(key_heads=1)), pre_norm(ATTENTION.replace(keys_from="layer"))]
                )
            )(ids(T)),
            ValueError,
            "context has 1 key heads of 8 channels, but this layer reads 2 of 8",
        ),
        (
            lambda: EncoderDecoder(ENCODER, DECODER, rngs=nnx.Rngs(0)).encode(ids(S), mask=Lengths(jnp.array([5, 5]))),
            ValueError,
            "mask is Lengths, by which the decoder could not tell padding",
        ),
        (
            lambda: models.linearize(built(TransformerConfig(V, T, D, bias=Spec(nn.RelativePositionBias, heads=4)))),
            ValueError,
            "model has a bias that all layers share",
        ),
        (lambda: ATTENTION.replace(mask=ids), TypeError, "mask holds a function or a class, which cannot be written"),
        (lambda: ATTENTION.replace(dtype=jnp.bfloat16), TypeError, "dtype holds a function or a class"),
    ],
)
def test_what_would_be_wrong_in_silence_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
