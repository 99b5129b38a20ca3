"""The pages in docs: their Python runs as written and shows what they say, their links lead somewhere, and between them
they name every part there is."""

import functools
import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from html_pages import decoded, payload
from pages import ROOT, run_page

import jaxattn
from jaxattn import BlockIndex, Causal, Documents, Explicit, Window, attend, linear_attention, rotary, viz
from jaxattn.core.attend import NTK, PairSum
from jaxattn.core.linear import Delta

PAGES = {file.name: file.read_text() for file in sorted((ROOT / "docs").glob("*.md"))}
EPS = float(np.finfo(np.float32).eps)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """page(name).x is what x is at the end of docs/name.md; a page runs once."""
    return functools.cache(lambda name: SimpleNamespace(**run_page(f"docs/{name}.md", tmp_path_factory.mktemp(name))))


def assert_close(actual, expected, factor=100):
    """Within `factor` roundings of the largest number: scores of a few units, sums of a few dozen terms."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=factor * EPS * abs(expected).max())


def causal_rows(scores):
    """Softmax of [N, T, T] over the keys at the query and before, in float64."""
    scores = np.where(np.tri(scores.shape[-1], dtype=bool), np.asarray(scores, np.float64), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def dots(query, key):
    return np.einsum("tnh,snh->nts", np.asarray(query, np.float64), np.asarray(key, np.float64))


def read(weights, value):
    return np.einsum("nts,snv->tnv", weights, np.asarray(value, np.float64))


# attend.md


def test_packed_documents_have_sinks_of_their_own(page):
    p = page("attend")
    assert_close(p.packed[6:], p.by_itself)
    assert np.isnan(p.spoiled[12:15]).all()
    assert np.isfinite(p.spoiled[:12]).all()
    assert np.isfinite(p.spoiled[15:]).all()


def test_a_bias_is_the_log_of_a_prior(page):
    p = page("attend")
    assert_close(p.posterior, p.same_posterior)


# icl.md


def test_simulated_risks_are_the_exact_ones(page):
    p = page("icl")
    for name, exact in p.exact.items():
        mean, error = p.table.risks[name]
        assert (abs(mean - np.asarray(exact, np.float64)) <= 4 * error).all(), name


def test_layers_are_steps_and_the_circuit_continues_what_it_saw(page):
    p = page("icl")
    assert_close(p.by_layers, p.by_steps)
    # Two heads are one step up to ω², and rounding errors are 1 / ω times as large.
    np.testing.assert_allclose(p.by_heads, p.by_formula, rtol=0, atol=0.02 * abs(np.asarray(p.by_formula)).max())
    assert p.continued[-1].argmax() == 2


def test_algorithms_are_right_by_themselves_and_by_hand(page):
    p = page("icl")
    np.testing.assert_array_equal((p.by_itself == p.parity.y)[p.parity.weights > 0], True)
    np.testing.assert_allclose(p.counted[1:], [1, 1, 2, 1, 3], rtol=1e-5)
    assert p.sums.tolist() == [5]
    for shares in (p.explained, p.concentrated):
        np.testing.assert_allclose(shares, [0.5, 0, 0, 0.5, 0], atol=1e-5)


def test_the_task_of_the_page_and_its_model_are_measured(page):
    p = page("icl")
    largest = np.random.default_rng(0).standard_normal((10**6, 3)).max(-1)  # of a random sign: its mean square remains
    mean, error = p.always_0.risks["zero"]
    assert abs(mean[0] - (largest**2).mean()) <= 4 * error[0]
    assert set(np.asarray(p.drawn_prompts.hidden).tolist()) <= {-1.0, 1.0}
    assert p.result.complete
    assert p.learned.risks["decoder"].mean.shape == (8,)


# attend.md


def test_the_new_score_is_the_cosine(page):
    p = page("attend")
    norms = (np.linalg.norm(np.asarray(x, np.float64), axis=-1, keepdims=True) for x in (p.query, p.key))
    query, key = (x / norm for x, norm in zip((p.query, p.key), norms, strict=True))
    assert_close(p.by_angle, read(causal_rows(10 * dots(query, key)), p.value))


def test_a_graph_layer_is_a_softmax_over_the_edges(page):
    p = page("attend")
    z = np.einsum("if,fnh->inh", p.nodes, np.asarray(p.weights["projection"], np.float64))
    a, b = np.asarray(p.weights["score"].query_vector), np.asarray(p.weights["score"].key_vector)
    out = np.zeros((6, 2, 8))
    for node in range(6):
        senders = p.senders[p.receivers == node]
        for n in range(2):
            score = z[node, n] @ a[n] + z[senders, n] @ b[n]
            weight = np.exp(np.where(score > 0, score, 0.2 * score))
            out[node, n] = weight @ z[senders, n] / weight.sum()
    assert_close(p.features, np.where(out > 0, out, np.expm1(out)).reshape(6, 16))
    assert isinstance(p.slopes["score"], PairSum)
    assert all((np.abs(leaf) > 0).all() for leaf in jax.tree.leaves(p.slopes))


def test_the_new_bias_falls_with_the_log_of_the_distance(page):
    p = page("attend")
    distance = np.abs(np.arange(p.T)[:, None] - np.arange(p.T))
    bias = -np.array([0.5, 1.0, 2.0, 4.0])[:, None, None] * np.log1p(distance)
    assert_close(p.nearby, read(causal_rows(dots(p.query, p.key) * p.H**-0.5 + bias), p.value))


def test_a_merged_token_weighs_what_its_copies_weigh(page):
    p = page("attend")
    assert_close(p.merged, p.unmerged)
    assert np.abs(p.merged - attend(p.query, p.few_keys, p.few_values)).max() > 0.01


def test_the_gradient_of_a_table_has_its_size(page):
    slope = page("attend").slope.table
    assert slope.shape == (4, 8)
    assert (np.abs(slope) > 0).all()


def test_the_new_score_map_scales_by_the_log_of_the_visible_keys(page):
    p = page("attend")
    scale = 0.43 * np.log(np.arange(1, p.T + 1))[:, None] * p.H**-0.5
    assert_close(p.sharp, read(causal_rows(dots(p.query, p.key) * scale), p.value))


def test_talking_heads_mix_scores_and_weights(page):
    p = page("attend")
    scores = np.einsum("nm,mts->nts", p.before, dots(p.query, p.key) * p.H**-0.5)
    assert_close(p.talking, read(np.einsum("nm,mts->nts", p.after, causal_rows(scores)), p.value))


def test_a_convolution_finds_the_key_that_two_queries_ask_for(page):
    p = page("attend")
    assert p.joined["key"][1] == 2
    assert p.alone["key"][1] == 0


def test_the_new_mask_shows_the_patches_around_one_and_its_bounds_keep_them(page):
    p = page("attend")
    mask = p.Neighbourhood(4, 1)
    row, column = np.divmod(np.arange(p.T), 4)
    near = (abs(row[:, None] - row) <= 1) & (abs(column[:, None] - column) <= 1)
    np.testing.assert_array_equal(mask.to_array(p.T)[0], near)
    possible = np.asarray(BlockIndex.from_mask(mask, (p.T, p.T), (2, 2)).active)[0]
    assert (possible >= near.reshape(8, 2, 8, 2).any((1, 3))).all()
    assert not possible.all()
    assert_close(p.patches, attend(p.query, p.key, p.value, mask=Explicit(near[None])))


def test_each_draft_is_verified_as_if_its_line_were_the_text(page):
    p = page("attend")
    for node in range(6):
        line, above = [], node
        while above >= 0:
            line, above = [above, *line], int(p.parents[above])
        tokens = np.concatenate([np.arange(p.context), p.context + np.array(line)])
        places = jnp.arange(len(tokens))
        query, key = rotary(p.query[tokens], places), rotary(p.key[tokens], places)
        assert_close(p.verified[node], attend(query, key, p.value[tokens], mask=Causal())[-1])


def test_the_new_normaliser_is_softplus_and_has_finite_gradients(page):
    p = page("attend")
    weights = np.where(np.tri(p.T, dtype=bool), np.log1p(np.exp(dots(p.query, p.key) * p.H**-0.5)), 0)
    assert_close(p.smooth, read(weights / weights.sum(-1, keepdims=True), p.value))
    for implementation in ("dense", "tiled"):
        options = {"normalize": p.Softplus(), "mask": Causal(), "implementation": implementation}
        slope = jax.grad(lambda q, options=options: attend(q, p.key, p.value, **options).sum())(p.query)
        assert np.isfinite(slope).all()


def test_a_hard_choice_is_learned(page):
    assert jax.nn.softmax(page("attend").logits)[4] > 0.9


def test_the_importance_of_a_head_is_the_slope_of_its_gate(page):
    """out_n is linear in gate_n, so the derivative of mean out² at 1 is 2 Σ_{head n} out² / size."""
    p = page("attend")
    out = np.asarray(attend(p.query, p.key, p.value, mask=Causal()), np.float64)
    assert_close(p.importance, 2 * (out**2).sum((0, 2)) / out.size)
    assert_close(p.loss(jnp.array([1.0, 0, 0, 0])) * out.size, (out[:, 0] ** 2).sum())


def test_steering_gives_the_instruction_its_share_and_takes_no_mass_away(page):
    p = page("attend")
    before, after = np.asarray(p.unsteered["mass"]), np.asarray(p.extras["mass"])
    assert_close(after.sum(-1), np.ones((p.T, p.N)))
    assert_close(after[:5], before[:5])
    assert_close(after[5:, :, 0], np.maximum(before[5:, :, 0], 0.6))
    assert before[5:, :, 0].min() < 0.3


def test_auto_takes_the_implementations_that_the_comments_say(page):
    assert page("attend").taken == ["dense", "tiled", "rows"]


def test_the_curvature_is_the_change_of_the_gradient(page):
    p = page("attend")

    def dense(query):
        return jnp.square(attend(query, p.key, p.value, mask=Causal(), implementation="dense")).sum()

    assert_close(p.curvature, jax.jvp(jax.grad(dense), (p.query,), (p.direction,))[1])


def test_a_context_in_pieces_is_the_whole(page):
    p = page("attend")
    out, extras = attend(p.query, p.key, p.value, mask=Causal(), return_lse=True)
    assert_close(p.streamed.out, out)
    assert_close(p.streamed.lse, extras["lse"])


def test_a_module_owns_and_trains_the_parts_of_every_slot(page):
    p = page("attend")
    assert p.y.shape == (2, p.T, 32)
    assert p.tap.records["instruction"].shape == (2, p.T, p.N, 2)
    assert all((np.abs(leaf) > 0).any() for leaf in jax.tree.leaves(p.trained))
    shapes = [leaf.shape for leaf in jax.tree.leaves(p.trained)]
    assert (4, 4) in shapes  # the mixing of heads
    assert (4,) in shapes  # the gate


def test_the_new_parts_agree_in_every_implementation_that_they_allow(page):
    """Values and all gradients, with grouped heads and empty slots."""
    p = page("attend")
    places = jnp.array([0, 1, 2, -1, *range(3, 13), -1, 13])
    by_tile = {
        "score": p.Cosine(jnp.float32(3.0)),
        "bias": p.LogDistance(jnp.array([0.5, 1.0, 2.0, 4.0])),
        "mask": Causal() & p.Neighbourhood(4, 2),
        "normalize": p.Softplus(),
        "weight_maps": (p.HeadGate(jnp.array([0.5, 1.0, 2.0, 4.0])),),
    }
    steered = jaxattn.core.attend.Reallocate(p.groups, p.AtLeast(jnp.float32(0.6)), 2)
    by_row = {"score_maps": (p.ByLength(jnp.float32(0.43)),), "mask": Causal(), "weight_maps": (steered,)}

    def run(implementation, slots):
        def of(query, key, value, slots):
            options = {"query_positions": places, "key_positions": places, "implementation": implementation}
            options |= {} if implementation == "dense" else {"block": 5}
            return jnp.sin(attend(query, key, value, **slots, **options)).sum()

        given = p.query, p.key[:, :2], p.value[:, :2], slots
        value, slopes = jax.jit(jax.value_and_grad(of, argnums=(0, 1, 2, 3), allow_int=True))(*given)
        return value, *(leaf for leaf in jax.tree.leaves(slopes) if leaf.dtype != jax.dtypes.float0)

    for slots, others in ((by_tile, ("rows", "tiled")), (by_row, ("rows",))):
        expected = run("dense", slots)
        for implementation in others:
            for a, b in zip(run(implementation, slots), expected, strict=True):
                assert_close(a, b)


# measures.md


def test_measures_are_attention_with_another_value(page):
    p = page("measures")
    assert_close(p.received, p.extras["received"])
    assert_close(p.mass, p.extras["halves"])
    weights = causal_rows(dots(p.query, p.key) * p.H**-0.5)
    assert_close(p.extras["last"][:, 0], weights[:, -1])
    assert_close(p.extras["lags"], [[np.trace(head, -lag) for lag in range(4)] for head in weights])
    assert_close(p.extras_of_keys["keys"], 1 / (weights**2).sum(-1).T)


def test_a_penalty_holds_the_entropy_that_training_would_take(page):
    p = page("measures")
    assert p.free[0] == p.held[0] > 2
    assert p.free[-1] < 0.7
    assert np.abs(p.held[-50:] - 1).max() < 0.1


# positions.md


def test_permuting_keys_with_their_positions_changes_nothing(page):
    p = page("positions")
    assert_close(p.any_order, p.in_order)


def test_bases_and_axes_turn_the_channels_they_should(page):
    p = page("positions")
    for head, base in enumerate((100.0, 10000.0)):
        assert_close(p.two_bases[:, head], rotary(p.query, p.places, base=base)[:, head])
    by_row, by_column = (rotary(p.query[..., half], p.places) for half in (slice(0, 8), slice(8, 16)))
    assert_close(p.image_query[:4, :, 8:], by_column[:4])  # the first row of patches
    assert_close(p.image_query[::4, :, :8], rotary(p.query[::4, :, :8], jnp.arange(3)))
    assert np.abs(p.image_query[4:, :, :8] - by_row[4:]).max() > 0.1


def test_scalings_stretch_the_slow_channels_and_keep_the_fast_ones(page):
    p = page("positions")
    plain = 10000.0 ** (-np.arange(0, p.H, 2) / p.H)
    for frequency in p.frequencies.values():
        assert_close(frequency[0], plain[0])
        assert_close(frequency[-1], plain[-1] / 4)
        assert (frequency <= plain * (1 + EPS)).all()
        assert (frequency >= plain / 4 * (1 - 10 * EPS)).all()
    turned = [rotary(x, p.far, scaling=p.yarn) * (0.1 * np.log(4) + 1) for x in (p.query, p.key)]
    assert_close(p.read_far, attend(*turned, p.value, mask=Causal()))
    assert_close(NTK(1.0)(10000.0, p.H, jnp.float32), plain)


def test_slow_channels_stand_still_under_the_new_scaling(page):
    p = page("positions")
    plain = rotary(p.query, p.places)
    for start in (0, 8):
        assert_close(p.half_still[..., start : start + 4], plain[..., start : start + 4])
        assert_close(p.half_still[..., start + 4 : start + 8], p.query[..., start + 4 : start + 8])


# caches.md


def test_a_policy_of_its_own_keeps_what_got_most_of_late(page):
    """The four last tokens, and of the others those with the largest sums of recorded weights."""
    p = page("caches")
    assert p.text.tokens.shape == (1, 16)
    assert p.memory(p.few) < p.memory(p.Policy()) / 3
    assert pytest.approx(p.found["all"].lost.max(), abs=1e-5) == 0
    assert p.found["recent"].lost.mean() > 0.1
    weights = np.asarray(p.model(p.prompt, record={"w": "weights"})[2]["w"], np.float64)  # [L, 1, N, 64, 64]
    places = np.asarray(jax.tree.leaves(p.state, is_leaf=lambda x: hasattr(x, "positions"))[0].positions)
    for layer, head in np.ndindex(2, 2):
        got = weights[layer, 0, 2 * head : 2 * head + 2].sum((0, 1))[:60]
        assert set(places[layer, 0, :, head]) == {60, 61, 62, 63, *np.argsort(-got)[:12]}


# blocks.md


def choose(scores, k, size):
    """[N, T, S]: each query's own block, and the best of the past blocks by [N, T, blocks] until there are k."""
    chosen = np.zeros((*scores.shape[:2], scores.shape[2] * size), bool)
    for n, t in np.ndindex(scores.shape[:2]):
        own = t // size
        past = sorted(range(own), key=lambda block: -scores[n, t, block])[: k - 1]
        for block in (own, *past):
            chosen[n, t, block * size : (block + 1) * size] = True
    return chosen


