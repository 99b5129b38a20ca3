"""Files of ONNX, torch and CTranslate2 are read without the libraries that wrote them, and without running code."""

import io
import json
import os
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from experiments import weights
from jaxattn.models.pretrained import PACKAGED

DRAW = np.random.default_rng(0).standard_normal


@pytest.fixture
def saved(monkeypatch, tmp_path):
    """A function that writes tensors as torch does: views into numbers that are stored apart."""
    fake, inside = types.ModuleType("torch"), types.ModuleType("torch._utils")

    def _rebuild_tensor_v2(*_):
        raise AssertionError("the name stands for it")

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    inside._rebuild_tensor_v2 = _rebuild_tensor_v2
    fake.FloatStorage = type("FloatStorage", (), {"__module__": "torch"})
    for name, module in (("torch", fake), ("torch._utils", inside)):
        monkeypatch.setitem(sys.modules, name, module)

    class Tensor:
        def __init__(self, key, count, offset, shape, steps):
            self.key, self.count, self.rest = key, count, (offset, shape, steps)

        def __reduce__(self):
            return _rebuild_tensor_v2, (Stored(self.key, self.count), *self.rest, False, OrderedDict())

    class Stored:
        def __init__(self, key, count):
            self.said = ("storage", fake.FloatStorage, key, "cpu", count)

    class Writer(pickle.Pickler):
        def persistent_id(self, each):
            return each.said if isinstance(each, Stored) else None

    def pickled(state):
        file = io.BytesIO()
        Writer(file, 2).dump(state)
        return file.getvalue()

    def save(state, numbers, *, packed):
        path = tmp_path / "pytorch_model.bin"
        if packed:
            with zipfile.ZipFile(path, "w") as file:
                file.writestr("pytorch_model/data.pkl", pickled(state))
                for key, each in numbers.items():
                    file.writestr(f"pytorch_model/data/{key}", each.tobytes())
        else:
            parts = [pickle.dumps(each, 2) for each in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
            parts += [pickled(state), pickle.dumps(list(numbers), 2)]
            parts += [struct.pack("<q", len(each)) + each.tobytes() for each in numbers.values()]
            path.write_bytes(b"".join(parts))
        return path

    return save, Tensor


@pytest.mark.parametrize("packed", [True, False])
def test_tensors_of_torch_are_views_of_stored_numbers(packed, saved):
    save, tensor = saved
    numbers = {"0": np.arange(12, dtype=np.float32), "1": np.ones(1, np.float32)}
    state = OrderedDict(
        whole=tensor("0", 12, 0, (3, 4), (4, 1)),
        turned=tensor("0", 12, 4, (4, 2), (1, 4)),
        one=tensor("1", 1, 0, (), ()),
        none=tensor("1", 1, 0, (0, 2), (2, 1)),
    )
    found = weights.torch_arrays(save(state, numbers, packed=packed))
    whole = np.arange(12).reshape(3, 4)
    np.testing.assert_array_equal(found["whole"], whole)
    np.testing.assert_array_equal(found["turned"], whole[1:].T)
    assert (found["one"], found["none"].shape) == (1, (0, 2))


def test_a_pickle_that_would_run_code_is_refused(saved, tmp_path):
    save, tensor = saved

    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for packed in (True, False):
        with pytest.raises(ValueError, match=r"the pickle names posix\.mkdir: need tensors and dicts only"):
            weights.torch_arrays(save({"a": Runs()}, {}, packed=packed))
    assert not (tmp_path / "ran").exists()
    for offset, shape, steps in ((1, (3, 4), (4, 1)), (0, (3,), (6,)), (-1, (2,), (1,)), (4, (2,), (-4,))):
        state = {"a": tensor("0", 12, offset, shape, steps)}
        path = save(state, {"0": np.zeros(12, np.float32)}, packed=True)
        with pytest.raises(ValueError, match="reaches beyond its 12 numbers"):
            weights.torch_arrays(path)


def test_maps_of_onnx_get_their_names_back(tmp_path):
    """A map in 32 bits whose name is lost, one in 8 bits by channel, a table in 8 bits, and a bias."""
    plain, bias = DRAW((3, 4)).astype(np.float32), DRAW(4).astype(np.float32)
    whole = np.arange(-10, 10, dtype=np.int8).reshape(4, 5)
    scale, zero = np.array([0.5, 1, 2, 4, 8], np.float32), np.array([0, 1, -2, 3, 0], np.int8)
    table = np.arange(6, dtype=np.uint8).reshape(3, 2)
    stored = {
        "onnx::MatMul_7": plain,
        "model.first.bias": bias,
        "onnx::MatMul_9_quantized": whole,
        "onnx::MatMul_9_scale": scale,
        "onnx::MatMul_9_zero_point": zero,
        "model.table.weight_quantized": table,
        "model.table.weight_scale": np.float32(0.25),
        "model.table.weight_zero_point": np.uint8(2),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["y"], name="/model/first/MatMul"),
        helper.make_node(
            "MatMulInteger",
            ["z", "onnx::MatMul_9_quantized", "a", "onnx::MatMul_9_zero_point"],
            ["w"],
            name="/model/layer.0/second/MatMul_quant",
        ),
    ]
    arrays = [numpy_helper.from_array(np.asarray(each), name) for name, each in stored.items()]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", inputs, [], arrays)), tmp_path / "model.onnx")
    found = weights.onnx_arrays(tmp_path / "model.onnx")
    assert set(found) == {"model.first.weight", "model.first.bias", "model.layer.0.second.weight", "model.table.weight"}
    np.testing.assert_array_equal(found["model.first.weight"], plain.T)
    np.testing.assert_array_equal(found["model.first.bias"], bias)
    expected = [[scale[j] * (int(whole[i, j]) - int(zero[j])) for i in range(4)] for j in range(5)]
    np.testing.assert_array_equal(found["model.layer.0.second.weight"], expected)
    np.testing.assert_array_equal(found["model.table.weight"], (table.astype(float) - 2) * 0.25)


