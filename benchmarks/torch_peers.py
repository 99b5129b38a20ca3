"""PyTorch on the CPU, where it is installed: scaled_dot_product_attention, and flex_attention where it compiles; for
recurrences the references of flash-linear-attention.

Arrays are contiguous in the layout that each takes, for the first two [B, N, T, H].
"""

import importlib
import time
from typing import Any

import jax
import numpy as np

from benchmarks.cases import (
    CASES,
    DOCUMENT,
    HEAD_DIM,
    HEADS,
    RECURRENCES,
    WINDOW,
    WINDOWS,
    Setting,
    arrays,
    positions,
    tokens,
)
from benchmarks.measure import DENSE_LENGTH, Prepared, RefusedError

try:
    torch: Any = importlib.import_module("torch")
    flex: Any = importlib.import_module("torch.nn.attention.flex_attention")
except ImportError:
    torch = None


# Cases that compare calls of this library with each other.
OUR_OWN = ("blocks", "windows", *(f"window {w}" for w in WINDOWS), "mass")


def _tensors(setting: Setting) -> list[Any]:
    if torch is None:
        raise RefusedError("is not installed")
    if jax.default_backend() != "cpu":
        raise RefusedError("is timed on the CPU only")
    if setting.key_heads != HEADS:
        raise RefusedError("is timed with as many key heads as heads")
    tensors = [
        torch.from_numpy(np.array(x, np.float32)).to(getattr(torch, setting.dtype)).transpose(1, 2).contiguous()
        for x in arrays(setting)
    ]
    return [x.requires_grad_(setting.backward and i < 3) for i, x in enumerate(tensors)]


def _visible(case: str, query: Any, key: Any) -> Any:
    """The case's mask on positions."""
    causal = key <= query
    return {
        "full": key >= 0,
        "window": causal & (key >= query - WINDOW),
        "documents": causal & (key // DOCUMENT == query // DOCUMENT),
    }.get(case, causal)


def torch_sdpa(case: str, setting: Setting) -> Prepared:
    """`scaled_dot_product_attention`: causal by its own option, other masks by a boolean [T, S]."""
    if case not in CASES:
        raise RefusedError("has no recurrence")
    if case not in ("full", "causal", "window", "documents"):
        raise RefusedError("has no such part but as an array N x T x S")
    if case not in ("full", "causal") and setting.queries > DENSE_LENGTH:
        raise RefusedError(f"needs a T x S mask: above T = {DENSE_LENGTH} only full and causal are timed")
    query, key, value, cotangent = _tensors(setting)
    given: dict[str, Any] = {}
    if case == "causal" and setting.queries == setting.keys:
        given["is_causal"] = True
    elif case != "full":
        query_positions, key_positions = (torch.from_numpy(x) for x in positions(setting))
        given["attn_mask"] = _visible(case, query_positions[:, None], key_positions)

    def run():
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, **given)
        return (out, torch.autograd.grad(out, (query, key, value), cotangent)) if setting.backward else out

    return Prepared(run, 0.0)


def _score_mod(case: str, setting: Setting) -> Any:
    """The case's change of a score, None for cases that only mask."""
    if case == "soft cap":
        cap = CASES[case].options(setting.keys)["score_maps"][0].cap
        return lambda score, b, h, i, j: cap * torch.tanh(score / cap)
    if case in ("alibi", "bias table"):  # both depend on the distance alone, and keys are not after the query
        bias = CASES[case].options(setting.keys)["bias"]
        distances = np.arange(setting.keys)
        table = torch.from_numpy(
            np.array(bias(np.zeros((1, 1, 1), int), -distances[None, None])[:, 0])
        )  # [N, distance]
        last = setting.keys - setting.queries
        return lambda score, b, h, i, j: score + table[h, torch.clamp(i + last - j, min=0)]
    return None


