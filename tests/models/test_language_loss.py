"""train.language_loss of a decoder: one number per key, the same number for the same key, and a gradient everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import ATTENTION, FEED, HEADS, MIXED, PLAIN, VOCABULARY, assert_close, decoder, run, shared, tokens

from jaxattn import Causal, Documents, PerHead, Window, Yarn, nn
from jaxattn.core.attend.position import Rotary
from jaxattn.models import Branch, EncoderDecoder, Layer, Spec, TransformerConfig, from_plain, pre_norm, to_plain
from jaxattn.train import language_loss, masked_language_loss, sequence_loss, with_params

B, T = 2, 10
DROPPED = pre_norm(ATTENTION.replace(dropout=0.5), FEED)


def batch():
    rng, sequences = np.random.default_rng(4), tokens(B, T + 1)
    documents = np.sort(rng.integers(0, 3, (B, T)), axis=-1)
    return {
        "tokens": jnp.asarray(sequences[:, :-1]),
        "targets": jnp.asarray(sequences[:, 1:]),
        "documents": jnp.asarray(documents),
        "weights": jnp.asarray(rng.random((B, T)) < 0.8, jnp.float32),
    }


@pytest.fixture(scope="module")
def dropped():
    model = decoder((DROPPED, DROPPED))
    params, loss = language_loss(model)
    compiled = jax.jit(lambda params, key: loss(params, batch(), key)[0])
    return model, params, lambda key: np.asarray(compiled(params, key))


def test_the_same_key_gives_the_same_loss_and_another_key_another(dropped):
    *_, loss = dropped
    one, same, other = (loss(jax.random.key(seed)) for seed in (0, 0, 1))
    assert one.tobytes() == same.tobytes()
    assert one != other


def test_without_a_key_there_is_no_dropout(dropped):
    """The loss is then the cross-entropy of the evaluated model's logits, here in NumPy."""
    model, _params, loss = dropped
    given = {name: np.asarray(x) for name, x in batch().items()}
    logits = np.asarray(run(model, given["tokens"], mask=Documents(batch()["documents"]))[0], np.float64)
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, given["targets"][..., None], -1)[..., 0]
    assert_close(loss(None), (nll * given["weights"]).sum())
    assert loss(None) == loss(None)
    assert abs(loss(jax.random.key(0)) - loss(None)) > 1e-3 * loss(None)


def test_the_loss_leaves_the_model_as_it_is(dropped):
    model, _, loss = dropped
    before = [np.asarray(x) for x in jax.tree.leaves(nnx.state(model, nnx.Not(nnx.RngKey)))]
    loss(jax.random.key(5))
    after = jax.tree.leaves(nnx.state(model, nnx.Not(nnx.RngKey)))
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert model.runs[0].mixers[0].deterministic


def test_dropout_differs_between_layers_of_a_stack_and_between_calls():
    """Two layers with the same weights on the same input, alike but for what they drop."""
    stack = decoder((DROPPED, DROPPED)).runs[0]
    graph, arrays = nnx.split(stack)
    layers = [nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], arrays)).mixers[0] for i in (0, 1)]
    nnx.update(layers[1], nnx.state(layers[0], nnx.Param))
    x = np.random.default_rng(0).standard_normal((B, T, 16)).astype(np.float32)
    call = nnx.jit(lambda mixer, x: mixer(x)[0])
    np.testing.assert_array_equal(call(layers[0], x), call(layers[1], x))
    for layer in layers:
        layer.train()
    drawn = [np.asarray(call(layer, x)) for layer in (layers[0], layers[1], layers[0], layers[1])]
    assert all((drawn[i] != drawn[j]).any() for i in range(4) for j in range(i))


def test_a_model_in_training_draws_anew_at_every_call():
    model, x = decoder((DROPPED,)), tokens(B, T)
    model.train()
    one, other = (np.asarray(run(model, x)[0]) for _ in range(2))
    assert (one != other).any()
    model.eval()
    np.testing.assert_array_equal(run(model, x)[0], run(model, x)[0])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_gradient_reaches_every_parameter_of_every_layer(tied):
    model = shared((PLAIN,)) if tied else decoder(MIXED, head=Spec(nn.Head))
    params, loss = language_loss(model)
    gradient = jax.jit(jax.grad(lambda params: loss(params, batch(), None)[0]))(params)
    flat = {"/".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(gradient)}
    assert sum(name.endswith("null_logit") for name in flat) == (not tied)
    assert ("head/map/kernel" in flat) == (not tied)
    for name, leaf in flat.items():
        layers = leaf if name.startswith("runs") else leaf[None]
        assert (abs(layers).reshape(len(layers), -1).max(-1) > 0).all(), name
        assert np.isfinite(leaf).all(), name


