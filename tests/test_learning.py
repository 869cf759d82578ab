"""explain.py's page about a run: its numbers against the snapshots, and what a browser shows."""

import functools
import json
import re
import time

import conftest
import numpy as np
import pytest
from conftest import random_params
from test_explain import browser, click, emulate, every, js, press, read_page  # noqa: F401

import gpt2
import utils
from encoder import Encoder
from kv_cache import generate
from pages.explanation import page
from pages.learning import Run, curve, find_formed, learning_data, thin
from pages.recording import lens, record
from training.snapshots import read_snapshot, write_snapshot

TEXT = "<b>a&amp;b</b>"
HPARAMS = {"n_vocab": 257, "n_ctx": 16, "n_embd": 16, "n_head": 2, "n_layer": 2}
STEPS = [0, 1, 3, 9, 30]
call = functools.partial(conftest.call, "explain.py")


def looking_back(rng, strength):
    """A model whose block 1, head 1 looks at the token before, the more the stronger."""
    params = random_params(rng, HPARAMS)
    params["wte"] *= 0.01
    params["wpe"][:] = 4 * np.eye(16)
    for block in params["blocks"]:
        for layer in (block["attn"]["c_proj"], block["mlp"]["c_proj"]):
            layer["w"] *= 0.01
            layer["b"] *= 0.01
        block["ln_1"]["g"][:], block["ln_1"]["b"][:] = 1, 0
    c_attn = params["blocks"][1]["attn"]["c_attn"]
    c_attn["w"][:, :32], c_attn["b"][:32] = 0, 0
    # Two vectors for each position: on a circle, where neighbours are near.
    angle = 2 * np.pi * np.arange(16) / 16
    place = np.stack([np.cos(angle), np.sin(angle)], 1)
    before = np.stack([np.cos(angle - angle[1]), np.sin(angle - angle[1])], 1)
    c_attn["w"][:, 8:10] = strength * before  # the second head's queries
    c_attn["w"][:, 24:26] = strength * place  # and its keys
    return params


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of five snapshots; from the fourth on a head looks at the token before."""
    rng = np.random.default_rng(11)
    folder = tmp_path_factory.mktemp("runs") / "--><img src=x onerror=alert(1)>"
    strengths = dict(zip(STEPS, (0.0, 0.2, 0.5, 9.0, 12.0), strict=True))
    for step, strength in strengths.items():
        write = functools.partial(write_snapshot, folder, HPARAMS)
        write(looking_back(rng, strength), step)
    utils.save_model(str(folder), Encoder([]), HPARAMS, random_params(rng, HPARAMS))
    lines = [{"step": 0, "run": 5}]
    lines += [{"step": step, "loss": 6 - step / 10} for step in range(1, 31)]
    lines += [{"step": step, "validation": 5.9 - step / 10} for step in (10, 20, 30)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def written(run_folder):
    path = run_folder.parent / "page.html"
    code, out, err = call(TEXT, "--run", run_folder, "--out", path)
    assert (code, err) == (0, "") and out.startswith(f"{path}: {len(TEXT)} tokens, ")
    return path


def params_at(folder, step):
    return read_snapshot(folder / "snapshots" / f"{step:08d}.safetensors", HPARAMS)


# ---- The page's data -----------------------------------------------------------------------------


def test_the_page_holds_what_every_snapshot_does(written, run_folder):
    data, ids = read_page(written), Encoder([]).encode(TEXT)
    n_seq = len(ids)
    past = np.tril_indices(n_seq)
    assert data["steps"] == STEPS and data["ids"] == ids
    for k, step in enumerate(STEPS):
        params = params_at(run_folder, step)
        r = record(ids, params, 2)
        probs = gpt2.softmax(r["logits"].astype(np.float64))
        given = probs[np.arange(n_seq - 1), ids[1:]]
        np.testing.assert_allclose(data["bits"][k], -np.log2(given), rtol=1e-6)
        weights = (data["attention"][k] / 255) ** 2
        np.testing.assert_allclose(weights, r["attention"][:, :, *past], atol=0.0041)
        mean = [r["attention"][:, :, i, i - 1] for i in range(1, n_seq)]
        np.testing.assert_allclose(data["previous"][k], np.mean(mean, 0), rtol=1e-5)
        for layer, x in enumerate(r["stream"]):
            probs = gpt2.softmax(lens(x, params).astype(np.float64))
            assert np.array_equal(data["lens_ids"][k, layer][:, 0], probs.argmax(-1))
            shown = data["lens_probs"][k, layer] / 255
            np.testing.assert_allclose(shown, -np.sort(-probs)[:, :5], atol=0.0021)
        [new] = generate([[10]], params, 2, 160, temperature=0.8, seed=1, slide=True, endoftext=256)
        written_then = Encoder([]).decode(new).strip("\n")
        assert data["samples"][k] == re.sub("\n\n\n+", "\n\n", written_then)


def test_a_head_that_looks_at_the_token_before_is_found(written):
    data = read_page(written)
    assert data["formed"] == [[1, 1, 3]]
    shares = data["previous"][:, 1, 1]
    assert (shares[:3] < 0.5).all() and (shares[3:] > 0.5).all()


def test_heads_are_listed_in_the_order_in_which_they_form():
    previous = np.zeros((4, 2, 2))
    previous[3, 0, 0] = 0.51
    previous[1:3, 1, 0] = 0.9  # it may be lost again
    previous[:, 1, 1] = 0.9  # from the start: nothing was learned
    previous[:, 0, 1] = 0.5
    assert find_formed(previous) == [[1, 0, 1], [0, 0, 3]]


def test_curves_are_placed_on_the_snapshots_and_long_ones_are_means(rng):
    log = [{"step": 0, "run": 1}, {"step": 1, "loss": 5.0}, {"step": 20, "loss": 4.0}]
    assert curve(log, "loss", [0, 1, 3, 9, 31]) == [[1, 5], [3.5, 4]]
    assert curve(log, "validation", [0, 1]) == []
    log = [{"step": step, "loss": float(step)} for step in range(1, 10_001)]
    points = np.array(curve(log, "loss", [0, 10_000]))
    assert 390 <= len(points) <= 401
    np.testing.assert_allclose(points[:, 1], points[:, 0] * 10_000, atol=1)


def test_large_pages_show_fewer_snapshots():
    hparams = {"n_layer": 12, "n_head": 12}
    steps = list(range(60))
    assert thin(steps, 10, hparams) == steps
    fewer = thin(steps, 64, hparams)
    assert len(fewer) == 10 and (fewer[0], fewer[-1]) == (0, 59) and set(fewer) < set(steps)
    assert thin(steps, 128, {"n_layer": 48, "n_head": 25}) == [0, 59]


def test_a_page_of_the_shipped_recipe_is_below_5_megabytes(rng, monkeypatch):
    hparams = {"n_vocab": 257, "n_ctx": 64, "n_embd": 128, "n_head": 4, "n_layer": 4}
    params, encoder = random_params(rng, hparams), Encoder([])
    log = [{"step": step, "loss": 2.0} for step in range(1, 2001)]
    story = Run("x", list(range(60)), lambda step: params, log)
    inputs = rng.integers(256, size=64).tolist()
    recording = record(inputs, params, 4)
    monkeypatch.setattr("pages.learning.record", lambda *args: recording)  # once is enough

    def write(prompts, params, n_head, n, **options):
        return [rng.integers(256, size=n).tolist()]

    data = learning_data(inputs, story, encoder, hparams, write)
    assert len(data["steps"]) == 60
    assert len(page(data | {"model": "x"}, "learning.html").encode()) < 5e6


# ---- The command line ----------------------------------------------------------------------------


def test_a_mistake_is_one_line(run_folder, tmp_path):
    def refused(*args):
        code, out, err = call(*args, cwd=tmp_path)
        assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: ")
        return err

    err = refused("a text", "--run", conftest.REPO / "models" / "shakespeare")
    assert "has 0 snapshots, but the page needs 2; train with --snapshots, as in python" in err
    assert "no such folder; name the --out" in refused("a text", "--run", tmp_path / "nowhere")
    assert "1 tokens, but this page needs 2 and shows at most 16" in refused(
        "a", "--run", run_folder
    )
    assert "17 tokens" in refused("a" * 17, "--run", run_folder)
    assert list(tmp_path.iterdir()) == []
    utils.save_model(str(tmp_path / "run"), Encoder([]), HPARAMS, params_at(run_folder, 0))
    write_snapshot(tmp_path / "run", HPARAMS, params_at(run_folder, 0), 1)
    assert "has 1 snapshot, but" in refused("a text", "--run", tmp_path / "run")
    write_snapshot(tmp_path / "run", HPARAMS, params_at(run_folder, 0), 0)
    path = tmp_path / "run" / "snapshots" / "00000000.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert f"{path} is incomplete or damaged" in refused("a text", "--run", tmp_path / "run")
    other = HPARAMS | {"n_embd": 8}
    write_snapshot(tmp_path / "run", other, random_params(np.random.default_rng(0), other), 0)
    assert "wte is (257, 8), but the run's model has (257, 16)" in refused(
        "a text", "--run", tmp_path / "run"
    )


def test_only_a_page_is_replaced(run_folder, tmp_path):
    args = ("ab", "--run", run_folder)
    assert call(*args, cwd=tmp_path)[0] == 0 == call(*args, cwd=tmp_path)[0]
    assert [path.name for path in tmp_path.iterdir()] == ["learning.html"]
    (tmp_path / "learning.html").write_text("notes")
    code, out, err = call(*args, cwd=tmp_path)
    assert (code, out) == (2, "") and "add --overwrite to replace it" in err
    assert (tmp_path / "learning.html").read_text() == "notes"


# ---- A real browser ------------------------------------------------------------------------------


@pytest.fixture
def opened(browser, written):  # noqa: F811
    """The browser, the page just opened; afterwards its log must have no error."""
    emulate(browser)
    browser.get_log("browser")
    browser.get(written.as_uri())
    yield browser
    assert browser.get_log("browser") == []


def test_it_asks_for_no_file_and_shows_html_as_text(opened, run_folder):
    assert js(opened, "performance.getEntriesByType('resource').map(e => e.name)") == []
    assert "".join(every(opened, "#tokens .token")) == TEXT
    assert every(opened, "#model")[0].startswith(f"Run {run_folder.name}: 30 steps of a GPT-2")
    assert js(opened, "[document.images.length, document.scripts.length]") == [0, 2]


def test_the_slider_shows_another_snapshot(opened, written):
    data = read_page(written)

    def seen():
        colours = js(opened, "tokens.map(([button]) => button.style.background)")
        large = js(opened, "document.querySelector('#large canvas').toDataURL()")
        marks = js(opened, "document.querySelector('#loss .now').getAttribute('x1')")
        return colours, large, marks, every(opened, "#lens .cell"), every(opened, "#sample")

    at_the_end = seen()
    assert every(opened, "#step") == ["Step 30"]
    js(opened, "$('snapshot').focus()")
    press(opened, "HOME")
    assert every(opened, "#step") == ["Step 0"] and js(opened, "state.snapshot") == 0
    assert all(a != b for a, b in zip(at_the_end, seen(), strict=True))
    press(opened, "ARROW_RIGHT", "ARROW_RIGHT")
    assert every(opened, "#step") == ["Step 3"]
    assert every(opened, "#sample") == [data["samples"][2]]
    rows = js(opened, "Array.from({length: 9}, (_, j) => attention(1, 0, 8, j))")
    start = 8 * 9 // 2
    wanted = (data["attention"][2, 1, 0, start : start + 9] / 255) ** 2
    np.testing.assert_allclose(rows, wanted, atol=1e-9)
    nats = data["bits"][2].mean() * np.log(2)
    assert f"this text {nats:.2f}" in every(opened, "#losses")[0]
    assert "training 5.70" in every(opened, "#losses")[0]
    press(opened, "END")
    assert seen() == at_the_end


def test_the_step_at_which_a_head_forms_is_told_and_shown(opened):
    [text] = every(opened, "#formed li")
    assert text.startswith("Block 1, head 1 learned to look at the previous letter by step 9: ")
    assert every(opened, "#head") == ["Block 1, head 1"]  # it is chosen at first
    formed = "maps.map((map) => map.classList.contains('formed'))"
    assert js(opened, formed) == [False, False, False, True]
    js(opened, "set({snapshot: 2, layer: 0, head: 0})")
    assert js(opened, formed) == [False] * 4
    click(opened, "#formed button")
    assert js(opened, "[state.snapshot, state.layer, state.head]") == [3, 1, 1]
    assert js(opened, formed) == [False, False, False, True]
    assert len(every(opened, "#shares path")) == 4


def test_where_no_head_forms_the_nearest_is_named(browser, written, tmp_path):  # noqa: F811
    data = read_page(written) | {"formed": []}
    data["previous"] = np.minimum(data["previous"], 0.4).astype(np.float32)
    data["previous"][-1, 0, 1] = 0.45
    emulate(browser)
    (tmp_path / "page.html").write_text(page(data, "learning.html"), "utf-8")
    browser.get((tmp_path / "page.html").as_uri())
    [text] = every(browser, "#formed li")
    assert text.startswith("No head learned to give the previous letter more than 50 %")
    assert "Block 0, head 1 gives it the most at the end, 45 %." in text
    assert browser.get_log("browser") == []


def test_play_goes_from_the_first_step_to_the_last(opened):
    js(opened, "(setInterval_ => window.setInterval = (f, ms) => setInterval_(f, 10))(setInterval)")
    opened.execute_script("""window.seen = [];
        const note = () => seen.push($('step').textContent);
        new MutationObserver(note).observe($('step'), {childList: true});""")
    click(opened, "#play")
    deadline = time.monotonic() + 20
    while every(opened, "#play") != ["▶ Play"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert js(opened, "seen") == [f"Step {step}" for step in STEPS]


def test_a_finger_on_the_curve_moves_the_slider(opened):
    from selenium.webdriver import ActionChains

    chart = opened.find_element("css selector", "#loss")
    width = chart.size["width"]
    chain = ActionChains(opened).move_to_element_with_offset(chart, 10 - width // 2, 0)
    chain.click_and_hold().perform()
    assert js(opened, "state.snapshot") == 0
    chain = ActionChains(opened).move_to_element_with_offset(chart, 0, 0)
    chain.release().perform()
    assert js(opened, "state.snapshot") == 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_on_a_phone_and_the_slider_stays_in_sight(opened, scheme):
    emulate(opened, 360, scheme)
    opened.refresh()
    assert js(opened, "document.documentElement.scrollWidth") <= 360
    js(opened, "scrollTo(0, 2000)")
    top, bottom = js(opened, "(box => [box.top, box.bottom])($('time').getBoundingClientRect())")
    assert top == 0 and 100 < bottom < 250
    assert js(opened, "$('snapshot').getBoundingClientRect().bottom") < bottom
    colours = js(
        opened, "['color', 'backgroundColor'].map((name) => getComputedStyle($('time'))[name])"
    )
    assert (sum(map(int, colours[1][4:-1].split(","))) > 380) == (scheme == "light")


def test_charts_are_drawn_again_where_the_width_changes(opened):
    wide = js(opened, "document.querySelector('#loss .own').getAttribute('d')")
    emulate(opened, 500)
    opened.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 100))")
    assert js(opened, "document.querySelector('#loss .own').getAttribute('d')") != wide
