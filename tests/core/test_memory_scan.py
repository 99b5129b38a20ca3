"""Memories that are trained while they read: inner batches are gradient descent token by token, written here once more
with `jax.grad` of a loss, and the laws that follow from it."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jaxattn import linear_attention, memory_scan, part
from jaxattn.core.linear import Delta, Erase, LinearState
from jaxattn.core.memory import (
    DotProduct,
    Huber,
    Identity,
    InnerLoss,
    LpError,
    LqMirror,
    LqScale,
    MatrixMemory,
    Memory,
    MemoryState,
    MLPMemory,
    SigmoidLink,
    SoftmaxLink,
    SoftThreshold,
    SquaredError,
    memory_read,
)

T, N, K, V, B = 22, 2, 3, 4, 6  # three inner batches of 6 and one of 4, in 8 slots each
rng = np.random.default_rng(0)


def normal(*shape, scale=1.0):
    return rng.normal(size=shape) * scale


def call(key=K, value=V, **gates):
    """Arrays of a call and its gates: "decay", "momentum" and "row" of every size, also closed."""
    log_decay, log_momentum = -np.exp(2 * normal(T, N) - 2), -np.exp(normal(T, N))
    log_decay[4], log_decay[9], log_momentum[2], log_momentum[14] = -1e3, -np.inf, -np.inf, 0
    given = {"query": normal(T, N, key), "key": normal(T, N, key, scale=0.6), "value": normal(T, N, value)}
    given["rate"] = rng.uniform(0, 0.3, size=(T, N))
    extra = {"decay": log_decay, "momentum": log_momentum, "row": rng.uniform(0.3, 1, size=(T, N))}
    names = {"decay": "log_decay", "momentum": "log_momentum", "row": "row_rate"}
    return given | {names[name]: extra[name] for name in gates}


def layers(*sizes, bias=0):
    return tuple(normal(N, a + bias, b, scale=0.5) for a, b in itertools.pairwise(sizes))


# Networks of the reference, for one head and one token: fast weights, slow weights and input -> output.


def matrix(fast, slow, x):
    return x @ fast[0]


def mlp(activation, fast, slow, x):
    for weight in fast[:-1]:
        x = activation(x @ weight)
    return x @ fast[-1]


def layer_norm(x, slow):
    gain, shift = slow
    return gain * (x - x.mean()) / jnp.sqrt(x.var() + 1e-6) + shift


def ttt(fast, slow, x):
    return x + layer_norm(x @ fast[0][:-1] + fast[0][-1], slow)


def residual_mlp(fast, slow, x):
    return x + layer_norm(mlp(jax.nn.gelu, fast, slow, x), (1.0, 0.0))


def squared(e):
    return (e**2).sum()


def huber(delta, e):
    norm = jnp.sqrt((e**2).sum())
    return jnp.where(norm <= delta, norm**2 / 2, delta * norm - delta**2 / 2)


def mirror(q, a):
    return jnp.sign(a) * jnp.abs(a) ** (q - 1) / (jnp.abs(a) ** q).sum() ** ((q - 2) / q)


NORM = {"gain": rng.uniform(0.5, 1.5, size=(N, K)), "shift": normal(N, K)}
MATRIX, MLP = MatrixMemory(normal(N, K, V, scale=0.5)), MLPMemory(layers(K, 5, V))
TTT = MLPMemory(layers(K, K, bias=1), **NORM, normalize=True, residual=True, bias=True)
DEEP = MLPMemory(layers(K, 5, 5, V), activation="silu")
MIRAS = MLPMemory(layers(K, 6, K), normalize=True, residual=True)

# name: (memory, call, options; network, loss and link of the reference)
CASES = {
    "matrix": (MATRIX, call(), {}, matrix, squared, None),
    "momentum": (MATRIX, call(decay=1, momentum=1), {}, matrix, squared, None),
    "titans": (MLP, call(decay=1, momentum=1), {}, partial(mlp, jax.nn.gelu), squared, None),
    "yaad": (
        DEEP,
        call(decay=1),
        {"loss": Huber(0.7)},
        partial(mlp, jax.nn.silu),
        partial(huber, 0.7),
        None,
    ),
    "ttt": (TTT, call(value=K, row=1), {"loss": SquaredError(0.5)}, ttt, lambda e: squared(e) / 2, None),
    "moneta": (
        MIRAS,
        call(value=K, decay=1, momentum=1, row=1),
        {"loss": LpError(3.0), "link": LqMirror(4.0)},
        residual_mlp,
        lambda e: (jnp.abs(e) ** 3).sum(),
        partial(mirror, 4.0),
    ),
    "memora": (
        MATRIX,
        call(decay=1),
        {"link": SoftmaxLink(scale=2.0)},
        matrix,
        squared,
        lambda a: 2 * jax.nn.softmax(a, 0),
    ),
}


def reference(name, memory, given, size, state=None):
    """(out, (start, dual, momentum)) from the definition, a token and a head at a time."""
    *_, network, loss, link = CASES[name]
    link = link or (lambda a: a)
    slow = (memory.gain, memory.shift) if name == "ttt" else (jnp.ones((N, 1)), jnp.zeros((N, 1)))
    shape = given["rate"].shape
    gates = {"log_decay": 0.0, "log_momentum": -jnp.inf, "row_rate": 1.0} | given
    gates = {x: jnp.broadcast_to(gates[x], shape) for x in ("rate", "log_decay", "log_momentum", "row_rate")}

    def head(initial, slow, query, key, value, rate, log_decay, log_momentum, row_rate):
        def token(carry, now):
            start, dual, momentum = carry
            place, query, key, value, rate, log_decay, log_momentum, row = now
            weights = jax.tree.map(link, start)
            slope = jax.grad(lambda w: loss(network(w, slow, key) - value))(weights)
            momentum = jax.tree.map(lambda s, u: jnp.exp(log_momentum) * s - rate * u, momentum, slope)
            dual = jax.tree.map(lambda a, s: jnp.exp(log_decay) * a + s, dual, momentum)
            read = jax.tree.map(lambda a, b: a + row * (b - a), start, dual)
            out = network(jax.tree.map(link, read), slow, query)
            last = place == size - 1
            dual = jax.tree.map(lambda a, b: jnp.where(last, a, b), read, dual)
            start = jax.tree.map(lambda a, b: jnp.where(last, a, b), dual, start)
            return (start, dual, momentum), out

        carry = (initial, initial, jax.tree.map(jnp.zeros_like, initial))
        place = jnp.arange(len(query)) % size
        return jax.lax.scan(token, carry, (place, query, key, value, rate, log_decay, log_momentum, row_rate))

    arrays = [given[x] for x in ("query", "key", "value")] + list(gates.values())
    over = jax.vmap(head, in_axes=(0, 0, *[1] * 7), out_axes=(0, 1))
    carry, out = over(memory.fast_weights, slow, *arrays)
    return out, carry


def arrays(name, dtype=jnp.float64):
    """(memory, arrays, options) of a case."""
    memory, given, options, *_ = CASES[name]
    return (*jax.tree.map(lambda x: jnp.asarray(x, dtype), (memory, given)), options)


def assert_close(actual, expected, tolerance=1e-9):
    """Within `tolerance` of the largest number, leaf by leaf."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(abs(b).max(), 1e-30))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


