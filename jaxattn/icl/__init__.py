"""The in-context-learning laboratory: tasks × predictors -> risk curves, held against closed forms.

A **task** draws prompts, a **predictor** answers them, `compare` measures its risk by context length, and `theory` and
`layer_theory` say what that risk must be. Tasks, functions, inputs and predictors are parts; a trained model is one
more predictor.
"""

from jaxattn.icl.descent import DebiasedDescent, GradientDescent, Newton, Preconditioned
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
from jaxattn.icl.hops import Echo, PointerChasing, RetrievalChain, echo_accuracy, horizon
from jaxattn.icl.inputs import Fresh, Gaussian, Orthant, Orthogonal, Scaled, Seen, Skewed, Subspace
from jaxattn.icl.markov import MarkovBayes, MarkovChain
from jaxattn.icl.network import NetworkByAdam
from jaxattn.icl.predict import Predictor, interleaved, leaks
from jaxattn.icl.prompt import Prompt, at_inputs, interleave, stack
from jaxattn.icl.regression import Averaging, Lasso, LeastSquares, Ridge, Zero
from jaxattn.icl.risk import Estimate, Loss, RiskTable, compare, logistic, mistakes, square
from jaxattn.icl.sequences import AssociativeRecall, Copying, Lookup, RepeatedBlock, additive_memory_accuracy
from jaxattn.icl.task import Curriculum, Function, FunctionTask, Inputs, Query

__all__ = [
    "AssociativeRecall",
    "Averaging",
    "Blocks",
    "Copying",
    "Curriculum",
    "DebiasedDescent",
    "DecisionTree",
    "Echo",
    "Estimate",
    "Fresh",
    "Function",
    "FunctionTask",
    "Gaussian",
    "GradientDescent",
    "Inputs",
    "Lasso",
    "LeastSquares",
    "Linear",
    "LinearSign",
    "Logistic",
    "Lookup",
    "Loss",
    "MarkovBayes",
    "MarkovChain",
    "NetworkByAdam",
    "Newton",
    "OneOf",
    "Orthant",
    "Orthogonal",
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
    "Skewed",
    "SparseLinear",
    "Subspace",
    "Zero",
    "additive_memory_accuracy",
    "at_inputs",
    "compare",
    "echo_accuracy",
    "horizon",
    "interleave",
    "interleaved",
    "leaks",
    "logistic",
    "mistakes",
    "square",
    "stack",
]
