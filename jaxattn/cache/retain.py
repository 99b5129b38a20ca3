"""Policies for a full store: one number per slot, and the slots with the largest stay."""

import abc
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.core.attend.measure import Measure, Received
from jaxattn.core.checks import check_range
from jaxattn.core.part import part

Slots = Float[Array, "b c g"]
Statistics = dict[str, Slots]


class Retain(abc.ABC):
    """The base class of policies that say which tokens a store keeps.

    Attributes:
        evicts: Whether the policy ever gives a slot to another token. Otherwise a store has one slot for each position.
        by_head: Whether key heads keep different tokens.
    """

    evicts: ClassVar[bool] = True
    by_head: ClassVar[bool] = False

    @property
    def measures(self) -> Mapping[str, Measure]:
        """The measures that the policy needs of the attention to the store: one number per key, as `Received`."""
        return {}

    @property
    def least(self) -> int | Array:
        """The number of tokens that the policy never evicts: a store needs more slots."""
        return 0

    def start(self, shape: tuple[int, ...]) -> Statistics:
        """Returns the statistics of empty slots, each of this shape [B, C, 1 or K]; a slot begins with them anew."""
        return {}

    @abc.abstractmethod
    def keep(self, positions: Int[Array, "b c g"], statistics: Statistics, now: Int[Array, "b 1 1"]) -> Slots:
        """Returns the worth of each slot when the newest token is at position `now`; of equals the older goes first."""

    def observe(self, statistics: Statistics, measured: Mapping[str, Slots]) -> Statistics:
        """Returns the statistics after the slots were attended to."""
        return statistics


@part
class Everything(Retain):
    """Keeps all tokens, in the slot of their position."""

    evicts: ClassVar[bool] = False

    def keep(self, positions, statistics, now):
        return positions.astype(jnp.float32)


@part
class Recent(Retain):
    """Keeps the first `sinks` tokens and the most recent ones (StreamingLLM, Xiao et al., 2024); a ring for sinks = 0.

    Attributes:
        sinks: Positions below it stay; at least 0.

    Raises:
        ValueError: `sinks` is known and negative.
    """

    sinks: Int[Array, ""] | int = 4

    def __post_init__(self):
        check_range("Recent: sinks", self.sinks, lambda x: x >= 0, "at least 0")

    @property
    def least(self):
        return self.sinks

    def keep(self, positions, statistics, now):
        return jnp.where(positions < self.sinks, jnp.inf, positions.astype(jnp.float32))


@part
class HeavyHitters(Retain):
    """Keeps the first `sinks` tokens, the last `recent`, and those with the most attention (H2O, Zhang et al., 2023).

    The attention that a slot got is Σ over queries of its weight, and over the query heads that read the key head,
    which evicts by itself. Prompts count as their queries attend; a prompt in pieces may keep other tokens than one
    read at once.

    Attributes:
        sinks: The number of first tokens that stay, at least 0.
        recent: The number of last tokens that stay, at least 1.

    Raises:
        ValueError: `sinks` or `recent` is known and below its least value.
    """

    sinks: Int[Array, ""] | int = 4
    recent: Int[Array, ""] | int = 8

    by_head: ClassVar[bool] = True

    def __post_init__(self):
        check_range("HeavyHitters: sinks", self.sinks, lambda x: x >= 0, "at least 0")
        check_range("HeavyHitters: recent", self.recent, lambda x: x >= 1, "at least 1")

    @property
    def measures(self):
        return {"mass": Received()}

    @property
    def least(self):
        return self.sinks + self.recent

    def start(self, shape):
        return {"mass": jnp.zeros(shape)}

    def keep(self, positions, statistics, now):
        protected = (positions < self.sinks) | (positions > now - self.recent)
        return jnp.where(protected, jnp.inf, statistics["mass"])

    def observe(self, statistics, measured):
        return {"mass": statistics["mass"] + measured["mass"]}
