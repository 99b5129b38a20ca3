"""Every slot of attend: each implementation that serves it is the oracle of slots.py, and gradients have its slopes."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from slots import DIRECTIONS, SLOTS, Slot, answer, directions, draw, places, slopes

from jaxattn import attend


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


def in_float64(name: str, scattered: bool, arrays: dict) -> dict[str, dict]:
    """By all that serve the slot in order; scattered, by dense and the one that `auto` takes for long calls."""
    served = serving(SLOTS[name])
    implementations = (served[0], served[-1]) if scattered else served
    with jax.enable_x64(True):
        return evaluate(arrays, name=name, scattered=scattered, implementations=implementations)


IN_ORDER = pytest.param(False, id="in order", marks=pytest.mark.slow)


@pytest.mark.parametrize("scattered", [IN_ORDER, pytest.param(True, id="scattered")])
@pytest.mark.parametrize("name", SLOTS)
def test_every_implementation_of_every_slot_is_the_oracle(name, scattered):
    """In float64; gradients to the error of the oracle's differences."""
    slot, where = SLOTS[name], places(scattered)
    arrays = draw(slot, where)
    out, lse = answer(slot, where, arrays)
    expected = slopes(slot, where, arrays)
    for results in in_float64(name, scattered, arrays).values():
        assert {x.dtype for x in results.values()} == {np.dtype(np.float64)}
        assert_is(results, {"out": out, "lse": lse}, 1e-13)
        for x, along in expected.items():
            gradient = np.asarray(results[x])
            found = (directions(arrays, x) * gradient).reshape(DIRECTIONS, -1).sum(-1)
            np.testing.assert_allclose(found, along, rtol=0, atol=1e-8 * max(1, np.abs(gradient).max()), err_msg=x)
            if x in slot.arrays:
                assert np.abs(gradient).max() > 1e-3, f"{x} has a gradient"
    assert (out == 0).all(-1).any(), "some rows see nothing"


# A sum here has at most T·S·N summands near 1 in size, of both signs: √ of that in epsilons, and 10 for exp and tanh.
FLOAT32 = 10 * np.sqrt(9 * 11 * 4) * np.finfo(np.float32).eps


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOTS)
def test_float32_and_bfloat16_round_the_oracle(name):
    """By the implementation that `auto` takes for long calls. bfloat16 rounds inputs, values read and results.

    Gradients are held to those of dense in float64.
    """
    slot, where = SLOTS[name], places(False)
    implementation = (serving(slot)[-1],)
    for dtype, bound in (
        (np.float32, FLOAT32),
        (ml_dtypes.bfloat16, 4 * float(ml_dtypes.finfo(ml_dtypes.bfloat16).eps)),
    ):
        arrays = draw(slot, where)
        if dtype == ml_dtypes.bfloat16:
            arrays |= {x: arrays[x].astype(dtype).astype(np.float64) for x in ("query", "key", "value")}
        out, lse = answer(slot, where, arrays)
        expected = in_float64(name, False, arrays)["dense"] | {"out": out, "lse": lse}
        own = {x: array.astype(dtype if x in ("query", "key", "value") else np.float32) for x, array in arrays.items()}
        (results,) = evaluate(own, name=name, scattered=False, implementations=implementation).values()
        assert {results[x].dtype for x in ("out", "query", "key", "value")} == {np.dtype(dtype)}
        assert results["lse"].dtype == np.float32
        assert_is(results, expected, bound)


def test_the_table_of_slots_is_complete():
    import jaxattn.core.attend as parts_of_attend
    from jaxattn.core.attend.maps import Map
    from jaxattn.core.attend.normalize import Elementwise, Normalize, Streaming

    kinds = [getattr(parts_of_attend, name) for name in parts_of_attend.__all__]
    parts = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Map | Normalize)]
    parts = {kind.__name__ for kind in parts} - {x.__name__ for x in (Map, Normalize, Streaming, Elementwise)}
    parts |= {"Dot", "Bilinear", "Additive", "Neural", "NegativeDistance", "PairSum", "Location"}
    parts |= {"Bias", "KeyBias", "Alibi", "RelativeBias", "LogGaussian"}
    assert parts == {name.split(",")[0].split(" ")[0] for name in SLOTS} - {"everything"}
