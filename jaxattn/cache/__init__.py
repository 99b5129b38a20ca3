"""Decode-time state: what attention keeps of the tokens it has seen."""

from jaxattn.cache.store import Cache, append, by_position, check_room, empty, unseen

__all__ = ["Cache", "append", "by_position", "check_room", "empty", "unseen"]
