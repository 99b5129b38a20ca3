"""The benchmark runs and reports, and its contenders compute the same thing. Nothing here looks at a time."""

import json
import mmap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import ablations, decoding, llama, report, training
from benchmarks.__main__ import run
from benchmarks.cases import CASES, RECURRENCES, Setting, visible_pairs
from benchmarks.contenders import CONTENDERS
from benchmarks.measure import RefusedError, peak_while
from benchmarks.rows import Row, Rows, slopes
from benchmarks.targets import check
from jaxattn import Rotary, models, nn

TRAIN, DECODE = Setting(1, 64, 64, "float32", True), Setting(2, 1, 64, "float32", False)
# The first calls a C++ compiler, the second is there or not as the machine has it.
WITHOUT_FLEX = {name: make for name, make in CONTENDERS.items() if name not in ("torch flex", "torch fla")}


@pytest.mark.slow
def test_a_run_measures_every_case_and_is_reported(tmp_path):
    rows, floors, notes = run(list(CASES), [TRAIN, DECODE], 0.0, False, contenders=WITHOUT_FLEX)
    assert {(row.case, row.setting) for row in rows.rows if row.contender == "jaxattn"} == {
        (case, setting) for case in CASES for setting in (TRAIN, DECODE)
    }
    for row in rows.rows:
        assert min(row.seconds) > 0
        assert row.floor_seconds > 0
    assert min(floors.values()) > 0
    report.write(tmp_path, rows, floors, notes)
    plain = json.loads((tmp_path / "results.json").read_text())
    assert len(plain["rows"]) == len(rows.rows)
    text = (tmp_path / "report.md").read_text()
    assert all(case in text for case in CASES)
    for figure in ("times.png", "memory.png"):
        assert (tmp_path / figure).stat().st_size > 1000


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("setting", [TRAIN, DECODE], ids=["train", "decode"])
def test_contenders_agree(case, setting):
    """In out and in the gradients of query, key and value, to the rounding of two float32 sums over the keys."""
    results = {}
    for name in ("jaxattn", "jax.nn", "torch SDPA"):
        try:
            result = CONTENDERS[name](case, setting).run()
        except RefusedError:
            continue
        if name.startswith("torch"):
            result = jax.tree.map(lambda x: x.detach().transpose(1, 2).numpy(), result)
        results[name] = (result[0], *result[1][:3]) if setting.backward else (result,)
    first = results.pop("jaxattn")
    for other in results.values():
        for ours, theirs in zip(first, other, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=40 * np.finfo(np.float32).eps * np.abs(theirs).max())


@pytest.mark.slow
def test_forms_of_recurrences_stand_in_one_table(tmp_path):
    """With causal attention, which keeps all keys; one token is a step whatever came before, and refuses a chunk."""
    settings = [TRAIN, DECODE, Setting(2, 1, 4096, "float32", False)]
    cases = ["causal", "scalar decay", "channel erase"]
    rows, floors, notes = run(cases, settings, 0.0, False, contenders=WITHOUT_FLEX)
    for case in cases[1:]:
        assert {row.contender for row in rows.rows if row.case == case and row.setting == TRAIN} == {"chunk", "step"}
        one, many = (rows.find("step", case, setting) for setting in settings[1:])
        assert (one.temporaries, one.floor_seconds) == (many.temporaries, many.floor_seconds)
        assert rows.find("chunk", case, DECODE) is None
    assert any("keeps all keys" in note for note in notes)
    assert any(target.what.startswith("compile seconds of a recurrence") for target in check(rows))
    report.write(tmp_path, rows, floors, notes)
    assert all(case in (tmp_path / "report.md").read_text() for case in cases)


@pytest.mark.parametrize("case", RECURRENCES)
def test_forms_of_a_recurrence_agree(case):
    """To the rounding of sums over chunks, and of weights that are products of exponentials of up to 64."""
    setting = Setting(1, 64, 64, "float32", False)
    chunk, step = (CONTENDERS[form](case, setting).run() for form in ("chunk", "step"))
    atol = 256 * np.finfo(np.float32).eps * np.abs(step).max()
    np.testing.assert_allclose(chunk, step, atol=atol)
    try:
        peer = CONTENDERS["torch fla"](case, setting).run().numpy()
    except RefusedError:
        return
    np.testing.assert_allclose(peer if peer.shape == step.shape else peer.swapaxes(1, 2), step, atol=atol)


