"""What all mixers that call `attend` have in common: slots, dropout, and what a store needs of the call."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxattn.cache import Policy, Recent, Store, by_position, unseen
from jaxattn.cache.store import Held
from jaxattn.core.attend.api import Implementation
from jaxattn.core.attend.bias import Bias, as_bias
from jaxattn.core.attend.graph import Ancestors
from jaxattn.core.attend.maps import Dropout
from jaxattn.core.attend.mask import Explicit, as_mask, visible
from jaxattn.core.attend.measure import Measure
from jaxattn.core.attend.slots import Slots
from jaxattn.core.attend.tile import Tile
from jaxattn.nn.mixer import Mixer
from jaxattn.nn.sharding import attend_in_shards
from jaxattn.nn.spec import built, owned, part_of
from jaxattn.nn.tap import Tap, Whole
from jaxattn.nn.tokens import Tokens


class AttentionMixer(Mixer):
    """The base class of mixers that call `attend`.

    A mixer of its own projects queries and keys, and says how they are turned. The slots of the call, dropout, edits
    and records at scores and weights, and what a store asks for are the same for all.

    Attributes:
        key_heads: The number of key heads that its store holds.
        implementation: As in `attend`.
    """

    key_heads: int
    implementation: Implementation

    def _fill(
        self,
        sizes: dict[str, Any],
        *,
        score: Any,
        bias: Any,
        mask: Any,
        normalize: Any,
        score_maps: Sequence[Any],
        weight_maps: Sequence[Any],
        dtype: Any,
        rngs: nnx.Rngs,
        choice: Any = None,
    ) -> None:
        """Puts parts into the slots; specs of them are built from the sizes.

        Raises:
            TypeError: Maps are not in a tuple.
        """
        for name, given in (("score_maps", score_maps), ("weight_maps", weight_maps)):
            if not isinstance(given, list | tuple):
                raise TypeError(f"{name} must be a tuple such as (SoftCap(50.0),), got {type(given).__name__}")
        score, bias, mask, normalize, *maps = (
            built(slot, **sizes, dtype=dtype, rngs=rngs)
            for slot in (score, bias, mask, normalize, *score_maps, *weight_maps)
        )
        mask = mask if isinstance(mask, nnx.Module) else as_mask(mask)
        self.score, self.bias, self.mask, self.normalize = (owned(slot) for slot in (score, bias, mask, normalize))
        self.choice = owned(built(choice, **sizes, dtype=dtype, rngs=rngs))
        self.score_maps = nnx.data(tuple(maps[: len(score_maps)]))
        self.weight_maps = nnx.data(tuple(maps[len(score_maps) :]))

    def _drop(self, rate: float, rngs: nnx.Rngs) -> None:
        """Makes the stream of dropout on the weights.

        Raises:
            ValueError: The rate is out of range, or there is nothing to make the stream of.
        """
        if not 0 <= rate < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {rate}")
        self.dropout, self.deterministic = rate, False
        if rate and "dropout" not in rngs and "default" not in rngs:
            raise ValueError(f"dropout is {rate} but rngs has no such stream: need nnx.Rngs(0) or nnx.Rngs(dropout=0)")
        self.stream = nnx.data(rngs["dropout"].fork() if rate else None)

    def slots(self, tokens: Tokens) -> Slots:
        """Returns the slots of the call to `attend`, as they are without dropout, edits and records.

        Args:
            tokens: What stands where: their mask and bias join those of the module.
        """
        biases = [bias for bias in (as_bias(part_of(self.bias)), tokens.bias) if bias is not None]
        return Slots(
            score=part_of(self.score),
            bias=sum(biases[1:], biases[0]) if biases else None,
            score_maps=tuple(map(part_of, self.score_maps)),
            mask=tokens.shows(part_of(self.mask)),
            normalize=part_of(self.normalize),
            weight_maps=tuple(map(part_of, self.weight_maps)),
        )

    def attended(
        self,
        query: Array,
        keys: Any,
        tokens: Tokens,
        tap: Tap,
        store: Store | None,
        with_lse: bool = False,
        own: Slots | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """Returns what heads read of these keys.

        Args:
            query: [B, T, N, H], as queries meet keys.
            keys: What they attend to.
            tokens: What stands where.
            tap: Edits and records at the sites scores, weights, lse and read.
            store: The store from which the keys come, or None.
            with_lse: Whether the lse of each row stands beside the measures.
            own: The slots of the call, by default those of `slots`.

        Returns:
            The reads of the heads [B, T, N, H], and the measures that the store observes, one per slot and key head.
        """
        own = self.slots(tokens) if own is None else own
        if store is not None:
            measures = {f"store.{name}": x for name, x in store.measures(query.shape[1]).items()}
            own = dataclasses.replace(own, measures=measures)
        if self.stream is not None and not self.deterministic:
            own = dataclasses.replace(own, dropout=Dropout(self.dropout, self.stream()))
        lost = None  # which tokens need one that the store had no slot for
        if store is not None and isinstance(tokens.positions, jax.core.Tracer) and not store.retain.evicts:
            positions = jnp.broadcast_to(tokens.positions, query.shape[:2])
            lost = unseen(store, positions, own.mask)[..., None, None]
            query = jnp.where(lost, jnp.nan, query)
        own = self._chosen(own, query, keys, tokens, store)
        slots, lse = tap.join(own)
        if store is not None:
            _check_rows_alone(slots.score_maps, slots.weight_maps)
        lse = lse or with_lse
        options: dict[str, Any] = {"return_lse": lse, "implementation": self.implementation}
        # With a state positions are known to be where they are only as long as none is held before them.
        at = tokens.known if store is None else tokens.positions
        options |= {"query_positions": one_or_all(at), "key_positions": _places(keys.positions)}
        if tokens.parents is not None and self.keys_from != "context":
            slots, of_tree = _in_tree(slots, tokens, keys)
            options |= of_tree
        result = attend_in_shards(query, keys.key, keys.value, slots, **options)
        z, extras = result if lse or slots.measures else (result, {})
        decided = store is not None and isinstance(keys, Held) and store.select is not None and store.select.decides
        if tap.wants("read"):
            places = jnp.arange(keys.key.shape[1])[None, :, None] if keys.positions is None else keys.positions
            places = store.by_slot(places, keys, -1) if decided else places  # type: ignore[union-attr]
            tap("read", jnp.broadcast_to(places, (len(query), *places.shape[1:])))
        moved = store is not None and (store.retain.evicts or store.positions.shape[1] != store.span)
        if store is not None and isinstance(keys, Held) and (moved or keys.slots is not None):
            for name, (site, reducer) in tap.asked.items():
                if site in ("scores", "weights") and isinstance(reducer, Whole):
                    fill = 0.0 if site == "weights" else -jnp.inf
                    rows = by_position(extras[name].swapaxes(1, 2), keys.positions, store.span, fill)
                    extras[name] = rows.swapaxes(1, 2)
        tap.keep(extras)
        z = z if lost is None else jnp.where(lost, jnp.nan, z)  # also where the mask hides every key
        by_group = {name: x for name, x in extras.items() if name.startswith("store.")}
        measured = {name.removeprefix("store."): self._by_key_head(x) for name, x in by_group.items()}
        measured = {
            name: jnp.moveaxis(x, (-2, -1), (2, 3)) if name.startswith("select.") else x.sum(-1)
            for name, x in measured.items()
        }
        return z, ({"lse": extras["lse"]} if with_lse else {}) | measured

    def _by_key_head(self, x: Float[Array, "b s *c n"]) -> Float[Array, "b s *c k g"]:
        return x.reshape(*x.shape[:-1], self.key_heads, -1)

    def from_store(
        self, store: Store, query: Array, tokens: Tokens, tap: Tap, reads: Callable[[Held, Tap], tuple[Array, Any]]
    ) -> tuple[Array, Store]:
        """Attends to what a store shows to these queries.

        Where the policy of the store says of a step whether it reads everything, only one of the two is run.

        Args:
            store: The store, in which the tokens of the call are.
            query: [B, T, N, H], as the keys of the store are chosen by it.
            tokens: What stands where.
            tap: Edits and records.
            reads: A function of what is read, and of a tap, that returns what heads read and what was measured.

        Returns:
            What the heads read, and the store after it has observed that. Nodes of a tree are not observed.
        """
        at = jnp.broadcast_to(tokens.positions, query.shape[:2])
        whole = store.whole(query, at)
        if whole is None:
            held = store.read(query, at)
            z, measured = reads(held, tap)
            return z, store if tokens.parents is not None else store.observe(measured, held)
        self._check_decides(store, tap)

        def branch(whole: Any) -> Callable[[], Any]:
            def run() -> Any:
                held, apart = store.read(query, at, whole), tap.apart()
                z, measured = reads(held, apart)
                new = store.observe(measured, held)
                return z, {"statistics": new.statistics, "remembered": new.remembered}, apart.records

            return run

        z, changed, records = jax.lax.cond(whole.any(), branch(whole), branch(None))
        tap.records.update(records)
        return z, dataclasses.replace(store, **changed)

    def _check_decides(self, store: Store, tap: Tap) -> None:
        """Raises ValueError for what cannot be the same whether a step reads everything or not."""
        kind = type(store.select).__name__
        if self.stream is not None and not self.deterministic:
            raise ValueError(f"dropout is active, and {kind} decides by step what is read: need eval(), or dropout=0")
        for name, (site, reducer) in tap.asked.items():
            if site in ("scores", "weights") and isinstance(reducer, Measure) and reducer.over == "sum":
                raise ValueError(
                    f"record {name!r} has a number per key, and {kind} decides by step how many keys are read: need a "
                    "measure of each query, or Whole()"
                )

    def _chosen(self, own: Slots, query: Array, keys: Any, tokens: Tokens, store: Store | None) -> Slots:
        """Returns the slots with the mask of the blocks that are chosen, if any are."""
        choice = part_of(self.choice)
        if choice is None or query.shape[1] == 1:
            return own
        if tokens.documents is not None:
            raise ValueError(
                f"mask has documents, but the choice {type(choice).__name__} counts blocks from the start of a row: "
                "need one document per row, or choice=None"
            )
        places = _places(keys.positions)
        if places is not None and places.ndim == 3:
            raise ValueError(
                f"the state keeps other tokens in each head, and the choice {type(choice).__name__} needs the same in "
                "all: need a store that keeps all tokens of a prompt, such as Policy(), or choice=None"
            )
        at = tokens.known if store is None else tokens.positions
        mask = choice(query, keys.key, query_positions=one_or_all(at), key_positions=places)
        return dataclasses.replace(own, mask=mask if own.mask is None else own.mask & mask)

    def _turned_at_read(self, query: Array, keys: Held, tokens: Tokens, store: Store) -> tuple[Array, Held]:
        """Returns queries and keys turned to the places that the store gives them, which may differ by key head."""
        of_queries = jnp.broadcast_to(tokens.positions[..., None], (*query.shape[:2], keys.positions.shape[-1]))

        def turned(x: Array, positions: Array) -> Array:
            places = store.key_position(keys.positions, positions)
            by_head = jnp.moveaxis(x.reshape(*x.shape[:2], places.shape[-1], -1, x.shape[-1]), 2, 1)
            return jnp.moveaxis(self.turn(by_head, jnp.moveaxis(places, 2, 1)), 1, 2).reshape(x.shape)

        return turned(query, of_queries), keys._replace(key=turned(keys.key, keys.positions))

    def _policy(self, capacity: int, store: Policy | None) -> Policy:
        """Returns the policy of a store; by default one that keeps all that the mask lets a query see."""
        if store is not None:
            return store
        own = part_of(self.mask)
        shown = capacity + 1 if own is None or own.reach is None else max(sum(own.reach), own.reach.first + 1)
        return Policy(Recent(own.reach.first), shown) if shown <= capacity else Policy()

    def _check_documents(self, tokens: Tokens, store: Store) -> None:
        """Raises ValueError if the mask is meant within documents and the store evicts by places in the row."""
        own = part_of(self.mask)
        if store.retain.evicts and tokens.documents is not None and own is not None and not own.is_relative:
            raise ValueError(
                f"mask has documents, within which the mask of the layer is meant, but the state keeps tokens by their "
                f"place in the row ({type(store.retain).__name__}): need init_state(..., store=Policy())"
            )

    def turn(self, x: Float[Array, "b t n h"], positions: Int[Array, "#b t"]) -> Float[Array, "b t n h"]:
        """Returns queries or keys as they meet each other, from their positions [1 or B, T] or [T]."""
        raise NotImplementedError

    def reached(self, state: Store) -> Int[Array, " b"]:
        """Returns the positions at which the tokens that the state holds end."""
        return state.last + 1


def head_size(features: int, heads: int, head_dim: int | None) -> int:
    """Returns the channels per head, `head_dim` or features / heads, or raises ValueError where there are none."""
    if heads < 1:
        raise ValueError(f"heads must be at least 1, got {heads}")
    if head_dim is None and features % heads:
        raise ValueError(f"features {features} is no multiple of heads {heads}: choose another, or give head_dim")
    head_dim = features // heads if head_dim is None else head_dim
    if head_dim < 1:
        raise ValueError(f"head_dim must be at least 1, got {head_dim}")
    return head_dim


def _in_tree(slots: Slots, tokens: Tokens, keys: Any) -> tuple[Slots, dict[str, Any]]:
    """Returns the slots and positions of a call whose queries, and last keys, are nodes of a tree.

    Siblings stand at one position, so nodes are told apart by their number: queries and keys are numbered, and mask and
    bias are tables of what they are at the positions.
    """
    parents, held = jnp.asarray(tokens.parents), len(keys.key[0]) - tokens.length
    at = jnp.broadcast_to(tokens.positions, (len(keys.key), tokens.length))
    of_keys = at if keys.positions is None else jnp.broadcast_to(keys.positions[..., 0], keys.key.shape[:2])
    query, key = at[:, None, :, None], of_keys[:, None, None, :]
    of_tree = Ancestors(parents).to_array(tokens.length)
    of_tree = jnp.pad(of_tree, [(0, 0)] * (of_tree.ndim - 1) + [(held, 0)], constant_values=True)
    shown = visible(slots.mask, query, key) & of_tree
    bias = None if slots.bias is None else Bias(slots.bias(Tile(query, key, shown)))
    numbered = [jnp.where(x < 0, -1, jnp.arange(x.shape[1])) for x in (at, of_keys)]
    places = dict(zip(("query_positions", "key_positions"), numbered, strict=True))
    return dataclasses.replace(slots, mask=Explicit(shown), bias=bias), places


def one_or_all(positions: Any) -> Any:
    """Returns positions that all rows share as [T]."""
    return positions[0] if positions is not None and positions.ndim == 2 and positions.shape[0] == 1 else positions


def _places(positions: Any) -> Any:
    """Returns positions of keys [B, S, 1 or K] as `attend` takes them: [B, S], or by key head."""
    return positions if positions is None or positions.shape[-1] > 1 else one_or_all(positions[..., 0])


def _check_rows_alone(score_maps: tuple, weight_maps: tuple) -> None:
    """Raises ValueError for a map of which a row of scores or weights needs other rows than itself."""
    needs = [("score_maps", each, each.scores_need) for each in score_maps]
    needs += [("weight_maps", each, each.weights_need) for each in weight_maps]
    for slot, each, need in needs:
        if need == "matrix" or each.halo:
            raise ValueError(
                f"{slot}={each.kind} reads the scores of other queries, which a state does not hold: "
                "need state=None, or maps that look at one query at a time"
            )
