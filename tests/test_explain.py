"""explain.py's page: its data against what was recorded, and what a real browser makes of it."""

import base64
import functools
import itertools
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import conftest
import numpy as np
import pytest
from conftest import GPT2_FILES, REPO, TINY, random_params

import gpt2
import utils
from encoder import Encoder, get_encoder
from model_files import weights
from model_files.vocabulary import printable_bytes
from pages.explanation import compress, explain, page, page_data
from pages.predictions import N_GROUPS, group, likeliest
from pages.recording import lens, record, watch

HOSTILE = (
    """<script>alert(1)</script> "quotes" 'and' &amp; <!-- </script><img src=x onerror=alert(2)>"""
)
NAME = "--><img src=x onerror=alert(3)>{{data}}"  # a folder's


# ---- The page's data -----------------------------------------------------------------------------


def unpack(packed):
    data = base64.b64decode(packed["base64"])
    return np.frombuffer(data, np.dtype(packed["dtype"]).newbyteorder("<")).reshape(packed["shape"])


def read_page(path):  # -> the page's data, its arrays unpacked
    text = Path(path).read_text("utf-8")
    [data] = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    return json.loads(data, object_hook=lambda d: unpack(d) if "base64" in d else d)


@pytest.fixture(scope="module")
def written(models):
    """(the path of a page about HOSTILE with the model NAME, its recording, ids and params)."""
    folder, _ = models
    path = folder / "page.html"
    hparams = TINY | {"n_ctx": 128}
    rng = np.random.default_rng(secrets.randbits(32))
    params = random_params(rng, hparams)
    utils.save_model(folder / NAME, Encoder([]), hparams, params)
    command = [sys.executable, str(REPO / "explain.py"), HOSTILE, "--model_size", NAME]
    command += ["--models_dir", str(folder), "--out", str(path)]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    assert done.stdout.decode().startswith(f"{path}: {len(HOSTILE)} tokens, ")
    ids = Encoder([]).encode(HOSTILE)
    return path, record(ids, params, 2), ids, params


def test_a_block_may_have_an_attention_of_its_own(models):
    _, params = models
    blocks = [b | {"attend": lambda q, k, v: gpt2.attention(q, k, -v)} for b in params["blocks"]]
    text = explain([65, 66, 67], Encoder([]), TINY, params | {"blocks": blocks}, "own")
    assert "blocks.1.attn.c_attn.w" in text


def test_the_page_holds_the_arrays(written):
    path, r, ids, params = written
    data = read_page(path)
    n_seq, probs = len(ids), gpt2.softmax(r["logits"].astype(np.float64))
    assert data["ids"] == ids and data["hparams"] == TINY | {"n_ctx": 128}
    for char in map(chr, range(128)):
        [id] = Encoder([]).encode(char)
        assert bytes.fromhex(data["bytes"][str(id)]) == char.encode()
    assert bytes.fromhex(data["bytes"]["256"]) == b"<|endoftext|>"
    past = np.tril_indices(n_seq)
    np.testing.assert_allclose(data["attention"] / 65535, r["attention"][:, :, *past], atol=1e-5)
    given = probs[np.arange(n_seq - 1), ids[1:]]
    np.testing.assert_allclose(data["bits"], -np.log2(given), rtol=1e-6, atol=1e-6)
    for i, (rank, p) in enumerate(zip(data["rank"], given, strict=True)):
        assert rank == 1 + np.sum(probs[i] > p)
    # All 257 tokens of a byte model, in order.
    assert np.array_equal(np.sort(data["top_ids"], -1), np.tile(np.arange(257), (n_seq, 1)))
    np.testing.assert_array_equal(data["top_logits"], -np.sort(-r["logits"]))
    np.testing.assert_array_equal(
        data["top_logits"], np.take_along_axis(r["logits"], data["top_ids"].astype(int), -1)
    )
    assert data["tail_logits"].shape == (n_seq, 0)
    for layer, x in enumerate(r["stream"]):
        probs = gpt2.softmax(lens(x, params).astype(np.float64))
        best = -np.sort(-probs)[:, :5]
        np.testing.assert_allclose(data["lens_probs"][layer] / 65535, best, atol=1e-5)
        # By probability: two tokens as likely as each other may change places.
        shown = np.take_along_axis(probs, data["lens_ids"][layer].astype(int), -1)
        np.testing.assert_allclose(shown, best, rtol=1e-5)
    shown = np.take_along_axis(r["logits"], data["lens_ids"][-1].astype(int), -1)
    np.testing.assert_allclose(shown, data["top_logits"][:, :5], rtol=1e-5, atol=1e-5)
    for name, length in data["length"].items():
        np.testing.assert_allclose(length, np.sqrt((r[name] ** 2).sum(-1)), rtol=1e-4)
    q, scales = data["vectors"].astype(np.float64), data["scales"][..., None]
    vectors = scales * q * np.abs(q) / 127**2
    exact = [params["wte"][ids], params["wpe"][:n_seq]]
    for pair in zip(r["mha"], r["ffn"], strict=True):
        exact += pair
    np.testing.assert_allclose(vectors, [*exact, r["final"]], atol=0.01 * scales.max())
    assert np.all(np.abs(vectors - [*exact, r["final"]]) <= 0.008 * scales)


def test_the_sources_are_those_of_the_file(written):
    data, lines = read_page(written[0]), (REPO / "gpt2.py").read_text("utf-8").splitlines(True)
    assert set(data["sources"]) == {
        *("gpt2", "hidden_state", "transformer_block", "layer_norm", "mha", "linear"),
        *("attention_in_blocks", "attention", "attention_weights", "softmax", "ffn", "gelu"),
    }
    for name, source in data["sources"].items():
        n = source["lines"].count("\n")
        assert "".join(lines[source["first"] - 1 :][:n]) == source["lines"]
        assert source["lines"].startswith(f"def {name}(")

    def check(call, caller):
        if caller is not None:  # the line that called it names it, or the attend that it stands for
            line = lines[call["line"] - 1]
            attends = call["function"] == "attention_in_blocks" and "attend(" in line
            assert call["function"] in line or attends
            source = data["sources"][caller["function"]]
            assert 0 <= call["line"] - source["first"] < source["lines"].count("\n")
        for inner in call["calls"]:
            check(inner, call)

    check(data["call"], None)


