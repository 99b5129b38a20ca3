"""What else a run calls, when it stops by itself, and how it goes on when it is given more steps."""

import csv
import dataclasses
import sys

import numpy as np
import optax
import pytest
from bigram import CONFIG, initial_params, run
from test_drawn import COUNTING, ONE

from jaxattn.train import (
    OptimizerConfig,
    csv_log,
    learning_rate,
    load,
    loss_scaling,
    next_token_loss,
    tensorboard_log,
)

CONSTANT = OptimizerConfig(learning_rate=0.05, warmup_steps=2, schedule="constant", weight_decay=0.0)


def changed(**changes):
    return dataclasses.replace(CONFIG, **changes)


def without_speed(lines):
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def test_hooks_see_every_step_every_line_and_every_evaluation(tmp_path):
    steps, lines, more, evaluations = [], [], [], []
    result = run(
        tmp_path,
        on_step=lambda step, state, metrics: steps.append((step, int(state.step), float(metrics["loss"]))),
        on_log=[lines.append, more.append],
        on_eval=lambda step, params, metrics: evaluations.append((step, np.asarray(params["embedding"]), metrics)),
    )
    assert [step for step, *_ in steps] == [done for _, done, _ in steps] == list(range(1, 13))
    assert lines == more == result.history
    assert {step: loss for step, _, loss in steps if step % 2 == 0} == {x["step"]: x["loss"] for x in lines}
    assert [step for step, *_ in evaluations] == [6, 12]
    _, params, metrics = evaluations[1]
    np.testing.assert_array_equal(params, result.params["embedding"])
    assert {f"validation_{name}": value for name, value in metrics.items()}.items() <= lines[-1].items()
    with pytest.raises(TypeError, match="on_log is a int: need a function, or a list"):
        run(tmp_path, on_log=3)


def test_hooks_see_every_step_of_drawn_batches_too(tmp_path):
    steps = []
    config = dataclasses.replace(ONE, steps=4)
    hooked = run(
        tmp_path / "hooked", config, train_data=COUNTING, on_step=lambda step, _, metrics: steps.append(metrics["loss"])
    )
    plain = run(tmp_path / "plain", config, train_data=COUNTING)
    assert [np.shape(loss) for loss in steps] == [()] * 4
    assert float(steps[-1]) == hooked.history[-1]["loss"] == pytest.approx(plain.history[-1]["loss"], rel=1e-5)


def test_without_validation_data_nothing_is_evaluated(tmp_path):
    result = run(
        tmp_path, changed(steps=3), validation_data=None, on_eval=lambda *_: pytest.fail("nothing to evaluate")
    )
    assert result.complete
    assert not [name for name in result.metrics if name.startswith("validation")]
    for name, value in (("patience", 2), ("keep_best", True)):
        with pytest.raises(ValueError, match=f"{name} is {value} without validation_data"):
            run(tmp_path, changed(**{name: value}), validation_data=None)


def table(file):
    with file.open(newline="") as stream:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(stream)]


def test_the_csv_file_has_the_lines_of_the_log_also_of_a_run_that_went_on(tmp_path):
    file = tmp_path / "tables" / "log.csv"

    def interrupted(step, state, metrics):
        if step == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", on_log=csv_log(file), on_step=interrupted)
    assert [row["step"] for row in table(file)] == [2, 4, 6, 8]
    result = run(tmp_path / "run", on_log=csv_log(file))  # from step 6 on
    assert without_speed(table(file)) == without_speed(result.history)


class Writer:
    def __init__(self, *arguments, **named):
        self.made, self.scalars, self.flushed = (arguments, named), [], 0

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def flush(self):
        self.flushed += 1