READS = {"matrix": ("dual",), "yaad": ("dual",), "moneta": ("materialize",), "memora": ("materialize",)}


@pytest.mark.parametrize("name", CASES)
def test_an_inner_batch_is_gradient_descent_from_where_it_started(name, x64):
    """Every token's gradient at the first weights of its batch: outputs, states and all outer gradients."""
    memory, given, options = arrays(name)

    def scored(run):
        def loss(memory, given):
            out, state = run(memory, given)
            return sum(jnp.sin(x).sum() for x in jax.tree.leaves((out, state))), (out, state)

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(memory, given)

    def definition(memory, given):
        out, carry = reference(name, memory, given, B)
        return out, carry if "log_momentum" in given else carry[:2]

    expected = scored(definition)
    for read in READS.get(name, ("dual", "materialize")):

        def run(memory, given, read=read):
            out, state = memory_scan(memory, **given, **options, inner_batch=B, read=read)
            return out, tuple(x for x in state[:3] if x is not None)

        assert_close(scored(run), expected)


def tokens(given, where):
    return jax.tree.map(lambda x: x[where], given)


@pytest.mark.parametrize("name", ["titans", "moneta"])
def test_a_sequence_may_be_split_anywhere_and_read_token_by_token(name, x64):
    """Cuts inside inner batches, at their ends, and one token at a time over two ends."""
    memory, given, options = arrays(name)
    run = jax.jit(partial(memory_scan, memory, **options, inner_batch=B))
    whole, end = run(**given)
    cuts = [0, 5, 10, *range(11, 18), T] if name == "titans" else [0, 4, 13, T]
    state, out = None, []
    for a, b in itertools.pairwise(cuts):
        piece, state = run(**tokens(given, slice(a, b)), state=state)
        out.append(piece)
        assert state.seen == b % B
    assert_close((jnp.concatenate(out), state), (whole, end))


