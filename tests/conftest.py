"""Every test sees 8 simulated CPU devices; compiled programs are kept for later runs, of this checkout and others."""

import gc
import os
import pathlib
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

import jax
import pytest

if jax.config.jax_compilation_cache_dir is None:
    caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(caches / "jaxattn-tests" / f"jax-{jax.__version__}"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.03)


SLOW = pathlib.Path(__file__).with_name("slow.txt")  # as choose_slow.py writes it


def pytest_addoption(parser):
    parser.addoption("--cpu-times", metavar="FILE", help="add the seconds of CPU of every test to a file")


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


# Linux lets a process map so many pieces of memory; a compiled program takes some, and XLA crashes without one.
MOST_MAPS = 65530
MAPS = pathlib.Path("/proc/self/maps")


def forget_programs():
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True, scope="module")
def forget_programs_of_other_files():
    yield
    forget_programs()


@pytest.fixture(autouse=True)
def forget_programs_in_time():
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS // 2:
        forget_programs()
