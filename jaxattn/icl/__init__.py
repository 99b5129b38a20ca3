"""The in-context-learning laboratory: tasks × predictors → risk curves, held against closed forms.

A **task** draws prompts, a **predictor** answers them, and `compare` measures its risk by context length. `theory` and
`layer_theory` give the value that this risk must have. Tasks, functions, inputs and predictors are parts; a trained
model is one more predictor.
"""

from jaxattn.icl import capacity, dynamics, layer_theory, theory
from jaxattn.icl.bayes import BayesFinite, GF2Parity, parity_accuracy
from jaxattn.icl.boolean import (
    CNF,
    DNF,
    Conjunction,
    Disjunction,
    IntegerHalfspace,
    Majority,
    NearestNeighbour,
    Parity,
    SparseDisjunction,
    SparseParity,
    SparseThreshold,
)
from jaxattn.icl.bursts import ClassTable, ItemLabels, NearestItem
from jaxattn.icl.constructed import (
    InductionCircuit,
    debiased_gradient_step,
    induction_head,
    one_gradient_step,
    preconditioned_steps,
    superposed_gradient_steps,
)
from jaxattn.icl.descent import DebiasedDescent, GradientDescent, Newton, Preconditioned
from jaxattn.icl.function import (
    BlockwiseLinear,
    DecisionTree,
    Finite,
    Linear,
    LinearSign,
    Logistic,
    OneOf,
    Pool,
    Quadratic,
    ReluNetwork,
    ScaledValues,
    SparseLinear,
)
from jaxattn.icl.gated import GatedCopy
from jaxattn.icl.hops import Echo, PointerChasing, RetrievalChain, echo_accuracy, horizon
from jaxattn.icl.inputs import Fresh, Gaussian, Orthant, Orthogonal, Scaled, Seen, Skewed, Subspace
from jaxattn.icl.layers import LinearLayers, SoftmaxLayer
from jaxattn.icl.learners import GreedyTree, KNearestNeighbours, MajorityLabel
from jaxattn.icl.markov import MarkovBayes, MarkovChain
from jaxattn.icl.nested import Flow, NestedSoftmaxes, gradient_flow
from jaxattn.icl.network import NetworkByAdam
from jaxattn.icl.predict import Predictor, interleaved, leaks
from jaxattn.icl.prompt import Prompt, at_inputs, interleave, stack
from jaxattn.icl.readout import (
    EffectiveHeads,
    diagonality,
    effective_gamma,
    effective_heads,
    effective_kq,
    effective_ov,
    homogeneity,
    pattern_distance,
)
from jaxattn.icl.regression import Averaging, Lasso, LassoFit, LeastSquares, Ridge, Zero
from jaxattn.icl.risk import Estimate, Loss, RiskTable, compare, icl_score, logistic, mistakes, square
from jaxattn.icl.sequences import AssociativeRecall, Copying, Lookup, RepeatedBlock, additive_memory_accuracy
from jaxattn.icl.task import Curriculum, Function, FunctionTask, Inputs, Query
from jaxattn.icl.teaching import Planted, Signs, Teaching
from jaxattn.icl.topics import BlockStatistic, TopicDocuments, TopicValues, block_statistic, topic_values
from jaxattn.icl.window import Sources, WindowPosterior, WindowRecall, infer_window

__all__ = [
    "CNF",
    "DNF",
    "AssociativeRecall",
    "Averaging",
    "BayesFinite",
    "BlockStatistic",
    "BlockwiseLinear",
    "ClassTable",
    "Conjunction",
    "Copying",
    "Curriculum",
    "DebiasedDescent",
    "DecisionTree",
    "Disjunction",
    "Echo",
    "EffectiveHeads",
    "Estimate",
    "Finite",
    "Flow",
    "Fresh",
    "Function",
    "FunctionTask",
    "GF2Parity",
    "GatedCopy",
    "Gaussian",
    "GradientDescent",
    "GreedyTree",
    "InductionCircuit",
    "Inputs",
    "IntegerHalfspace",
    "ItemLabels",
    "KNearestNeighbours",
    "Lasso",
    "LassoFit",
    "LeastSquares",
    "Linear",
    "LinearLayers",
    "LinearSign",
    "Logistic",
    "Lookup",
    "Loss",
    "Majority",
    "MajorityLabel",
    "MarkovBayes",
    "MarkovChain",
    "NearestItem",
    "NearestNeighbour",
    "NestedSoftmaxes",
    "NetworkByAdam",
    "Newton",
    "OneOf",
    "Orthant",
    "Orthogonal",
    "Parity",
    "Planted",
    "PointerChasing",
    "Pool",
    "Preconditioned",
    "Predictor",
    "Prompt",
    "Quadratic",
    "Query",
    "ReluNetwork",
    "RepeatedBlock",
    "RetrievalChain",
    "Ridge",
    "RiskTable",
    "Scaled",
    "ScaledValues",
    "Seen",
    "Signs",
    "Skewed",
    "SoftmaxLayer",
    "Sources",
    "SparseDisjunction",
    "SparseLinear",
    "SparseParity",
    "SparseThreshold",
    "Subspace",
    "Teaching",
    "TopicDocuments",
    "TopicValues",
    "WindowPosterior",
    "WindowRecall",
    "Zero",
    "additive_memory_accuracy",
    "at_inputs",
    "block_statistic",
    "capacity",
    "compare",
    "debiased_gradient_step",
    "diagonality",
    "dynamics",
    "echo_accuracy",
    "effective_gamma",
    "effective_heads",
    "effective_kq",
    "effective_ov",
    "gradient_flow",
    "homogeneity",
    "horizon",
    "icl_score",
    "induction_head",
    "infer_window",
    "interleave",
    "interleaved",
    "layer_theory",
    "leaks",
    "logistic",
    "mistakes",
    "one_gradient_step",
    "parity_accuracy",
    "pattern_distance",
    "preconditioned_steps",
    "square",
    "stack",
    "superposed_gradient_steps",
    "theory",
    "topic_values",
]