@pytest.mark.parametrize("name", ["titans", "memora"])
def test_shard_map_over_the_batch(name):
    """Each device has one batch entry and both have the memory, whose gradients are summed."""
    memory, given, options = arrays(name, jnp.float32)
    batch = jax.tree.map(lambda x: jnp.stack([x, jnp.roll(x, 5, 0)]), given)

    def total(memory, given, where):
        out, state = memory_scan(memory, **given, **options, inner_batch=B)
        return jax.lax.psum(sum(jnp.sin(x).sum() for x in (out, *state.dual)), where)

    def slopes(where):
        return jax.grad(partial(total, where=where), argnums=(0, 1))

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    shards = P(), P("data")
    sharded = jax.shard_map(slopes("data"), mesh=mesh, in_specs=shards, out_specs=shards)
    assert_close(jax.jit(sharded)(memory, batch), jax.jit(slopes(()))(memory, batch), 1e-4)


@pytest.mark.parametrize("name", ["titans", "ttt", "memora"])
def test_tokens_after_the_length_of_a_row_are_not_there(name, x64):
    """Two calls with padding in both, at different places in two rows, against the rows alone."""
    memory, given, options = arrays(name)
    run = jax.jit(partial(memory_scan, memory, **options, inner_batch=B))
    batch = jax.tree.map(lambda x: jnp.stack([x, x]) if x.shape[:1] == (T,) else x, given)
    first = jax.tree.map(lambda x: x[:, :9] if x.shape[1:2] == (T,) else x, batch)
    second = jax.tree.map(lambda x: jnp.stack([x[0, 4:13], x[1, 9:18]]) if x.shape[1:2] == (T,) else x, batch)
    out, state = run(**first, lengths=jnp.array([4, 9]))
    again, state = run(**second, lengths=jnp.array([9, 0]), state=state)
    for row, length in enumerate((13, 9)):
        whole, end = run(**tokens(given, slice(0, length)))
        found = jnp.concatenate([out[0, :4], again[0]]) if row == 0 else out[1]
        assert_close((found, jax.tree.map(lambda x, row=row: x[row], state)), (whole, end))


def test_rows_of_a_batch_may_have_seen_different_numbers_of_tokens(x64):
    memory, given, options = arrays("titans")
    run = jax.jit(partial(memory_scan, memory, **options, inner_batch=B))
    _, first = run(**tokens(given, slice(0, 5)))
    states = [first, run(**tokens(given, slice(5, 10)), state=first)[1]]
    rest = [tokens(given, slice(seen, seen + 5)) for seen in (5, 10)]
    stack = partial(jax.tree.map, lambda *x: jnp.stack(x))
    together = run(**stack(*rest), state=stack(*states))
    each = stack(*(run(**one, state=state) for one, state in zip(rest, states, strict=True)))
    assert_close(together, each)
    mapped = jax.vmap(lambda one, state: run(**one, state=state))(stack(*rest), stack(*states))
    assert_close(mapped, each)


@pytest.mark.parametrize("name", ["titans", "memora"])
def test_an_inner_batch_of_one_is_the_sequential_rule(name, x64):
    memory, given, options = arrays(name)
    expected, carry = jax.jit(partial(reference, name, size=1))(memory, given)
    out, state = jax.jit(partial(memory_scan, **options, inner_batch=1))(memory, **given)
    assert_close((out, state[1]), (expected, carry[1]))
    other, _ = jax.jit(partial(memory_scan, **options, inner_batch=2))(memory, **given)
    assert np.abs(out - other).max() > 1e-3  # another function


