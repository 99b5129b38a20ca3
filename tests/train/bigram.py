"""The model and the run that the tests of training share; as a program, a run that kills itself at a given moment.

The model is a bigram: the logits after a token are a row of a table. In training they are scaled by a random number,
so that a run which lost its random state would end elsewhere.
"""

import os
import signal
import sys

import jax
import optax
from rich.console import Console

from jaxattn.train import VOCABULARY, Document, TrainConfig, Windows, fit, next_token_loss

CONFIG = TrainConfig(
    steps=12, batch_size=8, eval_every=6, eval_batches=2, save_every=3, log_every=2, accumulate=2, seed=5
)


def windows(cls=Windows, **options):
    """(train, validation): `cls` with its options, and plain windows."""
    texts = [f"document {i}: {'abc' * (i % 7)} {i * i}.\n".encode() for i in range(24)]
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    return cls(documents[:18], 8, **options), Windows(documents[18:], 8)


def loss_fn(params, batch, key):
    logits = params["embedding"][batch["tokens"]]
    if key is not None:
        logits = logits * jax.random.uniform(key, minval=0.5, maxval=1.5)
    return next_token_loss(logits, batch)


def initial_params():
    return {"embedding": 0.1 * jax.random.normal(jax.random.key(0), (VOCABULARY, VOCABULARY))}


def run(folder, config=CONFIG, loss_fn=loss_fn, train_data=None, run_config=None, params=None, **options):
    train, validation = windows()
    return fit(
        loss_fn=loss_fn,
        params=initial_params() if params is None else params,
        optimizer=options.pop("optimizer", optax.adam(0.05)),
        train_data=train if train_data is None else train_data,
        validation_data=options.pop("validation_data", validation),
        config=config,
        run_config={"model": "bigram"} if run_config is None else run_config,
        folder=folder,
        console=options.pop("console", Console(quiet=True)),
        **options,
    )


class Signalling(Windows):
    """Windows that send this process a signal when a given number of them has been read."""

    def __init__(self, documents, length, *, number, after):
        super().__init__(documents, length)
        self.number, self.left = number, after

    def __getitem__(self, index):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)
        return super().__getitem__(index)


def kill_when(event, end):
    """Kill -9 this process when Python is about to do `event` to a path that ends in `end`."""

    def hook(name, arguments):
        if name == event and os.fspath(arguments[0]).endswith(end):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


if __name__ == "__main__":
    folder, moment = sys.argv[1:]
    train_data = None
    if moment == "between saves":
        # Step 8 reads windows 57 to 64: steps 3 and 6 are saved, 7 is lost.
        train_data, _ = windows(Signalling, number=signal.SIGKILL, after=60)
    elif moment == "before the arrays of a save":
        kill_when("os.mkdir", "/6.orbax-checkpoint-tmp/params.orbax-checkpoint-tmp")
    elif moment == "among the arrays of a save":
        kill_when("os.rename", "/6.orbax-checkpoint-tmp/params.orbax-checkpoint-tmp")
    elif moment == "before the commit of a save":
        kill_when("os.rename", "/6.orbax-checkpoint-tmp")
    elif moment == "before the checksums of a save":
        kill_when("os.rename", "/6/checksums.json.tmp")
    run(folder, train_data=train_data)
    raise SystemExit(f"the run was not killed {moment}")
