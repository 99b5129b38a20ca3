"""`python -m benchmarks.decoding`: SmolLM2-135M continues text of the standard library, with and without drafts.

Every text is continued greedily by each way of decoding in turn, so that a slow moment of the machine hits them alike.
Needs the weights that `jaxattn weights smollm2` gets. Prints a table.
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
from jaxattn.models import PromptLookup, fetch_weights, generate, load_pretrained, speculate

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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding", description=str(__doc__).split("\n")[0])
    parser.add_argument("--length", type=int, default=256, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens that are drawn")
    parser.add_argument("--ahead", type=int, default=4, help="guesses in each round")
    arguments = parser.parse_args()
    loaded = load_pretrained(fetch_weights("smollm2"))
    for text in texts(loaded.encode, arguments.length):
        for row in run(loaded.model, [text], arguments.new, arguments.ahead):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