def test_the_calls_have_the_shapes_and_the_parameters_names(written):
    n_seq, call = len(written[2]), read_page(written[0])["call"]
    first, second, ln_f = call["calls"][0]["calls"]
    assert [c["function"] for c in second["calls"]] == ["layer_norm", "mha", "layer_norm", "ffn"]
    c_attn = second["calls"][1]["calls"][0]
    assert c_attn["args"] == [
        ["x", [n_seq, 16]],
        ["blocks.1.attn.c_attn.w", [16, 48]],
        ["blocks.1.attn.c_attn.b", [48]],
    ]
    assert c_attn["out"] == [n_seq, 48]
    assert ln_f["args"][1:] == [["ln_f.g", [16]], ["ln_f.b", [16]]]
    assert call["out"] == [n_seq, 257]


def test_groups_of_unlikely_tokens_keep_their_sum(rng):
    logits = -np.sort(-rng.standard_normal((3, 5000), dtype=np.float32) * 4)
    for tail in (logits, logits[:, :3], logits[:, :0], logits * 200):
        counts, stand_ins = group(tail, 257)
        assert counts.sum() == tail.shape[1] and stand_ins.shape == (3, len(counts))
        assert len(counts) <= N_GROUPS
        exact = np.logaddexp.reduce(tail.astype(np.float64), -1)
        np.testing.assert_allclose(
            np.logaddexp.reduce(stand_ins + np.log(counts), -1), exact, rtol=1e-9
        )


def test_likeliest_is_a_stable_sort(rng):
    logits = rng.integers(30, size=(20, 300)).astype(np.float32)  # many equals
    order = np.argsort(-logits, kind="stable")
    found = likeliest(logits, 40)
    taken = np.take_along_axis(logits, found, -1)
    assert np.array_equal(taken, np.take_along_axis(logits, order[:, :40], -1))
    sure = taken > taken[:, -1:]  # of the last's equals any may be there
    assert np.array_equal(found[sure], order[:, :40][sure])
    assert np.array_equal(likeliest(logits, 999), order)


def test_vectors_keep_zeros_signs_and_small_numbers():
    vectors = np.array([[0, 0], [-8, 8], [1, -0.01], [3e38, 1e-40]], np.float32)
    q, scales = compress(vectors)
    assert np.array_equal(q, [[0, 0], [-127, 127], [127, -13], [127, 0]])
    assert np.array_equal(scales, np.float32([0, 8, 1, 3e38]))


@pytest.mark.slow
def test_a_page_of_64_tokens_of_124m_is_below_5_megabytes(rng):
    if not GPT2_FILES.exists():
        pytest.skip(f"no GPT-2 tokenizer in {GPT2_FILES}")
    hparams = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
    params, encoder = random_params(rng, hparams), get_encoder(GPT2_FILES.name, GPT2_FILES.parent)
    inputs = rng.integers(50257, size=64).tolist()
    r = record(inputs, params, 12)
    assert len(page(page_data(inputs, r, encoder, hparams, params))) < 5e6


# ---- The command line ----------------------------------------------------------------------------


