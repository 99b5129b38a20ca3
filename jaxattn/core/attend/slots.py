"""The slots of `attend`: the one place where the list of them stands."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxattn.core.attend.bias import ScoreBias, as_bias
from jaxattn.core.attend.maps import Dropout, Map, Seeded
from jaxattn.core.attend.mask import Mask, as_mask
from jaxattn.core.attend.measure import Measure
from jaxattn.core.attend.normalize import Normalize, Softmax
from jaxattn.core.attend.score import Dot, Score
from jaxattn.core.part import part


@part
class Slots:
    """What a call to `attend` does with queries, keys and values, in the order in which it is done.

    `attend(query, key, value, **vars(slots))` is the call with these slots.

    Attributes:
        score: How well a query matches a key.
        bias: What is added to a score because of where both stand.
        score_maps: What is done to the scores, one map after the other.
        mask: Which keys a query sees.
        normalize: How scores become weights.
        weight_maps: What is done to the weights, one map after the other.
        dropout: Which weights are dropped; last, and after the measures have looked. `Seeded` inside a call.
        measures: What is measured of the weights, by name.
    """

    score: Score = Dot()
    bias: ScoreBias | None = None
    score_maps: tuple[Map, ...] = ()
    mask: Mask | None = None
    normalize: Normalize = Softmax()
    weight_maps: tuple[Map, ...] = ()
    dropout: Dropout | Seeded | None = None
    measures: Mapping[str, Measure] = dataclasses.field(default_factory=dict)

    def in_parts(self) -> "Slots":
        """With the parts that arrays and functions in the slots of mask and bias stand for.

        Raises TypeError for an array of the wrong kind.
        """
        return dataclasses.replace(self, mask=as_mask(self.mask), bias=as_bias(self.bias))

    @property
    def maps(self) -> tuple[Any, ...]:
        """The maps of both slots."""
        return (*self.score_maps, *self.weight_maps)
