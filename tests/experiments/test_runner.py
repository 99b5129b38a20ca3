"""The runner: claims are judged by their numbers alone, results are kept by seed, and mistakes get one clear line."""

import dataclasses
import io
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from pages import run_page
from rich.console import Console

from jaxattn import papers
from jaxattn.claims import (
    Claim,
    Curves,
    Experiment,
    Maps,
    Range,
    Result,
    at_least,
    at_most,
    judge,
    load,
    names,
    outside,
    report,
    runner,
    within,
)
from jaxattn.claims.__main__ import main

QUIET = Console(quiet=True)


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.5


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 10
    sizes: tuple[int, ...] = (1, 2)
    inner: Inner = Inner()


CLAIMS = (
    Claim("The sum grows.", "performer", "sum", at_least(10)),
    Claim("The sum | is small.", "performer", "sum", at_most(1), refuted=at_least(5)),
    Claim("What cannot be measured holds.", "performer", "absent", at_least(0)),
)


def measure(config, seed, folder, console):
    assert not folder.exists()
    return Result(
        {"sum": config.steps + seed + jnp.float32(0.5), "absent": None},
        {"rows": [{"size": size, "kind": "a|b", "value": float(size + seed)} for size in config.sizes]},
        {
            "lines": Curves("x", "y", {"a": [(1, 1.0 + seed), (2, np.float32(2))], "b": [(1, 3.0)]}, log="xy"),
            "weights": Maps({"one": np.eye(3).tolist(), "two": jnp.eye(3)}),
        },
    )


@pytest.fixture
def toy(monkeypatch):
    """An experiment that counts its runs."""
    calls = []

    def run(config, seed, folder, console):
        calls.append(seed)
        return measure(config, seed, folder, console)

    run.calls = calls
    toy = Experiment("toy", "A toy.", Config(), Config(steps=3), CLAIMS, run)
    monkeypatch.setattr(report, "load", lambda name: toy if name == "toy" else load(name))
    return toy


def go(toy, folder, config=None, seeds=2):
    return runner.run(toy, config or toy.default, seeds=seeds, folder=folder, command="python -m x", console=QUIET)


# Verdicts


def test_a_range_holds_its_ends_and_never_nan():
    for range, inside, out in (
        (at_least(2), (2, math.inf), (1.99, -math.inf)),
        (at_most(2), (2, -5), (2.01,)),
        (within(-0.6, -0.4), (-0.6, -0.5), (-0.61, 0)),
        (outside(within(1, 2)), (0.9, 2.1), (1, 1.5, 2)),
    ):
        assert all(x in range for x in inside)
        assert not any(x in range for x in (*out, math.nan))
    assert [str(x) for x in (at_least(1), at_most(2), within(1, 2), outside(at_most(2)))] == [
        "at least 1",
        "at most 2",
        "1 to 2",
        "not at most 2",
    ]


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([2, 3], "confirmed"),
        ([2, 0.5], "not seen at this scale"),
        ([0, -1], "refuted"),
        ([0, 0.5], "not seen at this scale"),
        ([2, None], "not seen at this scale"),
        ([math.nan], "not seen at this scale"),
        ([], "not seen at this scale"),
    ],
)
def test_a_verdict_needs_every_seed(values, verdict):
    assert judge(Claim("", "", "", confirmed=at_least(1), refuted=at_most(0)), values) == verdict


def test_without_a_range_that_refutes_nothing_is_refuted():
    assert judge(Claim("", "", "", at_least(1)), [-100]) == "not seen at this scale"


# What is written