def test_moba_reads_the_blocks_it_chose(page):
    p = page("blocks")
    means = np.repeat(np.asarray(p.key).reshape(8, p.size, p.K, p.H).mean(1), 2, axis=1)
    chosen = choose(dots(p.query, means), 3, p.size)
    expected = attend(p.query, p.key, p.value, mask=Causal() & Explicit(chosen))
    assert_close(p.out, expected)
    assert_close(p.everything, attend(p.query, p.key, p.value, mask=Causal()))
    assert np.abs(p.out - p.everything).max() > 0.1
    assert p.index.density() <= 3 / 8
    assert np.isfinite(p.slope).all()
    assert (np.abs(p.slope) > 0).any()


def test_the_bound_of_a_block_is_above_all_of_its_scores(page):
    p = page("blocks")
    bound = np.asarray(p.quest_scores(p.query, p.key, p.size))
    scores = dots(p.query, np.repeat(p.key, 2, axis=1)).reshape(p.N, p.T, 8, p.size).max(-1)
    assert (bound >= scores - 100 * EPS * abs(scores).max()).all()
    both = choose(bound, 3, p.size) | np.repeat(np.asarray(p.index.active), p.size, axis=-1)
    assert_close(p.chosen, attend(p.query, p.key, p.value, mask=Causal() & Explicit(both)))


