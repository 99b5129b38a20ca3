"""The in-context-learning laboratory: tasks × predictors -> risk curves, held against closed forms.

A **task** draws prompts, a **predictor** answers them, `compare` measures its risk by context length, and `theory` says
what that risk must be. Tasks, functions, inputs and predictors are parts; a trained model is one more predictor.
"""

from jaxattn.icl.function import (
    Blocks,
    DecisionTree,
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
from jaxattn.icl.inputs import Fresh, Gaussian, Orthant, Orthogonal, Scaled, Seen, Skewed, Subspace
from jaxattn.icl.predict import Predictor, interleaved, leaks
from jaxattn.icl.prompt import Prompt, at_inputs, interleave, stack
from jaxattn.icl.regression import Averaging, LeastSquares, Ridge, Zero
from jaxattn.icl.risk import Estimate, RiskTable, compare, logistic, mistakes, square
from jaxattn.icl.task import Curriculum, Function, FunctionTask, Inputs, Query

__all__ = [
    "Averaging",
    "Blocks",
    "Curriculum",
    "DecisionTree",
    "Estimate",
    "Fresh",
    "Function",
    "FunctionTask",
    "Gaussian",
    "Inputs",
    "LeastSquares",
    "Linear",
    "LinearSign",
    "Logistic",
    "OneOf",
    "Orthant",
    "Orthogonal",
    "Pool",
    "Predictor",
    "Prompt",
    "Quadratic",
    "Query",
    "ReluNetwork",
    "Ridge",
    "RiskTable",
    "Scaled",
    "ScaledValues",
    "Seen",
    "Skewed",
    "SparseLinear",
    "Subspace",
    "Zero",
    "at_inputs",
    "compare",
    "interleave",
    "interleaved",
    "leaks",
    "logistic",
    "mistakes",
    "square",
    "stack",
]
