"""The loop: what it logs and returns, what it refuses, and how it stops."""

import dataclasses
import errno
import io
import json
import math
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from bigram import CONFIG, initial_params, loss_fn, run, windows
from flax import nnx
from rich.console import Console

from jaxattn.train import OptimizerConfig, Result, TrainConfig, Windows, load, next_token_loss, ordered_batches

EPS = float(np.finfo(np.float32).eps)


def changed(**changes):
    return dataclasses.replace(CONFIG, **changes)


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(tmp_path_factory.mktemp("finished") / "run")


def test_training_learns(finished):
    assert finished.complete
    losses = [line["loss"] for line in finished.history]
    assert losses[-1] < losses[0] - 0.5  # nats
    # Not to know anything costs log2(258) bits for each byte and document end: more than 8 per byte.
    assert finished.metrics["validation_bits_per_byte"] < 8


def test_the_log_is_the_history_as_json_lines(finished):
    lines = [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == finished.history
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in lines if "validation_loss" in line] == [6, 12]
    for line in lines:
        assert {"loss", "grad_norm", "nll", "bytes", "correct", "bits_per_byte", "tokens_per_second"} <= line.keys()
        assert math.isclose(line["bits_per_byte"], line["nll"] / math.log(2) / line["bytes"])
    assert finished.metrics.items() >= lines[-1].items()


def test_a_line_for_an_evaluation_alone_holds_nothing_else(tmp_path):
    result = run(tmp_path, changed(steps=6, log_every=4, eval_every=3))
    assert [line["step"] for line in result.history] == [3, 4, 6]
    assert all(name == "step" or name.startswith("validation_") for name in result.history[0])


def test_evaluation_is_the_mean_over_the_validation_windows(tmp_path):
    result = run(tmp_path, changed(steps=1, eval_batches=None))
    _, validation = windows()
    total = weight = 0.0
    for batch in ordered_batches(validation, 3):
        loss, sums = loss_fn(result.params, batch, None)
        total, weight = total + float(loss), weight + float(sums["weight"])
    assert result.metrics["validation_loss"] == pytest.approx(total / weight, rel=258 * EPS)


def test_speed_leaves_out_the_step_that_compiles(tmp_path):
    result = run(tmp_path, changed(steps=3, log_every=1))
    assert [line["tokens_per_second"] is None for line in result.history] == [True, False, False]
    speeds = [line["tokens_per_second"] for line in result.history[1:]]
    assert result.tokens_per_second == pytest.approx(sum(speeds) / 2)


def test_the_last_checkpoint_is_the_result(finished):
    loaded = load(finished.folder, lambda config: initial_params())
    assert loaded.step == CONFIG.steps
    assert loaded.config["model"] == "bigram"
    assert loaded.config["train"] == json.loads(json.dumps(dataclasses.asdict(CONFIG)))
    np.testing.assert_array_equal(loaded.params["embedding"], finished.params["embedding"])
    steps = {int(path.name) for path in (finished.folder / "checkpoints").iterdir()}
    assert steps == {6, 9, 12}


@pytest.mark.parametrize("devices", ["mesh", "pmap"])
def test_eight_devices_train_and_evaluate_like_one(devices, tmp_path):
    def steady(params, batch, key):
        return next_token_loss(params["embedding"][batch["tokens"]], batch)

    one, many = (
        run(tmp_path / kind, changed(steps=3, accumulate=1, devices=kind), loss_fn=steady) for kind in ("one", devices)
    )
    # Adam's first steps are signs: where a gradient is near 0 its rounding decides, so parameters are not compared
    # here (test_step.py does, without Adam). The loss before any update is a mean over tokens from sums over 258.
    first = [
        run(tmp_path / f"{kind}1", changed(steps=1, accumulate=1, devices=kind), loss_fn=steady)
        for kind in ("one", devices)
    ]
    assert first[1].metrics["loss"] == pytest.approx(first[0].metrics["loss"], rel=(258 + 64) * EPS)
    assert many.metrics["validation_loss"] == pytest.approx(one.metrics["validation_loss"], rel=1e-3)
    assert many.complete


