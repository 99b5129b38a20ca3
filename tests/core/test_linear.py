"""Linear attention: every form is the recurrence, written here once more in NumPy, and the laws that follow from it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, example, settings
from hypothesis import given as drawn
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jaxattn import Causal, Dot, attend, linear_attention
from jaxattn.core.attend import Relu
from jaxattn.core.linear import (
    Delta,
    Erase,
    LinearState,
    append_one,
    combine,
    divide,
    linear_step,
    mixing_matrix,
    state_map,
)
from jaxattn.core.linear.decay import MILD, ChannelDecay, MildDecay, decay_matrix, ends, unit_lower_inverse

T, N, K, V = 37, 2, 4, 3  # two spans of chunks of 4, the last incomplete
FORMS = ("step", "parallel", "chunk", "associative")


def by_form(*often):
    """A law in every form. Since they agree, which is a law of its own, some among the slow tests."""
    slow = {form: () if form in often else pytest.mark.slow for form in FORMS}
    return pytest.mark.parametrize("form", [pytest.param(form, marks=slow[form]) for form in FORMS])


SEGMENTS = np.repeat([0, 2, 3], [7, 16, 14])
rng = np.random.default_rng(0)


def normal(*shape, scale=1.0):
    return rng.normal(size=shape) * scale


def decays(*shape):
    """From hardly any to exp(−1000), and none left at all in some places."""
    log_decay = -np.exp(2 * normal(*shape))
    log_decay[5], log_decay[9], log_decay[20] = -np.inf, -1e3, 0
    return log_decay


def mechanism(queries=N, keys=N, values=N, **options):
    key, value = normal(T, keys, K, scale=0.6), normal(T, values, V)
    return {"query": normal(T, queries, K), "key": key, "value": value} | options


def erasure(heads=N):
    return Erase(normal(T, heads, K, scale=0.6), normal(T, heads, K, scale=0.6))


def strength(heads=N):
    return Delta(rng.uniform(0, 1.2, size=(T, heads)))


CASES = {
    "nothing": mechanism(),
    "per head": mechanism(log_decay=np.log([0.9, 0.5])),
    "per token": mechanism(log_decay=decays(T, N)),
    "per channel": mechanism(log_decay=decays(T, N, K)),
    "before the write": mechanism(log_decay=decays(T, N, K), read="pre", bonus=normal(N, K)),
    "before the write, per token": mechanism(log_decay=decays(T, N), read="pre"),
    "delta": mechanism(erase=strength()),
    "delta per token": mechanism(log_decay=decays(T, N), erase=strength(), bonus=normal(N, K)),
    "delta per channel": mechanism(log_decay=decays(T, N, K), erase=strength()),
    "erase": mechanism(erase=erasure()),
    "erase per token": mechanism(log_decay=decays(T, N), erase=erasure(), read="pre"),
    "erase per channel": mechanism(log_decay=decays(T, N, K), erase=erasure(), bonus=normal(N, K)),
    "grouped queries": mechanism(4, log_decay=decays(T, N), erase=strength()),
    "shared keys": mechanism(1, 1, 4, log_decay=decays(T, 4), bonus=normal(4, K)),
    "fewer queries": mechanism(2, 2, 4, bonus=normal(4, K)),
    "grouped values": mechanism(2, 2, 4, log_decay=decays(T, 2, K), erase=strength(4)),
}


HARD = ("before the write", "delta per channel", "erase per token")


def heads_of(x, heads, axis=-2):
    return np.repeat(np.asarray(x), heads // np.shape(x)[axis], axis)


def recurrence(query, key, value, log_decay=None, erase=None, bonus=None, read="post", state=None, segment_ids=None):
    """Outputs [T, N, V] and last states [M, K, V], from the definition."""
    given = [key.shape[-2], value.shape[-2]]
    given += [np.shape(log_decay)[1 if np.ndim(log_decay) > 1 else 0]] if log_decay is not None else []
    given += [erase.beta.shape[1]] if isinstance(erase, Delta) else []
    states = max(given)
    heads = max(states, query.shape[-2])
    log_decay = np.zeros((T, states, K)) if log_decay is None else np.asarray(log_decay)
    log_decay = log_decay if log_decay.ndim > 1 else np.broadcast_to(log_decay, (len(key), states))
    log_decay = log_decay[..., None] if log_decay.ndim == 2 else log_decay
    log_decay = np.broadcast_to(heads_of(log_decay, states), (len(key), states, K))
    memory = np.zeros((states, K, value.shape[-1])) if state is None else np.array(state)
    own_key, query = heads_of(key, heads), heads_of(query, heads)
    key, value = heads_of(key, states), heads_of(value, states)
    out = np.zeros((len(key), heads, value.shape[-1]))
    for t in range(len(key)):
        if segment_ids is not None and t and segment_ids[t] != segment_ids[t - 1]:
            memory = np.zeros_like(memory)
        before = memory.copy()
        for m in range(states):
            memory[m] = np.exp(log_decay[t, m])[:, None] * memory[m]
            if isinstance(erase, Delta):
                beta = heads_of(erase.beta, states, -1)[t, m]
                memory[m] += beta * np.outer(key[t, m], value[t, m] - memory[m].T @ key[t, m])
            else:
                memory[m] += np.outer(key[t, m], value[t, m])
            if isinstance(erase, Erase):
                memory[m] += np.outer(erase.write[t, m], before[m].T @ erase.read[t, m])
        for n in range(heads):
            m = n * states // heads
            out[t, n] = (before if read == "pre" else memory)[m].T @ query[t, n]
            if bonus is not None:
                out[t, n] += (bonus[n] * own_key[t, n]) @ query[t, n] * value[t, m]
    return out, memory


def arrays(case, dtype=jnp.float64):
    """(what is differentiated, the rest) of a case, as JAX arrays."""
    given = {name: x for name, x in case.items() if name != "read"}
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), given), {"read": case.get("read", "post")}


def assert_close(actual, expected, tolerance=1e-9):
    """Within `tolerance` of the largest number, leaf by leaf."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(abs(b).max(), 1e-30))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", CASES)
