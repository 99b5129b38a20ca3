"""The page: its numbers are those that were given, nothing is fetched, and a browser shows what is in it."""

import base64
import json
import re
import shutil
import subprocess

import ml_dtypes
import numpy as np
import pytest
from html_pages import array, decoded, payload
from PIL import Image

from jaxattn import viz

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: pages are not looked at")
TOKENS = ["<s>", " the", "</script>", "\"'&<b>", "http", "\n\t", "“é”", "中"]


def causal(layers, heads, length, seed=0):
    weights = np.tril(np.random.default_rng(seed).exponential(size=(layers, heads, length, length)))
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def largest_of_rows(weights):
    return np.abs(np.asarray(weights, float)).max(-1, keepdims=True)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_decode_within_a_255th_of_the_row_maximum(dtype):
    weights = causal(2, 3, 8).astype(dtype)
    weights[0, 0, 5] = 0  # a row without weight
    weights[1, 2, 6:] = 0
    weights[1, 2, 6:, 3] = 1e-9  # and one of tiny weights
    (example,) = payload(viz.page({"a": viz.Example(TOKENS, weights)}))
    assert (np.abs(decoded(example["weights"]) - weights.astype(float)) <= largest_of_rows(weights) / 255).all()


def test_hiding_the_first_key_leaves_numbers_that_are_as_fine():
    """Where nearly all weight is on the first key, the rest is kept within a 508th of its own largest."""
    weights = causal(1, 1, 8)
    weights[..., 1:] *= 1e-4
    weights[..., 0] = 1 - weights[..., 1:].sum(-1)
    (example,) = payload(viz.page({"a": viz.Example(TOKENS, weights)}))
    found = decoded(example["weights"])
    np.testing.assert_array_equal(found[..., 0], weights[..., 0])
    assert (np.abs(found - weights)[..., 1:] <= weights[..., 1:].max(-1, keepdims=True) / 507).all()


def test_what_is_zero_is_not_stored_and_windows_are_short():
    band = np.triu(causal(1, 1, 8), -1)
    (example,) = payload(viz.page({"a": viz.Example(TOKENS, band)}))
    assert array(example["weights"]["length"], "<u2").tolist() == [0, 1, 2, 2, 2, 2, 2, 2]


def test_signed_and_not_finite_numbers_of_a_matrix_are_kept():
    scores = np.random.default_rng(1).normal(size=(5, 7)).astype(np.float32)
    scores[1, 3:], scores[2, 0], scores[3] = -np.inf, np.nan, np.nan
    (example,) = payload(viz.page({"a": viz.Example(TOKENS, causal(1, 1, 8), matrices={"scores": scores})}))
    found = decoded(example["matrices"][0]["values"])
    finite = np.isfinite(scores)
    assert (np.isfinite(found) == finite).all()
    around = np.where(finite, scores, 0)
    spread = np.maximum(around, 0).max(-1, keepdims=True) - np.minimum(around, 0).min(-1, keepdims=True)
    assert (np.abs(found - scores) <= spread / 507)[finite].all()


def test_texts_cannot_end_the_page_and_come_back_visible():
    for title in ("</title><script>alert(1)</script>", "http://a"):
        page = viz.page({"http </script>": viz.Example(TOKENS, causal(1, 1, 8))}, title=title)
        assert "http" not in page
        assert page.count("</script>") == 2
        assert "<script>alert" not in page
        (example,) = payload(page)
        assert example["name"] == "http </script>"
        assert example["tokens"] == ["<s>", "␣the", "</script>", "\"'&<b>", "http", "⏎⇥", "“é”", "中"]


