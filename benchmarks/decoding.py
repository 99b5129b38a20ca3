"""`python -m benchmarks.decoding drafts`: SmolLM2-135M continues texts of the standard library, with drafts or without.

`... server` continues eight of them at once. All ways of decoding take turns, so that a slow moment of the machine hits
them alike, and all are greedy. Needs the weights that `jaxattn weights smollm2` gets. Prints one line of JSON per row.
"""

import argparse
import importlib
import inspect
import json
import pydoc_data.topics
import statistics
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.measure import take_turns
from jaxattn.cache import Policy, Recent
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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding", description=str(__doc__).split("\n")[0])
    parser.add_argument("what", choices=["drafts", "server"])
    parser.add_argument("--length", type=int, default=256, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens that are drawn")
    parser.add_argument("--ahead", type=int, default=4, help="guesses in each round")
    arguments = parser.parse_args()
    loaded = load_pretrained(fetch_weights("smollm2"))
    chosen = texts(loaded.encode, arguments.length)
    if arguments.what == "server":
        for row in serve(loaded.model, chosen, arguments.new):
            print(json.dumps(row), flush=True)
        return
    for text in chosen:
        for row in run(loaded.model, [text], arguments.new, arguments.ahead):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