def test_tensorboard_gets_every_number_under_train_and_validation(monkeypatch):
    writer = Writer()
    hook = tensorboard_log("unused", writer)
    hook({"step": 3, "loss": 0.5, "tokens_per_second": None, "validation_loss": 0.7})
    assert writer.scalars == [("train/loss", 0.5, 3), ("validation/loss", 0.7, 3)]
    assert writer.flushed == 1
    made = []
    monkeypatch.setitem(
        sys.modules,
        "tensorboardX",
        type("", (), {"SummaryWriter": lambda *x, **named: made.append(Writer(*x, **named)) or made[-1]}),
    )
    hook = tensorboard_log("folder")
    for step in (7, 8):
        hook({"step": step, "loss": 1.0})
    (writer,) = made
    assert writer.made == (("folder",), {"purge_step": 7})
    assert [step for *_, step in writer.scalars] == [7, 8]
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ModuleNotFoundError, match="tensorboard_log needs tensorboardX, which is not installed"):
        tensorboard_log("folder")


RISING = {"tokens": np.zeros((8, 2), int), "targets": np.full((8, 2), 200)}  # what training makes ever less likely


@pytest.fixture(scope="module")
def impatient(tmp_path_factory):
    folder = tmp_path_factory.mktemp("impatient") / "run"
    config = changed(eval_every=2, patience=2, keep_best=True, save_every=5, steps=40)
    return config, run(folder, config, validation_data=RISING)


def test_a_run_ends_when_its_patience_does_and_keeps_its_best_checkpoint(impatient):
    config, result = impatient
    losses = {x["step"]: x["validation_loss"] for x in result.history if "validation_loss" in x}
    best = min(losses, key=losses.get)
    assert result.complete
    assert result.step == max(losses) == best + 2 * 2 < config.steps
    kept = load(result.folder / "best", lambda config: initial_params())
    assert kept.step == best
    assert load(result.folder, lambda config: initial_params()).step == result.step
    again = run(result.folder, config, validation_data=RISING)
    assert (again.complete, again.step) == (True, result.step)


def test_more_patience_takes_the_run_further(impatient, tmp_path):
    config, result = impatient
    more = dataclasses.replace(config, patience=3)
    further = run(result.folder, more, validation_data=RISING)
    assert further.step == result.step + 2
    whole = run(tmp_path / "whole", more, validation_data=RISING)
    np.testing.assert_array_equal(further.params["embedding"], whole.params["embedding"])
    assert without_speed(further.history) == without_speed(whole.history)


def test_the_best_may_be_the_largest_of_any_metric(tmp_path):
    config = changed(eval_every=2, keep_best=True, best_metric="correct", best_is="largest")
    result = run(tmp_path, config)
    values = {x["step"]: x["validation_correct"] for x in result.history if "validation_loss" in x}
    best = max(values, key=lambda step: (values[step], -step))  # the first of equals
    assert load(tmp_path / "best", lambda config: initial_params()).step == best
    with pytest.raises(
        ValueError, match=r"best_metric is 'accuracy', which evaluations do not have: need one of .*loss, nll"
    ):
        run(tmp_path / "run", dataclasses.replace(config, best_metric="accuracy"))


def test_the_best_checkpoint_is_the_same_however_often_the_run_was_stopped(tmp_path):
    config = changed(eval_every=2, save_every=5, keep_best=True)

    def stopping(at):
        def stop(step, state, metrics):
            if step == at:
                raise KeyboardInterrupt

        return stop

    for at in (5, 9):  # after an evaluation that the next start does again, too
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", config, validation_data=RISING, on_step=stopping(at))
    whole, parts = (run(tmp_path / name, config, validation_data=RISING) for name in ("whole", "parts"))
    assert without_speed(parts.history) == without_speed(whole.history)
    one, other = (load(x.folder / "best", lambda config: initial_params()) for x in (whole, parts))
    assert one.step == other.step
    np.testing.assert_array_equal(one.params["embedding"], other.params["embedding"])


def test_steps_that_overflow_in_float16_are_logged_and_left_out(tmp_path):
    def half(params, batch, key):
        return next_token_loss(params["embedding"].astype(np.float16)[batch["tokens"]], batch)

    optimizer = loss_scaling(optax.adam(0.05), 2.0**34)
    result = run(tmp_path, changed(log_every=1, steps=40), loss_fn=half, optimizer=optimizer)
    skipped = [line["skipped"] for line in result.history]
    assert skipped[0] == 1
    assert 5 < sum(skipped) < 30
    assert [line["loss_scale"] for line in result.history] == [2.0 ** (34 - sum(skipped[:i])) for i in range(40)]
    assert all((line["grad_norm"] == 0) == line["skipped"] for line in result.history)
    assert result.history[-1]["loss"] < result.history[0]["loss"] - 0.5


