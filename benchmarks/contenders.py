"""Who is compared: this library and its peers, each made ready for a case, or refused with the reason.

Every contender computes out, or (out, gradients) for the same cotangent, from the same arrays.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.cases import CASES, HEAD_DIM, HEADS, RECURRENCES, WINDOW, Setting, arrays, options, positions, tokens
from benchmarks.measure import DENSE_LENGTH, Prepared, RefusedError, compile_call
from benchmarks.torch_peers import torch_fla, torch_flex, torch_sdpa
from jaxattn import Tile, attend, linear_attention
from jaxattn.core.linear import LinearState, linear_step


def _compile(forward: Callable, case: str, setting: Setting) -> Prepared:
    """forward(query, key, value, parts), and its vjp if asked for. Parts are arguments, so that they may be data."""
    if case in RECURRENCES:
        raise RefusedError("keeps all keys: its causal call is what recurrences are compared to")
    *inputs, cotangent = arrays(setting)
    given = options(case, setting)
    learned = {name: given.pop(name) for name in CASES[case].learned}

    def only_forward(query, key, value, learned, given):
        return forward(query, key, value, given | learned)

    def both(query, key, value, learned, given, cotangent):
        out, pull = jax.vjp(lambda q, k, v, x: only_forward(q, k, v, x, given), query, key, value, learned)
        return out, pull(cotangent)

    if setting.backward:
        return compile_call(both, *inputs, learned, given, cotangent)
    return compile_call(only_forward, *inputs, learned, given)


def ours(case: str, setting: Setting) -> Prepared:
    """`attend` with implementation "auto"."""

    def forward(query, key, value, parts):
        result = attend(query, key, value, **parts)
        if "measures" not in parts:
            return result
        out, extras = result  # in one array, so that what is measured is not left out of the program
        return out.at[..., : extras["mass"].shape[-1]].add(extras["mass"])

    return _compile(forward, case, setting)


def jax_nn(case: str, setting: Setting) -> Prepared:
    """`jax.nn.dot_product_attention`: causal and window by its own options, the rest by arrays [1, N or 1, T, S]."""
    if case in CASES and case not in ("full", "causal"):
        if set(CASES[case].options(setting.keys)) - {"mask", "bias"}:
            raise RefusedError("has no such part")
        if setting.queries > DENSE_LENGTH:
            raise RefusedError(f"holds T x S arrays: above T = {DENSE_LENGTH} only full and causal are timed")
    implementation: Any = "cudnn" if jax.default_backend() == "gpu" else "xla"
    own: dict[str, dict[str, Any]] = {"causal": {"is_causal": True}, "window": {"local_window_size": (WINDOW, 0)}}
    square = setting.queries == setting.keys
    query_positions, key_positions = (jnp.asarray(x) for x in positions(setting))

    def forward(query, key, value, parts):
        given: dict[str, Any] = own[case].copy() if square and case in own else {}
        places = query_positions[:, None], key_positions[None, None]
        for slot in {"mask", "bias"} & set(parts) if not given else ():
            given[slot] = (parts[slot](*places) if slot == "mask" else parts[slot](Tile(*places)))[None]
        return jax.nn.dot_product_attention(query, key, value, **given, implementation=implementation)

    return _compile(forward, case, setting)


def one_read(case: str, setting: Setting) -> Prepared:
    """Reads key and value once, the floor of decoding: their largest elements."""
    if case != "full" or setting.queries > 1:
        raise RefusedError("is the floor of decoding over a full cache, and of nothing else")
    _, key, value, _ = arrays(setting)
    return compile_call(lambda key, value: (key.max(), value.max()), key, value)


def _recurrence(form: Any, case: str, setting: Setting) -> Prepared:
    """`linear_attention` in a form, or where one token follows others `linear_step`; gradients of all its arrays."""
    if case not in RECURRENCES:
        raise RefusedError("is a form of recurrences")
    if setting.queries < setting.keys:
        if form != "step":
            raise RefusedError("has more than one token to work on")
        given = jax.tree.map(lambda x: x[:, -1], tokens(case, setting))
        memory = jnp.ones((setting.batch, HEADS, HEAD_DIM, HEAD_DIM))
        state = LinearState(memory, jnp.zeros(setting.batch, jnp.int32))
        return compile_call(lambda given, state: linear_step(**given, state=state), given, state)
    given = tokens(case, setting)

    def forward(given):
        return linear_attention(**given, form=form)[0]

    def both(given, cotangent):
        out, pull = jax.vjp(forward, given)
        return out, pull(cotangent)

    return compile_call(both, given, arrays(setting)[-1]) if setting.backward else compile_call(forward, given)


def chunk(case: str, setting: Setting) -> Prepared:
    """The form of training."""
    return _recurrence("chunk", case, setting)


def step(case: str, setting: Setting) -> Prepared:
    """The form of decoding, token by token."""
    return _recurrence("step", case, setting)


Contender = Callable[[str, Setting], Prepared]
CONTENDERS: dict[str, Contender] = {
    "jaxattn": ours,
    "jax.nn": jax_nn,
    "torch SDPA": torch_sdpa,
    "torch flex": torch_flex,
    "torch fla": torch_fla,
    "one read": one_read,
    "chunk": chunk,
    "step": step,
}
