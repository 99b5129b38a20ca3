"""The command line: train, resume, generate, look, explain; and one clear line for every mistake."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx
from html_pages import array, decoded, payload
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from tokenizers.trainers import BpeTrainer

from jaxattn import Causal, Sigmoid, Window, models, nn
from jaxattn.__main__ import keep_programs, main, seen
from jaxattn.core.attend import Dot
from jaxattn.train import BOS, encode

MODEL = models.TransformerConfig(
    length=32,
    width=16,
    layers=[
        models.pre_norm(models.Spec(nn.MultiHeadAttention, heads=2)),
        models.pre_norm(models.Spec(nn.MultiHeadAttention, heads=2, mask=Causal() & Window(5), normalize=Sigmoid())),
    ],
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"line {number} of a small text\n" * 20)
    return folder


@pytest.fixture(scope="module")
def config(corpus, tmp_path_factory):
    """A YAML config file, as `--print_config` writes and `--config` reads it."""
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    plain = {
        "model": models.to_plain(MODEL),
        "data": {"path": str(corpus), "validation_fraction": 0.25},
        "optimizer": {"warmup_steps": 2},
        "train": {"steps": 4, "batch_size": 2, "eval_batches": 1, "save_every": 2, "log_every": 1},
    }
    file.write_text(yaml.safe_dump(plain))
    return file


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    main(["train", "--config", str(config), "--folder", str(folder)])
    return folder


def fails(capsys, *arguments):
    """The one line on stderr of a command that must fail with status 2."""
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    assert exit.value.code == 2
    return capsys.readouterr().err


def test_training_leaves_a_log_a_figure_and_a_model(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert "validation_bits_per_byte" in lines[-1]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    model, step = models.load_model(run)
    assert step == 4
    assert model.config == MODEL


def test_training_again_says_it_is_complete(run, config, capsys):
    before = (run / "metrics.jsonl").read_text()
    main(["train", "--config", str(config), "--folder", str(run)])
    assert "complete" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_text() == before


def test_generate_continues_the_prompt_the_same_way_for_the_same_seed(run, capsys):
    texts = []
    for seed in (0, 0, 1):
        main(["generate", "--folder", str(run), "--prompt", "line", "--max_new_tokens", "12", "--seed", str(seed)])
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("line")
    assert texts[0] == texts[1] != texts[2]


def test_a_run_keeps_its_tokenizer_and_writes_with_it(config, corpus, tmp_path, capsys):
    words = Tokenizer(BPE())
    words.pre_tokenizer, words.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [file.read_text() for file in corpus.iterdir()]
    alphabet = ByteLevel.alphabet()
    words.train_from_iterator(texts, BpeTrainer(vocab_size=270, special_tokens=["<end>"], initial_alphabet=alphabet))
    words.save(str(tmp_path / "words.json"))
    asked = ["train", "--config", str(config), "--data.tokenizer", str(tmp_path / "words.json")]
    folder = tmp_path / "run"
    vocabulary = ["--model.vocabulary", "270"]
    asked += ["--data.begin_token", "<end>", "--data.end_token", "<end>", "--folder", str(folder)]
    main([*asked, *vocabulary, "--train.keep_best", "true"])
    assert "validation bits per byte" in capsys.readouterr().out
    assert (folder / "tokenizer.json").exists()
    for each in (folder, folder / "best"):
        main(["generate", "--folder", str(each), "--prompt", "line", "--max_new_tokens", "6"])
        assert capsys.readouterr().out.startswith("line")
    looked_at(capsys, tmp_path / "page.html", "line 1", "--model", folder / "best")
    assert "vocabulary is 258: the tokens of the tokenizer need 270" in fails(capsys, *asked)
    assert "begin is '<s>', which the tokenizer does not know" in fails(capsys, *asked, "--data.begin_token", "<s>")
    missing = fails(capsys, *asked, *vocabulary, "--data.tokenizer", tmp_path / "none.json")
    assert "none.json' is no tokenizer" in missing
    assert "begin and end are for a tokenizer" in fails(capsys, "train", "--data.end_token", "<end>")
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json' is missing: the run was trained on its tokens" in fails(
        capsys, "generate", "--folder", folder
    )


def test_generate_continues_with_a_published_model(tmp_path, capsys):
    """Greedy: the model has one layer that adds nothing, and a head that says which token follows which."""
    published = {"model_type": "llama", "hidden_act": "silu", "hidden_size": 8, "intermediate_size": 8}
    published |= {"max_position_embeddings": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "rms_norm_eps": 1e-5}
    published |= {"num_key_value_heads": 2, "rope_theta": 1e4, "vocab_size": 5, "eos_token_id": 4}
    model = models.Transformer(models.pretrained.decoders.llama(published), rngs=nnx.Rngs(0))
    for branch in model.runs[0].branches:
        last = branch.module.out if branch.mixes else branch.module.down
        last.kernel[...] = jnp.zeros_like(last.kernel[...])
    model.embed.table[...] = jnp.eye(5, 8)
    model.head.map.kernel[...] = jnp.eye(8)[:, jnp.array([7, 0, 1, 2, 3])]  # token t is followed by t + 1
    words = Tokenizer(WordLevel({"one": 0, "two": 1, "three": 2, "four": 3, "<end>": 4}))
    words.pre_tokenizer = Whitespace()
    words.add_special_tokens(["<end>"])
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    models.save_pretrained(models.pretrained.Pretrained(model, words, published, template), tmp_path)
    asked = ["generate", "--model", str(tmp_path), "--temperature", "0", "--prompt"]
    main([*asked, "one "])
    assert capsys.readouterr().out == "one two three four\n"
    main([*asked, "two", "--chat", "true"])
    assert capsys.readouterr().out == "three four\n"
    assert "prompt is empty" in fails(capsys, *asked, "")
    assert "chat is True without model" in fails(capsys, "generate", "--chat", "true")
    assert "is no file: need the folder of a published model" in fails(capsys, "generate", "--model", tmp_path / "none")


def looked_at(capsys, out, *arguments):
    """The only example of the page that `look` wrote."""
    main(["look", *map(str, arguments), "--out", str(out)])
    assert f"wrote {out}" in capsys.readouterr().out
    (example,) = payload(out.read_text(encoding="utf-8"))
    return example


def test_look_writes_a_page_of_what_the_model_computes(run, tmp_path, capsys):
    text = "line 3 of </script>"
    model, _ = models.load_model(run)
    tokens = jnp.asarray([[BOS, *encode(text)]])
    logits, _, records = model(tokens, record=("weights", "q_rotated", "k_rotated"))
    example = looked_at(capsys, tmp_path / "new" / "page.html", text, "--model", run)
    assert example["tokens"][:6] == ["BOS", "l", "i", "n", "e", "␣"]
    weights = np.asarray(records["weights"])[:, 0]
    assert (abs(decoded(example["weights"]) - weights) <= weights.max(-1, keepdims=True) / 255).all()
    for name, site in (("queries", "q_rotated"), ("keys", "k_rotated")):
        given = np.asarray(records[site])[:, 0].swapaxes(1, 2)
        np.testing.assert_allclose(array(example[name], "<f4").reshape(given.shape), given, rtol=1e-4, atol=1e-6)
    p = weights / weights.sum(-1, keepdims=True)
    entropy, sink, before = (each["values"] for each in example["statistics"])
    np.testing.assert_allclose(before, weights[..., range(1, 20), range(19)].mean(-1), rtol=1e-3)
    np.testing.assert_allclose(entropy, -(p * np.log(np.where(p > 0, p, 1))).sum(-1).mean(-1), rtol=1e-3)
    np.testing.assert_allclose(sink, p[..., 0].mean(-1), rtol=1e-3)
    # After the last layer the lens is the output, and it predicts the next token.
    exponential = np.exp(np.asarray(logits, float)[0] - np.max(logits))
    likeliest = (exponential / exponential.sum(-1, keepdims=True)).max(-1)
    np.testing.assert_allclose(np.asarray(example["lens"]["probabilities"])[-1, :, 0], likeliest, rtol=1e-3)
    assert example["lens"]["ahead"] == 1
    assert example["lens"]["rows"] == ["embed", "layer 0", "layer 1"]
    one = looked_at(capsys, tmp_path / "one.html", text, "--model", run, "--layers", "[1]")
    assert one["layers"] == [1]
    assert (abs(decoded(one["weights"]) - weights[1:]) <= weights[1:].max(-1, keepdims=True) / 255).all()


def test_look_reads_a_published_model_with_its_tokenizer(tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    published = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_embd": 8}
    published |= {"n_head": 2, "n_layer": 2, "n_positions": 16, "vocab_size": 9}
    gpt2 = models.Transformer(models.pretrained.decoders.gpt2(published), rngs=nnx.Rngs(0))
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "c": 2, "d": 3, "?": 4}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    models.save_pretrained(models.pretrained.Pretrained(gpt2, words, published), tmp_path / "gpt2")
    example = looked_at(capsys, tmp_path / "page.html", "a c b x", "--model", tmp_path / "gpt2")
    assert example["tokens"] == ["a", "c", "b", "?"]
    weights = np.asarray(gpt2(jnp.array([[0, 2, 1, 4]]), record=("weights",))[2]["weights"])[:, 0]
    assert (abs(decoded(example["weights"]) - weights) <= weights.max(-1, keepdims=True) / 255).all()
    (tmp_path / "gpt2" / "tokenizer.json").unlink()
    names = {token for row in example["lens"]["tokens"] for place in row for token in place}
    assert names <= {"a", "b", "c", "d", "?", "<5>", "<6>", "<7>", "<8>"}
    assert names & {"<5>", "<6>", "<7>", "<8>"}  # the vocabulary of the model is padded
    assert "there is no tokenizer" in fails(capsys, "look", "a", "--model", tmp_path / "gpt2")


def test_a_look_at_a_hybrid_shows_layers_with_as_many_heads_and_meta_tokens():
    layers = [
        models.pre_norm(models.Spec(nn.GLA, heads=2)),
        models.pre_norm(models.Spec(nn.MultiHeadAttention, heads=4, key_heads=1, score=Dot(0.5))),
    ]
    config = models.TransformerConfig(vocabulary=9, length=8, width=16, layers=layers, meta_tokens=2)
    hybrid, tokens = models.Transformer(config, rngs=nnx.Rngs(0)), np.array([3, 1, 4, 1])

    def strings(tokens):
        return [str(token) for token in tokens]

    with pytest.raises(ValueError, match=r"different numbers of heads, \{0: 2, 1: 4\}"):
        seen(hybrid, tokens, strings)
    example = seen(hybrid, tokens, strings, [1])
    assert example.tokens == ["meta 0", "meta 1", "3", "1", "4", "1"]
    assert np.shape(example.weights) == (1, 4, 6, 6)
    assert np.shape(example.keys) == (1, 1, 6, 4)
    scores = example.scale * np.asarray(example.queries) @ np.swapaxes(example.keys, 2, 3)
    exponential = np.tril(np.exp(scores.astype(float)))
    np.testing.assert_allclose(example.weights, exponential / exponential.sum(-1, keepdims=True), rtol=1e-3, atol=1e-6)
    example = seen(hybrid, tokens, strings, [0])  # weights that are implied, of which q · k says less
    assert np.shape(example.weights) == (1, 2, 6, 6)
    assert example.queries is None
    nothing = dataclasses.replace(config, layers=[models.Layer([models.Branch(models.Spec(nn.FeedForward))])])
    with pytest.raises(ValueError, match="no layer of the model has attention weights"):
        seen(models.Transformer(nothing, rngs=nnx.Rngs(0)), tokens, strings)


def test_explain_names_an_implementation(capsys):
    main(["explain", "--length", "8192", "--mask", "jaxattn.Window", "--mask.left", "256"])
    assert "-> tiled" in capsys.readouterr().out
    main(["explain", "--length", "16"])
    assert "-> dense" in capsys.readouterr().out


def test_explain_says_what_serves_the_layers_of_a_model(run, capsys):
    main(["explain", "--model", str(run), "--length", "16"])
    shown = capsys.readouterr().out
    assert "layer 0: MultiHeadAttention" in shown
    assert "-> dense" in shown
    assert "which does not exist" in fails(capsys, "explain", "--model", str(run / "none"))


def test_models_are_found_by_name(tmp_path, monkeypatch, capsys):
    """A path that exists goes before a name."""
    monkeypatch.setenv("JAXATTN_WEIGHTS", str(tmp_path))
    file = tmp_path / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.parent.mkdir()
    file.write_bytes(b"")
    for command in (["generate", "--prompt", "a"], ["look", "a"], ["explain"]):
        assert str(file) in fails(capsys, *command, "--model", "smollm2")
    monkeypatch.chdir(tmp_path)
    assert str(file) not in fails(capsys, "look", "a", "--model", "smollm2")


def test_weights_are_listed_and_their_path_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAXATTN_WEIGHTS", str(tmp_path))
    main(["weights", "list"])
    assert "smollm2 " in capsys.readouterr().out
    file = tmp_path / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.parent.mkdir()
    file.touch()  # as it stands there after it was fetched
    main(["weights", "smollm2"])
    assert capsys.readouterr().out == f"{file}\n"
    assert "name is 'unheard': need one of" in fails(capsys, "weights", "unheard")


def test_printed_config_is_a_config(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--model.width", "48", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert models.from_plain(printed["model"]) == models.TransformerConfig(width=48)


def test_help_documents_every_field(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        "number of positions that the model is trained for",
        "Share of the documents",
        "peak learning rate",
        "micro-batch",
    ):
        assert words.lower() in shown.lower()


def test_configs_survive_json():
    assert models.from_plain(json.loads(json.dumps(models.to_plain(MODEL)))) == MODEL
    with pytest.raises(ValueError, match=r"not the config of a model.*width"):
        models.from_plain({"width": "wide"})


def test_another_config_in_the_folder_names_the_field(run, config, capsys):
    error = fails(capsys, "train", "--config", config, "--folder", run, "--optimizer.learning_rate", "0.5")
    assert "optimizer.learning_rate was 0.001, now 0.5" in error
    assert error.count("\n") == 1


def test_mistakes_get_one_line(run, config, corpus, tmp_path, capsys):
    assert "no room for new ones in the model's length of 32" in fails(
        capsys, "generate", "--folder", run, "--prompt", "x" * 40
    )
    assert "41 tokens: need 1 to 32 (the context)" in fails(capsys, "look", "x" * 40, "--model", run)
    assert "layers has [2]: need some of [0, 1]" in fails(capsys, "look", "x", "--model", run, "--layers", "[2]")
    assert "which does not exist" in fails(capsys, "look", "x", "--model", tmp_path / "none")
    assert "does not exist" in fails(capsys, "generate", "--folder", tmp_path / "none")
    train = ("train", "--config", config, "--folder", tmp_path / "new")
    assert "does not exist" in fails(capsys, *train, "--data.path", tmp_path / "none")
    (tmp_path / "image.txt").write_bytes(b"\x89PNG\xff")
    assert "is not UTF-8 text" in fails(capsys, *train, "--data.path", tmp_path / "image.txt")
    (tmp_path / "empty").mkdir()
    assert "holds no text" in fails(capsys, *train, "--data.path", tmp_path / "empty")
    assert "need 258" in fails(capsys, *train, "--model.vocabulary", "100")
    assert "unknown" in fails(capsys, "explain", "--implementation", "magic")
    assert not (tmp_path / "new").exists()


def test_a_damaged_checkpoint_is_passed_over(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    data = [file for file in (copy / "checkpoints" / "4").rglob("*") if file.is_file() and file.stat().st_size > 1000]
    for file in data:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.warns(UserWarning, match="step 4 is damaged"):
        _, step = models.load_model(copy)
    assert step == 2


def test_the_module_and_the_script_are_the_same_command():
    for command in ([sys.executable, "-m", "jaxattn"], [str(Path(sys.executable).parent / "jaxattn")]):
        if Path(command[0]).exists():
            shown = subprocess.run([*command, "explain", "--length", "8"], capture_output=True, text=True, check=True)
            assert "-> dense" in shown.stdout


def test_compiled_programs_are_kept_where_nothing_else_is_set(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    try:
        keep_programs()
        assert jax.config.jax_compilation_cache_dir == before  # that of the tests
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        jax.config.update("jax_compilation_cache_dir", None)
        keep_programs()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "jaxattn" / "programs")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
