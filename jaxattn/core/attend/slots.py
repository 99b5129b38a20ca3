"""The slots of `attend`. Their list stands in this file alone."""

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
    """The parts that a call to `attend` applies to queries, keys and values, in the order in which they are applied.

    `attend(query, key, value, **vars(slots))` is the call with these slots.

    Attributes:
        score: How well a query matches a key.
        bias: The numbers that are added to a score because of where query and key stand.
        score_maps: Changes of the scores, applied in order.
        mask: The keys that a query sees.
        normalize: How scores become weights.
        weight_maps: Changes of the weights, applied in order.
        dropout: Dropout of weights, applied last, and after the measures have looked. Inside a call it is `Seeded`.
        measures: Measures of the weights, by name.
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
        """Replaces arrays and functions in the slots of mask and bias by the parts that they stand for.

        Raises:
            TypeError: An array is of the wrong kind.
        """
        return dataclasses.replace(self, mask=as_mask(self.mask), bias=as_bias(self.bias))

    @property
    def maps(self) -> tuple[Any, ...]:
        """The maps of both slots."""
        return (*self.score_maps, *self.weight_maps)
