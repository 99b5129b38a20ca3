"""A call that could not mean anything is refused at the boundary: the argument, what came, what would be right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import IMPLEMENTATIONS, assert_close

from jaxattn import (
    Alibi,
    Bias,
    Causal,
    Documents,
    Dot,
    Dropout,
    Explicit,
    Lengths,
    Score,
    Sigmoid,
    Sinks,
    SoftCap,
    Softmax,
    Window,
    attend,
    explain,
    part,
)
from jaxattn.core.attend.normalize import Normalize


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


GOOD = {"query": zeros(2, 5, 8, 4), "key": zeros(2, 7, 2, 4), "value": zeros(2, 7, 4, 3)}

# (what is changed in the good call, the exception, its message)
BAD = {
    "key heads": ({"key": zeros(2, 7, 3, 4)}, ValueError, "key has 3 heads but query has 8: need a divisor of 8"),
    "value heads": ({"value": zeros(2, 7, 5, 3)}, ValueError, "value has 5 heads but query has 8: need a divisor of 8"),
    "too many heads": ({"key": zeros(2, 7, 16, 4)}, ValueError, "key has 16 heads but query has 8"),
    "head dim": (
        {"key": zeros(2, 7, 2, 5)},
        ValueError,
        "query has head dim 4 but key has 5: Dot needs them to be equal",
    ),
    "key batch": (
        {"key": zeros(3, 7, 2, 4)},
        ValueError,
        r"key has batch axes \(3,\) but query has \(2,\): need the same",
    ),
    "value batch": ({"value": zeros(7, 4, 3)}, ValueError, r"value has batch axes \(\) but query has \(2,\)"),
    "value length": ({"value": zeros(2, 6, 4, 3)}, ValueError, "value has length 6 but key has 7: need the same"),
    "too few axes": (
        {"query": zeros(5, 4)},
        ValueError,
        r"query has shape \(5, 4\): need \[\.\.\., length, heads, head dim\]",
    ),
    "integer query": (
        {"query": zeros(2, 5, 8, 4, dtype=np.int32)},
        TypeError,
        "query has dtype int32: need floating point",
    ),
    "boolean value": ({"value": zeros(2, 7, 4, 3, dtype=bool)}, TypeError, "value has dtype bool: need floating point"),
    "list": ({"key": [[[1.0]]]}, TypeError, "key must be an array, got list"),
    "no queries": (
        {"query": zeros(2, 0, 8, 4)},
        ValueError,
        r"query has shape \(2, 0, 8, 4\): no axis may be empty",
    ),
    "no keys": (
        {"key": zeros(2, 0, 2, 4), "value": zeros(2, 0, 4, 3)},
        ValueError,
        r"key has shape \(2, 0, 2, 4\): no axis may be empty",
    ),
    "positions length": (
        {"query_positions": np.arange(6)},
        ValueError,
        r"query_positions has shape \(6,\): need \[\.\.\., 5\] with batch axes that fit \(2,\)",
    ),
    "positions batch": (
        {"key_positions": zeros(3, 7, dtype=np.int32)},
        ValueError,
        r"key_positions has shape \(3, 7\): need \[\.\.\., 7\] with batch axes that fit \(2,\)",
    ),
    "positions axes": (
        {"key_positions": zeros(1, 2, 7, dtype=np.int32)},
        ValueError,
        r"key_positions has shape \(1, 2, 7\)",
    ),
    "positions dtype": (
        {"query_positions": zeros(5)},
        TypeError,
        "query_positions must be an integer array, got float32",
    ),
    "positions list": ({"query_positions": [0] * 5}, TypeError, "query_positions must be an integer array, got list"),
    "implementation": (
        {"implementation": "flash"},
        ValueError,
        "implementation 'flash' is unknown: need 'auto', 'dense', 'rows', 'tiled', 'fused'",
    ),
    "block of 0": ({"block": 0}, ValueError, "block must be at least 1, got 0"),
    "block pair": ({"block": (4, -1)}, ValueError, r"block must be at least 1, got \(4, -1\)"),
    "block triple": ({"block": (4, 4, 4)}, TypeError, r"block must be an int or a tuple of two, .* got \(4, 4, 4\)"),
    "block float": ({"block": 4.0}, TypeError, r"block must be an int or a tuple of two, .* got 4\.0"),
    "block bool": ({"block": True}, TypeError, "block must be an int or a tuple of two, .* got True"),
    "mask heads": (
        {"mask": Explicit(zeros(3, 5, 7, dtype=bool))},
        ValueError,
        r"mask gives shape \(3, 5, 7\): need one that broadcasts to \(2, 8, 5, 7\)",
    ),
    "mask dtype": (
        {"mask": Explicit(zeros(1, 5, 7))},
        TypeError,
        r"mask: Explicit.array must be Bool.*, got float32\[1,5,7\]",
    ),
    "mask inside": (
        {"mask": Causal() & ~Documents(zeros(7))},
        TypeError,
        r"mask: Documents.ids must be Int.*, got float32\[7\]",
    ),
    "lengths dtype": ({"mask": Lengths(zeros(2))}, TypeError, r"mask: Lengths.lengths must be Int.*, got float32\[2\]"),
    "lengths batch": (
        {"mask": Lengths(zeros(3, dtype=np.int32))},
        ValueError,
        r"mask gives shape \(3, 1, 1, 7\): need one that broadcasts to \(2, 8, 5, 7\)",
    ),
    "bias heads": (
        {"bias": Bias(zeros(3, 5, 7))},
        ValueError,
        r"bias gives shape \(3, 5, 7\): need one that broadcasts to \(2, 8, 5, 7\)",
    ),
    "slopes": ({"bias": Alibi(zeros(4))}, ValueError, r"bias gives shape \(4, 5, 7\): need one that broadcasts to"),
    "slopes rank": (
        {"bias": Alibi(zeros(8, 1))},
        TypeError,
        r"bias: Alibi.slopes must be Float.*heads.*, got float32\[8,1\]",
    ),
    "mask list": (
        {"mask": Explicit([[[True]]])},
        TypeError,
        r"mask: Explicit.array must be Bool.*, got \[\[\[True\]\]\]",
    ),
    "slopes list": ({"bias": Alibi([0.5] * 8)}, TypeError, r"bias: Alibi.slopes must be Float.*, got \[0\.5"),
    "array in a static field": (
        {"score_maps": (SoftCap(jnp.float32(1)),)},
        TypeError,
        r"score_maps: SoftCap.cap is static, .*: need a Python value, got float32\[\]",
    ),
    "scale": ({"score": Dot(zeros(8))}, TypeError, r"score: Dot.scale must be Float.*, got float32\[8\]"),
    "score": ({"score": 0.5}, TypeError, "score must be a Score such as"),
    "normalize": ({"normalize": "softmax"}, TypeError, r"normalize must be a normaliser such as Softmax\(\), got str"),
    "null logit": (
        {"normalize": Softmax(zeros(2, 8))},
        TypeError,
        r"normalize: Softmax.null_logit must be Float.*heads.*, got float32\[2,8\]",
    ),
    "null logit heads": (
        {"normalize": Softmax(zeros(3))},
        ValueError,
        r"null_logit has shape \(3,\): need one per head, \(8,\)",
    ),
    "null logit shared": (
        {"normalize": Softmax(zeros(1))},
        ValueError,
        r"null_logit has shape \(1,\): need one per head",
    ),
    "null logit number": ({"normalize": Softmax(0.0)}, TypeError, "Softmax.null_logit must be Float.*heads.*, got 0.0"),
    "dropout": ({"dropout": 0.1}, TypeError, r"dropout must be Dropout\(rate, key\), got float"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_call_is_refused(name):
    changed, exception, message = BAD[name]
    for call in (attend, explain):
        with pytest.raises(exception, match=message):
            call(**GOOD | changed)


def test_numbers_are_welcome_where_the_annotation_says_so():
    for scale in (1, 0.5, np.float32(0.5), jnp.float32(0.5)):
        assert attend(**GOOD, score=Dot(scale), mask=Window(np.int64(3))).shape == (2, 5, 8, 3)


def test_the_good_call_is_good(capsys):
    assert attend(**GOOD).shape == (2, 5, 8, 3)
    assert explain(**GOOD) == "dense"
    assert capsys.readouterr().out.count("\n") == 4  # a line per implementation


def test_shapes_are_enough_to_refuse_a_bad_call():
    query = jax.ShapeDtypeStruct((2, 5, 8, 4), jnp.int32)
    with pytest.raises(TypeError, match="query has dtype int32"):
        jax.eval_shape(lambda query: attend(**GOOD | {"query": query}), query)


@part
class Wrong(Score):
    """A score that forgets the head axis."""

    def __call__(self, query, key, tile):
        return Dot()(query, key, tile)[..., 0, :, :]


def test_a_shape_without_numbers_is_no_array():
    for name in ("query", "key", "value"):
        x = jax.ShapeDtypeStruct(GOOD[name].shape, jnp.float32)
        with pytest.raises(TypeError, match=f"{name} is a ShapeDtypeStruct, which holds no numbers: need an array"):
            attend(**GOOD | {name: x})


@pytest.mark.parametrize("heads", [2.5, 8.0, "8", True, None])
def test_slopes_are_for_a_whole_number_of_heads(heads):
    with pytest.raises(TypeError, match="Alibi: heads must be an int, got"):
        Alibi.geometric(heads)
    assert Alibi.geometric(np.int64(8)).slopes.shape == (8,)


def test_a_score_of_the_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"score gives shape \(2, 5, 7\): need \[\.\.\., N, T, S\] = \(2, 8, 5, 7\)"):
        attend(**GOOD, score=Wrong())


@pytest.mark.parametrize(
    ("make", "exception", "message"),
    [
        (lambda: Window(-1), ValueError, "Window: left must be at least 0, got -1"),
        (lambda: Window(4, -2), ValueError, "Window: right must be at least 0, got -2"),
        (lambda: Window(2**40), ValueError, r"Window: left must be at most 2\*\*30, got 1099511627776"),
        (lambda: Window(2.5), TypeError, "Window: left must be an int, got 2.5"),
        (lambda: Window(True), TypeError, "Window: left must be an int, got True"),
        (lambda: Window(jnp.int32(3)), TypeError, "Window: left must be an int, got Array"),
        (lambda: Sinks(-4), ValueError, "Sinks: count must be at least 0, got -4"),
        (lambda: Sinks("4"), TypeError, "Sinks: count must be an int, got '4'"),
        (lambda: Alibi.geometric(0), ValueError, "heads must be at least 1, got 0"),
    ],
)
def test_a_bad_part_is_refused_when_it_is_made(make, exception, message):
    with pytest.raises(exception, match=message):
        make()


@part
class Top(Normalize):
    """Hard attention: the whole weight on the best key. It needs the whole row."""

    def weights(self, scores, tile):
        scores = jnp.where(tile.visible, scores, -jnp.inf)
        best = jax.nn.one_hot(scores.argmax(-1), scores.shape[-1]) * tile.visible
        return best, scores.max(-1)


def test_a_normaliser_that_needs_whole_rows_is_served_by_dense_and_refused_by_tiled(capsys):
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=x.shape).astype(np.float32) for x in GOOD.values())
    expected = attend(query, key, value, mask=Causal(), score=Dot(1e5))  # softmax so cold that it is hard
    for implementation in ("dense", "rows", "auto"):
        out = attend(query, key, value, mask=Causal(), normalize=Top(), implementation=implementation)
        assert_close(out, expected, np.abs(value).max())
    for call in (attend, explain):
        with pytest.raises(
            NotImplementedError, match="implementation 'tiled' cannot serve normalize=Top: it needs whole rows"
        ):
            call(query, key, value, normalize=Top(), implementation="tiled")
    assert explain(query, key, value, normalize=Top()) == "dense"
    dense, _, tiled, _ = capsys.readouterr().out.splitlines()
    assert dense.startswith("-> dense: ")
    assert tiled.strip().startswith("tiled: cannot serve normalize=Top: it needs whole rows")


def test_explain_names_the_choice_and_a_reason_for_each_implementation(capsys):
    def call(length, **options):
        x = jax.ShapeDtypeStruct((1, length, 8, 64), jnp.bfloat16)
        name = explain(x, x, x, mask=Causal(), **options)
        lines = capsys.readouterr().out.splitlines()
        assert [line[3:].split(":")[0] for line in lines] == [*IMPLEMENTATIONS, "fused"]
        assert [line.split()[1] for line in lines if line.startswith("->")] == [f"{name}:"]
        return name, lines

    name, lines = call(8192)
    assert name == "tiled"
    assert "the 8192 x 8192 scores of all heads take 2,048 MiB, more than" in lines[0]
    name, lines = call(128)
    assert name == "dense"
    assert "the 128 x 128 scores of all heads take 0.5 MiB, at most" in lines[0]
    name, lines = call(8192, implementation="dense", return_lse=True, block=128)
    assert name == "dense"
    assert "named in the call" in lines[0]
    positions = jax.ShapeDtypeStruct((8192,), jnp.int32)
    assert (
        call(8192, query_positions=positions, normalize=Sigmoid(), dropout=Dropout(0.1, jax.random.key(0)))[0]
        == "tiled"
    )


def test_explain_refuses_arguments_that_attend_does_not_have():
    with pytest.raises(TypeError, match=r"explain got unknown arguments \['masks'\]: need those of attend"):
        explain(**GOOD, masks=Causal())


def test_auto_serves_a_long_call_with_tiled():
    """256 MiB of scores appear in the dense program and not in the one that is chosen."""
    x = jax.ShapeDtypeStruct((1, 2**12, 4, 8), jnp.float32)
    text = jax.jit(lambda x: attend(x, x, x, mask=Causal())).lower(x).as_text()
    assert f"{2**12}x{2**12}" not in text
    text = jax.jit(lambda x: attend(x, x, x, mask=Causal(), implementation="dense")).lower(x).as_text()
    assert f"{2**12}x{2**12}" in text


# Arrays and functions in the slots of mask and bias.


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def near(query, key):
    return abs(query - key) < 3


def slope(query, key):
    return -0.1 * abs(query - key)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_arrays_and_functions_stand_for_the_parts_they_become(implementation):
    query, key, value = random(2, 5, 4, 8), random(2, 7, 2, 8, seed=1), random(2, 7, 2, 8, seed=2)
    table = np.random.default_rng(3).random((2, 1, 5, 7)) < 0.6
    numbers = random(4, 5, 7, seed=4)
    options = {"implementation": implementation, "block": 3}
    places = np.arange(5)[:, None], np.arange(7)
    for given, parts in (
        ({"mask": table}, {"mask": Explicit(table)}),
        ({"mask": jnp.asarray(table[0, 0])}, {"mask": Explicit(jnp.asarray(table[0, 0]))}),
        ({"bias": numbers}, {"bias": Bias(numbers)}),
        ({"mask": near}, {"mask": Explicit(near(*places))}),
        (
            {"mask": Causal() & near, "bias": slope},
            {"mask": Explicit(near(*places)) & Causal(), "bias": slope(*places)},
        ),
        ({"mask": Causal() & table}, {"mask": Causal() & Explicit(table)}),
        ({"mask": ~(Causal() | table)}, {"mask": ~(Causal() | Explicit(table))}),
    ):
        found, expected = (attend(query, key, value, **options, **each) for each in (given, parts))
        np.testing.assert_allclose(found, expected, atol=1e-6)
        explain(query, key, value, **given)
    grad = jax.grad(lambda bias: attend(query, key, value, bias=bias, **options).sum())(jnp.asarray(numbers))
    assert grad.shape == numbers.shape


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"mask": np.ones((5, 8), bool)},
            ValueError,
            r"mask has shape \(5, 8\): need one that broadcasts to \[\.\.\., N",
        ),
        ({"mask": np.ones((2, 1, 1, 5, 7), bool)}, ValueError, "mask has shape"),
        ({"mask": np.ones((5, 7))}, TypeError, "mask has dtype float64: need booleans"),
        ({"bias": random(3, 5, 7)}, ValueError, r"bias has shape \(3, 5, 7\)"),
        ({"bias": np.ones((5, 7), bool)}, TypeError, "bias: Bias.array must be Float"),
        ({"mask": "causal"}, TypeError, "mask must be a Mask"),
        ({"mask": [[True]]}, TypeError, "mask must be a Mask"),
        ({"mask": lambda query: query}, TypeError, "mask=MaskFunction does not fit"),
    ],
    ids=lambda x: "",
)
def test_arrays_that_fit_no_pairs_are_refused(options, kind, message):
    for call in (attend, explain):
        with pytest.raises(kind, match=message):
            call(**GOOD, **options)
