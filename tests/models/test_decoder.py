"""models.Transformer: causal, blind to other documents, the same scanned or unrolled, the same decoded or prefilled."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import (
    ATTENTION,
    CONTEXT,
    FEED,
    HEADS,
    MIXED,
    PLAIN,
    SIGMOID,
    STREAMING,
    VOCABULARY,
    WIDTH,
    assert_close,
    decoder,
    run,
    shared,
    tokens,
)

from jaxattn import Causal, Documents, Lengths, Window, attend, nn
from jaxattn.models import Layer, Spec, Transformer, TransformerConfig, from_plain, pre_norm, to_plain

IDS = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, -1])


@pytest.fixture(scope="module")
def mixed():
    return shared()


@pytest.fixture(scope="module")
def logits(mixed):
    return np.asarray(run(mixed, tokens())[0])


@pytest.mark.parametrize("place", [0, 5, CONTEXT - 1])
def test_the_future_does_not_change_the_past(mixed, logits, place):
    changed = tokens()
    changed[:, place] = (changed[:, place] + 1) % VOCABULARY
    after = np.asarray(run(mixed, changed)[0])
    np.testing.assert_array_equal(after[:, :place], logits[:, :place])
    assert (after[:, place:] != logits[:, place:]).any(-1).all()


@pytest.mark.parametrize("token", [-1, -VOCABULARY, VOCABULARY, -100, 2**31 - 1])
def test_a_token_outside_the_vocabulary_gives_nan_where_it_is_seen(mixed, logits, token):
    """Negative ones are not counted from the end. Other rows do not see it."""
    strange = tokens()
    strange[0, 5] = token
    found = np.asarray(run(mixed, strange)[0])
    assert np.isnan(found[0, 5:]).all()
    np.testing.assert_array_equal(found[1:], logits[1:])


def test_narrow_integers_are_the_tokens_they_say():
    """The size of the vocabulary does not fit their 8 bits."""
    layers = (pre_norm(Spec(nn.MultiHeadAttention, heads=2)),)
    model = Transformer(TransformerConfig(vocabulary=258, width=8, layers=layers), rngs=nnx.Rngs(0))
    given = np.array([[1, 100, 50, 3]])
    expected = model(jnp.asarray(given))[0]
    for dtype in (np.uint8, np.int8):
        np.testing.assert_array_equal(model(jnp.asarray(given, dtype))[0], expected)


def test_a_vocabulary_of_one_token_has_no_others():
    model = decoder((PLAIN,))
    model = Transformer(dataclasses.replace(model.config, vocabulary=1), rngs=nnx.Rngs(0))
    found = np.asarray(run(model, np.array([[0, 0], [0, 1], [-1, 0]]))[0])
    assert np.isfinite(found[0]).all()
    assert np.isnan([found[1, 1], *found[2]]).all()


def test_no_token_is_read_where_there_is_padding(mixed):
    """Positions −1: neither the logits elsewhere nor a gradient depends on what stands there."""
    positions = np.where(np.arange(CONTEXT) < 8, np.arange(CONTEXT), -1)[None]
    graph, params, rest = nnx.split(mixed, nnx.Param, ...)

    @jax.jit
    def value(params, given):
        logits, *_ = nnx.merge(graph, params, rest)(given, positions=positions)
        return (logits[:, :8] ** 2).sum(), logits

    (_, plain), gradient = jax.value_and_grad(value, has_aux=True)(params, tokens())
    for token in (-1, -100, VOCABULARY):
        padded = np.where(positions >= 0, tokens(), token)
        (_, found), of_padded = jax.value_and_grad(value, has_aux=True)(params, padded)
        assert np.isfinite(found).all()
        np.testing.assert_array_equal(found[:, :8], plain[:, :8])
        for one, other in zip(jax.tree.leaves(of_padded), jax.tree.leaves(gradient), strict=True):
            assert_close(one, other)


@pytest.mark.parametrize("document", [0, 1, 2])
def test_a_document_does_not_see_another(mixed, document):
    changed, inside = tokens(), document == IDS
    changed[:, inside] = (changed[:, inside] + 1) % VOCABULARY
    mask = Documents(jnp.asarray(IDS))
    before, after = (np.asarray(run(mixed, x, mask=mask)[0]) for x in (tokens(), changed))
    np.testing.assert_array_equal(after[:, ~inside], before[:, ~inside])
    assert (after[:, inside] != before[:, inside]).any(-1).all()


def test_no_gradient_flows_between_documents():
    """With one token id per position the rows of the embedding are the inputs, and each document has its own rows."""
    model = decoder((STREAMING, SIGMOID), head=Spec(nn.Head))
    model.embed = nn.TokenEmbedding(CONTEXT, WIDTH, rngs=nnx.Rngs(0))
    each = jnp.arange(CONTEXT)[None]

    @nnx.jit
    def gradient(model, document):
        def loss(model):
            logits = model(each, mask=Documents(jnp.asarray(IDS)))[0]
            return ((document == IDS)[:, None] * jax.nn.log_softmax(logits)[0, :, 0][:, None]).sum()

        return nnx.grad(loss)(model)["embed"]["table"][...]

    for document in (0, 1, 2):
        reached = np.asarray(gradient(model, document) != 0)
        np.testing.assert_array_equal(reached.all(-1), document == IDS)
        np.testing.assert_array_equal(reached.any(-1), document == IDS)


def test_a_packed_document_is_the_document_alone():
    """Where only distances count (rotary, ALiBi) a document has the logits it has by itself at positions from 0."""
    model, x = shared((PLAIN, SIGMOID)), tokens()
    packed = np.asarray(run(model, x, mask=Documents(jnp.asarray(IDS)))[0])
    alone = np.asarray(run(model, np.concatenate([x[:, 4:], x[:, :4]], axis=1))[0])
    # Rotary angles are rounded at positions up to the context, scores accordingly.
    assert_close(packed[:, 4:9], alone[:, :5], factor=20 * 2 * CONTEXT)


def test_every_row_of_a_batch_is_a_sequence_of_its_own(mixed, logits):
    order = np.array([2, 0, 1])
    np.testing.assert_array_equal(run(mixed, tokens()[order])[0], logits[order])


def copied(run_of, index, other):
    """Copies layer `index` of a stack of layers into a stack of one layer."""
    nnx.update(other, jax.tree.map(lambda a: a[index : index + 1], nnx.state(run_of, nnx.Param)))


def test_scanned_layers_are_unrolled_layers():
    """Window(10⁶) is Causal() at these lengths, but not equal to it: alternated, every layer is a run of its own."""
    scanned = decoder((PLAIN,) * 4)
    wide = pre_norm(ATTENTION.replace(mask=Causal() & Window(10**6)), FEED)
    unrolled = decoder((PLAIN, wide) * 2, seed=1)
    assert len(scanned.runs) == 1
    assert len(unrolled.runs) == 4
    for index, run_of in enumerate(unrolled.runs):
        copied(scanned.runs[0], index, run_of)
    for name in ("embed", "norm"):
        nnx.update(getattr(unrolled, name), nnx.state(getattr(scanned, name)))
    record = ("resid", "attn_out")
    one, _, records = run(scanned, tokens(), record=record)
    other, _, other_records = run(unrolled, tokens(), record=record)
    assert_close(one, other)
    for site in record:
        assert_close(records[site], other_records[site])
    assert len({np.asarray(layer).tobytes() for layer in records["resid"]}) == 4


def test_equal_neighbours_are_compiled_once():
    def size(count):
        graph, arrays = nnx.split(nnx.eval_shape(lambda: Transformer(config(count), rngs=nnx.Rngs(0))))
        return len(str(jax.make_jaxpr(lambda arrays: nnx.merge(graph, arrays)(jnp.zeros((1, 4), int))[0])(arrays)))

    def config(count):
        return TransformerConfig(VOCABULARY, CONTEXT, WIDTH, (PLAIN,) * count)

    assert size(9) == size(3)


def test_layers_of_a_stack_start_from_different_weights():
    model = Transformer(TransformerConfig(VOCABULARY, CONTEXT, WIDTH, (PLAIN,) * 3), rngs=nnx.Rngs(0))
    kernels = np.asarray(model.runs[0].mixers[0].query.kernel[...])
    assert kernels.shape == (3, WIDTH, WIDTH)
    assert len({kernel.tobytes() for kernel in kernels}) == 3
    # Variance 1 / fan-in of the layer, not of the stack: 768 draws of a truncated normal, 5 standard errors.
    assert kernels.var() * WIDTH == pytest.approx(1, abs=5 * np.sqrt(2 / kernels.size))


def test_tied_models_read_out_with_the_embedding_and_untied_ones_with_a_head_of_their_own(mixed, logits):
    untied = decoder(head=Spec(nn.Head))
    count = [sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param))) for model in (mixed, untied)]
    assert count[1] - count[0] == VOCABULARY * WIDTH
    shared = nnx.state(mixed, nnx.Param)
    untied.head.map.kernel[...] = mixed.embed.table[...].T
    for name, state in shared.items():
        nnx.update(getattr(untied, name), state)
    assert_close(run(untied, tokens())[0], logits)


@pytest.fixture(scope="module")
def ragged(logits):
    """Lengths 12, 7 and 4, in a layout padded at the right and in one padded at the left; the logits of each alone."""
    return np.array([12, 7, 4]), np.asarray(logits)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("cut", [[1] * CONTEXT, [6, 6]], ids=["token by token", "in halves"])
def test_decode_is_prefill(mixed, ragged, padding, cut):
    (lengths, expected), x = ragged, tokens()
    first = CONTEXT - lengths if padding == "left" else np.zeros(3, int)
    inputs, positions = np.full_like(x, VOCABULARY - 1), np.full_like(x, -1)
    for b, n in enumerate(lengths):
        inputs[b, first[b] : first[b] + n], positions[b, first[b] : first[b] + n] = x[b, :n], np.arange(n)
    state, pieces, start = mixed.init_state(3, CONTEXT), [], 0
    for size in cut:
        piece = slice(start, start + size)
        logits, state, _ = run(mixed, inputs[:, piece], positions=jnp.asarray(positions[:, piece]), state=state)
        pieces.append(np.asarray(logits))
        start += size
    logits = np.concatenate(pieces, axis=1)
    for b, n in enumerate(lengths):
        assert_close(logits[b, first[b] : first[b] + n], expected[b, :n])


@pytest.mark.parametrize("meta", [0, 2])
def test_past_the_capacity_logits_are_nan_and_known_positions_are_refused(meta):
    """Whether tokens come one by one or 4 and 4, and whether positions are given; meta tokens take no room."""
    for layers, cut in (((PLAIN, STREAMING), [1] * 8), ((PLAIN, PLAIN), [4, 4])):
        model = decoder(layers, meta_tokens=meta)
        whole = np.asarray(run(model, tokens())[0])
        for given in (False, True):
            state, first = nnx.jit(lambda model: model.init_state(3, 5))(model), 0
            for size in cut:
                piece, places = tokens()[:, first : first + size], jnp.arange(first, first + size)
                logits, state, _ = run(model, piece, positions=places if given else None, state=state)
                for place in range(size):
                    if first + place < 5:
                        assert_close(logits[:, place], whole[:, first + place])
                    else:
                        assert np.isnan(logits[:, place]).all()
                first += size
    state = model.init_state(3, 5)
    with pytest.raises(ValueError, match=f"positions reaches {5 + meta} but the state has capacity {5 + meta}"):
        model(tokens()[:, :1], positions=jnp.array([5]), state=state)
    with pytest.raises(ValueError, match=f"positions reaches {5 + meta} but the state has capacity {5 + meta}"):
        model(tokens()[:, :6], state=state)


def test_bfloat16_computes_in_bfloat16_with_float32_parameters_and_gradients():
    wide, narrow = decoder((PLAIN,) * 2), decoder((PLAIN,) * 2, dtype="bfloat16")
    params = nnx.state(narrow, nnx.Param)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    nnx.update(narrow, nnx.state(wide, nnx.Param))
    expected, logits = (np.asarray(run(model, tokens())[0], np.float64) for model in (wide, narrow))
    # About 4 roundings (norm, projection, mixing, projection back), each of half an epsilon, in each of 2 x 2 blocks.
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    error = abs(logits - expected).max() / (eps * abs(expected).max())
    assert error <= 8
    assert error > 2**-6  # and not float32 under another name, whose epsilon is 2^-16 of this one
    gradient = nnx.jit(nnx.grad(lambda model, x: (model(x)[0] ** 2).mean()))(narrow, tokens())
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow.init_state(1, 2))} == {
        jnp.dtype("bfloat16"),
        jnp.dtype("int32"),
    }


@pytest.mark.parametrize("bad", [np.zeros((2, 3), np.float32), np.zeros(3, np.int32)], ids=["floats", "no batch"])
def test_tokens_must_be_a_batch_of_integers(mixed, bad):
    with pytest.raises(TypeError, match=r"tokens must be integers \[batch, length\], got "):
        mixed(bad)


def test_tokens_that_are_no_array_or_none_are_named(mixed):
    for bad, error, message in (
        ([[1, 2]], TypeError, "inputs must be an array, got list"),
        (jax.ShapeDtypeStruct((1, 2), int), TypeError, "inputs is a ShapeDtypeStruct, which holds no numbers"),
        (np.zeros((2, 0), int), ValueError, r"inputs has shape \(2, 0\): need at least one row of at least one token"),
        (np.zeros((0, 2), int), ValueError, r"inputs has shape \(0, 2\): need at least one row of at least one token"),
    ):
        with pytest.raises(error, match=message):
            mixed(bad)
    with pytest.raises(TypeError, match="x is a ShapeDtypeStruct"):
        mixed.runs[0].mixers[0](jax.ShapeDtypeStruct((1, 2, WIDTH), float))
    with pytest.raises(TypeError, match="query is a ShapeDtypeStruct"):
        attend(*[jax.ShapeDtypeStruct((1, 2, 1, 4), float)] * 3)


def test_numbers_of_numpy_make_the_same_model_and_go_into_its_plain_config():
    numpy = TransformerConfig(
        np.int64(VOCABULARY),
        np.int32(CONTEXT),
        np.int64(WIDTH),
        [pre_norm(Spec(nn.MultiHeadAttention, heads=np.int64(2)))],
    )
    python = TransformerConfig(VOCABULARY, CONTEXT, WIDTH, [pre_norm(Spec(nn.MultiHeadAttention, heads=2))])
    assert numpy == python
    assert from_plain(json.loads(json.dumps(to_plain(numpy)))) == python
    assert run(Transformer(numpy, rngs=nnx.Rngs(0)), tokens())[0].shape == (3, CONTEXT, VOCABULARY)


def test_equal_configs_are_equal_and_hash_alike():
    config, same = (
        TransformerConfig(layers=(pre_norm(Spec(nn.MultiHeadAttention, heads=4, mask=Causal() & Window(3))),) * 2)
        for _ in range(2)
    )
    assert config == same
    assert hash(config) == hash(same)
    assert config != dataclasses.replace(
        same, layers=(pre_norm(Spec(nn.MultiHeadAttention, heads=4, mask=Causal() & Window(4))),) * 2
    )
    attention = Spec(nn.MultiHeadAttention, heads=4)
    others = pre_norm(attention.replace(heads=2)), pre_norm(attention, Spec(nn.FeedForward, hidden=8))
    assert len({Layer(), pre_norm(attention), *others}) == 3


def test_layers_may_be_given_as_a_list():
    config = TransformerConfig(VOCABULARY, CONTEXT, WIDTH, [PLAIN, PLAIN])
    assert config == TransformerConfig(VOCABULARY, CONTEXT, WIDTH, (PLAIN, PLAIN))
    assert hash(config) == hash(TransformerConfig(VOCABULARY, CONTEXT, WIDTH, (PLAIN, PLAIN)))


@pytest.mark.parametrize("name", ["vocabulary", "length", "width"])
def test_sizes_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        TransformerConfig(**{name: 0})


def test_a_dtype_must_be_one_that_trains():
    with pytest.raises(ValueError, match="dtype is 'int32': need 'float32', 'bfloat16' or 'float64'"):
        TransformerConfig(dtype="int32")


def test_a_model_needs_layers():
    with pytest.raises(ValueError, match="layers is empty: need at least one Layer"):
        TransformerConfig(layers=())


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        (Spec(nn.MultiHeadAttention, heads=3), "features 16 is no multiple of heads 3"),
        (Spec(nn.MultiHeadAttention, heads=4, key_heads=3), "key_heads is 3 but heads is 4: need a divisor of 4"),
        (Spec(nn.MultiHeadAttention, heads=4, dropout=1.5), r"dropout must be at least 0 and below 1, got 1\.5"),
    ],
)
def test_layers_that_make_no_sense_are_refused_when_the_model_is_built(mixer, message):
    with pytest.raises(ValueError, match=message):
        Transformer(TransformerConfig(VOCABULARY, CONTEXT, WIDTH, (pre_norm(mixer),)), rngs=nnx.Rngs(0))


def test_a_decoder_works_under_every_transformation():
    model, x = shared((SIGMOID, SIGMOID)), tokens(2)
    expected = run(model, x)[0]
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def of(params, x):
        return nnx.merge(graph, params, rest)(x)[0]

    def loss(params):
        return (of(params, x) ** 2).mean()

    assert_close(jax.jit(of)(params, x), expected)
    gradient = nnx.to_pure_dict(jax.jit(jax.grad(loss))(params))
    for other in (
        jax.jit(jax.grad(jax.checkpoint(loss)))(params),
        nnx.jit(nnx.grad(lambda model: (model(x)[0] ** 2).mean()))(model),
    ):
        jax.tree.map(assert_close, nnx.to_pure_dict(other), gradient)
    both = jax.jit(jax.vmap(of, in_axes=(0, None)))(jax.tree.map(lambda p: jnp.stack([p, 0.5 * p]), params), x)
    assert_close(both[0], expected)
    assert_close(both[1], jax.jit(of)(jax.tree.map(lambda p: 0.5 * p, params), x))
    constant = jax.jit(lambda x: jax.lax.map(lambda row: model(row[None])[0][0], x))(x)  # a captured model
    assert_close(constant, expected)


def test_the_layers_of_the_mixed_model_are_what_its_tests_say():
    assert len({layer.branches[0].module for layer in MIXED}) == 3
    assert {layer.branches[0].module.arguments["heads"] for layer in MIXED} == {HEADS}


def test_a_spec_holds_no_arrays():
    with pytest.raises(TypeError, match="mask holds an array"):
        Spec(nn.MultiHeadAttention, heads=4, mask=Lengths(jnp.array([3])))
