"""The collectives of a program: what devices send to each other, how often, and where in the program."""

from typing import Any, NamedTuple

import jax

NAMES = (
    "ppermute",
    "psum",
    "psum_invariant",
    "pmax",
    "all_gather",
    "all_gather_invariant",
    "all_to_all",
    "reduce_scatter",
)


class Collective(NamedTuple):
    """One operand of a collective.

    Attributes:
        name: The primitive's name.
        times: How often it runs; of loops whose length is not known, as often as one turn of them does.
        size: The bytes that a device sends.
        in_branch: Whether it stands in a branch, which some devices may not take.
    """

    name: str
    times: int
    size: int
    in_branch: bool


def collectives(function: Any, *arrays: Any) -> list[Collective]:
    """Returns those of a function of these arrays (or their shapes)."""
    found: list[Collective] = []

    def walk(jaxpr: Any, times: int, in_branch: bool) -> None:
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            if name in NAMES:
                sizes = (x.aval.size * x.aval.dtype.itemsize for x in equation.invars)
                found.extend(Collective(name, times, size, in_branch) for size in sizes)
            inner = times * equation.params.get("length", 1) if name == "scan" else times
            for x in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                if hasattr(x, "eqns"):
                    walk(getattr(x, "jaxpr", x), inner, in_branch or name == "cond")

    walk(jax.make_jaxpr(function)(*arrays).jaxpr, 1, False)
    return found
