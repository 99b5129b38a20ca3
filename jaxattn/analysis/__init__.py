"""What heads do: statistics, detectors, factors, lenses, probes, similarity of layers."""

from jaxattn.analysis.factors import Factored, composition, copying, ov, qk
from jaxattn.analysis.flow import max_flow, residual_mixing, residual_share, rollout
from jaxattn.analysis.heads import (
    USUAL,
    HeadScores,
    HeadStatistics,
    between_classes,
    head_scores,
    head_statistics,
    prefix_scores,
    repeated_tokens,
    sink_rate,
    statistics,
)
from jaxattn.analysis.lens import Attribution, TunedLens, direct_attribution, lens, lens_loss
from jaxattn.analysis.probe import Probe, Selectivity, auroc, cka, fit_logistic, fit_ridge, hsic, selectivity
from jaxattn.analysis.recall import CMRGrid, cmr_crp, cmr_distance, cmr_grid, cmr_matrix, lag_curve
from jaxattn.analysis.removal import rank_correlation, token_effects
from jaxattn.analysis.similarity import attention_similarity, similar_blocks
from jaxattn.analysis.spans import (
    SpanInfluence,
    choose_rules,
    elastic_rules,
    elastic_spans,
    removal_influence,
    span_influence,
)

__all__ = [
    "USUAL",
    "Attribution",
    "CMRGrid",
    "Factored",
    "HeadScores",
    "HeadStatistics",
    "Probe",
    "Selectivity",
    "SpanInfluence",
    "TunedLens",
    "attention_similarity",
    "auroc",
    "between_classes",
    "choose_rules",
    "cka",
    "cmr_crp",
    "cmr_distance",
    "cmr_grid",
    "cmr_matrix",
    "composition",
    "copying",
    "direct_attribution",
    "elastic_rules",
    "elastic_spans",
    "fit_logistic",
    "fit_ridge",
    "head_scores",
    "head_statistics",
    "hsic",
    "lag_curve",
    "lens",
    "lens_loss",
    "max_flow",
    "ov",
    "prefix_scores",
    "qk",
    "rank_correlation",
    "removal_influence",
    "repeated_tokens",
    "residual_mixing",
    "residual_share",
    "rollout",
    "selectivity",
    "similar_blocks",
    "sink_rate",
    "span_influence",
    "statistics",
    "token_effects",
]
