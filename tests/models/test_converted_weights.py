"""Trained encoders, an encoder-decoder and a small GPT-2 that come as other files than safetensors and GGUF.

Each computes what plain NumPy does with its weights, to 1e-4 of the largest number, in float32.
"""

import shutil

import jax
import numpy as np
import onnx
import pytest
from flax import nnx
from matplotlib import cbook
from onnx.reference import ReferenceEvaluator
from PIL import Image
from published import GPT2
from published_more import ALBERT, BERT, WHISPER
from safetensors.numpy import load_file
from trained import path_of

from experiments.alignment_heads import log_mel, spoken
from experiments.weights import folder_of
from jaxattn.models import generate, load_pretrained
from jaxattn.models.pretrained import weights_folder

pytestmark = pytest.mark.weights


def loaded(name):
    """(the model with its tokenizer, its weights in float64)"""
    path_of(name)  # or step aside
    folder = folder_of(name)
    weights = {each: array.astype(np.float64) for each, array in load_file(folder / "model.safetensors").items()}
    return load_pretrained(folder), weights


def run(model, *inputs, record=(), **options):
    graph, params = nnx.split(model)
    return jax.jit(lambda params, inputs, options: nnx.merge(graph, params)(*inputs, record=record, **options))(
        params, inputs, options
    )


def assert_close(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert abs(found - expected).max() < 1e-4 * abs(expected).max()


PASSAGES = (
    "Berlin had a population of 3,520,031 registered inhabitants in an area of 891.82 square kilometers.",
    "Berlin is well known for its museums.",
    "New York City is famous for the Metropolitan Museum of Art.",
)


def test_the_cross_encoder_ranks_the_passage_that_answers_first():
    """As plain NumPy; and as the graph of the file, which rounds to 8 bits what it multiplies, to 0.3."""
    model, weights = loaded("cross-encoder")
    graph = onnx.version_converter.convert_version(onnx.load(weights_folder("cross-encoder") / "model.onnx"), 21)
    rounded = ReferenceEvaluator(graph)
    scores = []
    for passage in PASSAGES:
        both = model.tokenizer.encode("How many people live in Berlin?", passage)
        ids, types = np.array([both.ids]), np.array([both.type_ids])
        score = run(model.model, ids, types=types)[0]
        options = {"attention_mask": np.ones_like(ids), "token_type_ids": types}
        assert_close(score, BERT.forward(weights, model.config, ids, **options)["logits"])
        assert abs(score - rounded.run(None, {"input_ids": ids, **options})[0]).max() < 0.3
        scores.append(float(score[0, 0]))
    assert scores[0] > 8
    assert scores[1] < 0
    assert scores[2] < -10


@pytest.mark.parametrize("name", ["colbert", "bge-small"])
def test_encoders_of_sentences(name):
    """With padding at the end, and like sentences nearer than others."""
    model, weights = loaded(name)
    weights = {each if each.startswith("bert.") else f"bert.{each}": array for each, array in weights.items()}
    texts = ("A man is playing the guitar.", "Someone performs music on a guitar.", "The stock market fell on Monday.")
    ids, shown = np.zeros((3, 16), int), np.zeros((3, 16), int)
    for row, text in enumerate(texts):
        tokens = model.encode(text)
        ids[row, : len(tokens)], shown[row, : len(tokens)] = tokens, 1
    _, _, records = run(model.model, ids, record=("final_norm",), positions=np.where(shown, np.arange(16), -1))
    found = np.asarray(records["final_norm"])
    expected = BERT.forward(weights, model.config, ids, shown, np.zeros_like(ids))["last_hidden_state"]
    assert_close(found[shown == 1], expected[shown == 1])
    mean = (found * shown[..., None]).sum(1)
    mean /= np.linalg.norm(mean, axis=-1, keepdims=True)

    assert mean[0] @ mean[1] > mean[0] @ mean[2] + 0.1


def test_the_vision_encoder():
    """As the graph of the file; and how far its heads look, in patches: far in the first layer, near in the next."""
    model, _ = loaded("vit-focus")
    picture = Image.open(cbook.get_sample_data("grace_hopper.jpg"))
    pixels = np.asarray(picture.convert("RGB").resize((224, 224)), np.float32)[None] / 255
    pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    pixels = pixels.astype(np.float32)
    vectors, _, records = run(model.model, pixels, record=("weights",))
    whole = onnx.load(weights_folder("vit-focus") / "model.onnx")
    last = "/backbone/layernorm/Add_1_output_0"
    place = next(i for i, node in enumerate(whole.graph.node) if last in node.output)
    graph = onnx.helper.make_graph(
        whole.graph.node[: place + 1],
        "encoder",
        whole.graph.input,
        [onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None)],
        whole.graph.initializer,
    )
    encoder = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=whole.opset_import))
    assert_close(vectors, encoder.run(None, {"input_image": pixels.transpose(0, 3, 1, 2)})[0])

    weights = np.asarray(records["weights"])[:, 0, :, 1:, 1:]  # of patches
    rows, columns = np.divmod(np.arange(256), 16)
    far = np.hypot(rows[:, None] - rows, columns[:, None] - columns)
    distances = ((weights * far).sum(-1) / weights.sum(-1)).mean((1, 2))
    assert distances[0] > distances[1:7].max()
    assert distances[1:7].mean() < distances[7:].mean()