def test_a_sequential_matrix_memory_is_linear_attention_that_erases(x64):
    """M_t = (1 − α) M − 2θ k (kᵀM − v)ᵀ: Titans' error is that of the memory before it decays."""
    memory, given, _ = arrays("momentum")
    given.pop("log_momentum")
    step = 2 * given["rate"][..., None] * given["key"]
    state = LinearState(memory.weight, jnp.int32(0))
    erase = Erase(given["key"], -step)
    expected, last = linear_attention(
        given["query"], step, given["value"], log_decay=given["log_decay"], erase=erase, state=state
    )
    out, state_of_memory = memory_scan(memory, **given, inner_batch=1)
    assert_close((out, state_of_memory.dual[0]), (expected, last.memory))


def test_without_retention_it_is_the_delta_rule(x64):
    memory, given, _ = arrays("matrix")
    rate, state = given.pop("rate"), LinearState(memory.weight, jnp.int32(0))
    expected, _ = linear_attention(**given, erase=Delta(2 * rate), state=state)
    assert_close(memory_scan(memory, **given, rate=rate, inner_batch=1)[0], expected)
    half = memory_scan(memory, **given, rate=2 * rate, inner_batch=1, loss=SquaredError(0.5))[0]
    assert_close(half, expected)


def test_a_memory_that_only_adds_is_linear_attention_for_any_inner_batch(x64):
    memory, given, _ = arrays("momentum")
    given.pop("log_momentum")
    expected, _ = linear_attention(
        given["query"],
        given["key"],
        given["rate"][..., None] * given["value"],
        log_decay=given["log_decay"],
    )
    zero = MatrixMemory(jnp.zeros_like(memory.weight))
    for size in (1, 16):
        assert_close(memory_scan(zero, **given, loss=DotProduct(), inner_batch=size)[0], expected)


def test_no_momentum_is_a_closed_momentum_gate(x64):
    memory, given, _ = arrays("titans")
    given["log_momentum"] = jnp.full((T, N), -jnp.inf)
    out, state = memory_scan(memory, **given, inner_batch=B)
    given.pop("log_momentum")
    expected, other = memory_scan(memory, **given, inner_batch=B)
    assert_close((out, state.dual), (expected, other.dual))
    assert other.momentum is None