def test_rows_that_a_mesh_cannot_cut_are_refused_before_anything_is_written(tmp_path):
    mesh = changed(accumulate=1, devices="mesh", mesh={"context": 8})
    train_data = Windows(windows()[0].stream, 12)
    with pytest.raises(ValueError, match=r"rows of length 12 for 8 device\(s\) along 'context': need a multiple of 8"):
        run(tmp_path / "run", mesh, train_data=train_data)
    params = {"odd": nnx.Param(jnp.ones(3), axes=("hidden",))}
    with pytest.raises(ValueError, match="odd: axis 'hidden' of 3 does not divide over the mesh axes 'tensor' of 8"):
        run(tmp_path / "run", changed(devices="mesh", mesh={"tensor": 8}), params=params)
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_may_move_to_other_devices(tmp_path):
    run(tmp_path, changed(steps=12, accumulate=1))
    for step in ("12", "9"):
        (tmp_path / "checkpoints" / step / "params" / "_METADATA").unlink()
    with pytest.warns(UserWarning, match="is damaged"):
        assert run(tmp_path, changed(accumulate=1, devices="mesh", keep=1, log_every=5)).complete
    for step in ("12", "9"):
        shutil.rmtree(tmp_path / "checkpoints" / step, ignore_errors=True)
    moved = changed(accumulate=1, devices="mesh", mesh={"data": 2, "context": 4})
    assert run(tmp_path, moved).complete


def stopping(value, at):
    """The loss of the bigram, but `value` where the learned counter says that `at` steps are done."""

    def loss_fn_with_counter(params, batch, key):
        total, sums = loss_fn({"embedding": params["embedding"]}, batch, key)
        # Adam moves the counter by its rate of 0.05 each step, against a gradient of constant sign.
        count = jnp.round(-params["counter"] / 0.05)
        return jnp.where((key is not None) & (count >= at), value, total + sums["weight"] * params["counter"]), sums

    return loss_fn_with_counter


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("at", "last_good"), [(7, "the last good checkpoint is step 6 in"), (1, "no checkpoint")])
def test_a_loss_that_is_not_finite_stops_the_run(value, at, last_good, tmp_path):
    params = {**initial_params(), "counter": jnp.zeros(())}
    with pytest.raises(FloatingPointError, match=rf"the loss is {value} at step {at + 1}: .*{last_good}"):
        run(tmp_path, loss_fn=stopping(value, at), params=params)
    saved = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert saved == ([3, 6] if at == 7 else [])
    assert all(
        math.isfinite(json.loads(line)["loss"]) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    )


def test_a_token_outside_the_vocabulary_is_seen_in_the_error(tmp_path):
    """The model has 258 tokens: of another it knows no logits."""
    data = [{"tokens": np.array([5, 9000]), "targets": np.array([3, 3])}]

    def of_table(params, batch, key):
        tokens = batch["tokens"]
        logits = params["embedding"].at[tokens].get(mode="fill", fill_value=jnp.nan)
        return next_token_loss(logits, batch)

    with pytest.raises(
        FloatingPointError, match=r"the loss is nan at step 1: .*; the tokens of this step are from 5 to 9000"
    ):
        run(tmp_path, train_data=data, validation_data=None, loss_fn=of_table)


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    params = initial_params()
    params["unused"] = jnp.array([1.0, math.nan])
    with pytest.raises(FloatingPointError, match="a parameter or the optimiser's state is not finite after step 3"):
        run(tmp_path, params=params)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    def steep(params, batch, key):
        total, sums = loss_fn(params, batch, key)
        return total + jnp.sqrt(jnp.sum(params["unused"])), sums  # √0 is finite, its slope is not

    params = {**initial_params(), "unused": jnp.zeros(1)}
    with pytest.raises(FloatingPointError, match="the norm of the gradient is inf at step 1: there is no checkpoint"):
        run(tmp_path, loss_fn=steep, params=params)


