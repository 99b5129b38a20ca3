"""What heads do: statistics, detectors, factors, lenses, probes, similarity of layers."""

from jaxattn.analysis.factors import Factored, composition, copying, ov, qk
from jaxattn.analysis.heads import (
    USUAL,
    HeadScores,
    HeadStatistics,
    between_classes,
    head_scores,
    head_statistics,
    repeated_tokens,
    statistics,
)
from jaxattn.analysis.lens import Attribution, TunedLens, direct_attribution, lens, lens_loss
from jaxattn.analysis.probe import Probe, Selectivity, auroc, cka, fit_logistic, fit_ridge, hsic, selectivity
from jaxattn.analysis.similarity import attention_similarity, similar_blocks

__all__ = [
    "USUAL",
    "Attribution",
    "Factored",
    "HeadScores",
    "HeadStatistics",
    "Probe",
    "Selectivity",
    "TunedLens",
    "attention_similarity",
    "auroc",
    "between_classes",
    "cka",
    "composition",
    "copying",
    "direct_attribution",
    "fit_logistic",
    "fit_ridge",
    "head_scores",
    "head_statistics",
    "hsic",
    "lens",
    "lens_loss",
    "ov",
    "qk",
    "repeated_tokens",
    "selectivity",
    "similar_blocks",
    "statistics",
]