def test_every_form_is_the_recurrence_with_its_gradients(name, x64):
    """A state comes in, three segments follow one another, and a loss looks at outputs and last state."""
    given, options = arrays(CASES[name])
    states = jax.eval_shape(lambda: linear_attention(**given, **options))[1].memory.shape
    start = normal(*states)
    expected = recurrence(**CASES[name], state=start, segment_ids=SEGMENTS)

    @partial(jax.jit, static_argnums=2)
    def run(given, memory, form):
        def loss(given, memory):
            state = LinearState(memory, jnp.int32(SEGMENTS[0]))
            ids = jnp.asarray(SEGMENTS)
            out, last = linear_attention(**given, **options, state=state, segment_ids=ids, form=form, chunk=4)
            return jnp.sin(out).sum() + jnp.sin(last.memory).sum(), (out, last.memory, last.segment)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(given, memory)

    slopes = {}
    for form in FORMS if name in HARD else ("step", "chunk"):
        slopes[form], (out, memory, segment) = run(given, jnp.asarray(start), form)
        assert_close((out, memory), expected)
        assert segment == SEGMENTS[-1]
        assert_close(slopes[form], slopes["step"])


def tokens(given, where):
    """Some tokens of a call; what is not per token stays."""
    return jax.tree.map(lambda x: x[where] if x.shape[:1] == (T,) else x, given)


@pytest.mark.parametrize("name", HARD)
def test_gradients_are_differences_in_both_modes(name, x64):
    given, options = arrays(CASES[name])
    given = tokens(given | {"log_decay": jnp.clip(given["log_decay"], -3, -0.1)}, slice(0, 5))
    run = jax.jit(lambda given: linear_attention(**given, **options, form="chunk", chunk=2)[0])
    check_grads(run, (given,), 2 if name == "delta per channel" else 1, ["fwd", "rev"])


@pytest.mark.parametrize("name", HARD)
def test_a_sequence_may_be_split_anywhere(name, x64):
    given, options = arrays(CASES[name])
    run = jax.jit(partial(linear_attention, **options, chunk=4, form="chunk"))
    whole = run(**given)
    for cut in (1, 19):
        before, state = run(**tokens(given, slice(None, cut)))
        after, last = run(**tokens(given, slice(cut, None)), state=state)
        assert_close((jnp.concatenate([before, after]), last.memory), (whole[0], whole[1].memory))


@pytest.mark.parametrize("name", HARD)
def test_packed_documents_are_separate_runs(name, x64):
    given, options = arrays(CASES[name])
    run = jax.jit(partial(linear_attention, **options, chunk=4))
    out, _ = run(**given, segment_ids=jnp.asarray(SEGMENTS))
    for segment in np.unique(SEGMENTS):
        (where,) = np.nonzero(segment == SEGMENTS)
        assert_close(out[where], run(**tokens(given, where))[0])


