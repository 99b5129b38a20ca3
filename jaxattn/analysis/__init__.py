"""Statistics of attention weights, per layer and head."""

from jaxattn.analysis.heads import HeadStatistics, head_statistics

__all__ = ["HeadStatistics", "head_statistics"]
