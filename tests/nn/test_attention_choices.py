"""A choice of blocks in the slot of a module is that of the call to `attend`, in training and in reading prompts."""

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx
from mixers import call
from multi_head import assert_close, randomise

from jaxattn import Causal, Documents, attend
from jaxattn.cache import HeavyHitters, Policy
from jaxattn.core.attend import FlexPrefill, MoBA, VerticalSlash
from jaxattn.models import Spec, Transformer, from_plain, to_plain
from jaxattn.nn import MultiHeadAttention

D, T, B = 16, 22, 2
CHOICES = {
    "moba": MoBA(4, 2),
    "lines": VerticalSlash(jnp.array([1, 0, 0, 1]), 1, block=4, dense_below=0),
    "flexible": FlexPrefill(0.6, 0.3, 4, 4, dense_below=0),
}


def inputs(length=T, seed=5):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((B, length, D)), jnp.float32)


def build(choice, **options):
    options = {"key_heads": 2, "mask": Causal()} | options
    return randomise(MultiHeadAttention(D, 4, choice=choice, **options, rngs=nnx.Rngs(0)))


run = nnx.jit(lambda module, x, options: call(module, x, record=("q_rotated", "k_rotated", "v", "z"), **options))


@pytest.mark.parametrize("name", CHOICES)
def test_the_module_reads_what_its_choice_shows(name):
    """Also in padded rows, and into a state, which changes nothing of a prompt."""
    choice, x = CHOICES[name], inputs()
    module, dense = build(choice), build(None)
    y, _, seen = run(module, x, {})
    query, key, value = (seen[each] for each in ("q_rotated", "k_rotated", "v"))
    assert_close(seen["z"], attend(query, key, value, mask=Causal() & choice(query, key)))
    assert np.abs(np.asarray(y - run(dense, x, {})[0])).max() > 1e-3
    into_state, state, _ = run(module, x, {"state": module.init_state(B, 30)})
    assert_close(into_state, y)
    positions = np.stack([np.r_[[-1] * 3, :T], np.r_[:T, [-1] * 3]])
    padded = np.full((B, T + 3, D), np.nan, np.float32)
    for b in range(B):
        padded[b, positions[b] >= 0] = x[b]
    rows, _, _ = run(module, jnp.asarray(padded), {"positions": positions})
    assert_close(np.stack([rows[b, positions[b] >= 0] for b in range(B)]), y)
    # A token by itself reads all that is held.
    _, held, _ = run(dense, x, {"state": dense.init_state(B, 30)})
    one = inputs(1, seed=6)
    assert_close(run(module, one, {"state": state})[0], run(dense, one, {"state": held})[0])


def test_a_prompt_in_pieces_chooses_as_in_whole():
    """MoBA of a call reads the keys that the state holds, so that its blocks are the same."""
    module, x = build(CHOICES["moba"]), inputs()
    whole, _, _ = run(module, x, {})
    state, pieces = module.init_state(B, T), []
    for start, stop in ((0, 9), (9, 11), (11, T)):
        y, state, _ = run(module, x[:, start:stop], {"state": state})
        pieces.append(y)
    assert_close(jnp.concatenate(pieces, 1), whole)


YAML = """
vocabulary: 11
length: 24
width: 16
layers:
- branches:
  - module:
      class_path: jaxattn.nn.MultiHeadAttention
      init_args: {heads: 4, choice: {class_path: jaxattn.core.attend.MoBA, init_args: {size: 4, pages: 2}}}
"""


def test_a_model_has_a_choice_from_yaml_and_learns_under_it():
    config = from_plain(yaml.safe_load(YAML))
    assert from_plain(yaml.safe_load(yaml.safe_dump(to_plain(config)))) == config
    assert config.layers[0].branches[0].module.arguments["choice"] == MoBA(4, 2)
    tokens = np.random.default_rng(0).integers(0, 11, (B, T))
    sparse, plain = (Transformer(each, rngs=nnx.Rngs(0)) for each in (config, _without_choice(config)))
    out, gradient = nnx.jit(nnx.value_and_grad(lambda model: (model(tokens)[0] ** 2).sum()))(sparse)
    assert np.abs(out - (plain(tokens)[0] ** 2).sum()) > 1e-4
    assert all(np.isfinite(x[...]).all() for _, x in nnx.to_flat_state(gradient))
    later = tokens.copy()
    later[:, 15:] = 0
    np.testing.assert_array_equal(sparse(tokens)[0][:, :15], sparse(later)[0][:, :15])


def _without_choice(config):
    return from_plain(
        yaml.safe_load(
            YAML.replace(", choice: {class_path: jaxattn.core.attend.MoBA, init_args: {size: 4, pages: 2}}", "")
        )
    )


def test_what_the_slot_refuses():
    x = inputs()
    module = build(CHOICES["moba"])
    with pytest.raises(ValueError, match="mask has documents, but the choice MoBA"):
        call(module, x, mask=Causal() & Documents(jnp.arange(T) // 11))
    state = module.init_state(B, T, Policy(HeavyHitters(4), 20))
    with pytest.raises(ValueError, match="the state keeps other tokens in each head, and the choice MoBA"):
        call(module, x, state=state)
    with pytest.raises(TypeError, match="choice must be a part such as MoBA"):
        build(Causal())
    with pytest.raises(ValueError, match="for keys of another sequence: need choice=None"):
        build(MoBA(4, 2), keys_from="context", position=None)
    assert isinstance(build(Spec(MoBA, size=4, pages=2)).choice, MoBA)