def test_the_report_begins_with_what_was_studied_and_the_claims_and_shows_every_seed(toy, tmp_path):
    folder = go(toy, tmp_path / "toy")
    lines = (folder / "report.md").read_text().splitlines()
    assert lines[:5] == ["# toy", "", "A toy.", "", "Seeds: 0, 1; ± is the standard deviation over seeds."]
    assert [line.split(" | ")[0] for line in lines[8:11]] == [
        "| **confirmed**",
        "| **refuted**",
        "| **not seen at this scale**",
    ]
    assert "11 ± 0.71 | 10.5, 11.5 |" in lines[8]
    assert "The sum \\| is small." in lines[9]
    assert lines[10].endswith("| – | –, – |")
    text = "\n".join(lines)
    assert "| 2 | a\\|b | 2.5 ± 0.71 |" in text
    assert "| sizes | `[1, 2]` |" in text
    assert "python -m x" in text
    for figure in ("lines", "weights"):
        assert f"]({figure}.png)" in text
        assert (folder / f"{figure}.png").read_bytes().startswith(b"\x89PNG")


def test_text_that_differs_is_shown_by_seed_and_other_rows_are_refused(toy, tmp_path):
    def run(config, seed, folder, console):
        result = toy.run(config, seed, folder, console)
        rows = [{"size": 1, "kind": "same", "found": f"it {seed}"}] * (seed // 2 + 1)
        return dataclasses.replace(result, tables={"rows": rows})

    folder = go(toy._replace(run=run), tmp_path / "toy")
    assert "| 1 | same | it 0 / it 1 |" in (folder / "report.md").read_text()
    with pytest.raises(ValueError, match=r"the table 'rows' has \[1, 1, 2\] rows by seed: need as many each"):
        go(toy._replace(run=run), tmp_path / "toy", seeds=3)


def test_one_file_holds_every_number(toy, tmp_path):
    folder = go(toy, tmp_path / "toy")
    record = json.loads((folder / "results.json").read_text())
    assert record["config"] == {"steps": 10, "sizes": [1, 2], "inner": {"rate": 0.5}}
    assert [claim["verdict"] for claim in record["claims"]] == ["confirmed", "refuted", "not seen at this scale"]
    assert [seed["numbers"]["sum"] for seed in record["seeds"]] == [10.5, 11.5]
    assert {"command", "seconds", "python", "jax", "cores", "device", "code"} <= record["seeds"][0]["made"].keys()
    assert not list(folder.rglob("*.tmp"))


def test_numbers_that_are_not_finite_are_null():
    assert runner.plain({"a": (math.nan, jnp.inf, jnp.arange(2), np.float32(0.5), True, "b")}) == {
        "a": [None, None, [0, 1], 0.5, True, "b"]
    }


def test_a_figure_is_the_mean_over_seeds_in_the_band_of_all():
    figure = Curves.draw([Curves("x", "y", {"a": [(1, y), (2, 5.0)]}) for y in (1.0, 2.0, 6.0)])
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[1, 3], [2, 5]])
    band = axes.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (1, 6)


def test_a_point_alone_has_its_name_beside_it_and_its_seeds_on_a_line():
    figure = Curves.draw([Curves("x", "y", {"a": [(2, y)], "b": [(1, 0.0), (2, 0.0)]}) for y in (1.0, 3.0)])
    axes = figure.axes[0]
    assert [(text.get_text(), *text.xy) for text in axes.texts] == [("a", 2, 2)]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["b"]
    np.testing.assert_allclose(axes.collections[0].get_segments(), [[[2, 1], [2, 3]]])
    assert Curves.draw([Curves("x", "y", {"a": [(2, 1.0)]})]).legends == []


def test_points_that_lie_elsewhere_for_every_seed_are_not_joined():
    figure = Curves.draw([Curves("x", "y", {"a": [(x, 1.0)], "b": [(0, 0.0), (1, 0.0)]}) for x in (2, 5)])
    points, line = figure.axes[0].lines
    np.testing.assert_allclose(points.get_xydata(), [[2, 1], [5, 1]])
    assert points.get_linestyle() == "None"
    assert line.get_linestyle() == "-"


def test_points_that_could_not_be_measured_are_left_out():
    figure = Curves.draw([Curves("x", "y", {"a": [(1, 1.0), (2, y)]}) for y in (None, 4.0)])
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xydata(), [[1, 1], [2, 4]])


