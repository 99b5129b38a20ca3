"""What one run of a model does with values of another run: interchange interventions and paths.

There are two runs on inputs of the same shape, `base` and `source`. Values of the source are put into the base, and a
metric of the output says how far it moves: an effect of 0 leaves it where the base has it, and 1 brings it to where the
source has it. With a corrupted base and a clean source this is denoising (what is enough to restore the answer), with a
clean base and a corrupted source noising (what the answer needs).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxattn.core.part import part
from jaxattn.nn.tap import OF_MODEL, Layers, bare_site, site_of
from jaxattn.trace.edits import Pairs, Put
from jaxattn.trace.sweep import Places, run, sweep

Inputs = Sequence[Any]
Metric = Callable[[Any], Any]
OWN = ("edits", "record", "start", "state")


@part
class Effects:
    """What a metric is in two runs, and in runs of the one with values of the other.

    Attributes:
        metric: [table ..., *m], the metric of each patched run.
        base: [*m], the metric of the base.
        source: [*m], the metric of the source. Each is a pytree if the metric is one.
    """

    metric: Any
    base: Any
    source: Any

    @property
    def share(self) -> Any:
        """(metric − base) / (source − base): 0 for no effect, 1 if the patched run is as the source.

        NaN where the two runs have the same metric. Booleans count as 0 and 1.
        """

        def of(metric: Array, base: Array, source: Array) -> Array:
            metric, base, source = (jnp.asarray(x) * 1.0 for x in (metric, base, source))
            gap = source - base
            return jnp.where(gap == 0, jnp.nan, metric - base) / jnp.where(gap == 0, 1, gap)

        return jax.tree.map(of, self.metric, self.base, self.source)


def as_inputs(name: str, inputs: Any, options: Mapping[str, Any], own: Sequence[str] = OWN) -> tuple[Any, ...]:
    """Returns the positional inputs of a model: an array alone is its only one.

    Args:
        name: The name of the argument.
        inputs: The inputs.
        options: The other arguments of the model.
        own: Which of these are those of the caller, and not for options.

    Raises:
        TypeError: The inputs are neither an array nor a tuple, or options are those of the caller.
    """
    if both := sorted(set(own) & set(options)):
        raise TypeError(f"options has {both}, which this function gives the model itself: need others, such as mask")
    if isinstance(inputs, tuple | list):
        return tuple(inputs)
    if not hasattr(inputs, "shape"):
        raise TypeError(f"{name} must be an array, or a tuple of the inputs of the model, got {type(inputs).__name__}")
    return (inputs,)


def check_layers_alone(model: Any) -> None:
    """Raises TypeError if the layers of a model cannot be called alone, as those of a `Transformer` can."""
    if not hasattr(model, "layers"):
        raise TypeError(f"model is {type(model).__name__}: need a Transformer, such as its decoder with context=")


def same_shapes(
    base: Any, source: Any, options: Mapping[str, Any], own: Sequence[str] = OWN
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Returns both inputs as tuples; options are as of `as_inputs`.

    Raises:
        TypeError: One of them is neither an array nor a tuple, or options are those of the caller.
        ValueError: They differ in shape, as prompts of unequal length do.
    """
    ours, theirs = as_inputs("base", base, options, own), as_inputs("source", source, options, own)
    shapes = [tuple(jnp.shape(x) for x in each) for each in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"base has inputs of shapes {list(shapes[0])} and source of {list(shapes[1])}: need the same, with "
            "the same number of tokens"
        )
    return ours, theirs


def as_several(edit: Any) -> tuple[Any, ...]:
    """Returns the edits of a site, one or several or None, as a tuple."""
    return () if edit is None else tuple(edit) if isinstance(edit, tuple | list) else (edit,)


def replaced_by(site: str, record: Any) -> Layers:
    """Returns the edit that puts a record of all layers in place of the values of a site.

    Raises:
        ValueError: The record is a list by layer, as shapes differ.
    """
    if isinstance(record, list):
        raise ValueError(f"the layers have {site!r} in different shapes, or not all of them: need the same in all")
    if bare_site(site) in ("scores", "weights"):
        return Layers(Pairs(jnp.zeros(len(record)), record))
    return Layers(Put(record))


def interchange(
    model: Any,
    base: Any,
    source: Any,
    metric: Metric,
    grid: Places,
    *,
    chunk: int = 1,
    restart: bool = True,
    base_edits: Mapping[str, Any] = {},
    **options: Any,
) -> Effects:
    """Returns what the values of the source do in the base, one place of the grid at a time (activation patching).

    Interchange interventions (Geiger et al., 2021; Vig et al., 2020; Meng et al., 2022).

    Args:
        model: The model.
        base: The inputs of the run that is changed: tokens, or a tuple of inputs.
        source: The inputs of the run whose values are put in, of the same shapes.
        metric: From the output of the model to a number, an array or a pytree, such as a difference of logits.
        grid: The places, such as `heads(model)`, `heads(model, site="k")` or `positions(model, range(T))`. Their edit
            is not read.
        chunk: As of `sweep`.
        restart: Whether each run begins at the layer that it edits.
        base_edits: Edits of the base, in all of its runs. With noise at the site "embed", and the same inputs in base
            and source, this is causal tracing (Meng et al., 2022).
        options: Other arguments of the model, for both runs.

    Raises:
        ValueError: The two inputs differ in shape, layers have the site in different shapes, or the model draws random
            numbers.
        TypeError: `options` has edits, record, start or state.
    """
    ours, theirs = same_shapes(base, source, options)
    grid = dataclasses.replace(grid, site=site_of("grid", grid.site))
    record = (grid.site, "resid_pre") if restart else (grid.site,)
    at_base, mine = run(model, *ours, edits=base_edits, record=record, **options)
    at_source, other = run(model, *theirs, record=(grid.site,), **options)
    grid = dataclasses.replace(grid, edit=replaced_by(grid.site, other[grid.site]))
    kept = {site: edit for site, edit in base_edits.items() if not (restart and site_of("base_edits", site) == "embed")}

    def patched(edits: Any, **start: Any) -> Any:
        edits = {site: (*as_several(kept.get(site)), *as_several(edits.get(site))) for site in {**kept, **edits}}
        return metric(model(*ours, edits=edits, **start, **options)[0])

    found = sweep(patched, grid, chunk=chunk, resid_pre=mine["resid_pre"] if restart else None)
    return Effects(found, metric(at_base), metric(at_source))


