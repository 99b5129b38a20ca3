"""Library kernels: a call is translated or refused by name. The kernels need a GPU; the translation does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattn.core.attend as ja
from jaxattn import attend, explain
from jaxattn.core.attend import fused
from jaxattn.core.attend.call import Given

B, T, S, N, K, H = 2, 8, 8, 4, 2, 8
RNG = np.random.default_rng(0)
QUERY, KEY, VALUE = (RNG.normal(size=(B, n, k, H)).astype(np.float32) for n, k in ((T, N), (S, K), (S, K)))


def given(dtype=jnp.bfloat16, *, query_positions=None, key_positions=None, **slots):
    arrays = (jnp.asarray(x, dtype) for x in (QUERY, KEY, VALUE))
    return Given(*arrays, ja.Slots(**slots), query_positions, key_positions)


SERVED = {
    "plain": {},
    "scale": {"score": ja.Dot(0.2)},
    "causal": {"mask": ja.Causal()},
    "window": {"mask": ja.Window(3)},
    "both sides": {"mask": ja.Window(3, 1)},
    "causal window": {"mask": ja.Causal() & ja.Window(3, 2)},
    "lengths": {"mask": ja.Lengths(np.array([5, 0]))},
    "causal lengths": {"mask": ja.Causal() & ja.Lengths(np.array([0, 3]))},
    "bias": {"bias": ja.Bias(RNG.normal(size=(N, T, S)).astype(jnp.bfloat16))},
    "bias by batch": {"bias": ja.Bias(RNG.normal(size=(B, 1, T, S)).astype(jnp.bfloat16))},
}


@pytest.mark.parametrize("name", SERVED)
def test_the_translated_call_is_the_call(name):
    """The same arguments to JAX's own XLA version, which shares its meaning with the kernels, against dense."""
    options = SERVED[name]
    plan = fused.plan(given(**options), False, "gpu")
    if name == "both sides":  # cuDNN has no window to the right
        assert plan == "cudnn: a window to the right; tokamax: not installed"
        plan = fused.Plan("", None, False, (3, 1), None)
    assert isinstance(plan, fused.Plan)
    hash(plan)

    def by(function):
        def loss(query, key, value):
            out = function(query, key, value)
            return (out**2).sum(), out

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(QUERY, KEY, VALUE)

    def translated(query, key, value):
        call = given(jnp.float32, **options)._replace(query=query, key=key, value=value)
        return fused.call(call, plan, jax.nn.dot_product_attention, implementation="xla")

    for x, y in zip(
        *(jax.tree.leaves(by(each)) for each in (translated, lambda *arrays: attend(*arrays, **options))), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=0, atol=200 * np.finfo(np.float32).eps * max(1, np.abs(y).max()))


def test_what_a_length_hides_may_hold_anything():
    lengths = np.array([3, 0])
    hidden = (np.arange(S) >= lengths[:, None])[..., None, None]
    options = {"mask": ja.Lengths(lengths)}

    def by(query, key, value):
        arrays = given(jnp.float32, **options)._replace(query=query, key=key, value=value)
        plan = fused.Plan("", None, False, None, None)
        return fused.call(arrays, plan, jax.nn.dot_product_attention, implementation="xla")

    query = jnp.asarray(QUERY).at[0, 1, 0, 0].set(np.nan)
    out, pull = jax.vjp(by, query, *(jnp.where(hidden, np.nan, x) for x in (KEY, VALUE)))
    expected, pull_expected = jax.vjp(by, QUERY, KEY, VALUE)
    assert np.isnan(out[0, 1, 0]).all()
    used = jnp.ones_like(out).at[0, 1, 0].set(0)
    np.testing.assert_allclose(jnp.where(used == 0, 0, out), jnp.where(used == 0, 0, expected), atol=1e-6)
    for d, d2 in zip(pull(used), pull_expected(used), strict=True):
        np.testing.assert_allclose(d, d2, atol=1e-6)


