"""Reading from chosen tokens: sums over groups, and rows from which tokens were taken out."""

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest

from jaxattn.analysis import direct_attribution, knockout, token_lens
from jaxattn.trace import run

B, T = 2, 8
TOKENS = jax.random.randint(jax.random.key(1), (B, T), 0, 64)
GROUPS = jnp.asarray([[0, 0, 1, 1, 2, 2, 2, -1], [2, 1, 0, 0, 0, 1, 1, 2]])


def metric(logits):
    return logits[:, 6, 5].sum()


def test_groups_of_all_tokens_add_up_to_what_attention_writes():
    """And one group of one row is (A restricted to it) v W_O, read with the scale of the last norm."""
    model = planted.random(layers=2, heads=4)
    found = token_lens(model, TOKENS, metric, GROUPS, 3)  # the token without a group stands behind the row
    parts = direct_attribution(model, TOKENS, metric)
    np.testing.assert_allclose(found.sum(-1), parts.heads.sum((2, 3)), rtol=1e-4, atol=1e-5)
    seen = run(model, TOKENS, record=("weights", "v", "final_norm_scale"))[1]
    module = model.runs[0].branches[0].module
    out = np.asarray(module.out.kernel[...]).reshape(2, 4, -1, 32)
    unembed = np.asarray(model.norm.scale[...] * model.embed.table[...][5])
    for layer, row, group in ((0, 0, 1), (1, 1, 2), (1, 0, 2)):
        w = np.asarray(seen["weights"][layer, row, :, 6]) * (np.asarray(GROUPS[row]) == group)
        v = np.repeat(np.asarray(seen["v"][layer, row]), 2, 1)  # heads that share keys
        u = np.einsum("ns,snh,nhd->d", w, v, out[layer]) / float(seen["final_norm_scale"][row, 6, 0])
        np.testing.assert_allclose(found[layer, row, group], u @ unembed, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", ["hide", "zero"])
@pytest.mark.parametrize("batched", [False, True])
def test_a_token_that_is_knocked_out_has_no_weight(how, batched):
    model = planted.random(layers=2, heads=4)
    hidden = np.zeros((B, T, T), bool)
    hidden[:, 7, [2, 3]] = True
    if batched:
        hidden[1, 7, 0] = True
    heads = np.array([True, False, True, True])
    edits = knockout(jnp.asarray(hidden if batched else hidden[0]), how=how, heads=heads)
    plain = np.asarray(run(model, TOKENS, record=("weights",))[1]["weights"][0])
    found = np.asarray(run(model, TOKENS, record=("weights",), edits=edits)[1]["weights"][0])
    rest = np.where(hidden[:, None] & heads[:, None, None], 0, plain)
    expected = rest / rest.sum(-1, keepdims=True) if how == "hide" else rest
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["hide", "zero"])
def test_knocking_out_nothing_changes_nothing(how):
    model = planted.random(layers=2, heads=4)
    edits = knockout(jnp.zeros((T, T), bool), how=how)
    np.testing.assert_array_equal(model(TOKENS, edits=edits)[0], model(TOKENS)[0])
    with pytest.raises(ValueError, match="how is 'cut'"):
        knockout(jnp.zeros((T, T), bool), how="cut")


def test_the_planted_circuit_needs_the_token_behind_the_earlier_copy():
    circuit = planted.planted()
    tokens = jnp.asarray([[5, 6, 7, 8, 9, 6]])
    assert circuit(tokens)[0][0, -1].argmax() == 7
    found = token_lens(circuit, tokens, lambda logits: logits[:, -1, 7].sum(), jnp.arange(6)[None], 6)
    assert found[1, 0, 2] == pytest.approx(10, abs=1e-3)
    assert abs(found).sum() - abs(found[1, 0, 2]) < 1e-3
    with pytest.raises(ValueError, match="groups has shape"):
        token_lens(circuit, tokens, lambda logits: logits[:, -1, 7].sum(), jnp.arange(3)[None], 6)
    hidden = np.zeros((6, 6), bool)
    hidden[5, 2] = True
    assert circuit(tokens, edits=knockout(hidden))[0][0, -1].argmax() != 7
