"""What is compared: attention calls that differ in one part, at the sizes of `settings`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import Alibi, BlockIndex, Blocks, Causal, Documents, Mass, PerHead, RelativeBias, SoftCap, Window
from jaxattn.core.attend import Neural
from jaxattn.core.attend.mask import visible
from jaxattn.core.linear import Delta, Erase

HEADS, HEAD_DIM = 8, 64
WINDOW, DOCUMENT, HIDDEN = 256, 512, 16
BLOCK, SHARE = 128, 8  # every head and block of queries reads 1 of so many blocks of keys
WINDOWS = (128, 512, 1024, 4096)  # of the heads of one layer


@dataclasses.dataclass(frozen=True)
class Setting:
    """The sizes of a call; `backward` adds the gradients of query, key, value and what the case learns."""

    batch: int
    queries: int
    keys: int
    dtype: str
    backward: bool
    key_heads: int = HEADS

    @property
    def name(self) -> str:
        lengths = f"T = S = {self.queries}" if self.queries == self.keys else f"T = {self.queries}, S = {self.keys}"
        shared = "" if self.key_heads == HEADS else f"{self.key_heads} key heads, "
        return f"{lengths}, batch {self.batch}, {shared}{self.dtype}, {self.direction}"

    @property
    def direction(self) -> str:
        return "forward + backward" if self.backward else "forward"


def settings(
    lengths: Sequence[int], cache_lengths: Sequence[int], dtypes: Sequence[str], key_heads: int = HEADS
) -> list[Setting]:
    """Training at `lengths`, both directions, and decoding one token against a cache of each of `cache_lengths`."""
    sizes = [(1, t, t, dtype, backward) for t in lengths for dtype in dtypes for backward in (False, True)]
    sizes += [(8, 1, s, dtype, False) for s in cache_lengths for dtype in dtypes]
    return [Setting(*each, key_heads) for each in sizes]


@dataclasses.dataclass(frozen=True)
class Case:
    """The options of `attend` for a number of keys, all of them parts; and those of them that get gradients."""

    options: Callable[[int], dict[str, Any]]
    learned: tuple[str, ...] = ()


def _normal(*shape: int) -> Any:
    return jax.random.normal(jax.random.key(len(shape)), shape)


def _network() -> Neural:
    return Neural(_normal(2 * HEAD_DIM, HIDDEN) / HEAD_DIM**0.5, jnp.zeros(HIDDEN), _normal(HIDDEN))


def _blocks(keys: int) -> BlockIndex:
    """Each head's choice for each block of queries, its own block and others at random."""
    count = -(-keys // BLOCK)
    return BlockIndex.from_scores(_normal(HEADS, count, count), max(count // SHARE, 1), (BLOCK, BLOCK))


CASES = {
    "full": Case(lambda keys: {}),
    "causal": Case(lambda keys: {"mask": Causal()}),
    "window": Case(lambda keys: {"mask": Window(WINDOW)}),
    "documents": Case(lambda keys: {"mask": Causal() & Documents(jnp.arange(keys) // DOCUMENT)}),
    "alibi": Case(lambda keys: {"mask": Causal(), "bias": Alibi.geometric(HEADS)}),
    "soft cap": Case(lambda keys: {"mask": Causal(), "score_maps": (SoftCap(50.0),)}),
    "bias table": Case(lambda keys: {"mask": Causal(), "bias": RelativeBias(_normal(HEADS, 32))}, ("bias",)),
    "blocks": Case(lambda keys: {"mask": Causal() & Blocks(_blocks(keys))}),
    "windows": Case(lambda keys: {"mask": PerHead(tuple(Window(w) for w in WINDOWS for _ in range(HEADS // 4)))}),
    **{f"window {w}": Case(lambda keys, w=w: {"mask": Window(w)}) for w in WINDOWS},  # type: ignore[misc]
    "mass": Case(lambda keys: {"mask": Causal(), "measures": {"mass": Mass(jnp.arange(keys) % 4, 4)}}),
    "mlp score": Case(lambda keys: {"mask": Causal(), "score": _network()}, ("score",)),
}


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """What `linear_attention` gets beside query, key and value, from the sizes [B, T, N]; and the operations of one
    token and head, forward, in units of K V: 2 to write, 2 to read, 2 to find what is erased, 2 to write that apart."""

    options: Callable[[tuple[int, ...]], dict[str, Any]]
    operations: int = 4


def _forgets(shape: tuple[int, ...], least: float, per_channel: bool = False) -> Any:
    """Log decays between `least` and 0 per token."""
    return least * jax.nn.sigmoid(_normal(*shape, *((HEAD_DIM,) if per_channel else ())))


def _strengths(shape: tuple[int, ...]) -> Delta:
    return Delta(jax.nn.sigmoid(_normal(*shape)))


def _rwkv7(shape: tuple[int, ...]) -> dict[str, Any]:
    removed = _normal(*shape, HEAD_DIM) / HEAD_DIM**0.5
    erase = Erase(-removed, removed * jax.nn.sigmoid(_normal(*shape, HEAD_DIM)))
    return {"log_decay": _forgets(shape, -(np.e**-0.5), True), "erase": erase}


RECURRENCES = {
    "no decay": Recurrence(lambda shape: {}),
    "scalar decay": Recurrence(lambda shape: {"log_decay": _forgets(shape, -0.2)}),
    "channel decay": Recurrence(lambda shape: {"log_decay": _forgets(shape, -0.2, True)}),
    "delta": Recurrence(lambda shape: {"erase": _strengths(shape)}, 6),
    "scalar delta": Recurrence(lambda shape: {"log_decay": _forgets(shape, -0.2), "erase": _strengths(shape)}, 6),
    "channel delta": Recurrence(
        lambda shape: {"log_decay": _forgets(shape, -5.0, True), "erase": _strengths(shape)}, 6
    ),
    "channel erase": Recurrence(_rwkv7, 8),
}


def positions(setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """Of queries and keys; queries are the last ones, as a cache says when it decodes."""
    return np.arange(setting.keys - setting.queries, setting.keys), np.arange(setting.keys)


def options(case: str, setting: Setting) -> dict[str, Any]:
    """The options of `attend`. Decoding passes the query's position, but for "full", which shows the plain call."""
    given = CASES[case].options(setting.keys)
    if given and setting.queries < setting.keys:
        given["query_positions"] = jnp.asarray(positions(setting)[0])
    return given


def arrays(setting: Setting) -> list[Any]:
    """query, key, value and the cotangent of the output, standard normal: [B, T or S, N, H]."""
    lengths = (setting.queries, setting.keys, setting.keys, setting.queries)
    heads = (HEADS, setting.key_heads, setting.key_heads, HEADS)
    keys = jax.random.split(jax.random.key(0), len(lengths))
    return [
        jax.random.normal(key, (setting.batch, length, count, HEAD_DIM), setting.dtype)
        for key, length, count in zip(keys, lengths, heads, strict=True)
    ]


def tokens(case: str, setting: Setting) -> dict[str, Any]:
    """The arguments of `linear_attention` for T tokens, queries and keys of length 1 on average."""
    query, key, value, _ = arrays(setting)
    shape = (setting.batch, setting.keys, HEADS)
    scaled = {"query": query / HEAD_DIM**0.5, "key": key / HEAD_DIM**0.5, "value": value}
    options = RECURRENCES[case].options(shape)
    return scaled | jax.tree.map(lambda x: jnp.asarray(x, setting.dtype), options)


def visible_pairs(case: str, setting: Setting) -> int:
    """How many (query, key) pairs the mask shows, per batch entry and head on average: the least to be computed."""
    mask = CASES[case].options(setting.keys).get("mask")
    query, key = (jnp.asarray(x) for x in positions(setting))

    def row(position: Any) -> Any:
        shown = visible(mask, position[None, None, None], key[None, None])
        return jnp.broadcast_to(shown, (*shown.shape[:-1], len(key))).sum() / shown.shape[-3]

    return int(np.asarray(jax.lax.map(row, query), np.float64).sum())
