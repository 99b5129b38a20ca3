"""The role of every parameter of every module for weight decay and Muon, and the names of its axes for a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxattn import Causal, models, nn
from jaxattn.core.linear import TaylorFeatures
from jaxattn.train import OptimizerConfig, decay_mask, make_optimizer, parameter_roles, with_params

D, N = 16, 2
STILL = models.Spec(nn.NeuralMemory, heads=N, hidden=(6,), inner_batch=2, convolution=0)
MEMORY_UNDECAYED = {"rate/bias", "forget/bias", "carry/bias", "out/norm/scale"}
OF_HYMBA = {"a_log", "skip", "step_bias", "convolution/bias"} | {f"norms/{x}/scale" for x in ("step", "key", "query")}

# Spec -> (what is decayed but is no hidden matrix, what is not decayed); all else must be the kernel of a linear map.
MIXERS = {
    "attention": (models.Spec(nn.MultiHeadAttention, heads=N), set(), set()),
    "all of attention": (
        models.Spec(
            nn.MultiHeadAttention,
            heads=N,
            qk_norm=models.Spec(nn.RMSNorm),
            gate=True,
            normalize=models.Spec(nn.NullSoftmax),
            convolution=2,
        ),
        {f"convolution/{x}/weight" for x in ("query", "key", "value")},
        {"query_norm/scale", "key_norm/scale", "normalize/null_logit"},
    ),
    "latent attention": (
        models.Spec(nn.LatentAttention, heads=N, query_rank=5),
        set(),
        {"query_norm/scale", "latent_norm/scale"},
    ),
    "linear attention": (models.Spec(nn.LinearAttention, heads=N, normalize=False), set(), {"out/norm/scale"}),
    "based": (models.Spec(nn.LinearAttention, heads=N, feature_map=TaylorFeatures(2), key_dim=4), set(), set()),
    "hedgehog": (
        models.Spec(nn.LinearAttention, heads=N, feature_map=models.Spec(nn.HedgehogMap)),
        set(),
        {f"feature_map/{x}_{y}" for x in ("query", "key") for y in ("weight", "bias")},
    ),
    "performer": (models.Spec(nn.LinearAttention, heads=N, feature_map=models.Spec(nn.RandomFeatureMap)), set(), set()),
    "linearized": (
        models.Spec(nn.Linearized, attention=models.Spec(nn.MultiHeadAttention, heads=N, mask=Causal())),
        set(),
        {f"feature_map/{x}_{y}" for x in ("query", "key") for y in ("weight", "bias")},
    ),
    "retnet": (models.Spec(nn.RetNet, heads=N), set(), {"out/norm/scale"}),
    "gla": (models.Spec(nn.GLA, heads=N), set(), {"decay/up/bias", "out/norm/scale"}),
    "hgrn2": (models.Spec(nn.HGRN2, heads=N), set(), {"norm/scale"}),
    "deltanet": (
        models.Spec(nn.DeltaNet, heads=N),
        {f"project/convolution/{x}/weight" for x in ("query", "key", "value")},
        {"out/norm/scale"},
    ),
    "gated deltanet": (
        models.Spec(nn.DeltaNet, heads=N, decay="head", convolution=0),
        set(),
        {"a_log", "step_bias", "out/norm/scale"},
    ),
    "kimi delta": (
        models.Spec(nn.DeltaNet, heads=N, decay="channel", convolution=0),
        set(),
        {"a_log", "step_bias", "out/norm/scale", "out/gate/up/bias"},
    ),
    "mamba": (models.Spec(nn.S6, state=3), {"convolution/weight"}, {"a_log", "skip", "step_bias", "convolution/bias"}),
    "mamba2": (
        models.Spec(nn.Mamba2, heads=N, state=3),
        {f"project/convolution/{x}/weight" for x in ("query", "key", "value")},
        {"a_log", "skip", "step_bias", "norm/scale"}
        | {f"project/convolution/{x}/bias" for x in ("query", "key", "value")},
    ),
    "rwkv7": (
        models.Spec(nn.RWKV7, heads=N, keys_from="layer"),
        set(),
        {"bonus", "removed", "replaced", "scale", "shift"}
        | {f"low_rank/{x}/up/bias" for x in ("decay", "rate", "value")}
        | {f"mix/{x}" for x in ("receptance", "key", "value", "decay", "rate", "gate")},
    ),
    "channel mix": (models.Spec(nn.ChannelMix, hidden=5), set(), {"mix"}),
    "latte": (models.Spec(nn.Latte, heads=N, window=3), set(), set()),
    "convolution": (models.Spec(nn.GatedConvolution), {"convolution/weight"}, {"up/bias", "gate/bias", "out/bias"}),
    "titans": (STILL, {"weights/0", "weights/1"}, MEMORY_UNDECAYED),
    "ttt": (
        models.Spec(nn.TTT, heads=N, deep=True),
        {"weights/0", "weights/1", "convolution/query/weight", "convolution/key/weight"},
        {"biases/0", "biases/1", "convolution/query/bias", "convolution/key/bias", "rows", "gain", "shift"}
        | {"norm/scale", "norm/bias", "rate/bias"},
    ),
    "hymba": (
        models.Spec(nn.hymba_heads, heads=N, state=3),
        {"mixers/1/convolution/weight"},
        {f"mixers/1/{x}" for x in OF_HYMBA | {"signal/bias", "gate/bias"}}
        | {f"mixers/0/{x}/bias" for x in ("query", "key", "value")}
        | {"norms/0/scale", "norms/1/scale", "out/bias"},
    ),
    "memory as context": (
        models.Spec(nn.MemoryAsContext, heads=N, segment=4, persistent=2, memory=STILL),
        {"memory/weights/0", "memory/weights/1"},
        {f"memory/{x}" for x in MEMORY_UNDECAYED} | {"persistent", "norms/0/scale", "norms/1/scale"},
    ),
    "memory as layer": (
        models.Spec(nn.memory_as_layer, heads=N, window=4, persistent=2, memory=STILL),
        {"mixer/mixers/0/weights/0", "mixer/mixers/0/weights/1"},
        {f"mixer/mixers/0/{x}" for x in MEMORY_UNDECAYED} | {"prefix"},
    ),
}

MODULES = {
    "bilinear": (lambda rngs: nn.BilinearScore(4, 2), {"weight"}, set()),
    "additive": (lambda rngs: nn.AdditiveScore(4, 3, rngs=rngs), {"pair_weight", "vector"}, set()),
    "neural": (lambda rngs: nn.NeuralScore(4, 3, 2, rngs=rngs), {"w1", "w2", "w3"}, {"b1", "b2"}),
    "relative": (lambda rngs: nn.RelativePositionBias(2), set(), {"table"}),
    "temperature": (lambda rngs: nn.LearnedTemperature(2), set(), {"log_temperature"}),
    "heads": (lambda rngs: nn.HeadMixing(2), set(), {"weight"}),
    "key-query convolution": (lambda rngs: nn.KeyQueryConvolution(2, 2, 3), set(), {"kernel"}),
    "sink": (lambda rngs: nn.NullSoftmax(2), set(), {"null_logit"}),
    "merged linear": (lambda rngs: nn.MergedLinearAttention(4, rngs=rngs), {"kq", "pv"}, set()),
    "merged softmax": (lambda rngs: nn.MergedSoftmaxHeads(2, 4, rngs=rngs), {"kq", "ov"}, set()),
    "attention with biases": (
        lambda rngs: nn.MultiHeadAttention(8, 2, use_bias=True, gate=True, rngs=rngs),
        set(),
        {f"{x}/bias" for x in ("query", "key", "value", "out", "gate")},
    ),
    "feed forward": (
        lambda rngs: nn.FeedForward(4, 8, use_bias=True, rngs=rngs),
        set(),
        {f"{x}/bias" for x in ("up", "gate", "down")},
    ),
}


def roles(module):
    """Path -> role; `mechanism` is left out of paths."""
    said = nnx.to_flat_state(parameter_roles(nnx.state(module, nnx.Param)))
    return {"/".join(str(name) for name in path if name != "mechanism"): role.get_value() for path, role in said}


def assert_roles(module, decayed, undecayed):
    said = roles(module)
    others = set(said) - decayed - undecayed
    assert {path.split("/")[-1] for path in others} <= {"kernel"}, others
    expected = dict.fromkeys(others, "hidden") | dict.fromkeys(decayed, "decayed")
    assert said == expected | dict.fromkeys(undecayed, "undecayed")
    for path, param in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        assert "role" in param.get_metadata(), path
        axes = param.get_metadata()["axes"]
        assert {axis[0] if isinstance(axis, tuple) else axis for axis in axes} - {None} <= set(nn.RULES), path
        for axis, size in zip(axes, param.shape, strict=True):
            assert not isinstance(axis, tuple) or size % axis[1] == 0, path


@pytest.mark.parametrize("name", MIXERS)
def test_every_parameter_of_a_mixer_says_its_role_and_its_axes(name):
    spec, decayed, undecayed = MIXERS[name]
    assert_roles(nn.as_mixer(spec, features=D, dtype=jnp.float32, rngs=nnx.Rngs(0)), decayed, undecayed)


@pytest.mark.parametrize("name", MODULES)
def test_every_parameter_of_a_module_says_its_role_and_its_axes(name):
    make, decayed, undecayed = MODULES[name]
    assert_roles(make(nnx.Rngs(0)), decayed, undecayed)


def test_scanned_layers_name_the_axis_of_layers():
    for path, param in nnx.to_flat_state(nnx.state(decoder().runs, nnx.Param)):
        axes = param.get_metadata()["axes"]
        assert axes[0] == "layers", path
        assert len(axes) == param.ndim, path


def test_every_mechanism_there_is_stands_in_the_table():
    shown = {spec.target for spec, _, _ in MIXERS.values()}
    public = {each for name in nn.__all__ if isinstance(each := getattr(nn, name), type)}
    assert {each for each in public if issubclass(each, nn.Mechanism)} - {nn.Mechanism} <= shown


LAYER = models.pre_norm(models.Spec(nn.Mamba2, heads=N, state=3))


def decoder(**changes):
    config = {"vocabulary": 5, "length": 8, "width": D, "layers": [LAYER] * 2}
    return models.Transformer(models.TransformerConfig(**config | changes), rngs=nnx.Rngs(0))


def test_embeddings_and_the_output_are_decayed_and_no_hidden_matrices():
    said = roles(decoder(head=models.Spec(nn.Head), meta_tokens=2))
    assert said["embed/table"] == said["head/map/kernel"] == "decayed"
    assert said["meta"] == said["norm/scale"] == said["runs/0/branches/0/norm/scale"] == "undecayed"
    assert said["runs/0/branches/1/module/up/kernel"] == "hidden"
    said = roles(decoder(head=models.Spec(nn.Head), embed=models.Spec(nn.VectorEmbedding, inputs=3)))
    assert (said["embed/map/kernel"], said["embed/map/bias"]) == ("decayed", "undecayed")
    config = models.TransformerConfig(
        vocabulary=5, width=D, layers=[models.pre_norm(models.Spec(nn.MultiHeadAttention, heads=N))]
    )
    said = roles(models.FoldedDecoder(config, segment=2, condense="queries", rngs=nnx.Rngs(0)))
    assert said["start"] == said["queries"] == said["norm/scale"] == "undecayed"
    assert said["enter/kernel"] == "hidden"


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decay_leaves_alone_what_says_so_in_scanned_layers(name):
    """After a jitted step without gradients, undecayed parameters are to the bit what they were."""
    params = nnx.state(decoder(), nnx.Param)
    params = jax.tree.map(lambda x: x + 1, params)
    optimizer = make_optimizer(OptimizerConfig(name, learning_rate=0.5, warmup_steps=0, weight_decay=0.1), 10)

    @jax.jit
    def step(params):
        updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    after, decayed = step(params), jax.tree.leaves(decay_mask(params))
    assert 0 < sum(decayed) < len(decayed)
    for before, now, is_decayed in zip(jax.tree.leaves(params), jax.tree.leaves(after), decayed, strict=True):
        if is_decayed:
            np.testing.assert_allclose(now, 0.95 * before, rtol=8 * np.finfo(np.float32).eps)
        else:
            np.testing.assert_array_equal(now, before)


def test_roles_survive_what_training_does_to_parameters():
    model = decoder()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    expected = parameter_roles(params)

    def loss(params):
        return nnx.merge(graph, params, rest)(jnp.zeros((1, 3), int))[0].sum()

    for each in (
        jax.jit(jax.grad(loss))(params),
        nnx.state(nnx.merge(graph, params, rest), nnx.Param),
        nnx.state(nnx.eval_shape(decoder), nnx.Param),
        nnx.state(with_params(decoder(), params), nnx.Param),
        optax.tree.get(optax.scale_by_adam().init(params), "mu"),
    ):
        assert parameter_roles(each) == expected
