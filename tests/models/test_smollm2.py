"""SmolLM2-135M-Instruct: a trained decoder computes what plain NumPy does, and shows what trained decoders show."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pages import run_page
from published import LLAMA
from trained import path_of

from jaxattn.models import generate, load_pretrained
from jaxattn.models.pretrained.gguf_file import GgufFile

pytestmark = pytest.mark.weights

PARAGRAPH = (
    "The old bridge over the river was closed for most of the winter. Ice had broken one of the wooden posts, and the "
    "town had no money to replace it. People who lived on the far side had to walk two miles to the next crossing, and "
    "the children were often late for school. In March the baker offered to pay for a new post, on one condition: his "
    "name should be carved into it. Nobody objected, and by April the bridge was open again."
)
LENGTH = 512


@pytest.fixture(scope="module")
def loaded():
    return load_pretrained(path_of("smollm2"))


@pytest.fixture(scope="module")
def ids(loaded):
    """The first 512 tokens of the licence."""
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    return loaded.encode(text)[None, :LENGTH]


@pytest.fixture(scope="module")
def run(loaded):
    """The model, compiled for each new shape."""
    graph, params = nnx.split(loaded.model)
    compiled = jax.jit(
        lambda params, ids, options, record: nnx.merge(graph, params)(ids, record=record, **options),
        static_argnames="record",
    )
    return lambda ids, record=(), **options: compiled(params, ids, options, record)


@pytest.fixture(scope="module")
def logits(run, ids):
    return np.asarray(run(ids)[0])


def log_loss(run, ids):
    """−log p of every token but the first, [B, T − 1]."""
    logits = run(ids)[0]
    return -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits[:, :-1])), ids[:, 1:, None], -1)[..., 0]


def test_logits_are_those_of_plain_numpy(loaded, ids, logits):
    """At 512 tokens, where a wrong rotation shows: to 1e-4 of the largest logit, in float32 through 30 layers."""
    file = GgufFile(path_of("smollm2"))
    weights = {name: file[name].astype(np.float64) for name in file}
    expected = LLAMA.forward(weights, loaded.config, input_ids=ids)["logits"]
    assert abs(logits - expected).max() < 1e-4 * abs(expected).max()


def test_english_is_likelier_than_its_words_in_disorder(loaded, run):
    ids = loaded.encode(PARAGRAPH)[None]
    shuffled = np.random.default_rng(0).permuted(ids, axis=1)
    plain, disorder = (np.exp(log_loss(run, each).mean()) for each in (ids, shuffled))
    assert 20 < plain < 35  # 26.3 over the 94 tokens after the first
    assert disorder > 600  # 1231


def test_it_answers_in_its_chat_format(loaded):
    prompt = loaded.chat([{"role": "user", "content": "What is the capital of France?"}])
    answer = generate(loaded.model, prompt[None], max_new_tokens=12, temperature=0.0, end_token=loaded.end_token)
    assert loaded.decode(answer.tokens[0, : answer.lengths[0]]) == "The capital of France is Paris."


def test_known_heads_do_what_they_are_known_for(loaded, run):
    """Heads (layer, head): induction on random tokens that come twice, previous tokens, and a first token as sink."""
    once = np.random.default_rng(0).integers(100, 40_000, 50)
    ids = np.tile(once, 2)[None]
    weights = np.asarray(run(ids, ("weights",))[2]["weights"])[:, 0]
    queries = np.arange(50, 99)
    induction = weights[:, :, queries, queries - 49].mean(-1)
    previous = weights[:, :, np.arange(1, 100), np.arange(99)].mean(-1)

    def strongest(scores, count):
        return {tuple(map(int, np.unravel_index(i, scores.shape))) for i in scores.ravel().argsort()[-count:]}

    assert strongest(induction, 3) == {(18, 6), (17, 3), (17, 4)}
    assert strongest(previous, 2) == {(16, 0), (11, 1)}
    assert induction[18, 6] > 0.85
    assert previous[16, 0] > 0.85
    losses = log_loss(run, ids)[0]
    assert losses[:49].mean() > 10  # uniform over the vocabulary: 10.8
    assert losses[50:].mean() < 3
    paragraph = loaded.encode(PARAGRAPH)[None]
    weights = np.asarray(run(paragraph, ("weights",))[2]["weights"])[:, 0]
    on_first = weights[..., 0].mean(-1)
    assert 75 < (on_first > 0.5).sum() < 105  # 91 of 270 heads; another text gave 87


def test_decoding_is_one_full_pass(loaded, run, ids, logits):
    state = loaded.model.init_state(1, LENGTH)
    _, state, _ = run(ids[:, :-2], state=state)
    for place in (-2, -1):
        one, state, _ = run(ids[:, place:][:, :1], state=state)
        assert abs(one[:, 0] - logits[:, place]).max() < 1e-4 * abs(logits).max()


def test_padded_rows_are_as_alone(run, ids, logits):
    """Padding on the left and on the right, with any tokens."""
    short = 200
    rows = np.full((2, LENGTH), 7)
    rows[0, -short:], rows[1, :short] = ids[0, :short], ids[0, :short]
    positions = np.full((2, LENGTH), -1)
    positions[0, -short:] = positions[1, :short] = np.arange(short)
    found = np.asarray(run(rows, positions=positions)[0])
    for row in (found[0, -short:], found[1, :short]):
        assert abs(row - logits[0, :short]).max() < 1e-4 * abs(logits).max()


def test_half_precision_agrees_on_the_likeliest_token(ids, logits):
    loaded = load_pretrained(path_of("smollm2"), dtype="bfloat16")
    graph, params = nnx.split(loaded.model)
    found = np.asarray(jax.jit(lambda params: nnx.merge(graph, params)(ids)[0])(params).astype(jnp.float32))
    assert (found.argmax(-1) == logits.argmax(-1)).mean() >= 0.99


@pytest.mark.slow
def test_the_page_on_induction_heads(loaded, tmp_path, capsys):
    """What it prints is what the heads do: the loss of the second copy is lost with ten heads of 270."""
    shown = run_page("docs/induction.md", tmp_path)
    assert shown["largest"](shown["scores"].induction, 1) == [(18, 6)]
    assert shown["largest"](shown["scores"].previous, 2) == [(16, 0), (11, 1)]
    whole = shown["second_copy"](shown["logits"])
    assert whole < 5
    assert shown["second_copy"](shown["without"](shown["top"])) > 2 * whole
    assert shown["fit"][11, 1][18, 6] > 1.1 * jnp.median(shown["fit"][11, 1][18:])
