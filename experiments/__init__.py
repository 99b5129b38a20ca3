"""Experiments: programs over the library, each of which reports what it measured."""
