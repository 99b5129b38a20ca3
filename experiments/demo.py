"""The main job, end to end: train three decoders that differ only in their attention, generate, look inside.

`python -m experiments.demo` (or `make demo`): real text (the source of the installed Python standard library), the
same steps for each, one table, a few generated lines, and two figures. Run again, it resumes where it was.
"""

import argparse
import dataclasses
import math
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxattn import Causal, Sigmoid, Sinks, Window, analysis, models, nn, viz
from jaxattn.__main__ import DataConfig, generate, look, train
from jaxattn.train import OptimizerConfig, Tokenizer, TrainConfig

# Chosen by measuring the softmax decoder's validation bits per byte after about a minute on two cores (x86-64, jax
# 0.10.2, seed 0): width 192, batch 16, rate 3e-3: 2.67; 128, 16, 6e-3: 2.43; 128, 16, 3e-3: 2.43; 96, 16, 4e-3: 2.35;
# 128, 8, 3e-3: 2.30; 96, 8, 4e-3: 2.25. Smaller models and batches win where a minute is all there is.
CONTEXT, WIDTH, LAYERS = 128, 96, 4
OPTIMIZER = OptimizerConfig(learning_rate=4e-3, warmup_steps=40)
TRAINING = TrainConfig(steps=900, batch_size=8, eval_every=150, save_every=300, log_every=30)

BASE = models.Spec(nn.MultiHeadAttention, heads=4, qk_norm=models.Spec(nn.RMSNorm))
ATTENTIONS = {
    "softmax": BASE,
    "window+sinks": BASE.replace(mask=Causal() & (Window(31) | Sinks(4))),
    "sigmoid": BASE.replace(normalize=Sigmoid(bias=-math.log(CONTEXT))),
}
PROMPT = "def read(self, size=-1):\n    "
TEXT = "def total(values):\n    result = 0\n    for value in values:\n        result += value\n    return result\n"


def main(folder: Path, steps: int) -> dict[str, float]:
    """Runs everything; returns the validation bits per byte of each decoder."""
    console, started = Console(), time.perf_counter()
    training = dataclasses.replace(TRAINING, steps=steps)
    optimizer = dataclasses.replace(OPTIMIZER, warmup_steps=min(OPTIMIZER.warmup_steps, steps // 2))
    results, weights, captions, tokens = {}, {}, {}, Tokenizer().opened(TEXT[: CONTEXT - 1])
    for name, attention in ATTENTIONS.items():
        console.rule(f"training: {name}")
        config = models.TransformerConfig(length=CONTEXT, width=WIDTH, layers=[models.pre_norm(attention)] * LAYERS)
        results[name] = train(config, DataConfig(), optimizer, training, folder=str(folder / name))
        if not results[name].complete:
            sys.exit(f"interrupted: run the demo again to resume in {folder}")

    table = Table(title=f"{steps} steps of {TRAINING.batch_size * CONTEXT} bytes on the Python standard library")
    for column in ("attention", "validation bits per byte", "tokens/s", "parameters"):
        table.add_column(column, justify="left" if column == "attention" else "right")
    for name, result in results.items():
        parameters = sum(leaf.size for leaf in jax.tree.leaves(result.params))
        bits = result.metrics["validation_bits_per_byte"]
        table.add_row(name, f"{bits:.3f}", f"{result.tokens_per_second:,.0f}", f"{parameters:,}")
    console.print(table)

    for name in ATTENTIONS:
        console.rule(f"generated: {name}")
        generate(PROMPT, max_new_tokens=CONTEXT - len(PROMPT) - 1, folder=str(folder / name))
        seen = models.load_model(folder / name)[0](jnp.asarray(tokens)[None], record=("weights",))[2]["weights"]
        weights[name], statistics = seen[:, 0], analysis.head_statistics(seen)
        captions[name] = np.vectorize("H {:.1f}  sink {:.2f}".format)(statistics.entropy, statistics.sink_mass)

    curves = viz.show_curves({name: result.history for name, result in results.items()})
    loss = viz.save(curves, folder / "loss.png")
    heads = viz.save(viz.show_heads(weights, captions, Tokenizer().strings(tokens)), folder / "attention.png")
    console.rule()
    look(TEXT[: CONTEXT - 1], str(folder / "softmax"), str(folder / "look.html"))
    console.print(f"figures: {loss} and {heads}; {time.perf_counter() - started:.0f} s in all", soft_wrap=True)
    return {name: result.metrics["validation_bits_per_byte"] for name, result in results.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="output folder (default: runs/demo)")
    parser.add_argument("--steps", type=int, default=TRAINING.steps, help="training steps of each decoder")
    arguments = parser.parse_args()
    try:
        main(arguments.folder, arguments.steps)
    except (ValueError, OSError) as error:
        sys.exit(f"demo: {error} (another folder: --folder)")
