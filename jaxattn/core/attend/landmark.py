"""Landmark attention: a token at the end of each block stands for the block (Mohtashami & Jaggi, 2023)."""
