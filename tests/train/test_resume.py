"""A run that dies and is started again ends as one that never died: the same parameters, bit for bit, the same log."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from bigram import CONFIG, Signalling, run, windows

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run(tmp_path_factory.mktemp("uninterrupted") / "run")


def log_of(result):
    """The log without its times, which no run repeats."""
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in result.history]


def assert_same(result, uninterrupted):
    assert result.complete
    assert result.step == uninterrupted.step
    np.testing.assert_array_equal(result.params["embedding"], uninterrupted.params["embedding"])
    assert log_of(result) == log_of(uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "left_behind", "resumed_after"),
    [
        ("between saves", "6/checksums.json", 6),
        ("before the arrays of a save", "6.orbax-checkpoint-tmp", 3),
        ("among the arrays of a save", "6.orbax-checkpoint-tmp/params.orbax-checkpoint-tmp", 3),
        ("before the commit of a save", "6.orbax-checkpoint-tmp/params", 3),
        ("before the checksums of a save", "6/checksums.json.tmp", 6),
    ],
)
def test_a_run_killed_and_resumed_equals_an_uninterrupted_run(
    moment, left_behind, resumed_after, tmp_path, uninterrupted, capsys
):
    folder = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    program = [sys.executable, str(Path(__file__).with_name("bigram.py")), str(folder), moment]
    killed = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (folder / "checkpoints" / left_behind).exists()
    result = run(folder, console=None)
    assert f"after step {resumed_after} of 12" in capsys.readouterr().out
    assert_same(result, uninterrupted)


def test_ctrl_c_saves_stops_and_says_how_to_resume(tmp_path, uninterrupted, capsys):
    before = signal.getsignal(signal.SIGINT)
    train_data, _ = windows(Signalling, number=signal.SIGINT, after=60)  # in step 8
    stopped = run(tmp_path / "run", train_data=train_data, console=None)
    printed = capsys.readouterr().out
    assert (stopped.step, stopped.complete) == (8, False)
    assert "stopped after step 8 of 12 and saved" in printed
    assert f"output folder {tmp_path / 'run'} to resume" in printed
    assert signal.getsignal(signal.SIGINT) is before
    assert_same(run(tmp_path / "run"), uninterrupted)


@pytest.fixture
def before():
    """What Ctrl-C does in a terminal. Programs that a shell starts in the background ignore it."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, inherited)


def test_a_second_ctrl_c_stops_at_once(tmp_path, before):
    class Impatient(Signalling):
        def __getitem__(self, index):
            if self.left <= 0:
                # Once the first has arrived: the system makes one of two that wait.
                while signal.getsignal(signal.SIGINT) is not before:
                    time.sleep(0.001)
                os.kill(os.getpid(), signal.SIGINT)
            return super().__getitem__(index)

    train_data, _ = windows(Impatient, number=signal.SIGINT, after=60)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", train_data=train_data)
    assert run(tmp_path / "run").complete


def test_a_complete_run_is_not_run_again(tmp_path, uninterrupted, capsys):
    folder = uninterrupted.folder
    before = {file: file.stat().st_mtime_ns for file in (folder / "checkpoints").rglob("*")}

    def untouchable(params, batch, key):
        raise AssertionError("a complete run computes nothing")

    again = run(folder, loss_fn=untouchable, console=None)
    assert f"the run in {folder} is complete: step 12 of 12" in capsys.readouterr().out
    assert again.metrics == uninterrupted.metrics
    assert_same(again, uninterrupted)
    assert before == {file: file.stat().st_mtime_ns for file in (folder / "checkpoints").rglob("*")}


def test_a_damaged_last_checkpoint_costs_steps_but_not_the_result(tmp_path, uninterrupted):
    train_data, _ = windows(Signalling, number=signal.SIGINT, after=60)
    run(tmp_path, train_data=train_data)
    (tmp_path / "checkpoints" / "8" / "params" / "_METADATA").write_text("{")
    with pytest.warns(UserWarning, match="checkpoint of step 8 is damaged .* step 6 is used instead"):
        assert_same(run(tmp_path), uninterrupted)


def test_the_log_resumes_without_doubles_and_without_lines_that_were_cut_short(tmp_path, uninterrupted):
    train_data, _ = windows(Signalling, number=signal.SIGINT, after=60)
    run(tmp_path, train_data=train_data)
    log = tmp_path / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 10, "loss": 1.0}\n{"step": 11, "lo')
    assert_same(run(tmp_path), uninterrupted)
    steps = [line["step"] for line in run(tmp_path).history]
    assert steps == list(range(CONFIG.log_every, CONFIG.steps + 1, CONFIG.log_every))
    assert len(log.read_text().splitlines()) == len(steps)
