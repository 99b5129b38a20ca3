"""Parity, grokking and distilled attention: what is measured is what its name says, and every claim is judged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from experiments import attention_to_ffn, decoders, grokking, random_access
from jaxattn import icl, models, nn, trace
from jaxattn.claims import report


def judges(claims, result):
    assert {claim.number for claim in claims} <= result.numbers.keys()
    report.judged(claims, [result])


# random_access


def test_padded_prompts_are_the_prompts_with_rows_filled_up():
    prompt = icl.BitParity("scratchpad", 3, 3).sample(jax.random.key(0), 5)
    longer = random_access.padded(prompt, 11)
    np.testing.assert_array_equal(longer.x[:, :7], prompt.x)
    assert (longer.x[:, 7:] == 4).all()
    assert longer.y.shape == longer.weights.shape == (5, 11)
    assert longer.weights.sum() == prompt.weights.sum()


def test_unknown_runs_are_named(tmp_path):
    config = dataclasses.replace(random_access.QUICK, runs=("interleaved, rotary",))
    with pytest.raises(ValueError, match="runs holds 'interleaved, rotary'"):
        random_access.run(config, 0, tmp_path, Console(quiet=True))


@pytest.mark.slow
def test_parities_of_short_prompts_are_learned(quick_run):
    result = quick_run("random_access")[1]
    judges(random_access.CLAIMS, result)
    rows = {(row["run"], row["bits"]): row for row in result.tables["Parities"]}
    assert list(rows) == [(run, bits) for run in random_access.QUICK.runs for bits in (5, 8)]
    assert rows["interleaved, convolution", 5]["bits right"] > 0.9
    for row in rows.values():
        assert row["no error"] <= row["bits right"] <= 1
    panels = result.figures["Attention of a scratchpad"].panels
    assert [np.shape(each) for each in panels.values()] == [(5, 5), (8, 8)]


# grokking


def test_effective_frequencies_are_those_of_equal_shares():
    assert grokking.effective(jnp.array([0.25] * 4)) == pytest.approx(4)
    assert grokking.effective(jnp.array([0.0, 1.0, 0.0])) == pytest.approx(1)


def test_a_curve_is_first_high_where_it_is():
    points = [(0, 0.1), (100, 0.995), (200, 0.5), (300, 1.0)]
    assert decoders.first_step(points, 0.99) == 100
    assert decoders.first_step(points, 1.1) is None


def test_the_batch_is_a_whole_side():
    task = icl.ModularAddition(5, 0.4)
    source, rows = grokking.whole(task)
    assert rows == 10
    np.testing.assert_array_equal(source.draw(jax.random.key(0), rows).x, task.every().x)


def test_the_spectrum_is_that_of_all_pairs():
    """A model that answers by hand has its frequencies, in the embedding and in the logits."""
    circuit = icl.adding_circuit(7, (2,))

    class ByHand:
        embed = type("Embed", (), {"table": circuit.table})

        def __call__(self, tokens):
            return jnp.repeat(circuit(tokens)[:, 2:3], 3, 1), None, {}

    for shares in grokking.spectrum(ByHand(), icl.ModularAddition(7)):
        np.testing.assert_allclose(shares, [0, 1, 0], atol=1e-5)


@pytest.mark.slow
def test_both_trainings_are_measured(quick_run):
    result = quick_run("grokking")[1]
    judges(grokking.CLAIMS, result)
    assert list(result.figures["Accuracy"].lines) == [
        f"{name}, {side}" for name in ("decay", "no decay") for side in ("shown", "held out")
    ]
    for lines in (figure.lines for figure in result.figures.values()):
        assert all(points[-1][0] == 100 for points in lines.values())


# attention_to_ffn


def encoder():
    mixer = models.Spec(nn.MultiHeadAttention, heads=2, position=None)
    return decoders.build(mixer, vocabulary=6, length=5, width=8, layers=2, seed=0, causal=False)


def test_what_attention_adds_put_in_its_place_changes_nothing():
    """A map that is the attention layer itself, in one layer and in all."""
    model, tokens = encoder(), jax.random.randint(jax.random.key(0), (3, 5), 0, 6)
    exact = model(tokens)[0]

    def itself(layer):
        def apply(x):
            start = jnp.full((), layer), x
            return model(tokens, start=start, record=("attn_out",))[2]["attn_out"][layer]

        return apply

    for maps in ([itself(0), None], [None, itself(1)], [itself(0), itself(1)], [None, None]):
        np.testing.assert_allclose(attention_to_ffn.swapped(model, tokens, maps), exact, atol=1e-5)
    nothing = [lambda x: jnp.zeros_like(x)] * 2
    np.testing.assert_allclose(
        attention_to_ffn.swapped(model, tokens, nothing),
        model(tokens, edits={"attn_out": trace.Scale(0.0)})[0],
        atol=1e-6,
    )


def test_an_affine_layer_is_met_by_the_affine_map_and_learned_by_a_network():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(400, 2, 3)), jnp.float32)
    y = (x.reshape(400, 6) @ rng.normal(size=(6, 6)) + 2).reshape(400, 2, 3).astype(jnp.float32)
    found = attention_to_ffn.affine(x[:200], y[:200])
    assert attention_to_ffn.left(found(x[200:]), y[200:]) < 1e-9
    params, errors = attention_to_ffn.distilled(
        jax.random.key(0), x[:200], y[:200], hidden=32, steps=300, batch=64, rate=0.01
    )
    assert attention_to_ffn.left(attention_to_ffn.network(params, x[200:]), y[200:]) < 0.2
    assert errors[-1] < 0.1 * errors[0]


def test_with_one_token_attention_is_affine():
    """Behind no norm: it reads its own value, whatever its weights are."""
    attention = nn.MultiHeadAttention(6, heads=2, position=None, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (200, 1, 6))
    y = attention(x)[0]
    assert attention_to_ffn.left(attention_to_ffn.affine(x[:100], y[:100])(x[100:]), y[100:]) < 1e-9


@pytest.mark.slow
def test_layers_are_distilled_and_swapped(quick_run):
    result = quick_run("attention_to_ffn")[1]
    judges(attention_to_ffn.CLAIMS, result)
    (row,) = result.tables["R² of what a layer adds"]
    assert row["permutation error, attention"] < 1e-8 < row["permutation error, network"]
    assert [row["in place of attention"] for row in result.tables["Accuracy"]] == [
        "attention",
        "network in layer 0",
        "affine map in layer 0",
        "networks in all layers",
        "affine maps in all layers",
        "nothing in all layers",
    ]
