"""Programs made for TPUs and NVIDIA GPUs on a machine without them: everything lowers, values and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxattn import Causal, RelativeBias, Softmax, Window, attend, linear_attention, memory_scan, models, nn
from jaxattn.core.attend import fused
from jaxattn.core.linear import Delta
from jaxattn.core.memory import MLPMemory
from jaxattn.train import init_state, language_loss, make_step

B, T, N, K, H = 2, 64, 4, 2, 8
PLATFORMS = ("tpu", "cuda")


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


QUERY, KEY = array(B, T, N, H), array(B, T, K, H)


def attended(query, key, value, table, **options):
    slots = {"mask": Window(9) & Causal(), "bias": RelativeBias(table, 8), "normalize": Softmax(table[:, 0])}
    return attend(query, key, value, **slots, **options)


def decoded(query, key, value):
    """One token, of a cache that is large enough for the choices that are made on CPUs alone."""
    return attend(query, key, value, mask=Causal(), query_positions=jnp.full(1, 5))


def linear(query, key, value, log_decay, beta, form):
    out, state = linear_attention(query, key, value, log_decay=-(log_decay**2), erase=Delta(beta), form=form, chunk=16)
    return out, state.memory


def learning(query, first, read):
    return memory_scan(MLPMemory((first,)), query, query, query, rate=0.1, inner_batch=8, read=read)[0]


ATTENDED = (QUERY, KEY, KEY, array(N, 6))
LINEAR = (QUERY, KEY, KEY, array(B, T, K, H), array(B, T, K))
CASES = {
    **{name: (partial(attended, implementation=name), ATTENDED) for name in ("auto", "dense", "rows", "tiled")},
    "bfloat16": (attended, (*(array(*x.shape, dtype=jnp.bfloat16) for x in ATTENDED[:3]), ATTENDED[3])),
    "decoding": (decoded, (array(B, 1, N, 64), array(B, 4096, K, 64), array(B, 4096, K, 64))),
    **{f"linear {form}": (partial(linear, form=form), LINEAR) for form in ("parallel", "chunk", "associative", "step")},
    **{f"memory {read}": (partial(learning, read=read), (QUERY, array(N, H, H))) for read in ("dual", "materialize")},
}


@pytest.mark.parametrize("name", CASES)
def test_calls_lower_with_their_gradients(name):
    call, given = CASES[name]

    def total(*given):
        results = call(*given)
        return sum(jnp.sin(x.astype(jnp.float32)).sum() for x in jax.tree.leaves(results)), results

    program = jax.jit(jax.value_and_grad(total, tuple(range(len(given))), has_aux=True))
    assert set(jax.export.export(program, platforms=PLATFORMS)(*given).platforms) == set(PLATFORMS)


MIXERS = {
    "attention": models.Spec(nn.MultiHeadAttention, heads=4, key_heads=2, qk_norm=models.Spec(nn.RMSNorm), dropout=0.1),
    "recurrences": models.Spec(nn.DeltaNet, heads=4, decay="head"),
    "memories": models.Spec(nn.NeuralMemory, heads=4, hidden=(4,)),
}


@pytest.mark.parametrize("name", MIXERS)
def test_training_steps_lower(name):
    layers = [models.pre_norm(MIXERS[name])] * 2
    config = models.TransformerConfig(vocabulary=32, width=32, length=T, layers=layers, dtype="bfloat16", remat="dots")
    params, loss_fn = language_loss(models.Transformer(config, rngs=nnx.Rngs(0)))
    optimizer = optax.adamw(1e-3)
    batch = {name: array(B, T, dtype=jnp.int32) for name in ("tokens", "targets", "documents")}
    batch["weights"] = array(B, T)
    program = jax.jit(make_step(loss_fn, optimizer))
    state = jax.eval_shape(lambda: init_state(params, optimizer, jax.random.key(0)))
    state = state._replace(key=jax.random.key(0))
    assert set(jax.export.export(program, platforms=PLATFORMS)(state, batch).platforms) == set(PLATFORMS)


def test_the_choice_follows_the_platform_that_is_lowered_for(monkeypatch):
    """On a machine with kernels of a library, a program for another platform has none of them."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(fused, "fused", lambda given, plan: jnp.full_like(given.query, 7))
    query = array(1, 32, 2, 16, dtype=jnp.bfloat16)

    def call(query):
        return attend(query, query, query, mask=Causal())

    texts = {
        platform: jax.export.export(jax.jit(call), platforms=[platform])(query).mlir_module()
        for platform in ("cuda", "cpu", "tpu")
    }
    assert "7.0" in texts["cuda"]
    assert "exponential" not in texts["cuda"]
    for platform in ("cpu", "tpu"):
        assert "exponential" in texts[platform]
        assert "7.0" not in texts[platform]
    jax.clear_caches()  # programs that were made under another backend
    out = jax.jit(call)(np.ones(query.shape, jnp.bfloat16))
    np.testing.assert_array_equal(out, 1)