call = functools.partial(conftest.call, "explain.py")


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["a" * 49], "error: 49 tokens, but a page needs 1 and shows at most 48"),
        (["a", "--out", "none/x.html"], "error: --out none/x.html: there is no folder "),
        (["a", "--out", "."], "error: --out .: is a folder"),
        (
            ["a" * 257, "--model_size", "long"],
            "error: 257 tokens, but a page needs 1 and shows at most 256",
        ),
    ],
)
def test_a_mistake_is_one_line(models, tmp_path, args, line):
    folder, _ = models
    if "long" in args and not (folder / "long").exists():
        hparams = TINY | {"n_ctx": 300}
        params = random_params(np.random.default_rng(0), hparams)
        utils.save_model(folder / "long", Encoder([]), hparams, params)
    size = [] if "--model_size" in args else ["--model_size", "tiny"]
    code, out, err = call(*args, *size, "--models_dir", folder, cwd=tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith(line)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("text", ["", "a", "1984", "héllo 🙂", "a\r\n\x1f\u2028"])
def test_any_text_makes_a_page(models, tmp_path, text):
    folder, params = models
    args = [text, "--model_size", "tiny", "--models_dir", folder]
    code, out, err = call(*args, cwd=tmp_path)
    assert (code, err) == (0, "") and out.endswith("Open it in a browser.\n")
    ids = Encoder([]).encode(text) or [256]
    data = read_page(tmp_path / "explain.html")
    assert data["ids"] == ids and os.listdir(tmp_path) == ["explain.html"]
    best = gpt2.gpt2(ids, **params, n_head=2).argmax(-1)
    assert np.array_equal(data["top_ids"][:, 0], best)


# ---- A real browser ------------------------------------------------------------------------------


FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run
--disable-background-networking --disable-component-update --disable-sync --app=data:,
--disable-features=BackForwardCache,SpareRendererForSitePerProcess
--js-flags=--lite-mode"""  # what takes memory


@pytest.fixture(scope="module")
def browser():
    """Debian's chromium without a window, driven by selenium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    driver = shutil.which("chromedriver")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if driver is None or chromium is None:
        pytest.skip("chromium and its chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


def emulate(browser, width=1100, scheme="light"):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


@pytest.fixture
def opened(browser, written):
    """The browser, the page about HOSTILE just opened; afterwards its log must have no error."""
    emulate(browser)
    browser.get_log("browser")
    browser.get(written[0].as_uri())
    yield browser
    assert browser.get_log("browser") == []


def js(browser, code, *args):
    return browser.execute_script(f"return {code}", *args)


def press(browser, *keys):
    from selenium.webdriver.common.keys import Keys

    element = browser.switch_to.active_element
    for key in keys:
        element.send_keys(getattr(Keys, key))
        element = browser.switch_to.active_element


def click(browser, selector, i=0):
    browser.find_elements("css selector", selector)[i].click()


def every(browser, selector, what="textContent"):
    code = "Array.from(document.querySelectorAll(arguments[0]), e => e[arguments[1]])"
    return js(browser, code, selector, what)


def test_the_page_asks_for_no_other_file(opened):
    assert js(opened, "performance.getEntriesByType('resource').map(e => e.name)") == []


def test_a_text_full_of_html_is_shown_as_text(opened):
    assert "".join(every(opened, "#tokens .token")) == HOSTILE
    assert every(opened, "#model")[0].startswith(f"Model {NAME}: 2 blocks")
    assert js(opened, "document.title") == f"What GPT-2 ({NAME}) did"
    assert js(opened, "document.scripts.length") == 2
    assert js(opened, "document.images.length") == 0


def test_a_click_on_a_token_changes_the_maps(opened, written):
    _, r, ids, _ = written

    def seen():
        rows = every(opened, ".row", "offsetTop")
        titles = js(opened, "maps.map(map => map.title)")
        return rows, titles, every(opened, "#weights > *")

    for i in (3, 40):
        before = seen()
        click(opened, "#tokens .token", i)
        rows, titles, weights = seen()
        assert all(a != b for a, b in zip(before[0], rows, strict=True))
        assert before[1:] != (titles, weights)
        best = r["attention"][0, 0, i].argsort()[::-1][: min(8, i + 1)]
        assert [int(name.split()[0]) for name in weights[::3]] == [j + 1 for j in best]
        heads = r["attention"][:, :, i].reshape(4, -1).max(-1)
        for title, weight in zip(titles, heads, strict=True):
            number = float(re.search(r"([\d.]+) %$", title)[1])
            assert number == pytest.approx(100 * weight, abs=0.51 if weight > 0.0995 else 0.06)


def test_a_click_on_a_map_enlarges_it(opened, written):
    _, r, ids, _ = written
    before = js(opened, "document.querySelector('#large canvas').toDataURL()")
    click(opened, "#heads .map", 3)
    assert every(opened, "#head") == ["Block 1, head 1"]
    assert js(opened, "document.querySelector('#large canvas').toDataURL()") != before
    pixels = """(() => {const c = document.querySelector('#large canvas');
        return Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)})()"""
    image = np.array(js(opened, pixels)).reshape(len(ids), len(ids), 4)
    assert np.array_equal(image[..., 3] == 255, np.tri(len(ids), dtype=bool))  # the triangle
    past, red = np.tril_indices(len(ids)), image[..., 0]
    expected = 242 + (18 - 242) * np.sqrt(r["attention"][1, 1][past])
    assert np.max(np.abs(red[past] - expected)) < 2


def test_the_packed_numbers_come_out_in_the_browser(opened, written):
    _, r, ids, _ = written
    rows = js(opened, "Array.from({length: 61}, (_, j) => attention(1, 0, 60, j))")
    np.testing.assert_allclose(rows, r["attention"][1, 0, 60, :61], atol=1e-5)
    vector = js(opened, "Array.from(vectorOf(3, 7))")  # block 0's MLP
    np.testing.assert_allclose(vector, r["ffn"][0, 7], atol=0.01 * np.abs(r["ffn"][0, 7]).max())


def test_the_sliders_reshape_as_gpt2_does(opened, written, rng):
    _, r, _, _ = written
    for _ in range(40):
        i = int(rng.integers(len(r["logits"])))
        temperature = float(rng.choice([0.05, 0.7, 1, 2]))
        top_k, top_p = int(rng.choice([1, 5, 50, 257])), float(rng.choice([0.01, 0.5, 0.9, 1]))
        min_p = float(rng.choice([0, 0.03, 0.5, 1]))
        theirs = js(opened, "reshape(...arguments)", i, temperature, top_k, top_p, min_p)
        probs = gpt2.probabilities(r["logits"][i], temperature, top_k, top_p, min_p)
        np.testing.assert_allclose(theirs["probs"], -np.sort(-probs), atol=1e-9)
        assert theirs["n_kept"] == np.sum(probs > 0)
    for shares, top_p in (
        ([0.5, 0.3, 0.2], 0.8),
        ([0.6, 0.3, 0.1], 0.9),
        ([0.4, 0.2, 0.2, 0.2], 0.6),
    ):
        shown = {"top_logits": np.log(shares).tolist(), "tail_logits": [], "tail_counts": []}
        n_kept = js(opened, "reweigh(arguments[0], 1, 0, arguments[1])", shown, top_p)["n_kept"]
        assert n_kept == np.sum(gpt2.probabilities(np.log(shares), 1, top_p=top_p) > 0)
    greedy = js(opened, "reshape(5, 0, 257, 1)")
    assert greedy["probs"][0] == 1 and greedy["n_kept"] == 1


def test_a_slider_changes_the_bars(opened, written):
    _, r, _, _ = written

    def bars():
        js(opened, "document.getElementById('next').scrollIntoView()")
        widths = every(opened, "#next .bar:not(.was)", "offsetWidth")
        return widths, every(opened, "#next .value")

    before = bars()
    js(opened, "document.getElementById('temperature').focus()")
    press(opened, *["ARROW_LEFT"] * 10)  # 1 -> 0.5
    assert every(opened, "#temperature + output") == ["0.5"]
    widths, values = bars()
    assert widths != before[0] and values != before[1]
    probs = -np.sort(-gpt2.probabilities(r["logits"][-1], 0.5))[:10]
    shown = [float(v.split(" %")[0].removeprefix("< ")) for v in values]
    np.testing.assert_allclose(shown, 100 * probs, atol=0.5)
    js(opened, "document.getElementById('top_k').focus()")
    press(opened, "HOME")  # one token only
    assert every(opened, "#next .value")[1:] == ["0"] * 9
    assert "1 of 257 tokens" in every(opened, "#kept")[0]
    click(opened, "#reset")
    assert bars() == before


def test_the_keyboard_reaches_everything(opened, written):
    n_seq = len(written[2])
    js(opened, "document.querySelector('#tokens [tabindex=\"0\"]').focus()")
    press(opened, "ARROW_LEFT", "ARROW_LEFT")
    assert js(opened, "state.position") == n_seq - 3
    press(opened, "HOME", "ARROW_RIGHT")
    assert js(opened, "state.position") == 1
    js(opened, "maps[0].focus()")
    press(opened, "ARROW_DOWN", "ARROW_RIGHT")
    assert js(opened, "[state.layer, state.head]") == [1, 1]
    press(opened, "ARROW_DOWN")  # no layer below
    assert js(opened, "[state.layer, state.head]") == [1, 1]
    js(opened, "cells.find(cell => cell.tabIndex === 0).focus()")
    press(opened, "ARROW_UP", "ARROW_RIGHT")
    assert js(opened, "[state.lens, state.position]") == [1, 2]
    js(opened, "stepButtons[0].focus()")
    press(opened, "ARROW_RIGHT", "TAB", "TAB", "TAB", "ENTER")  # into the calls of block 0
    assert every(opened, "#origin")[0].startswith("gpt2.py, mha, called by transformer_block")
    # One stop for each group, not one for each of its buttons.
    assert js(opened, "document.querySelectorAll('#tokens [tabindex=\"0\"]').length") == 1
    assert js(opened, "cells.filter(cell => cell.tabIndex === 0).length") == 1


def test_each_step_shows_its_source(opened):
    names = every(opened, "#strip button")
    assert names == ["wte + wpe", "block 0", "block 1", "ln_f", "logits"]
    shown = []
    for i in range(len(names)):
        click(opened, "#strip button", i)
        shown.append(every(opened, "#source span")[0].split("(")[0])
    block = "def transformer_block"
    assert shown == ["def hidden_state", block, block, "def layer_norm", "def gpt2"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1100])
def test_the_page_fits_and_can_be_read(opened, width, scheme):
    emulate(opened, width, scheme)
    assert js(opened, "document.documentElement.scrollWidth") <= width
    colour = "getComputedStyle(document.body).{}.match(/\\d+/g).map(Number)"
    ink, paper = (np.array(js(opened, colour.format(c))) for c in ("color", "backgroundColor"))
    assert (ink.mean() > paper.mean()) == (scheme == "dark")
    assert abs(ink.mean() - paper.mean()) > 180


@pytest.mark.parametrize("text", ["", "x", "a🙂\n\té", "b" * 48])
def test_odd_texts_open_without_an_error(browser, models, tmp_path, text):
    args = [text, "--model_size", "tiny", "--models_dir", models[0]]
    assert call(*args, cwd=tmp_path)[0] == 0
    browser.get_log("browser")
    browser.get((tmp_path / "explain.html").as_uri())
    for i in range(len(Encoder([]).encode(text))):
        click(browser, "#tokens .token", i)
    assert browser.get_log("browser") == []


def test_a_large_vocabulary_is_reshaped_nearly_exactly(browser, tmp_path, rng):
    hparams = TINY | {"n_vocab": 5000}
    params, ids = random_params(rng, hparams), rng.integers(5000, size=12).tolist()
    chars = list(printable_bytes().values())
    encoder = Encoder(list(itertools.product(chars, chars))[: 5000 - 257])
    r = record(ids, params, 2)
    data = {"model": "x"} | page_data(ids, r, encoder, hparams, params)
    (tmp_path / "page.html").write_text(page(data), "utf-8")
    browser.get((tmp_path / "page.html").as_uri())
    for temperature in (0.3, 1, 1.5, 2):
        for top_p in (0.5, 0.95, 1):
            theirs = js(
                browser, "reshape(4, arguments[0], n_shown, arguments[1])", temperature, top_p
            )
            probs = -np.sort(-gpt2.probabilities(r["logits"][4], temperature, 0, top_p))
            np.testing.assert_allclose(theirs["probs"], probs[:257], rtol=0.01, atol=1e-6)
            assert theirs["n_kept"] == pytest.approx(np.sum(probs > 0), rel=0.02)


@pytest.mark.slow
def test_the_pages_photographs_can_be_taken_again(browser, tmp_path):
    pytest.importorskip("starlette", reason="starlette is not installed")
    few = ["--data", REPO / "gpt2.py", "--n_steps", "9", "--snapshots", "4"]
    conftest.run("backprop.py", *few, "--out", tmp_path / "run")
    command = [sys.executable, REPO / "docs" / "screenshot.py", tmp_path, tmp_path / "run"]
    subprocess.run(command, check=True, timeout=120)
    for name in ("explain.png", "learning.png", "serve.png"):
        taken, shown = ((folder / name).read_bytes() for folder in (tmp_path, REPO / "docs"))
        assert taken[:8] == b"\x89PNG\r\n\x1a\n" and taken[16:24] == shown[16:24]  # the sizes


# ---- What the page says and draws, one part after the other --------------------------------------


def percent(p):
    if p == 0:
        return "0"
    return "< 0.001 %" if p < 1e-5 else f"{100 * p:.{3 if p < 1e-3 else 1 if p < 0.0995 else 0}f} %"


def parts(browser, elements):  # -> how strongly each is shaded, from 0 to 1
    code = f"{elements}.map(e => parseFloat(e.style.background.match(/([\\d.]+)%/)[1]) / 55)"
    return js(browser, code)


def test_what_is_said_about_a_token(opened, written):
    _, r, ids, _ = written
    probs = gpt2.softmax(r["logits"].astype(np.float64))
    shaded = parts(opened, "tokens.map(([e]) => e)")
    for i in (1, 7, 30, len(ids) - 1):
        click(opened, "#tokens .token", i)
        p = probs[i - 1, ids[i]]
        [text] = every(opened, "#detail")
        assert (
            f"token {i + 1} of {len(ids)}: id {ids[i]}, bytes {HOSTILE[i].encode().hex()}." in text
        )
        assert f"Its probability was {percent(p)}, or {-np.log2(p):.1f} bits of" in text
        rank = 1 + int(np.sum(probs[i - 1] > p))
        ordinal = js(opened, f"ordinal({rank})") + " " if rank > 1 else ""
        assert text.endswith(f"of surprise. It was the {ordinal}likeliest of 257.")
        assert shaded[i] == pytest.approx(min(-np.log2(p), 12) / 12, abs=0.002)
    js(opened, "(data.rank[29] = 1, tokens[30][0].click())")
    assert every(opened, "#detail")[0].endswith("surprise. It was the likeliest of 257.")
    click(opened, "#tokens .token", 0)
    assert every(opened, "#detail")[0].endswith("Nothing came before it.")
    titles = every(opened, "#tokens .token", "title")
    assert titles[5] == f"bytes {HOSTILE[5].encode().hex()}\nid {ids[5]}"
    ordinals = js(opened, "[1, 2, 3, 4, 11, 12, 13, 21, 101, 111, 112].map(ordinal).join(' ')")
    assert ordinals == "1st 2nd 3rd 4th 11th 12th 13th 21st 101st 111th 112th"
    wanted = ["0", "< 0.001 %", "0.050 %", "5.0 %", "50 %"]
    assert js(opened, "[0, 0.000001, 0.0005, 0.05, 0.5].map(percent)") == wanted


def test_the_chosen_token_stays_in_sight(browser, models, tmp_path):
    args = ["ab " * 16, "--model_size", "tiny", "--models_dir", models[0]]
    assert call(*args, cwd=tmp_path)[0] == 0
    emulate(browser, 200)
    browser.get((tmp_path / "explain.html").as_uri())
    for i in (47, 0, 20):
        js(browser, f"set({{position: {i}}})")
        where = """[$("text"), tokens[state.position][0]].map(e => e.getBoundingClientRect())
            .map(box => [box.top, box.bottom])"""
        (top, bottom), (above, below) = js(browser, where)
        assert top <= above and below <= bottom + 1


def test_the_bars_of_what_comes_next(opened, written):
    _, r, _, _ = written
    js(opened, "(data.ids[21] = rowOf(data.top_ids, 20)[3])")  # so that the text goes on with it
    click(opened, "#tokens .token", 20)
    values = every(opened, "#next .value")
    assert [k for k, value in enumerate(values) if "it was this" in value] == [3]
    order = np.argsort(-r["logits"][20], kind="stable")[:10]
    titles = every(opened, "#next .name", "title")
    assert [int(title.split()[-1]) for title in titles] == order.tolist()
    js(opened, "set({temperature: 0.5})")
    said, drawn = (gpt2.probabilities(r["logits"][20], t)[order] for t in (1, 0.5))
    width = "[...document.querySelectorAll(arguments[0])].map(e => parseFloat(e.style.width))"
    longest = max(said[0], drawn[0])
    for kind, probs in ((".was", said), (".bar:not(.was)", drawn)):
        widths = js(opened, width, f"#next {kind}")
        np.testing.assert_allclose(widths, 100 * probs / longest, atol=0.01)
    assert every(opened, "#top_k + output") == ["all"]
    assert js(opened, "$('top_k').getAttribute('aria-valuetext')") == "all"


def test_equals_stay_together(opened):
    assert js(opened, "reshape(3, 1, 256, 1).n_kept") == 256
    js(opened, "data.top_logits.fill(0)")
    assert js(opened, "reshape(3, 1, 5, 1).n_kept") == 257
    assert js(opened, "reshape(3, 1, 257, 0.5).n_kept") == 257


def test_the_maps(opened, written):
    _, r, ids, _ = written
    weights = r["attention"]
    pixel = "maps.map(m => m.firstChild.getContext('2d').getImageData(3, 50, 1, 1).data[0])"
    np.testing.assert_allclose(
        js(opened, pixel), 242 - 224 * weights[:, :, 50, 3].ravel() ** 0.5, atol=2
    )
    js(opened, "(maps[2].click(), tokens[40][0].click())")  # block 1, head 0
    looked = parts(opened, "shaded.slice(0, 41).map(([e]) => e)")
    np.testing.assert_allclose(looked, weights[1, 0, 40, :41] ** 0.5, atol=0.002)
    point = """(() => {
        const box = $("large").getBoundingClientRect(), at = (x) => (x + 0.5) / n_seq;
        const where = {clientX: box.left + at(arguments[1]) * box.width,
            clientY: box.top + at(arguments[0]) * box.height};
        $("large").dispatchEvent(new PointerEvent(arguments[2], where));
        return $("readout").textContent;
    })()"""
    for event in ("pointermove", "click"):
        text = js(opened, point, 30, 20, event)
        assert text.startswith("Token 31, ") and "looks at token 21, " in text
        assert text.endswith(percent(round(float(weights[1, 0, 30, 20]) * 65535) / 65535))
    assert js(opened, "state.position") == 30  # the click chose the row
    assert "which comes later" in js(opened, point, 30, 31, "pointermove")
    row = """(() => {
        const [a, b] = ["#large .row", "#large"].map((selector) =>
            document.querySelector(selector).getBoundingClientRect());
        return [(a.top - b.top) / b.height, a.left - b.left, a.width / b.width];
    })()"""
    np.testing.assert_allclose(js(opened, row), [30 / len(ids), 0, 1], atol=0.01)
    assert js(opened, "getComputedStyle($('large')).backgroundImage").startswith("repeating")
    assert js(opened, "maps[3].getAttribute('aria-label')").startswith("block 1, head 1: ")
    drawn = "[maps[0].firstChild, document.querySelector('.vector')].map(c => c.toDataURL())"
    before = js(opened, drawn)
    emulate(opened, 1100, "dark")
    opened.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 50))")
    assert all(a != b for a, b in zip(before, js(opened, drawn), strict=True))