def test_whisper():
    """Of frames that are noise: only the numbers are held here."""
    model, weights = loaded("whisper-base")
    draw = np.random.default_rng(0)
    features = draw.standard_normal((1, 80, 3000)).astype(np.float32)
    ids = np.array([[50258, 50259, 50359, 50363, *draw.integers(0, 50257, 60)]])
    expected = WHISPER.forward(weights, model.config, input_features=features, decoder_input_ids=ids)
    graph, params = nnx.split(model.model)
    logits, context = jax.jit(
        lambda params, x: (
            nnx.merge(graph, params)(x, ids)[0],
            nnx.merge(graph, params).encode(x)[0].x,
        )
    )(params, features.swapaxes(1, 2))
    assert_close(context, expected["encoder_last_hidden_state"])
    assert_close(logits, expected["logits"])
    assert model.token_strings(ids[0, :2]) == ["<|startoftranscript|>", "<|en|>"]


SPOKEN = "The old bridge over the river was closed for most of the winter, and the children were often late for school."


def test_whisper_writes_down_speech_and_its_alignment_heads_follow_it():
    """The listed heads of cross-attention read the sound where a token is spoken, in order; the others less so."""
    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng, which makes speech, is not installed")
    sound = spoken(SPOKEN, speed=175)
    model, _ = loaded("whisper-base")
    context, _ = model.model.encode(log_mel(sound))
    prompt = np.array([[50258, 50259, 50359, 50363]])  # start, English, write down, no times
    drawn = generate(model.model.decoder, prompt, context=context, max_new_tokens=40, temperature=0.0, end_token=50257)
    ids = np.asarray(drawn.tokens[0, : drawn.lengths[0]])
    written = model.decode(ids)
    ids = np.concatenate([prompt[0], ids])[None]
    weights = run(model.model.decoder, ids, context=context, record=("cross.weights",))[2]["cross.weights"]
    heard = np.asarray(weights)[:, 0, :, 3:-2, : len(sound) // 320]
    centres = (heard * np.arange(heard.shape[-1])).sum(-1) / heard.sum(-1)
    order = np.arange(heard.shape[2])
    follows = np.array([[np.corrcoef(order, centre)[0, 1] for centre in layer] for layer in centres])
    listed = np.zeros(follows.shape, bool)
    listed[tuple(np.transpose(model.config["alignment_heads"]))] = True
    assert "bridge over the river was closed" in written
    assert follows[listed].min() > 0.95
    assert follows[~listed].mean() < 0.8


def test_gpt2_of_gut_genera():
    """At its 512 positions."""
    model, weights = loaded("gut-gpt2")
    ids = np.random.default_rng(0).integers(4, 9669, (1, 512))
    assert_close(run(model.model, ids)[0], GPT2.forward(weights, model.config, input_ids=ids)["logits"])


def test_the_model_of_reactions_knows_what_it_hides():
    """Of an esterification: as plain NumPy, and every token is guessed when it alone is masked."""
    model, weights = loaded("rxnmapper")
    ids = model.encode("CC(=O)Cl.OCc1ccccc1>>CC(=O)OCc1ccccc1")
    assert model.token_strings(ids)[:9] == ["[CLS]", "C", "C", "(", "=", "O", ")", "Cl", "."]
    hidden = np.tile(ids, (len(ids), 1))
    np.fill_diagonal(hidden, model.tokenizer.token_to_id("[MASK]"))
    logits = np.asarray(run(model.model, hidden)[0])
    ones = np.ones_like(hidden)
    assert_close(logits, ALBERT.forward(weights, model.config, hidden, ones, 0 * ones)["logits"])
    guesses = np.diagonal(logits.argmax(-1))[1:-1]
    assert (guesses == ids[1:-1]).mean() > 0.9


def test_one_head_of_the_model_of_reactions_maps_atoms():
    """Head (10, 5): each atom of the product looks at the atom of the reactants that it was, of chlorine none."""
    model, _ = loaded("rxnmapper")
    ids = model.encode("CC(=O)Cl.OCc1ccccc1>>CC(=O)OCc1ccccc1")
    words = model.token_strings(ids)
    arrow = words.index(">>")
    atoms = [place for place, word in enumerate(words) if word.isalpha()]
    before, after = ([place for place in atoms if (place < arrow) == side] for side in (True, False))
    weights = np.asarray(run(model.model, ids[None], record=("weights",))[2]["weights"])[:, 0]
    looks = weights[:, :, after][..., before].argmax(-1)
    right = (looks == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11]).mean(-1)
    assert right[10, 5] == 1
    assert right.mean() < 0.4
