"""Which heads of a trained speech model follow the sound (Whisper), and what its transcript loses without them.

Sentences are spoken by espeak-ng, and written down by the model; all is measured on what it wrote. (The sentences
themselves would be other tokens: the tokenizer that comes with these weights lacks a merge, and cuts words that begin
with t.) A head of cross-attention follows the sound if the centre of its weights moves on with the tokens: the
correlation of both is its score. The published config lists the heads by which words are timed, the alignment heads.
They are held against the other heads by score, and then by what the transcript loses when each says what it says on
average (mean ablation). That the listed heads follow the sound more than the others had been seen on one sentence
before the claims were written down; their effect had not.
"""

import shutil
import subprocess
import tempfile
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from experiments.inside_smollm2 import drawn, nll
from experiments.trained import RANDOM, loaded
from jaxattn import models, trace
from jaxattn.claims import Claim, Curves, Maps, Result, at_least, at_most

RATE = 16_000  # of the sound, per second
PROMPT = (50258, 50259, 50359, 50363)  # start, English, write down, no times
END = 50257
SENTENCES = (
    "The old bridge over the river was closed for most of the winter, and the children were often late for school.",
    "My sister planted twelve apple trees behind the house, but only three of them survived the first summer.",
    "When the train finally arrived at the station, nobody on the platform could remember where it was going.",
    "A quiet man with a green umbrella bought all the bread in the shop and walked away without a word.",
)


@dataclass(frozen=True)
class Config:
    """A trained speech model, and what it hears.

    Attributes:
        weights: A name of `python -m jaxattn weights list`; or "random" for a small model that has learned nothing,
            which hears noise.
        sentences: How many of `SENTENCES` are spoken.
        speed: Words per minute, as espeak-ng counts them.
        draws: Draws of as many other heads to compare with.
        chunk: Runs computed at once.
    """

    weights: str = "whisper-base"
    sentences: int = 4
    speed: int = 160
    draws: int = 8
    chunk: int = 6


QUICK = Config(weights=RANDOM, sentences=2, draws=2, chunk=4)
SMALL = {
    "model_type": "whisper",
    "architectures": ["WhisperForConditionalGeneration"],
    "activation_function": "gelu",
    "alignment_heads": [[1, 0], [1, 2], [2, 3]],
    "d_model": 32,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "encoder_layers": 1,
    "max_source_positions": 60,
    "max_target_positions": 40,
    "num_mel_bins": 80,
    "scale_embedding": False,
    "vocab_size": 100,
}

PAPER, HEADS = "whisper", "head_importance"
CLAIMS = (
    Claim(
        "The listed heads follow the sound: their mean correlation is 0.9 or more.",
        paper=PAPER,
        number="correlation, listed heads",
        confirmed=at_least(0.9),
        refuted=at_most(0.6),
    ),
    Claim(
        "They can be told by it: a listed head has a higher correlation than another with probability 0.9 or more.",
        paper=PAPER,
        number="listed above another head (AUROC)",
        confirmed=at_least(0.9),
        refuted=at_most(0.5),
    ),
    Claim(
        "Among heads of their own layers too.",
        paper=PAPER,
        number="listed above another head of the same layers (AUROC)",
        confirmed=at_least(0.9),
        refuted=at_most(0.5),
    ),
    Claim(
        "The transcript needs them: ablating all listed heads costs 3 times what as many other heads cost, or more.",
        paper=PAPER,
        number="listed over other heads",
        confirmed=at_least(3),
        refuted=at_most(1),
    ),
    Claim(
        "And 3 times what as many other heads of the same layers cost, or more.",
        paper=PAPER,
        number="listed over other heads of the same layers",
        confirmed=at_least(3),
        refuted=at_most(1),
    ),
    Claim(
        "They carry most of what is heard: ablating them costs half of what it costs to ablate all heads of "
        "cross-attention, or more.",
        paper=PAPER,
        number="listed over all heads",
        confirmed=at_least(0.5),
        refuted=at_most(0.1),
    ),
    Claim(
        "They are enough: with all other heads of cross-attention ablated, at most half of that cost is left.",
        paper=PAPER,
        number="all others over all heads",
        confirmed=at_most(0.5),
        refuted=at_least(0.9),
    ),
    Claim(
        "Scores foretell effects: over all heads, the cost of ablating a head alone correlates with its correlation.",
        paper=PAPER,
        number="correlation of cost and score",
        confirmed=at_least(0.3),
        refuted=at_most(0),
    ),
    Claim(
        "Most heads can be spared one at a time: 80 percent of those of cross-attention cost less than 0.02 nats per "
        "token.",
        paper=HEADS,
        number="share of heads that cost less than 0.02 nats",
        confirmed=at_least(0.8),
        refuted=at_most(0.5),
    ),
)