def test_a_folder_with_another_run_is_refused_and_unchanged(tmp_path):
    run(tmp_path, changed(steps=2))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"the run in folder '.*' is of another config: train.seed was 5, now 6\."):
        run(tmp_path, changed(steps=2, seed=6))
    with pytest.raises(ValueError, match=r"steps was 2 in the run in folder '.*', now 3, and the schedule of an optim"):
        run(tmp_path, changed(steps=3))
    with pytest.raises(ValueError, match='model was "bigram", now "trigram"'):
        run(tmp_path, changed(steps=2), run_config={"model": "trigram"})
    with pytest.raises(ValueError, match=r"corpus\.train was"):
        run(tmp_path, changed(steps=2), train_data=windows()[1])
    assert contents(tmp_path) == before


def test_a_folder_with_other_files_is_refused_and_unchanged(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"holds files but no run \(thesis.tex\): need a new or empty folder"):
        run(tmp_path)
    assert contents(tmp_path) == before
    with pytest.raises(ValueError, match=r"thesis.tex' is a file: need a new or empty folder"):
        run(tmp_path / "thesis.tex")


def test_a_folder_whose_config_cannot_be_read_is_refused(tmp_path):
    run(tmp_path, changed(steps=1))
    (tmp_path / "config.json").write_text('{"model":')
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        run(tmp_path, changed(steps=1))
    assert contents(tmp_path) == before


def test_a_folder_where_a_run_never_began_can_be_used(tmp_path):
    run(tmp_path / "a", changed(steps=1))
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "config.json").rename(tmp_path / "b" / "config.json")
    (tmp_path / "b" / "config.json.tmp").write_text("{")
    assert run(tmp_path / "b", changed(steps=2)).complete


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0: need at least 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"eval_every": 0}, "eval_every is 0"),
        ({"eval_batches": 0}, "eval_batches is 0"),
        ({"save_every": -1}, "save_every is -1"),
        ({"keep": 0}, "keep is 0"),
        ({"log_every": 0}, "log_every is 0"),
        ({"seed": -1}, r"seed is -1: need one from 0 to 2\*\*32 - 1"),
        ({"patience": 0}, "patience is 0: need at least 1"),
        ({"best_is": "best"}, "best_is is 'best': need 'smallest' or 'largest'"),
        ({"devices": "tpu"}, "devices is 'tpu': need 'one', 'mesh' or 'pmap'"),
        ({"batch_size": 6, "accumulate": 4}, "need a multiple of 4"),
        ({"batch_size": 12, "accumulate": 1, "devices": "mesh"}, r"12 for 8 device\(s\) .*: need a multiple of 8"),
        ({"batch_size": 8, "accumulate": 2, "devices": "pmap"}, r"and 2 micro-batch\(es\): need a multiple of 16"),
        ({"mesh": {"data": 8}}, "mesh is {'data': 8} but devices is 'one': need devices 'mesh'"),
        (
            {"devices": "mesh", "mesh": {"rows": 8}},
            "the axis 'rows', over which nothing is spread: need some of .*'data'",
        ),
        ({"devices": "mesh", "mesh": {"data": 3}}, r"of 3 device\(s\), but there are 8: need .* product is 8"),
        ({"devices": "mesh", "mesh": {"data": -2, "fsdp": -4}}, "need sizes from 1 on whose product is 8"),
        (
            {"batch_size": 6, "accumulate": 1, "devices": "mesh", "mesh": {"data": 2, "fsdp": 2, "tensor": 2}},
            r"batch_size is 6 for 4 device\(s\) along 'data' and 'fsdp' and 1 .*: need a multiple of 4",
        ),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_before_anything_is_written(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", changed(**changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["steps", "batch_size", "eval_batches", "seed"])
def test_a_config_without_whole_numbers_is_refused(name, tmp_path):
    for value in (2.0, True, "2"):
        with pytest.raises(TypeError, match=f"{name} must be an int, got {value!r}"):
            run(tmp_path / "run", changed(**{name: value}))
    assert not (tmp_path / "run").exists()


def test_numbers_of_numpy_are_those_of_python(tmp_path):
    """The folder of one run is that of the other."""
    numpy = changed(steps=np.int64(2), batch_size=np.int32(8), seed=np.int64(0))
    assert run(tmp_path / "run", numpy, run_config={"rate": np.float32(0.5)}).complete
    assert run(tmp_path / "run", changed(steps=2, batch_size=8, seed=0), run_config={"rate": 0.5}).step == 2


def test_a_run_config_that_json_cannot_hold_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"run_config is not JSON: .*PosixPath"):
        run(tmp_path / "run", run_config={"path": tmp_path})
    with pytest.raises(ValueError, match="run_config has its own 'train': need a name other than 'train', 'corpus'"):
        run(tmp_path / "run", run_config={"train": 1})
    assert not (tmp_path / "run").exists()


