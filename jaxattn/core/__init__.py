"""The functional core: arrays and parts in, arrays out. Imports jax, numpy and jaxtyping only."""
