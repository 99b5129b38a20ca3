"""The laws of edits: the same in one pass and token by token, nothing at strength 0, one program for all strengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxattn import Bias, Entropy, Explicit, KeyBias, Map, Temperature, Window, attend, nn, part, trace
from jaxattn.core.attend import Temporal
from jaxattn.models import Spec, Transformer, TransformerConfig, pre_norm
from jaxattn.nn import Context, MultiHeadAttention, Recurrent, Tap, Tokens
from jaxattn.trace import Add, Cut, Layers, OnlyAt, Pairs, Patch, Put, Scale

L, B, T, N, D, V = 3, 2, 9, 4, 16, 11
H = D // N
EPS = float(np.finfo(np.float32).eps)


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@part
class Reweigh(trace.Edit):
    """w -> w · factor[n, key], and each row as it was in sum: it looks along the row."""

    factor: Float[Array, "heads keys"]

    def __call__(self, value, where):
        new = (
            value
            * jnp.take(self.factor, jnp.maximum(where.key, 0).reshape(-1, where.key.shape[-1])[0], axis=1)[:, None]
        )
        return new * value.sum(-1, keepdims=True) / new.sum(-1, keepdims=True)


@part
class Marked(Map):
    """s + strength for keys at some positions: a score map as an edit."""

    strength: Float[Array, ""]
    marked: Int[Array, " p"]

    scores_need = "tile"

    def __call__(self, x, tile):
        return x + self.strength * (tile.key[..., None] == self.marked).any(-1)


EDGES = np.ones((N, T, T), bool)
EDGES[1, 5, 2] = EDGES[0, 7, :7] = False

# name: (site, edit), of the kinds that papers use.
EDITS = {
    "ablated heads": ("z", Layers(Scale(jnp.asarray([[1.0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 0.5, 1]])[:, :, None]))),
    "steered heads": ("z", {1: Add(drawn(N, H))}),
    "steered tokens": ("resid", OnlyAt(Add(drawn(D)), jnp.array([2, 6]))),
    "patched tokens": ("resid_mid", {0: Patch(jnp.array([6, 1]), drawn(2, D))}),
    "replaced keys": ("k", {2: OnlyAt(Put(drawn(N, H)), jnp.array([3]))}),
    "values": ("v", Scale(0.5)),
    "rotated queries": ("q_rotated", Add(0.1 * drawn(N, H))),
    "hidden units": ("mlp_post", Scale(jnp.asarray(np.arange(16) % 3 > 0, np.float32))),
    "knocked-out edges": ("scores", {1: Explicit(jnp.asarray(EDGES))}),
    "marked span": ("scores", Layers(KeyBias(drawn(L, N, T)))),
    "score map": ("scores", Marked(jnp.float32(2.0), jnp.array([1, 4]))),
    "colder": ("scores", Temperature(jnp.asarray([0.5, 1, 2, 1], jnp.float32))),
    "scores of some rows": (
        "scores",
        OnlyAt(Scale(0.5), jnp.array([2, 6]), jnp.asarray([True, False, True, False])),
    ),
    "a cut span": ("scores", {0: Cut(jnp.array([6, 7]), jnp.array([1, 2]), jnp.asarray([False, True, True, False]))}),
    "pairs": ("weights", Pairs(1 + 0.3 * drawn(N, T, T), 0.1 * jnp.abs(drawn(T, T)))),
    "weights by row": ("weights", {0: Reweigh(1 + jnp.abs(drawn(N, T)))}),
    "frozen norm": ("mlp_norm_scale", Put(jnp.float32(1.0))),
    "embedding": ("embed", Add(drawn(D))),
    "final norm": ("final_norm", Scale(0.9)),
    "logits": ("logits", Add(drawn(V))),
}


@pytest.fixture(scope="module")
def model():
    block = Spec(nn.FeedForward, hidden=16)
    layers = [
        pre_norm(Spec(nn.MultiHeadAttention, heads=N), block),
        pre_norm(Spec(nn.MultiHeadAttention, heads=N), block),
        pre_norm(Spec(nn.MultiHeadAttention, heads=N, position=None), block),
    ]
    model = Transformer(TransformerConfig(V, T, D, layers), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    nnx.update(
        model,
        jax.tree.map(
            lambda x: jnp.asarray(np.asarray(x) + 0.3 * rng.standard_normal(x.shape).astype(np.float32)),
            nnx.state(model, nnx.Param),
        ),
    )
    return model


TOKENS = np.random.default_rng(1).integers(0, V, (B, T))


def close(actual, expected, factor=2000):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=factor * EPS * abs(expected).max())


def together(names):
    """site -> the edits of these names, in order."""
    found = {}
    for name in names:
        site, edit = EDITS[name]
        found[site] = (*found.get(site, ()), edit)
    return found


@pytest.fixture(scope="module")
def logits(model):
    """edits -> logits of all tokens; one program per structure of edits."""
    graph, state = nnx.split(model)
    compiled = jax.jit(lambda state, edits: nnx.merge(graph, state)(TOKENS, edits=edits)[0])
    return lambda edits: compiled(state, edits)


GROUPS = [list(EDITS)[start::3] for start in range(3)]


@pytest.mark.parametrize("names", GROUPS, ids=lambda names: names[0])
def test_edits_do_the_same_in_one_pass_in_pieces_and_token_by_token(model, logits, names):
    edits = together(names)
    whole = logits(edits)
    graph, arrays = nnx.split(model)

    @jax.jit
    def piece(tokens, state):
        return nnx.merge(graph, arrays)(tokens, state=state, edits=edits)[:2]

    for cut in ([4, *[1] * 5], [T]):
        state, pieces, first = model.init_state(B, T), [], 0
        for size in cut:
            said, state = piece(TOKENS[:, first : first + size], state)
            pieces.append(said)
            first += size
        close(jnp.concatenate(pieces, 1), whole)
    # Each of them is felt: without it the answer is another.
    for name in names:
        assert abs(np.asarray(logits(together([each for each in names if each != name]))) - whole).max() > 1e-4, name


def test_edits_of_strength_0_are_the_identity_to_the_bit(logits):
    """Of additive, scaling, score and mask forms. What renormalises, or divides by a scale, rounds once more."""
    plain = np.asarray(logits({}))
    neutral = {
        "embed": Add(jnp.zeros(D)),
        "resid_pre": Layers(Add(jnp.zeros((L, D)))),
        "z": (Scale(jnp.ones((N, 1))), {1: Add(jnp.zeros((N, H)))}),
        "q": Scale(1.0),
        "scores": (Layers(KeyBias(jnp.zeros((L, N, T)))), {2: Explicit(np.ones((T, T), bool))}, Temperature(1.0)),
        "mlp_out": OnlyAt(Put(drawn(D)), jnp.array([T + 5])),
        "resid": Layers(Put(drawn(L, D)), jnp.zeros(L, bool)),
        "logits": Scale(1.0),
    }
    np.testing.assert_array_equal(logits(neutral), plain)
    close(logits({"weights": Reweigh(jnp.ones((N, T)))}), plain)


def test_a_changed_strength_does_not_compile_anew(model):
    traced, (graph, state) = [], nnx.split(model)

    @jax.jit
    def said(edits):
        traced.append(edits)
        return nnx.merge(graph, state)(TOKENS, edits=edits)[0]

    for strength in (0.0, 1.0, 2.5):
        said({"z": {1: Scale(strength)}, "scores": Marked(jnp.float32(strength), jnp.array([1]))})
    assert len(traced) == 1


def test_all_ablations_of_heads_are_one_program_and_equal_the_loop(model, logits):
    gates = 1 - jnp.eye(L * N).reshape(L * N, L, N, 1)
    graph, state = nnx.split(model)

    def ablated(gate):
        return nnx.merge(graph, state)(TOKENS, edits={"z": Layers(Scale(gate))})[0]

    loop = jnp.stack([logits({"z": Layers(Scale(gate))}) for gate in gates])
    close(jax.jit(jax.vmap(ablated))(gates), loop, 100)
    close(jax.jit(lambda gates: jax.lax.map(ablated, gates, batch_size=5))(gates), loop, 100)
    # A head that is off is a head whose rows of the output projection are 0.
    for layer, head in ((0, 2), (2, 3)):
        changed = nnx.clone(model)
        run, place = next((r, layer) for r in changed.runs if layer < 2) if layer < 2 else (changed.runs[1], 0)
        kernel = run.mixers[0].out.kernel[...].reshape(-1, N, H, D)
        run.mixers[0].out.kernel[...] = kernel.at[place, head].set(0).reshape(run.mixers[0].out.kernel.shape)
        close(changed(TOKENS)[0], loop[layer * N + head], 100)


def test_what_is_recorded_is_what_goes_on(model):
    """A record stands after the edits of its site; a patch of another run's record makes the rest of that run."""
    places = jnp.arange(T)
    other = np.random.default_rng(2).integers(0, V, (B, T))
    kept = model(TOKENS, record={"resid": ("resid", trace.TokensAt(places))})[2]["resid"]
    patched, _, records = model(other, edits={"resid": {1: Patch(places, kept[1])}}, record=("resid",))
    np.testing.assert_array_equal(records["resid"][1], kept[1])
    close(patched, model(TOKENS)[0], 100)