def test_a_z_loss_adds_the_squares_of_the_log_normalisers():
    params, loss = language_loss(shared((PLAIN,)), 0.5)
    total, sums = jax.jit(lambda params: loss(params, batch(), None))(params)
    logits = run(shared((PLAIN,)), batch()["tokens"], mask=Documents(batch()["documents"]))[0]
    z = np.log(np.exp(np.asarray(logits, np.float64)).sum(-1))
    assert_close(total, sums["nll"] + 0.5 * (np.asarray(batch()["weights"]) * z**2).sum())
    assert total > 1.001 * sums["nll"]


def test_with_params_puts_parameters_into_the_model():
    model = shared((PLAIN,))
    params, _ = language_loss(model)
    doubled = with_params(model, jax.tree.map(lambda p: 2 * p, params))
    np.testing.assert_array_equal(doubled.embed.table[...], 2 * model.embed.table[...])
    same = with_params(model, params)
    np.testing.assert_array_equal(run(same, tokens())[0], run(model, tokens())[0])


def test_a_config_comes_back_from_plain_data():
    scaled = Spec(
        nn.MultiHeadAttention,
        heads=HEADS,
        mask=PerHead((Window(2), Causal())),
        position=Rotary(scaling=Yarn(4.0, 64, beta_slow=2.0)),
    )
    layers = [*MIXED, pre_norm(Spec(nn.MultiHeadAttention, heads=HEADS, mask=None)), pre_norm(scaled)]
    config = TransformerConfig(VOCABULARY, 12, 16, layers, head=Spec(nn.Head))
    assert from_plain(to_plain(config)) == config
    with pytest.raises(ValueError, match="not the config of a model"):
        from_plain({"widht": 3})


@pytest.mark.parametrize("z_loss", [0.0, 0.5])
def test_padding_reaches_neither_the_loss_nor_a_gradient(z_loss):
    """The last tokens of a row do not count: with padding ids, and with none, loss and gradient are the same numbers,
    whether documents say so (−1) or not."""
    params, loss = language_loss(decoder(MIXED, head=Spec(nn.Head)), z_loss)
    given = batch()
    padding = np.arange(T) >= np.array([[T - 3], [T]])
    value = jax.jit(jax.value_and_grad(lambda params, batch: loss(params, batch, None)[0]))
    plain = {**given, "weights": jnp.where(padding, 0, given["weights"])}
    expected, gradient = value(params, plain)
    for ids, targets, documents in ((-100, -100, None), (-1, VOCABULARY, None), (-1, -1, -1), (10**6, -100, -1)):
        padded = {
            **plain,
            "tokens": jnp.where(padding, ids, plain["tokens"]),
            "targets": jnp.where(padding, targets, plain["targets"]),
        }
        if documents is not None:
            padded["documents"] = jnp.where(padding, documents, plain["documents"])
        found, of_padded = value(params, padded)
        assert_close(found, expected)
        for one, other in zip(jax.tree.leaves(of_padded), jax.tree.leaves(gradient), strict=True):
            assert np.isfinite(one).all()
            assert_close(one, other)


def test_a_negative_token_before_one_that_counts_makes_the_loss_nan():
    params, loss = language_loss(shared((PLAIN,)))
    given = batch()
    given |= {"documents": jnp.zeros((B, T), int), "weights": jnp.ones((B, T)).at[0, 2].set(0)}
    assert np.isnan(loss(params, {**given, "tokens": given["tokens"].at[0, 2].set(-1)}, None)[0])


def test_a_z_loss_below_0_is_refused_before_training():
    with pytest.raises(ValueError, match=r"z_loss holds -0\.5: need numbers from 0 on"):
        language_loss(shared((PLAIN,)), -0.5)


def test_a_batch_of_tokens_alone_has_the_next_ones_as_targets():
    """And without documents there is no mask: the numbers are those of one document in each row."""
    _, loss = language_loss(decoder((PLAIN, PLAIN)))
    params, _ = language_loss(decoder((PLAIN, PLAIN)))
    whole = tokens(B, T + 1)
    ones, one = jnp.ones((B, T)), jnp.zeros((B, T), int)
    given = {"tokens": whole[:, :-1], "targets": whole[:, 1:], "weights": ones, "documents": one}
    total, sums = loss(params, given, None)
    bare, of_bare = loss(params, {"tokens": whole}, None)  # its last token is read, and is no target
    assert_close(bare, total)
    assert float(of_bare["weight"]) == float(sums["weight"]) == B * T
    split = jnp.arange(T + 1) // 4 * jnp.ones((B, 1), int)
    said = loss(params, {"tokens": whole, "documents": split}, None)
    weights = (split[:, 1:] == split[:, :-1]).astype(float)
    assert_close(said[0], loss(params, given | {"weights": weights, "documents": split[:, :-1]}, None)[0])


