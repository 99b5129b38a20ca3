"""The lens of heads: what it is at its beginning, what it cannot see, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import planted

from jaxattn.analysis import HeadLens, head_lens_loss, last_heads
from jaxattn.trace import run


def test_at_its_beginning_the_sum_is_what_attention_writes_and_training_improves_it():
    model = planted.random(layers=2, heads=2, vocabulary=20)
    tokens = jax.random.randint(jax.random.key(0), (16, 5), 0, 20)
    heads, target = last_heads(model, tokens, 1)
    lens = HeadLens.of(model)
    written = run(model, tokens, record=("attn_out",))[1]["attn_out"][1][:, -1]
    unembed = (model.norm.scale[...] * model.embed.table[...]).T
    np.testing.assert_allclose(lens(heads).sum(1), written @ unembed, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(target, jax.nn.log_softmax(model(tokens)[0][:, -1]), rtol=1e-4, atol=1e-5)
    swapped = HeadLens(lens.weight[::-1], lens.bias[::-1])
    np.testing.assert_allclose(swapped(heads[:, ::-1]).sum(1), lens(heads).sum(1), rtol=1e-4, atol=1e-5)

    def loss(lens, penalty):
        return head_lens_loss(lens, heads, target, unembed=unembed, penalty=penalty)

    assert loss(lens, 1.0) == loss(lens, 0.0) >= 0  # at the unembedding
    step = jax.jit(lambda lens: jax.tree.map(lambda x, g: x - 0.02 * g, lens, jax.grad(loss)(lens, 1e-3)))
    learned = lens
    for _ in range(100):
        learned = step(learned)
    assert loss(learned, 0.0) < 0.8 * loss(lens, 0.0)
    assert loss(learned, 1.0) > loss(learned, 0.0)
    same = HeadLens(jnp.zeros_like(lens.weight), jnp.zeros_like(lens.bias).at[0].set(target[0]))
    assert abs(float(head_lens_loss(same, heads[:1], target[:1]))) < 1e-5  # KL of a distribution with itself