def test_decoding_reads_the_chosen_tokens_of_each_key_head(page):
    p = page("blocks")
    assert p.few_keys.shape == (16, p.K, p.H)
    seen = np.zeros((p.N, p.T, p.T), bool)
    for n in range(p.N):
        seen[n, -1, np.argsort(-p.scores[n // 2])[:16]] = True
    assert_close(p.decoded, attend(p.query, p.key, p.value, mask=Explicit(seen))[-1:])


# features.md


def test_a_state_reads_what_the_pairs_read(page):
    p = page("features")
    assert_close(p.from_a_state, p.from_pairs)
    assert_close(p.flat["relu"].sum(-1), np.ones((4, p.N, p.T)))
    assert_close(p.signed, np.einsum("btnh,bsnh->bnts", *(np.asarray(x, np.float64) for x in (p.query, p.key))) / 4)
    assert_close(p.cosines, np.clip(p.cosines, -1, 1))


def test_divergences_from_softmax_are_those_that_the_comments_say(page):
    p = page("features")
    said = {
        "elu": 2.3,
        "relu": 1.9,
        "taylor": 0.8,
        "fast": 0.8,
        "favor": 1.1,
        "hedgehog at the start": 1.7,
        "hedgehog": 1.1,
    }
    assert {name: round(float(x), 1) for name, x in p.far.items()} == said
    assert round(float(p.entropy), 1) == 0.5
    assert p.sizes == {1: 17, 2: 153, 3: 969}
    assert p.favor.size(p.H) == 128
    assert p.hedgehog.size(p.H) == 32


def test_a_taylor_kernel_is_least_at_minus_one(page):
    p = page("features")
    assert_close(list(p.by_score.values()), [5, 0.5, 1, 2.5])
    phi, psi = p.safe(p.query, p.key)
    assert jnp.einsum("...tnf,...snf->...nts", phi, psi).min() > 0.5 - 100 * EPS


def test_fast_does_not_see_a_scale_or_a_shift(page):
    """But for ε = 1e-6 beside a variance of some 0.3 at least."""
    p = page("features")
    assert np.abs(p.same).max() < (100 * EPS + 1e-5) * np.abs(p.fast(p.query, p.key)[0]).max()


def test_errors_of_random_features_are_in_the_order_that_the_page_gives(page):
    """With 1000 draws the mean of squares is within some tenths of the truth."""
    p = page("features")
    positive = np.exp(-1.8) * np.expm1(0.2) / 16
    assert p.independent["positive"] == pytest.approx(positive, rel=0.3)
    for errors in (p.independent, p.orthogonal):
        assert 2 * errors["hyperbolic"] < errors["positive"] < errors["trigonometric"]
    assert p.orthogonal["hyperbolic"] < p.independent["hyperbolic"] / 2


def test_moments_match(page):
    p = page("features")
    assert p.spread["matched"] == pytest.approx(p.spread["softmax"], rel=0.3)
    assert p.spread["exp(q)·exp(k)"] < p.spread["softmax"] / 7


def test_log_normal_attention_with_a_diagonal_is_the_mean_of_both(page):
    p = page("features")
    sigma = np.sqrt((1.5**4 + 0.35487039) / 0.29710356) / 1.5
    query, key, value = (np.asarray(x, np.float64) for x in (p.query, p.key, p.value))
    near = np.arange(p.T)[:, None] // p.H == np.arange(p.T) // p.H
    kernel = np.einsum("btnh,bsnh->bnts", *np.exp([sigma * query, sigma * key]))
    local = np.where(near, np.exp(np.einsum("btnh,bsnh->bnts", query, key) / 4), 0)
    weights = (np.where(np.tri(p.T, dtype=bool), x, 0) for x in (kernel, local))
    mean = sum(x / x.sum(-1, keepdims=True) for x in weights) / 2
    assert_close(p.both, np.einsum("bnts,bsnv->btnv", mean, value))


def test_the_new_map_multiplies_neighbours(page):
    p = page("features")
    x = np.asarray(p.query, np.float64)
    r = np.maximum(np.concatenate([x, -x], -1), 0)
    assert_close(p.phi_of_new, np.concatenate([r * r[..., np.arange(-i, 32 - i)] for i in (1, 2)], -1))
    assert p.psi_of_new.shape[-1] == p.standardised_too.size(p.H) == 64


# linear.md


def linear_memory(query, key, value, decay, beta=None):
    """S_t = diag(decay) S + β k (v − Sᵀ k)ᵀ or + k vᵀ, out_t = Sᵀ q, in float64."""
    query, key, value, decay = (np.asarray(x, np.float64) for x in (query, key, value, decay))
    memory, out = np.zeros((*key.shape[1:], value.shape[-1])), []
    for t in range(len(key)):
        memory = np.broadcast_to(decay, key.shape)[t][..., None] * memory
        kept = 0 if beta is None else np.einsum("nkv,nk->nv", memory, key[t])
        new = np.einsum("nk,nv->nkv", key[t], value[t] - kept)
        memory = memory + (new if beta is None else np.asarray(beta, np.float64)[t][:, None, None] * new)
        out.append(np.einsum("nkv,nk->nv", memory, query[t]))
    return np.stack(out), memory


def test_memories_decay_and_are_corrected(page):
    p = page("linear")
    retention = 1 - 2.0 ** (-5 - np.arange(2)[:, None])
    assert_close(p.out, linear_memory(p.query, p.key, p.value, 1.0)[0])
    assert_close(p.retained, linear_memory(p.query, p.key, p.value, retention)[0])
    assert_close(p.gated, linear_memory(p.query, p.key, p.value, np.asarray(jax.nn.sigmoid(p.gate)) ** (1 / 16))[0])
    assert_close(p.last, p.value)
    delta, memory = linear_memory(p.query, p.unit, p.value, np.exp(p.log_decay), p.beta)
    assert_close(p.delta, delta)
    assert_close(p.same, delta)
    assert_close(p.end, memory)
    assert_close(p.by_hand, delta)


def test_a_merged_layer_takes_a_step_of_descent(page):
    p = page("linear")
    x, y = np.asarray(p.inputs[:-1], np.float64), np.asarray(p.labels[:-1], np.float64)
    assert_close(p.by_layer, 0.5 * np.asarray(p.inputs[-1], np.float64) @ x.T @ y / 8)
    assert_close(p.by_step, p.by_layer)


def test_a_running_softmax_pools_the_values(page):
    p = page("linear")
    weights = np.exp(np.asarray(p.scores, np.float64))[None] * np.tri(p.T)[..., None, None]
    weights = (weights / weights.sum(1, keepdims=True)).mean(-1)
    assert_close(p.pooled, np.einsum("tsn,snv->tnv", weights, np.asarray(p.value, np.float64)))
    assert all((x <= 0).all() for x in (p.fixed, p.by_time, *p.floored))


def test_a_selective_scan_is_a_tied_gated_rnn(page):
    p = page("linear")
    assert_close(p.scan()[0], p.tied()[0])


def test_a_mechanism_of_two_methods_decodes_what_it_reads(page):
    p = page("linear")
    assert_close(jnp.concatenate(p.decoded, 1), p.y)
    assert not np.triu(p.tap.records["weights"], 1).any()


def test_features_read_with_their_denominator_are_attention_with_their_kernel(page):
    p = page("linear")
    weights = np.einsum("tnf,snf->nts", np.asarray(p.phi, np.float64), p.psi)
    causal = weights * np.tri(p.T)
    assert_close(p.taylor, read(causal / causal.sum(-1, keepdims=True), p.value))
    assert_close(p.everything[..., :-1], read(weights, p.value))


def test_reading_before_the_write_leaves_the_token_its_bonus(page):
    p = page("linear")
    out, decay = np.zeros((p.T, p.N, p.V)), np.exp(np.asarray(p.log_decay, np.float64))
    memory = np.zeros((p.N, p.K, p.V))
    for t in range(p.T):
        new = np.einsum("nk,nv->nkv", np.asarray(p.key[t], np.float64), p.value[t])
        out[t] = np.einsum("nkv,nk->nv", memory + 0.5 * new, p.query[t])
        memory = decay[t][..., None] * memory + new
    assert_close(p.before, out)


def test_states_continue_and_documents_are_apart(page):
    p = page("linear")
    assert_close(p.continued, p.retained)
    for start in range(0, 100, 25):
        where = slice(start, start + 25)
        retention = 1 - 2.0 ** (-5 - np.arange(2)[:, None])
        assert_close(p.packed[where], linear_memory(p.query[where], p.key[where], p.value[where], retention)[0])


# memory.md


def descent(fast, network, loss, p, rate, link=lambda a: a, log_decay=None, log_momentum=None, row=None):
    """Outputs of gradient descent token by token, with gradients at the weights before every 16 tokens."""
    zeros = jnp.zeros((p.T, p.N))
    gates = [zeros + rate, zeros if log_decay is None else log_decay]
    gates += [zeros - jnp.inf if log_momentum is None else log_momentum, zeros + (1 if row is None else row)]

    def token(carry, now):
        start, dual, momentum = carry
        place, query, key, value, rate, log_decay, log_momentum, row = now
        slope = jax.grad(lambda w: loss(network(w, key) - value))(jax.tree.map(link, start))
        momentum = jax.tree.map(lambda s, u: jnp.exp(log_momentum) * s - rate * u, momentum, slope)
        dual = jax.tree.map(lambda a, s: jnp.exp(log_decay) * a + s, dual, momentum)
        read = jax.tree.map(lambda a, b: a + row * (b - a), start, dual)
        out = network(jax.tree.map(link, read), query)
        dual, start = (jax.tree.map(partial(jnp.where, place == 15), read, x) for x in (dual, start))
        return (start, dual, momentum), out

    @jax.jit
    @partial(jax.vmap, in_axes=(0, *[1] * 7), out_axes=1)
    def heads(fast, *arrays):
        place = jnp.arange(p.T) % 16
        return jax.lax.scan(token, (fast, fast, jax.tree.map(jnp.zeros_like, fast)), (place, *arrays))[1]

    return heads(fast, p.query, p.key, p.value, *gates)


def perceptron(activation, fast, x):
    return activation(x @ fast[0]) @ fast[1]


def with_layer_norm(network, fast, x):
    y = network(fast, x)
    return x + (y - y.mean()) / jnp.sqrt(y.var() + 1e-6)


def one_layer(fast, x):
    return x @ fast[0]


def squares(e):
    return (e**2).sum()


def test_memories_are_trained_token_by_token(page):
    p = page("memory")
    gates = {"rate": 0.03 * p.rate, "log_decay": p.log_decay}
    blank, normed = (jnp.zeros((p.N, p.K, p.K)),), partial(with_layer_norm, partial(perceptron, jax.nn.gelu))
    assert_close(p.out, descent(blank, one_layer, squares, p, p.rate))
    titans = partial(perceptron, jax.nn.silu)
    expected = descent(
        p.network.weights, titans, squares, p, 0.1 * p.rate, log_decay=p.log_decay, log_momentum=p.log_momentum
    )
    assert_close(p.titans, expected, 1000)
    huber = descent(
        p.normed.weights, normed, lambda e: jnp.where(squares(e) < 1, squares(e) / 2, squares(e) ** 0.5), p, **gates
    )
    assert_close(p.yaad, huber, 1000)
    cubes = descent(
        p.larger.weights,
        normed,
        lambda e: (jnp.abs(e) ** 3).sum(),
        p,
        **gates,
        link=lambda a: a**3 / (a**4).sum() ** 0.5,
    )
    assert_close(p.moneta, cubes, 1000)
    memora = descent(blank, one_layer, squares, p, **gates, link=lambda a: 2 * jax.nn.softmax(a, 0))
    assert_close(p.memora, memora, 1000)
    assert_close(p.sums, np.full((p.N, p.K), 2))
    ttt = descent(
        p.one_layer.weights,
        partial(with_layer_norm, lambda fast, x: jnp.append(x, 1) @ fast[0]),
        lambda e: squares(e) / 2,
        p,
        p.rate,
        row=p.by_place,
    )
    assert_close(p.ttt, ttt, 1000)
    own = descent(
        p.own.fast_weights,
        lambda fast, x: (x @ fast[0] * jax.nn.silu(x @ fast[1])) @ fast[2],
        lambda e: jnp.log(jnp.cosh(e)).sum(),
        p,
        0.1,
    )
    assert_close(p.learned, own, 1000)


def test_inner_batches_of_one_are_the_delta_rule_and_sequences_go_on(page):
    p = page("memory")
    assert_close(p.sequential, p.delta)
    assert np.abs(p.sequential - p.out).max() > 0.01
    assert_close(p.continued, p.out)
    for where in (slice(0, 32), slice(32, 80), slice(80, 100)):
        alone, _ = jaxattn.memory_scan(p.memory, p.query[where], p.key[where], p.value[where], rate=p.rate[where])
        assert_close(p.packed[where], alone)


def test_asking_a_memory_is_a_product_with_its_weights(page):
    p = page("memory")
    assert_close(p.recalled, np.einsum("tnk,nkv->tnv", np.asarray(p.query, np.float64), p.held.dual[0]))


def test_memory_as_context_decodes_what_it_computes(page):
    p = page("hybrids")
    assert_close(jnp.concatenate(p.decoded, 1), p.y, factor=1000)


def test_memories_learn_what_the_page_says_they_do(page):
    p = page("memory")
    assert 0.9 < p.robust["squared"] < 1.1
    assert p.robust["huber"] < 0.01
    assert p.unexplained["matrix"] > 0.9
    assert p.unexplained["network"] < 0.4


# long_context.md


def test_caches_are_as_small_as_the_page_says_and_models_say_the_same(page):
    p = page("long_context")
    assert [p.bytes_per_token(mixer) for mixer in (p.plain, p.latent)] == [516, 84]
    assert_close(p.decoded, p.latent(p.x)[0])
    assert p.kept == [51200, 6400]
    assert_close(p.said[1], p.said[0])
    sizes = [sum(x.size for x in jax.tree.leaves(nnx.state(each, nnx.Param))) for each in (p.model, p.student)]
    assert sizes[0] - sizes[1] == len(p.blocks) * 2 * 32 * 32
    assert_close(jnp.concatenate(p.pieces), p.trained)
    never = np.iinfo(np.int32).max
    assert p.last.tolist() == [never, 4, 3, 4, never, 6, never, 8]
    assert (np.abs(p.slope[:, :, 1:-1]).max((-1, -2)) > 0).all()
    assert_close(p.alone, p.model(p.text)[0])
    assert p.places.tolist() == [0, 1, 2, 3, 4, 2, 3, 5]
    assert [x.tolist() for x in p.found[:2]] == [[0, 4, 8, -1], [3, 7, 11, -1]]


# devices.md


def test_sequences_over_devices_are_those_on_one(page):
    p = page("devices")
    assert_close(p.out, attend(p.query, p.key, p.value, mask=Causal()))
    assert_close(p.by_document, attend(p.query, p.key, p.value, mask=Causal() & Documents(p.documents)))
    assert_close(p.balanced, p.out)
    window = {"mask": Window(40), "query_positions": jnp.array([p.T - 1])}
    assert_close(p.step, attend(p.query[:, -1:], p.key, p.value, **window))
    read, state = linear_attention(p.query, p.unit, p.value, erase=Delta(p.beta))
    assert_close(p.read, read)
    assert_close(p.state.memory, state.memory)
    np.testing.assert_array_equal(p.before[:, 1:], p.value[:, :-1])
    assert not np.any(p.before[:, 0])


# All pages


def test_the_pages_name_every_part_and_call():
    text = " ".join(
        PAGES[f"{name}.md"]
        for name in (
            "attend",
            "measures",
            "positions",
            "blocks",
            "devices",
            "features",
            "linear",
            "memory",
            "long_context",
            "caches",
        )
    )
    text = " ".join(re.findall(r"`[^`\n]+`", text))
    packages = jaxattn, jaxattn.core.attend, jaxattn.core.linear, jaxattn.core.memory
    public = {name for package in packages for name in package.__all__}
    missing = sorted(name for name in public if not re.search(rf"\b{name}\b", text))
    assert missing == []


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for target, anchor in re.findall(r"\]\(([\w/.]*)(?:#([\w-]+))?\)", PAGES[name]):
        assert (ROOT / "docs" / target).exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", PAGES[target or name], flags=re.MULTILINE)
            assert anchor in map(slug, headings), f"{target}#{anchor}"


def test_the_page_on_layers(page):
    """What it records has the shapes it names, edits are felt, and its mixer decodes as it reads."""
    layers = page("layers")
    assert {name: x.shape for name, x in layers.tap.records.items()} == {
        "queries": (2, 10, 4, 8),
        "entropy": (2, 10, 4),
    }
    assert (layers.records["entropy"].shape, layers.records["last"].shape) == ((3, 1, 12, 4), (3, 1, 1, 32))
    assert (np.abs(layers.importance) > 0).all()
    assert layers.damage.shape == (12,)
    assert all(x > 0 for x in layers.effect)
    for changed in (layers.steered, layers.cut, layers.marked):
        assert np.abs(changed - layers.logits).max() > 1e-5
    np.testing.assert_array_equal(layers.cut[:, :9], layers.logits[:, :9])
    assert layers.same == layers.config
    held = [np.asarray(each)[:, 0] for each in layers.read]  # [layers, slots, K]
    assert all((step >= 0).sum(1).tolist() == [[4, 6, 6, 6]] * 3 for step in held)
    assert sorted(np.asarray(layers.kept.positions[0, :, 0])) == [0, 2, 4, 6, 7, 8, 9]
    assert (layers.made.tokens.shape, layers.made.records["entropy"].shape) == ((1, 5), (5, 3, 1, 1, 4))
    np.testing.assert_allclose(layers.by_token, layers.whole, atol=1e-6)


# What the table at the end of the page on layers counts: page, first and last line of the code.
COUNTED = {
    "head ablation, and the gradient in it": ("layers", "def loss(gate)", "importance ="),
    "all heads of all layers, one at a time, in one compiled call": ("layers", "heads = 1", "damage ="),
    "activation patching, layer by layer": ("layers", "clean, other", "]"),
    "an offset on what a head reads": ("layers", "direction =", "steered"),
    "an edge from one key to one query, in some heads": ("layers", "class Edge(Mask)", "cut, *_"),
    "more attention to a span": ("layers", "log_alpha =", "marked"),
    "a policy of what a store keeps": ("layers", "class EveryOther(Retain)", "return"),
    "a mixer with a state": ("layers", "class MeanSoFar(nn.Mixer)", 'return state["count"][:, 0]'),
    "a normaliser": ("attend", "class Softplus(Elementwise)", "return"),
}


def code_lines(page, first, last):
    """The lines from the first to the last, without docstrings and empty lines; with the decorator of a part."""
    lines = PAGES[f"{page}.md"].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(first))
    end = next(i for i, line in enumerate(lines[start:], start) if line.strip().startswith(last) and i > start)
    if last == "return":  # the last of the class
        end = max(i for i in range(start, lines.index("```", start)) if lines[i].strip().startswith("return"))
        end = min(end, next((i for i in range(start + 1, end) if re.match(r"\w", lines[i])), end + 1) - 1)
    text = re.sub(r'""".*?"""', "", "\n".join(lines[start : end + 1]), flags=re.DOTALL)
    return len([line for line in text.splitlines() if line.strip()]) + (lines[start - 1] == "@part")


def test_the_counted_lines_are_those_of_the_pages():
    table = PAGES["layers.md"].split("## What it takes")[1]
    said = {name: int(count) for name, count in re.findall(r"^\| ([^|]+?) \| (\d+) \|", table, flags=re.MULTILINE)}
    assert said.pop("a Flax module with this attention") == 1
    assert said == {name: code_lines(*where) for name, where in COUNTED.items()}
    assert max(count for name, count in said.items() if name != "a mixer with a state") <= 10
    assert said["a mixer with a state"] <= 25


def test_the_page_on_causes(page):
    """The parts add up, runs that begin in the middle are the whole ones, and circuits end at the two runs."""
    inside = page("inside")
    np.testing.assert_allclose(inside.same, inside.ablated, rtol=1e-4, atol=1e-6)
    assert np.ptp(np.asarray(inside.by_mean)) > 0
    assert inside.by_place.share.shape == (3, 12)
    np.testing.assert_allclose(inside.by_place.share[0, :3], 0, atol=1e-5)  # both runs are the same before token 3
    np.testing.assert_allclose(inside.into_keys.share[2], 0, atol=1e-5)  # heads of layer 2 are too late for its keys
    np.testing.assert_allclose(inside.parts.total(), inside.metric(inside.logits), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(inside.kept.kept[jnp.array([0, 3])], [0, 1], atol=1e-4)
    assert inside.k_composition.shape == (3, 4, 3, 4)


def test_the_page_on_patterns(page):
    """Rollout and flow are shares of inputs, and the first layer is what its matrix says."""
    patterns = page("patterns")
    for shares in (patterns.reached, patterns.measured, patterns.flow):
        np.testing.assert_allclose(np.asarray(shares).sum(-1), 1, rtol=1e-5)
    assert_close(patterns.reached[0], patterns.one_layer)
    assert patterns.effects.shape == (2, 12)
    assert (patterns.places.shape, patterns.trivial.shape) == ((8, 2), (2, 2, 4))
    assert (patterns.between.shape, patterns.close["first"].shape) == ((2, 4, 9, 9), (2, 4))
    assert patterns.chordal
    np.testing.assert_allclose(patterns.mass.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(patterns.rings.mass.sum(-1), 1)
    assert (patterns.aligned.shape, patterns.where.shape) == ((1, 2, 5, 5), (2, 3, 3))
    assert_close(patterns.shares.sum(), patterns.answer(np.ones((1, 4)))[0] - patterns.answer(np.zeros((1, 4)))[0])
    assert patterns.follows < -0.3
    np.testing.assert_allclose(patterns.implied.sum(-1), 1, rtol=1e-5)
    assert patterns.errors.stream[0] == 0


def test_the_page_on_heads(page):
    """Nothing is found in a random model, parts add up, and orders of removal end at the same loss."""
    heads = page("heads")
    assert heads.names == [[""] * 4] * 3
    np.testing.assert_allclose(heads.curves[:, -1], heads.curves[0, -1], rtol=1e-5)
    np.testing.assert_allclose(heads.pairs.sum(), heads.terms.sum(), rtol=1e-3, atol=1e-4)
    assert heads.scores.shape == heads.importance.shape == heads.successor.score.shape == (3, 4)
    assert heads.influence.shape == (4,)
    np.testing.assert_array_equal(heads.text[:12], heads.written[0, :12])
    assert heads.text.shape == (14,)


def test_the_page_on_models(page):
    """What it builds has the shapes it names; replaced mixers read what they say, and a folder comes back."""
    models = page("models")
    assert (models.logits.shape, models.pooled.shape) == ((2, 5, 50), (2, 32))
    assert models.records["cross.weights"].shape == (2, 2, 4, 5, 12)
    assert models.text.tokens.shape == (2, 4)
    tokens = np.asarray(models.tokens)
    near = models.windowed(tokens)[0]
    changed = models.windowed(np.where(np.arange(12) == 0, (tokens + 1) % 50, tokens))[0]
    assert np.abs(near[:, 11] - changed[:, 11]).max() > 0  # layer 0 sees all, the others 4 tokens
    assert [mixer.target.__name__ for mixer in (layer.branches[0].module for layer in models.linear.config.layers)] == [
        "Linearized"
    ] * 3
    first, second = (np.asarray(each(tokens)[0]) for each in (models.gpt2, models.again.model))
    np.testing.assert_array_equal(second, first)
    assert models.again.config == models.published


def test_the_page_on_decoding(page):
    p = page("decoding")
    for text in (p.fast, p.self_drafted, p.same):
        np.testing.assert_array_equal(text.tokens, p.plain.tokens)
        assert int(text.calls) <= 16
    np.testing.assert_array_equal(p.path, [[True, True, False, True, False]] * 2)
    np.testing.assert_array_equal(p.finished[1].tokens, p.plain.tokens[1])
    assert sorted(p.finished) == [0, 1, 2]
    assert (np.diff(p.found.scores) <= 0).all()
    assert (p.written.read >= 4).all()
    np.testing.assert_array_equal(p.model.reached(p.back) - p.model.reached(p.state), [0, 1])
    np.testing.assert_array_equal(p.model.reached(p.swapped), p.model.reached(p.back)[::-1])


def test_the_page_on_training(page):
    p = page("training")
    whole = p.result.history
    assert (
        [line["step"] for line in p.lines] == [line["step"] for line in whole if line["step"] > 20] == [25, 30, 35, 40]
    )
    assert whole[-1]["loss"] < whole[0]["loss"] - 0.5
    assert "validation_bits_per_byte" in whole[-1]
    assert not [name for name in p.by_rule.metrics if "byte" in name]  # of tokens that are no text
    best = min((x["validation_loss"], x["step"]) for x in whole if "validation_loss" in x and x["step"] > 20)
    assert p.step == best[1]
    assert p.model.config == p.decoder
    updates, _ = p.chain.update(p.params, p.chain.init(p.params), p.params)
    assert jax.tree.structure(updates) == jax.tree.structure(p.params)
    assert p.on_all.history[-1]["loss"] < p.on_all.history[0]["loss"] - 0.1
    embedding = jax.tree.leaves(p.on_all.params["embed"])[0]
    assert embedding.addressable_shards[0].data.size * jax.device_count() == embedding.size


def test_the_page_on_meshes(page):
    """A run on a mesh learns, and its model on another mesh gives the logits of one device."""
    p = page("meshes")
    first, *_, last = (line["loss"] for line in p.result.history)
    assert last < first - 0.5
    assert np.isfinite(p.metrics["loss"])
    alone, *_ = nnx.merge(p.graph, jax.device_get(p.arrays), p.rest)(np.zeros((4, 16), np.int32))
    assert_close(p.found, alone)
    assert_close(p.spread, alone)


def test_the_page_on_other_models_and_losses(page):
    p = page("training_models")
    for result in (p.masked, p.pictures, p.answered, p.series):
        first, *_, last = (line["loss"] for line in result.history)
        assert last < first - 0.1, result.folder
    assert p.pictures.metrics["correct"] == 1
    assert float(p.total) / float(p.sums["weight"]) > 0
    # 64 pairs, none of which is known yet: about log 64.
    assert 1 < float(p.of_pairs) / 64 < 2 * np.log(64)


def test_the_page_on_a_look_inside(page):
    """The page of the page has its arrays, and every picture is in its table."""
    look = page("look")
    for number, example in enumerate(payload(look.page)):
        weights = np.asarray(look.seen["weights"])[:, number]
        assert (abs(decoded(example["weights"]) - weights) <= weights.max(-1, keepdims=True) / 507.9).all()
        assert example["key_heads"] == 2
    named = set(re.findall(r"viz\.(show_\w+)", PAGES["look.md"].split("## Pictures")[1]))
    assert named == {name for name in viz.__all__ if name.startswith("show_")}
