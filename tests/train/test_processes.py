"""Runs of many processes, real ones: they train as one does, stop together, and lose nothing when one of them dies."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from one_of_many import CONFIG, EPS, RATE, params, trained

from jaxattn.models import load_model
from jaxattn.train import batches, load, ordered_batches

ROOT = Path(__file__).parents[2]
SPREAD = {1: {"data": 1}, 2: {"fsdp": 2}, 4: {"data": 2, "fsdp": 2}}
SECONDS = 120  # in which a run ends, whatever happens; the machine may be busy
KILLS = int(os.environ.get("JAXATTN_KILLS", "2"))  # 20 for a long look


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def started_process(arguments, **options):
    """A process of Python with one device, that shares the compiled programs of the tests."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", ""),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.03",
        "JAX_PLATFORMS": "cpu",
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *arguments], env=environment, **pipes, **options)


class Run:
    """The processes of one run."""

    def __init__(self, folder, processes, options=None):
        options = options or {}
        options = options | {"config": {"mesh": SPREAD[processes]} | options.get("config", {})}
        self.files = [folder.parent / f"{folder.name}.{process}.json" for process in range(processes)]
        for file in self.files:
            file.unlink(missing_ok=True)
        program, port = str(Path(__file__).with_name("one_of_many.py")), free_port()
        self.processes = [
            started_process([program, str(i), str(processes), str(port), str(folder), json.dumps(options)])
            for i in range(processes)
        ]

    def end(self, seconds=SECONDS):
        """Waits for all processes; their exit codes, what fit returned or raised in each, and what each printed."""
        limit = time.monotonic() + seconds
        try:
            printed = [process.communicate(timeout=max(limit - time.monotonic(), 0))[1] for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        said = [json.loads(file.read_text()) if file.exists() else {} for file in self.files]
        return [process.returncode for process in self.processes], said, printed


def finished(folder, processes, options=None):
    codes, said, printed = Run(folder, processes, options).end()
    assert codes == [0] * processes, printed
    return said


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process, on one device."""
    return trained(tmp_path_factory.mktemp("alone") / "run", {})


def assert_same_log(history, alone):
    assert [line["step"] for line in history] == [line["step"] for line in alone.history]
    for ours, theirs in zip(history, alone.history, strict=True):
        for name in ("loss", "grad_norm", "validation_loss"):
            assert (name in ours) == (name in theirs)
            if name in ours:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5)  # sums over 258 tokens, 24 steps on


def assert_same_params(folder, alone):
    """The last checkpoint, read by this one process, has the parameters of a run that was never interrupted."""
    loaded = load(folder, lambda config: params())
    assert loaded.step == CONFIG.steps
    # A gradient is below 0.1, so known to 1e-8, and a step is at most RATE/EPS times that off.
    ours, theirs = (tree["table"].get_value() for tree in (loaded.params, alone.params))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=CONFIG.steps * RATE / EPS * 1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "options"),
    [
        (4, {}),
        (2, {"made": True}),
        (2, {"config": {"mesh": {"context": 2}}}),  # both read all rows
    ],
)
def test_many_processes_train_as_one(processes, options, tmp_path, alone):
    said = finished(tmp_path / "run", processes, options)
    for each in said:
        assert each["complete"]
        assert_same_log(each["history"], alone)
    assert_same_params(tmp_path / "run", alone)
    # One process writes what is written.
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == said[0]["history"]
    assert load(tmp_path / "run" / "best", lambda config: params()).step == CONFIG.steps


@pytest.mark.slow
def test_sigterm_in_one_stops_all_at_one_step_and_fewer_go_on(tmp_path, alone):
    """Two processes from an earlier checkpoint, as the newest is damaged; and one, on one device."""
    said = finished(tmp_path / "run", 4, {"seconds_per_step": 0.1, "2": {"signal": "SIGTERM", "at": 6}})
    (step,) = {each["step"] for each in said}
    assert 6 <= step < CONFIG.steps
    assert not any(each["complete"] for each in said)
    assert (tmp_path / "run" / "checkpoints" / str(step)).is_dir()
    shutil.copytree(tmp_path / "run", tmp_path / "two")
    (tmp_path / "two" / "checkpoints" / str(step) / "params" / "_METADATA").unlink()
    for each in finished(tmp_path / "two", 2):
        assert_same_log(each["history"], alone)
    assert_same_params(tmp_path / "two", alone)
    assert (tmp_path / "two" / "damaged" / str(step)).is_dir()
    assert_same_log(trained(tmp_path / "run", {}).history, alone)
    assert_same_params(tmp_path / "run", alone)


@pytest.mark.slow
def test_ctrl_c_in_one_stops_all_at_one_step(tmp_path):
    said = finished(tmp_path / "run", 2, {"seconds_per_step": 0.1, "1": {"signal": "SIGINT", "at": 6}})
    (step,) = {each["step"] for each in said}
    assert 6 <= step < CONFIG.steps
    assert (tmp_path / "run" / "checkpoints" / str(step)).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(KILLS))
def test_a_run_that_loses_a_process_goes_on_with_fewer(seed, tmp_path, alone):
    draw = random.Random(seed)
    run = Run(tmp_path / "run", 4, {"seconds_per_step": 0.1})
    while not (tmp_path / "run" / "config.json").exists():
        time.sleep(0.05)
        assert all(process.poll() is None for process in run.processes), run.end()
    time.sleep(draw.uniform(0, 5))  # from before the first step is compiled to the last steps
    victim = draw.randrange(4)
    run.processes[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    codes, said, printed = run.end()
    if said[victim]:  # it had finished
        pytest.skip("the run was over")
    seconds = time.monotonic() - killed
    assert seconds < 60
    assert 0 not in codes
    for process in set(range(4)) - {victim}:
        # JAX says the second where process 0 dies, in which its service is, or where Python waits for nothing.
        words = ("another process of the run was lost", "another task died")
        done = said[process].get("complete") or any(
            word in said[process].get("error", "") + printed[process] for word in words
        )
        assert done, printed[process]
    for each in finished(tmp_path / "run", 2):
        assert each["complete"]
        assert_same_log(each["history"], alone)
    assert_same_params(tmp_path / "run", alone)


@pytest.mark.slow
def test_processes_that_disagree_say_so_all_and_write_nothing(tmp_path):
    codes, said, printed = Run(tmp_path / "run", 2, {"1": {"config": {"seed": 6}}}).end()
    assert codes == [1, 1], printed
    for each in said:
        assert "ValueError: the processes of the run disagree: train.seed is 0 in process 0 and 6 in" in each["error"]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_process_that_does_not_come_is_named(tmp_path):
    codes, said, printed = Run(tmp_path / "run", 2, {"patience": 2, "1": {"sleeps": 10}}).end()
    assert codes == [1, 0], printed
    assert "TimeoutError: process 1 did not come to where process 0 is within 2 seconds" in said[0]["error"]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_all(tmp_path):
    codes, said, printed = Run(tmp_path / "run", 2, {"not_finite": True}).end()
    assert codes == [1, 1], printed
    assert all(
        "FloatingPointError: the loss is nan at step 1: there is no checkpoint" in each["error"] for each in said
    )


@pytest.mark.slow
def test_what_one_process_raises_ends_all(tmp_path):
    codes, said, printed = Run(tmp_path / "run", 2, {"1": {"at": 6}}).end(60)
    assert 0 not in codes
    assert said[1] == {"error": "LookupError: what a hook raises"}
    assert "process 1 failed: LookupError: what a hook raises. This process stops." in printed[0]
    assert (tmp_path / "run" / "checkpoints" / "4").is_dir()


@pytest.mark.slow
def test_the_script_of_the_docs_runs(tmp_path):
    (script,) = re.findall(r"```py\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), flags=re.DOTALL)
    (tmp_path / "train_many.py").write_text(script.replace("12355", str(free_port())))
    started = [started_process(["train_many.py", str(i)], cwd=tmp_path) for i in range(2)]
    try:
        printed = [process.communicate(timeout=SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], printed
    assert "step 20/20" in printed[0][0]
    assert "step" not in printed[1][0]
    assert load_model(tmp_path / "runs" / "many")[1] == 20


def test_rows_of_all_processes_are_the_batch():
    """Each reads its own records alone, and its iterator is where that of one process is."""

    class Read(list):
        def __init__(self, records):
            super().__init__(records)
            self.read = []

        def __getitem__(self, index):
            self.read.append(index)
            return super().__getitem__(index)

    records = [{"x": np.full(3, i), "weights": np.ones(3)} for i in range(21)]
    whole = batches(records, 6, seed=3)
    expected = [next(whole)["x"] for _ in range(9)]  # more than two passes
    sources = [Read(records) for _ in range(3)]
    parts = [batches(source, 6, 3, np.arange(6)[i::3]) for i, source in enumerate(sources)]
    described = [len(source.read) for source in sources]
    for batch in expected:
        np.testing.assert_array_equal(np.stack([next(part)["x"] for part in parts], 1).reshape(6, 3), batch)
    for source, before, part in zip(sources, described, parts, strict=True):
        assert len(source.read) - before == 9 * 2
        assert part.get_state() == whole.get_state()
    again = batches(records, 6, 3, np.arange(2))
    again.set_state(whole.get_state())
    np.testing.assert_array_equal(next(again)["x"], next(whole)["x"][:2])

    def halves(i):
        return ordered_batches(records, 6, rows_of=lambda size: np.arange(size)[i * size // 2 : (i + 1) * size // 2])

    for batch, *both in zip(ordered_batches(records, 6), halves(0), halves(1), strict=True):
        for name in batch:
            np.testing.assert_array_equal(np.concatenate([part[name] for part in both]), batch[name])


@pytest.mark.slow
def test_the_command_line_joins_the_processes_of_a_cluster(tmp_path, monkeypatch):
    """Slurm tells a process by its environment who it is: two train as one does, and one of them writes and speaks."""
    (tmp_path / "corpus").mkdir()
    for n in range(4):
        (tmp_path / "corpus" / f"{n}.txt").write_text(f"line {n}\n" * 40)
    command = ["-m", "jaxattn", "train", "--model.width", "16", "--model.length", "16", "--train.steps", "3"]
    command += ["--data.path", str(tmp_path / "corpus"), "--data.validation_fraction", "0.3"]
    command += ["--train.batch_size", "4", "--train.devices", "mesh", "--optimizer.warmup_steps", "1"]

    def run(name, count, *more):
        job = free_port() % 4096  # the port follows from it
        started = []
        for number in range(count):
            slurm = {"JOB_ID": job, "STEP_NODELIST": "localhost", "NTASKS": count, "PROCID": number, "LOCALID": number}
            for key, value in slurm.items():
                monkeypatch.setenv(f"SLURM_{key}", str(value))
            started.append(started_process([*command, "--folder", str(tmp_path / name), *more]))
        try:
            said = [process.communicate(timeout=SECONDS) for process in started]
        finally:
            for process in started:
                process.kill()
        assert [process.returncode for process in started] == [0] * count, said
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines], [out for out, _ in said]

    alone, _ = run("alone", 1)
    together, printed = run("together", 2, "--processes", "true")
    assert [line["step"] for line in together] == [line["step"] for line in alone]
    assert together[-1]["loss"] == pytest.approx(alone[-1]["loss"], rel=1e-5)
    assert "validation bits per byte" in printed[0]
    assert "validation bits per byte" not in printed[1]
    for key in ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID"):
        monkeypatch.delenv(f"SLURM_{key}")
    lost = started_process([*command, "--folder", str(tmp_path / "lost"), "--processes", "true"])
    assert "processes is true, but Slurm, Open MPI or a TPU pod does not say" in lost.communicate(timeout=SECONDS)[1]
    assert lost.returncode == 2