def test_a_large_page_keeps_the_largest_weights_and_says_so():
    weights = causal(4, 4, 200)
    full = viz.page({"a": viz.Example(["x"] * 200, weights)})
    queries = np.ones((4, 4, 200, 8), np.float32)
    largest = len(full) + 1000
    (example,) = payload(
        viz.page({"a": viz.Example(["x"] * 200, weights, queries=queries, keys=queries)}, largest=largest)
    )
    assert example["notes"] == ["To keep the page small, queries and keys are left out."]
    assert "queries" not in example
    page = viz.page({"a": viz.Example(["x"] * 200, weights)}, largest=300_000)
    assert len(page.encode()) <= 300_000
    (example,) = payload(page)
    kept = int(re.search(r"the (\d+) largest others", example["notes"][0])[1])
    found = decoded(example["weights"])
    assert ((found[..., 1:] != 0).sum(-1) <= kept).all()
    share = np.where(found > 0, weights, 0).sum(-1) / weights.sum(-1)
    said = [float(number) / 100 for number in re.findall(r"([\d.]+)%", example["notes"][0])]
    np.testing.assert_allclose(said, [share.mean(), share.min()], atol=2e-3)
    row = np.argsort(-weights[1, 2, 199, 1:])[:kept] + 1
    assert (found[1, 2, 199, row] > 0).all()
    with pytest.raises(ValueError, match="larger than 100000 bytes: need fewer layers"):
        viz.page({"a": viz.Example(["x"] * 200, weights)}, largest=100_000)


