"""Two identities that refuse derivatives which a custom gradient cannot give, in words that name the remedy.

JAX's own errors are about `custom_vjp` functions and loops, which the caller did not write.
"""

from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def _identity(name: str) -> Primitive:
    primitive = Primitive(name)
    primitive.def_impl(lambda x, message: x)
    primitive.def_abstract_eval(lambda x, message: x)
    mlir.register_lowering(primitive, mlir.lower_fun(lambda x, message: x, multiple_results=False))
    batching.defvectorized(primitive)
    return primitive


def _raise(*_: Any, message: str) -> Any:
    raise NotImplementedError(message)


# A tangent that is transposed, as in reverse mode, and never computed.
_tangent = _identity("tangent_of_reverse_mode")
_tangent.def_impl(_raise)
batching.primitive_batchers[_tangent] = lambda _, axes, message: _raise(message=message)
mlir.register_lowering(_tangent, _raise)
ad.deflinear2(_tangent, lambda cotangent, _, message: (cotangent,))

_reverse_only = _identity("reverse_only")
ad.primitive_jvps[_reverse_only] = lambda primals, tangents, message: (
    primals[0],
    _tangent.bind(ad.instantiate_zeros(tangents[0]), message=message),
)

_not_reversed = _identity("not_reversed")
ad.deflinear2(_not_reversed, lambda cotangent, _, message: _raise(message=message))


def reverse_only(tree: Any, message: str) -> Any:
    """Returns the same arrays. A derivative in forward mode raises NotImplementedError(message)."""
    return jax.tree.map(lambda x: _reverse_only.bind(x, message=message), tree)


def not_reversed(tree: Any, message: str) -> Any:
    """Returns the same arrays. A derivative in reverse mode raises NotImplementedError(message)."""
    return jax.tree.map(lambda x: _not_reversed.bind(x, message=message), tree)