def test_the_lens(opened, written):
    _, r, ids, params = written
    exact = [gpt2.softmax(lens(x, params).astype(np.float64)) for x in r["stream"]]
    exact = np.stack(exact)
    assert js(opened, "[state.lens, state.position]") == [2, len(ids) - 1]
    names = js(opened, "arguments[0].map(nameOf)", exact.argmax(-1).ravel().tolist())
    assert js(opened, "cells.map(cell => cell.textContent)") == names
    np.testing.assert_allclose(parts(opened, "cells"), exact.max(-1).ravel(), atol=0.002)
    assert every(opened, "#lens tbody th") == ["wte + wpe", "block 0", "block 1"]
    js(opened, "cells[1 * n_seq + 9].click()")
    assert every(opened, "#lens-title")[0].startswith("After block 0, following")
    best = np.argsort(-exact[1, 9])[:5].tolist()
    assert every(opened, "#lens-bars .name") == js(opened, "arguments[0].map(nameOf)", best)
    inside = """[$("lens-scroll"), cells[1 * n_seq + 9]].map(e => e.getBoundingClientRect())
        .map(box => [box.left, box.right])"""
    (left, right), (first, last) = js(opened, inside)
    assert left <= first and last <= right


def test_the_stream_and_the_stripes(opened, written):
    _, r, ids, params = written
    click(opened, "#tokens .token", 9)
    length = {name: np.linalg.norm(r[name][:, 9], axis=-1) for name in ("stream", "mha", "ffn")}
    values = [float(value) for value in every(opened, "#stream .value")]
    np.testing.assert_allclose(values, length["stream"], rtol=0.06)
    titles = iter(every(opened, "#stream .half", "title"))
    for block in range(2):
        for name, lengths in (("attention", length["mha"]), ("MLP", length["ffn"])):
            title = next(titles)
            assert title.startswith(f"{name} of block {block}: ")
            assert float(title.split()[-1]) == pytest.approx(lengths[block], rel=0.06)
    vectors = [[params["wte"][ids[9]], params["wpe"][9]]]
    vectors += [[r["mha"][block, 9], r["ffn"][block, 9]] for block in range(2)]
    vectors += [[r["final"][9]], []]
    pixels = """[...document.querySelectorAll("#stripes canvas")].map((c) =>
        [...c.getContext("2d").getImageData(0, 0, c.width, 1).data])"""
    for step, some in enumerate(vectors):
        click(opened, "#strip button", step)
        notes = [float(note.split()[-1]) for note in every(opened, "#stripes .note")]
        np.testing.assert_allclose(notes, [np.linalg.norm(v) for v in some], rtol=0.06)
        for data, v in zip(js(opened, pixels), some, strict=True):
            red, _, blue, _ = np.array(data).reshape(-1, 4).T
            large = np.abs(v) > 0.1 * np.abs(v).max()
            assert np.array_equal((blue > red)[large], (v > 0)[large])


