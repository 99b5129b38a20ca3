"""The role of a trained parameter for an optimiser, given where the parameter is made, not guessed from name or shape.

The role is metadata of a `flax.nnx.Variable`: `nnx.Param(x, role="undecayed")`. It stays with the variable through
split and merge, vmap and jit, gradients and optimiser states.
"""

from typing import Literal

Role = Literal["hidden", "decayed", "undecayed"]
"""hidden: a matrix [..., inputs, outputs] between hidden layers, which is decayed, and whose updates Muon
orthogonalises. decayed: other arrays that multiply activations, such as embeddings, output projections and filters.
undecayed: biases, gains, decays, step sizes, tokens, and tables by head or channel, which weight decay would pull to a
value without meaning."""
