"""Layer lists of hybrid models, by the place of each layer."""

from collections.abc import Mapping

from jaxattn import nn
from jaxattn.core.attend.mask import Causal, Mask, Sinks, Window
from jaxattn.core.linear.feature import TaylorFeatures
from jaxattn.models.config import Layer, pre_norm
from jaxattn.nn.spec import Spec


def pattern(letters: str, mixers: Mapping[str, Spec], feed_forward: Spec | None = Spec(nn.FeedForward)) -> list[Layer]:
    """Returns one layer per letter, as in `pattern("LLA", {"L": Spec(nn.GLA, heads=4), "A": attention})`.

    Args:
        letters: The layers, from the first to the last.
        mixers: The mixer that each letter stands for.
        feed_forward: The feed-forward block of all layers.

    Raises:
        ValueError: A letter is unknown.
    """
    if unknown := set(letters) - set(mixers):
        raise ValueError(f"letters holds {sorted(unknown)}: need some of {sorted(mixers)}")
    return [pre_norm(mixers[letter], feed_forward) for letter in letters]


def based(depth: int, heads: int = 4, *, window: int = 64, key_dim: int = 16) -> list[Layer]:
    """Returns the layers of BASED (Arora et al., 2024).

    The layers are linear attention with Taylor features of degree 2, attention in a small window, and gated
    convolutions in between: "CLSCC" again and again, as in the paper's model of 360 million parameters.

    Args:
        depth: The number of layers.
        heads: The heads of both kinds of attention.
        window: The number of tokens that a query of the window layers sees.
        key_dim: The channels before the feature map.
    """
    linear = Spec(nn.LinearAttention, heads=heads, feature_map=TaylorFeatures(2), key_dim=key_dim)
    near = Spec(nn.MultiHeadAttention, heads=heads, mask=Window(window - 1))
    mixers = {"C": Spec(nn.GatedConvolution), "L": linear, "S": near}
    return pattern(("CLSCC" * depth)[:depth], mixers)


def hymba(depth: int, heads: int = 4, *, window: int, meta_tokens: int, key_heads: int | None = None) -> list[Layer]:
    """Returns the layers of Hymba (Dong et al., 2024).

    Use them as `TransformerConfig(layers=hymba(..., meta_tokens=m), meta_tokens=m)`. Every layer has parallel heads.
    The first, the middle and the last have full attention. Elsewhere attention has a window, and each second layer
    shares the keys and values of the one before it.

    Args:
        depth: The number of layers.
        heads: The heads of the attention.
        window: The number of tokens that a query sees besides the meta tokens.
        meta_tokens: The number of learned tokens before every sequence.
        key_heads: The key heads of the attention; by default `heads`.
    """
    near: Mask = Causal() & (Window(window - 1) | Sinks(meta_tokens)) if meta_tokens else Window(window - 1)
    everywhere, shares, layers = {0, depth // 2, depth - 1}, False, []
    for number in range(depth):
        far = number in everywhere
        shares = not far and not shares and number - 1 not in everywhere
        mixer = Spec(nn.hymba_heads, heads=heads, key_heads=key_heads, mask=Causal() if far else near)
        layers.append(pre_norm(mixer.replace(keys_from="layer") if shares else mixer))
    return layers
