"""What it costs a trained model (SmolLM2) to read facts in pieces that are encoded apart, and what wins it back.

A context is a list of facts, a code for each name. It is cut in 1 to 32 pieces which see only themselves, each from
the same place on, and questions for codes behind it see all of them. The entropy of the questions' attention, the loss
and the accuracy of the answers are measured by the number of pieces: as it is, with a prefix that all pieces share,
with the two pieces alone that each row reads most, and with scores that are sharpened. A control leaves the tokens at
their places in the row and only hides the pieces from each other. Seeds draw the names and the codes.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from experiments import inside_smollm2, trained
from experiments.inside_smollm2 import RANDOM, nll
from jaxattn import Causal, Entropy, Temperature, analysis
from jaxattn.cache import AtPieces, Policy
from jaxattn.claims import Claim, Curves, Result, at_least, at_most
from jaxattn.core.attend import READER, SHARED, KeepGroups, Pieces
from jaxattn.models import reordered

PAPER = "parallel_context"
NAMES = """
Adam Anna Ben Beth Bill Bob Carl Chris Clara Dan David Emma Eric Eva Frank Fred George Grace Hans Harry Helen Henry Ian
Jack James Jane Jim John Julia Kate Kevin Laura Leo Linda Lucy Lily Marc Maria Mark Mary Max Mike Nancy Nick Nina Oliver
Oscar Paul Peter Rachel Ray Robert Rosa Ruth Sam Sara Simon Sophie Steve Susan Ted Tim Tom Victor Will
"""
PLAIN, PREFIX, TWO, BOTH = "as it is", "shared prefix", "two pieces", "shared prefix, two pieces"
PLACES = "places of the row"


@dataclass(frozen=True)
class Config:
    """A trained decoder, its facts, and the numbers of pieces.

    Attributes:
        weights: As of the experiment `inside_smollm2`.
        facts: Facts of a context, a multiple of all `pieces`.
        digits: Digits of a code.
        pieces: Numbers of pieces; the first is that of no cut, 1.
        asked: Facts that are asked for, evenly over the context.
        keep: Pieces that rows keep.
        temperatures: What scores of questions are divided by, below 1.
        prefix: The text of the shared prefix, behind the start token.
    """

    weights: str = "smollm2"
    facts: int = 32
    digits: int = 4
    pieces: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    asked: int = 16
    keep: int = 2
    temperatures: tuple[float, ...] = (0.8, 0.6, 0.4, 0.25)
    prefix: str = "Codes of people:\n"


QUICK = Config(weights=RANDOM, facts=4, digits=2, pieces=(1, 4), asked=2, temperatures=(0.8,), prefix="Codes:\n")
CLAIMS = (
    Claim(
        "Entropy grows with the number of pieces: questions have 0.2 nats more over 32 pieces than over one, or more.",
        paper=PAPER,
        number="entropy, most pieces less one",
        confirmed=at_least(0.2),
        refuted=at_most(0.0),
    ),
    Claim(
        "Recall falls: over 32 pieces at most half as many codes are right as over one.",
        paper=PAPER,
        number="accuracy, most pieces over one",
        confirmed=at_most(0.5),
        refuted=at_least(0.9),
    ),
    Claim(
        "The loss follows the entropy: over the numbers of pieces the two have a rank correlation of 0.9 or more.",
        paper=PAPER,
        number="rank correlation of entropy and loss over pieces",
        confirmed=at_least(0.9),
        refuted=at_most(0.5),
    ),
    Claim(
        "A shared prefix makes up for the start of each piece: over 32 pieces it lowers the entropy by 0.1 nats or "
        "more.",
        paper=PAPER,
        number="entropy, lowered by the prefix over most pieces",
        confirmed=at_least(0.1),
        refuted=at_most(0.0),
    ),
    Claim(
        "And wins back a quarter of the loss that 32 pieces cost, or more.",
        paper=PAPER,
        number="share of the loss won back by the prefix",
        confirmed=at_least(0.25),
        refuted=at_most(0.0),
    ),
    Claim(
        "With the prefix and two pieces for each row, half of the loss is won back, or more.",
        paper=PAPER,
        number="share of the loss won back by prefix and selection",
        confirmed=at_least(0.5),
        refuted=at_most(0.0),
    ),
    Claim(
        "Entropy is a cause: scores that are sharpened until questions have the entropy of one piece win back a "
        "quarter of the loss that 32 pieces cost, or more.",
        paper=PAPER,
        number="share of the loss won back by the entropy of one piece",
        confirmed=at_least(0.25),
        refuted=at_most(0.0),
    ),
    Claim(
        "Sharper scores are no help by themselves: they raise the loss over one piece, by 0 nats or more.",
        paper=PAPER,
        number="loss over one piece, raised by as sharp scores",
        confirmed=at_least(0.0),
        refuted=at_most(-0.05),
    ),
)


@dataclass(frozen=True)
class Facts:
    """A context of facts and questions for some of them, in tokens.

    Attributes:
        lines: The tokens of each fact.
        prefix: The tokens of the prefix.
        questions: [Q, tokens], each with its answer.
        answer: How many tokens of it are the answer.
    """

    lines: list[Int[np.ndarray, " t"]]
    prefix: Int[np.ndarray, " t"]
    questions: Int[np.ndarray, "q t"]
    answer: int


def facts(got: Any, config: Config, rng: np.random.Generator) -> Facts:
    """Draws names whose questions have equal lengths, and a code for each."""

    def tokens_of(text: str) -> np.ndarray:
        return trained.encoded(got, text)

    if any(config.facts % count for count in config.pieces) or config.asked > config.facts:
        raise ValueError(
            f"facts is {config.facts} for pieces {config.pieces} and asked {config.asked}: need a multiple of all "
            "pieces, and as many as are asked for"
        )

    lengths = [len(tokens_of(f"The code of {name}")) for name in NAMES.split()]
    usual = np.bincount(lengths).argmax()
    alike = [name for name, length in zip(NAMES.split(), lengths, strict=True) if length == usual]
    if len(alike) < config.facts:
        raise ValueError(f"facts is {config.facts}: need at most {len(alike)}, the names of one length")
    names = rng.choice(alike, config.facts, replace=False)
    codes = ["".join(map(str, rng.integers(0, 10, config.digits))) for _ in names]
    lines = [tokens_of(f"The code of {name} is {code}.\n") for name, code in zip(names, codes, strict=True)]
    chosen = np.linspace(0, config.facts - 1, config.asked).round().astype(int)
    questions = [tokens_of(f"The code of {names[i]} is {codes[i]}") for i in chosen]
    answer = len(questions[0]) - len(tokens_of(f"The code of {names[chosen[0]]} is"))
    start = [got.config["bos_token_id"]]
    return Facts(lines, np.concatenate([start, tokens_of(config.prefix)]).astype(np.int32), np.stack(questions), answer)


def ids_of(given: Facts, count: int, prefix: bool) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"]]:
    """(tokens of a context in so many pieces, the piece of each of its tokens and of those of a question)."""
    head = given.prefix if prefix else given.prefix[:0]
    together = len(given.lines) // count
    pieces = [np.full(len(head), SHARED)]
    pieces += [np.full(len(line), number // together) for number, line in enumerate(given.lines)]
    pieces.append(np.full(given.questions.shape[1], READER))
    return np.concatenate([head, *given.lines]), np.concatenate(pieces).astype(np.int32)


def encoded(model: Any, tokens: Int[Array, " t"], ids: Int[Array, " p"], *, apart: bool) -> Any:
    """The state of a model that has read the context; `apart`: each piece from the same place on."""
    policy = Policy(key_position=AtPieces(ids)) if apart else Policy()
    state = model.init_state(1, len(ids), policy)
    return model(tokens[None], mask=Causal() & Pieces(ids), state=state)[1]


def asked(model: Any, state: Any, questions: Int[Array, "q t"], answer: int, edits: Any) -> tuple[Array, Array, Array]:
    """(loss, share of answers that are right, entropy of the rows that predict them)."""
    state = reordered(state, jnp.zeros(len(questions), int))
    logits, _, records = model(questions, state=state, edits=edits, record={"entropy": ("weights", Entropy())})
    right = (logits[:, -answer - 1 : -1].argmax(-1) == questions[:, -answer:]).all(-1)
    return nll(logits, questions)[:, -answer:].mean(), right.mean(), records["entropy"][:, :, -answer - 1 : -1].mean()


def run(config, seed, folder, console):
    got, rng = inside_smollm2.loaded(config), np.random.default_rng(seed)
    given = facts(got, config, rng)
    questions, (graph, arrays) = jnp.asarray(given.questions), nnx.split(got.model)

    @partial(jax.jit, static_argnames="apart")
    def read(arrays: Any, tokens: Array, ids: Array, apart: bool) -> Any:
        return encoded(nnx.merge(graph, arrays), tokens, ids, apart=apart)

    @jax.jit
    def answers(arrays: Any, state: Any, edit: Any) -> Any:
        return asked(nnx.merge(graph, arrays), state, questions, given.answer, edit)

    found: dict[tuple[str, int], tuple[float, ...]] = {}
    for count in config.pieces:
        console.print(f"parallel_context: {count} pieces")
        for prefix in (False, True):
            tokens, ids = map(jnp.asarray, ids_of(given, count, prefix))
            states = {PLACES: False} if not prefix else {}
            for name, apart in {PREFIX if prefix else PLAIN: True, **states}.items():
                state = read(arrays, tokens, ids, apart)
                edits: dict[str, Any] = {name: {}}
                if apart:
                    keep = KeepGroups(ids, config.keep, size=max(config.pieces))
                    edits[BOTH if prefix else TWO] = {"weights": keep}
                if apart and not prefix:
                    edits |= {sharp(t): {"scores": Temperature(jnp.float32(t))} for t in config.temperatures}
                for way, edit in edits.items():
                    found[way, count] = tuple(map(float, answers(arrays, state, edit)))
    return results(config, found)


def sharp(temperature: float) -> str:
    """The name of sharpened scores."""
    return f"scores over {temperature:g}"


def results(config: Config, found: Any) -> Result:
    """Numbers, tables and figures of (loss, accuracy, entropy) by way of reading and number of pieces."""
    one, most = config.pieces[0], max(config.pieces)
    loss, right, entropy = ({key: value[i] for key, value in found.items()} for i in range(3))
    lost = loss[PLAIN, most] - loss[PLAIN, one]

    def won_back(way: str) -> float | None:
        return (loss[PLAIN, most] - loss[way, most]) / lost if lost > 0 else None

    nearest = min(
        (PLAIN, *map(sharp, config.temperatures)), key=lambda way: abs(entropy[way, most] - entropy[PLAIN, one])
    )
    by_pieces = np.array([(entropy[PLAIN, count], loss[PLAIN, count]) for count in config.pieces])
    numbers: dict[str, float | None] = {
        "entropy, most pieces less one": entropy[PLAIN, most] - entropy[PLAIN, one],
        "accuracy, most pieces over one": right[PLAIN, most] / right[PLAIN, one] if right[PLAIN, one] > 0 else None,
        "rank correlation of entropy and loss over pieces": float(analysis.rank_correlation(*by_pieces.T)),
        "entropy, lowered by the prefix over most pieces": entropy[PLAIN, most] - entropy[PREFIX, most],
        "share of the loss won back by the prefix": won_back(PREFIX),
        "share of the loss won back by prefix and selection": won_back(BOTH),
        "share of the loss won back by the entropy of one piece": won_back(nearest),
        "loss over one piece, raised by as sharp scores": loss[nearest, one] - loss[PLAIN, one],
        "share of the loss won back by selection alone": won_back(TWO),
        "share of the loss won back by the places of the row": won_back(PLACES),
    }
    numbers |= {f"{name}, {count} pieces": value for (name, count), value in loss.items() if name == PLAIN}
    ways = list(dict.fromkeys(way for way, _ in found))
    rows = [
        {"way": way}
        | {
            f"{what}, {count} pieces": values[way, count]
            for what, values in (("loss", loss), ("right", right), ("entropy", entropy))
            for count in (one, most)
        }
        for way in ways
    ]
    few = [PLAIN, PREFIX, TWO, BOTH, PLACES, sharp(config.temperatures[0]), sharp(config.temperatures[-1])]
    figures = {
        title: Curves(
            "pieces", y, {way: [(n, values[way, n]) for n in config.pieces] for way in dict.fromkeys(few)}, log="x"
        )
        for title, y, values in (
            ("Loss by pieces", "loss of the answers (nats)", loss),
            ("Accuracy by pieces", "codes that are right", right),
            ("Entropy by pieces", "entropy of the questions (nats)", entropy),
        )
    }
    return Result(numbers, {"Ways of reading": rows}, figures)