# Running again


def test_an_axis_ends_below_the_beginning_of_a_loss_and_never_below_a_peak_in_the_middle():
    def top(line):
        return Curves.draw([Curves("x", "y", {"a": list(enumerate(line))})]).axes[0].get_ylim()[1]

    flat = [0.1, 0.2] * 10
    assert top([9.0, 4.0, *flat]) == pytest.approx(0.3)  # 1.5 times the quantile at 0.9
    assert top([*flat, 9.0, *flat]) > 9
    assert top([0.1, 9.0, *flat]) > 9
    assert top([0.8, 0.7, *flat]) > 0.8  # not above three times where the axis would end


def test_a_legend_has_as_many_columns_as_fit():
    for lines, columns in ((("a", "b", "c"), 3), (("a name of 40 letters that is quite long " + x for x in "abc"), 2)):
        figure = Curves.draw([Curves("x", "y", {name: [(0, 1.0), (1, 2.0)] for name in lines})])
        figure.savefig(io.BytesIO())
        (legend,) = figure.legends
        assert legend._ncols == columns
        box = legend.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.width


def test_finished_seeds_are_kept_and_new_ones_added(toy, tmp_path):
    go(toy, tmp_path / "toy", seeds=2)
    before = (tmp_path / "toy" / "seeds" / "1.json").read_bytes()
    go(toy, tmp_path / "toy", seeds=3)
    assert toy.run.calls == [0, 1, 2]
    assert (tmp_path / "toy" / "seeds" / "1.json").read_bytes() == before
    assert len(json.loads((tmp_path / "toy" / "results.json").read_text())["seeds"]) == 3


def test_a_run_that_dies_goes_on_after_its_last_finished_seed(toy, tmp_path):
    def dies(config, seed, folder, console):
        if seed == 1:
            raise KeyboardInterrupt
        return toy.run(config, seed, folder, console)

    with pytest.raises(KeyboardInterrupt):
        go(toy._replace(run=dies), tmp_path / "toy")
    go(toy, tmp_path / "toy")
    assert toy.run.calls == [0, 1]


def test_a_seed_took_as_long_as_all_of_its_runs(toy, tmp_path, monkeypatch):
    now = iter([10.0, 13.0, 100.0, 104.5])
    monkeypatch.setattr(runner, "time", SimpleNamespace(perf_counter=lambda: next(now)))

    def dies(*given):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(toy._replace(run=dies), tmp_path / "toy", seeds=1)
    go(toy, tmp_path / "toy", seeds=1)
    assert report.read_seeds(tmp_path / "toy")[0]["made"]["seconds"] == 3 + 4.5
    assert {file.name for file in (tmp_path / "toy" / "seeds").iterdir()} == {"0.json"}


def test_another_config_is_refused_and_changes_nothing(toy, tmp_path):
    go(toy, tmp_path / "toy")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=r"config\.inner\.rate was 0\.5, now 0\.25.*another output folder"):
        go(toy, tmp_path / "toy", Config(inner=Inner(0.25)))
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


def test_each_config_has_a_place_of_its_own(toy, tmp_path):
    places = [runner.place(tmp_path, toy, config).name for config in (Config(), Config(steps=3), Config(steps=4))]
    assert places[:2] == ["toy", "toy-quick"]
    assert places[2].startswith("toy-")
    assert len(set(places)) == 3