@pytest.mark.parametrize("name", HARD)
def test_outputs_do_not_depend_on_later_tokens(name, x64):
    given, options = arrays(CASES[name])
    run = jax.jit(partial(linear_attention, **options, chunk=4))
    changed = jax.tree.map(lambda x: x.at[18:].multiply(0.5) if x.shape[:1] == (T,) else x, given)
    out, other = run(**given)[0], run(**changed)[0]
    np.testing.assert_array_equal(out[:18], other[:18])
    assert (out[18:] != other[18:]).any()


@pytest.mark.parametrize("name", ["per token", "per channel", "delta per token", "erase per channel"])
def test_closed_gates_are_finite_in_float32(name):
    """Decays of −1000, −inf and 0 in one chunk: values of the float64 recurrence, gradients of the step form."""
    given, options = arrays(CASES[name], jnp.float32)

    @partial(jax.jit, static_argnums=1)
    @partial(jax.grad, has_aux=True)
    def loss(given, form):
        out, state = linear_attention(**given, **options, form=form, chunk=16)
        return jnp.sin(out).sum(), (out, state.memory)

    slope, found = loss(given, "chunk")
    exact = recurrence(**CASES[name])
    assert_close(found, exact, 1e3 * np.finfo(np.float32).eps)  # sums of 16 products, and of three triangular solves
    slope_of_steps, _ = loss(given, "step")
    assert_close(slope, slope_of_steps, 1e3 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("form", FORMS)
def test_one_argument_of_float64_makes_the_state_float64(form, x64):
    given, options = arrays(CASES["before the write"], jnp.float32)
    wide = given | {"bonus": jnp.asarray(given["bonus"], jnp.float64)}
    out, state = linear_attention(**wide, **options, form=form, chunk=4)
    assert (out.dtype, state.memory.dtype) == (jnp.float32, jnp.float64)
    again, _ = linear_attention(**wide, **options, form=form, chunk=4, state=state)
    assert again.dtype == jnp.float32


def test_batches_are_their_entries_and_vmap_is_a_batch():
    given, options = arrays(CASES["delta per channel"], jnp.float32)
    other = jax.tree.map(lambda x: jnp.roll(x, 5, 0), given)
    batch = jax.tree.map(lambda *x: jnp.stack(x), given, other)
    run = jax.jit(partial(linear_attention, **options, chunk=4))
    out, state = run(**batch)
    assert_close(out, jax.vmap(lambda given: run(**given)[0])(batch), 1e-5)
    for index, each in enumerate((given, other)):
        assert_close((out[index], state.memory[index]), (run(**each)[0], run(**each)[1].memory), 1e-5)


@by_form("chunk")
@pytest.mark.parametrize("name", ["nothing", "per token", "per channel", "delta", "erase per channel"])
def test_shard_map_over_the_batch(name, form):
    """Each device has one batch entry; nothing is said of how the memory that both start from varies."""
    given, options = arrays({k: x for k, x in CASES[name].items() if k != "bonus"}, jnp.float32)
    ids = jnp.asarray(SEGMENTS)
    batch = jax.tree.map(lambda x: jnp.stack([x, jnp.roll(x, 5, 0)]), given)

    def total(given, where):
        out, state = linear_attention(**given, **options, segment_ids=ids, form=form, chunk=4)
        return jax.lax.psum(jnp.sin(out).sum() + jnp.sin(state.memory).sum(), where)

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    slopes = jax.grad(partial(total, where="data"))
    sharded = jax.shard_map(slopes, mesh=mesh, in_specs=(P("data"),), out_specs=P("data"))
    assert_close(jax.jit(sharded)(batch), jax.jit(jax.grad(partial(total, where=())))(batch), 1e-4)


@pytest.mark.parametrize("name", ["nothing", "per channel", "erase per token"])
def test_maps_of_batches_are_those_of_their_entries(name):
    given, _ = arrays({k: x for k, x in CASES[name].items() if k not in ("query", "bonus", "read")}, jnp.float32)
    batch = jax.tree.map(lambda x: jnp.stack([x, jnp.roll(x, 5, 0), 0.9 * x])[:, None], given)
    whole = jax.jit(partial(state_map, chunk=4))(**batch)
    each = jax.vmap(jax.vmap(lambda given: state_map(**given, chunk=4)))(batch)
    assert jax.tree.map(jnp.shape, whole) == jax.tree.map(jnp.shape, each)
    assert_close(whole, each, 1e-5)


@pytest.mark.parametrize(("length", "strength"), [(32, 2.0), (64, 1.0), (16, 4.0)])
def test_gradients_are_right_where_a_chunk_forgets_just_as_much_as_is_mild(length, strength, x64):
    """A total log decay of exactly −64."""
    key, value, query = (jnp.asarray(normal(length, 1, size)) for size in (K, V, K))

    def slope(form):
        def loss(log_decay):
            return jnp.sin(linear_attention(query, key, value, log_decay=log_decay, form=form, chunk=length)[0]).sum()

        return jax.jit(jax.grad(loss))(jnp.full((length, 1, K), -strength))

    assert length * strength == MILD
    assert_close(slope("chunk"), slope("step"))


def test_one_token_at_a_time_is_the_recurrence(x64):
    for name in ("per head", "before the write", "delta per token", "erase per channel"):
        given, options = arrays(CASES[name])
        expected, _ = jax.jit(partial(linear_attention, **options))(**given)
        state, step = None, jax.jit(partial(linear_step, **options))
        for t in range(5):
            out, state = step(**tokens(given, t), state=state)
            assert_close(out, expected[t])


def test_reading_everything_is_the_last_state_for_all(x64):
    given, _ = arrays(CASES["per channel"])
    out, state = jax.jit(partial(linear_attention, read="all", chunk=4))(**given)
    assert_close(out, jnp.einsum("tnk,nkv->tnv", given["query"], state.memory))


@pytest.mark.parametrize("name", ["before the write", "delta per channel", "erase per token", "grouped queries"])
def test_the_mixing_matrix_is_what_happens_to_the_values(name, x64):
    given, options = arrays(CASES[name])
    options["segment_ids"] = jnp.asarray(SEGMENTS)
    out, _ = jax.jit(partial(linear_attention, **options))(**given)
    value = heads_of(given.pop("value"), out.shape[-2])
    matrix = jax.jit(partial(mixing_matrix, **options))(**given)
    assert_close(jnp.einsum("nts,snv->tnv", matrix, value), out)
    assert not jnp.triu(matrix, 1).any()


def test_the_maps_of_shards_combine_to_the_whole(x64):
    """Combining is associative, and folding the maps of earlier shards gives the state a shard starts from."""
    for name in ("per channel", "erase per token"):
        given, _ = arrays({k: x for k, x in CASES[name].items() if k not in ("bonus", "read")})
        _, whole = jax.jit(linear_attention)(**given)
        given.pop("query")
        of_tokens = jax.jit(partial(state_map, chunk=4))
        a, b, c = (of_tokens(**tokens(given, where)) for where in (slice(0, 12), slice(12, 24), slice(24, None)))
        left, right = combine(combine(a, b), c), combine(a, combine(b, c))
        assert_close(left, right)
        assert_close(left(jnp.zeros_like(whole.memory)), whole.memory)
        assert_close(left, of_tokens(**given))
        assert left.is_diagonal == ("erase" not in given)


def test_the_delta_rule_is_a_correction_of_rank_one(x64):
    given, _ = arrays(CASES["delta per channel"])
    beta, key = given["erase"].beta[..., None], given["key"]
    erase = Erase(jnp.exp(given["log_decay"]) * key, -beta * key)
    run = jax.jit(linear_attention)
    expected = run(**given)
    assert_close(run(**(given | {"erase": erase, "key": beta * key})), expected)


def test_a_full_correction_returns_what_was_last_written(x64):
    given, _ = arrays(CASES["delta"])
    key = given["key"] / jnp.linalg.norm(given["key"], axis=-1, keepdims=True)
    out, _ = linear_attention(key, key, given["value"], erase=Delta(jnp.ones((T, N))))
    assert_close(out, given["value"])


def test_normalised_reads_are_attention_with_linear_weights():
    query, key = (jnp.asarray(rng.uniform(0.1, 1, size=(T, N, K)), jnp.float32) for _ in range(2))
    value = jnp.asarray(normal(T, N, V), jnp.float32)
    out = divide(linear_attention(query, key, append_one(value))[0])
    expected = attend(query, key, value, score=Dot(1.0), mask=Causal(), normalize=Relu(normalized=True))
    assert_close(out, expected, 100 * np.finfo(np.float32).eps)
    nothing = linear_attention(jnp.zeros_like(query), key, append_one(value))[0]
    np.testing.assert_array_equal(divide(nothing), jnp.zeros_like(value))


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_the_triangular_inverse_is_exact_where_keys_repeat(beta):
    """One key all along: the inverse of I + β stril(1) has entries of size β, its powers grow without bound."""
    lower = beta * jnp.tril(jnp.ones((64, 64)), -1)
    product = np.asarray(unit_lower_inverse(lower), np.float64) @ (np.eye(64) + np.asarray(lower, np.float64))
    np.testing.assert_allclose(product, np.eye(64), rtol=0, atol=64 * np.finfo(np.float32).eps * beta)


def weights(log_decay):
    """exp(g_{j+1} + ... + g_i) for j <= i, else 0: [C, C, K]."""
    size = len(log_decay)
    weights = np.zeros((size, size, log_decay.shape[-1]))
    for i in range(size):
        for j in range(i + 1):
            weights[i, j] = np.exp(log_decay[j + 1 : i + 1].sum(0))
    return weights


MILDLY = -rng.uniform(0, MILD / 32, size=(32, K))  # never more than a chunk may forget


@pytest.mark.parametrize(("kind", "log_decay"), [(ChannelDecay, decays(32, K)), (MildDecay, MILDLY)])
def test_decays_of_channels_are_the_products_of_their_factors(kind, log_decay, x64):
    factor = weights(log_decay)
    rows, columns, values, memory = normal(32, K), normal(32, K), normal(32, V), normal(K, V)
    decay = kind.of(jnp.asarray(log_decay)[:, None])
    left, right = decay.rows(jnp.asarray(rows)[:, None]), decay.columns(jnp.asarray(columns)[:, None])
    earlier = decay.rows(jnp.asarray(rows)[:, None], before=True)
    assert_close(decay.scores(left, right)[0], np.einsum("ik,ijk,jk->ij", rows, factor, columns), 1e-13)
    shifted = np.concatenate([np.zeros((1, 32, K)), factor[:-1]])
    assert_close(decay.scores(earlier, right, True)[0], np.einsum("ik,ijk,jk->ij", rows, shifted, columns), 1e-13)
    through = np.exp(np.cumsum(log_decay, 0))
    assert_close(left.state[0] @ memory, (rows * through) @ memory, 1e-13)
    until = np.concatenate([np.ones((1, K)), through[:-1]])
    assert_close(earlier.state[0] @ memory, (rows * until) @ memory, 1e-13)
    left_behind = through[-1][:, None] * memory + (columns * factor[-1]).T @ values
    assert_close(decay.leave(memory, right.state.swapaxes(-1, -2) @ values)[0], left_behind, 1e-13)


def test_weights_of_a_mild_chunk_are_exact_to_the_rounding_of_its_exponents():
    """Two sums of at most 64, two exponentials and a product."""
    log_decay = np.full((32, 1), -MILD / 32)
    decay = MildDecay.of(jnp.asarray(log_decay, jnp.float32)[:, None])
    ones = jnp.ones((32, 1, 1))
    np.testing.assert_allclose(
        decay.scores(decay.rows(ones), decay.columns(ones))[0],
        weights(log_decay)[..., 0],
        rtol=(2 * MILD + 4) * np.finfo(np.float32).eps,
    )


def test_decays_of_heads_are_products_that_never_overflow(x64):
    log_decay = decays(32, 1)
    factor = weights(log_decay)[..., 0]
    assert_close(decay_matrix(jnp.asarray(log_decay)), factor, 1e-13)
    through, after = ends(jnp.asarray(log_decay))
    assert_close(through, np.exp(np.cumsum(log_decay, 0)), 1e-13)
    assert_close(after, factor[-1][:, None], 1e-13)


@pytest.mark.parametrize("name", ["per channel", "erase per channel"])
def test_chunks_that_forget_much_are_cut_into_smaller_ones(name, x64):
    """Chunks of 16, of which some forget little, some only in their smaller chunks and some nowhere. `vmap` works out
    both ways for all of them."""
    given, options = arrays(CASES[name])
    given["log_decay"] = given["log_decay"].at[24:32].multiply(0.1)

    @partial(jax.jit, static_argnums=1)
    @partial(jax.value_and_grad, has_aux=True)
    def run(given, form):
        out, state = jax.vmap(lambda given: linear_attention(**given, **options, form=form, chunk=16))(given)
        return jnp.sin(out).sum(), (out, state.memory)

    pair = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), given)
    assert_close(run(pair, "chunk"), run(pair, "step"))