def test_knocked_out_edges_and_marked_spans_are_those_of_attend():
    """Dense, rows and tiled, values and gradients, against the mask and the bias given to `attend` itself."""
    x, strength = drawn(B, T, D), drawn(N, T)
    for implementation in ("dense", "rows", "tiled"):
        module = MultiHeadAttention(D, N, position=None, implementation=implementation, rngs=nnx.Rngs(0))

        def edited(strength, module=module):
            tap = Tap({"scores": (Explicit(jnp.asarray(EDGES)), KeyBias(strength))}, record=("q", "k", "v", "z"))
            module(x, Tokens.of(x), tap)
            return (tap.records["z"] ** 2).sum(), tap.records

        (loss, seen), slope = jax.value_and_grad(edited, has_aux=True)(strength)

        def direct(strength, seen=seen):
            mask, bias = Explicit(jnp.asarray(EDGES)), Bias(strength[:, None])
            return (attend(seen["q"], seen["k"], seen["v"], mask=mask, bias=bias, implementation="dense") ** 2).sum()

        expected, expected_slope = jax.value_and_grad(direct)(strength)
        close(loss, expected, 100)
        close(slope, expected_slope, 1000)


def test_an_edit_says_what_it_needs():
    """Edits of scores run in tiles; one that looks along a row of weights does not, and is named."""
    module = MultiHeadAttention(D, N, position=None, implementation="tiled", rngs=nnx.Rngs(0))
    x = drawn(B, T, D)
    with pytest.raises(NotImplementedError, match="'tiled' cannot serve weight_maps=Reweigh: it needs whole rows"):
        module(x, tap=Tap({"weights": Reweigh(jnp.ones((N, T)))}))