def test_every_call_shows_its_lines(opened, written):
    lines, n_seq = (REPO / "gpt2.py").read_text("utf-8").splitlines(), len(written[2])
    seen = set()
    for step in range(5):
        click(opened, "#strip button", step)
        for k in range(len(every(opened, "#calls button"))):
            js(opened, f"document.querySelectorAll('#calls button')[{k}].click()")
            [name] = every(opened, "#calls button[aria-pressed=true] b")
            seen.add(name)
            text = every(opened, "#source span")
            numbers = js(
                opened, "[...document.querySelectorAll('#source span')].map(e => +e.dataset.line)"
            )
            assert text[0].startswith(f"def {name}(")
            assert [lines[number - 1] or " " for number in numbers] == text
            caller = re.search(r"called by (\w+) in line (\d+)", every(opened, "#origin")[0])
            assert caller or name == "gpt2"
            called = lines[int(caller[2]) - 1] if caller else "gpt2"
            assert not called.startswith("def") and (name in called or "attend(" in called)
    assert seen >= {"softmax", "attention", "gelu", "linear", "mha", "ffn"} or n_seq > 64
    click(opened, "#strip button", 1)
    wanted = f"x [{n_seq}, 16], blocks.0.attn.c_attn.w [16, 48], blocks.0.attn.c_attn.b [48]"
    assert every(opened, "#calls button")[3].endswith(f"{wanted} → [{n_seq}, 48]")