@pytest.mark.parametrize("momentum", [None, 0.5, 0.9])
@pytest.mark.parametrize("inner_batch", [1, 8])
def test_steps_are_stable_up_to_their_bound_on_tokens_that_repeat(momentum, inner_batch, x64):
    """One key of norm 1 again and again, all of whose values are 0: at θ · inner_batch = 1 − η what it reads is never
    larger than what it started with; at 4 times that, without momentum, every inner batch makes it 7 times as large."""
    key, value = np.zeros((200, 1, 3)), np.zeros((200, 1, 2))
    key[..., 0] = 1
    eta = momentum or 0.0
    gates = {} if momentum is None else {"log_momentum": np.log(momentum)}

    def read(times):
        rate = times * (1 - eta) / inner_batch
        memory = MatrixMemory(jnp.ones((1, 3, 2)))
        return abs(memory_scan(memory, key, key, value, rate=rate, inner_batch=inner_batch, **gates)[0]).max()

    assert read(1) <= 1 + 1e-9
    if momentum is None:
        np.testing.assert_allclose(read(4), 7.0 ** (200 // inner_batch), rtol=1e-6)


def test_reading_the_start_sees_no_token_of_its_own_inner_batch(x64):
    memory, given, _ = arrays("momentum")
    out, _ = memory_scan(memory, **given, inner_batch=B, read="start")
    for start in (0, 12):
        _, state = memory_scan(memory, **tokens(given, slice(0, start)), inner_batch=B) if start else (None, None)
        weight = memory.weight if state is None else state.start[0]
        where = slice(start, start + B)
        assert_close(out[where], jnp.einsum("tnk,nkv->tnv", given["query"][where], weight))


@pytest.mark.parametrize("name", ["titans", "moneta"])
def test_outputs_do_not_depend_on_later_tokens(name, x64):
    memory, given, options = arrays(name)
    run = jax.jit(partial(memory_scan, memory, **options, inner_batch=B))
    changed = jax.tree.map(lambda x: x.at[15:].multiply(0.5), given)
    out, other = run(**given)[0], run(**changed)[0]
    assert_close(out[:15], other[:15], 1e-14)
    assert (jnp.abs(out[15:] - other[15:]).max(-1) > 1e-6).all()


def test_outer_gradients_are_differences_in_both_modes(x64):
    """Also those of the size of an error that is scaled down, and of the slow weights."""
    memory, given, _ = arrays("ttt")
    given = tokens(given | {"log_decay": -given["rate"], "log_momentum": -2 * given["rate"]}, slice(0, 5))

    def run(memory, delta, given):
        return memory_scan(memory, **given, loss=Huber(delta), inner_batch=2)[0]

    check_grads(jax.jit(run), (memory, jnp.asarray(0.7), given), 1, ["fwd", "rev"])


def test_packed_documents_are_separate_runs(x64):
    """Documents of whole inner batches; the state of one goes on, or ends, wherever the next call starts."""
    memory, given, _ = arrays("momentum")
    run = jax.jit(partial(memory_scan, memory, inner_batch=B))
    ids = np.repeat([2, 3, 7], [6, 12, 4])
    out, last = memory_scan(memory, **given, inner_batch=B, segment_ids=jnp.asarray(ids))
    assert last.segment == 7
    for segment in np.unique(ids):
        (where,) = np.nonzero(ids == segment)
        expected, state = run(**tokens(given, where))
        assert_close(out[where], expected)
    assert_close(last[:4], state[:4])

    _, state = run(**tokens(given, slice(0, 8)), segment_ids=jnp.full(8, 2))
    for piece in (slice(8, 9), slice(8, 22)):
        new, _ = run(**tokens(given, piece), segment_ids=jnp.full(piece.stop - 8, 3), state=state)
        assert_close(new, run(**tokens(given, piece))[0])


def test_a_row_whose_segments_are_out_of_place_is_not_a_number(x64):
    memory, given, _ = arrays("titans")
    given = jax.tree.map(lambda x: jnp.stack([x, x]), given)
    ids = jnp.asarray([np.repeat([0, 1], [6, 16]), np.repeat([0, 1], [7, 15])])
    out, state = jax.jit(lambda ids: memory_scan(memory, **given, inner_batch=B, segment_ids=ids))(ids)
    for x in (out, *jax.tree.leaves(state[:3])):
        assert np.isfinite(x[0]).all()
        assert np.isnan(x[1]).all()


def error_and_zero():
    return jnp.asarray(np.concatenate([normal(N, 3, V), np.zeros((N, 1, V))], 1))


# loss: ℓ of e
LOSSES = {
    SquaredError(): squared,
    SquaredError(0.5): lambda e: squared(e) / 2,
    Huber(0.5): partial(huber, 0.5),
    Huber(0.5, by_channel=True): lambda e: jnp.where(jnp.abs(e) < 0.5, e**2 / 2, jnp.abs(e) / 2 - 0.125).sum(),
    LpError(3.0): lambda e: (jnp.abs(e) ** 3).sum(),
    LpError(1.0): lambda e: jnp.abs(e).sum(),
    LpError(2.5): lambda e: (jnp.abs(e) ** 2.5).sum(),
}


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_gradients_of_losses_are_those_of_their_formulas(loss, x64):
    error, target = error_and_zero()[:, :3], jnp.asarray(normal(N, 3, V))
    expected = jax.vmap(jax.vmap(jax.grad(LOSSES[loss])))(error)
    assert_close(loss.gradient(target + error, target), expected)


def test_losses_agree_where_they_should(x64):
    error = error_and_zero()
    zero = jnp.zeros_like(error)
    assert_close(LpError(2.0).gradient(error, zero), SquaredError().gradient(error, zero))
    assert_close(Huber(np.inf).gradient(error, zero), SquaredError(0.5).gradient(error, zero))
    assert_close(LpError(3.0, smooth=1e4).gradient(error, zero), LpError(3.0).gradient(error, zero), 1e-4)
    assert jnp.linalg.norm(Huber(0.1).gradient(error, zero), axis=-1).max() <= 0.1 * (1 + 1e-12)
    heads = Huber(jnp.asarray([0.1, 0.2])).gradient(error, zero)
    assert_close(heads[1], Huber(0.2).gradient(error, zero)[1])


@pytest.mark.parametrize("loss", [*LOSSES, LpError(1.5), LpError(1.5, smooth=10.0), Huber(np.inf)], ids=repr)
def test_gradients_of_losses_have_finite_slopes_where_the_error_is_zero(loss):
    error = error_and_zero().astype(jnp.float32)
    slope = jax.grad(lambda e: jnp.sin(loss.gradient(e, jnp.zeros_like(e))).sum())(error)
    assert np.isfinite(slope).all()
    assert (slope[:, -1] != 0).any() == (loss in (SquaredError(), SquaredError(0.5)) or loss_is_smooth(loss))


def loss_is_smooth(loss):
    return isinstance(loss, Huber) or getattr(loss, "smooth", None) is not None


LINKS = (SoftmaxLink(), SoftmaxLink(-1, 3.0), LqMirror(4.0), LqMirror(2.5), LqScale(3.5), SoftThreshold(0.3))


@pytest.mark.parametrize("link", [*LINKS, SigmoidLink(), Identity()], ids=repr)
def test_gradients_of_links_are_differences(link, x64):
    dual = jnp.asarray(normal(N, K, V))
    check_grads(jax.jit(link), (dual,), 1, ["fwd", "rev"])
    assert np.isfinite(jax.grad(lambda a: jnp.sin(link(a)).sum())(jnp.zeros((N, K, V)))).all()
    assert_close(jax.vmap(link, 1, 1)(jnp.stack([dual, 2 * dual], 1)), jnp.stack([link(dual), link(2 * dual)], 1))


def test_degrees_and_formulas_of_links(x64):
    dual = jnp.asarray(normal(N, K, V))
    for q in (2.0, 3.0, 4.0):
        assert_close(LqMirror(q)(3 * dual), 3 * LqMirror(q)(dual))
        assert_close(LqScale(q)(3 * dual), 3 ** (3 - q) * LqScale(q)(dual))
        norm = (jnp.abs(dual) ** q).sum((-2, -1), keepdims=True) ** (1 / q)
        assert_close(LqScale(q)(dual), dual / norm ** (q - 2))
    assert_close((LqMirror(2.0)(dual), LqScale(2.0)(dual)), (dual, dual))
    # The mirror map of ½‖W‖²_p: it is the gradient of ½‖A‖²_q.
    conjugate = jax.grad(lambda a: (jnp.abs(a) ** 4).sum() ** 0.5 / 2)
    assert_close(LqMirror(4.0)(dual), jax.vmap(conjugate)(dual))
    assert_close(SoftThreshold(0.3)(jnp.asarray([[[-1.0, 0.2, 0.5]]])), np.array([[[-0.7, 0, 0.2]]]))
    huge = LqMirror(4.0)(jnp.full((1, K, V), 1e30, jnp.float32))
    assert np.isfinite(huge).all()


def test_memora_is_exponentiated_gradient_within_slices_of_a_fixed_sum(x64):
    memory, given, _ = arrays("memora")
    given.pop("log_decay")
    out, _ = memory_scan(memory, **given, link=SoftmaxLink(scale=2.0), inner_batch=1)
    weight = 2 * jax.nn.softmax(memory.weight, -2)
    for t in range(T):
        error = jnp.einsum("nkv,nk->nv", weight, given["key"][t]) - given["value"][t]
        slope = 2 * jnp.einsum("nk,nv->nkv", given["key"][t], error)
        weight = weight * jnp.exp(-given["rate"][t][:, None, None] * slope)
        weight = 2 * weight / weight.sum(-2, keepdims=True)
        assert (weight > 0).all()
        assert_close(out[t], jnp.einsum("nkv,nk->nv", weight, given["query"][t]))


def test_closed_gates_are_finite_in_float32():
    """Decays of −1000, −inf and 0 in one inner batch, against float64."""
    memory, given, options = arrays("momentum", jnp.float32)

    @partial(jax.grad, argnums=(0, 1), has_aux=True)
    def loss(memory, given):
        out, _ = memory_scan(memory, **given, **options, inner_batch=B)
        return jnp.sin(out).sum(), out

    slope, out = jax.jit(loss)(memory, given)
    with jax.enable_x64(True):
        expected_slope, expected = jax.jit(loss)(*arrays("momentum")[:2])
    # A few dozen steps, each on what the one before left, of sums of a few products.
    assert_close((slope, out), (expected_slope, expected), 1e3 * np.finfo(np.float32).eps)


def test_bfloat16_comes_back_and_the_memory_is_float32():
    memory, given, _ = arrays("titans", jnp.bfloat16)
    run = jax.jit(partial(memory_scan, inner_batch=B))
    out, state = run(memory, **given)
    assert out.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(state[:3])} == {jnp.dtype(jnp.float32)}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (memory, given))
    assert_close(out, run(wide[0], **wide[1])[0], 2**-8)