def path(
    model: Any,
    base: Any,
    source: Any,
    metric: Metric,
    senders: Places,
    receivers: Mapping[str, Bool[Array, "layers heads"] | Bool[Array, " layers"]],
    *,
    frozen: Sequence[str] | None = None,
    freeze_norms: bool = False,
    chunk: int = 1,
    **options: Any,
) -> Effects:
    """Returns what the source does in the base along the paths from single senders to the receivers.

    Three runs for each sender (Wang et al., 2022). In the first, on the base, the sender has its value of the source,
    and whatever is `frozen` has its value of the base, so that the change reaches the receivers through the residual
    stream alone. In the second the receivers have the values that they had in the first, and all else is computed.
    Without receivers the effect is the one on the output itself (the direct effect), that of the first run.

    Args:
        model: The model.
        base: As of `interchange`.
        source: As of `interchange`.
        metric: As of `interchange`.
        senders: The places of which each sends in turn, such as `heads(model)`. Their edit is not read.
        receivers: Site -> which heads of each layer receive, [L, heads of the site]; for a site without heads, such as
            mlp_post, which layers, [L].
        frozen: The sites that do not pass the change on, by default "z" and "mlp_out" of all branches, such as
            "cross.z". Without "mlp_out", paths through feed-forward blocks count too.
        freeze_norms: Whether norms divide by what they divide by in the base. The change then reaches the receivers
            linearly.
        chunk: As of `sweep`.
        options: Other arguments of the model, for all runs.

    Raises:
        ValueError: The two inputs differ in shape, or a site of the receivers is frozen.
    """
    ours, theirs = same_shapes(base, source, options)
    senders = dataclasses.replace(senders, site=site_of("senders", senders.site))
    receivers = {site_of("receivers", site): on for site, on in receivers.items()}
    kinds = [site for site in model.sites if bare_site(site) in ("z", "mlp_out")] if frozen is None else frozen
    frozen = tuple(site_of("frozen", site) for site in kinds)
    if both := sorted(set(receivers) & set(frozen)):
        raise ValueError(f"receivers has the sites {both}, which are frozen: need others, such as mlp_post for mlp_out")
    norms = [site for site in model.sites if bare_site(site).endswith("norm_scale")] if freeze_norms else []
    at_base, mine = run(model, *ours, record=(*frozen, *norms, "resid_pre"), **options)
    at_source, other = run(model, *theirs, record=(senders.site,), **options)
    grid = dataclasses.replace(senders, edit=replaced_by(senders.site, other[senders.site]))
    kept = {site: _as_it_was(site, mine[site]) for site in (*frozen, *norms)}

    def patched(edits: Any, start: Any) -> Any:
        first = {**kept, **edits}
        if senders.site in kept:
            first[senders.site] = (kept[senders.site], edits[senders.site])
        output, _, seen = model(*ours, edits=first, record=tuple(receivers), start=start, **options)
        if receivers:
            second = {site: kept[site] for site in norms}
            second |= {site: _where(on, site, seen[site]) for site, on in receivers.items()}
            output, *_ = model(*ours, edits=second, start=start, **options)
        return metric(output)

    found = sweep(patched, grid, chunk=chunk, resid_pre=mine["resid_pre"])
    return Effects(found, metric(at_base), metric(at_source))


def _as_it_was(site: str, record: Any) -> Any:
    return Put(record) if site in OF_MODEL else replaced_by(site, record)


def _where(on: Any, site: str, record: Any) -> Layers:
    """Returns the edit that puts a record in place in some layers [L], or in some heads of them [L, heads]."""
    on = jnp.asarray(on)
    if isinstance(record, list) or site in OF_MODEL or bare_site(site) in ("scores", "weights"):
        raise ValueError(f"receivers has the site {site!r}: need sites of tokens that all layers have in one shape")
    expected = (*record.shape[:1], *record.shape[-2:-1]) if on.ndim == 2 else record.shape[:1]
    if on.shape != expected:
        raise ValueError(f"receivers[{site!r}] has shape {on.shape}: need one entry per layer, or [layers, heads]")
    shape = (on.shape[0], 1, 1, *on.shape[1:], *(1,) * (record.ndim - 2 - on.ndim))
    return Layers(Put(record, on.reshape(shape)))
