"""An encoder and a decoder that reads its vectors: two transformers, as in T5 and Whisper."""

from collections.abc import Mapping
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from jaxattn import nn
from jaxattn.core.attend.mask import Causal, Documents, anded, as_mask
from jaxattn.models.config import TransformerConfig
from jaxattn.models.transformer import Transformer


class EncoderDecoder(nnx.Module):
    """logits of `decoder`, whose cross-attention reads the vectors of `encoder` (Vaswani et al., 2017).

        context, records = model.encode(inputs)
        logits, state, records = model.decoder(tokens, context=context)
        models.generate(model.decoder, prompts, context=context, max_new_tokens=32)

    Layers of the decoder have a branch with `nn.MultiHeadAttention(..., keys_from="context")`.

    Args:
        encoder: The config of the encoder, whose head is None.
        decoder: The config of the decoder.
        share_embedding: Whether both have one embedding (T5).
        rngs: Streams for the initial parameters, and `dropout`.

    Raises:
        ValueError: The encoder has a head, the decoder has no cross-attention, or embeddings differ where one is
            shared.
    """

    def __init__(
        self,
        encoder: TransformerConfig,
        decoder: TransformerConfig,
        *,
        share_embedding: bool = False,
        rngs: nnx.Rngs,
    ):
        if encoder.head is not None:
            raise ValueError(f"encoder has the head {encoder.head}: need None, so that it gives vectors")
        self.encoder, self.decoder = Transformer(encoder, rngs=rngs), Transformer(decoder, rngs=rngs)
        if not any(mixer.keys_from == "context" for run in self.decoder.runs for mixer in run.mixers):
            raise ValueError("decoder has no cross-attention: need nn.MultiHeadAttention(..., keys_from='context')")
        if share_embedding:
            same = encoder.embed == decoder.embed and encoder.vocabulary == decoder.vocabulary
            if not same or encoder.width != decoder.width:
                raise ValueError("share_embedding is True, but the embeddings of encoder and decoder differ")
            self.decoder.embed = self.encoder.embed

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites of the decoder, which calls of the whole record and edit; those of the encoder are its own."""
        return self.decoder.sites

    def encode(
        self,
        inputs: Shaped[Array, "b s ..."],
        *,
        positions: Int[Array, "#b s"] | None = None,
        mask: Any = None,
        edits: Mapping[str, Any] = {},
        record: Any = (),
    ) -> tuple[nn.Context, dict[str, Any]]:
        """Returns a pair: the context that the decoder reads, and the records of the encoder.

        Args:
            inputs: As of `Transformer`.
            positions: As of `Transformer`. Positions −1 are padding, which the decoder does not see either.
            mask: As of `Transformer`.
            edits: As of `Transformer`.
            record: As of `Transformer`.
        """
        for term in anded(as_mask(mask)):
            if not isinstance(term, Documents | Causal):
                raise ValueError(
                    f"mask is {type(term).__name__}, by which the decoder could not tell padding: need positions of −1 "
                    "for padding, and Documents(ids) for packed texts"
                )
        x, _, records = self.encoder(inputs, positions=positions, mask=mask, edits=edits, record=record)
        return nn.Context(x, nn.Tokens.of(x, positions=positions, mask=mask)), records

    def __call__(
        self,
        inputs: Shaped[Array, "b s ..."],
        tokens: Int[Array, "b t"],
        *,
        input_positions: Int[Array, "#b s"] | None = None,
        input_mask: Any = None,
        **options: Any,
    ) -> tuple[Float[Array, "b t vocabulary"], Any, dict[str, Any]]:
        """Returns the triple (logits, state, records) of the decoder.

        Args:
            inputs: The inputs of the encoder.
            tokens: The tokens of the decoder.
            input_positions: As `positions`, of the inputs.
            input_mask: As `mask`, of the inputs.
            options: Other arguments of `Transformer`, for the decoder.
        """
        context, _ = self.encode(inputs, positions=input_positions, mask=input_mask)
        return self.decoder(tokens, context=context, **options)
