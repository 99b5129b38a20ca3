"""Layer lists of hybrid models: which layer stands where."""

from collections.abc import Mapping

from jaxattn import nn
from jaxattn.core.attend.mask import Causal, Mask, Sinks, Window
from jaxattn.core.linear.feature import TaylorFeatures
from jaxattn.models.config import Layer, pre_norm
from jaxattn.nn.spec import Spec


def pattern(letters: str, mixers: Mapping[str, Spec], feed_forward: Spec | None = Spec(nn.FeedForward)) -> list[Layer]:
    """One layer per letter, as in `pattern("LLA", {"L": Spec(nn.GLA, heads=4), "A": attention})`.

    Args:
        letters: The layers, from the first to the last.
        mixers: What each letter stands for.
        feed_forward: Of all layers.

    Raises:
        ValueError: For an unknown letter.
    """
    if unknown := set(letters) - set(mixers):
        raise ValueError(f"letters holds {sorted(unknown)}: need some of {sorted(mixers)}")
    return [pre_norm(mixers[letter], feed_forward) for letter in letters]


def based(depth: int, heads: int = 4, *, window: int = 64, key_dim: int = 16) -> list[Layer]:
    """BASED (Arora et al., 2024): linear attention with Taylor features of degree 2, attention in a small window, and
    gated convolutions in between, "CLSCC" again and again, as its model of 360 million parameters has them.

    Args:
        depth: Number of layers.
        heads: Of both kinds of attention.
        window: Tokens that a query of the window layers sees.
        key_dim: Channels before the feature map.
    """
    linear = Spec(nn.LinearAttention, heads=heads, feature_map=TaylorFeatures(2), key_dim=key_dim)
    near = Spec(nn.MultiHeadAttention, heads=heads, mask=Window(window - 1))
    mixers = {"C": Spec(nn.GatedConvolution), "L": linear, "S": near}
    return pattern(("CLSCC" * depth)[:depth], mixers)


def hymba(depth: int, heads: int = 4, *, window: int, meta_tokens: int, key_heads: int | None = None) -> list[Layer]:
    """Hymba (Dong et al., 2024): parallel heads in every layer, full attention in the first, the middle and the last,
    and a window elsewhere, where each second layer shares the keys and values of the one before it.

    For `TransformerConfig(layers=hymba(..., meta_tokens=m), meta_tokens=m)`.

    Args:
        depth: Number of layers.
        heads: Of the attention.
        window: Tokens that a query sees besides the meta tokens.
        meta_tokens: Learned tokens before every sequence.
        key_heads: Of the attention; by default `heads`.
    """
    near: Mask = Causal() & (Window(window - 1) | Sinks(meta_tokens)) if meta_tokens else Window(window - 1)
    everywhere, shares, layers = {0, depth // 2, depth - 1}, False, []
    for number in range(depth):
        far = number in everywhere
        shares = not far and not shares and number - 1 not in everywhere
        mixer = Spec(nn.hymba, heads=heads, key_heads=key_heads, mask=Causal() if far else near)
        layers.append(pre_norm(mixer.replace(keys_from="layer") if shares else mixer))
    return layers