def test_visible_pairs_by_hand():
    assert visible_pairs("full", TRAIN) == 64 * 64
    assert visible_pairs("causal", TRAIN) == 64 * 65 // 2
    assert visible_pairs("causal", DECODE) == 64
    long = Setting(1, 1024, 1024, "float32", False)
    assert visible_pairs("window", long) == 257 * 1024 - 256 * 257 // 2
    assert visible_pairs("documents", long) == 2 * (512 * 513 // 2)


def row(contender, case, length, seconds, temporaries=None):
    return Row(contender, case, Setting(1, length, length, "float32", False), seconds, 1.0, 1.0, temporaries)


def test_targets_and_slopes_by_hand():
    """A ratio is the median of the ratios within rounds; temporaries that double with T grow with power 1."""
    rows = Rows(
        [
            row("jaxattn", "causal", 4096, [1.0, 1.0, 1.0], 1000),
            row("jaxattn", "causal", 8192, [2.0, 4.0, 30.0], 2000),
            row("torch SDPA", "causal", 8192, [1.0, 4.0, 10.0]),
        ]
    )
    (slope,) = slopes(rows)
    assert (slope.power, slope.bytes_per_token) == (1.0, 1000 / 4096)
    target = next(x for x in check(rows) if "torch SDPA" in x.what)
    assert (target.measured, target.fastest, target.limit) == (2.0, 2.0, 1.1)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_sees_what_a_call_held():
    """To the accuracy of the kernel's counters, which each thread adds to in batches of pages."""
    held = 2**26

    def hold():
        # Pages of its own: malloc may give memory that is resident already.
        pages = mmap.mmap(-1, held, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        np.frombuffer(pages, np.uint8)[:] = 1

    assert 0.9 * held < peak_while(hold) < 1.5 * held


def test_ablations_are_timed_and_counted_and_agree_with_pytorch_where_it_is_installed():
    attention = models.Spec(nn.MultiHeadAttention, heads=4, key_heads=2, head_dim=8, position=Rotary())
    block = models.Spec(nn.FeedForward, hidden=48, activation="silu", gated=True)
    config = models.TransformerConfig(vocabulary=64, width=32, layers=[models.pre_norm(attention, block)] * 2)
    model, tokens = models.Transformer(config, rngs=nnx.Rngs(0)), jnp.arange(16)[None] * 7 % 64
    found = ablations.ablations(model, tokens, [2], 1)
    assert min(min(each) for each in found["seconds"].values()) > 0
    # Two for each entry of q and out (32 x 32), k and v (32 x 16), gate, up and down (32 x 48), and 16 tokens.
    maps, pairs, head = 2 * 16 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48), 4 * 16**2 * 32, 2 * 16 * 32 * 64
    assert found["GFLOP of whole passes"] == pytest.approx(1e-9 * 8 * (2 * (maps + pairs) + head))
    assert found["GFLOP restarted"] == pytest.approx(1e-9 * 8 * (1.5 * (maps + pairs) + head))
    if llama.torch is not None:
        assert found["logits, largest difference"] < 1e-5
        assert max(found["losses, largest difference from the sweep"].values()) < 1e-5
    recorded = ablations.entropies(model, tokens, 1)
    assert set(recorded["over a pass"]) == {"no records", "entropy", "the four of statistics"}


def test_training_steps_of_all_contenders_are_the_same():
    """From the same parameters, with the same optimiser: the losses before each step agree, and fall."""
    size = training.Size(width=16, layers=2, heads=4, key_heads=2, hidden=24, vocabulary=40, rows=2, length=20)
    names = ["attention", "attention, remat none", "attention, remat full"]
    names += ["PyTorch, eager"] if training.torch is not None else []
    losses = np.array([[run() for _ in range(3)] for run in training.contenders(size, names).values()])
    assert (losses[:, 2] < losses[:, 0]).all()
    # Adam divides by the root of a mean square: where a gradient is about 0, rounding moves a parameter by the rate.
    np.testing.assert_allclose(losses, losses[:1].repeat(len(losses), 0), rtol=1e-4)


@pytest.mark.slow
def test_stores_are_read_and_their_memory_counted():
    rows = {
        row["store"]: row for row in decoding.read_stores(1024, ["Quest, 1/16, pages of 16", "HeavyHitters, 1/16"], 2)
    }
    assert set(rows) == {"all", "Quest, 1/16, pages of 16", "HeavyHitters, 1/16"}
    keys_and_values = 2 * 1024 * 8 * 64 * 4 / 2**20
    assert rows["all"]["MiB"] == pytest.approx(keys_and_values, rel=0.01)
    # A summary of two vectors per page of 16 slots, and a sixteenth of the slots.
    assert rows["Quest, 1/16, pages of 16"]["MiB"] == pytest.approx(17 / 16 * keys_and_values, rel=0.01)
    assert rows["HeavyHitters, 1/16"]["MiB"] == pytest.approx(keys_and_values / 16, rel=0.05)


def test_all_ways_of_decoding_write_the_same_text():
    layer = models.pre_norm(models.Spec(nn.MultiHeadAttention, heads=2), models.Spec(nn.FeedForward))
    model = models.Transformer(models.TransformerConfig(11, 40, 16, [layer] * 2), rngs=nnx.Rngs(0))
    chosen = [decoding.Text(str(i), np.random.default_rng(i).integers(0, 11, (1, 24))) for i in range(2)]
    rows = decoding.run(model, chosen[:1], 8, 2)
    assert [row["the same tokens"] for row in rows] == [8, 8, 8]
    assert [row["rows with the same tokens"] for row in decoding.serve(model, chosen, 8)] == [2, 2, 2]