def test_a_finished_run_goes_on_as_if_it_had_had_more_steps_from_the_start(tmp_path):
    whole = run(tmp_path / "whole", optimizer=CONSTANT)
    assert run(tmp_path / "parts", changed(steps=6), optimizer=CONSTANT).complete
    parts = run(tmp_path / "parts", optimizer=CONSTANT)
    assert (parts.step, parts.complete) == (12, True)
    np.testing.assert_array_equal(parts.params["embedding"], whole.params["embedding"])
    assert without_speed(parts.history) == without_speed(whole.history)
    assert run(tmp_path / "parts", changed(steps=6), optimizer=CONSTANT).step == 12  # fewer: it is complete
    by_hand = run(tmp_path / "by hand", changed(steps=6))
    with pytest.raises(
        ValueError, match="now 12, and the schedule of an optimiser may depend on it: give an OptimizerC"
    ):
        run(by_hand.folder)
    assert run(by_hand.folder, extend=True).step == 12


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (
            "cosine",
            r"optimizer.schedule is 'cosine', whose learning rate depends on it: need 'constant', or 'stable' bef",
        ),
        ("stable", r"optimizer.schedule is 'stable', whose learning rate fell from step 5 on: remove the checkpoints"),
    ],
)
def test_a_run_whose_learning_rate_fell_says_which_field_forbids_more_steps(schedule, message, tmp_path):
    optimizer = dataclasses.replace(CONSTANT, schedule=schedule)
    run(tmp_path, changed(steps=6), optimizer=optimizer)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=rf"steps was 6 in the run in folder .*, now 12, and {message}"):
        run(tmp_path, optimizer=optimizer)
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


def test_a_stable_run_goes_on_from_before_its_learning_rate_fell(tmp_path):
    optimizer = dataclasses.replace(CONSTANT, schedule="stable")
    run(tmp_path / "parts", changed(steps=6), optimizer=optimizer)
    rates = [float(learning_rate(optimizer, steps)(3)) for steps in (6, 12)]
    assert rates[0] == rates[1]
    for file in sorted((tmp_path / "parts" / "checkpoints" / "6").rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    (tmp_path / "parts" / "checkpoints" / "6").rmdir()
    parts, whole = (run(tmp_path / name, optimizer=optimizer) for name in ("parts", "whole"))
    np.testing.assert_array_equal(parts.params["embedding"], whole.params["embedding"])


def test_the_config_of_the_optimiser_is_that_of_the_run(tmp_path):
    run(tmp_path, changed(steps=1), optimizer=dataclasses.replace(CONSTANT, warmup_steps=0))
    with pytest.raises(ValueError, match=r"optimizer\.learning_rate was 0\.05, now 0\.1"):
        run(tmp_path, changed(steps=1), optimizer=dataclasses.replace(CONSTANT, warmup_steps=0, learning_rate=0.1))


def test_what_is_evaluated_and_loaded_of_a_schedule_free_run_is_its_average(tmp_path):
    """And it resumes to the bit."""
    optimizer, seen = dataclasses.replace(CONSTANT, name="schedule_free"), {}
    whole = run(tmp_path / "whole", optimizer=optimizer, on_eval=lambda step, params, _: seen.update({step: params}))
    run(tmp_path / "parts", changed(steps=6), optimizer=optimizer)
    parts = run(tmp_path / "parts", optimizer=optimizer)
    loaded = load(tmp_path / "parts", lambda config: initial_params())
    for params in (parts.params, loaded.params, seen[12]):
        np.testing.assert_array_equal(params["embedding"], whole.params["embedding"])
    validation = {x["step"]: x["validation_loss"] for x in parts.history if "validation_loss" in x}
    assert validation == {x["step"]: x["validation_loss"] for x in whole.history if "validation_loss" in x}
