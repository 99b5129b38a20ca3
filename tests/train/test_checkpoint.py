"""Checkpoints give back what was saved, or say why not and what is used instead."""

import errno
import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType

from jaxattn.train import Checkpoints, State, check_config, init_state, load

OPTIMIZER = optax.adam(1e-3)
CONFIG = {"model": {"width": 4, "layers": ["a", "b"]}, "seed": 0}


def state_at(step, value=0.0):
    params = {"layer": {"kernel": jnp.full((2, 3), value + step), "half": jnp.full(3, 1 / 3, jnp.bfloat16)}}
    state = init_state(params, OPTIMIZER, jax.random.key(7))
    return state._replace(step=jnp.int32(step))


def save_steps(folder, steps, keep=3):
    with Checkpoints(folder, keep) as checkpoints:
        for step in steps:
            checkpoints.save(state_at(step), {"next_index": step}, CONFIG)


def restore(folder, like=None, config=CONFIG, free=()):
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore_latest(state_at(0) if like is None else like, config, free)


def assert_bitwise(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(a) == jax.random.key_impl(b)
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_state_comes_back_bit_for_bit(tmp_path):
    params = {
        "float": jax.random.normal(jax.random.key(0), (3, 2)),
        "half": jnp.array([1 / 3, -0.0, 3e38], jnp.bfloat16),
        "subnormal": jnp.float32(1e-45),
        "integer": jnp.array([2**31 - 1, -(2**31)]),
        "flag": jnp.array(True),
        "key": jax.random.split(jax.random.key(3), 2),
        "empty": jnp.zeros((0, 4)),
        "list": [jnp.arange(3.0), (jnp.float32(1),)],
    }
    inner = optax.adam(1e-3).init({"float": params["float"]})
    state = State(jnp.int32(41), params, (inner, optax.EmptyState()), jax.random.key(9, impl="rbg"))
    like = jax.tree.map(
        lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.zeros_like(leaf), state
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {"next_index": 3}, CONFIG)
        restored = checkpoints.restore_latest(like, CONFIG)
    assert_bitwise(restored.state, state)
    assert restored.iterator == {"next_index": 3}


def test_the_parameters_of_flax_modules_come_back(tmp_path):
    params = nnx.split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)[1]
    state = init_state(params, OPTIMIZER, jax.random.key(0))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {}, CONFIG)
        like = init_state(jax.tree.map(jnp.zeros_like, params), OPTIMIZER, jax.random.key(1))
        assert_bitwise(checkpoints.restore_latest(like, CONFIG).state, state)
    loaded = load(tmp_path, lambda config: nnx.split(nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0))))[1])
    assert_bitwise(loaded.params, params)


def test_a_checkpoint_is_read_to_the_mesh_of_the_run_that_reads_it(tmp_path):
    def spread(mesh, value):
        params = {"kernel": nnx.Param(jnp.full((8, 16), value) + jnp.arange(16), axes=("width", "hidden"))}
        return init_state(params, OPTIMIZER, jax.random.key(7), mesh)

    def mesh(**sizes):
        return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))

    saved = spread(mesh(fsdp=8), 1.0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(saved, {}, CONFIG)
        for other in (mesh(fsdp=2, tensor=4), mesh(data=8), None):
            like = spread(other, 0.0)
            restored = checkpoints.restore_latest(like, CONFIG).state
            assert_bitwise(restored, saved)
            for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
                assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
                assert ours.committed == theirs.committed  # what is not may be moved to any mesh later
    loaded = load(tmp_path, lambda config: jax.eval_shape(lambda: spread(None, 0.0).params)).params
    assert_bitwise(loaded, saved.params)
    assert not loaded["kernel"].get_value().committed


def test_without_checkpoints_there_is_nothing_to_restore(tmp_path):
    assert restore(tmp_path / "new") is None


def test_the_newest_checkpoint_is_restored_and_the_last_few_are_kept(tmp_path):
    save_steps(tmp_path, [2, 10, 9, 30], keep=2)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps()[-1] == 30
        assert len(checkpoints.steps()) == 2
        assert checkpoints.describe_latest() == f"the last good checkpoint is step 30 in {tmp_path}"
    assert_bitwise(restore(tmp_path).state, state_at(30))
    with pytest.raises(ValueError, match="keep is 0: need at least 1"):
        Checkpoints(tmp_path, keep=0)


def garble(file):
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if content else b"x")


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def remove(file):
    file.unlink()