def test_a_new_memory_and_a_new_loss_are_a_few_lines(x64):
    @part
    class Gated(Memory):
        up: object
        gate: object
        down: object

        @property
        def fast_weights(self):
            return self.up, self.gate, self.down

        def __call__(self, linear, x):
            return linear(2, linear(0, x) * jax.nn.sigmoid(linear(1, x)))

    @part
    class Sign(InnerLoss):
        def gradient(self, prediction, target):
            return jnp.sign(prediction - target)

    memory = Gated(*(jnp.asarray(x) for x in (*layers(K, 5), *layers(K, 5), *layers(5, V))))
    _, given, _ = arrays("titans")
    run = jax.jit(memory_scan, static_argnames=("inner_batch", "read"))
    dual = run(memory, **given, loss=Sign(), inner_batch=B)
    assert_close(dual, run(memory, **given, loss=Sign(), inner_batch=B, read="materialize"))


def test_a_decoding_step_compiles_once():
    memory, given, _ = arrays("titans", jnp.float32)
    run = jax.jit(partial(memory_scan, memory, inner_batch=2))
    _, state = run(**tokens(given, slice(0, 1)))
    before = run._cache_size()
    for t in range(1, 4):
        _, state = run(**tokens(given, slice(t, t + 1)), state=state)
    assert run._cache_size() == before + 1