ATTENTION, BLOCK = Spec(nn.MultiHeadAttention, heads=N), Spec(nn.FeedForward, hidden=16)
HYMBA, MEMORY = Spec(nn.hymba_heads, heads=2, state=3), Spec(nn.NeuralMemory, heads=2, inner_batch=2)
TITANS = Spec(nn.memory_as_gate, heads=2, window=3, persistent=2, memory=MEMORY)
# name: (layers, meta tokens)
KINDS = {
    "meta tokens": ([pre_norm(ATTENTION, BLOCK), pre_norm(Spec(nn.DeltaNet, heads=2), BLOCK)], 2),
    "parallel heads": ([pre_norm(HYMBA), pre_norm(HYMBA.replace(keys_from="layer"))], 0),
    "titans": ([pre_norm(TITANS)], 0),
    "latent": ([pre_norm(Spec(nn.LatentAttention, heads=N, rank=6, query_rank=5), BLOCK)] * 2, 2),
    "windows": ([pre_norm(ATTENTION.replace(mask=Window(3)))] * 2, 0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_edits_of_every_mixer_do_the_same_token_by_token(kind):
    """Learned tokens before the row are left as they are, in the full pass as in the state."""
    layers, meta = KINDS[kind]
    model = Transformer(TransformerConfig(V, T + 3, D, layers, meta_tokens=meta), rngs=nnx.Rngs(0))
    edits = {"attn_out": Scale(1.5), "z": Scale(0.7), "q": Scale(1.3), "resid": OnlyAt(Add(drawn(D)), jnp.array([1]))}
    edits |= {"v": Scale(0.5), "mlp_post": Scale(0.8)} if kind not in ("parallel heads", "latent") else {}
    edits |= {"latent": Scale(0.5), "k_rotated": Add(0.3 * drawn(H // 2))} if kind == "latent" else {}
    if kind in ("meta tokens", "windows", "latent"):
        edits["scores"] = {0: (Marked(jnp.float32(1.5), jnp.array([4])), Explicit(np.tri(T + 2, dtype=bool)))}
    graph, arrays = nnx.split(model)
    whole, piece = (jax.jit(lambda s, t, state: nnx.merge(graph, s)(t, state=state, edits=edits)[:2]),) * 2
    expected, state = whole(arrays, TOKENS, None)[0], model.init_state(B, T)
    said = []
    for t in range(T):
        logits, state = piece(arrays, TOKENS[:, t : t + 1], state)
        said.append(logits)
    close(jnp.concatenate(said, 1), expected)
    assert abs(np.asarray(expected) - model(TOKENS)[0]).max() > 1e-3


def test_edits_under_two_names_of_a_site_act_both():
    module, x = MultiHeadAttention(D, N, rngs=nnx.Rngs(0)), drawn(B, T, D)
    y, _ = module(x, tap=Tap({"z": Scale(2.0), "attn.hook_z": Scale(0.0)}))
    np.testing.assert_array_equal(y, 0)


def test_maps_that_read_other_queries_are_no_edits_of_a_state():
    module, x = MultiHeadAttention(D, N, rngs=nnx.Rngs(0)), drawn(B, T, D)
    with pytest.raises(ValueError, match="score_maps=Temporal reads the scores of other queries"):
        module(x, tap=Tap({"scores": Temporal()}), state=module.init_state(B, T))


def test_keys_of_another_sequence_stand_where_it_says():
    module = MultiHeadAttention(D, N, position=None, rngs=nnx.Rngs(0))
    x, other = drawn(B, T, D), drawn(B, 6, D, seed=1)
    context = Context(other, Tokens.of(other, positions=jnp.arange(6)[::-1]))
    tap = Tap(record={"key": ("k", trace.TokensAt(jnp.array([0, 5]))), "k": "k"})
    module(x, tap=tap, context=context)
    np.testing.assert_array_equal(tap.records["key"], tap.records["k"][:, [5, 0]])


def test_a_measure_is_recorded_where_there_is_attention_and_edits_of_weights_act_there():
    layers = [
        pre_norm(Spec(nn.MultiHeadAttention, heads=N)),
        pre_norm(Spec(nn.DeltaNet, heads=2)),
        pre_norm(Spec(nn.MultiHeadAttention, heads=N)),
    ]
    model = Transformer(TransformerConfig(V, T, D, layers), rngs=nnx.Rngs(0))
    record = {"entropy": ("weights", Entropy())}
    said, _, records = model(TOKENS, edits={"weights": Scale(0.5)}, record=record)
    assert [x is None for x in records["entropy"]] == [False, True, False]
    close(said, model(TOKENS, edits={"z": {0: Scale(0.5), 2: Scale(0.5)}})[0], 100)
    with pytest.raises(ValueError, match="a measure of weights, which are those of attention"):
        Recurrent(nn.DeltaNet(D, 2, rngs=nnx.Rngs(0)))(drawn(B, T, D), tap=Tap(record=record))


def test_positions_that_are_counted_from_the_end_are_refused():
    at = np.array([2, -1])
    makers = {
        "Patch: positions": lambda: trace.Patch(at, np.zeros((2, 4))),
        "OnlyAt: positions": lambda: trace.OnlyAt(trace.Scale(0.0), at),
        "Cut: queries": lambda: trace.Cut(at),
        "Cut: keys": lambda: trace.Cut(keys=at),
        "TokensAt: positions": lambda: trace.TokensAt(at),
    }
    for name, make in makers.items():
        with pytest.raises(ValueError, match=f"{name} holds -1: need numbers from 0 on, where the last of T tokens"):
            make()
