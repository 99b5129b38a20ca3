"""Why claims of `inside_smollm2` failed: interventions on SmolLM2 that tell one reason from another.

What that experiment found and did not expect: the costliest heads to ablate stand in the first layers and not among
the induction heads; gradients do not foretell noising; the head that restores most looks at nothing that repeats; the
eigenvalues of induction heads do not show that they copy; log-probabilities do not rise with depth. The claims below
say why, and were written after a seed of that run and before this one measured.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments import inside_smollm2
from experiments.inside_smollm2 import EDGES, FRAMEWORK, HEADS, LENS, SINKS, best, nll
from jaxattn import analysis, trace
from jaxattn.claims import Claim, Curves, Result, at_least, at_most

FULL = inside_smollm2.Config()


@dataclass(frozen=True)
class Config:
    """The model and the texts of `inside_smollm2`, and the sizes of the interventions.

    Attributes:
        inside: The model, its texts and its heads.
        early: Layers whose heads are ablated one by one.
        steps: Numbers of gradients averaged between the two texts; the claim is about the last.
        sample: Tokens that copying is measured on.
    """

    inside: inside_smollm2.Config = FULL
    early: int = 3
    steps: tuple[int, ...] = (1, 4, 16)
    sample: int = 500


QUICK = Config(inside_smollm2.QUICK, early=1, steps=(1, 2), sample=20)
CLAIMS = (
    Claim(
        "The costliest early head makes the sinks: ablated, the mean weight on the first token falls to half or less.",
        paper=SINKS,
        number="sink mass left without the early head",
        confirmed=at_most(0.5),
        refuted=at_least(0.9),
    ),
    Claim(
        "What counts is what it does at the first token: ablated there alone, it costs half of what it costs "
        "everywhere, or more.",
        paper=SINKS,
        number="cost at the first token alone, share",
        confirmed=at_least(0.5),
        refuted=at_most(0.1),
    ),
    Claim(
        "So it is no part of induction: it costs the paragraph at least half of what it costs the second copy.",
        paper=HEADS,
        number="cost on the paragraph over cost on the second copy",
        confirmed=at_least(0.5),
        refuted=at_most(0.1),
    ),
    Claim(
        "Gradients miss noising because they are taken where the softmax is saturated: the mean of 16 gradients "
        "between the two texts correlates with true patching.",
        paper=EDGES,
        number="correlation of averaged gradients and noising",
        confirmed=at_least(0.5),
        refuted=at_most(0.2),
    ),
    Claim(
        "The head that restores most stands behind the induction heads and passes on what they found: from a clean run "
        "without them its output restores a quarter of that or less.",
        paper=HEADS,
        number="restored without induction heads, share",
        confirmed=at_most(0.25),
        refuted=at_least(0.75),
    ),
    Claim(
        "Induction heads copy what stands in the stream before their layer, and not the embedding: there, a token "
        "raises its own logit among others by half a standard deviation more than in other heads.",
        paper=FRAMEWORK,
        number="copying from the stream, induction heads less others",
        confirmed=at_least(0.5),
        refuted=at_most(0),
    ),
    Claim(
        "The lens is too sure of itself in the middle: with one temperature for each layer, the best on this text, the "
        "log-probability of the right token rises with depth.",
        paper=LENS,
        number="rank correlation of depth and log-probability, tempered",
        confirmed=at_least(0.9),
        refuted=at_most(0.5),
    ),
)
TEMPERATURES = tuple(2.0 ** (i / 2) for i in range(-2, 15))


def own_logit(
    streams: Float[Array, "l t d"], tokens: Any, values: analysis.Factored, unembed: Float[Array, "d t"]
) -> Float[Array, "l n"]:
    """Returns by how many standard deviations what a head writes of a token raises that token's logit above others.

    Tokens are held against each other: (mean of the diagonal − mean of the rest) / deviation of the rest.
    """

    def of_layer(given: Any) -> Array:
        x, left, right = given
        x = x / jnp.sqrt((x**2).mean(-1, keepdims=True))
        logits = jnp.einsum("td,ndh,nhe,eu->ntu", x, left, right, unembed)
        logits = logits - logits.mean(1, keepdims=True)  # what is said of any token
        own = jnp.eye(len(tokens), dtype=bool)
        rest = jnp.where(own, jnp.nan, logits)
        mean, deviation = jnp.nanmean(rest, (1, 2)), jnp.nanstd(rest, (1, 2))
        return (jnp.diagonal(logits, axis1=1, axis2=2).mean(1) - mean) / deviation

    return jax.lax.map(of_layer, (streams, values.left, values.right))


def run(config, seed, folder, console):
    inside = config.inside
    got, key = inside_smollm2.loaded(inside), jax.random.key(seed)
    model: Any = got.model
    compiled, start = inside_smollm2.Compiled(model), got.config["bos_token_id"]
    clean, corrupted, _ = inside_smollm2.texts(key, inside, model.config.vocabulary, start)
    written = np.frombuffer(inside_smollm2.PARAGRAPH.encode(), np.uint8) if got.tokenizer is None else None
    paragraph = jnp.asarray([start, *(got.encode(inside_smollm2.PARAGRAPH) if written is None else written)])[None]
    scores = inside_smollm2.looks(model, key, inside, start)
    induction = best(scores["induction"], inside.top)
    shape, log = induction.shape, console.print

    def metric(logits: Array) -> Array:
        return nll(logits, clean)[:, 1 - inside.period :].mean()

    def on_paragraph(logits: Array) -> Array:
        return nll(logits, paragraph).mean()

    log("early heads")
    early = jnp.asarray(np.eye(induction.size, dtype=bool).reshape(-1, *shape)[: config.early * shape[1]])

    def without(mask: Array, **where: Any) -> dict[str, Any]:
        """z = 0 in some heads, at all tokens or at the first."""
        scale: Any = trace.Scale(jnp.where(mask, 0.0, 1.0)[..., None])
        if where:
            scale = trace.OnlyAt(scale, jnp.zeros((len(mask), 1), int))
        return {"z": trace.Layers(scale)}

    def costs(model: Any, mask: Array) -> tuple[Array, ...]:
        read = metric(model(clean, edits=without(mask))[0]), on_paragraph(model(paragraph, edits=without(mask))[0])
        first = model(clean, edits=without(mask, first=True))[0]
        return *read, metric(first)

    none = jnp.zeros((1, *shape), bool)
    second, text, at_first = map(
        np.asarray,
        compiled(lambda model: trace.sweep(lambda mask: costs(model, mask), jnp.concatenate([none, early]), chunk=3)),
    )
    costliest = int(second[1:].argmax())

    def mass(model: Any, mask: Array) -> Array:
        record = {"first": ("weights", analysis.USUAL["first"])}
        return trace.run(model, clean, record=record, edits=without(mask))[1]["first"][:, :, 1:].mean()

    with_head, without_head = (float(compiled(mass, x)) for x in (none[0], early[costliest]))

    log("gradients")
    effects = compiled(
        lambda model: trace.interchange(model, clean, corrupted, metric, trace.heads(model), chunk=inside.chunk)
    )
    noising = np.asarray(effects.metric - effects.base)
    correlations = []
    for steps in (None, *config.steps):
        found = compiled(lambda model: trace.attribution(model, clean, corrupted, metric, steps=steps)["z"])  # noqa: B023
        guess = np.asarray(found.sum((1, 2)))
        correlations.append((float(steps or 0), float(np.corrcoef(guess.flat, noising.flat)[0, 1])))

    log("what restores most")
    guess = compiled(lambda model: trace.attribution(model, corrupted, clean, metric)["z"].sum((1, 2)))
    place = np.unravel_index(np.asarray(guess).argmin(), shape)  # the loss falls most
    one = jnp.zeros(shape, bool).at[place].set(True)

    def restored(model: Any) -> tuple[Array, ...]:
        """The loss on the corrupted text, and with the output of one head of clean runs, whole and without others."""

        def patched(edits: dict[str, Any]) -> Array:
            z = trace.run(model, clean, record=("z",), edits=edits)[1]["z"]
            put = trace.Layers(trace.Put(z, one[:, None, None, :, None]))
            return metric(model(corrupted, edits={"z": put})[0])

        return metric(model(corrupted)[0]), patched({}), patched(without(jnp.asarray(induction) & ~one))

    base, whole, cut = map(float, compiled(restored))
    record = {"distance": ("weights", analysis.USUAL["distance"])}
    distances = compiled(lambda model: trace.run(model, clean, record=record)[1]["distance"])  # [L, B, T, N]
    distance = float(distances[place[0], :, 1 - inside.period :, place[1]].mean())

    log("copying")
    sample = jax.random.choice(jax.random.fold_in(key, 9), model.config.vocabulary, (config.sample,), replace=False)
    pairs = jnp.stack([jnp.full_like(sample, start), sample], 1)

    def copies(model: Any) -> tuple[Array, Array]:
        streams = trace.run(model, pairs, record=("resid_pre",))[1]["resid_pre"][:, :, 1]
        unembed = model.embed.table[...][sample].T * model.norm.scale[...][:, None]
        values = analysis.ov(model)
        table = jnp.broadcast_to(streams[:1], streams.shape)
        return own_logit(streams, sample, values, unembed), own_logit(table, sample, values, unembed)

    from_stream, from_table = map(np.asarray, compiled(copies))
    log("depth")

    def tempered(logits: Array) -> Array:
        return jnp.stack([-nll(logits / temperature, paragraph).mean() for temperature in TEMPERATURES])

    by_temperature = np.asarray(compiled(lambda model: analysis.lens(model, paragraph, tempered)))  # [L + 1, ...]
    number, layer = costliest % shape[1], costliest // shape[1]
    numbers = {
        "sink mass with all heads": with_head,
        "sink mass left without the early head": without_head / with_head,
        "cost on the second copy of the early head": float(second[1 + costliest] - second[0]),
        "cost at the first token alone, share": float(
            (at_first[1 + costliest] - at_first[0]) / (second[1 + costliest] - second[0])
        ),
        "cost on the paragraph over cost on the second copy": float(
            (text[1 + costliest] - text[0]) / (second[1 + costliest] - second[0])
        ),
        "correlation of one gradient and noising": correlations[0][1],
        "correlation of averaged gradients and noising": correlations[-1][1],
        "restored by the head": (base - whole) / (base - float(effects.base)),
        "restored without induction heads, share": (base - cut) / (base - whole),
        "mean distance that the head reads over": distance,
        "copying from the stream, induction heads": float(from_stream[induction].mean()),
        "copying from the stream, other heads": float(from_stream[~induction].mean()),
        "copying from the stream, induction heads less others": float(
            from_stream[induction].mean() - from_stream[~induction].mean()
        ),
        "copying from the embedding, induction heads less others": float(
            from_table[induction].mean() - from_table[~induction].mean()
        ),
        "rank correlation of depth and log-probability, tempered": float(
            analysis.rank_correlation(np.arange(len(by_temperature)), by_temperature.max(1))
        ),
    }
    return Result(
        numbers,
        {
            "Heads that were looked at": [
                {"which": "costliest early head", "head": f"layer {layer}, head {number}"},
                {"which": "head that restores most", "head": f"layer {place[0]}, head {place[1]}"},
            ],
            "Early heads": [
                {
                    "head": f"layer {n // shape[1]}, head {n % shape[1]}",
                    "cost on the second copy": float(second[1 + n] - second[0]),
                    "at the first token alone": float(at_first[1 + n] - at_first[0]),
                    "cost on the paragraph": float(text[1 + n] - text[0]),
                }
                for n in range(len(early))
            ],
        },
        {
            "Gradients averaged": Curves(
                "gradients averaged (0: one, at the clean text)",
                "correlation with noising over heads",
                {"attribution": correlations},
            ),
            "Log-probability by depth": Curves(
                "layers read",
                "mean log-probability of the right token (nats)",
                {
                    "temperature 1": list(enumerate(map(float, by_temperature[:, TEMPERATURES.index(1.0)]))),
                    "the best temperature of each layer": list(enumerate(map(float, by_temperature.max(1)))),
                },
            ),
            "Best temperature by depth": Curves(
                "layers read",
                "temperature",
                {"best": [(x, TEMPERATURES[i]) for x, i in enumerate(by_temperature.argmax(1))]},
                log="y",
            ),
        },
    )