def test_a_batch_without_tokens_and_columns_that_are_not_read_are_named():
    params, loss = language_loss(decoder((PLAIN, PLAIN)))
    with pytest.raises(ValueError, match="batch has no 'tokens', but 'input_ids': need 'tokens'"):
        loss(params, {"input_ids": tokens(B, T)}, None)
    with pytest.raises(ValueError, match=r"batch has the columns \['attention_mask'\], which this loss does not read"):
        loss(params, {"tokens": tokens(B, T), "attention_mask": jnp.ones((B, T))}, None)


class Seen(nnx.Module):
    """A model that tells what it was given: the logits of a token are those of a row of a table."""

    def __init__(self, vocabulary):
        self.table = nnx.Param(jnp.eye(vocabulary) * 3)

    def __call__(self, tokens, mask=None):
        return self.table[...][tokens], mask, tokens


def test_masked_tokens_are_drawn_as_bert_draws_them():
    """What counts is drawn, padding never is, and 80 % of the drawn are masked, 10 % any token, 10 % as they are."""
    rows, mask, size = 400, 9, 10
    whole = np.random.default_rng(0).integers(0, 9, (rows, T))
    whole[:, -2:] = -100
    given = {"tokens": jnp.asarray(whole), "weights": jnp.ones((rows, T)).at[:, 0].set(0)}
    seen = []

    class Told(Seen):
        def __call__(self, tokens, mask=None):
            seen.append((np.asarray(tokens), np.asarray(mask.ids)))
            return super().__call__(tokens)

    params, loss = masked_language_loss(Told(size), mask, size, fraction=0.3)
    totals = [loss(params, given, key) for key in (None, None, jax.random.key(1), jax.random.key(2))]
    assert totals[0][0] == totals[1][0]
    assert len({float(total) for total, _ in totals}) == 3
    (inputs, documents), sums = seen[-1], totals[-1][1]
    assert (documents[:, -2:] == -1).all()
    assert (documents[:, :-2] == 0).all()
    assert (inputs[:, 0] == whole[:, 0]).all()
    places = rows * (T - 3)
    drawn = float(sums["weight"])
    assert abs(drawn - 0.3 * places) < 4 * np.sqrt(0.3 * 0.7 * places)
    changed = inputs[:, 1:-2] != whole[:, 1:-2]
    masked = inputs[:, 1:-2] == mask
    for found, share in ((masked, 0.8 + 0.1 / size), (changed & ~masked, 0.1 * 8 / size)):
        assert abs(found.sum() - share * drawn) < 4 * np.sqrt(share * (1 - share) * drawn)
    # Each of the drawn that is not changed costs less than one that is: log(e^3 + 9) with or without 3 taken off.
    z = np.log(np.exp(3) + size - 1)
    assert float(totals[-1][0]) == pytest.approx(drawn * z - 3 * (drawn - changed.sum()), rel=1e-5)
    for arguments, message in (
        ((9, 10, 0.0), "fraction holds 0.0"),
        ((-1, 10, 0.1), "mask_token is -1: need the id"),
        ((9, 0, 0.1), "vocabulary is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            masked_language_loss(Seen(size), *arguments[:2], fraction=arguments[2])


def test_the_loss_of_a_sequence_from_another_does_not_see_padding():
    attention, cross = ATTENTION, ATTENTION.replace(keys_from="context", position=None, mask=None)
    encoder = TransformerConfig(VOCABULARY, 12, 16, [pre_norm(attention.replace(mask=None))], causal=False, head=None)
    layer = Layer([Branch(attention), Branch(cross, name="cross")])
    model = EncoderDecoder(encoder, TransformerConfig(VOCABULARY, 12, 16, [layer]), rngs=nnx.Rngs(0))
    params, loss = sequence_loss(model)
    loss = jax.jit(loss, static_argnums=2)
    inputs, answers = np.asarray(tokens(B, 6)), np.asarray(tokens(B, T))
    total, sums = loss(params, {"inputs": inputs, "tokens": answers}, None)
    assert float(sums["weight"]) == B * (T - 1)
    left = np.concatenate([np.full((B, 2), -1), inputs], axis=1)
    right = np.concatenate([answers, np.full((B, 2), -100)], axis=1)
    padded, of_padded = loss(params, {"inputs": left, "tokens": right}, None)
    assert_close(padded, total)
    assert float(of_padded["weight"]) == B * (T - 1)
    logits = np.asarray(model(jnp.asarray(inputs), jnp.asarray(answers))[0], np.float64)[:, :-1]
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, answers[:, 1:, None], -1)[..., 0]
    assert_close(total, nll.sum())
    with pytest.raises(ValueError, match="batch has no 'inputs', but 'tokens'"):
        loss(params, {"tokens": answers}, None)
