"""dense is the float64 oracle and tiled is dense: values, lse and the gradient of every array, over covering cases."""

import cases
import jax
import ml_dtypes
import numpy as np
import pytest


def slow(number, name):
    """Whether `make test` leaves this case to other implementations: it runs all in dense, and each in one more."""
    often = {"dense": True, "rows": number % 2 == 0, "tiled": number % 2 == 1}
    return () if often[name] else pytest.mark.slow


CALLS = pytest.mark.parametrize(
    ("case", "implementation"),
    [
        pytest.param(case, name, id=f"{name}-{case}", marks=slow(number, name))
        for name in cases.IMPLEMENTATIONS
        for number, case in enumerate(cases.CASES)
    ],
)


@CALLS
def test_every_implementation_is_the_oracle(case, implementation):
    measured, expected = cases.measured(case, implementation), cases.expected(case)
    assert set(measured) == set(expected)
    for name, (reference, magnitude) in expected.items():
        cases.assert_close(measured[name], reference, magnitude, measured[name].dtype, err_msg=name)


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=slow(n, "tiled")) for n, case in enumerate(cases.CASES)]
)
def test_tiled_is_dense(case):
    tiled, dense = cases.measured(case, "tiled"), cases.measured(case, "dense")
    for name, (_, magnitude) in cases.expected(case).items():
        assert tiled[name].dtype == dense[name].dtype
        cases.assert_close(tiled[name], dense[name], magnitude, dense[name].dtype, err_msg=name)


@CALLS
def test_out_and_gradients_keep_the_dtype_of_their_array_and_lse_is_wide(case, implementation):
    measured = cases.measured(case, implementation)
    wide = np.float64 if case.dtype == np.float64 else np.float32
    assert {measured[name].dtype for name in ("out", "query", "key", "value")} == {np.dtype(case.dtype)}
    assert {x.dtype for name, x in measured.items() if name not in ("out", "query", "key", "value")} == {np.dtype(wide)}


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
def test_keys_and_values_may_differ_in_dtype(implementation, name):
    """Each gradient has its array's dtype, and the error is that of the narrower, float32."""
    narrow = cases.Case("causal", (5, 5), 4, normalize=name)
    (query, key, value), parts, positions, (d_out, d_lse) = cases.draw(narrow)
    with jax.enable_x64(True):
        call = (query, key, value.astype(np.float64)), parts, cases.MASKS["causal"][0], positions
        (out, lse), gradients = cases.evaluate(*call, (d_out, d_lse), implementation=implementation, block=4)
    for x, like in zip((out, *gradients[:3]), (call[0][2], *call[0]), strict=True):
        assert x.dtype == like.dtype
    for label, x in zip(("out", "lse", "query", "key", "value"), (out, lse, *gradients[:3]), strict=True):
        reference, magnitude = cases.expected(narrow)[label]
        cases.assert_close(x, reference, magnitude, err_msg=label)


def test_the_cases_cover_what_they_claim():
    empty = [case for case in cases.CASES if (cases.expected(case)["out"][0] == 0).all(-1).any()]
    assert {case.normalize for case in empty} == {"softmax", "sigmoid"}
    assert any("null" in case.learned for case in empty)
    assert {case.mask for case in cases.CASES} == set(cases.MASKS) - {"sinks"}  # sinks are part of "streaming"
    assert {case.dtype for case in cases.CASES} == {np.float32, np.float64, ml_dtypes.bfloat16}
    assert {len(case.batch) for case in cases.CASES} == {0, 1, 2}