@pytest.mark.parametrize("damage", [garble, *(pytest.param(x, marks=pytest.mark.slow) for x in (truncate, remove))])
def test_any_damage_to_the_newest_checkpoint_falls_back_and_says_so(damage, tmp_path):
    save_steps(tmp_path / "good", [1, 2])
    names = sorted(file.relative_to(tmp_path / "good" / "2") for file in (tmp_path / "good" / "2").rglob("*"))
    names = [name for name in names if (tmp_path / "good" / "2" / name).is_file()]
    names = [name for name in names if damage is not truncate or (tmp_path / "good" / "2" / name).stat().st_size]
    assert len(names) > 5
    for i, name in enumerate(names):
        folder = tmp_path / str(i) / "checkpoints"
        shutil.copytree(tmp_path / "good", folder)
        file = folder / "2" / name
        if damage is remove and file.name == "checksums.json":  # see the test of a checkpoint without them
            continue
        damage(file)
        with pytest.warns(UserWarning, match=r"checkpoint of step 2 is damaged \(.*\): step 1 is used") as found:
            assert_bitwise(restore(folder).state, state_at(1))
        assert len(found) == 1
        # The damaged files are kept, out of the way of saving that step again.
        assert (folder.with_name("damaged") / "2").is_dir()
        save_steps(folder, [2])
        assert_bitwise(restore(folder).state, state_at(2))


