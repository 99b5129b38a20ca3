"""Configs: the parts of a model, as frozen data that compares, prints and goes into YAML.

A layer is a list of residual branches, and in each branch stands a `Spec`: whatever a module of `jaxattn.nn` can be
given, a config can say.
"""

from dataclasses import dataclass, field
from typing import Literal

from jaxattn import nn
from jaxattn.nn.spec import Spec


@dataclass(frozen=True)
class Branch:
    """x + scale ⊙ gate(norm(x), norm_after(module(norm(x)))), and then norm_sum of that.

    Attributes:
        module: A mixer, a mechanism (`nn.Mechanism`), or a module that works on each token by itself.
        norm: The norm of the input of the module; None in a model with norms elsewhere.
        norm_after: The norm of the module's result, before it is added (Gemma 2).
        gate: The module called as gate(what the module reads, its result), which makes of both what is added, such as
            `Spec(nn.AdapterGate)`; None for the result itself.
        norm_sum: The norm of the sum (post-norm: the first Transformer, BERT).
        scale: The start of learned gains per channel of the added result (LayerScale, Touvron et al., 2021); None for
            none.
        name: The name that stands before the names of its sites, "cross" making `cross.z` of `z`; "" for nothing.
    """

    module: Spec
    norm: Spec | None = Spec(nn.RMSNorm)
    norm_after: Spec | None = None
    gate: Spec | None = None
    norm_sum: Spec | None = None
    scale: float | None = None
    name: str = ""


@dataclass(frozen=True)
class Layer:
    """Branches, one after the other, or side by side.

    Attributes:
        branches: The branches.
        parallel: Whether all of them read the same x, to which their results are added together (GPT-J, GPT-NeoX).

    Raises:
        TypeError: A branch is not a `Branch`.
        ValueError: There are no branches, or branches that are parallel have norms of sums.
    """

    branches: list[Branch] = field(
        default_factory=lambda: [Branch(Spec(nn.MultiHeadAttention, heads=4)), Branch(Spec(nn.FeedForward))]
    )
    parallel: bool = False

    def __post_init__(self):
        object.__setattr__(self, "branches", tuple(self.branches))  # hashable, also when it came as a list
        if not self.branches:
            raise ValueError("branches is empty: need at least one Branch")
        for branch in self.branches:
            if not isinstance(branch, Branch):
                raise TypeError(f"branches holds {branch!r}: need Branch(...)")
            if self.parallel and branch.norm_sum is not None:
                raise ValueError("a branch has norm_sum, but the branches are parallel: need norm or norm_after")


def pre_norm(mixer: Spec, feed_forward: Spec | None = Spec(nn.FeedForward), norm: Spec = Spec(nn.RMSNorm)) -> Layer:
    """Makes the layer x + mixer(norm(x)), then x + feed_forward(norm(x)).

    Args:
        mixer: The module that moves information between tokens, such as `Spec(nn.MultiHeadAttention, heads=4)`.
        feed_forward: The module that works on each token; None for a layer that is its mixer alone.
        norm: The norm of both.
    """
    return Layer([Branch(each, norm) for each in (mixer, feed_forward) if each is not None])


@dataclass(frozen=True)
class TransformerConfig:
    """A decoder, an encoder, or a vision model: embedding, layers, final norm, head.

    Attributes:
        vocabulary: The number of token ids, and of outputs at each position; bytes and their specials by default.
        length: The number of positions that the model is trained for and may generate to.
        width: D, the width of the residual stream.
        layers: The layers; equal neighbours are compiled once and scanned.
        shared: Whether equal neighbours have one set of parameters (ALBERT, Lan et al., 2020). They are layers of their
            own all the same in records, edits and states.
        causal: Whether no token sees a later one, whatever the masks of the layers say: True for decoders.
        embed: The module that makes vectors of the inputs: `nn.TokenEmbedding`, `nn.VectorEmbedding`,
            `nn.PatchEmbedding`, `nn.AudioEmbedding` or your own.
        positions: The module whose vectors are added to those of the inputs by position, such as
            `Spec(nn.PositionEmbedding)`.
        embed_norm: The norm of the sum of both (BERT).
        embed_width: The width of the embedding, its positions and its norm, from which a map with a bias leads to D
            (ALBERT, Lan et al., 2020); None for D itself.
        bias: The bias that all layers of attention add to their scores (T5), such as
            `Spec(nn.RelativePositionBias, heads=4)` of as many heads as they have.
        norm: The norm after the layers.
        head: The module that makes outputs of the normed vectors, such as `Spec(nn.Head)`; None for the vectors
            themselves.
        meta_tokens: The number of learned tokens before every sequence (Hymba), through all layers. Positions of tokens
            count from that number, and `Sinks(meta_tokens)` keeps them in sight of a window.
        remat: The values that training does not keep for the backward pass, but computes again there, layer by layer:
            "cheap", those of elementwise operations and of sums, such as norms and activations; "none"; "dots", all but
            the results of products; "full", all but the input of each layer; or the names of sites of the layers whose
            values alone are kept, such as ["attn_out", "mlp_post"].
        dtype: The dtype of the computation; parameters, norms and the residual stream are float32, or wider where
            parameters are.

    Raises:
        ValueError: A size is not positive, `meta_tokens` is negative, `dtype` is unknown, or there are no layers.
        TypeError: A layer is not a `Layer`.
    """

    vocabulary: int = 258
    length: int = 256
    width: int = 128
    layers: list[Layer] = field(default_factory=lambda: [Layer()] * 4)
    shared: bool = False
    causal: bool = True
    embed: Spec = Spec(nn.TokenEmbedding)
    positions: Spec | None = None
    embed_norm: Spec | None = None
    embed_width: int | None = None
    bias: Spec | None = None
    norm: Spec | None = Spec(nn.RMSNorm)
    head: Spec | None = Spec(nn.Head, tied=True)
    meta_tokens: int = 0
    remat: Literal["cheap", "none", "dots", "full"] | list[str] = "cheap"
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"

    def __post_init__(self):
        if not isinstance(self.remat, str):
            object.__setattr__(self, "remat", tuple(self.remat))
        elif self.remat not in ("cheap", "none", "dots", "full"):
            need = "'cheap', 'none', 'dots', 'full', or a list of sites of layers"
            raise ValueError(f"remat is {self.remat!r}: need {need}")
        object.__setattr__(self, "layers", tuple(self.layers))  # hashable, also when it came as a list
        for name in ("vocabulary", "length", "width", "embed_width"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.meta_tokens < 0:
            raise ValueError(f"meta_tokens must be at least 0, got {self.meta_tokens}")
        if self.dtype not in ("float32", "bfloat16", "float64"):
            raise ValueError(f"dtype is {self.dtype!r}: need 'float32', 'bfloat16' or 'float64'")
        if not self.layers:
            raise ValueError("layers is empty: need at least one Layer")
        for layer in self.layers:
            if not isinstance(layer, Layer):
                raise TypeError(f"layers holds {layer!r}: need Layer(...), such as pre_norm(mixer, feed_forward)")
