"""What the experiments on patterns of attention measure, and their quick runs."""

import dataclasses

import numpy as np
import pytest
from rich.console import Console

from experiments import approximations, bert_heads, brackets, important_tokens, shortcuts, vit_heads
from jaxattn.claims import report


def judged(module, quick):
    assert {claim.number for claim in module.CLAIMS} <= quick.numbers.keys()
    report.judged(module.CLAIMS, [quick])
    assert all(value is None or np.isfinite(value) for value in quick.numbers.values())


def test_configs_that_make_no_sense_are_named(tmp_path):
    config = dataclasses.replace(important_tokens.QUICK, texts=99)
    with pytest.raises(ValueError, match="texts is 99: need 1 to 9"):
        important_tokens.run(config, 0, tmp_path, Console(quiet=True))
    config = dataclasses.replace(bert_heads.QUICK, components=5)
    with pytest.raises(ValueError, match="shaped is 8: need 10 to 12"):
        bert_heads.run(config, 0, tmp_path, Console(quiet=True))
    with pytest.raises(ValueError, match="need 'photograph' and 'grey' among them"):
        vit_heads.run(vit_heads.Config(images=("photograph",)), 0, tmp_path, Console(quiet=True))


def test_a_window_that_hides_nothing_is_refused(tmp_path):
    config = dataclasses.replace(approximations.QUICK, tokens=6)
    with pytest.raises(ValueError, match="tokens is 6: need more than window and sinks, 6"):
        approximations.run(config, 0, tmp_path, Console(quiet=True))


def test_backgrounds_that_cannot_be_compared_are_refused(tmp_path):
    config = dataclasses.replace(shortcuts.QUICK, backgrounds=("FIX-VIT",))
    with pytest.raises(ValueError, match="need 'FIX-VIT' first, and others to compare with"):
        shortcuts.run(config, 0, tmp_path, Console(quiet=True))


def test_sentences_have_trees_and_swapped_ones_other_orders_of_their_words():
    rng = np.random.default_rng(0)
    kinds = {word: kind for kind, words in bert_heads.WORDS.items() for word in words}
    heads_of = {"det": "noun", "amod": "noun", "nsubj": "verb", "dobj": "verb", "pobj": "prep"}
    for _ in range(50):
        each = bert_heads.parsed(rng)
        assert [each.words[i] for i, name in enumerate(each.relations) if not name][-1] == "."
        assert sum(not name for name in each.relations) == 2  # the verb and the full stop
        for word, head, name in zip(each.words, each.heads, each.relations, strict=True):
            assert (head < 0) == (not name)
            if name in heads_of:
                assert kinds[each.words[head]] == heads_of[name]
            assert name not in ("det", "amod", "prep") or kinds[word] == name
        other = bert_heads.swapped(each.words, rng)
        assert sorted(other) == sorted(each.words)
        assert sum(a != b for a, b in zip(other, each.words, strict=True)) == 2


def test_a_quick_run_on_important_tokens(quick_run):
    quick = quick_run("important_tokens")[1]
    judged(important_tokens, quick)
    assert len(quick.tables["Agreement with blank-out by text (Spearman)"]) == 2


def test_a_quick_run_on_heads_of_a_vision_model(quick_run):
    quick = quick_run("vit_heads")[1]
    judged(vit_heads, quick)
    assert len(quick.tables["By layer, on the photograph"]) == 4


def test_a_quick_run_on_heads_of_bert(quick_run):
    quick = quick_run("bert_heads")[1]
    judged(bert_heads, quick)
    assert [row["relation"] for row in quick.tables[next(iter(quick.tables))]] == [*bert_heads.RELATIONS, "all"]


def test_a_quick_run_on_shortcuts(quick_run):
    quick = quick_run("shortcuts")[1]
    judged(shortcuts, quick)
    assert len(quick.tables["Heads, background says nothing"]) == 4


def test_a_quick_run_on_brackets(quick_run):
    quick = quick_run("brackets")[1]
    judged(brackets, quick)
    assert len(quick.tables["Heads"]) == 4


def test_a_quick_run_on_approximations(quick_run):
    quick = quick_run("approximations")[1]
    judged(approximations, quick)
    for points in quick.figures["Error of the stream"].lines.values():
        assert [x for x, _ in points] == [0, 1, 2, 3]
        assert points[0][1] == 0
