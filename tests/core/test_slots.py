"""Every slot of attend: each implementation that serves it is the oracle of slots.py, and so is every gradient."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from slots import SLOTS, Slot, answer, draw, gradients, places

from jaxattn import attend


@cache
def reference(name: str, scattered: bool, narrow: bool) -> tuple[dict, dict]:
    """(arrays, results and gradients) of the oracle; `narrow`: of arrays rounded to bfloat16."""
    where = places(scattered)
    arrays = draw(SLOTS[name], where)
    if narrow:
        arrays |= {x: arrays[x].astype(ml_dtypes.bfloat16).astype(np.float64) for x in ("query", "key", "value")}
    out, lse = answer(SLOTS[name], where, arrays)
    return arrays, {"out": out, "lse": lse} | gradients(SLOTS[name], where, arrays)


@partial(jax.jit, static_argnames=("name", "scattered", "implementations"))
def evaluate(arrays, *, name, scattered, implementations):
    slot, where = SLOTS[name], places(scattered)
    learned = {x: arrays[x] for x in ("query", "key", "value", *slot.arrays)}

    def run(implementation, learned):
        out, extras = attend(
            learned["query"],
            learned["key"],
            learned["value"],
            mask=where.mask,
            query_positions=jnp.asarray(where.query) if scattered else None,
            key_positions=jnp.asarray(where.key) if scattered else None,
            return_lse=True,
            block=(4, 3),
            implementation=implementation,
            **slot.parts(learned),
        )
        return out, extras["lse"]

    results = {}
    for implementation in implementations:
        (out, lse), pull = jax.vjp(partial(run, implementation), learned)
        cotangents = arrays["d_out"].astype(out.dtype), arrays["d_lse"].astype(lse.dtype)
        results[implementation] = {"out": out, "lse": lse} | pull(cotangents)[0]
    return results


def serving(slot: Slot) -> tuple[str, ...]:
    return ("dense", *["rows"] * slot.rows, *["tiled"] * slot.tiles)


def assert_is(actual, expected, bound):
    """Within `bound` of the oracle, relative to the largest entry or 1; infinities agree."""
    for name, exact in expected.items():
        size = max(1, np.abs(exact).max(where=np.isfinite(exact), initial=0))
        np.testing.assert_allclose(np.asarray(actual[name], np.float64), exact, rtol=0, atol=bound * size, err_msg=name)


@pytest.mark.parametrize("scattered", [False, True], ids=["in order", "scattered"])
@pytest.mark.parametrize("name", SLOTS)
def test_every_implementation_of_every_slot_is_the_oracle(name, scattered):
    """In float64; gradients to the error of the oracle's differences, where third derivatives stay below 10⁴."""
    arrays, expected = reference(name, scattered, False)
    with jax.enable_x64(True):
        found = evaluate(arrays, name=name, scattered=scattered, implementations=serving(SLOTS[name]))
    for results in found.values():
        assert {x.dtype for x in results.values()} == {np.dtype(np.float64)}
        assert_is({x: results[x] for x in ("out", "lse")}, {x: expected[x] for x in ("out", "lse")}, 1e-13)
        assert_is(results, expected, 1e-8)
    assert (expected["out"] == 0).all(-1).any(), "some rows see nothing"
    for x in SLOTS[name].arrays:
        assert np.abs(expected[x]).max() > 1e-3, f"{x} has a gradient"


# A sum here has at most T·S·N summands near 1 in size, of both signs: √ of that in epsilons, and 10 for exp and tanh.
FLOAT32 = 10 * np.sqrt(9 * 11 * 4) * np.finfo(np.float32).eps


@pytest.mark.parametrize("name", SLOTS)
def test_float32_and_bfloat16_round_the_oracle(name):
    """By the implementation that `auto` takes for long calls. bfloat16 rounds inputs, values read and results."""
    implementation = (serving(SLOTS[name])[-1],)
    for dtype, bound in (
        (np.float32, FLOAT32),
        (ml_dtypes.bfloat16, 4 * float(ml_dtypes.finfo(ml_dtypes.bfloat16).eps)),
    ):
        arrays, expected = reference(name, False, dtype == ml_dtypes.bfloat16)
        own = {x: array.astype(dtype if x in ("query", "key", "value") else np.float32) for x, array in arrays.items()}
        (results,) = evaluate(own, name=name, scattered=False, implementations=implementation).values()
        assert {results[x].dtype for x in ("out", "query", "key", "value")} == {np.dtype(dtype)}
        assert results["lse"].dtype == np.float32
        assert_is(results, expected, bound)


def test_the_table_of_slots_is_complete():
    import jaxattn
    from jaxattn.core.attend.maps import Map
    from jaxattn.core.attend.normalize import Elementwise, Normalize, Streaming

    kinds = [getattr(jaxattn, name) for name in jaxattn.__all__]
    parts = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Map | Normalize)]
    parts = {kind.__name__ for kind in parts} - {x.__name__ for x in (Map, Normalize, Streaming, Elementwise)}
    parts |= {"Dot", "Bilinear", "Additive", "Neural", "NegativeDistance", "PairSum", "Location"}
    parts |= {"Bias", "KeyBias", "Alibi", "RelativeBias", "LogGaussian"}
    assert parts == {name.split(",")[0].split(" ")[0] for name in SLOTS} - {"everything"}
