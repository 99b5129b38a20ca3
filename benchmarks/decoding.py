"""`python -m benchmarks.decoding drafts`: SmolLM2-135M continues texts of the standard library, with drafts or without.

`... server` continues eight of them at once, and `... stores` times attention alone, to a long text that stores hold
under other policies. All ways of decoding take turns, so that a slow moment of the machine hits them alike, and all are
greedy. The first two need the weights that `jaxattn weights smollm2` gets. Prints one line of JSON per row.
"""

import argparse
import dataclasses
import importlib
import inspect
import json
import pydoc_data.topics
import statistics
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.measure import take_turns
from jaxattn import Causal, attend
from jaxattn.cache import HeavyHitters, MeanKeys, Paged, Policy, Quantised, Quest, Recent, Store, empty
from jaxattn.models import PromptLookup, Server, fetch_weights, generate, load_pretrained, speculate

CODE, PROSE = (
    ("textwrap", "argparse", "json.decoder", "statistics"),
    ("compound", "execmodel", "debugger", "customization"),
)


class Text(NamedTuple):
    """A prompt of the standard library."""

    name: str
    ids: np.ndarray


def texts(encode: Callable[[str], np.ndarray], length: int) -> list[Text]:
    """Returns the source of four modules and four pages of the language reference, from their middle on."""
    found = {f"code: {name}": inspect.getsource(importlib.import_module(name)) for name in CODE}
    found |= {f"prose: {name}": textwrap.dedent(pydoc_data.topics.topics[name]) for name in PROSE}
    ids = {name: np.asarray(encode(text)) for name, text in found.items()}
    return [Text(name, each[(start := (len(each) - length) // 2) : start + length][None]) for name, each in ids.items()]


def ways(model: Any, length: int, new: int, ahead: int) -> dict[str, Callable[[np.ndarray], Any]]:
    """Returns what decodes a prompt, by name; self-drafting keeps an eighth of the tokens."""
    options: dict[str, Any] = {"max_new_tokens": new, "temperature": 0.0}
    eighth = Policy(Recent(4), (length + new) // 8)
    return {
        "generate": lambda ids: generate(model, ids, **options),
        "lookup": lambda ids: speculate(model, PromptLookup(), ids, ahead=ahead, **options),
        "itself at 1/8": lambda ids: speculate(model, None, ids, ahead=ahead, draft_store=eighth, **options),
    }


def run(model: Any, chosen: list[Text], new: int, ahead: int, budget: float = 0.0) -> list[dict[str, Any]]:
    """Returns a row for each text and way: seconds, calls, and how far the text is that of generate."""
    rows = []
    for text in chosen:
        of = ways(model, text.ids.shape[1], new, ahead)
        made: dict[str, Any] = {}

        def timed(name: str, of: Any = of, text: Text = text, made: Any = made) -> Callable[[], Any]:
            return lambda: made.update({name: jax.block_until_ready(of[name](text.ids))})

        seconds = take_turns({name: timed(name) for name in of}, budget, least=3, most=3)
        plain = made["generate"]
        for name, each in made.items():
            calls = int(getattr(each, "calls", plain.lengths[0]))
            ratios = [a / b for a, b in zip(seconds[name], seconds["generate"], strict=True)]
            same = np.asarray(each.tokens == plain.tokens)[0]
            rows.append(
                {
                    "text": text.name,
                    "way": name,
                    "seconds": statistics.median(seconds[name]),
                    "time over generate": statistics.median(ratios),
                    "calls": calls,
                    "tokens per call": int(each.lengths[0]) / calls,
                    "the same tokens": int(same.argmin()) if not same.all() else new,
                }
            )
    return rows


def serve(model: Any, chosen: list[Text], new: int, budget: float = 0.0) -> list[dict[str, Any]]:
    """Returns a row for each way to continue ragged prompts: one after the other, as one batch, or by a server.

    The prompts are of the lengths 1/n, 2/n, .. 1 of the texts. Every second one draws half as many tokens; alone it
    ends there, and in one batch it goes on until the others have ended.
    """
    width, count = chosen[0].ids.shape[1], len(chosen)
    lengths = [width * (i + 1) // count for i in range(count)]
    wanted = [new // (1 + i % 2) for i in range(count)]
    prompts, made = np.concatenate([text.ids for text in chosen]), {}
    server = Server(model, slots=count, capacity=width + new)

    def together(rows: slice, new: int) -> np.ndarray:
        given = prompts[rows], np.array(lengths[rows])
        return np.asarray(generate(model, *given, max_new_tokens=new, temperature=0.0).tokens)

    def alone() -> None:
        made["one after the other"] = [together(slice(i, i + 1), wanted[i])[0] for i in range(count)]

    def batch() -> None:
        made["one batch"] = list(together(slice(count), new))

    def served() -> None:
        for i in range(count):
            server.submit(prompts[i, : lengths[i]], max_new_tokens=wanted[i], temperature=0.0)
        while server.step():
            pass
        made["server"] = [finished.tokens for _, finished in sorted(server.results().items())]

    seconds = take_turns({"one after the other": alone, "one batch": batch, "server": served}, budget, least=3, most=3)
    base = made["one after the other"]
    return [
        {
            "way": name,
            "seconds": statistics.median(each),
            "tokens per second": sum(wanted) / statistics.median(each),
            "time of one after the other over it": statistics.median(
                a / b for a, b in zip(seconds["one after the other"], each, strict=True)
            ),
            "rows with the same tokens": sum(
                np.array_equal(a[:n], b[:n]) for a, b, n in zip(base, made[name], wanted, strict=True)
            ),
        }
        for name, each in seconds.items()
    ]


def stores(length: int) -> dict[str, Policy]:
    """Returns policies by name, of a text of so many tokens: their budgets are shares of it."""
    found = {"all": Policy()}
    for part in (16, 8, 4):
        found[f"Recent, 1/{part}"] = Policy(Recent(4), length // part)
        found[f"HeavyHitters, 1/{part}"] = Policy(HeavyHitters(), length // part)
        for size in (16, 64):
            found[f"Quest, 1/{part}, pages of {size}"] = Policy(select=Quest(length // part // size, size))
    found["MeanKeys, 1/16"] = Policy(select=MeanKeys(length // 16 // 16, 16))
    return found | {"Paged": Policy(storage=Paged(16)), "4 bits": Policy(storage=Quantised(4))}


def held(length: int, policy: Policy, heads: int = 8, dim: int = 64) -> Store:
    """Returns a store that is full of the last tokens of a text, but for one; keys and values are standard normal."""
    store = empty(1, length, (heads, dim), (heads, dim), jnp.float32, policy)
    count = store.positions.shape[1]
    at = np.broadcast_to(np.arange(length - count, length)[:, None], store.positions.shape)
    at = at if store.retain.evicts else np.where(at == length - 1, -1, at)
    key, value = jax.random.normal(jax.random.key(0), (2, 1, count, heads, dim))
    filled = store.storage.fill(store.held, key, value, jnp.asarray(at, jnp.int32))
    last = jnp.full(1, length - 2, jnp.int32)
    store = dataclasses.replace(store, held=filled, positions=jnp.asarray(at, jnp.int32), last=last)
    return store if store.select is None else store._summarised(None)


def decode(store: Store, query: Array, steps: int) -> tuple[Store, Array]:
    """Appends a token, reads and observes, so many times at the last position of the text; queries depend on reads."""
    at = jnp.full((1, 1), store.span - 1, jnp.int32)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        store, query = carry
        store = store.append(query, query, at)
        seen = store.read(query)
        by_head = seen.positions if seen.positions.shape[-1] > 1 else seen.positions[..., 0]
        options: dict[str, Any] = {"query_positions": at, "key_positions": by_head, "measures": store.measures()}
        result = attend(query, seen.key, seen.value, mask=Causal(), **options)
        z, measured = result if options["measures"] else (result, {})
        return (store.observe(measured, seen), query + 1e-6 * z), None

    return jax.lax.scan(step, (store, query), length=steps)[0]


def read_stores(length: int, of: list[str], steps: int = 10, budget: float = 0.0) -> list[dict[str, Any]]:
    """Returns a row for each policy: milliseconds of a step in a compiled loop, which changes the store in place."""
    query, run = (
        jax.random.normal(jax.random.key(1), (1, 1, 8, 64)),
        jax.jit(decode, static_argnums=2, donate_argnums=0),
    )
    held_by = {name: held(length, policy) for name, policy in stores(length).items() if not of or name in ("all", *of)}

    def timed(name: str) -> Callable[[], Any]:
        return lambda: held_by.update({name: jax.block_until_ready(run(held_by[name], query, steps))[0]})

    seconds = take_turns({name: timed(name) for name in held_by}, budget)
    return [
        {
            "store": name,
            "ms": 1000 * statistics.median(each) / steps,
            "fastest": 1000 * min(each) / steps,
            "time over all": statistics.median(a / b for a, b in zip(each, seconds["all"], strict=True)),
            "MiB": sum(x.nbytes for x in jax.tree.leaves(held_by[name])) / 2**20,
        }
        for name, each in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding", description=str(__doc__).split("\n")[0])
    parser.add_argument("what", choices=["drafts", "server", "stores"])
    parser.add_argument("--length", type=int, help="tokens of each prompt, or of the text that is held")
    parser.add_argument("--new", type=int, default=128, help="tokens that are drawn")
    parser.add_argument("--ahead", type=int, default=4, help="guesses in each round")
    parser.add_argument("--of", nargs="+", default=[], help="only these stores, beside that of all")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of timing of stores")
    arguments = parser.parse_args()
    if arguments.what == "stores":
        for row in read_stores(arguments.length or 32768, arguments.of, budget=arguments.budget):
            print(json.dumps(row), flush=True)
        return
    loaded = load_pretrained(fetch_weights("smollm2"))
    chosen = texts(loaded.encode, arguments.length or 256)
    if arguments.what == "server":
        for row in serve(loaded.model, chosen, arguments.new):
            print(json.dumps(row), flush=True)
        return
    for text in chosen:
        for row in run(loaded.model, [text], arguments.new, arguments.ahead):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
