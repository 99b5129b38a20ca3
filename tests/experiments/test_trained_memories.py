"""Focused attention, readers of frozen models, layers that share attention: tasks, models and numbers are as said."""

import dataclasses

import jax
import numpy as np
from flax import nnx

from experiments import echoatt, focused, llm_modules
from jaxattn import models

CONFIG = dataclasses.replace(focused.Config(), pairs=6, key_dim=5, values=4)


def test_every_pair_is_asked_for_and_its_value_is_the_target():
    batch = {name: np.asarray(x) for name, x in focused.task(CONFIG).draw(jax.random.key(0), 8).items()}
    assert batch["tokens"].shape == (8, 6, 10)
    shown, asked = batch["tokens"][::2], batch["tokens"][1::2]
    np.testing.assert_array_equal(batch["weights"], np.repeat([[0.0], [1.0]] * 4, 6, 1))
    np.testing.assert_allclose(np.linalg.norm(shown[..., :5], axis=-1), 1, rtol=1e-6)
    assert (shown[..., 9] == 0).all()
    assert (asked[..., 5:] == [0, 0, 0, 0, 1]).all()
    for pairs, questions, targets in zip(shown, asked, batch["targets"][1::2], strict=True):
        found = [int((pairs[:, :5] == question).all(1).argmax()) for question in questions[:, :5]]
        assert sorted(found) == list(range(6))
        assert pairs[found, 5:9].argmax(1).tolist() == targets.tolist()


def test_second_windows_see_the_first_ones_of_their_own_text_and_of_others():
    model = focused.build(CONFIG, 3, 0)
    assert model.runs[0].mixers[0].crossbatch == (1, 3, 5)
    tokens = focused.task(CONFIG).draw(jax.random.key(0), 8)["tokens"]
    slope = np.asarray(jax.grad(lambda x: model(x)[0][7].sum())(tokens))
    assert np.flatnonzero(abs(slope).sum((1, 2))).tolist() == [2, 4, 6, 7]


def test_the_decoder_alone_has_as_many_trained_parameters_or_more():
    config = llm_modules.QUICK
    for parameters in (2000, 5000):
        model = llm_modules.alone(config, parameters, 0)
        assert llm_modules.trained(model) >= parameters
        narrower = models.TransformerConfig(
            length=config.context, width=model.config.width - 2 * config.heads, layers=list(model.config.layers)
        )
        smaller = nnx.eval_shape(lambda narrower=narrower: models.Transformer(narrower, rngs=nnx.Rngs(0)))
        assert model.config.width == config.small or llm_modules.trained(smaller) < parameters


def test_the_least_similar_block_is_found_by_trying_all():
    table = np.random.default_rng(0).random((6, 6))
    means = [table[first, first + 1 : first + 3].mean() for first in range(4)]
    first = int(np.argmin(means))
    assert echoatt.least_similar(table) == (first, first + 1, first + 2)


def test_a_quick_run_of_focused_measures_its_claims(quick_run):
    quick = quick_run("focused")[1]
    assert {claim.number for claim in focused.CLAIMS} <= quick.numbers.keys()
    rows = quick.tables["Among other contexts"]
    assert [row["contexts"] for row in rows] == [1, 2, 4] * 2
    assert all(row["share of the own"] == 1 for row in rows if row["contexts"] == 1)


def test_a_quick_run_of_llm_modules_measures_its_claims(quick_run):
    assert_numbers_are_those_of_the_table(quick_run("llm_modules")[1], llm_modules.CLAIMS)


def test_a_quick_run_of_echoatt_measures_its_claims(quick_run):
    assert_numbers_are_those_of_the_table(quick_run("echoatt")[1], echoatt.CLAIMS)


def assert_numbers_are_those_of_the_table(quick, claims):
    assert {claim.number for claim in claims} <= quick.numbers.keys()
    for row in quick.tables["Quality on held-out text"]:
        assert quick.numbers[f"{row['model']}: bits per byte"] == row["bits per byte"]
