"""The demo, at a size for tests: it ends with a table, figures and text, and runs again without training again."""

import pytest

from experiments import demo


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(demo, "CONTEXT", 48)
    monkeypatch.setattr(demo, "WIDTH", 16)
    monkeypatch.setattr(demo, "LAYERS", 2)


@pytest.mark.slow
def test_the_demo_trains_compares_and_draws(small, tmp_path, capsys):
    bits = demo.main(tmp_path, steps=2)
    shown = capsys.readouterr().out
    assert set(bits) == {"softmax", "window+sinks", "sigmoid"}
    for name, value in bits.items():
        assert 0 < value < 10
        assert f"generated: {name}" in shown
        assert f"{value:.3f}" in shown
    for figure in ("loss.png", "attention.png"):
        assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")
    assert demo.main(tmp_path, steps=2) == bits
    assert capsys.readouterr().out.count("is complete") == 3