def test_variables_of_ctranslate2_are_read(tmp_path):
    def text(word):
        return struct.pack("<H", len(word) + 1) + word.encode() + b"\0"

    half = DRAW((2, 3)).astype(np.float16)
    content = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, 2)
    content += text("a/weight") + struct.pack("<BIIBI", 2, 2, 3, 4, half.nbytes) + half.tobytes()
    content += text("heads") + struct.pack("<BBI", 0, 2, 2) + struct.pack("<h", 8) + struct.pack("<I", 0)
    (tmp_path / "model.bin").write_bytes(content)
    found = weights.ctranslate2_arrays(tmp_path / "model.bin")
    np.testing.assert_array_equal(found["a/weight"], half)
    assert int(found["heads"]) == 8
    (tmp_path / "model.bin").write_bytes(struct.pack("<I", 5) + content[4:])
    with pytest.raises(ValueError, match="has version 5: need 6"):
        weights.ctranslate2_arrays(tmp_path / "model.bin")


def test_a_folder_is_written_once(saved, monkeypatch, tmp_path, capsys):
    """From weights that were fetched before; no registry is asked."""
    monkeypatch.setenv("JAXATTN_WEIGHTS", str(tmp_path))
    save, tensor = saved
    path = save({"wte": tensor("0", 6, 0, (3, 2), (2, 1))}, {"0": np.arange(6, dtype=np.float32)}, packed=True)
    folder = tmp_path / "gut-gpt2"
    folder.mkdir()
    path.rename(folder / "pytorch_model.bin")
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    weights.main(["gut-gpt2"])
    made = folder / "converted"
    assert capsys.readouterr().out == f"{made}\n"
    assert sorted(file.name for file in made.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((made / "config.json").read_text()) == {"model_type": "gpt2"}
    before = (made / "model.safetensors").stat().st_mtime_ns
    assert weights.folder_of("gut-gpt2") == made
    assert (made / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(SystemExit):
        weights.main(["unheard"])
    assert "experiments.weights: name is 'unheard': need one of" in capsys.readouterr().err
    assert set(weights.CONVERTED) < set(PACKAGED)
