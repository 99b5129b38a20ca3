"""Every layer that carries a published name against a NumPy transcription of the published layer, in float64.

The transcriptions go token by token and share nothing with the modules but their parameters. Sizes are tiny, and
parameters are moved away from where they start, so that no bias or gain is at 0 or 1.
"""

import numpy as np
import pytest
from mixers import D, N, X, assert_close, build, run

from jaxattn import models

x = np.asarray(X, np.float64)


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
    mixer = build(models.GatedConvolution(use_bias=use_bias))
    m = mixer.mechanism
    assert m.up.kernel.shape == (D, 2 * D)
    assert m.convolution.bias is None
    y = linear(m.out, silu(convolved(m.convolution, linear(m.up, x))) * linear(m.gate, x))
    assert_close(run(mixer, X)[0], y)
