"""all-MiniLM-L6-v2: a trained encoder computes what plain NumPy does, and shows what is known of it."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from published_more import BERT
from safetensors.numpy import load_file
from trained import path_of

from jaxattn.models import load_pretrained
from jaxattn.models.pretrained import tokenizer

pytestmark = pytest.mark.weights


@pytest.fixture(scope="module")
def loaded():
    return load_pretrained(path_of("minilm"))


@pytest.fixture(scope="module")
def ids(loaded):
    """512 tokens of the licence, between [CLS] and [SEP]."""
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    return np.concatenate([loaded.encode(text)[:511], loaded.encode("")[-1:]])[None]


@pytest.fixture(scope="module")
def run(loaded):
    graph, params = nnx.split(loaded.model)
    record = ("final_norm", "weights")
    compiled = jax.jit(lambda params, ids, options: nnx.merge(graph, params)(ids, record=record, **options))
    return lambda ids, **options: compiled(params, ids, options)


def test_vectors_are_those_of_plain_numpy(loaded, ids, run):
    """At 512 tokens, and at 512 of which the last 100 are padding: to 1e-4 of the largest number."""
    weights = load_file(path_of("minilm") / "model.safetensors")
    weights = {f"bert.{name}": x.astype(np.float64) for name, x in weights.items() if x.dtype == np.float32}
    for length in (512, 412):
        shown = np.arange(512)[None] < length
        expected = BERT.forward(weights, loaded.config, ids, shown.astype(int), np.zeros_like(ids))
        pooled, _, records = run(ids, positions=np.where(shown, np.arange(512), -1))
        for found, x in ((pooled, expected["pooler_output"]), (records["final_norm"], expected["last_hidden_state"])):
            found, x = np.asarray(found), np.asarray(x)
            found, x = (found[shown], x[shown]) if x.ndim == 3 else (found, x)
            assert abs(found - x).max() < 1e-4 * abs(x).max()


def test_known_heads_do_what_they_are_known_for(ids, run):
    """Head (0, 2) reads the previous token, and [CLS] gets what [SEP] gets in other models."""
    ids = np.concatenate([ids[:, :63], ids[:, -1:]], 1)
    weights = np.asarray(run(ids, positions=np.arange(64)[None])[2]["weights"])[:, 0]
    assert weights[0, 2, np.arange(1, 64), np.arange(63)].mean() > 0.99
    of_first, of_last = (weights[..., place].mean((1, 2)) for place in (0, -1))
    assert of_first.mean() > 3 * of_last.mean()


def test_sentences_of_like_meaning_are_near(loaded, run):
    """Means of the vectors of all tokens, which is what the model was trained for."""
    texts = ("A man is playing the guitar.", "Someone performs music on a guitar.", "The stock market fell on Monday.")

    def vector(text):
        ids = loaded.encode(text)
        row = np.zeros((1, 16), int)
        row[0, : len(ids)] = ids
        positions = np.where(np.arange(16) < len(ids), np.arange(16), -1)[None]
        mean = np.asarray(run(row, positions=positions)[2]["final_norm"])[0, : len(ids)].mean(0)
        return mean / np.linalg.norm(mean)

    first, like, other = map(vector, texts)
    assert first @ like > 0.6
    assert abs(first @ other) < 0.2


def test_its_list_of_pieces_makes_its_tokenizer(loaded):
    folder = path_of("minilm")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    words = (folder / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    made = tokenizer.word_pieces({word: number for number, word in enumerate(words)}, settings)
    for text in (
        "Hello, wörld! unbelievable",
        "ÀÉ 你好 don't 3.14 [MASK] x",
        "a" * 150,
        "a 😀 z\u0301\u200d\t\n b",
        "",
    ):
        assert made.encode(text).ids == loaded.tokenizer.encode(text).ids
        one, other = (each.encode(text, "b c") for each in (made, loaded.tokenizer))
        assert (one.ids, one.type_ids) == (other.ids, other.type_ids)


def test_the_vocabulary_of_gpt2_is_read():
    """Its tokens of two well-known texts."""
    folder = path_of("gpt2-vocabulary")
    made = tokenizer.of_folder(folder, "gpt2", {})
    assert made.encode("Hello world").ids == [15496, 995]
    assert made.encode("<|endoftext|>").ids == [50256]
    text = "It's 1024 – naïve 😀\n\n  x"
    assert made.decode(made.encode(text).ids) == text
