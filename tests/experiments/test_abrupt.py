"""What heads do is measured as their weights say, and every claim on abrupt learning is judged."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments import abrupt, decoders
from experiments.abrupt import CLAIMS, QUICK
from jaxattn.claims import report


def test_progress_is_read_off_the_weights():
    """Sequence by sequence, from weights that are held whole."""
    of = abrupt.task(QUICK, {"classes": 8, "burst": 2}, 0)
    model, prompt = abrupt.build(QUICK, of, 1), of.in_context().sample(jax.random.key(2), 6)
    found = abrupt.progress(model, prompt)
    logits, _, records = model(prompt.x, record=("weights",))
    w, labels = np.asarray(records["weights"])[:, :, 0], np.asarray(prompt.hidden[1])
    items = np.mean([w[0, b, 2 * i + 1, 2 * i] for b in range(6) for i in range(4)])
    right = np.mean([sum(w[1, b, -1, 2 * i + 1] for i in range(4) if labels[b, i] == labels[b, -1]) for b in range(6)])
    shares = np.asarray(jax.nn.softmax(logits[:, -1]))
    present = np.mean([sum(shares[b, label] for label in set(labels[b, :-1].tolist())) for b in range(6)])
    correct = np.mean(shares.argmax(-1) == labels[:, -1])
    for name, expected in (("items", items), ("labels", right), ("present", present), ("in context", correct)):
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, err_msg=name)


def test_a_crossing_is_the_first_step_at_a_level():
    line = [(10, 0.1), (20, 0.6), (30, 0.4)]
    assert [decoders.first_step(line, level) for level in (0.0, 0.5, 0.6, 0.7)] == [10, 20, 20, None]


def test_a_quick_run_judges_every_claim(quick_run):
    result = quick_run("abrupt")[1]
    assert {claim.number for claim in CLAIMS} <= result.numbers.keys()
    report.judged(CLAIMS, [result])
    assert [row["classes"] for row in result.tables["Cells"]] == [32, 8]
    assert jnp.isfinite(jnp.array([row["in context"] for row in result.tables["Cells"]])).all()