def test_the_page_of_a_small_language_model_is_below_its_limit():
    weights = causal(30, 9, 128)
    page = viz.page({"a": viz.Example(["x"] * 128, weights)})
    assert len(page.encode()) < 4_000_000
    assert not payload(page)[0]["notes"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": np.ones((2, 8, 8))}, r"weights has shape \(2, 8, 8\): need \[layers, heads, queries, keys\]"),
        ({"tokens": TOKENS[1:]}, "tokens has 7 entries: need 8"),
        ({"weights": np.ones((2, 4, 8, 5))}, "key_tokens is None, but weights has 8 queries and 5 keys"),
        ({"layers": [3]}, "layers has 1 entries: need 2"),
        ({"statistics": {"entropy": np.ones(4)}}, r"statistics\['entropy'\] has shape \(4,\): need \(2, 4\)"),
        ({"queries": np.ones((2, 4, 8, 3))}, "one of queries and keys"),
        ({"queries": np.ones((2, 4, 8, 3)), "keys": np.ones((2, 3, 8, 3))}, r"a divisor of 4, 8, channels"),
        ({"matrices": {"m": np.ones(3)}}, r"matrices\['m'\] has shape \(3,\)"),
        ({"lens": viz.Lens([[["a"]] * 7] * 2, np.ones((2, 7, 1)))}, r"need \[2, 8, k\] of both"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    given = {"tokens": TOKENS, "weights": causal(2, 4, 8)} | change
    with pytest.raises(ValueError, match=message):
        viz.page({"a": viz.Example(**given)})


def test_a_page_of_nothing_is_refused():
    with pytest.raises(ValueError, match="examples is empty"):
        viz.page({})


# ---- In a browser


def browse(folder, file, size, *options):
    """Runs the browser on a file; returns what it printed, and fails if the page printed anything to its console."""
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
        *("--allow-file-access-from-files", "--enable-logging=stderr", "--virtual-time-budget=3000"),
        *(f"--user-data-dir={folder / 'profile'}", f"--window-size={size[0]},{size[1]}", *options, f"file://{file}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert ":CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout


@pytest.fixture(scope="module")
def stripe(tmp_path_factory):
    """A folder with a page: head (1, 2) looks two tokens back and the others at all tokens alike."""
    folder, length = tmp_path_factory.mktemp("page"), 16
    weights = np.tril(np.ones((2, 4, length, length)))
    weights[1, 2] = np.eye(length, k=-2) + 1e-3
    weights /= weights.sum(-1, keepdims=True)
    words = (TOKENS * 2)[:length]
    queries, keys = (np.random.default_rng(n).normal(size=(2, n, length, 8)) for n in (4, 2))
    entropy = -(weights * np.log(np.where(weights > 0, weights, 1))).sum(-1).mean(-1)
    lens = viz.Lens([[[word, "b"] for word in [*words[1:], "?"]]] * 2, np.full((2, length, 2), 0.4))
    whole = viz.Example(
        words,
        weights,
        statistics={"entropy": entropy},
        lens=lens,
        queries=queries,
        keys=keys,
        matrices={"m": keys[0, 0]},
    )
    across = viz.Example(words, np.ones((1, 1, length, 3)) / 3, key_tokens=["u", "v", "w"], layers=[7], heads=[5])
    tiny = viz.Example(["a"], np.ones((1, 1, 1, 1)))
    signed = np.array([[0.5, 0, 0], [-0.5, 1, 0], [np.nan, 0.25, -1]])
    odd = viz.Example(["a", "", "c"], signed[None, None], statistics={"negative": [[-0.25]], "none": [[np.nan]]})
    examples = {"whole": whole, "across": across, "tiny": tiny, "odd": odd}
    (folder / "page.html").write_text(viz.page(examples, "Stripes & stars"), encoding="utf-8")
    return folder


def screenshot(folder, where, size=(1400, 1000)):
    file = folder / "shot.png"
    browse(folder, f"{folder / 'page.html'}#{where}", size, f"--screenshot={file}")
    return np.asarray(Image.open(file).convert("RGB"), float)


def in_frame(folder, script, where="", size=(380, 900)):
    """What a script returns that runs beside the page in a frame of this size: `page` is its window."""
    (folder / "frame.html").write_text(
        f"""<iframe id="frame" width="{size[0]}" height="{size[1]}" src="page.html#{where}"></iframe>
        <pre id="result">never run</pre><script>
        const press = (key, target) => (target ?? page.document.body).dispatchEvent(
            new page.KeyboardEvent("keydown", {{ key, bubbles: true, cancelable: true }}));
        const title = () => page.document.getElementById("one-title").textContent;
        let page;
        document.getElementById("frame").addEventListener("load", (event) => {{
            page = event.target.contentWindow;
            let found;
            try {{ found = (() => {{ {script} }})(); }} catch (error) {{ found = String(error); }}
            document.getElementById("result").textContent = btoa(unescape(encodeURIComponent(JSON.stringify(found))));
        }});
        </script>""",
        encoding="utf-8",
    )
    shown = browse(folder, folder / "frame.html", (1400, 1000), "--dump-dom")
    return json.loads(base64.b64decode(re.search(r'<pre id="result">(.*?)</pre>', shown)[1]))


def panel_of(pixels, box):
    """The pixels of a picture of T x S pairs at this box (left, top, width, height), as [T, S]: their middles."""
    left, top, width, height = box
    rows, columns = (np.arange(16) + 0.5) / 16 * height + top, (np.arange(16) + 0.5) / 16 * width + left
    return pixels[rows.astype(int)[:, None], columns.astype(int)]


@pytest.fixture(scope="module")
def box(stripe):
    """Where the large matrix is on the page at 1400 x 1000: left, top, width, height."""
    return in_frame(
        stripe,
        """const shown = page.document.querySelector("#matrix canvas").getBoundingClientRect();
        const { left, top, across, down } = page.eval("matrix");
        return [shown.left + left, shown.top + top, 16 * across, 16 * down];""",
        size=(1400, 1000),
    )


@in_a_browser
def test_errors_of_a_page_are_noticed(tmp_path):
    (tmp_path / "page.html").write_text("<script>nothing()</script>")
    with pytest.raises(AssertionError, match="nothing is not defined"):
        browse(tmp_path, tmp_path / "page.html", (400, 400), "--dump-dom")


@in_a_browser
def test_the_stripe_is_where_the_weights_are(stripe, box):
    light = panel_of(screenshot(stripe, "layer=1&head=2&theme=light"), box).mean(-1)
    on, off = light[np.eye(16, k=-2, dtype=bool)], light[~np.eye(16, k=-2, dtype=bool)][30:]
    assert on.max() < 80 < 180 < off.min()
    dark = panel_of(screenshot(stripe, "layer=1&head=2&theme=dark"), box).mean(-1)
    on, off = dark[np.eye(16, k=-2, dtype=bool)], dark[~np.eye(16, k=-2, dtype=bool)][30:]
    assert on.min() > 200 > 100 > off.max()
    even = panel_of(screenshot(stripe, "layer=0&head=2&theme=light&colours=row"), box).mean(-1)
    lower = np.tril(np.ones((16, 16), bool))
    assert even[lower].max() < 80 < 200 < even[~lower].min()


@in_a_browser
def test_the_small_picture_of_a_head_has_the_stripe_and_a_click_on_it_chooses_the_head(stripe):
    script = """const box = page.document.getElementById("grid").getBoundingClientRect();
    const { left, top, cell } = page.eval("grid"), x = box.left + left + 2 * cell, y = box.top + top + cell;
    page.document.getElementById("grid").dispatchEvent(
        new page.MouseEvent("click", { clientX: x + cell / 2, clientY: y + cell / 2, bubbles: true }));
    return [[x, y, cell - 3, cell - 3], title()];"""
    place, title = in_frame(stripe, script, "layer=0&head=0&theme=light", size=(1400, 1000))
    assert title == "Layer 1, head 2"
    small = panel_of(screenshot(stripe, "layer=0&head=0&theme=light"), place).mean(-1)
    on = np.eye(16, k=-2, dtype=bool)
    assert small[on].max() < 100 < 180 < small[~on][30:].min()


@in_a_browser
def test_the_read_out_names_the_pair_and_its_weight(stripe):
    script = """const canvas = page.document.querySelector("#matrix canvas");
    for (const key of [...Array(4).fill("ArrowDown"), "ArrowRight"]) press(key, canvas);
    return [page.document.querySelector("#matrix .readout").textContent, title()];"""
    said, title = in_frame(stripe, script, "layer=1&head=2")
    assert title == "Layer 1, head 2"  # arrows in the matrix are of the matrix
    number = float(re.fullmatch(r"query 3 “.*” → key 1 “␣the”: weight ([\d.]+); largest of the row .*", said)[1])
    assert abs(number - 1.001 / 1.016) < 4e-3


@in_a_browser
def test_dark_mode_follows_the_system(stripe):
    # `preferredColorScheme` of the browser's settings: 0 is dark, 1 is light.
    shots = []
    for scheme in (0, 1):
        file = stripe / "scheme.png"
        options = (f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={file}")
        browse(stripe, stripe / "page.html", (900, 600), *options)
        shots.append(np.asarray(Image.open(file).convert("L"), float))
    assert np.median(shots[0]) < 60
    assert np.median(shots[1]) > 220


@in_a_browser
def test_a_narrow_screen_does_not_scroll_sideways(stripe):
    for where in ("layer=1&head=2", "text=across", "text=tiny&hide=1", "text=odd&colours=row"):
        script = """const root = page.document.documentElement;
        return [root.scrollWidth, root.clientWidth, root.dataset.ready];"""
        width, seen, ready = in_frame(stripe, script, where)
        assert ready == "true"
        assert width <= seen <= 380


@in_a_browser
def test_the_title_names_layer_and_head_and_what_is_hidden(stripe):
    script = """const titles = [title()];
    press("ArrowRight"); titles.push(title());
    press("ArrowDown"); titles.push(title());
    press("ArrowDown"); titles.push(title());
    press("0"); titles.push(title());
    return titles;"""
    assert in_frame(stripe, script, "layer=0&head=2") == [
        "Layer 0, head 2",
        "Layer 0, head 3",
        "Layer 1, head 3",
        "Layer 1, head 3",
        "Layer 1, head 3 · first key hidden, rows renormalised",
    ]
    assert in_frame(stripe, "return title();", "text=across&layer=7&head=5") == "Layer 7, head 5"


@in_a_browser
def test_weights_of_both_signs_are_not_renormalised_and_nan_is_told(stripe):
    script = """const values = [...page.eval("weightsNow()")].map(String);
    page.eval("matrix.move([2, 0])");
    return [title(), values, page.document.querySelector("#matrix .readout").textContent];"""
    heading, values, said = in_frame(stripe, script, "text=odd")
    assert heading == "Layer 0, head 0"
    np.testing.assert_allclose(np.array(values, float), [0.5, 0, 0, -0.5, 1, 0, np.nan, 0.25, -1], atol=1.25 / 507)
    assert "weight not finite" in said
    heading, values, _ = in_frame(stripe, script, "text=odd&hide=1")
    assert heading.endswith("first key hidden, rows as they were (weights have both signs)")
    np.testing.assert_allclose(np.array(values, float), [0, 0, 0, 0, 1, 0, 0, 0.25, -1], atol=1.25 / 507)


@in_a_browser
def test_rows_without_the_first_key_have_their_former_total(stripe):
    shown = in_frame(stripe, "return [...page.eval('weightsNow()')];", "layer=0&head=1&hide=1")
    rows = np.reshape(shown, (16, 16))
    assert (rows[:, 0] == 0).all()
    np.testing.assert_allclose(rows.sum(-1), [0, *[1] * 15], rtol=1e-5)
    np.testing.assert_allclose(rows[9, 1:10], 1 / 9, rtol=5e-3)


@in_a_browser
def test_chosen_rows_are_summed(stripe):
    script = """const queries = page.document.getElementById("queries");
    for (const n of [5, 9]) queries.children[n].click();
    return page.document.getElementById("sum").textContent;"""
    said = in_frame(stripe, script, "layer=1&head=2")
    assert said.startswith("Sum of the rows of 2 queries: ")
    weights = np.eye(16, k=-2) + 1e-3
    weights /= weights.sum(-1, keepdims=True)
    found = dict(re.findall(r"(\d+) “.*?” ([\d.]*\d)", said))
    total = weights[[5, 9]].sum(0)
    for key, number in found.items():
        assert abs(float(number) - total[int(key)]) < 4e-3
    assert {"3", "7"} <= set(found)


@in_a_browser
def test_the_product_of_a_pair_is_that_of_its_query_and_key(stripe):
    script = """page.eval("state.pair = [11, 4]; choose(1, 2)");
    const say = (id) => page.document.getElementById(id).textContent;
    return [say("pair-title"), say("dot")];"""
    heading, said = in_frame(stripe, script)
    queries, keys = (np.random.default_rng(n).normal(size=(2, n, 16, 8)).astype(np.float32) for n in (4, 2))
    dot = queries[1, 2, 11] @ keys[1, 1, 4]  # heads 2 and 3 share the second key head
    assert heading.startswith("Layer 1, head 2: query 11")
    numbers = [float(x.replace("−", "-")) for x in re.findall(r"−?[\d.]+", said)]
    np.testing.assert_allclose(numbers[:3], [dot, 8**-0.5, dot * 8**-0.5], rtol=1e-3)


@in_a_browser
def test_texts_are_shown_as_they_are(stripe):
    script = """const texts = [...page.document.querySelectorAll("#queries li")].map((item) => item.title);
    const count = (what) => page.document.querySelectorAll(what).length;
    const heading = page.document.querySelector("h1").textContent;
    return [heading, texts, count("b, #queries script"), count("#table td.right")];"""
    heading, texts, alien, right = in_frame(stripe, script)
    assert heading == "Stripes & stars"
    assert texts[:8] == [f"{n} “{viz.figure.visible(token)}”" for n, token in enumerate(TOKENS)]
    assert alien == 0
    assert right == 2 * 15  # each row of the lens predicts each next token; the last has none


@in_a_browser
def test_help_and_names_for_those_who_do_not_see(stripe):
    script = """press("?");
    const named = (element) => element.getAttribute("aria-label") || element.getAttribute("aria-hidden")
        || element.getAttribute("aria-labelledby") || element.closest("label") || element.textContent.trim();
    const all = [...page.document.querySelectorAll("canvas, button, select, input, section, [tabindex]")];
    return [page.document.getElementById("help").open, all.filter((element) => !named(element)).length, all.length];"""
    opened, nameless, count = in_frame(stripe, script)
    assert opened
    assert nameless == 0 < count
