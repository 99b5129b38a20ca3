"""Associative recall: the task is what it says, a small model learns it, and a state's size is counted."""

import dataclasses
import os
import signal

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments import recall
from experiments.recall import CLAIMS, MIXERS, QUICK, Config
from jaxattn import icl
from jaxattn.claims import report
from jaxattn.train import next_token_loss

MEASURED = list(range(25, QUICK.steps + 1, 25))
SIZES = {"pairs": 5, "length": 32, "keys": 9, "values": 6, "power": 0.01}


@pytest.fixture(scope="module")
def quick(quick_run):
    return quick_run("recall")[1]


def test_batches_are_prompts_of_associative_recall():
    drawn = recall.task(dataclasses.replace(Config(), **SIZES)).draw(jax.random.key(0), 3)
    expected = icl.AssociativeRecall(**SIZES).sample(jax.random.key(0), 3).tokens()
    jax.tree.map(np.testing.assert_array_equal, drawn, expected)


def test_pairs_that_do_not_fit_are_refused():
    for changes, words in (
        ({"length": 19}, "even number, 4 per pair"),
        ({"length": 18}, "even number, 4 per pair"),
        ({"keys": 4}, "keys is 4 for 5 pairs"),
        ({"values": 4}, "values is 4 for 5 pairs"),
    ):
        with pytest.raises(ValueError, match=words):
            recall.task(dataclasses.replace(Config(), **(SIZES | changes)))


def test_the_convolution_sees_the_token_before_and_no_later_one():
    model = recall.build(QUICK, MIXERS["softmax"], 0)
    tokens = jax.random.randint(jax.random.key(0), (1, QUICK.length), 0, 17)
    before, *_ = model(tokens)
    after, *_ = model(tokens.at[0, 9].set((tokens[0, 9] + 1) % 17))
    changed = np.abs(np.asarray(after - before)).max(-1)[0] > 0
    assert not changed[:9].any()
    assert changed[9:].all()


def test_who_knows_the_pairs_scores_one():
    """Logits that look each token up among the pairs are right wherever they are asked, and chance is not."""
    batch = recall.task(dataclasses.replace(Config(), **SIZES)).draw(jax.random.key(0), 1)
    tokens = np.asarray(batch["tokens"][0])
    pairs = dict(tokens[:10].reshape(5, 2).tolist())
    answers = np.array([pairs.get(token, 0) for token in tokens.tolist()])
    for guess, score in ((answers, 1.0), (np.roll(answers, 1), 0.0)):
        _, sums = next_token_loss(jax.nn.one_hot(guess[None], 16), batch)
        assert sums["correct"] / sums["weight"] == score


def test_the_state_of_a_recurrence_is_its_memory_and_what_its_convolution_needs():
    """Two layers of two heads: features (1 + 16 + 136 of Taylor, one per channel of elu + 1) by 32 values and their
    total; the last two inputs of a convolution of q, k and v."""

    def convolution(key_dim):
        return 2 * 2 * (2 * 2 * key_dim + 64)

    for name, features, key_dim in (("Taylor", 153, 16), ("Taylor 4", 15, 4), ("elu+1", 16, 16), ("elu+1 32", 32, 32)):
        assert recall.state_size(Config(), MIXERS[name]) == 2 * 2 * features * 33 + convolution(key_dim)
    assert recall.state_size(Config(), MIXERS["DeltaNet"]) == 2 * 2 * 16 * 32 + convolution(16)
    # Latte has a running total for each latent beside its 32 values.
    assert recall.state_size(Config(), MIXERS["Latte"]) == 2 * 2 * 16 * 33 + convolution(16)
    # RWKV-7 keeps the last token instead.
    assert recall.state_size(Config(), MIXERS["RWKV-7"]) == 2 * (2 * 32 * 32 + 64)


def test_the_state_of_attention_is_its_keys_and_values_and_what_its_convolution_needs():
    config = Config()
    assert recall.state_size(config, MIXERS["softmax"]) == 2 * 2 * config.width * config.length + 2 * 2 * 3 * 64
    assert recall.state_size(config, MIXERS["window 8"]) == 2 * 2 * config.width * 8 + 2 * 2 * 3 * 64


def test_the_claims_can_be_judged_by_what_a_run_of_their_mixers_measures():
    measured = {f"{name}: {what}" for name in Config().mixers for what in ("accuracy", "steps to 95 percent")}
    measured |= {name for name, pair in recall.DIFFERENCES.items() if set(pair) <= set(Config().mixers)}
    assert {claim.number for claim in CLAIMS} <= measured


def test_softmax_attention_learns_to_recall(quick):
    assert quick.numbers["softmax: accuracy"] >= 0.95
    assert quick.numbers["softmax: steps to 95 percent"] <= QUICK.steps
    assert quick.numbers["window 8: accuracy"] is None
    assert [step for step, _ in quick.figures["Accuracy against step"].lines["softmax"]] == MEASURED


def test_its_claims_are_judged_and_its_result_is_kept(quick):
    verdicts = {claim.number: verdict for claim, _, verdict in report.judged(CLAIMS, [quick])}
    assert verdicts["softmax: accuracy"] == "confirmed"
    assert verdicts["window 8: accuracy"] == "not seen at this scale"


@pytest.mark.slow
def test_a_run_that_is_stopped_keeps_no_result_and_goes_on_from_its_checkpoint(tmp_path):
    class Interrupting(Console):
        """A quiet console that sends Ctrl-C when the line of step 50 is printed."""

        def print(self, *objects, **_):
            if objects and str(objects[0]).startswith("step 50/"):
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        recall.run(QUICK, 0, tmp_path, Interrupting(quiet=True))
    kept = [int(folder.name) for folder in (tmp_path / "softmax" / "checkpoints").iterdir() if folder.is_dir()]
    assert kept == [75]
    resumed = recall.run(QUICK, 0, tmp_path, Console(quiet=True))
    assert [step for step, _ in resumed.figures["Accuracy against step"].lines["softmax"]] == MEASURED


def test_an_unknown_mixer_is_named(tmp_path):
    with pytest.raises(ValueError, match="mixers holds 'magic': there are softmax"):
        recall.run(dataclasses.replace(QUICK, mixers=("magic",)), 0, tmp_path, Console(quiet=True))
