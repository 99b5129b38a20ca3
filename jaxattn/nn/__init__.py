"""Flax NNX modules over the core: they own parameters and random streams, and call `attend` with parts.

Every token mixer has one protocol:

    mixer(x, tokens, tap, state=None, context=None) -> (y, state)
    mixer.init_state(batch, capacity) -> state      for positions below `capacity`

`Tokens` says where each token stands, `Tap` holds the edits and records, and `state` is the memory that decoding
carries (None outside it). All arguments but x may be left out.
"""

from jaxattn.nn.attention import Context, KeyValue, MultiHeadAttention
from jaxattn.nn.embedding import (
    AudioEmbedding,
    Head,
    MaskedTokenHead,
    PatchEmbedding,
    Pooler,
    PositionEmbedding,
    SinusoidalEmbedding,
    TokenEmbedding,
    VectorEmbedding,
)
from jaxattn.nn.feed_forward import FeedForward
from jaxattn.nn.gate import AdapterGate
from jaxattn.nn.hybrid import Chain, Parallel, hymba_heads
from jaxattn.nn.landmark import LandmarkAttention
from jaxattn.nn.latent import LatentAttention
from jaxattn.nn.learned import (
    AdditiveScore,
    AttentionForecast,
    BilinearScore,
    HeadMixing,
    HedgehogMap,
    KeyQueryConvolution,
    LearnedTemperature,
    NeuralScore,
    NullSoftmax,
    RandomFeatureMap,
    RelativePositionBias,
)
from jaxattn.nn.learning import TTT, NeuralMemory
from jaxattn.nn.linearized import Linearized
from jaxattn.nn.mechanisms import (
    GLA,
    HGRN2,
    RWKV7,
    ChannelMix,
    DeltaNet,
    GatedConvolution,
    HeadOutput,
    Latte,
    LinearAttention,
    LowRank,
    Projections,
    RetNet,
    ShortConvolution,
    SmearedKeys,
)
from jaxattn.nn.merged import MergedLinearAttention, MergedSoftmaxHeads
from jaxattn.nn.mixer import Mixer
from jaxattn.nn.native import NativeSparseAttention
from jaxattn.nn.norm import AcrossHeads, LayerNorm, RMSNorm
from jaxattn.nn.prefix import Prefixed, after_prefix, behind_prefix, with_prefix
from jaxattn.nn.recurrent import (
    LearningInputs,
    LinearInputs,
    Mechanism,
    MemoryInputs,
    Passed,
    Past,
    Recurrent,
    as_mixer,
)
from jaxattn.nn.sharding import RULES, SITE_AXES, made_on, on_any_mesh, partition_spec, sharding_rules, shardings
from jaxattn.nn.spec import Spec
from jaxattn.nn.state_space import S6, Mamba2, mimetic_initialization
from jaxattn.nn.tap import ALIASES, SITES, Edit, Layers, Reducer, Tap, Whole
from jaxattn.nn.titans import MemoryAsContext, memory_as_gate, memory_as_layer
from jaxattn.nn.token_types import TokenTypes
from jaxattn.nn.tokens import Tokens

__all__ = [
    "ALIASES",
    "GLA",
    "HGRN2",
    "RULES",
    "RWKV7",
    "S6",
    "SITES",
    "SITE_AXES",
    "TTT",
    "AcrossHeads",
    "AdapterGate",
    "AdditiveScore",
    "AttentionForecast",
    "AudioEmbedding",
    "BilinearScore",
    "Chain",
    "ChannelMix",
    "Context",
    "DeltaNet",
    "Edit",
    "FeedForward",
    "GatedConvolution",
    "Head",
    "HeadMixing",
    "HeadOutput",
    "HedgehogMap",
    "KeyQueryConvolution",
    "KeyValue",
    "LandmarkAttention",
    "LatentAttention",
    "Latte",
    "LayerNorm",
    "Layers",
    "LearnedTemperature",
    "LearningInputs",
    "LinearAttention",
    "LinearInputs",
    "Linearized",
    "LowRank",
    "Mamba2",
    "MaskedTokenHead",
    "Mechanism",
    "MemoryAsContext",
    "MemoryInputs",
    "MergedLinearAttention",
    "MergedSoftmaxHeads",
    "Mixer",
    "MultiHeadAttention",
    "NativeSparseAttention",
    "NeuralMemory",
    "NeuralScore",
    "NullSoftmax",
    "Parallel",
    "Passed",
    "Past",
    "PatchEmbedding",
    "Pooler",
    "PositionEmbedding",
    "Prefixed",
    "Projections",
    "RMSNorm",
    "RandomFeatureMap",
    "Recurrent",
    "Reducer",
    "RelativePositionBias",
    "RetNet",
    "ShortConvolution",
    "SinusoidalEmbedding",
    "SmearedKeys",
    "Spec",
    "Tap",
    "TokenEmbedding",
    "TokenTypes",
    "Tokens",
    "VectorEmbedding",
    "Whole",
    "after_prefix",
    "as_mixer",
    "behind_prefix",
    "hymba_heads",
    "made_on",
    "memory_as_gate",
    "memory_as_layer",
    "mimetic_initialization",
    "on_any_mesh",
    "partition_spec",
    "sharding_rules",
    "shardings",
    "with_prefix",
]