def test_the_index_holds_the_claims_of_all_runs(toy, tmp_path):
    go(toy, tmp_path / "toy")
    go(toy, tmp_path / "toy-quick", toy.quick)
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "config.json").write_text('{"experiment": "gone", "config": {}}')
    for name, held in (("training", '{"model": {}}'), ("empty", ""), ("list", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(held)
    go(toy, tmp_path / "old")
    seed = tmp_path / "old" / "seeds" / "0.json"
    seed.write_text(seed.read_text().replace('"Curves"', '"Bars"'))
    text = report.write_index(tmp_path)
    assert (tmp_path / "README.md").read_text() == text
    assert "- old: the figure 'lines' is of an unknown kind, 'Bars'" in text
    assert "- empty: " in text
    assert "- training: " not in text
    assert "- list: " not in text
    assert "gone: there is no experiment 'gone'" in text
    assert "1 confirmed, 1 refuted, 4 not seen at this scale." in text
    assert text.count("](toy/report.md)") == text.count("](toy-quick/report.md)") == 3


def test_what_earlier_versions_did_not_note_of_a_seed_is_missing(toy, tmp_path):
    folder = go(toy, tmp_path / "toy")
    file = folder / "seeds" / "1.json"
    seed = json.loads(file.read_text())
    del seed["made"]["code"]
    file.write_text(json.dumps(seed))
    report.write_report(folder, toy)
    (line,) = [line for line in (folder / "report.md").read_text().splitlines() if line.startswith("| code | ")]
    assert line.endswith(", – |")


# Criteria that move


def moved(toy, number, **changes):
    claims = list(toy.claims)
    claims[number] = dataclasses.replace(claims[number], **changes)
    return toy._replace(claims=tuple(claims))


def verdicts(folder):
    return [(x["verdict"], x["criterion"]) for x in json.loads((folder / "results.json").read_text())["claims"]]


def test_criteria_are_written_before_anything_is_measured(toy, tmp_path):
    def run(config, seed, folder, console):
        assert report.written_claims(folder.parent.parent) == list(CLAIMS)
        return toy.run(config, seed, folder, console)

    folder = go(toy._replace(run=run), tmp_path / "toy")
    assert verdicts(folder)[0] == ("confirmed", "at least 10")
    assert "criteri" not in (folder / "report.md").read_text().replace("| criterion |", "")
    held = (folder / "claims.json").read_text()
    assert json.loads(held)[0]["confirmed"] == {"low": 10, "high": None, "outside": False}
    go(moved(toy, 0, confirmed=at_least(3)), folder)
    assert (folder / "claims.json").read_text() == held


@pytest.mark.parametrize("resumed", [False, True])
def test_a_criterion_that_moved_after_measuring_is_not_confirmed(toy, tmp_path, resumed, capsys):
    """Neither when the report is made anew nor when a seed is added; it says from what to what."""
    folder = go(toy, tmp_path / "toy")
    later = moved(moved(toy, 0, confirmed=at_least(11)), 1, confirmed=at_most(20), refuted=None)
    if resumed:
        console = Console(width=300)
        runner.run(later, later.default, seeds=3, folder=folder, command="x", console=console)
        said = capsys.readouterr().out
        assert "toy: criterion changed: The sum grows. at least 11; was at least 10\n" in said
        assert "The sum | is small. at most 20; was at most 1 (refuted: at least 5)\n" in said
    else:
        report.write_report(folder, later)
    assert verdicts(folder) == [
        ("criterion changed", "at least 11; was at least 10, by which: confirmed"),
        ("criterion changed", "at most 20; was at most 1 (refuted: at least 5), by which: refuted"),
        ("not seen at this scale", "at least 0"),
    ]
    text = (folder / "report.md").read_text()
    assert "**2 of these criteria changed after they were written down, before measuring.**" in text
    assert "**confirmed**" not in text
    assert text.count("| **criterion changed** |") == 2


def test_the_index_counts_criteria_that_moved(toy, tmp_path, monkeypatch):
    go(toy, tmp_path / "toy")
    monkeypatch.setattr(report, "load", lambda name: moved(toy, 1, confirmed=at_most(20)))
    text = report.write_index(tmp_path)
    assert "1 confirmed, 0 refuted, 1 not seen at this scale, 1 criterion changed." in text
    assert "at most 20 (refuted: at least 5); was at most 1 (refuted: at least 5), by which: refuted" in text


def test_claims_that_come_or_go_after_measuring_are_named(toy, tmp_path):
    folder = go(toy, tmp_path / "toy")
    new = Claim("The sum is odd.", "performer", "sum", at_least(2))
    report.write_report(folder, toy._replace(claims=(CLAIMS[2], CLAIMS[0], new)))
    assert verdicts(folder) == [
        ("not seen at this scale", "at least 0"),
        ("confirmed", "at least 10"),
        ("criterion changed", "at least 2; was at most 1 (refuted: at least 5), by which: refuted"),
    ]
    report.write_report(folder, toy._replace(claims=CLAIMS[1:]))
    assert verdicts(folder)[-1] == (
        "criterion changed",
        "dropped after measuring; was at least 10, by which: confirmed",
    )
    report.write_report(folder, toy._replace(claims=(*CLAIMS, new)))
    assert verdicts(folder)[-1] == ("criterion changed", "at least 2; written after measuring")


def test_words_and_order_of_claims_may_change(toy, tmp_path):
    folder = go(toy, tmp_path / "toy")
    reworded = moved(toy, 0, says="The sum is large.")
    report.write_report(folder, reworded._replace(claims=reworded.claims[::-1]))
    assert {verdict for verdict, _ in verdicts(folder)} == {"confirmed", "refuted", "not seen at this scale"}


def test_a_run_without_written_criteria_says_so(toy, tmp_path):
    """Of a version that did not write them; those of now are not taken for them when it goes on."""
    folder = go(toy, tmp_path / "toy")
    (folder / "claims.json").unlink()
    go(toy, folder, seeds=3)
    assert not (folder / "claims.json").exists()
    assert (
        "The criteria of this run were not written down before it was measured." in (folder / "report.md").read_text()
    )


def test_many_may_write_one_file(tmp_path):
    def write(text):
        for _ in range(50):
            report.write(tmp_path / "file", text)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, "abcd"))
    assert (tmp_path / "file").read_text() in set("abcd")
    assert len(list(tmp_path.iterdir())) == 1


