"""`linear_attention`: associative memories of fixed size, their features, gates and forms."""

from jaxattn.core.linear.api import (
    LinearState,
    append_one,
    divide,
    linear_attention,
    linear_step,
    mixing_matrix,
    state_map,
)
from jaxattn.core.linear.feature import (
    Elu1Features,
    Features,
    HedgehogFeatures,
    IdentityFeatures,
    LogNormalFeatures,
    ReluFeatures,
    StandardizedFeatures,
    TaylorFeatures,
    UnitFeatures,
    distillation_loss,
    moment_match,
)
from jaxattn.core.linear.gate import (
    bounded_decay,
    inverse_softplus,
    lower_bounded_decay,
    retention,
    running_softmax,
    softplus_decay,
)
from jaxattn.core.linear.halo import halo
from jaxattn.core.linear.random_feature import RandomFeatures, orthogonal_gaussian
from jaxattn.core.linear.recurrence import Delta, Erase, StateMap, combine
from jaxattn.core.linear.sharded import sharded_linear_attention
from jaxattn.core.linear.state_equation import (
    StateEquation,
    attention_equation,
    gated_rnn_equation,
    normalized_equation,
    softmax_equation,
    state_space_equation,
)

__all__ = [
    "Delta",
    "Elu1Features",
    "Erase",
    "Features",
    "HedgehogFeatures",
    "IdentityFeatures",
    "LinearState",
    "LogNormalFeatures",
    "RandomFeatures",
    "ReluFeatures",
    "StandardizedFeatures",
    "StateEquation",
    "StateMap",
    "TaylorFeatures",
    "UnitFeatures",
    "append_one",
    "attention_equation",
    "bounded_decay",
    "combine",
    "distillation_loss",
    "divide",
    "gated_rnn_equation",
    "halo",
    "inverse_softplus",
    "linear_attention",
    "linear_step",
    "lower_bounded_decay",
    "mixing_matrix",
    "moment_match",
    "normalized_equation",
    "orthogonal_gaussian",
    "retention",
    "running_softmax",
    "sharded_linear_attention",
    "softmax_equation",
    "softplus_decay",
    "state_map",
    "state_space_equation",
]
