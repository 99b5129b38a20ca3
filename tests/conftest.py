"""Every test sees 8 simulated CPU devices; compiled programs are kept between runs."""

import gc
import os
import pathlib

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest

cache = pathlib.Path(__file__).parent.parent / ".cache" / f"jax-{jax.__version__}"
jax.config.update("jax_compilation_cache_dir", str(cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Linux lets a process map 65530 pieces of memory, a compiled program takes some, and XLA crashes without one."""
    yield
    jax.clear_caches()
    gc.collect()