def test_results_from_before_a_claim_are_named_and_spoil_no_other(toy, tmp_path, monkeypatch):
    go(toy, tmp_path / "toy")
    later = toy._replace(claims=(*CLAIMS, Claim("It is new.", "performer", "new", at_least(0))))
    monkeypatch.setattr(report, "load", lambda name: later)
    assert "- toy: 'new' was not measured by an earlier version of the experiment" in report.write_index(tmp_path)


# Configs from the command line


def test_fields_are_set_by_name_in_nested_configs_too():
    config = runner.changed(Config(), ["steps=4", "sizes=[3]", "inner.rate=1e-2"])
    assert config == Config(4, (3,), Inner(0.01))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("stepz=4", "no field 'stepz': did you mean 'steps'?"),
        ("inner.rat=4", "did you mean 'inner.rate'?"),
        ("q=4", "there are steps, sizes, inner.rate"),
        ("steps=many", "steps must be int, got 'many'"),
        ("steps=1.5", "steps must be int, got '1.5'"),
        ("sizes=[a]", "sizes must be tuple[int, ...], got '[a]'"),
        ("sizes=[a: b]", "got '[a: b]'; names with ': ' need quotes"),
        ("inner.rate=x", "inner.rate must be float, got 'x'"),
        ("steps", "need field=value"),
    ],
)
def test_a_wrong_field_or_value_is_named(change, words):
    with pytest.raises(ValueError, match="--set") as error:
        runner.changed(Config(), [change])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_the_axes_of_maps_say_what_they_are():
    both = {"one": np.eye(2).tolist(), "two": np.eye(2).tolist()}
    for maps, y, x in (
        (Maps(both), "query position", "key position"),
        (Maps(both, y="row", x="column"), "row", "column"),
    ):
        axes = [each for each in Maps.draw([maps]).axes if each.get_images()]
        assert {each.get_ylabel() for each in axes} == {y, ""}
        assert {each.get_xlabel() for each in axes} == {x}