def test_a_half_written_checkpoint_is_not_one(tmp_path):
    save_steps(tmp_path, [1, 2])
    (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_bitwise(restore(tmp_path).state, state_at(1))
    assert not (tmp_path / "2.orbax-checkpoint-tmp").exists()


def test_a_checkpoint_whose_checksums_were_not_yet_written_is_whole(tmp_path):
    save_steps(tmp_path, [1, 2])
    (tmp_path / "2" / "checksums.json").rename(tmp_path / "2" / "checksums.json.tmp")
    assert_bitwise(restore(tmp_path).state, state_at(2))


def test_when_no_checkpoint_can_be_read_nothing_is_changed(tmp_path):
    save_steps(tmp_path, [1, 2])
    for step in "12":
        garble(tmp_path / step / "record" / "metadata")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read \(step 2: file record/metadata has changed"):
        restore(tmp_path)
    with pytest.raises(ValueError, match=r"has no checkpoint that can be read \(step 2: .*; step 1: "):
        load(tmp_path, lambda config: state_at(0).params)
    assert contents(tmp_path) == before


def test_a_checkpoint_of_another_config_names_the_fields_and_changes_nothing(tmp_path):
    save_steps(tmp_path, [1])
    before = contents(tmp_path)
    other = {"model": {"width": 8, "layers": ["a", "c"]}, "seed": 0, "new": None}
    with pytest.raises(ValueError, match="of another config") as error:
        restore(tmp_path, config=other)
    for words in ("model.width was 4, now 8;", 'model.layers.1 was "b", now "c";', "new was absent, now null."):
        assert words in str(error.value)
    assert "seed" not in str(error.value)
    assert contents(tmp_path) == before


def test_free_fields_may_differ():
    saved = {"train": {"keep": 1, "steps": 5}}
    check_config(saved, {"train": {"keep": 2, "steps": 5}}, "x", free=("train.keep",))
    with pytest.raises(ValueError, match=r"^x is of another config: train.steps was 5, now 6\."):
        check_config(saved, {"train": {"keep": 2, "steps": 6}}, "x", free=("train.keep",))


def test_a_config_equals_itself_after_json():
    config = {"tuple": (1, 2), "empty": {}, "float": 0.1, "none": None}
    check_config(json.loads(json.dumps(config)), config, "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {**p, "more": jnp.ones(1)}, "lacks .*params.more: it is of another model or optimiser"),
        (lambda p: {"layer": {"kernel": p["layer"]["kernel"]}}, "also holds .*params.layer.half"),
        (
            lambda p: {"layer": {**p["layer"], "kernel": jnp.ones((3, 2))}},
            r"holds params.layer.kernel as float32\[2, 3\]: the model or optimiser needs float32\[3, 2\]",
        ),
        (
            lambda p: {"layer": {**p["layer"], "half": jnp.ones(3)}},
            r"holds params.layer.half as bfloat16\[3\]: the model or optimiser needs float32\[3\]",
        ),
    ],
)
def test_arrays_of_another_model_are_named(change, message, tmp_path):
    save_steps(tmp_path, [1])
    like = init_state(change(state_at(0).params), OPTIMIZER, jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        restore(tmp_path, like)


def test_load_needs_no_optimizer_and_makes_the_model_from_the_config(tmp_path):
    save_steps(tmp_path / "checkpoints", [1, 2])
    seen = []

    def like(config):
        seen.append(config)
        return jax.eval_shape(lambda: state_at(0).params)

    for folder in (tmp_path, tmp_path / "checkpoints"):  # of the run, and of its checkpoints
        loaded = load(folder, like)
        assert (loaded.config, loaded.step) == (CONFIG, 2)
        assert_bitwise(loaded.params, state_at(2).params)
    assert seen == [CONFIG, CONFIG]


def test_load_falls_back_and_changes_nothing(tmp_path):
    save_steps(tmp_path, [1, 2])
    garble(tmp_path / "2" / "record" / "metadata")
    before = contents(tmp_path)
    with pytest.warns(UserWarning, match="step 2 is damaged .*: step 1 is used instead"):
        assert load(tmp_path, lambda config: state_at(0).params).step == 1
    assert contents(tmp_path) == before


def test_load_says_when_there_is_nothing_to_load(tmp_path):
    with pytest.raises(ValueError, match=r"folder '.*nowhere' does not exist"):
        load(tmp_path / "nowhere", lambda config: {})
    with pytest.raises(ValueError, match=r"has no checkpoint that can be read \(there is none\)"):
        load(tmp_path, lambda config: {})


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), ValueError("RESOURCE_EXHAUSTED: ... No space left on device")],
)
def test_a_full_disk_loses_only_the_checkpoint_that_was_to_be_saved(error, tmp_path, monkeypatch):
    save_steps(tmp_path, [1])
    before = contents(tmp_path)

    def fail(manager, step, **options):
        temporary = tmp_path / f"{step}.orbax-checkpoint-tmp"
        temporary.mkdir()
        (temporary / "half").write_text("half")
        raise error

    with Checkpoints(tmp_path) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(ocp.CheckpointManager, "save", fail)
            with pytest.raises(OSError, match="the disk is full") as found:
                checkpoints.save(state_at(2), {}, CONFIG)
        assert found.value.errno == errno.ENOSPC
        assert "the checkpoint of step 2 was not saved" in str(found.value)
        assert f"the last good checkpoint is step 1 in {tmp_path}" in str(found.value)
        assert contents(tmp_path) == before
        assert_bitwise(checkpoints.restore_latest(state_at(0), CONFIG).state, state_at(1))
        checkpoints.save(state_at(2), {}, CONFIG)  # once there is space again
        assert checkpoints.steps() == [1, 2]


def test_other_errors_of_saving_are_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    def fail(manager, step, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(ocp.CheckpointManager, "save", fail)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(PermissionError):
        checkpoints.save(state_at(2), {}, CONFIG)
