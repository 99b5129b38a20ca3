"""Experiments train small decoders as `train.fit` trains any model."""

import jax.numpy as jnp
from rich.console import Console

from experiments import decoders
from jaxattn import nn
from jaxattn.models import Spec
from jaxattn.train import Drawn, OptimizerConfig


def test_dropout_is_drawn_anew_in_every_step_and_is_off_in_measurements(tmp_path):
    """The batch is always the same and nothing is learned, so that losses differ by dropout alone."""
    mixer = Spec(nn.MultiHeadAttention, heads=2, dropout=0.5)
    model = decoders.build(mixer, vocabulary=5, length=6, width=8, layers=1, seed=0)
    tokens = jnp.arange(12).reshape(2, 6) % 5
    source = Drawn(lambda key, size: {"tokens": tokens, "targets": tokens, "weights": jnp.ones((2, 6))}, 6, "one batch")
    losses = []
    for run in ("one", "again"):
        _, result = decoders.train(
            model,
            source,
            steps=3,
            batch_size=2,
            eval_every=1,
            eval_batches=1,
            optimizer=OptimizerConfig(learning_rate=1e-30, warmup_steps=0),
            seed=0,
            run_config={},
            folder=tmp_path / run,
            console=Console(quiet=True),
        )
        losses.append([line["loss"] for line in result.history])
        assert len({line["validation_loss"] for line in result.history}) == 1
    assert len(set(losses[0])) == 3
    assert losses[0] == losses[1]
