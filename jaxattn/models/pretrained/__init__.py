"""Published models: from their files and back, their configs, and the names of their weights."""

from jaxattn.models.pretrained.folder import FAMILIES, Family, load_pretrained, save_pretrained
from jaxattn.models.pretrained.loaded import Pretrained
from jaxattn.models.pretrained.packaged import PACKAGED, Archive, Packaged, fetch_weights, fetched, weights_folder
from jaxattn.models.pretrained.weights import Layout, Row, assign, published

__all__ = [
    "FAMILIES",
    "PACKAGED",
    "Archive",
    "Family",
    "Layout",
    "Packaged",
    "Pretrained",
    "Row",
    "assign",
    "fetch_weights",
    "fetched",
    "load_pretrained",
    "published",
    "save_pretrained",
    "weights_folder",
]
