"""Experiments whose numbers are held against claims that were written down before: what they are, and their runner.

    python -m jaxattn.claims run my_experiment.py --seeds 3

runs an experiment that is a file of one's own. The experiments of this library are in the folder `experiments` of its
repository, and `python -m experiments` there is the same command.
"""

from jaxattn.claims.experiment import (
    Claim,
    Curves,
    Experiment,
    Maps,
    Range,
    Result,
    at_least,
    at_most,
    check_multiple,
    check_names,
    judge,
    load,
    names,
    nearest,
    outside,
    within,
)

__all__ = [
    "Claim",
    "Curves",
    "Experiment",
    "Maps",
    "Range",
    "Result",
    "at_least",
    "at_most",
    "check_multiple",
    "check_names",
    "judge",
    "load",
    "names",
    "nearest",
    "outside",
    "within",
]