def test_the_heading_and_what_is_chosen(opened):
    shapes = dict(weights.tensor_shapes(TINY | {"n_ctx": 128})).values()
    n = sum(int(np.prod(shape)) for shape in shapes)
    wanted = f"Model {NAME}: 2 blocks of 2 heads, 16 numbers per token, "
    wanted += f"257 tokens in the vocabulary, 128 positions, {n:,} parameters."
    assert every(opened, "#model") == [wanted]
    assert opened.title == f"What GPT-2 ({NAME}) did"
    for kind in ("#tokens .token", "#heads .map", ".cell", "#strip button"):
        assert len(every(opened, f"{kind}[aria-pressed=true]")) == 1
        assert len(every(opened, f"{kind}[tabindex='0']")) == 1


def test_names_of_odd_tokens(browser, tmp_path, rng):
    hparams = TINY | {"n_vocab": 262}
    encoder = Encoder([("Ã", "©"), ("Ģ", "Ĭ"), ("ï", "»"), ("ï»", "¿"), ("a", "b")])
    ids = [*encoder.encode("é \n\t\x07\u00a0ab"), 257, *encoder.encode("\ufeff")]
    params = random_params(rng, hparams)
    data = page_data(ids, record(ids, params, 2), encoder, hparams, params)
    (tmp_path / "page.html").write_text(page({"model": "<!--<script>"} | data), "utf-8")
    browser.get_log("browser")
    browser.get((tmp_path / "page.html").as_uri())
    names = js(browser, "data.ids.map(nameOf)")
    assert names[:5] == ["é", "·", "⏎", "⇥", "‹7›"] and names[-1] == "‹feff›"
    assert "ab" in names and "‹80 8a›" in names
    assert browser.get_log("browser") == []


