"""Layer lists of hybrid models: which layer stands where."""

from collections.abc import Mapping

from jaxattn.core.attend.mask import Causal, Mask, Sinks, Window
from jaxattn.core.linear.feature import TaylorFeatures
from jaxattn.models.config import Attention, FeedForward, Layer, Mixer
from jaxattn.models.hybrid import Hymba
from jaxattn.models.recurrent import GatedConvolution, LinearAttention


def pattern(letters: str, mixers: Mapping[str, Mixer], feed_forward: FeedForward = FeedForward()) -> list[Layer]:
    """One layer per letter, as in `pattern("LLA", {"L": GLA(), "A": Attention()})`.

    Raises ValueError for an unknown letter.
    """
    if unknown := set(letters) - set(mixers):
        raise ValueError(f"letters holds {sorted(unknown)}: need some of {sorted(mixers)}")
    return [Layer(mixers[letter], feed_forward) for letter in letters]


def based(depth: int, heads: int = 4, *, window: int = 64, key_dim: int = 16) -> list[Layer]:
    """BASED (Arora et al., 2024): linear attention with Taylor features of degree 2, attention in a small window, and
    gated convolutions in between, "CLSCC" again and again, as its model of 360 million parameters has them.

    depth: number of layers. window: tokens that a query of the window layers sees. key_dim: channels before the map.
    """
    linear = LinearAttention(heads, TaylorFeatures(2), key_dim=key_dim)
    mixers = {"C": GatedConvolution(), "L": linear, "S": Attention(heads, mask=Window(window - 1))}
    return pattern(("CLSCC" * depth)[:depth], mixers)


def hymba(depth: int, heads: int = 4, *, window: int, meta_tokens: int, key_heads: int | None = None) -> list[Layer]:
    """Hymba (Dong et al., 2024): parallel heads in every layer, full attention in the first, the middle and the last,
    and a window elsewhere, where each second layer shares the keys and values of the one before it.

    For `DecoderConfig(layers=hymba(..., meta_tokens=m), meta_tokens=m)`. window: tokens that a query sees besides them.
    """
    near: Mask = Causal() & (Window(window - 1) | Sinks(meta_tokens)) if meta_tokens else Window(window - 1)
    everywhere, shares, layers = {0, depth // 2, depth - 1}, False, []
    for number in range(depth):
        far = number in everywhere
        shares = not far and not shares and number - 1 not in everywhere
        mask = Causal() if far else near
        layers.append(Layer(Hymba(heads, key_heads, mask, own_keys=not shares)))
    return layers