def log_mel(sound: Float[np.ndarray, " samples"]) -> Float[np.ndarray, "1 3000 80"]:
    """Whisper's input of a sound at 16000 Hz: log10 of mel energies, 100 frames per second for 30 s."""
    padded = np.pad(np.pad(sound, (0, 30 * RATE - len(sound))), 200, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, 400)[::160][:3000]
    power = abs(np.fft.rfft(frames * np.hanning(401)[:-1])) ** 2

    def to_hertz(mel):  # linear up to 1000 Hz, then logarithmic (Slaney, 1998)
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))

    top = 15 + 27 * np.log(8) / np.log(6.4)  # the mel of 8000 Hz
    edges = to_hertz(np.linspace(0, top, 82))
    bins = np.fft.rfftfreq(400, 1 / RATE)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    filters = np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))[:, None]
    energies = np.log10(np.maximum(power @ filters.T, 1e-10))
    return ((np.maximum(energies, energies.max() - 8) + 4) / 4)[None].astype(np.float32)


def spoken(text: str, speed: int = 160) -> Float[np.ndarray, " samples"]:
    """A text as espeak-ng says it, at 16000 Hz. Raises FileNotFoundError where espeak-ng is not installed."""
    from scipy.signal import resample_poly

    if shutil.which("espeak-ng") is None:
        raise FileNotFoundError("espeak-ng, which makes the speech, is not installed; --quick hears noise instead")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "spoken.wav"
        subprocess.run(["espeak-ng", "-s", str(speed), "-w", file, text], check=True, capture_output=True)
        with wave.open(str(file)) as read:
            rate, sound = read.getframerate(), np.frombuffer(read.readframes(read.getnframes()), np.int16) / 2**15
    return resample_poly(sound, RATE, rate)