def open_page(browser, path, ids, encoder, params, hparams):
    recording = record(ids, params, hparams["n_head"])
    data = {"model": "x"} | page_data(ids, recording, encoder, hparams, params)
    path.write_text(page(data), "utf-8")
    browser.get_log("browser")
    browser.get(path.as_uri())
    assert browser.get_log("browser") == []


def test_the_last_token_of_a_character_shows_it(browser, tmp_path, rng):
    """By bytes; by tokens that end one character and begin the next; and with bytes that do not."""
    emulate(browser)
    params = random_params(rng, TINY)
    open_page(
        browser, tmp_path / "page.html", Encoder([]).encode("a日é🙂b"), Encoder([]), params, TINY
    )
    shown = ["a", "⋯", "⋯", "日", "⋯", "é", "⋯", "⋯", "⋯", "🙂", "b"]
    assert every(browser, "#tokens .token") == every(browser, "#shaded .token") == shown
    assert js(browser, "data.ids.map((_, i) => nameAt(i))") == shown
    assert every(browser, "#lens thead th")[1:] == shown
    marks = js(browser, "tokens.map(([e]) => e.className)")
    assert marks == ["token part" if text == "⋯" else "token" for text in shown]
    js(browser, "set({position: 7})")
    [said] = every(browser, "#detail")
    assert "token 8 of 11: id" in said and "part of a character that token 10 completes." in said
    [last] = Encoder([]).encode("🙂")[3:]
    assert js(browser, f"[nameAfter(8, {last}), nameAfter(0, {last})]") == ["🙂", "‹82›"]
    assert js(browser, "nameAfter(8, data.ids[0])") == "a"  # which leaves a character unfinished

    encoder = Encoder(
        [("¥", "æ"), ("æ", "ľ")], None
    )  # a5 e6 | e6 9c: the end of 日, 本's beginning
    ids = [encoder.vocab[piece] for piece in ("æ", "Ĺ", "¥æ", "ľ", "¬", "æľ", "b", "æ", "Ģ")]
    params = random_params(rng, TINY | {"n_vocab": 259})
    open_page(browser, tmp_path / "page.html", ids, encoder, params, TINY | {"n_vocab": 259})
    wanted = ["⋯", "⋯", "日", "⋯", "本", "‹e6 9c›", "b", "‹e6›", "‹80›"]
    assert every(browser, "#tokens .token") == wanted


@pytest.mark.parametrize("n_head", [6, 12])
def test_all_heads_fit_on_a_phone_and_what_scrolls_fades(browser, tmp_path, rng, n_head):
    hparams = TINY | {"n_embd": 24, "n_head": n_head}
    emulate(browser, 390)
    params, ids = random_params(rng, hparams), Encoder([]).encode("x" * 40)
    open_page(browser, tmp_path / "page.html", ids, Encoder([]), params, hparams)
    heads = "document.querySelector('.scroll')"
    assert js(browser, f"{heads}.scrollWidth <= {heads}.clientWidth")
    assert js(browser, "maps[0].offsetWidth") >= 24  # WCAG 2.2's least size of a target

    def sides():
        browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 50))")
        has = "['before', 'after'].map((side) => $('lens-scroll').classList.contains(side))"
        return js(browser, has)

    assert sides() == [True, False]  # the last token is chosen
    js(browser, "set({position: 20})")
    assert sides() == [True, True]
    hint = "[...document.querySelectorAll('.hint')].map((e) => e.offsetWidth > 0)"
    assert js(browser, hint) == [True]
    assert "3rem" in js(browser, "getComputedStyle($('lens-scroll')).getPropertyValue('--right')")
    js(browser, "($('lens-scroll').scrollLeft = 0)")
    assert sides() == [False, True]
    js(browser, "$('lens').style.setProperty('display', 'none')")
    assert sides() == [False, False] and js(browser, hint) == [False]


