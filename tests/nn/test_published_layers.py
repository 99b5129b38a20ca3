"""Every layer that carries a published name against a NumPy transcription of the published layer, in float64.

The transcriptions go token by token and share nothing with the modules but their parameters. Sizes are tiny, and
parameters are moved away from where they start, so that no bias or gain is at 0 or 1.
"""

import numpy as np
import pytest
from mixers import B, D, N, T, X, assert_close, build, run

from jaxattn import models, nn

x = np.asarray(X, np.float64)
EPS = 1e-6  # of norms, unless a paper has another


def array(param):
    """A parameter in float64."""
    return np.asarray(param[...], np.float64)


def linear(module, x):
    y = x @ array(module.kernel)
    return y if module.bias is None else y + array(module.bias)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.logaddexp(0, x)


def rms(x, eps, scale=1.0):
    """Over the last axis."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def convolved(module, x):
    """The causal convolution without its activation; zeros before the sequence."""
    weight = array(module.weight)
    y = np.zeros_like(x)
    for lag, each in enumerate(weight):
        y[:, lag:] += each * x[:, : x.shape[1] - lag]
    return y if module.bias is None else y + array(module.bias)


def heads(x, count=N):
    return x.reshape(*x.shape[:-1], count, -1)


def merged(x):
    return x.reshape(*x.shape[:-2], -1)


@pytest.mark.parametrize("use_bias", [True, False])
def test_gated_convolution_is_that_of_based(use_bias):
    mixer = build(models.Spec(nn.GatedConvolution, use_bias=use_bias))
    m = mixer.mechanism
    assert m.up.kernel.shape == (D, 2 * D)
    assert m.convolution.bias is None
    y = linear(m.out, silu(convolved(m.convolution, linear(m.up, x))) * linear(m.gate, x))
    assert_close(run(mixer, X)[0], y)


def projected(project, x, silu_last):
    """The rows of `Projections`, in its order: heads of the projections, convolved."""
    rows = []
    for name, (count, _) in project.sizes:
        y = linear(project.linear[name], x)
        y = convolved(project.convolution[name], y) if project.convolution else y
        rows.append(heads(silu(y) if silu_last else y, count))
    return rows


def unit(y):
    return y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-6)


def delta_rule(q, k, v, beta, decay):
    """S ← diag(decay) S, then S ← S + β k (v − kᵀ S)ᵀ; what is read is qᵀ S."""
    memory = np.zeros((*q.shape[:1], *q.shape[2:], v.shape[-1]))
    reads = []
    for t in range(q.shape[1]):
        memory = decay[:, t, ..., None] * memory
        error = v[:, t] - np.einsum("bnk,bnkv->bnv", k[:, t], memory)
        memory = memory + np.einsum("bn,bnk,bnv->bnkv", beta[:, t], k[:, t], error)
        reads.append(np.einsum("bnk,bnkv->bnv", q[:, t], memory))
    return np.stack(reads, 1)


@pytest.mark.parametrize("convolution", [0, 3])
@pytest.mark.parametrize("decay", ["none", "head", "channel"])
def test_deltanet_is_the_published_layer(decay, convolution):
    """SiLU of q, k and v also without a convolution, and Kimi's gate of low rank with a bias (their authors' codes)."""
    mixer = build(models.Spec(nn.DeltaNet, heads=N, decay=decay, convolution=convolution))
    m = mixer.mechanism
    q, k, v = projected(m.project, x, silu_last=True)
    beta, kept = sigmoid(linear(m.beta, x)), np.ones((B, T, N, 1))
    if decay == "head":
        kept = np.exp(-np.exp(array(m.a_log)) * softplus(linear(m.step, x) + array(m.step_bias)))[..., None]
    elif decay == "channel":
        assert m.step.down.kernel.shape == m.out.gate.down.kernel.shape == (D, D // N)
        step = linear(m.step.up, linear(m.step.down, x)) + array(m.step_bias)
        kept = np.exp(-np.exp(array(m.a_log))[:, None] * softplus(heads(step)))
    read = rms(delta_rule(unit(q) * q.shape[-1] ** -0.5, unit(k), v, beta, kept), 1e-5, array(m.out.norm.scale))
    y = merged(read)
    if decay == "head":
        y = y * silu(linear(m.out.gate, x))
    elif decay == "channel":
        assert m.out.gate.up.bias is not None
        y = y * sigmoid(linear(m.out.gate.up, linear(m.out.gate.down, x)))
    assert_close(run(mixer, X)[0], linear(m.out.out, y))


def test_titans_memory_has_silu_without_a_convolution():
    """Of queries, keys and values (Behrouz et al., 2025)."""
    mixer = build(models.Spec(nn.NeuralMemory, heads=N, hidden=(), inner_batch=4, convolution=0))
    m = mixer.mechanism
    q, k, v = projected(m.project, x, silu_last=True)
    _, _, records = run(mixer, X, record=("q", "k", "v"))
    for name, expected in {"q": unit(q), "k": unit(k), "v": v}.items():
        assert_close(records[name], expected)


def test_mamba_is_the_published_layer():
    """With the bias of its convolution (Gu & Dao, 2023)."""
    mixer = build(models.Spec(nn.S6, inner=6, state=3))
    m = mixer.mechanism
    signal = silu(convolved(m.convolution, linear(m.signal, x)))
    assert m.convolution.bias is not None
    key, query = (linear(m.selection[name], signal) for name in ("key", "query"))
    step = softplus(linear(m.step, linear(m.selection["step"], signal)) + array(m.step_bias))
    h, reads = np.zeros((B, 6, 3)), []
    for t in range(T):
        kept = np.exp(-step[:, t, :, None] * np.exp(array(m.a_log)))
        h = kept * h + (step * signal)[:, t, :, None] * key[:, t, None]
        reads.append((h * query[:, t, None]).sum(-1))
    y = (np.stack(reads, 1) + array(m.skip) * signal) * silu(linear(m.gate, x))
    assert_close(run(mixer, X)[0], linear(m.out, y))


def test_mamba2_is_the_published_layer():
    """With the bias of its convolution, and its norm over all heads after the gate (Dao & Gu, 2024)."""
    mixer = build(models.Spec(nn.Mamba2, heads=N, state=3))
    m = mixer.mechanism
    assert all(each.bias is not None for each in m.project.convolution.values())
    value, key, query = projected(m.project, x, silu_last=True)
    step = softplus(linear(m.step, x) + array(m.step_bias))
    kept, h, reads = np.exp(-np.exp(array(m.a_log)) * step), np.zeros((B, N, 3, D)), []
    for t in range(T):
        written = key[:, t, :, :, None] * (step[..., None] * value)[:, t, :, None]
        h = kept[:, t, :, None, None] * h + written
        reads.append(np.einsum("bk,bnkv->bnv", query[:, t, 0], h))
    y = merged(np.stack(reads, 1) + array(m.skip)[:, None] * value) * silu(linear(m.gate, x))
    assert_close(run(mixer, X)[0], linear(m.out, rms(y, 1e-5, array(m.norm.scale))))


@pytest.mark.parametrize("convolution", [0, 3])
def test_hgrn2_is_the_published_layer(convolution):
    """Its norm is over all heads at once, and its convolution has no SiLU (Qin et al., 2024, and their code)."""
    mixer = build(models.Spec(nn.HGRN2, heads=N, lower_bound=0.3, convolution=convolution))
    m = mixer.mechanism
    q, forget, v = projected(m.project, x, silu_last=False)
    kept = 0.3 + 0.7 * sigmoid(forget)
    memory, reads = np.zeros((B, N, D // N, D // N)), []
    for t in range(T):
        memory = kept[:, t, ..., None] * memory + (1 - kept[:, t])[..., None] * v[:, t, :, None]
        reads.append(np.einsum("bnk,bnkv->bnv", silu(q)[:, t], memory))
    y = rms(merged(np.stack(reads, 1)), 1e-5, array(m.norm.scale))
    assert_close(run(mixer, X)[0], linear(m.out, y))


def test_rwkv7_is_the_published_layer():
    """tanh inside the decay, a gate without a sigmoid behind it, and eps 64e-5 (Peng et al., 2025, and their code)."""
    mixer = build(models.Spec(nn.RWKV7, heads=N, rank=3))
    m = mixer.mechanism
    before = np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], 1)
    mixed = {name: x + (before - x) * array(mix) for name, mix in m.mix.items()}
    r, k, v = (linear(m.linear[name], mixed[name]) for name in ("receptance", "key", "value"))
    low = m.low_rank
    kept = np.exp(-np.exp(-0.5) * sigmoid(linear(low["decay"].up, np.tanh(linear(low["decay"].down, mixed["decay"])))))
    rate = sigmoid(linear(low["rate"].up, linear(low["rate"].down, mixed["rate"])))
    gate = linear(low["gate"].up, sigmoid(linear(low["gate"].down, mixed["gate"])))
    assert low["gate"].up.bias is None
    removed = unit(heads(k * array(m.removed)))
    k = k * (1 + (rate - 1) * array(m.replaced))
    r, k, v, kept, rate = (heads(each) for each in (r, k, v, kept, rate))
    memory, reads = np.zeros((B, N, D // N, D // N)), []
    for t in range(T):
        found = np.einsum("bnk,bnkv->bnv", removed[:, t], memory)
        memory = kept[:, t, ..., None] * memory - (rate * removed)[:, t, ..., None] * found[:, :, None]
        memory = memory + k[:, t, ..., None] * v[:, t, :, None]
        reads.append(np.einsum("bnk,bnkv->bnv", r[:, t], memory))
    y = np.stack(reads, 1)
    y = y - y.mean(-1, keepdims=True)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 64e-5) * array(m.scale) + array(m.shift)
    y = y + (r * array(m.bonus) * k).sum(-1, keepdims=True) * v
    assert_close(run(mixer, X)[0], linear(m.out, merged(y) * gate))


def layer_normed(y, eps, scale, shift):
    y = y - y.mean(-1, keepdims=True)
    return y / np.sqrt((y**2).mean(-1, keepdims=True) + eps) * scale + shift


def rotated(y, places, base=10000.0):
    """Channels i and i + K/2 turned by place · base^(−2 i / K)."""
    half = y.shape[-1] // 2
    angle = places[:, None, None] * base ** (-np.arange(half) / half)
    first, second = y[..., :half], y[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], -1)


@pytest.mark.parametrize("convolution", [0, 3])
def test_ttt_linear_is_the_published_layer(convolution):
    """One row and one head at a time, in the dual form of one inner batch after the other (Sun et al., 2024)."""
    size = 4
    mixer = build(models.Spec(nn.TTT, heads=N, inner_batch=size, convolution=convolution))
    m = mixer.mechanism
    if convolution:
        shared = linear(m.linear["shared"], x)
        q, k = (convolved(m.convolution[name], shared) for name in ("query", "key"))
    else:
        q, k = (linear(m.linear[name], x) for name in ("query", "key"))
    q, k = (rotated(heads(each), np.arange(T) % size) for each in (q, k))
    v, rate = heads(linear(m.linear["value"], x)), sigmoid(linear(m.rate, x)) * N / D
    token = np.maximum(1 / np.arange(1, size + 1) + array(m.rows), 0)
    read = np.zeros_like(v)
    for row, head in np.ndindex(B, N):
        w, b = array(m.weights[0])[head], array(m.biases[0])[head, 0]
        gain, shift = array(m.gain)[head], array(m.shift)[head]
        for first in range(0, T, size):
            here = slice(first, first + size)
            keys, values, queries, rates = (each[row, here, head] for each in (k, v, q, rate))
            hidden = keys @ w + b
            centred = hidden - hidden.mean(-1, keepdims=True)
            deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + EPS)
            unit_norm = centred / deviation
            error = (unit_norm * gain + shift + keys - values) * gain  # through the gain, then through the norm
            slope = error - error.mean(-1, keepdims=True) - unit_norm * (error * unit_norm).mean(-1, keepdims=True)
            slope = slope / deviation
            for i in range(len(keys)):
                steps = token[i] * rates[: i + 1, None] * slope[: i + 1]
                w_i, b_i = w - keys[: i + 1].T @ steps, b - steps.sum(0)
                read[row, first + i, head] = queries[i] + layer_normed(queries[i] @ w_i + b_i, EPS, gain, shift)
            w, b = w_i, b_i
    g = linear(m.gate, x)
    gelu = g / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
    y = layer_normed(merged(read), EPS, array(m.norm.scale), array(m.norm.bias))
    assert_close(run(mixer, X)[0], linear(m.out, y * gelu))


@pytest.mark.parametrize("angles", ["rotary", "torchscale"])
def test_retnet_is_the_published_layer(angles):
    """With the frequencies 1, ..., 1 / base, evenly spread in their logs, of the authors' code (Sun et al., 2023)."""
    mixer = build(models.Spec(nn.RetNet, heads=N, rotary_base=100.0, angles=angles))
    m = mixer.mechanism
    q, k, v = projected(m.project, x, silu_last=False)
    half = D // N // 2
    last = half if angles == "rotary" else half - 1
    angle = np.arange(T)[:, None, None] * 100.0 ** (-np.arange(half) / last)
    q, k = ((y[..., :half] + 1j * y[..., half:]) * np.exp(1j * angle) for y in (q, k))
    distance = np.arange(T)[:, None] - np.arange(T)
    kept = np.where(distance >= 0, (1 - 2.0 ** (-5 - np.arange(N)))[:, None, None] ** distance, 0)
    weights = np.einsum("btnk,bsnk->bnts", q, k.conj()).real * (D // N) ** -0.5 * kept
    read = rms(np.einsum("bnts,bsnv->btnv", weights, v), EPS, array(m.out.norm.scale))
    assert_close(run(mixer, X)[0], linear(m.out.out, merged(read) * silu(linear(m.out.gate, x))))


def test_hymba_is_the_published_layer():
    """With the biases of the authors' code (Dong et al., 2024)."""
    mixer = build(models.Spec(nn.hymba_heads, heads=N, key_heads=1, state=3))
    attention, m = mixer.mixers[0], mixer.mixers[1].mechanism
    q, k, v = (
        heads(linear(each, x), count)
        for each, count in ((attention.query, N), (attention.key, 1), (attention.value, 1))
    )
    q, k = (rotated(y, np.arange(T)) for y in (q, k))
    scores = np.einsum("btnh,bsh->bnts", q, k[:, :, 0]) / np.sqrt(q.shape[-1])
    weights = np.exp(scores) * np.tri(T)
    weights = weights / weights.sum(-1, keepdims=True)
    first = merged(np.einsum("bnts,bsh->btnh", weights, v[:, :, 0]))

    signal = silu(convolved(m.convolution, linear(m.signal, x)))
    step, key, query = (
        rms(linear(m.selection[name], signal), EPS, array(m.norms[name].scale)) for name in ("step", "key", "query")
    )
    step = softplus(linear(m.step, step) + array(m.step_bias))
    h, reads = np.zeros((B, 2 * D, 3)), []
    for t in range(T):
        kept = np.exp(-step[:, t, :, None] * np.exp(array(m.a_log)))
        h = kept * h + (step * signal)[:, t, :, None] * key[:, t, None]
        reads.append((h * query[:, t, None]).sum(-1))
    second = (np.stack(reads, 1) + array(m.skip) * signal) * silu(linear(m.gate, x))
    both = (rms(y, EPS, array(norm.scale)) for y, norm in zip((first, second), mixer.norms, strict=True))
    for biased in (attention.query, attention.key, attention.value, m.signal, m.gate, m.convolution, mixer.out):
        assert biased.bias is not None
    assert_close(run(mixer, X)[0], linear(mixer.out, sum(both) / 2))
