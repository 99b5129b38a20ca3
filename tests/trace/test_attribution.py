"""Attribution: gradients against differences, exact where the model is linear, complete along a path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from looked_at import B, K, L, N, T, last, model, prompts

from jaxattn import trace

SITES = ("z", "q", "k_rotated", "attn_out", "mlp_post", "weights", "embed", "resid")


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def test_attribution_is_the_derivative_along_the_difference():
    """By central differences along u_source − u_base, at one place of each site."""
    made = model()
    base, source = prompts()
    found = trace.attribution(made, base, source, last, SITES)
    shapes = {"z": (L, B, T, N), "q": (L, B, T, N), "k_rotated": (L, B, T, K), "attn_out": (L, B, T), "embed": (B, T)}
    shapes |= {"mlp_post": (L, B, T), "weights": (L, B, N, T, T), "resid": (L, B, T)}
    assert {site: x.shape for site, x in found.items()} == shapes
    before, after = (made(x, record=SITES)[2] for x in (base, source))

    @jax.jit
    def moved(changes):
        edits = {site: x if site == "embed" else trace.Layers(x) for site, x in changes.items()}
        return last(made(base, edits=edits)[0])

    step = 1e-4
    for site, value in found.items():
        place = np.unravel_index(np.abs(value).argmax(), value.shape)
        change = after[site] - before[site]
        one = jnp.zeros_like(change).at[place].set(change[place])

        def edit(x, site=site):
            return {site: trace.Pairs(jnp.ones(L), x) if site == "weights" else trace.Add(x)}

        slope = (moved(edit(step * one)) - moved(edit(-step * one))) / (2 * step)
        np.testing.assert_allclose(value[place], slope, rtol=1e-5)


def test_at_the_last_stream_it_is_the_patch_but_for_the_norm():
    """Without the last norm the metric is linear in the stream after the last layer: no error is left."""
    made = model()
    base, source = prompts()
    kept = made(base, record=("final_norm_scale",))[2]["final_norm_scale"]
    before, after = (made(x, record=("resid",))[2]["resid"][-1] for x in (base, source))

    def through(x):
        edits = {"resid": {L - 1: trace.Put(x)}, "final_norm_scale": trace.Put(kept)}
        return last(made(base, edits=edits)[0])

    found = trace.integrated_gradients(through, after, before, steps=1)
    np.testing.assert_allclose(found.sum(), through(after) - through(before), rtol=1e-9)


def test_the_path_of_embeddings_is_complete():
    """The error of midpoints falls as steps⁻²: sixteenfold from 8 to 32."""
    base, source = prompts()
    gap = last(model()(source)[0]) - last(model()(base)[0])
    errors = [
        abs(trace.attribution(model(), base, source, last, ("embed",), steps=n)["embed"].sum() - gap) for n in (8, 32)
    ]
    assert errors[1] < 2e-2 * abs(gap)
    assert errors[0] > 8 * errors[1]


def test_the_attribution_of_weights_is_complete():
    """Hao et al.: Σ A ⊙ mean gradient at αA is F(A) − F(0), of one layer."""
    made, (base, _) = model(), prompts()  # made here: not while `of` is traced

    def of(factor):
        return last(made(base, edits={"weights": {1: trace.Pairs(factor)}})[0])

    found = trace.integrated_gradients(of, jnp.ones((B, N, T, T)), steps=64)
    np.testing.assert_allclose(found.sum(), of(jnp.ones(())) - of(jnp.zeros(())), rtol=2e-3)
    assert abs(jnp.triu(found, 1)).max() == 0  # what is hidden has no share


def test_equal_runs_have_no_attribution_and_unequal_ones_are_refused():
    base, source = prompts()
    for value in trace.attribution(model(), base, base, last, ("z", "scores")).values():
        assert abs(value).max() == 0
    with pytest.raises(ValueError, match="the same number of tokens"):
        trace.attribution(model(), base, source[:, :5], last)
    with pytest.raises(ValueError, match="steps is 0"):
        trace.attribution(model(), base, source, last, steps=0)
    with pytest.raises(ValueError, match="unknown site 'zz'"):
        trace.attribution(model(), base, source, last, ("zz",))


def test_a_frozen_model_is_linear():
    """Attention alone, with weights and scales of norms as they were: the logits are affine in the embedding, so the
    Hessian is 0, and the attribution at the base is the difference."""
    made = model("attention only")
    base, source = prompts()
    scales = ("mixer_norm_scale", "final_norm_scale")
    seen = made(base, record=("embed", "weights", *scales))[2]
    frozen = {"weights": trace.Layers(trace.Pairs(jnp.zeros(L), seen["weights"]))}
    frozen |= {scales[0]: trace.Layers(trace.Put(seen[scales[0]])), scales[1]: trace.Put(seen[scales[1]])}

    def through(change):
        return last(made(base, edits=frozen | {"embed": trace.Add(change)})[0])

    change = made(source, record=("embed",))[2]["embed"] - seen["embed"]
    whole = through(change) - through(jnp.zeros_like(change))
    found = trace.integrated_gradients(through, change, steps=1)
    np.testing.assert_allclose(found.sum(), whole, rtol=1e-9)
    bend = jax.jvp(lambda x: jax.jvp(through, (x,), (change,))[1], (change,), (change,))[1]
    assert abs(bend) < 1e-9 * abs(whole)
    assert abs(last(made(source)[0]) - last(made(base)[0]) - whole) > 1e-3 * abs(whole)  # which it is not unfrozen