def test_a_vocabulary_with_gaps_and_an_empty_piece(browser, tmp_path, rng):
    pieces = {piece: id if id < 100 else id + 5 for piece, id in Encoder([]).vocab.items()}
    encoder, hparams = Encoder([], pieces | {"": 101}), TINY | {"n_vocab": 262}
    params, ids = random_params(rng, hparams), encoder.encode("gaps")
    data = page_data(ids, record(ids, params, 2), encoder, hparams, params)
    (tmp_path / "page.html").write_text(page({"model": "x"} | data), "utf-8")
    browser.get_log("browser")
    browser.get((tmp_path / "page.html").as_uri())
    assert len(every(browser, "#next .name")) == 10 and len(every(browser, "#source span")) > 1
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(opened, scheme):
    """WCAG 2.2's 4.5 : 1 for notes, for tokens of any shade, and in the cells of the lens.

    3 : 1 for the mark of a character's part, which is not text (success criterion 1.4.11).
    """
    emulate(opened, 1100, scheme)
    js(opened, "tokens[3][0].style.background = shade(1, '--orange')")
    js(opened, "cells[5].style.background = shade(1)")
    js(opened, "tokens[3][0].classList.add('odd')")
    js(opened, "tokens[4][0].style.background = shade(1, '--orange')")
    js(opened, "tokens[4][0].classList.add('part')")
    code = """arguments[0].map((selector) => {
        const paper = getComputedStyle(document.body).backgroundColor;
        const style = getComputedStyle(eval(selector)), shaded = [paper, style.backgroundColor];
        const canvas = new OffscreenCanvas(1, 1);
        const context = canvas.getContext("2d", {willReadFrequently: true});
        return [shaded, [...shaded, style.color]].map((colours) => {
            for (context.fillStyle of colours) context.fillRect(0, 0, 1, 1);
            return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
        });
    })"""
    where = [
        "document.querySelector('.note')",
        "tokens[3][0]",
        "tokens[4][0]",
        "cells[5]",
        "document.querySelector('h1')",
    ]
    for selector, (paper, ink) in zip(where, js(opened, code, where), strict=True):
        light = [np.dot(linear_light(c), [0.2126, 0.7152, 0.0722]) + 0.05 for c in (paper, ink)]
        assert max(light) / min(light) >= (3 if selector == "tokens[4][0]" else 4.5)


def linear_light(colour):  # https://www.w3.org/TR/WCAG22/#dfn-relative-luminance
    c = np.array(colour) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


# ---- Odd places, odd weights ---------------------------------------------------------------------


def test_only_a_page_is_replaced_unless_asked_to(models, tmp_path):
    path = tmp_path / "page.html"
    flags = ["Once", "--model_size", "tiny", "--models_dir", models[0], "--out", path]
    path.touch()
    for _ in range(3):  # an empty file, then the page before
        assert call(*flags)[0] == 0
        assert path.stat().st_size > 1000
    notes = b"<html><title>my notes</title>"
    path.write_bytes(notes)
    code, out, err = call(*flags)
    assert (code, out, path.read_bytes()) == (2, "", notes)
    remedy = "add --overwrite to replace it"
    assert err == f"error: --out {path} is not a page of explain.py; {remedy}\n"
    assert call(*flags, "--overwrite")[0] == 0
    assert path.read_bytes().startswith(b"<!doctype html>")


def test_out_may_be_a_link_but_no_device(models, tmp_path):
    args = ["a", "--model_size", "tiny", "--models_dir", models[0], "--out"]
    (tmp_path / "link.html").symlink_to("real.html")
    assert call(*args, "link.html", cwd=tmp_path)[0] == 0
    assert (tmp_path / "link.html").is_symlink() and not (tmp_path / "real.html").is_symlink()
    os.mkfifo(tmp_path / "pipe")
    code, _, err = call(*args, "pipe", cwd=tmp_path)
    assert code == 2 and err.startswith("error: --out pipe: is not an ordinary file; name a file")
    os.link(tmp_path / "real.html", tmp_path / "old")  # a new file takes the name: never half of it
    old = (tmp_path / "old").read_bytes()
    assert call("other", *args[1:], "real.html", cwd=tmp_path)[0] == 0
    assert (tmp_path / "old").read_bytes() == old != (tmp_path / "real.html").read_bytes()
    code, _, err = call(*args, "x" * 250, cwd=tmp_path)
    assert code == 2 and ".tmp" not in err and err.startswith(f"error: cannot write {tmp_path}")


def test_256_tokens_are_not_too_many_and_a_path_is_a_model(models, tmp_path):
    folder, hparams = models[0], TINY | {"n_ctx": 300}
    params = random_params(np.random.default_rng(0), hparams)
    utils.save_model(folder / "longer", Encoder([]), hparams, params)
    code, out, _ = call("ab" * 128, "--model_size", folder / "longer", cwd=tmp_path)
    size = (tmp_path / "explain.html").stat().st_size
    assert code == 0 and out.endswith(f": 256 tokens, {size / 1e6:.1f} MB. Open it in a browser.\n")
    data = read_page(tmp_path / "explain.html")
    assert data["model"] == "longer"

    def check(call):
        for inner in call["calls"]:
            assert inner["function"] != call["function"]
            check(inner)

    check(data["call"])


@pytest.mark.parametrize("scale", [np.nan, 1e30])
def test_weights_that_make_no_numbers_are_refused(models, tmp_path, scale):
    params = random_params(np.random.default_rng(0), TINY)
    params["ln_f"]["g"] *= np.float32(scale)
    params["wte"] *= np.float32(1e10)
    utils.save_model(models[0] / "broken", Encoder([]), TINY, params)
    code, out, err = call("a", "--model_size", "broken", "--models_dir", models[0], cwd=tmp_path)
    assert (code, out) == (2, "") and os.listdir(tmp_path) == []
    assert err == "error: broken: the logits are not finite, so the weights must be damaged\n"


def test_a_profiler_that_was_there_is_there_again():
    def profiler(frame, event, value):
        pass

    sys.setprofile(profiler)
    try:
        watch(gpt2.gelu, np.ones(3))
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(None)


def test_groups_follow_a_power_law_under_any_temperature():
    logits = -3 * np.log(np.arange(258, 50258))[None]
    counts, stand_ins = group(logits, 257)
    exact = np.logaddexp.reduce(logits[0] / 2)
    assert np.logaddexp.reduce(stand_ins[0] / 2 + np.log(counts)) == pytest.approx(exact, abs=0.01)
