"""Stores: the memory that attention has of earlier tokens, in C slots.

A store combines a policy of what is kept with a policy of what is chosen to be read, and of where keys stand.
"""

from jaxattn.cache.delay import Waiting, delay_line, waiting
from jaxattn.cache.forecast import Convolutions, Forecast, Forecasted, LastRow, MeanOverTime
from jaxattn.cache.history import ByHistory, HistoryScorer
from jaxattn.cache.key_position import Absolute, AtPieces, KeyPosition, Memory, MemoryAtStart, Rank
from jaxattn.cache.probe import ActQKV
from jaxattn.cache.retain import Attended, Attentive, Everything, HeavyHitters, Recent, Retain, SnapKV, Spans, Unexpired
from jaxattn.cache.select import Landmarks, MeanKeys, QAdA, Quest, Recycled, Remembered, Select, Sizes, Step
from jaxattn.cache.storage import Dense, Paged, Quantised, Storage
from jaxattn.cache.store import Policy, Store, by_position, check_room, empty, unseen
from jaxattn.cache.triangles import Ltri

__all__ = [
    "Absolute",
    "ActQKV",
    "AtPieces",
    "Attended",
    "Attentive",
    "ByHistory",
    "Convolutions",
    "Dense",
    "Everything",
    "Forecast",
    "Forecasted",
    "HeavyHitters",
    "HistoryScorer",
    "KeyPosition",
    "Landmarks",
    "LastRow",
    "Ltri",
    "MeanKeys",
    "MeanOverTime",
    "Memory",
    "MemoryAtStart",
    "Paged",
    "Policy",
    "QAdA",
    "Quantised",
    "Quest",
    "Rank",
    "Recent",
    "Recycled",
    "Remembered",
    "Retain",
    "Select",
    "Sizes",
    "SnapKV",
    "Spans",
    "Step",
    "Storage",
    "Store",
    "Unexpired",
    "Waiting",
    "by_position",
    "check_room",
    "delay_line",
    "empty",
    "unseen",
    "waiting",
]
