"""A small model that reads the vectors of a large one, which stays as it is (LLM Modules)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxattn import nn
from jaxattn.cache import Policy
from jaxattn.core.attend.mask import Causal, anded, as_mask
from jaxattn.models.config import TransformerConfig
from jaxattn.models.sample import in_evaluation
from jaxattn.models.transformer import Transformer
from jaxattn.nn.spec import part_of


class FrozenReader(nnx.Module):
    """logits of a small decoder whose cross-attention reads what a frozen decoder makes of the same tokens.

        cross = Spec(nn.MultiHeadAttention, heads=4, keys_from="context", context_features=512)
        cross = cross.replace(position=None, mask=Causal(), bias=Spec(Alibi.geometric))
        layer = Layer([Branch(attention), Branch(cross, gate=Spec(nn.AdapterGate), name="cross"), Branch(block)])
        model = models.FrozenReader(large, TransformerConfig(..., layers=[layer] * 4), rngs=nnx.Rngs(0))

    The context is the output of the final norm of the frozen decoder (LLM Modules, 2025). The vectors of both decoders
    stand at the same positions. A bias by distance, or `position=Rotary()`, tells attention which vectors are those of
    the token and its neighbours; without one attention has to tell by content. Only the small decoder has parameters:
    those of the frozen one are constants, which no optimiser sees and no gradient reaches. In decoding both keep a
    state, and that of the model keeps the vectors: W_k and W_v of all of them are computed in every step, or with
    `absorb=True` of none.

    Args:
        frozen: The decoder that is read. Dropout in it is off.
        config: The config of the small decoder, of the same vocabulary.
        rngs: Streams for the initial parameters, and `dropout`.

    Raises:
        TypeError: `frozen` is no `Transformer`.
        ValueError: A decoder is not causal, vocabularies differ, the small decoder has no cross-attention, or one whose
            mask is not causal, so that it would read what the frozen decoder made of later tokens.
    """

    def __init__(self, frozen: Transformer, config: TransformerConfig, *, rngs: nnx.Rngs):
        if not isinstance(frozen, Transformer):
            raise TypeError(f"frozen is {type(frozen).__name__}: need a Transformer")
        if not (frozen.config.causal and config.causal):
            which = "config" if frozen.config.causal else "frozen"
            raise ValueError(f"{which} is not causal: need two decoders, whose tokens see no later ones")
        if frozen.config.vocabulary != config.vocabulary:
            raise ValueError(
                f"frozen has a vocabulary of {frozen.config.vocabulary} and config one of {config.vocabulary}: need "
                "the same tokens"
            )
        self.reader = Transformer(config, rngs=rngs)
        crossing = [mixer for run in self.reader.runs for mixer in run.mixers if mixer.keys_from == "context"]
        if not crossing:
            raise ValueError("config has no cross-attention: need nn.MultiHeadAttention(..., keys_from='context')")
        for mixer in crossing:
            terms = anded(as_mask(part_of(mixer.mask)))
            if not any(isinstance(term, Causal) for term in terms):
                raise ValueError("config has cross-attention that sees vectors of later tokens: need mask=Causal()")
        # Plain arrays, since an `nnx.Param` would be trained.
        self._graph, state = nnx.split(in_evaluation(frozen))
        leaves, self._structure = jax.tree.flatten(state)
        self._leaves = nnx.data(leaves)

    @property
    def frozen(self) -> Transformer:
        """The frozen decoder."""
        model: Transformer = nnx.merge(self._graph, jax.tree.unflatten(self._structure, list(self._leaves)))
        return model

    @property
    def config(self) -> TransformerConfig:
        """The config of the small decoder."""
        return self.reader.config

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites of the small decoder, which calls record and edit."""
        return self.reader.sites

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        *,
        positions: Int[Array, "#b t"] | None = None,
        mask: Any = None,
        state: Any = None,
        edits: Mapping[str, Any] = {},
        record: Any = (),
    ) -> tuple[Float[Array, "b t vocabulary"], Any, dict[str, Any]]:
        """Returns the triple (logits, state, records) of the small decoder.

        Args:
            tokens: [B, T].
            positions: As of `Transformer`, for both.
            mask: As of `Transformer`, for both; with documents no token reads the vectors of another document.
            state: From `init_state` or an earlier call.
            edits: As of `Transformer`, for the small decoder.
            record: As of `Transformer`, of the small decoder.
        """
        if state is not None and positions is None:
            positions = self.reader.reached(state[1])[:, None] + jnp.arange(tokens.shape[1])
        vectors: Any
        places: Any
        of_frozen, of_reader, (vectors, places) = (None, None, (None, None)) if state is None else state
        _, of_frozen, seen = self.frozen(
            tokens, positions=positions, mask=mask, state=of_frozen, record=("final_norm",)
        )
        read = jax.lax.stop_gradient(seen["final_norm"])
        if state is None:
            context = nn.Context(read, nn.Tokens.of(read, positions=positions, mask=mask))
        else:
            new = jnp.broadcast_to(jnp.asarray(positions), tokens.shape)
            rows, slots = jnp.arange(len(vectors))[:, None], jnp.where(new < 0, vectors.shape[1], new)
            vectors = vectors.at[rows, slots].set(read.astype(vectors.dtype), mode="drop")
            places = places.at[rows, slots].set(new, mode="drop")
            context = nn.Context(vectors, nn.Tokens.of(vectors, positions=places))
        logits, of_reader, records = self.reader(
            tokens, positions=positions, mask=mask, state=of_reader, context=context, edits=edits, record=record
        )
        return logits, None if state is None else (of_frozen, of_reader, (vectors, places)), records

    def init_state(self, batch: int, capacity: int, store: Policy | None = None) -> Any:
        """Returns the state that decoding starts from: of the frozen decoder, of the small one, and the vectors.

        Args:
            batch: B.
            capacity: The most tokens of a sequence.
            store: The policy by which self-attention of both keeps and reads earlier tokens.
        """
        frozen = self.frozen
        vectors = jnp.zeros((batch, capacity, frozen.config.width), jnp.dtype(frozen.config.dtype))
        states = frozen.init_state(batch, capacity, store), self.reader.init_state(batch, capacity, store)
        return *states, (vectors, jnp.full((batch, capacity), -1, jnp.int32))
