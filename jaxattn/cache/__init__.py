"""Stores: the memory that attention has of earlier tokens, in C slots.

A store combines a policy of what is kept with a policy of what is chosen to be read, and of where keys stand.
"""

from jaxattn.cache.delay import Waiting, delay_line, waiting
from jaxattn.cache.history import ByHistory, HistoryScorer
from jaxattn.cache.key_position import Absolute, AtPieces, KeyPosition, Memory, MemoryAtStart, Rank
from jaxattn.cache.retain import Attended, Attentive, Everything, HeavyHitters, Recent, Retain, SnapKV, Spans, Unexpired
from jaxattn.cache.select import MeanKeys, Quest, Select
from jaxattn.cache.storage import Dense, Paged, Quantised, Storage
from jaxattn.cache.store import Policy, Store, by_position, check_room, empty, unseen

__all__ = [
    "Absolute",
    "AtPieces",
    "Attended",
    "Attentive",
    "ByHistory",
    "Dense",
    "Everything",
    "HeavyHitters",
    "HistoryScorer",
    "KeyPosition",
    "MeanKeys",
    "Memory",
    "MemoryAtStart",
    "Paged",
    "Policy",
    "Quantised",
    "Quest",
    "Rank",
    "Recent",
    "Retain",
    "Select",
    "SnapKV",
    "Spans",
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
