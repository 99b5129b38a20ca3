"""Every test sees 8 simulated CPU devices; compiled programs are kept for later runs, of this checkout and others."""

import collections
import functools
import gc
import itertools
import os
import pathlib
import threading
import warnings
from importlib.metadata import version

# Nearly all time is compiling: so programs are compiled sooner, and run slower. What is set already holds.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# XLA stops at a flag that it does not know: the versions after 0.10 do not know the last.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_cpu_parallel_codegen_split_count=1 "
    + ("--xla_cpu_use_fusion_emitters=false " if version("jaxlib").startswith("0.10.") else "")
    + os.environ.get("XLA_FLAGS", "")
)
# XLA gives all simulated devices one pool of threads, one for each device. Where devices wait for two collectives at
# once, they can use up all threads, and no device arrives at either: XLA ends the process after 40 seconds.
os.environ["NPROC"] = os.environ.get("NPROC", "64")

import jax
import pytest
from jax._src.interpreters import mlir

if jax.config.jax_compilation_cache_dir is None:
    caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(caches / "jaxattn-tests" / f"jax-{jax.__version__}"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.03)

# JAX makes a context of MLIR with all its dialects for every program: milliseconds, half of what a small program takes.
# One for each thread does as well: nothing of a program stays in it.
if hasattr(mlir, "make_ir_context"):
    of_thread = functools.cache(lambda thread, make=mlir.make_ir_context: make())
    mlir.make_ir_context = lambda: of_thread(threading.get_ident())

SLOW = pathlib.Path(__file__).with_name("slow.txt")  # as choose_slow.py writes it


def pytest_addoption(parser):
    parser.addoption("--cpu-times", metavar="FILE", help="add the seconds of CPU of every test to a file")
    parser.addoption("--cases", metavar="N", type=int, help="of each test no more than N cases, spread evenly")
    parser.addoption("--slow-cases", metavar="N", type=int, help="the same of those of its cases that are slow")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Marks what is slow, and warns of names in the list that no test has, where all tests are collected."""
    listed = set(SLOW.read_text().splitlines())
    for item in items:
        if item.nodeid in listed:
            item.add_marker(pytest.mark.slow)
    whole = {argument.split("::")[0] for argument in config.args} <= {"tests", str(SLOW.parent)}
    if whole and (gone := sorted(listed - {item.nodeid for item in items})):
        warnings.warn(
            pytest.PytestCollectionWarning(f"slow.txt names tests that there are not: {gone}; see choose_slow.py"),
            stacklevel=1,
        )


@pytest.hookimpl(trylast=True, specname="pytest_collection_modifyitems")
def pytest_leave_out_cases(config, items):
    """Leaves out cases of tests with more than the options allow: those that stay are spread from first to last."""
    for option, all_ in (("--cases", items), ("--slow-cases", [x for x in items if x.get_closest_marker("slow")])):
        if (most := config.getoption(option)) is None:
            continue
        cases = collections.defaultdict(list)
        for item in all_:
            cases[item.nodeid.partition("[")[0]].append(item)
        kept = {id(of[round(i * (len(of) - 1) / max(most - 1, 1))]) for of in cases.values() for i in range(most)}
        out = {id(item) for item in all_} - kept
        config.hook.pytest_deselected(items=[item for item in items if id(item) in out])
        items[:] = [item for item in items if id(item) not in out]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    def seconds():
        return sum(os.times()[:4])  # of this process and of those that it started

    before = seconds()
    result = yield
    if file := item.config.getoption("--cpu-times"):
        with open(file, "a") as lines:
            lines.write(f"{seconds() - before:.2f}\t{item.nodeid}\n")
    return result


# Collecting garbage goes through all objects: those of the imported libraries stay, the others are tried less often.
gc.set_threshold(20_000, 10, 20)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session):
    gc.collect()
    gc.freeze()


# A compiled program takes about 2 MB and some of the 65530 pieces of memory that a process may map, and XLA crashes
# without one. Until there are many, programs are kept: tests of other files run single operations of the same shapes.
MANY_MAPS = 10_000
MAPS = pathlib.Path("/proc/self/maps")
TESTS = itertools.count(1)


@pytest.fixture(autouse=True)
def forget_programs_in_time():
    yield
    if next(TESTS) % 20 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()
        gc.collect()