def test_the_result_has_the_dtype_of_the_values_and_the_memory_is_float32():
    given, options = arrays(CASES["delta per token"], jnp.bfloat16)
    run = jax.jit(partial(linear_attention, **options))
    out, state = run(**given)
    assert (out.dtype, state.memory.dtype) == (jnp.bfloat16, jnp.float32)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), given)
    assert_close(out, run(**wide)[0], 2**-8)


def test_the_form_compiles_once_per_shape():
    given, options = arrays(CASES["per token"], jnp.float32)
    run = jax.jit(lambda given, state: linear_attention(**given, **options, state=state))
    _, state = run(given, LinearState(jnp.zeros((N, K, V)), jnp.int32(0)))
    run(given, state)
    assert run._cache_size() == 1


ONES = jnp.ones((2, 5, N, K))
STATE = LinearState(jnp.zeros((2, N, K, K)), jnp.zeros(2, jnp.int32))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key": ONES[:, :4]}, ValueError, r"key has batch and length \(2, 4\) but query has \(2, 5\)"),
        ({"key": ONES[..., :3]}, ValueError, "query has 4 channels but key has 3"),
        ({"key": jnp.ones((2, 5, 3, K))}, ValueError, "heads do not divide"),
        ({"value": jnp.ones((2, 5, N, K), int)}, TypeError, "value has dtype int32: need floating point"),
        ({"log_decay": jnp.ones((2, 5, N))}, ValueError, r"log_decay holds 1\.0: need numbers at most 0"),
        ({"log_decay": jnp.full((2, 5, N), jnp.nan)}, ValueError, "log_decay holds nan"),
        ({"log_decay": jnp.zeros((2, 4, N))}, ValueError, r"need \[M\], \[2, 5, M\] or \[2, 5, M, 4\]"),
        ({"erase": Delta(-jnp.ones((2, 5, N)))}, ValueError, r"Delta.beta holds -1\.0: need numbers at least 0"),
        ({"erase": Delta(ONES)}, ValueError, r"Delta.beta has shape \(2, 5, 2, 4\): need \[2, 5, M\]"),
        ({"erase": Erase(ONES, ONES[..., 0])}, ValueError, r"Erase.write has shape \(2, 5, 2\): need \[2, 5, M, 4\]"),
        ({"erase": 0.5}, TypeError, r"erase must be Delta\(beta\), Erase\(read, write\) or None, got float"),
        ({"bonus": jnp.ones((3, K))}, ValueError, r"bonus has shape \(3, 4\): need one that broadcasts to"),
        ({"read": "after"}, ValueError, "read is 'after': need one of post, pre, all"),
        ({"form": "fast"}, ValueError, "form is 'fast': need one of auto, parallel, chunk, step, associative"),
        ({"chunk": 0}, ValueError, "chunk is 0: need a power of two"),
        ({"chunk": 48}, ValueError, "chunk is 48: need a power of two"),
        ({"chunk": np.int64(48)}, ValueError, "chunk is .*48.*: need a power of two"),
        ({"segment_ids": np.array([2, 2, 1, 1, 0], np.uint32)}, ValueError, "segment_ids decreases along the tokens"),
        ({"segment_ids": [0, 0, 0, 1, 1]}, TypeError, "segment_ids must be an array, got list"),
        ({"state": STATE._replace(segment=0)}, TypeError, "state has segment of type int: need an array"),
        ({"state": STATE._replace(segment=jnp.zeros(2))}, TypeError, "segment of dtype float32: need integers"),
        ({"segment_ids": jnp.array([0, 1, 0, 1, 1])}, ValueError, "segment_ids decreases along the tokens"),
        ({"segment_ids": jnp.zeros(4, int)}, ValueError, r"segment_ids has shape \(4,\): need \[..., 5\]"),
        ({"segment_ids": jnp.zeros(5)}, TypeError, "segment_ids must be integers, got float32"),
        ({"segment_ids": jnp.zeros(5, int), "read": "all"}, ValueError, "read='all' .* takes no segment_ids"),
        ({"state": STATE.memory}, TypeError, "state must be a LinearState"),
        ({"state": STATE._replace(memory=jnp.zeros((2, 3, K, K)))}, ValueError, r"need \(2, 2, 4, 4\) and \(2,\)"),
        ({"state": jax.tree.map(lambda x: x.astype(jnp.bfloat16), STATE)}, TypeError, "state has dtype bfloat16"),
    ],
)
def test_calls_that_mean_nothing_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        linear_attention(**({"query": ONES, "key": ONES, "value": ONES} | change))


