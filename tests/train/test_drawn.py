"""Training on batches that are drawn inside the step: the same loop, the same resuming, and data that depend on nothing
but the seed and the number of the step."""

import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bigram import CONFIG, run
from rich.console import Console

from jaxattn.train import Drawn, ordered_batches
from jaxattn.train.data import TRAINING, drawn_batch

EPS = float(np.finfo(np.float32).eps)
# Stops at steps 2, 4, 6, 8, 10 and 12: two steps run together.
ONE = dataclasses.replace(CONFIG, accumulate=1, save_every=6)


def draw(key, rows):
    """Rows that count up from a random start; the target of each token is the next."""
    tokens = jax.random.randint(key, (rows, 1), 0, 50) + jnp.arange(8)
    return {"tokens": tokens, "targets": tokens + 1, "weights": jnp.ones(tokens.shape)}


COUNTING = Drawn(draw, length=8, digest="counting")


def trained(folder, config=ONE, source=COUNTING, **options):
    return run(folder, config, train_data=source, **options)


def log(result):
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in result.history]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("drawn") / "run")


def test_the_log_is_that_of_any_run(finished):
    assert finished.complete
    assert [line["step"] for line in finished.history] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in finished.history if "validation_loss" in line] == [6, 12]
    assert finished.history[-1]["loss"] < finished.history[0]["loss"] - 0.5


def test_what_is_drawn_has_no_bits_per_byte(finished):
    """Its tokens are no bytes, though some of their ids are below 256. Text that it is validated on has them."""
    assert not [name for line in finished.history for name in line if name in ("bytes", "bits_per_byte")]
    assert all("validation_bits_per_byte" in line for line in finished.history if "validation_loss" in line)


def test_validation_on_what_is_drawn_has_no_bits_per_byte(tmp_path):
    own = trained(tmp_path / "run", dataclasses.replace(ONE, steps=2), validation_data=COUNTING)
    assert "validation_nll" in own.metrics
    assert not [name for name in own.metrics if "byte" in name]


def test_how_many_steps_run_together_changes_nothing(finished, tmp_path):
    every = trained(tmp_path / "every", dataclasses.replace(ONE, log_every=1))
    assert [line["step"] for line in every.history] == list(range(1, 13))
    by_step = {line["step"]: line["loss"] for line in every.history}
    for line in finished.history:
        np.testing.assert_allclose(line["loss"], by_step[line["step"]], rtol=100 * EPS)


def test_each_step_has_a_batch_of_its_own():
    batches = [drawn_batch(COUNTING, ONE.batch_size, ONE.seed, TRAINING, number) for number in range(3)]
    starts = {tuple(np.asarray(batch["tokens"][:, 0]).tolist()) for batch in batches}
    assert len(starts) == 3
    other = drawn_batch(COUNTING, ONE.batch_size, ONE.seed + 1, TRAINING, 0)
    assert (other["tokens"] != batches[0]["tokens"]).any()


class Interrupting(Console):
    """A quiet console that sends Ctrl-C when the line of step 4 is printed."""

    def print(self, *objects, **_):
        if objects and str(objects[0]).startswith("step 4/"):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_run_that_is_stopped_ends_as_if_it_had_not_been(finished, tmp_path):
    stopped = trained(tmp_path / "run", console=Interrupting(quiet=True))
    assert not stopped.complete
    assert stopped.step == 6
    resumed = trained(tmp_path / "run")
    assert resumed.complete
    assert log(resumed) == log(finished)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, finished.params)


def test_validation_batches_are_the_same_in_every_run(tmp_path):
    first, second = (list(ordered_batches(COUNTING, 4, 3)) for _ in range(2))
    assert len(first) == 3
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
    assert (first[0]["tokens"] != first[1]["tokens"]).any()
    result = trained(tmp_path / "run", validation_data=COUNTING)
    assert result.metrics["validation_loss"] < result.history[0]["loss"]


def test_a_loss_that_is_not_finite_names_its_step(tmp_path):
    def broken(params, batch, key):
        step_is_seven = jnp.any(batch["tokens"] == jnp.int32(-1))
        total = jnp.where(step_is_seven, jnp.nan, (params["embedding"] ** 2).sum())
        return total, {"weight": jnp.float32(1)}

    def poisoned(key, rows):
        wanted = jax.random.fold_in(jax.random.fold_in(jax.random.key(ONE.seed), TRAINING), 6)
        same = (jax.random.key_data(key) == jax.random.key_data(wanted)).all()
        return {"tokens": jnp.where(same, -1, draw(key, rows)["tokens"])}

    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 7: .*step 6"):
        trained(tmp_path / "run", source=Drawn(poisoned, 8, "poisoned"), loss_fn=broken, validation_data=COUNTING)


def test_another_source_in_the_folder_is_refused(finished):
    with pytest.raises(ValueError, match=r'corpus\.train was "counting", now "other"'):
        trained(finished.folder, source=dataclasses.replace(COUNTING, digest="other"))


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match="devices is 'mesh' but batches are drawn"):
        trained(tmp_path, dataclasses.replace(ONE, devices="mesh"))
    with pytest.raises(ValueError, match="eval_batches is None"):
        trained(tmp_path, dataclasses.replace(ONE, eval_batches=None), validation_data=COUNTING)
    with pytest.raises(ValueError, match="limit is None"):
        ordered_batches(COUNTING, 4)
    assert not list(tmp_path.iterdir())