def torch_flex(case: str, setting: Setting) -> Prepared:
    """`flex_attention` under `torch.compile`; on the CPU it has no backward pass."""
    if case not in CASES:
        raise RefusedError("has no recurrence")
    if case == "mlp score":
        raise RefusedError("has a score_mod that sees scores, not queries and keys")
    if case in OUR_OWN:
        raise RefusedError("is compared in cases that its masks and score_mods express in a line")
    query, key, value, _ = _tensors(setting)
    if setting.backward:
        raise RefusedError("has no backward pass on the CPU")
    last = setting.keys - setting.queries
    start = time.perf_counter()
    try:
        mask = flex.create_block_mask(
            lambda b, h, i, j: _visible(case, i + last, j), None, None, setting.queries, setting.keys, device="cpu"
        )
        # Shapes are fixed, as they are for the others; the counter of recompilations starts anew.
        torch._dynamo.reset()
        function = torch.compile(flex.flex_attention, dynamic=False)
        score_mod = _score_mod(case, setting)

        def run():
            return function(query, key, value, score_mod=score_mod, block_mask=mask)

        run()
    except Exception as error:  # torch raises many types when a compiler is missing or a case is not supported
        raise RefusedError(f"does not compile here: {str(error).splitlines()[0][:120]}") from error
    return Prepared(run, time.perf_counter() - start)


# Case -> module of `fla.ops`, function, what it gets after query, key and value, and whether it takes heads first.
REFERENCES = {
    "no decay": ("linear_attn", "naive_chunk_linear_attn", (), False),
    "scalar decay": ("simple_gla", "naive_chunk_simple_gla", ("log_decay",), False),
    "channel decay": ("gla", "naive_recurrent_gla", ("log_decay",), False),
    "delta": ("delta_rule", "delta_rule_chunkwise", ("beta",), True),
    "scalar delta": ("gated_delta_rule", "naive_chunk_gated_delta_rule", ("log_decay", "beta"), False),
    "channel delta": ("kda", "naive_chunk_kda", ("log_decay", "beta"), False),
    "channel erase": ("generalized_delta_rule.dplr", "dplr_chunkwise", ("read", "write", "log_decay"), True),
}


def torch_fla(case: str, setting: Setting) -> Prepared:
    """What of flash-linear-attention runs on a CPU: its references in PyTorch, chunked where there is one such."""
    if case not in RECURRENCES:
        raise RefusedError("has recurrences only")
    if torch is None:
        raise RefusedError("needs PyTorch, which is not installed")
    if setting.queries < setting.keys or setting.dtype != "float32":
        raise RefusedError("is timed in training, in float32")
    module, name, extra, heads_first = REFERENCES[case]
    if "chunk" not in name and setting.keys > DENSE_LENGTH:
        raise RefusedError(f"loops over tokens in Python: timed up to T = {DENSE_LENGTH}")
    try:
        reference = getattr(importlib.import_module(f"fla.ops.{module}.naive"), name)
    except ImportError as error:
        raise RefusedError(f"is not installed, or not all that it imports ({error})") from error
    given = tokens(case, setting)
    given |= vars(given["erase"]) if "erase" in given else {}
    given["query"] = given["query"] * HEAD_DIM**0.5  # which every reference scales down
    wanted = [given[each] for each in ("query", "key", "value", *extra)]
    inputs = [torch.from_numpy(np.array(x, np.float32)) for x in wanted]
    cotangent = torch.from_numpy(np.array(arrays(setting)[-1], np.float32))
    if heads_first:
        inputs, cotangent = [x.transpose(1, 2).contiguous() for x in inputs], cotangent.transpose(1, 2).contiguous()
    inputs = [x.requires_grad_(setting.backward) for x in inputs]

    def run():
        out = reference(*inputs)
        out = out[0] if isinstance(out, tuple) else out
        return (out, torch.autograd.grad(out, inputs, cotangent)) if setting.backward else out

    return Prepared(run, 0.0)
