"""Many processes: which rows of a batch each reads, and what they tell each other beside the arrays.

A process of a run is one that called `jax.distributed.initialize`. Words go through the coordination service that this
starts, not through collectives: it has timeouts, and it needs no compiled program.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the coordination service has no public name
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from jaxattn.nn.sharding import Rules, partition_spec
from jaxattn.train.step import batch_shardings

PATIENCE = 600  # seconds that processes wait for each other; the time in which all have to have read their data
GRACE = 5  # seconds in which a process has to find out by itself what went wrong in another one

# Every process makes the same calls in the same order, so a number tells them apart.
_calls = itertools.count()


def is_first() -> bool:
    """Returns whether this is process 0, which alone writes what is not arrays."""
    return jax.process_index() == 0


class Share:
    """The rows of batches that belong to this process: those that its devices need.

    Args:
        mesh: The mesh over the devices of all processes.
        rules: The rules by which batches are spread.
        multiple: A number of rows that the mesh divides.
    """

    def __init__(self, mesh: Mesh, rules: Rules, multiple: int):
        self.mesh, self.rules, self.multiple = mesh, rules, multiple

    def of(self, size: int) -> np.ndarray:
        """Returns which rows of a batch of so many these are, in order."""
        sharding = NamedSharding(self.mesh, partition_spec(("batch",), (size,), self.mesh.shape, self.rules))
        rows = np.arange(size)
        return np.unique([rows[index] for index in sharding.addressable_devices_indices_map((size,)).values()])

    def whole(self, batch: Any) -> Any:
        """Returns the batch of all processes as global arrays, from the rows of this process."""
        size = jax.tree.leaves(batch)[0].shape[0] * self.multiple // len(self.of(self.multiple))
        mine = self.of(size)

        def shape(x: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((size, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype))

        def put(x: Any, like: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.Array:
            def part(index: Any) -> np.ndarray:
                rows = np.searchsorted(mine, np.arange(size)[index[0]])
                return np.asarray(x)[(rows, *index[1:])].astype(like.dtype)

            return jax.make_array_from_callback(like.shape, sharding, part)

        likes = jax.tree.map(shape, batch)
        return jax.tree.map(put, batch, likes, batch_shardings(likes, self.mesh, self.rules))


def gathered(text: str) -> list[str]:
    """Returns the texts of all processes, by process. All have to call it.

    Raises:
        TimeoutError: A process does not.
    """
    if jax.process_count() == 1:
        return [text]
    client, name = _client(), f"jaxattn/{next(_calls)}"
    client.key_value_set(f"{name}/{jax.process_index()}", f"={text}")
    texts = []
    for process in range(jax.process_count()):
        try:
            texts.append(client.blocking_key_value_get(f"{name}/{process}", int(PATIENCE * 1000))[1:])
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            raise TimeoutError(
                f"process {process} did not come to where process {jax.process_index()} is within {PATIENCE} seconds: "
                f"need the same calls in all {jax.process_count()} processes"
            ) from error
    return texts


def by_first(action: Callable[[], Any]) -> None:
    """Calls action() in process 0 while the others wait. Whatever it raises is raised in all of them."""
    error: Exception | None = None
    if is_first():
        try:
            action()
        except Exception as raised:
            error = raised
    said = gathered("" if error is None else f"{type(error).__name__}: {error}")[0]
    if error is not None:
        raise error
    if said:
        kind, message = said.split(": ", 1)
        raise ValueError(message) if kind == "ValueError" else RuntimeError(f"process 0 failed: {said}")


def stop_is_due(step: int, interrupted: bool) -> bool:
    """Returns whether the run is to stop after this step: in many processes, the same step in all of them.

    SIGTERM in one process is enough. JAX takes it, and finds a step that no process has passed.
    """
    if jax.process_count() == 1:
        return interrupted
    return multihost_utils.reached_preemption_sync_point(step)


def pass_on_interruption() -> None:
    """Makes Ctrl-C in one of many processes the SIGTERM that stops all of them."""
    if jax.process_count() > 1:
        signal.raise_signal(signal.SIGTERM)


@contextmanager
def failing_together() -> Iterator[None]:
    """Ends all processes of a run when one of them fails: what one raises inside does not leave the others waiting.

    A process that raises says so. The others have some seconds to raise too, as they do when all see the same error.
    Then they print it and exit: a process that waits inside a collective cannot raise. Where a process was killed, the
    others raise a RuntimeError that says so.
    """
    if jax.process_count() == 1:
        yield
        return
    client, key, over = _client(), f"jaxattn/{next(_calls)}/failed", threading.Event()
    watcher = threading.Thread(target=_watch, args=(client, key, over), daemon=True)
    watcher.start()
    try:
        yield
    except BaseException as error:
        over.set()
        lost = _LOST.search(str(error))
        words = f"process {jax.process_index()} failed: {type(error).__name__}: {error}"
        if lost:
            words = _said(client, key) or f"{_LOSS} ({str(error).splitlines()[0][:200]})"
        with suppress(Exception):  # the service may be gone
            client.key_value_set(key, words, allow_overwrite=True)
        if not lost:
            raise
        # At exit JAX would wait for the process that is gone, and abort. The service is in process 0, which goes last.
        distributed.global_state.client = None
        time.sleep(GRACE + 2 if is_first() else 0)
        raise RuntimeError(f"{words}. {_ADVICE}") from error
    finally:
        over.set()


# What JAX says in a collective, or in the coordination service, when another process is gone.
_LOST = re.compile(r"Gloo|NCCL|[Cc]onnection (reset|closed)|[Hh]eartbeat|[Cc]oordination ?[Ss]ervice|[Bb]arrier")
_LOSS = "another process of the run was lost"
_ADVICE = (
    "This process stops. Run the same again, with as many processes or fewer: the run goes on from its last checkpoint"
)


def _watch(client: Any, key: str, over: threading.Event) -> None:
    while not over.wait(1):
        if (said := _said(client, key)) and not over.wait(GRACE):
            print(f"{said}. {_ADVICE}", file=sys.stderr, flush=True)
            if not said.startswith(_LOSS):
                jax.distributed.shutdown()  # so that the process that failed need not wait for this one
            os._exit(1)


def _said(client: Any, key: str) -> str | None:
    try:
        return client.key_value_try_get(key)
    except Exception:  # not found, or the service is gone
        return None


def _client() -> Any:
    client = distributed.global_state.client
    if client is None:
        raise RuntimeError("JAX sees many processes, but jax.distributed.initialize was not called: call it first")
    return client