def test_every_map_has_a_scale_and_those_of_one_quantity_share_theirs():
    large, small, signed = [[0.0, 8.0]], [[None, 0.5]], [[-2.0, 1.0]]

    def scales(maps):
        axes = [each for each in Maps.draw([maps]).axes if each.axison]
        images = [each.get_images()[0] for each in axes if each.get_images()]
        return [(image.norm.vmin, image.norm.vmax) for image in images], len(axes) - len(images)

    assert scales(Maps({"large": large, "small": small, "signed": signed})) == ([(0, 8), (0, 0.5), (-2, 2)], 3)
    assert scales(Maps({"large": large, "small": small}, value="weight")) == ([(0, 8), (0, 8)], 1)
    assert scales(Maps({"nothing": [[None]]}, value="weight")) == ([(0, 1)], 1)
    named = Maps.draw([Maps({"a": large}, rows=["only"], columns=["left", "right"])]).axes[0]
    assert [label.get_text() for label in named.get_xticklabels()] == ["left", "right"]


# Experiments of one's own


def test_an_experiment_can_stand_in_a_file_anywhere(tmp_path, capsys, monkeypatch):
    file = tmp_path / "my_claim.py"
    file.write_text(
        """\"\"\"What is studied.\n\nAnd how.\n\"\"\"
from dataclasses import dataclass
from jaxattn.claims import Claim, Result, at_least
@dataclass(frozen=True)
class Config:
    steps: int = 4
QUICK = Config(2)
CLAIMS = (Claim("It is enough.", "a paper that no catalogue has", "steps", at_least(3)),)
def run(config, seed, folder, console):
    return Result({"steps": float(config.steps)})
"""
    )
    results = tmp_path / "results"
    main(["run", str(file), "--set", "steps=5", "--folder", str(results)])
    main(["run", str(file), "--folder", str(results)])
    assert "confirmed: It is enough." in capsys.readouterr().out
    text = (results / "my_claim" / "report.md").read_text()
    assert text.startswith("# my_claim\n\nWhat is studied.\n\nAnd how.\n\nSeeds: 0;")
    main(["report", "--folder", str(results)])
    assert (results / "README.md").read_text().count("It is enough.") == 2
    main(["keep", str(file), "--folder", str(results), "--place", str(tmp_path / "kept")])
    assert (tmp_path / "kept" / "my_claim" / "report.md").read_text() == text
    assert "there is no file" in fails(capsys, "run", tmp_path / "absent.py", "--folder", results)
    copy = tmp_path / "elsewhere" / "my_claim.py"
    copy.parent.mkdir()
    copy.write_text(file.read_text())
    assert "file was" in fails(capsys, "run", copy, "--folder", results)  # not taken for the one that is done
    named = tmp_path / "json.py"
    named.write_text(file.read_text())
    assert load(str(named)).run is not load(str(file)).run
    assert sys.modules["json"] is json
    monkeypatch.setattr("jaxattn.claims.experiment.PACKAGE", "a_package_that_is_not_there")
    assert names() == {}
    assert "no experiment 'recall': need a file, such as my_experiment.py" in fails(capsys, "run", "recall")
    (tmp_path / "empty.py").touch()
    assert "it has no Config, QUICK, CLAIMS, run" in fails(capsys, "run", tmp_path / "empty.py", "--folder", results)


# The command line


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_mistakes_get_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jaxattn.claims.experiment.names", lambda: {"recall": "", "feature_maps": ""})
    assert "no experiment 'recal': did you mean 'recall'?" in fails(capsys, "run", "recal", "--folder", tmp_path)
    assert "there are recall, feature_maps" in fails(capsys, "run", "zzz", "--folder", tmp_path)
    assert "need a NAME" in fails(capsys, "run", "--folder", tmp_path)
    assert "--set is for one experiment" in fails(capsys, "run", "--all", "--set", "steps=1", "--folder", tmp_path)
    assert not list(tmp_path.iterdir())