def test_a_full_disk_names_the_line_that_was_not_logged(tmp_path, monkeypatch):
    def fail(log, line):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("jaxattn.train.log.Log.append", fail)
    with pytest.raises(OSError, match=r"disk is full: step 4 was not logged in .*; the last good .* is step 3") as e:
        run(tmp_path, changed(log_every=4))
    assert e.value.errno == errno.ENOSPC


def pairs(count):
    """Records of a bigram that is no text: token i is followed by i + 1."""
    return [{"tokens": np.arange(4) + i % 50, "targets": np.arange(1, 5) + i % 50} for i in range(count)]


def test_records_that_are_no_text_are_trained_on_and_no_bytes_are_counted(tmp_path):
    result = run(tmp_path, train_data=pairs(40), validation_data={"tokens": [[1, 2]] * 3, "targets": [[2, 3]] * 3})
    assert result.complete
    assert result.metrics["validation_loss"] < result.history[0]["loss"] - 0.5
    assert not [name for name in result.metrics if "byte" in name]
    assert result.tokens_per_second > 0


@pytest.mark.filterwarnings("ignore:train_data has no get_state")
def test_data_that_end_before_the_last_step_save_what_was_done(tmp_path):
    for _ in range(2):  # also when it is run again
        with pytest.raises(ValueError, match=r"train_data ended after step 5 of 12, .* last good checkpoint is step 5"):
            run(tmp_path, train_data=iter(pairs(43)))
    assert load(tmp_path, lambda config: initial_params()).step == 5
    with pytest.raises(ValueError, match=r"train_data ended after step 0 .*there is no checkpoint"):
        run(tmp_path / "none", train_data=iter([]))


def test_a_run_on_what_can_be_iterated_over_ends_as_if_it_had_not_been_stopped(tmp_path):
    whole = run(tmp_path / "whole", train_data=iter(pairs(200)))
    run(tmp_path / "parts", train_data=iter(pairs(200)))
    for step in ("12", "9"):
        (tmp_path / "parts" / "checkpoints" / step / "params" / "_METADATA").unlink()
    with pytest.warns(UserWarning, match="48 records that the run has used are read again"):
        again = run(tmp_path / "parts", train_data=iter(pairs(200)))
    np.testing.assert_array_equal(again.params["embedding"], whole.params["embedding"])


@pytest.mark.parametrize("data", [[], np.zeros((3, 4), int), 5])
def test_data_that_are_none_are_refused_before_anything_is_written(data, tmp_path):
    for name in ("train_data", "validation_data"):
        with pytest.raises((TypeError, ValueError), match=f"{name} is "):
            run(tmp_path / "run", **{name: data})
    assert not (tmp_path / "run").exists()


def shown(folder, terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)
    run(folder, changed(steps=4), console=console)
    return console.file.getvalue()


def test_without_a_terminal_progress_is_plain_lines(tmp_path):
    lines = shown(tmp_path, terminal=False).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 2/4", "step 4/4"]
    assert "tokens/s" in lines[0]
    assert "s left" in lines[0]
    assert "validation bits per byte" in lines[1]


def test_on_a_terminal_progress_is_a_bar_with_loss_speed_and_time_left(tmp_path):
    text = shown(tmp_path, terminal=True)
    assert "\N{BOX DRAWINGS HEAVY HORIZONTAL}" in text
    for words in ("4/4", "loss", "tokens/s", "0:00:00"):
        assert words in text


def test_dataclass_fields_have_docs():
    for config in (TrainConfig, OptimizerConfig, Result):
        documented = [line.split(":")[0].strip() for line in config.__doc__.splitlines()]
        assert {field.name for field in dataclasses.fields(config)} <= set(documented)