def test_tokamax_is_the_call():
    """On a CPU it computes with XLA; the arguments mean the same. Part of the tests where it is installed."""
    attention = pytest.importorskip("tokamax").dot_product_attention
    options = {"mask": ja.Window(3, 1), "score": ja.Dot(0.3), "score_maps": (ja.SoftCap(2.0),)}
    plan = fused.plan(given(jnp.float32, **options), False, "tpu")
    assert plan == fused.Plan("tokamax", 0.3, False, (3, 1), 2.0)
    out = fused.call(given(jnp.float32, **options), plan, attention, logits_soft_cap=2.0)
    expected = attend(QUERY, KEY, VALUE, **options)
    np.testing.assert_allclose(out, expected, rtol=0, atol=200 * np.finfo(np.float32).eps)


REFUSED = {
    "return_lse=True": ({}, True),
    "measures": ({"measures": {"h": ja.Entropy()}}, False),
    "dropout": ({"dropout": ja.Dropout(0.1, jax.random.key(0))}, False),
    "weight_maps": ({"weight_maps": (ja.TopKWeights(2),)}, False),
    "query_positions or key_positions": ({"key_positions": jnp.arange(S)}, False),
    "normalize=Sigmoid": ({"normalize": ja.Sigmoid()}, False),
    "normalize=Softmax": ({"normalize": ja.Softmax(np.zeros(N, np.float32))}, False),
    "score=NegativeDistance": ({"score": ja.NegativeDistance()}, False),
    "score=Dot with an array for a scale": ({"score": ja.Dot(jnp.float32(0.5))}, False),
    "score_maps other than one SoftCap": ({"score_maps": (ja.Temperature(2.0),)}, False),
    "cudnn: score_maps=SoftCap": ({"score_maps": (ja.SoftCap(20.0),)}, False),
    "bias=Alibi": ({"bias": ja.Alibi.geometric(N)}, False),
    "bias=Bias unless its array ends in": ({"bias": ja.Bias(np.zeros(S, np.float32))}, False),
    "cudnn: a bias of another dtype": ({"bias": ja.Bias(np.zeros((T, S), np.float32))}, False),
    "mask=Sinks": ({"mask": ja.Causal() & ja.Sinks(2)}, False),
    "mask=Or": ({"mask": ja.Causal() | ja.Sinks(2)}, False),
    "two masks of a kind": ({"mask": ja.Window(2) & ja.Window(3)}, False),
    "a window under which a query may see no key": ({"mask": ja.Window(2) & ja.Lengths(np.array([1, 2]))}, False),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_call_that_no_kernel_has_is_refused_by_name(reason):
    options, return_lse = REFUSED[reason]
    plan = fused.plan(given(**options), return_lse, "gpu")
    assert isinstance(plan, str)
    assert reason in plan


def test_kernels_are_refused_for_dtypes_head_dims_and_platforms_they_lack():
    assert "cudnn: dtype float32, need float16 or bfloat16" in fused.plan(given(jnp.float32), False, "gpu")
    narrow = given()._replace(**{x: getattr(given(), x)[..., :6] for x in ("query", "key", "value")})
    assert "cudnn: head dim 6, need a multiple of 8 up to 128" in fused.plan(narrow, False, "gpu")
    assert fused.plan(given(), False, "cpu") == "platform cpu: library kernels are for GPU and TPU"
    longer = given()._replace(key=jnp.zeros((B, 10, K, H), jnp.bfloat16), value=jnp.zeros((B, 10, K, H), jnp.bfloat16))
    causal = longer._replace(slots=ja.Slots(mask=ja.Causal()))
    assert "a causal mask for other queries" in fused.plan(causal, False, "gpu")
    assert "cudnn: platform tpu" in fused.plan(given(), False, "tpu")


def test_a_named_kernel_is_never_replaced(capsys):
    if jax.default_backend() != "cpu":
        pytest.skip("a GPU is at hand")
    with pytest.raises(NotImplementedError, match="'fused' cannot serve platform cpu"):
        attend(QUERY, KEY, VALUE, implementation="fused")
    assert explain(QUERY, KEY, VALUE) == "dense"
    assert "fused: cannot serve platform cpu: library kernels are for GPU and TPU" in capsys.readouterr().out


def test_auto_takes_a_kernel_where_one_serves(monkeypatch, capsys):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert explain(*given()[:3], mask=ja.Causal()) == "fused"
    assert explain(*given()[:3], mask=ja.Causal(), return_lse=True) == "dense"
    assert "cannot serve return_lse=True" in capsys.readouterr().out