def follows(
    weights: Float[np.ndarray, "l b n t s"], heard: list[int], said: Bool[np.ndarray, "b t"]
) -> tuple[Float[np.ndarray, "l n b"], Float[np.ndarray, "l n b t"]]:
    """(the correlation of each head on each text, the centres of its weights in frames, NaN where nothing is said).

    Args:
        weights: The weights of cross-attention.
        heard: The number of frames of each text; what comes after is silence.
        said: Which queries foretell the tokens of the text.
    """
    layers, texts, heads, length, _ = weights.shape
    centres, scores = np.full((layers, heads, texts, length), np.nan), np.zeros((layers, heads, texts))
    for text, frames in enumerate(heard):
        here = weights[:, text, :, :, :frames].astype(np.float64)[:, :, said[text]]
        centre = (here * np.arange(frames)).sum(-1) / np.maximum(here.sum(-1), 1e-30)
        centres[:, :, text, said[text]] = centre
        order = np.arange(centre.shape[-1])
        scores[:, :, text] = [[np.corrcoef(order, each)[0, 1] for each in layer] for layer in centre]
    return scores, centres


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """The probability that one of the first is above one of the second; ties count half."""
    difference = positive[:, None] - negative
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def sounds(config: Config, got: Any, rng: Any) -> tuple[Float[np.ndarray, "b f 80"], list[int]]:
    """(frames of the spoken sentences, or of noise; how many frames of the encoder are not silent)"""
    if config.weights == RANDOM:
        frames = got.config["max_source_positions"]
        return rng.standard_normal((config.sentences, 2 * frames, 80), np.float32), [frames // 2] * config.sentences
    heard = [spoken(text, config.speed) for text in SENTENCES[: config.sentences]]
    return np.concatenate([log_mel(sound) for sound in heard]), [len(sound) // 320 for sound in heard]


def transcripts(config: Config, got: Any, context: Any, rng: Any) -> list[Int[np.ndarray, " t"]]:
    """What the model writes, the likeliest token each time; random tokens where it has learned nothing."""
    if config.weights == RANDOM:
        return [rng.integers(0, got.config["vocab_size"], 10 + 2 * text) for text in range(config.sentences)]
    prompts = np.tile([PROMPT], (config.sentences, 1))
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0.0, "end_token": END}
    drawn = models.generate(got.model.decoder, prompts, context=context, **options)
    written = [np.asarray(row[:length]) for row, length in zip(drawn.tokens, drawn.lengths, strict=True)]
    return [text[text != END] for text in written]


def run(config, seed, folder, console):
    if not 1 <= config.sentences <= len(SENTENCES):
        raise ValueError(f"sentences is {config.sentences}: need 1 to {len(SENTENCES)}")
    got, rng, log = loaded(config.weights, SMALL), np.random.default_rng(seed), console.print
    decoder: Any = got.model.decoder
    log("what is heard")
    features, heard = sounds(config, got, rng)
    context, _ = got.model.encode(jnp.asarray(features))
    written = transcripts(config, got, context, rng)
    prompt = rng.integers(0, got.config["vocab_size"], len(PROMPT)) if config.weights == RANDOM else PROMPT
    length = len(PROMPT) + max(map(len, written))
    tokens, said = np.zeros((len(written), length), int), np.zeros((len(written), length), bool)
    for row, text in enumerate(written):
        tokens[row, : len(PROMPT) + len(text)] = [*prompt, *text]
        said[row, len(PROMPT) - 1 : len(PROMPT) + len(text) - 1] = True
    log("where heads look")
    _, records = trace.run(decoder, tokens, context=context, record=("cross.weights", "cross.z"))
    scores, centres = follows(np.asarray(records["cross.weights"]), heard, said)
    score = scores.mean(-1)
    z = np.asarray(records["cross.z"])
    mean = jnp.asarray(z[:, said].mean(1))
    listed = np.zeros(score.shape, bool)
    listed[tuple(np.transpose(got.config["alignment_heads"]))] = True

    def loss(edits: Any) -> Array:
        losses = nll(decoder(tokens, context=context, edits=edits)[0], jnp.asarray(tokens))
        return (losses * said[:, :-1]).sum() / said.sum()

    log("heads ablated")
    alone = np.eye(listed.size, dtype=bool).reshape(-1, *listed.shape)
    groups = {
        "none": np.zeros_like(listed)[None],
        "the listed heads": listed[None],
        "as many others": drawn(~listed, int(listed.sum()), config.draws, rng),
        "as many others of the same layers": in_same_layers(listed, config.draws, rng),
        "all others": ~listed[None],
        "all heads": np.ones_like(listed)[None],
    }
    masks = jnp.asarray(np.concatenate([alone, *groups.values()]), jnp.float32)
    found = np.asarray(
        trace.sweep(
            lambda mask: loss({"cross.z": trace.Layers(trace.Mix(mean, mask[..., None]))}), masks, chunk=config.chunk
        )
    )
    ends = np.cumsum([len(alone), *map(len, groups.values())])
    losses = {name: found[end - len(groups[name]) : end] for name, end in zip(groups, ends[1:], strict=True)}
    plain = float(losses["none"][0])
    single = found[: len(alone)].reshape(listed.shape) - plain
    cost = {name: float(each.mean()) - plain for name, each in losses.items()}

    other = ~listed & listed.any(1, keepdims=True)
    numbers = {
        "loss of the transcript": plain,
        "correlation, listed heads": float(score[listed].mean()),
        "correlation, least of the listed heads": float(score[listed].min()),
        "correlation, other heads": float(score[~listed].mean()),
        "correlation, other heads of the same layers": float(score[other].mean()),
        "listed above another head (AUROC)": auroc(score[listed], score[~listed]),
        "listed above another head of the same layers (AUROC)": auroc(score[listed], score[other]),
        "listed over other heads": cost["the listed heads"] / max(cost["as many others"], 1e-3),
        "listed over other heads of the same layers": cost["the listed heads"]
        / max(cost["as many others of the same layers"], 1e-3),
        "listed over all heads": ratio(cost["the listed heads"], cost["all heads"]),
        "all others over all heads": ratio(cost["all others"], cost["all heads"]),
        "correlation of cost and score": float(np.corrcoef(single.flat, score.flat)[0, 1]),
        "share of heads that cost less than 0.02 nats": float((single < 0.02).mean()),
        "cost of the costliest head": float(single.max()),
    }
    best = np.unravel_index(np.where(listed, score, -np.inf).argmax(), score.shape)
    seconds = {
        f"alignment head ({best[0]}, {best[1]})": centres[*best, 0],
        "mean of the alignment heads": centres[listed][:, 0].mean(0),
        "mean of the other heads": centres[~listed][:, 0].mean(0),
    }
    return Result(
        numbers,
        {
            "Transcripts": [
                {
                    "said": SENTENCES[row] if got.tokenizer else "noise",
                    "written": got.decode(text) if got.tokenizer else "random tokens",
                    "correlation, listed heads": float(scores[listed][:, row].mean()),
                    "correlation, other heads": float(scores[~listed][:, row].mean()),
                }
                for row, text in enumerate(written)
            ],
            "Loss of the transcript by ablated heads of cross-attention": [
                {
                    "ablated": name,
                    "heads": int(groups[name][0].sum()),
                    "loss (nats per token)": float(each.mean()),
                    "least of its draws": float(each.min()),
                    "most": float(each.max()),
                }
                for name, each in losses.items()
            ],
            "Heads of cross-attention": [
                {
                    "head": f"layer {layer}, head {head}",
                    "listed": "yes" if listed[layer, head] else "",
                    "correlation": float(score[layer, head]),
                    "least of the texts": float(scores[layer, head].min()),
                    "cost of ablation": float(single[layer, head]),
                }
                for layer, head in np.ndindex(listed.shape)
            ],
        },
        {
            "Heads of cross-attention": Maps(
                {
                    "alignment heads": listed.T.astype(float).tolist(),
                    f"correlation (max {score.max():.2f})": score.T.tolist(),
                    f"cost in nats (max {single.max():.2f})": single.T.tolist(),
                },
                y="head",
                x="layer of the decoder",
            ),
            "Where the decoder listens": Curves(
                "token of the first text",
                "centre of the weights in the sound (s)",
                {
                    name: [(order, float(x) / 50) for order, x in enumerate(each[said[0]])]
                    for name, each in seconds.items()
                },
            ),
            "Cost by correlation": Curves(
                "correlation of the centre of the weights with the order of tokens",
                "cost of ablating the head alone (nats per token)",
                {
                    name: sorted((float(x), float(y)) for x, y in zip(score[on], single[on], strict=True))
                    for name, on in (("other heads", ~listed), ("alignment heads", listed))
                },
                cloud=True,
            ),
        },
    )


def in_same_layers(listed: Bool[np.ndarray, "l n"], draws: int, rng: Any) -> Bool[np.ndarray, "draws l n"]:
    """Draws of as many heads of each layer as are listed there, among those that are not, or all of them if fewer."""
    layers = [drawn(~each[None], int(each.sum()), draws, rng) for each in listed]
    return np.concatenate(layers, 1)


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
