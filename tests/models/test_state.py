"""The state of a model after tokens were taken back is that before them, and its rows can change places."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import CONTEXT, HYMBA, VOCABULARY, assert_close, decoder, shared, tokens

from jaxattn import nn
from jaxattn.cache import HeavyHitters, Paged, Policy, Quantised, Quest, Recent
from jaxattn.models import Spec, pre_norm, reordered, rolled_back

FEED = Spec(nn.FeedForward, hidden=16)
MEMORY = Spec(nn.NeuralMemory, heads=2, hidden=(), inner_batch=2, convolution=0)
GATE = (pre_norm(Spec(nn.memory_as_gate, heads=2, window=4, persistent=1, memory=MEMORY), FEED),)
CONTEXTUAL = (pre_norm(Spec(nn.MemoryAsContext, heads=2, segment=4, persistent=1, memory=MEMORY), FEED),)
TEXT, ROWS = tokens(), jnp.array([2, 0, 0, 1])
AT = np.array([[0, 1, 2, 3, 4], [0, 1, 2, -1, -1], [0, -1, -1, -1, -1]])


@nnx.jit
def read(model, text, positions, state):
    return model(text, positions=positions, state=state)[:2]


@pytest.mark.parametrize(
    "policy",
    [Policy(), Policy(select=Quest(2, 2)), Policy(select=Quest(2, 2), storage=Paged(2))],
    ids=["all", "pages", "pool"],
)
def test_tokens_that_were_taken_back_leave_no_trace(policy):
    """Each row takes back another number; what is read next then has the logits as if they had never come."""
    model = shared()
    _, before = read(model, TEXT[:, :5], AT, model.init_state(3, CONTEXT, policy))
    more = np.array([[5, 6, 7], [3, 4, -1], [1, 2, 3]])
    _, after = read(model, TEXT[:, 5:8], more, before)
    back = rolled_back(after, jnp.array([3, 0, 2]))
    kept = np.array([[-1, -1, -1], [3, 4, -1], [1, -1, -1]])
    _, expected = read(model, TEXT[:, 5:8], kept, before)
    nxt = np.array([[5], [5], [2]])
    (logits, state), (logits_then, then) = (read(model, TEXT[:, 8:9], nxt, each) for each in (back, expected))
    assert_close(logits, logits_then)
    for name in ("positions", "last", "summary"):  # a pool may hold the same tokens in other pages
        jax.tree.map(assert_close, *(jax.tree.leaves(getattr(each[0][0], name)) for each in (state, then)))


@pytest.mark.parametrize(
    ("layers", "policy", "meta"),
    [
        (None, Policy(), 0),
        (None, Policy(HeavyHitters(1, 2), 6, Quest(2, 2)), 0),
        (None, Policy(storage=Paged(2, 4 * CONTEXT // 2)), 0),
        (None, Policy(HeavyHitters(1, 2), 6, storage=Quantised(8, 2, 2)), 0),
        (HYMBA, None, 2),
        (GATE, None, 0),
        (CONTEXTUAL, None, 0),
    ],
    ids=["attention", "evicting", "pool", "bits", "hymba", "memory", "memory as context"],
)
def test_rows_go_on_where_they_stand(layers, policy, meta):
    """Also where one row is taken twice, and another not at all."""
    model = shared() if layers is None else decoder(layers, meta_tokens=meta)
    state = read(model, TEXT[:, :5], AT, model.init_state(3, CONTEXT, policy))[1]
    moved = jax.jit(reordered)(state, ROWS)
    nxt = np.array([[5], [3], [1]])
    straight, _ = read(model, TEXT[:, 8:9], nxt, state)
    logits, _ = read(model, TEXT[ROWS, 8:9], nxt[ROWS], moved)
    assert logits.shape == (4, 1, VOCABULARY)
    assert_close(logits, straight[ROWS])


def test_what_cannot_be_brought_back_is_refused():
    count = jnp.array([1, 1, 1])
    for layers, policy, message in (
        (
            None,
            Policy(storage=Quantised(4, 2, 2)),
            r"has rounded tokens together \(Quantised\), which cannot be brought",
        ),
        (None, Policy(Recent(1), 6), r"has evicted tokens \(Recent\), which cannot be brought back"),
        (HYMBA, Policy(), "a recurrent mixer holds no single tokens, so none can be taken back"),
        (
            (pre_norm(Spec(nn.MultiHeadAttention, heads=2, convolution=3), FEED),),
            Policy(),
            "holds the past of a convolution, which cannot be brought back",
        ),
    ):
        model = shared() if layers is None else decoder(layers)
        with pytest.raises(ValueError, match=message):
            rolled_back(model.init_state(3, CONTEXT, policy), count)
