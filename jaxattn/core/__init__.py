"""The functional core: arrays and parts in, arrays out. The core imports jax, numpy and jaxtyping only."""
