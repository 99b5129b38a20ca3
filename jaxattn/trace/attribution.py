"""First-order effects of replacing values, from gradients: one backward pass for all places at once."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.nn.tap import OF_MODEL, Layers, bare_site, site_of
from jaxattn.trace.edits import Add, Pairs, Put
from jaxattn.trace.patching import Metric, same_shapes
from jaxattn.trace.sweep import compiled, run, unchanged


def attribution(
    model: Any,
    base: Any,
    source: Any,
    metric: Metric,
    sites: Sequence[str] = ("z",),
    *,
    steps: int | None = None,
    **options: Any,
) -> dict[str, Float[Array, "layers ..."]]:
    """Returns for every place of some sites ⟨u_source − u_base, ∂metric/∂u⟩ (attribution patching; Nanda, 2023).

    This is the first-order estimate of metric − metric(base) in the runs of `interchange`, of all places at once: two
    passes, and one with a gradient. Where a softmax is saturated the gradient is near 0 although a patch may be fatal:
    rank by it, and verify the top by `interchange`.

    With `steps`, the gradient is the mean over runs whose embedding lies on the straight line from that of the base to
    that of the source, at the midpoints of `steps` intervals (EAP-IG; Hanna et al., 2024). Then the site "embed"
    is attributed exactly: its sum tends to metric(source) − metric(base) with an error of order steps⁻².

    Args:
        model: The model.
        base: The inputs of the run that would be changed: tokens, or a tuple of inputs.
        source: The inputs of the run whose values would be put in, of the same shapes.
        metric: From the output to a number, or to one number per example: they are summed.
        sites: The sites.
        steps: How many gradients are averaged; None for the one at the base.
        options: Other arguments of the model, for all runs.

    Returns:
        Site -> [L, B, T, N] for a site with heads, [L, B, T] for one of the stream, [L, B, N, T, S] at scores and
            weights; without L for a site that a model has once.

    Raises:
        ValueError: The two inputs differ in shape, `steps` is below 1, or layers have a site in different shapes.
    """
    sites = tuple(site_of("sites", site) for site in sites)
    change, gradient = changes_and_gradients(model, base, source, metric, sites, steps=steps, **options)
    whole = {site: bare_site(site) in ("scores", "weights") for site in sites}
    products = {site: change[site] * gradient[site] for site in sites}
    return {site: product if whole[site] else product.sum(-1) for site, product in products.items()}


@unchanged()
def changes_and_gradients(
    model: Any, base: Any, source: Any, metric: Metric, sites: Sequence[str], *, steps: int | None, **options: Any
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Returns the pair (site -> u_source − u_base, site -> gradient of the metric), as `attribution` uses them."""
    if steps is not None and steps < 1:
        raise ValueError(f"steps is {steps}: need at least one gradient, or None for the one at the base")
    ours, theirs = same_shapes(base, source, options)
    sites = tuple(dict.fromkeys(sites))
    record = tuple(dict.fromkeys((*sites, *(() if steps is None else ("embed",)))))
    before, after = (run(model, *inputs, record=record, **options)[1] for inputs in (ours, theirs))
    for site in sites:
        if isinstance(before[site], list):
            raise ValueError(f"the layers have {site!r} in different shapes, or not all of them: need the same in all")

    def value(added: dict[str, Array], embed: Any) -> Array:
        edits = {site: _plus(site, x) for site, x in added.items()}
        if embed is not None:
            edits["embed"] = (Put(embed), *((edits["embed"],) if "embed" in edits else ()))
        return jnp.sum(metric(model(*ours, edits=edits, **options)[0]))

    nothing = {site: jnp.zeros_like(before[site]) for site in sites}

    def gradients(before: Any, after: Any, nothing: Any) -> Any:
        if steps is None:
            return jax.grad(value)(nothing, None)
        return mean_along(lambda embed: jax.grad(value)(nothing, embed), before["embed"], after["embed"], steps)

    found = compiled(gradients, {k: before[k] for k in record}, {k: after[k] for k in record}, nothing)
    change = {site: after[site] - before[site] for site in sites}
    if "scores" in map(bare_site, sites):
        change = {site: jnp.where(jnp.isfinite(x), x, 0) for site, x in change.items()}  # hidden pairs are −∞ in both
    return change, found


def _plus(site: str, x: Array) -> Any:
    if site in OF_MODEL:
        return Add(x)
    pairs = bare_site(site) in ("scores", "weights")
    return Layers(Pairs(jnp.ones(len(x)), x) if pairs else Add(x))


def integrated_gradients(F: Callable[[Any], Array], end: Any, start: Any = None, *, steps: int = 20) -> Any:
    """Returns (end − start) ⊙ ∫₀¹ ∂F(start + α (end − start)) dα, whose sum is F(end) − F(start).

    Sundararajan et al. (2017). The integral is a sum over midpoints, with an error of order steps⁻². F of a factor of
    the attention weights, from 0 to 1, gives the attribution of Hao et al. (2021):

        F = lambda factor: metric(model(tokens, edits={"weights": {3: Pairs(factor)}})[0])
        integrated_gradients(F, jnp.ones((batch, heads, length, length)))

    Args:
        F: From an array, or a pytree of them, to a number.
        end: Where the straight line ends.
        start: Where it begins; zeros by default.
        steps: How many gradients are averaged.

    Raises:
        ValueError: `steps` is below 1.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}: need at least one gradient")
    end = jax.tree.map(jnp.asarray, end)
    start = jax.tree.map(jnp.zeros_like, end) if start is None else jax.tree.map(jnp.asarray, start)

    def products(start: Any, end: Any) -> Any:
        gradient = mean_along(jax.grad(F), start, end, steps)
        return jax.tree.map(lambda x, y, g: (y - x) * g, start, end, gradient)

    return compiled(products, start, end)


def mean_along(function: Callable[[Any], Any], start: Any, end: Any, steps: int) -> Any:
    """Returns the mean of a function at the midpoints of `steps` intervals of the straight line from start to end."""

    def at(share: Any) -> Any:
        return function(jax.tree.map(lambda x, y: x + share * (y - x), start, end))

    def add(total: Any, share: Array) -> tuple[Any, None]:
        return jax.tree.map(lambda x, y: x + y / steps, total, at(share)), None

    shares = (jnp.arange(steps) + 0.5) / steps
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(at, shares[0]))
    return jax.lax.scan(add, nothing, shares)[0]
