"""Changing and seeing values inside a model: sites, edits, records, and the `Tap` that holds both.

A layer calls `x = tap("site", x)` wherever there is something to change or to see. An edit is a part called as
`edit(value, where)`, with `where` the `Tokens` of the call, and at the sites `scores` and `weights` the `Tile`. An edit
is told the positions, so that it does the same in one full pass and token by token.

At `scores` an edit may also be a mask (a pair that it hides is not seen), a bias (which is added) or a score map, and
at `weights` a weight map. They join the slots of the one call to `attend`, and are served as those are.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool

from jaxattn.core.attend.bias import ScoreBias
from jaxattn.core.attend.maps import Map, Need
from jaxattn.core.attend.mask import Mask
from jaxattn.core.attend.measure import Measure, View
from jaxattn.core.attend.slots import Slots
from jaxattn.core.attend.tile import Tile
from jaxattn.core.part import part
from jaxattn.nn.sharding import SITE_AXES, constrained
from jaxattn.nn.tokens import Tokens, may_change

Value = TypeVar("Value")

KEPT = "kept"
"""The name that `jax.checkpoint` knows the values of marked sites by."""

SITES = {
    "embed": "[B, T, D] what goes into the first layer",
    "resid_pre": "[B, T, D] the residual stream before the layer",
    "mixer_norm_scale": "[B, T, 1] what the norm before the mixer divides by",
    "q": "[B, T, N, H] queries, before rotation",
    "latent": "[B, S, R] what latent attention makes keys and values of, for this call's tokens",
    "k": "[B, S, K, H] keys of this call's tokens, before rotation",
    "v": "[B, S, K, H] values of this call's tokens",
    "q_rotated": "[B, T, N, H] queries as they meet the keys",
    "k_rotated": "[B, S, K, H] keys of this call's tokens as they meet the queries",
    "scores": "[B, N, T, S] scores after bias, score maps and mask (hidden: −inf)",
    "weights": "[B, N, T, S] attention weights after weight maps, before dropout",
    "read": "[B, S, 1] positions of the keys that are read; [B, S, K] from a store whose heads keep different ones",
    "lse": "[B, T, N] the log of the total weight of each row",
    "z": "[B, T, N, H] what each head reads, before the output projection",
    "attn_out": "[B, T, D] what the mixer adds to the residual stream",
    "resid_mid": "[B, T, D] the residual stream between mixer and feed-forward block",
    "mlp_norm_scale": "[B, T, 1] what the norm before the feed-forward block divides by",
    "mlp_pre": "[B, T, F] the hidden units before the nonlinearity",
    "mlp_post": "[B, T, F] the hidden units as they are projected back",
    "mlp_out": "[B, T, D] what the feed-forward block adds to the residual stream",
    "resid": "[B, T, D] the residual stream after the layer",
    "final_norm_scale": "[B, T, 1] what the norm before the output divides by",
    "final_norm": "[B, T, D] what the output projection reads",
    "logits": "[B, T, vocabulary] the output",
}
"""Site -> what it holds, in the order in which a model comes to it. In a model, sites of layers carry a layer axis."""

OF_MODEL = ("embed", "final_norm_scale", "final_norm", "logits")
"""The sites that a model has once, and not in every layer."""

ALIASES = {
    "hook_embed": "embed",
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid",
    "ln1.hook_scale": "mixer_norm_scale",
    "ln2.hook_scale": "mlp_norm_scale",
    "ln_final.hook_scale": "final_norm_scale",
    "attn.hook_q": "q",
    "attn.hook_k": "k",
    "attn.hook_v": "v",
    "attn.hook_rot_q": "q_rotated",
    "attn.hook_rot_k": "k_rotated",
    "attn.hook_attn_scores": "scores",
    "attn.hook_pattern": "weights",
    "attn.hook_z": "z",
    "hook_attn_out": "attn_out",
    "mlp.hook_pre": "mlp_pre",
    "mlp.hook_post": "mlp_post",
    "hook_mlp_out": "mlp_out",
    "inputs_embeds": "embed",
    "hidden_states": "resid",
    "attentions": "weights",
}
"""Names of TransformerLens and of Hugging Face for the same places."""


class Edit(abc.ABC):
    """The base class of parts that change the value of a site.

    Attributes:
        scores_need: The scores that it must see, as for maps: "rows", or "tile" if it does not look along the keys,
            which makes training through it several times faster.
        weights_need: The same of weights, where "tile" is for edits that commute with a factor per row.
        of_tokens: Whether it acts by the `Tokens` of the call, and so not at scores and weights.
    """

    scores_need: ClassVar[Need] = "rows"
    weights_need: ClassVar[Need] = "rows"
    of_tokens: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(self, value: Array, where: Any) -> Array:
        """Returns the value to go on with.

        Args:
            value: The value of the site.
            where: The `Tokens` of the call; at scores and weights the `Tile`.
        """


@part
class Layers:
    """An edit with arrays of its own in every layer: each of its leaves has a leading layer axis.

    Attributes:
        edit: The edit.
        on: [L], in which layers it acts; None for all.
    """

    edit: Any
    on: Bool[Array, " layers"] | None = None


class Reducer(abc.ABC):
    """The base class of parts that make a record of the value of a site."""

    @abc.abstractmethod
    def __call__(self, value: Array, where: Any) -> Any:
        """Returns the record of a value.

        Args:
            value: The value of the site.
            where: As for edits.
        """


@part
class Whole(Reducer):
    """All of the value. At scores and weights T x S numbers per head are kept."""

    def __call__(self, value, where):
        return value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Active:
    """An edit of one layer, and whether it acts there: None for yes."""

    edit: Any
    on: Any = None

    def __call__(self, value: Array, where: Any) -> Array:
        new = self.edit(value, where)
        if new.shape != value.shape:
            raise ValueError(
                f"edit {type(self.edit).__name__} makes {new.shape} of a value of shape {value.shape}: need the same"
            )
        new, on = new.astype(value.dtype), True if self.on is None else self.on
        if isinstance(where, Tokens) and where.fixed is not None:
            free = may_change(where.fixed, where.positions)
            on = on & jnp.reshape(free, (*free.shape, *(1,) * (value.ndim - 2)))
        return new if on is True else jnp.where(on, new, value)


@part
class _Unless(Mask):
    """The mask where it is on, else no mask."""

    mask: Mask
    on: Bool[Array, ""] | bool
    fixed: Bool[Array, "#b p"] | None = None

    def __call__(self, query, key):
        off = ~jnp.asarray(self.on) | ~may_change(self.fixed, query)
        return self.mask(query, key) | off

    def bounds(self, query, key):
        possible, certain = self.mask.bounds(query, key)
        off = ~jnp.asarray(self.on)
        some_off = off if self.fixed is None else jnp.ones((), bool)
        return possible | some_off, certain | off  # where the mask shows all, so does a part of it


@part
class _Lowered(Map):
    """An edit as a map of scores or weights."""

    edit: Any
    on: Any
    fixed: Bool[Array, "#b p"] | None = None

    @property
    def scores_need(self):  # type: ignore[override]
        return "tile" if isinstance(self.edit, ScoreBias) else self.edit.scores_need

    @property
    def weights_need(self):  # type: ignore[override]
        return "tile" if isinstance(self.edit, ScoreBias) else self.edit.weights_need

    @property
    def heads_apart(self):  # type: ignore[override]
        return isinstance(self.edit, Map) and self.edit.heads_apart

    @property
    def kind(self):
        return type(self.edit).__name__

    @property
    def halo(self):
        return self.edit.halo if isinstance(self.edit, Map) else 0

    def __call__(self, x, tile):
        edit = _Added(self.edit) if isinstance(self.edit, ScoreBias) else self.edit
        new = _Active(edit, self.on)(x, tile)
        return new if self.fixed is None else jnp.where(may_change(self.fixed, tile.query), new, x)


@dataclasses.dataclass(frozen=True)
class _Added:
    """A bias as an edit."""

    bias: Any

    def __call__(self, value: Array, where: Tile) -> Array:
        return value + self.bias(where).astype(value.dtype)


@part
class _Rows(Measure):
    """Complete rows of weights, or of scores with −inf for hidden pairs."""

    of: str

    def __call__(self, view: View, tile: Tile):
        return view.weights if self.of == "weights" else jnp.where(tile.visible, view.scores, -jnp.inf)


class Tap:
    """Changes values by the edits of their sites, and keeps the records asked for: `value = tap(site, value)`.

    Args:
        edits: Site -> an edit, or a tuple of edits that act one after the other.
        record: Names of sites, each kept whole; or name -> site, or name -> (site, reducer). A reducer is called on the
            value; at scores and weights it is a measure, or `Whole()`.

    Attributes:
        records: The records so far, by name.
        kept: The sites whose values are marked for `jax.checkpoint`.

    Raises:
        ValueError: A name is no site: a record that is silently missing is the classic failure.
        TypeError: An edit or a reducer is of the wrong kind.
    """

    def __init__(self, edits: Mapping[str, Any] | None = None, record: Any = ()):
        self.edits: dict[str, tuple[_Active, ...]] = {}
        for site, given in (edits or {}).items():
            several = given if isinstance(given, tuple | list) else (given,)
            active = tuple(each if isinstance(each, _Active) else _Active(each) for each in several)
            site = site_of("edits", site)
            self.edits[site] = (*self.edits.get(site, ()), *active)
            for each in active:
                _check_edit(site, each.edit)
        self.asked = as_records(record)
        self.records: dict[str, Any] = {}
        self.kept: tuple[str, ...] = ()
        self.where: Any = None

    def at(self, where: Any) -> "Tap":
        """Returns the same tap for values that stand there: `Tokens`, or a `Tile`."""
        new = Tap.__new__(Tap)
        new.edits, new.asked, new.records, new.where = self.edits, self.asked, self.records, where
        new.kept = self.kept
        return new

    def apart(self) -> "Tap":
        """Returns the same tap with records of its own, for a function whose records are among its results."""
        new = self.at(self.where)
        new.records = {}
        return new

    def holding(self, parts: Any) -> "Tap":
        """Returns the same tap with these `parts` in place of its own."""
        new = self.at(self.where)
        new.edits, new.asked = parts
        return new

    @property
    def parts(self) -> Any:
        """A pytree of the edits and the reducers."""
        return self.edits, self.asked

    def keeping(self, sites: Iterable[str]) -> "Tap":
        """Returns the same tap, which marks the values of these sites for `jax.checkpoint`, by their names."""
        new = self.at(self.where)
        new.kept = tuple(sites)
        return new

    def only(self, sites: Iterable[str]) -> "Tap":
        """Returns the same tap, for some of the sites."""
        return self.renamed({site: site for site in sites})

    def renamed(self, names: Mapping[str, str]) -> "Tap":
        """Returns the same tap for some of the sites, name -> the name that they have inside."""
        new = self.at(self.where)
        new.edits = {names[site]: each for site, each in self.edits.items() if site in names}
        new.asked = {name: (names[site], each) for name, (site, each) in self.asked.items() if site in names}
        new.kept = tuple(names[site] for site in self.kept if site in names)
        return new

    @property
    def sites(self) -> set[str]:
        """The sites that have an edit or a record."""
        return {*self.edits, *(site for site, _ in self.asked.values())}

    def check(self, owner: Any, sites: Iterable[str]) -> None:
        """Raises ValueError if there is an edit or a record at a site that the owner does not have."""
        sites, name = list(sites), type(owner).__name__
        for record, (site, _) in self.asked.items():
            if site not in sites:
                raise ValueError(
                    f"record {record!r} is of the site {site!r}, which {name} does not have: need one of {sites}"
                )
        if unknown := sorted(set(self.edits) - set(sites)):
            raise ValueError(f"edits has the sites {unknown}, which {name} does not have: need some of {sites}")

    def wants(self, *sites: str) -> bool:
        """Returns whether there is an edit or a record at any of these sites."""
        return not self.sites.isdisjoint(sites)

    def __call__(self, site: str, value: Value) -> Value:
        for edit in self.edits.get(site, ()):
            value = edit(value, self.where)  # type: ignore[arg-type, assignment]
        for name, (asked, reducer) in self.asked.items():
            if asked == site:
                self.records[name] = reducer(value, self.where)
        if site in self.kept:
            value = checkpoint_name(value, KEPT)
        axes = SITE_AXES.get(site.rpartition(".")[2])  # without the name of the branch
        return value if axes is None else constrained(value, axes)  # type: ignore[arg-type, return-value]

    def join(self, slots: Slots) -> tuple[Slots, bool]:
        """Returns a pair: the slots of a call to `attend` with the edits and measures, and whether the lse is wanted.

        Edits at scores and weights join the maps and the mask. Records at scores and weights join the measures.
        """
        score_maps, weight_maps, mask = list(slots.score_maps), list(slots.weight_maps), slots.mask
        fixed = self.where.fixed if isinstance(self.where, Tokens) else None
        for each in self.edits.get("scores", ()):
            if isinstance(each.edit, Mask):
                plain = each.on is None and fixed is None
                more = each.edit if plain else _Unless(each.edit, jnp.asarray(each.on is None or each.on), fixed)
                mask = more if mask is None else mask & more
            else:
                score_maps.append(_Lowered(each.edit, each.on, fixed))
        weight_maps += [_Lowered(each.edit, each.on, fixed) for each in self.edits.get("weights", ())]
        measures = dict(slots.measures)
        for name, (site, reducer) in self.asked.items():
            if site in ("scores", "weights"):
                measures[name] = _Rows(site) if isinstance(reducer, Whole) else reducer
        joined = dataclasses.replace(
            slots, score_maps=tuple(score_maps), weight_maps=tuple(weight_maps), mask=mask, measures=measures
        )
        return joined, any(site == "lse" for site, _ in self.asked.values())

    def keep(self, extras: Mapping[str, Any]) -> None:
        """Keeps the measures that a call to `attend` with the joined slots returned."""
        for name, (site, reducer) in self.asked.items():
            if site in ("scores", "weights"):
                found = extras[name]
                self.records[name] = found.swapaxes(-2, -3) if isinstance(reducer, Whole) else found
            elif site == "lse":
                self.records[name] = reducer(extras["lse"], self.where)


def site_of(argument: str, name: str) -> str:
    """Returns the site of this name, or of another library's name for it, behind the name of a branch if it has one.

    Raises:
        ValueError: No site has the name.
    """
    alias = next((alias for alias in ALIASES if name == alias or name.endswith(f".{alias}")), None)
    site = name if alias is None else name.removesuffix(alias) + ALIASES[alias]
    if bare_site(site) not in SITES:
        raise ValueError(f"{argument} names the unknown site {name!r}: need one of {list(SITES)}")
    return site


def bare_site(site: str) -> str:
    """Returns the site without the name of the branch that it may stand behind."""
    return site.rpartition(".")[2]


def as_records(record: Any) -> dict[str, tuple[str, Any]]:
    """Returns name -> (site, reducer), from the argument `record` of `Tap`.

    Raises:
        ValueError: As of `Tap`, or a name begins with "store.".
        TypeError: As of `Tap`, or `record` is text.
    """
    if isinstance(record, str):
        raise TypeError(f"record is the text {record!r}: need a tuple of sites, or a dict of name -> (site, reducer)")
    if not isinstance(record, Mapping):
        record = {name: (name, Whole()) for name in record}
    found = {}
    for name, given in record.items():
        if name.startswith("store."):
            raise ValueError(
                f"record is named {name!r}: names that begin with 'store.' are those of what a store measures"
            )
        site, reducer = (given, Whole()) if isinstance(given, str) else given
        site = site_of("record", site)
        bare = bare_site(site)
        if bare == "read" and not isinstance(reducer, Whole):
            raise TypeError(f"record {name!r} is of read, where it needs Whole(): positions are of slots, not tokens")
        if bare in ("scores", "weights") and not isinstance(reducer, Whole | Measure):
            raise TypeError(
                f"record {name!r} is of {site}, where it needs a measure such as Entropy(), or Whole(); got {reducer!r}"
            )
        if bare not in ("scores", "weights") and (isinstance(reducer, Measure) or not callable(reducer)):
            raise TypeError(
                f"record {name!r} is of {site!r}, where it needs a reducer such as Whole(), got {reducer!r}"
            )
        found[name] = (site, reducer)
    return found


def _check_edit(site: str, edit: Any) -> None:
    of_scores, of_weights = isinstance(edit, Mask | ScoreBias | Map), isinstance(edit, Map)
    by_tile = isinstance(edit, Edit) and not edit.of_tokens
    fits = {"scores": of_scores or by_tile, "weights": of_weights or by_tile}
    bare = bare_site(site)
    if fits.get(bare, _is_function(edit) and not of_scores):
        return
    kinds = {"scores": "a mask, a bias, a score map or an Edit", "weights": "a weight map or an Edit"}
    of_tokens = ", which acts on tokens" if isinstance(edit, Edit) else ""
    raise TypeError(f"edits[{site!r}] must be {kinds.get(bare, 'an Edit')}, got {type(edit).__name__}{of_tokens}")


def _is_function(edit: Any) -> bool:
    return callable(edit) and not isinstance(edit, type | Mask | ScoreBias) and not hasattr(edit, "dtype")


def scanned(
    edits: Mapping[str, Any], first: int, count: int, sites: Iterable[str]
) -> tuple[Any, Callable[[Any], dict]]:
    """Splits the edits of `count` layers from `first` on into arrays for a scan, and a function of one layer.

    Args:
        edits: Site -> edits, as `as_edits` returns them.
        first: The number of the first layer.
        count: The number of layers.
        sites: The sites that these layers have.

    Returns:
        A pair (arrays, function): arrays with a layer axis of `count` entries, and a function of one entry of them that
            returns site -> edits of that layer.
    """
    sliced, plans = [], []
    for site, entries in edits.items():
        if site not in sites:
            continue
        for entry in entries:
            if isinstance(entry, Layers):
                on = None if entry.on is None else jnp.asarray(entry.on)[first : first + count]
                sliced.append((jax.tree.map(lambda x: x[first : first + count], entry.edit), on))
                plans.append((site, None))
            elif isinstance(entry, At):
                if first <= entry.layer < first + count:
                    sliced.append((None, jnp.arange(first, first + count) == entry.layer))
                    plans.append((site, entry.edit))
            else:
                sliced.append((None, None))
                plans.append((site, entry))

    def of_layer(slices: Any) -> dict[str, tuple[_Active, ...]]:
        found: dict[str, tuple[_Active, ...]] = {}
        for (site, shared), (own, on) in zip(plans, slices, strict=True):
            found[site] = (*found.get(site, ()), _Active(own if shared is None else shared, on))
        return found

    return sliced, of_layer


@dataclasses.dataclass(frozen=True)
class At:
    """An edit of a single layer.

    Attributes:
        layer: The number of the layer.
        edit: The edit.
    """

    layer: int
    edit: Any


def as_edits(edits: Mapping[str, Any] | None, layers: int) -> dict[str, tuple[Any, ...]]:
    """Returns site -> edits, each of them shared by all layers, or `Layers`, or `At` one layer.

    Raises:
        ValueError: A site is unknown, `Layers` has no axis of `layers` entries, a layer does not exist, or an edit of
            single layers stands at a site that a model has once.
        TypeError: A value is no edit.
    """
    found: dict[str, tuple[Any, ...]] = {}
    for name, given in (edits or {}).items():
        site = site_of("edits", name)
        entries: list[Any] = []
        for entry in given if isinstance(given, tuple | list) else (given,):
            if isinstance(entry, Mapping):
                for layer, several in entry.items():
                    if not isinstance(layer, int) or not 0 <= layer < layers:
                        raise ValueError(f"edits[{name!r}] has the layer {layer!r}: need one from 0 to {layers - 1}")
                    entries += [At(layer, x) for x in (several if isinstance(several, tuple | list) else (several,))]
            else:
                entries.append(entry)
        for entry in entries:
            _check_edit(site, entry.edit if isinstance(entry, Layers | At) else entry)
            if isinstance(entry, Layers | At) and site in OF_MODEL:
                raise ValueError(f"edits[{name!r}] is by layer, but a model has {site!r} once: need the edit itself")
            for leaf in jax.tree.leaves(entry) if isinstance(entry, Layers) else ():
                if jnp.shape(leaf)[:1] != (layers,):
                    raise ValueError(
                        f"edits[{name!r}]: Layers has a leaf of shape {jnp.shape(leaf)}: need {layers} layers first"
                    )
        found[site] = (*found.get(site, ()), *entries)
    return found
