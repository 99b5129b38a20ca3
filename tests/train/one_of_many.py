"""A run that the processes of a test share; as a program, `one_of_many.py PROCESS PROCESSES PORT FOLDER OPTIONS`.

The model is a bigram whose table is spread over `fsdp`. The program writes what `fit` returned or raised beside the
folder. Its options are JSON: `config`, `made` (parameters are given by a function), `not_finite`, `patience` and
`seconds_per_step` for all processes, and by the number of a process what that one does otherwise.
"""

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from bigram import run
from flax import nnx

import jaxattn.train.processes as processes_module
from jaxattn.train import VOCABULARY, TrainConfig, next_token_loss

CONFIG = TrainConfig(
    steps=24, batch_size=8, eval_every=9, eval_batches=None, keep_best=True, save_every=4, log_every=2, accumulate=2
)
RATE, EPS = 0.05, 1e-3  # a large eps: else where a gradient is 0 but for rounding, its sign decides
OPTIMIZER = optax.adam(RATE, eps=EPS)


def params():
    table = 0.1 * np.random.default_rng(0).normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32)
    return {"table": nnx.Param(jnp.asarray(table), axes=("width", "vocabulary"))}


def loss_fn(params, batch, key):
    logits = params["table"].get_value()[batch["tokens"]]
    if key is not None:
        logits = logits * jax.random.uniform(key, minval=0.5, maxval=1.5)
    return next_token_loss(logits, batch)


def trained(folder, changes, **options):
    config = dataclasses.replace(CONFIG, **changes)
    return run(folder, config, optimizer=OPTIMIZER, **{"loss_fn": loss_fn, "params": params()} | options)


def main():
    process, processes, port = map(int, sys.argv[1:4])
    folder, options = Path(sys.argv[4]), json.loads(sys.argv[5])
    # Processes that end otherwise than together wait for these times at most.
    patience = {"heartbeat_timeout_seconds": 10, "shutdown_timeout_seconds": 30}
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, process, **patience)
    mine = options.get(str(process), {})
    processes_module.PATIENCE = options.get("patience", processes_module.PATIENCE)
    if "sleeps" in mine:
        jax.devices()  # which the others wait for by themselves
        time.sleep(mine["sleeps"])
        return

    def on_step(step, state, metrics):
        time.sleep(options.get("seconds_per_step", 0))
        if step == mine.get("at"):
            if "signal" not in mine:
                raise LookupError("what a hook raises")
            os.kill(os.getpid(), getattr(signal, mine["signal"]))

    def not_finite(params, batch, key):
        total, sums = loss_fn(params, batch, key)
        return total * jnp.nan, sums

    said = {}
    try:
        changes = {"devices": "mesh", **options.get("config", {}), **mine.get("config", {})}
        others = {"loss_fn": not_finite} if options.get("not_finite") else {}
        others |= {"params": params} if options.get("made") else {}
        result = trained(folder, changes, on_step=on_step, **others)
        said = {"step": result.step, "complete": result.complete, "history": result.history}
    except BaseException as error:
        said = {"error": f"{type(error).__name__}: {error}"}
        raise
    finally:
        (folder.parent / f"{folder.name}.{process}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