def test_run_and_report_from_the_shell(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jaxattn.claims.experiment.load", lambda name: toy)
    main(["run", "toy", "--quick", "--seeds", "2", "--folder", str(tmp_path)])
    assert "refuted: " not in capsys.readouterr().out
    assert (tmp_path / "toy-quick" / "report.md").exists()
    main(["run", "toy", "--set", "steps=3", "--folder", str(tmp_path)])
    assert toy.run.calls == [0, 1], "setting a field to its quick value is the quick run"
    main(["report", "--folder", str(tmp_path)])
    assert "not seen at this scale" in capsys.readouterr().out
    assert "toy-quick/report.md" in (tmp_path / "README.md").read_text()
    monkeypatch.setattr("jaxattn.claims.experiment.names", lambda: {"toy": "", "other": ""})
    for module in ("experiment", "report"):
        monkeypatch.setattr(f"jaxattn.claims.{module}.load", lambda name: toy._replace(name=name))
    main(["run", "--all", "--quick", "--folder", str(tmp_path / "all")])
    assert {file.parent.name for file in (tmp_path / "all").glob("*/report.md")} == {"toy-quick", "other-quick"}
    assert "seeds is 0" in fails(capsys, "run", "toy", "--seeds", 0, "--folder", tmp_path / "none")


def test_the_command_of_a_run_does_not_say_where_its_results_lie(toy, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxattn.claims.experiment.load", lambda name: toy)
    for folder in (["--folder", str(tmp_path / "a")], [f"--folder={tmp_path / 'b'}"]):
        main(["run", "toy", *folder, "--seeds", "2"])
    written = [file.read_text() for file in tmp_path.glob("*/toy/report.md")]
    assert ["| python -m experiments run toy --seeds 2 |" in text for text in written] == [True, True]


def test_a_report_is_kept_without_seeds_and_checkpoints(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jaxattn.claims.experiment.load", lambda name: toy)
    run, place = tmp_path / "results" / "toy", tmp_path / "kept"
    assert "run the experiment first" in fails(capsys, "keep", "toy", "--folder", tmp_path, "--place", place)
    go(toy, run)
    (place / "toy").mkdir(parents=True)
    (place / "toy" / "no_longer_drawn.png").touch()
    main(["keep", "toy", "--folder", str(tmp_path / "results"), "--place", str(place)])
    kept = {file.name for file in (place / "toy").iterdir()}
    assert kept == {"report.md", "results.json", *(file.name for file in run.glob("*.png"))}
    assert (place / "toy" / "report.md").read_text() == (run / "report.md").read_text()


# The experiments there are


@pytest.mark.parametrize("name", names())
def test_every_experiment_keeps_the_contract(name):
    experiment = load(name)
    assert experiment.about.endswith((".", ":", "?"))
    assert experiment.default != experiment.quick
    assert type(experiment.default) is type(experiment.quick)
    json.dumps(dataclasses.asdict(experiment.default))
    assert experiment.claims
    for claim in experiment.claims:
        assert isinstance(claim.confirmed, Range)
        assert papers.find(claim.paper) is not None, f"{claim.paper} is not in jaxattn.papers"


@pytest.mark.parametrize("name", names())
def test_every_experiment_is_run_by_a_test(name):
    """At its quick size, by the command: `quick_run`."""
    tests = [file.read_text() for file in Path(__file__).parent.glob("test_*.py")]
    assert any(f'quick_run("{name}")' in text for text in tests)


def test_programs_of_the_folder_that_claim_nothing_are_no_experiments():
    assert not {"demo", "gallery", "figures", "runner", "report", "experiment"} & set(names())


def test_the_experiment_of_the_page_runs(tmp_path):
    page = run_page("docs/experiments.md", tmp_path)
    one = Experiment("sparse_rows", "A page.", page["Config"](), page["QUICK"], page["CLAIMS"], page["run"])
    result = one.run(one.quick, 0, tmp_path / "0", QUIET)
    assert report.to_result(json.loads(json.dumps(runner.plain(report.from_result(result))))).numbers == result.numbers
    assert report.judged(one.claims, [result])[0][2] == "confirmed"
