"""Published models: from their folders and back, their configs, and the names of their weights."""

from jaxattn.models.pretrained.folder import FAMILIES, Family, Pretrained, load_pretrained, save_pretrained
from jaxattn.models.pretrained.weights import Layout, Row, assign, published

__all__ = [
    "FAMILIES",
    "Family",
    "Layout",
    "Pretrained",
    "Row",
    "assign",
    "load_pretrained",
    "published",
    "save_pretrained",
]