ONES = jnp.ones((2, 5, N, K))
WEIGHT = jnp.zeros((2, N, K, K))
STATE = MemoryState((WEIGHT,), (WEIGHT,), None, jnp.zeros(2, jnp.int32), jnp.zeros(2, jnp.int32))
SQUARE = MatrixMemory(jnp.zeros((N, K, K)))


@part
class Twice(Memory):
    weight: object

    @property
    def fast_weights(self):
        return (self.weight,)

    def __call__(self, linear, x):
        return linear(0, linear(0, x))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"memory": jnp.ones((N, K, K))}, TypeError, "memory must be a Memory, got"),
        ({"loss": Identity()}, TypeError, "loss must be a InnerLoss, got Identity"),
        ({"link": SquaredError()}, TypeError, "link must be a Link, got SquaredError"),
        ({"memory": MatrixMemory(jnp.ones((K, K)))}, TypeError, "MatrixMemory.weight must be Float"),
        (
            {"memory": MatrixMemory(jnp.ones((3, K, K)))},
            ValueError,
            r"fast weight 0 has shape \(3, 3, 3\): need \[2, 3",
        ),
        ({"memory": MatrixMemory(jnp.ones((N, K, 5)))}, ValueError, "MatrixMemory returns 5 channels but value has 3"),
        ({"memory": Twice(jnp.ones((N, K, K)))}, ValueError, r"fast weights \[0, 0\]: need each of 1 exactly once"),
        ({"key": ONES[:, :4]}, ValueError, r"key has batch, length and heads \(2, 4, 2\) but query has \(2, 5, 2\)"),
        ({"key": ONES[..., :2]}, ValueError, "query has 3 channels but key has 2"),
        ({"value": jnp.ones((2, 5, N, K), int)}, TypeError, "value has dtype int32: need floating point"),
        ({"rate": -0.1}, ValueError, r"rate holds -0\.1: need numbers at least 0"),
        ({"rate": None}, TypeError, "rate must be a number or a floating-point array, got None"),
        ({"rate": jnp.ones((2, 4, N))}, ValueError, r"rate has shape \(2, 4, 2\): need one that broadcasts to"),
        ({"log_decay": 0.5}, ValueError, r"log_decay holds 0\.5: need numbers at most 0"),
        ({"log_momentum": jnp.ones((2, 5, N))}, ValueError, r"log_momentum holds 1\.0: need numbers at most 0"),
        ({"row_rate": -1.0}, ValueError, r"row_rate holds -1\.0"),
        ({"inner_batch": 0}, ValueError, "inner_batch must be at least 1, got 0"),
        ({"inner_batch": 2.0}, TypeError, "inner_batch must be an int, got 2.0"),
        ({"read": "exact"}, ValueError, "read is 'exact': need one of auto, dual, materialize, start"),
        ({"read": "dual", "link": SigmoidLink()}, ValueError, "read='dual' needs the link Identity, got SigmoidLink"),
        ({"segment_ids": jnp.array([0, 1, 0, 1, 1])}, ValueError, "segment_ids decreases along the tokens"),
        ({"segment_ids": jnp.array([0, 0, 0, 1, 1])}, ValueError, "starts inside an inner batch of 2 tokens"),
        ({"segment_ids": jnp.zeros(4, int)}, ValueError, r"segment_ids has shape \(4,\): need \[..., 5\]"),
        ({"segment_ids": jnp.zeros(5)}, TypeError, "segment_ids must be integers, got float32"),
        ({"lengths": jnp.array([6, 0])}, ValueError, r"lengths must be from 0 to 5, got \[6, 0\]"),
        ({"lengths": jnp.zeros(5, int)}, ValueError, r"lengths must be integers of shape \(2,\), got int32\(5,\)"),
        (
            {"lengths": jnp.array(3), "segment_ids": jnp.zeros(5, int)},
            ValueError,
            "lengths and segment_ids are both given",
        ),
        ({"state": WEIGHT}, TypeError, "state must be a MemoryState"),
        ({"state": STATE, "log_momentum": -1.0}, ValueError, "state holds no momentum"),
        ({"state": STATE._replace(dual=(WEIGHT[0],))}, ValueError, r"dual of shapes \[\(2, 3, 3\)\]: need"),
        ({"state": STATE._replace(seen=jnp.int32(0))}, ValueError, r"seen of shape \(\): need \(2,\)"),
        ({"state": jax.tree.map(lambda x: x.astype(jnp.bfloat16), STATE)}, TypeError, "state has dtype bfloat16"),
        ({"state": STATE._replace(seen=jnp.array([1, 7]))}, ValueError, "seen holds 7: need numbers below 2: it comes"),
        ({"state": STATE._replace(seen=jnp.zeros(2))}, TypeError, "state has seen .*: need an array of integers"),
    ],
)
def test_calls_that_mean_nothing_are_refused(change, error, message):
    given = {"memory": SQUARE, "query": ONES, "key": ONES, "value": ONES, "rate": 0.1, "inner_batch": 2}
    with pytest.raises(error, match=message):
        memory_scan(**(given | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": ONES.astype(int)}, TypeError, "query has dtype int32: need floating point"),
        ({"query": jnp.ones((2, 5, 3, K))}, ValueError, r"fast weight 0 has shape \(2, 3, 3\): need \[3, 3, out\]"),
        ({"query": ONES[..., :2]}, ValueError, r"fast weight 0 has shape \(2, 3, 3\): need \[2, 2, out\]"),
        ({"link": 3}, TypeError, "link must be a Link, got 3"),
        ({"state": 1}, TypeError, "state must be a MemoryState, got int"),
    ],
)
def test_reads_that_mean_nothing_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        memory_read(**({"memory": SQUARE, "query": ONES} | change))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MLPMemory([ONES]), TypeError, "weights must be a tuple of arrays, got list"),
        (lambda: MLPMemory((ONES[0],), activation="relu"), ValueError, "activation must be 'gelu' or 'silu'"),
        (lambda: MLPMemory((ONES[0],), gain=ONES[0, 0]), ValueError, "need normalize=True"),
        (lambda: SquaredError(0.0), ValueError, "SquaredError: scale must be positive"),
        (lambda: Huber(-1.0), ValueError, "Huber: delta must be positive"),
        (lambda: LpError(0.5), ValueError, "LpError: p must be at least 1, got 0.5"),
        (lambda: LqMirror(1.5), ValueError, "LqMirror: q must be at least 2"),
        (lambda: SoftmaxLink(0), ValueError, r"SoftmaxLink: axis must be -2 \(inputs\) or -1"),
        (lambda: SoftThreshold(-0.1), ValueError, "SoftThreshold: gamma must be positive"),
    ],
)
def test_parts_that_mean_nothing_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
