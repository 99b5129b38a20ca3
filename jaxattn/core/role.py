"""What a trained parameter is to an optimiser, said where the parameter is made and not guessed from a name or a shape.

It is metadata of a `flax.nnx.Variable`: `nnx.Param(x, role="undecayed")`. It stays with the variable through split and
merge, vmap and jit, gradients and optimiser states.
"""

from typing import Literal

Role = Literal["hidden", "decayed", "undecayed"]
"""hidden: a matrix [..., inputs, outputs] between hidden layers; it is decayed, and Muon orthogonalises its updates.
decayed: what else multiplies activations, such as embeddings, output projections and filters. undecayed: biases, gains,
decays, step sizes, tokens, and tables by head or channel, which weight decay would pull to a value without meaning."""