def test_segments_of_narrow_integers_may_be_far_apart():
    ids = np.array([-100, -100, 0, 100, 100], np.int8)
    out, _ = linear_attention(ONES, ONES, ONES, segment_ids=ids, chunk=np.int64(4))
    np.testing.assert_array_equal(out, linear_attention(ONES, ONES, ONES, segment_ids=ids.astype(int))[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"log_decay": -0.1}, TypeError, "log_decay must be an array, got float"),
        ({"query": jnp.ones(K)}, ValueError, r"query has shape \(4,\): need \[..., heads, channels\]"),
        ({"erase": Delta(jnp.ones(()))}, ValueError, r"Delta.beta has shape \(\): need"),
        ({"read": "all"}, ValueError, "read is 'all': need one of post, pre"),
    ],
)
def test_steps_that_mean_nothing_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        linear_step(**({"query": ONES[:, 0], "key": ONES[:, 0], "value": ONES[:, 0]} | change))


@settings(max_examples=4, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@example(heads=(2, 1, 1, 1), size=(16, 8), batch=(), decay="none", erase="none", read="post", with_bonus=False)
@example(heads=(6, 3, 1, 3), size=(11, 4), batch=(2,), decay="channel", erase="delta", read="pre", with_bonus=True)
@drawn(
    # Heads of (query, key, value, gates).
    heads=st.sampled_from([(2, 1, 1, 1), (8, 2, 1, 2), (4, 4, 2, 1), (2, 4, 4, 4), (1, 2, 4, 1), (6, 1, 3, 3)]),
    size=st.sampled_from([(8, 4), (8, 2), (12, 4), (9, 4), (5, 8)]),
    batch=st.sampled_from([(), (1,), (2,), (2, 3)]),
    decay=st.sampled_from(["none", "head", "token", "channel"]),
    erase=st.sampled_from(["none", "delta", "erase"]),
    read=st.sampled_from(["post", "pre"]),
    with_bonus=st.booleans(),
)
def test_forms_agree_for_grouped_heads_of_every_kind(heads, size, batch, decay, erase, read, with_bonus):
    """In as many chunks as there are queries per memory, too: no axis is taken for another."""
    draw = np.random.default_rng(0)
    (queries, keys, values, gates), (length, chunk) = heads, size
    shape = {"none": None, "head": (gates,), "token": (*batch, length, gates), "channel": (*batch, length, gates, K)}
    gate = (*batch, length, gates)

    def uniform(shape):
        return jnp.asarray(draw.uniform(-0.7, 0.7, shape), jnp.float32)

    options = {"read": read, "log_decay": None if shape[decay] is None else -jnp.abs(uniform(shape[decay]))}
    options["erase"] = {
        "none": None,
        "delta": Delta(jnp.abs(uniform(gate))),
        "erase": Erase(uniform((*gate, K)), uniform((*gate, K))),
    }[erase]
    if with_bonus:
        options["bonus"] = uniform((max(queries, keys, values, gates), K))
    arrays = [uniform((*batch, length, n, width)) for n, width in ((queries, K), (keys, K), (values, V))]
    state = jax.eval_shape(lambda: linear_attention(*arrays, **options))[1]
    options["state"] = LinearState(uniform(state.memory.shape), jnp.zeros(batch, jnp.int32))
    expected = linear_attention(*arrays, **options, form="step")
    for form in ("chunk", "associative", "parallel"):
        found = linear_attention(*arrays, **options, form=form, chunk=chunk)
        # Sums of at most `length` products, along which each of some `length` erasures may double an error.
        assert_close(found, expected, 50 * length * np.finfo(np.float32).eps)


@by_form("step", "chunk")
@pytest.mark.parametrize("name", ["per token", "before the write", "delta per channel", "erase per token", "grouped"])
def test_what_is_not_finite_reaches_only_later_tokens_of_its_document(name, form):
    """Token 3 holds it, of three documents: tokens before it, other documents and all of their gradients stay."""
    case = mechanism(4, log_decay=np.log([0.9, 0.5]), bonus=normal(4, K)) if name == "grouped" else CASES[name]
    given, options = arrays(case, jnp.float32)
    ids, at = jnp.asarray(SEGMENTS), 3
    clean = np.arange(T) < at
    clean |= SEGMENTS[at] != SEGMENTS
    where = np.arange(T) == at

    def spoil(x, fill):
        return jnp.where(jnp.reshape(where, (T,) + (1,) * (x.ndim - 1)), fill, x) if x.shape[:1] == (T,) else x

    @jax.jit
    def run(given):
        def call(given):
            out, state = linear_attention(**given, **options, segment_ids=ids, form=form, chunk=8)
            return jnp.where(clean[:, None, None], out, 0), out, state.memory

        (used, out, memory), pull = jax.vjp(call, given)
        return used, out, memory, pull((jnp.cos(used), jnp.zeros_like(out), jnp.cos(memory)))[0]

    fine = run(given)
    for each in ("query", "key", "value", "log_decay", "erase"):
        if each not in given or (each == "log_decay" and given[each].ndim == 1):
            continue
        for fill in (np.nan, np.inf):
            spoiled = given | {each: jax.tree.map(lambda x, fill=fill: spoil(x, fill), given[each])}
            used, out, memory, slopes = run(spoiled)
            np.testing.assert_allclose(used, fine[0], atol=1e-5)
            np.testing.assert_allclose(memory, fine[2], atol=1e-5)
            # With a bonus, what reads before the write still reads the key and value of its own token.
            own = options["read"] == "post" or each == "query" or ("bonus" in given and each in ("key", "value"))
            assert not np.isfinite(out[at if own else at + 1]).any()
            if not own:
                np.testing.assert_allclose(out[at], fine[1][at], atol=1e-5)
            for d, expected in zip(jax.tree.leaves(slopes), jax.tree.leaves(fine[3]), strict=True):
                assert np.isfinite(d).all()
                rows = clean if d.shape[:1] == (T,) else slice(None)
                np.testing.assert_allclose(d[rows], expected[rows], atol=1e-4)


@by_form("chunk")
@pytest.mark.parametrize("name", CASES)
def test_a_query_whose_output_is_not_used_may_hold_anything(name, form):
    """Also where nothing is packed: its own output is NaN, and no gradient or state is."""
    given, options = arrays(CASES[name], jnp.float32)
    unused = (np.arange(T) == 3)[:, None, None]

    @jax.jit
    def run(given):
        def call(given):
            out, state = linear_attention(**given, **options, form=form, chunk=8)
            return jnp.where(unused, 0, out), out, state.memory

        (used, out, memory), pull = jax.vjp(call, given)
        return used, memory, pull((jnp.cos(used), jnp.zeros_like(out), jnp.cos(memory)))[0], out

    *fine, _ = run(given | {"query": jnp.where(unused, 0, given["query"])})
    for fill in (np.nan, np.inf):
        *found, out = run(given | {"query": jnp.where(unused, fill, given["query"])})
        assert np.isnan(out[3]).all()
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(fine), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decay", ["none", "head", "channel"])
def test_a_document_that_overflows_ends_with_itself(decay, form):
    """A rule that diverges in one document leaves the next one what it would be alone, wherever chunks are cut."""
    key, value = jnp.full((12, 1, 4), 1e25), jnp.full((12, 1, 2), 1e25)
    key, value = (jnp.where((jnp.arange(12) < 5)[:, None, None], x, 1.0) for x in (key, value))
    shape = {"none": None, "head": (12, 1), "channel": (12, 1, 4)}[decay]
    options = {"log_decay": None if shape is None else jnp.full(shape, -0.1)}
    out, state = linear_attention(
        key, key, value, segment_ids=jnp.asarray(np.arange(12) >= 5, int), form=form, chunk=4, **options
    )
    assert not np.isfinite(out[4]).any()
    options = {name: None if x is None else x[5:] for name, x in options.items()}
    alone, last = linear_attention(key[5:], key[5:], value[5:], form="step", **options)
    if form in ("chunk", "associative"):  # the chunk that holds both documents multiplies what it keeps of the first
        out, alone = out[8:], alone[3:]
    if form != "parallel":
        np.testing.assert_allclose(out[-len(alone) :], alone, rtol=1e-5)
        np.testing.assert_allclose(state.memory, last.memory, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_one_token_that_is_read_before_it_is_written_reaches_no_output(form):
    state = LinearState(jnp.asarray(normal(1, K, V), jnp.float32), jnp.int32(0))
    query, value = jnp.asarray(normal(1, 1, K), jnp.float32), jnp.asarray(normal(1, 1, V), jnp.float32)

    @jax.jit
    def call(query, key, read):
        erase = Erase(read, jnp.ones((1, 1, K)))
        options = {"state": state, "segment_ids": jnp.zeros(1, int), "erase": erase, "read": "pre", "form": form}
        return linear_attention(query, key, value, **options)[0].sum()

    bad, fine = jnp.full((1, 1, K), jnp.nan), jnp.ones((1, 1, K))
    expected, slope = jax.value_and_grad(call)(query, fine, fine)
    for key, read in ((bad, fine), (fine, bad)):
        found, found_slope = jax.value_and_grad(call)(query, key, read)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        np.testing.assert_allclose(found_slope, slope, rtol=1e-6)
