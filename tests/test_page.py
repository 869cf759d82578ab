"""serve.py's page in a real browser: writing, alternatives, branches, heads switched off."""

import secrets
import time

import numpy as np
import pytest
from conftest import GPT2_FILES, TINY, on_a_port, random_params

import gpt2
from encoder import Encoder, get_encoder
from model_files.vocabulary import printable_bytes
from pages.predictions import bytes_of

pytest.importorskip("starlette", reason="starlette is not installed")
pytest.importorskip("selenium", reason="selenium is not installed")
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402
from test_explain import HOSTILE, browser, click, emulate, every, js, parts  # noqa: E402, F401
from test_play import silenced  # noqa: E402
from test_serve import ENCODER  # noqa: E402

import serve  # noqa: E402

HPARAMS, N_HEAD, NAME = TINY | {"n_ctx": 400}, TINY["n_head"], "<img src=x onerror=alert(1)>"
CHOSEN = "pathTo(state.leaf).map(node => node.id)"


@pytest.fixture(scope="module")
def params():
    """Random ones, in which <|endoftext|> is never the likeliest."""
    seed = secrets.randbits(32)
    print("seed", seed)
    params = random_params(np.random.default_rng(seed), HPARAMS)
    params["wte"][256] = 0
    return params


@pytest.fixture(scope="module")
def app(params):
    return serve.make_app(NAME, ENCODER, HPARAMS, params)


@pytest.fixture(scope="module")
def address(app):
    with on_a_port(app) as (host, port):
        yield f"http://{host}:{port}/"


@pytest.fixture
def page(browser, address):  # noqa: F811
    """The page just opened. Afterwards: no error in its log, nothing asked of another server."""
    emulate(browser)
    browser.get_log("browser")
    browser.get(address)
    wait(browser, "state.n_ctx > 0")
    js(browser, "sessionStorage.clear()")
    yield browser
    js(browser, "localStorage.clear()")
    resources = js(browser, "performance.getEntriesByType('resource').map(e => e.name)")
    assert all(name.startswith(address) for name in resources)
    assert browser.get_log("browser") == []


def wait(page, condition, seconds=20):
    WebDriverWait(page, seconds, 0.02).until(lambda page: js(page, condition))


def slide(page, name, value):
    set_it = """{const input = document.getElementById(arguments[0]); input.value = arguments[1];
        input.dispatchEvent(new Event('input'))}"""
    page.execute_script(set_it, name, value)


def write(page, text, n_tokens, temperature=0):
    """What the page writes after a text, and waits for its end."""
    slide(page, "temperature", temperature)
    page.execute_script("document.getElementById('prompt').value = arguments[0]", text)
    page.execute_script("document.getElementById('n_tokens').value = arguments[0]", n_tokens)
    click(page, "#write")
    wait_for_end(page)


def wait_for_end(page):
    """Of writing, and of asking what comes next."""
    wait(page, "!state.writing && Boolean(state.chosen || state.leaf.next)")


def choose(page, i):
    click(page, "#tokens .token:not(.end)", i)
    wait(page, f"state.chosen === pathTo(state.leaf)[{i}] && state.chosen.parent.next !== null")
    wait(page, "document.querySelector('#next .here') !== null")


def greedy(params, ids, n_tokens):
    return gpt2.generate(ids, params, N_HEAD, n_tokens)


def alternatives(page):  # -> ids, probabilities
    ids = js(page, "[...$('next').children].map(e => Number(e.dataset.id))")
    return ids, js(page, "[...$('next').children].map(e => Number(e.dataset.p))")


def test_a_text_streams_in_each_token_shaded_by_its_surprise(page, params):
    ids = ENCODER.encode(HOSTILE)
    write(page, HOSTILE, 30)
    new = greedy(params, ids, 30)
    assert js(page, CHOSEN) == ids + new
    assert "".join(every(page, "#tokens .token"))[: len(HOSTILE)] == HOSTILE
    logits = gpt2.gpt2(ids + new, **params, n_head=N_HEAD)
    probs = np.array([gpt2.probabilities(row, 1) for row in logits[:-1]])
    bits = -np.log2(probs[np.arange(len(probs)), (ids + new)[1:]])
    shaded = parts(page, "shown.map(node => node.button)")
    np.testing.assert_allclose(shaded, np.minimum([0, *bits], 12) / 12, atol=0.002)
    known = js(page, f"{CHOSEN}.map(id => Array.from(bytesOf(id)))")
    assert bytes(sum(known, [])).hex() == "".join(
        bytes_of(set(new + ids), ENCODER)[id] for id in ids + new
    )
    # Neither the text nor the model's name is ever anything but text.
    assert js(page, "[document.scripts.length, document.images.length]") == [1, 0]
    assert NAME in every(page, "#model")[0]


def test_a_hostile_vocabulary_is_only_text(browser, params):  # noqa: F811
    """Tokens that are whole elements: in the text, as alternatives, in branches, explained."""
    words = ["<img src=x onerror=alert(2)>", "</script><script>alert(3)</script>"]
    merges = {}
    for word in words:
        letters = [printable_bytes()[byte] for byte in word.encode()]
        merges |= {("".join(letters[:i]), letters[i]): None for i in range(1, len(letters))}
    encoder = Encoder(list(merges))
    first, second = (encoder.vocab[word.replace(" ", "Ġ")] for word in words)
    wte = np.zeros((encoder.n_vocab, TINY["n_embd"]), np.float32)
    wte[first], wte[second] = 2, 1  # the likeliest, and the next
    hostile = params | {"wte": wte, "ln_f": {"g": params["ln_f"]["g"], "b": np.ones_like(wte[0])}}
    app = serve.make_app(NAME, encoder, HPARAMS | {"n_vocab": len(wte)}, hostile)

    def check(n_scripts):
        assert js(browser, "[document.scripts.length, document.images.length]") == [n_scripts, 0]
        shown = js(browser, "document.body.textContent")
        assert all(word in shown or word.replace(" ", "·") in shown for word in [*words, NAME])
        assert browser.get_log("browser") == []

    with on_a_port(app) as (host, port):
        emulate(browser)
        browser.get(f"http://{host}:{port}/")
        wait(browser, "state.n_ctx > 0")
        browser.get_log("browser")
        write(browser, HOSTILE, 4)
        assert js(browser, CHOSEN)[-4:] == [first] * 4
        choose(browser, len(js(browser, CHOSEN)) - 2)
        click(browser, f"#next [data-id='{second}']")
        wait_for_end(browser)
        assert second in js(browser, CHOSEN)
        check(n_scripts=1)
        browser.get(js(browser, "$('explain').href"))
        click(browser, "#tokens .token", len(HOSTILE))
        check(n_scripts=2)


def test_sliders_act_at_once_as_gpt2_does(page, params, rng):
    ids = ENCODER.encode("But soft, what light?")
    write(page, "But soft, what light?", 5)
    ids += greedy(params, ids, 5)
    for i in rng.integers(1, len(ids), 3).tolist():
        choose(page, i)
        n_asked = js(page, "performance.getEntriesByType('resource').length")
        logits = gpt2.gpt2(ids[:i], **params, n_head=N_HEAD)[-1]
        for _ in range(4):
            how = {"temperature": float(rng.choice([0.3, 1, 2]))}
            how |= {"top_k": int(rng.choice([1, 7, 100, 0])), "top_p": float(rng.choice([0.5, 1]))}
            how |= {"min_p": float(rng.choice([0, 0.03, 0.5]))}
            penalty = float(rng.choice([1, 1.3, 2]))
            for name, value in how.items():
                slide(page, name, 101 if name == "top_k" and value == 0 else value)
            slide(page, "repetition_penalty", penalty)
            penalized = gpt2.penalize_repetition(logits, ids[:i], penalty)
            probs = gpt2.probabilities(penalized, **how)
            shown, theirs = alternatives(page)
            np.testing.assert_allclose(theirs, probs[shown], rtol=0.01, atol=1e-9)
            assert set(np.argsort(-penalized)[:12].tolist()) | {ids[i]} == set(shown)
            assert f"{np.sum(probs > 0)} of 257 tokens" in every(page, "#kept")[0]
        assert js(page, "performance.getEntriesByType('resource').length") == n_asked
    slide(page, "repetition_penalty", 1)
    slide(page, "temperature", 0)  # only the likeliest, which the model may also have said
    assert alternatives(page)[1][:2] == [1, 0]


def test_what_is_written_follows_every_slider(page, params):
    ids = ENCODER.encode("One way,")
    slide(page, "repetition_penalty", 1.5)
    slide(page, "min_p", 0.2)
    write(page, "One way,", 30)
    assert js(page, CHOSEN) == ids + gpt2.generate(ids, params, N_HEAD, 30, repetition_penalty=1.5)
    assert every(page, "#repetition_penalty + output") == ["1.5"]
    assert js(page, "[settings().min_p, settings().repetition_penalty]") == [0.2, 1.5]


def test_branches_stay_and_can_be_returned_to(page, params):
    start = ENCODER.encode("One way,")
    write(page, "One way,", 12)
    first = start + greedy(params, start, 12)
    choose(page, 10)
    ids, _ = alternatives(page)
    other = next(id for id in ids if id not in (first[10], 256))
    click(page, f"#next [data-id='{other}']")
    wait_for_end(page)
    second = first[:10] + [other]
    second += greedy(params, second, 12)
    assert js(page, CHOSEN) == second
    assert len(every(page, "#branches button")) == 3  # what they share, and two ends
    assert every(page, "#branches button", "ariaCurrent") == ["true", "false", "true"]
    click(page, "#branches button", 1)
    wait_for_end(page)
    assert js(page, CHOSEN) == first
    click(page, "#continue")
    wait_for_end(page)
    assert js(page, CHOSEN) == first + greedy(params, first, 12)
    choose(page, 10)
    click(page, f"#next [data-id='{other}']")  # an old way is gone again, not written anew
    wait_for_end(page)
    assert js(page, CHOSEN) == second
    write(page, "Two", 3)  # another text is another branch
    assert len(every(page, "#branches button")) == 4


def test_stop_and_continue(page, params, app, monkeypatch):
    engine, start = app.state.engine, ENCODER.encode("Stop")
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.02), step()))
    slide(page, "temperature", 0)
    js(page, "($('prompt').value = 'Stop', $('n_tokens').value = 300)")
    click(page, "#write")
    wait(page, "pathTo(state.leaf).length > 8")
    click(page, "#tokens .token", 5)  # while it writes
    wait(page, "document.querySelector('#next .here') !== null")
    click(page, "#stop")
    n_written = len(js(page, CHOSEN))
    assert n_written < 200
    deadline = time.monotonic() + 10
    while engine.batch.rows and time.monotonic() < deadline:
        time.sleep(0.02)
    assert engine.batch.rows == []  # the server, too, has stopped
    assert len(js(page, CHOSEN)) == n_written
    monkeypatch.setattr(engine, "step", step)
    js(page, "$('n_tokens').value = 20")
    click(page, "#continue")
    wait_for_end(page)
    assert js(page, CHOSEN) == start + greedy(params, start, n_written - len(start) + 20)


def reopen(page):
    page.refresh()
    wait(page, "state.n_ctx > 0 && !state.writing")


def test_branches_survive_a_reload(page):
    write(page, "One wäy,", 12)
    choose(page, 10)
    click(page, "#next .pick:not(.here)", 3)
    wait_for_end(page)
    click(page, "#branches button", 1)
    before = js(page, CHOSEN), every(page, "#branches button"), every(page, "#tokens .token")
    shades = parts(page, "shown.map(node => node.button)")
    reopen(page)
    wait(page, "shown.length > 0")
    assert (js(page, CHOSEN), every(page, "#branches button")) == before[:2]
    assert every(page, "#tokens .token") == before[2]
    np.testing.assert_allclose(parts(page, "shown.map(node => node.button)"), shades, atol=0.002)
    click(page, "#branches button", 2)
    assert js(page, CHOSEN) != before[0]
    click(page, "#continue")
    wait_for_end(page)
    click(page, "#forget")
    assert js(page, "[root.children.length, $('branches').textContent]") == [0, ""]
    reopen(page)
    assert js(page, "root.children.length") == 0 and every(page, "#tokens .token") == []


def test_what_is_kept_is_bounded_and_begins_with_the_shown_text(page):
    write(page, "One", 5)
    shown = js(page, CHOSEN)
    grown = """(() => { for (let i = 0; i < 60; i++) { let node = root;
        for (let j = 0; j < 300; j++) node = grow(node, j ? i : 300 + i, 1); } keepTree();
        return JSON.parse(localStorage.getItem("tree")).nodes.length; })()"""
    n_kept = js(page, grown)
    assert n_kept <= js(page, "MOST_KEPT") < 60 * 300
    reopen(page)
    wait(page, "shown.length > 0")
    assert js(page, CHOSEN) == shown
    assert js(page, "root.children.at(-1).id") == 359  # the newest


RUBBISH = ["", "no JSON", "null", "[]", '{"model": 1}', '{"nodes": {}}',
           '{"model": MODEL, "leaf": 9, "nodes": [[7, 1, 1, true]], "pieces": {}}',
           '{"model": MODEL, "leaf": 0, "nodes": [[-1, "<b>", 1, true]], "pieces": {}}',
           '{"model": MODEL, "leaf": 0, "nodes": [[-1, 1, null, true], [0]], "pieces": {}}',
           '{"model": MODEL, "leaf": 0, "nodes": [[-1, 1, 1, true]], "pieces": 3, "nodes": 4}',
           '{"model": "another, 400", "leaf": 0, "nodes": [[-1, 1, 1, true]], "pieces": {}}',
           ]  # fmt: skip


def test_rubbish_in_the_storage_is_ignored(page):
    for text in RUBBISH:
        text = text.replace("MODEL", js(page, "JSON.stringify(state.model)"))
        page.execute_script("localStorage.setItem('tree', arguments[0])", text)
        reopen(page)
        assert js(page, "root.children.length") == 0, text
    write(page, "One", 5)
    assert len(js(page, CHOSEN)) == 8


@pytest.mark.parametrize("how", ["denied", "full"])
def test_the_page_works_without_a_storage(browser, address, how):  # noqa: F811
    broken = {
        "denied": "Object.defineProperty(window, NAME, {get() { throw new DOMException('no'); }});",
        "full": "Storage.prototype.setItem = () => { throw new DOMException('full'); };",
    }[how]
    source = "".join(broken.replace("NAME", f"'{n}Storage'") for n in ("local", "session"))
    script = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
    try:
        browser.get(address)
        wait(browser, "state.n_ctx > 0")
        browser.get_log("browser")
        write(browser, "One", 5)
        assert len(js(browser, CHOSEN)) == 8 and len(every(browser, "#branches button")) == 1
        assert browser.get_log("browser") == []
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


def test_lines_end_between_words(page):
    """On a phone, of tokens that are bytes; a word longer than a line is broken all the same."""
    emulate(page, 360)
    words = "But soft, what light through yonder window breaks? It is the east, " * 3
    long = "a" * 90
    write(page, words + long, 1)
    tops = js(page, "shown.map(node => Math.round(node.button.getBoundingClientRect().top))")
    text = words + long
    for i in range(1, len(words)):
        if tops[i] != tops[i - 1]:
            assert text[i - 1] == " ", text[i - 10 : i + 10]
    assert len(set(tops[len(words) : len(text)])) > 1
    assert js(page, "document.documentElement.scrollWidth") <= 360
    right = js(page, "Math.max(...shown.map(n => n.button.getBoundingClientRect().right))")
    assert right <= js(page, "$('tokens').getBoundingClientRect().right")


@pytest.mark.slow
@pytest.mark.skipif(
    not (GPT2_FILES / "encoder.json").is_file(),
    reason=f"GPT-2's tokenizer files are not in {GPT2_FILES} (set SIXTYGPT_DATA)",
)
def test_gpt2s_own_tokens(browser, rng):  # noqa: F811
    """50257 of them: what is shown, what the sliders do, words, branches, a reload."""
    encoder = get_encoder(GPT2_FILES.name, GPT2_FILES.parent)
    hparams = TINY | {"n_vocab": 50257, "n_ctx": 128}
    params = random_params(rng, hparams)
    app = serve.make_app("gpt2", encoder, hparams, params)
    text = "Hello, unbelievably long-winded world! 你好 🙂\n\tdef f(x):"
    ids = encoder.encode(text)
    with on_a_port(app) as (host, port):
        emulate(browser, 360)
        browser.get(f"http://{host}:{port}/")
        wait(browser, "state.n_ctx > 0")
        browser.get_log("browser")
        write(browser, text, 20)
        new = gpt2.generate(ids, params, N_HEAD, 20)
        assert js(browser, CHOSEN) == ids + new
        shown = js(browser, "shown.map(node => Array.from(bytesOf(node.id)))")
        assert bytes(sum(shown[: len(ids)], [])).decode() == text
        i = len(ids) + 3
        choose(browser, i)
        logits = gpt2.gpt2((ids + new)[:i], **params, n_head=N_HEAD)[-1]
        for how in ({"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.5}, {"min_p": 0.2}):
            how = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0} | how
            for name, value in how.items():
                slide(browser, name, value)
            places, theirs = alternatives(browser)
            probs = gpt2.probabilities(logits, **how)
            np.testing.assert_allclose(theirs, probs[places], rtol=0.02, atol=1e-9)
        assert "of 50257 tokens" in every(browser, "#kept")[0]
        slide(browser, "min_p", 0)
        other = next(id for id in places if id != new[3])
        click(browser, f"#next [data-id='{other}']")
        wait_for_end(browser)
        assert js(browser, CHOSEN)[: i + 1] == [*ids, *new[:3], other]
        chosen, names = js(browser, CHOSEN), every(browser, "#tokens .token")
        reopen(browser)
        wait(browser, "shown.length > 0")
        assert (js(browser, CHOSEN), every(browser, "#tokens .token")) == (chosen, names)
        assert js(browser, "document.documentElement.scrollWidth") <= 360
        assert browser.get_log("browser") == []


def test_a_full_text_says_so(page):
    write(page, "a" * 395, 20)
    assert len(js(page, CHOSEN)) == 400
    assert every(page, "#status") == ["The text fills the model's 400 positions."]
    click(page, "#continue")
    assert len(js(page, CHOSEN)) == 400
    wait(page, "$('next').children.length > 0")  # what would come next, but there is no room
    assert js(page, "[...$('next').children].every(pick => pick.disabled)")
    choose(page, 399)
    assert not js(page, "[...$('next').children].some(pick => pick.disabled)")


def test_while_it_writes_no_other_place_of_the_text_is_shown(page):
    write(page, "One", 3)
    choose(page, 2)
    js(
        page,
        """(window.seen = new Set(), new MutationObserver(() => state.writing &&
        seen.add($("next").children.length)).observe($("tokens"), {childList: true}))""",
    )
    write(page, "Another", 30)
    assert js(page, "[...seen]") == [0]


def test_a_head_is_switched_off(page, params, address):
    text = "A <script>alert(1)</script> né"
    write(page, text, 1)
    ids = js(page, CHOSEN)
    page.get(js(page, "$('explain').href"))
    assert js(page, "data.ids") == ids and ids[:-1] == ENCODER.encode(text)
    assert js(page, "document.scripts.length") == 2
    click(page, "#heads .map", 3)
    click(page, "#off")
    wait(page, "answers.size === 1 && $('changed').children.length > 0")
    assert every(page, "#without-title") == ["Without block 1, head 1"]

    def check(heads, i):
        logits = [gpt2.gpt2(ids, **silenced(params, h, N_HEAD), n_head=N_HEAD) for h in ([], heads)]
        probs = [np.array([gpt2.probabilities(row, 1) for row in rows]) for rows in logits]
        costs = [-np.log2(p[np.arange(len(ids) - 1), ids[1:]]).mean() for p in probs]
        words = every(page, "#cost")[0]
        told = [float(word) for word in words.split() if word.replace(".", "").isdigit()]
        np.testing.assert_allclose(told, costs, atol=0.006)
        shown = [int(t.split()[1]) for t in every(page, "#changed .name", "title")]
        assert set(shown) == set(np.argsort(-np.maximum(probs[0][i], probs[1][i]))[:10].tolist())
        for kind, p in ((".was", probs[0][i]), (".bar:not(.was)", probs[1][i])):
            widths = (
                "[...document.querySelectorAll(arguments[0])].map(e => parseFloat(e.style.width))"
            )
            longest = max(probs[0][i].max(), probs[1][i].max())
            seen = js(page, widths, f"#changed {kind}")
            np.testing.assert_allclose(seen, 100 * p[shown] / longest, atol=0.02)

    check([(1, 1)], len(ids) - 1)
    click(page, "#heads .map", 0)
    click(page, "#off")
    click(page, "#tokens .token", 4)
    wait(page, "answers.has('0,3 4')")
    check([(0, 0), (1, 1)], 4)
    assert js(page, "maps.map(map => map.classList.contains('off'))") == [True, False, False, True]
    click(page, "#all-on")
    assert not js(page, "document.querySelector('.map.off')")
    assert js(page, "$('without').hidden")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone(page, scheme):
    emulate(page, 390, scheme)
    write(page, "a" * 90 + "\n" + "W" * 30, 30)
    choose(page, 20)
    assert js(page, "document.documentElement.scrollWidth") <= 390
    colour = "getComputedStyle(document.body).{}.match(/\\d+/g).map(Number)"
    ink, paper = (np.mean(js(page, colour.format(c))) for c in ("color", "backgroundColor"))
    assert (ink > paper) == (scheme == "dark") and abs(ink - paper) > 180


def test_the_keyboard_reaches_tokens_and_alternatives(page):
    from selenium.webdriver.common.keys import Keys

    write(page, "Keys", 4)
    js(page, "document.querySelector('#tokens [tabindex=\"0\"]').focus()")
    page.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    wait(page, "state.chosen === pathTo(state.leaf)[6]")
    wait(page, "document.querySelector('#next .here') !== null")
    js(page, "$('next').children[1].focus()")
    assert js(page, "document.activeElement === $('next').children[1]")
    page.switch_to.active_element.send_keys(Keys.ENTER)
    wait_for_end(page)
    assert len(every(page, "#branches button")) == 3


def test_the_page_asks_for_the_key(browser, params):  # noqa: F811
    app = serve.make_app("tiny", ENCODER, HPARAMS, params, api_key="sésame")
    with on_a_port(app) as (host, port):
        browser.get(f"http://{host}:{port}/")
        wait(browser, "!$('key').hidden")
        browser.find_element("id", "api_key").send_keys("sesame")
        click(browser, "#key button")
        wait(browser, "!$('key').hidden && $('status').textContent.includes('wrong')")
        browser.find_element("id", "api_key").clear()
        browser.find_element("id", "api_key").send_keys("sésame")
        click(browser, "#key button")
        wait(browser, "state.n_ctx === 400")
        browser.get_log("browser")  # the 401s
        write(browser, "One", 5)
        assert len(js(browser, CHOSEN)) == 8
        click(browser, "#explain")
        WebDriverWait(browser, 10).until(lambda browser: len(browser.window_handles) == 2)
        page, tab = browser.window_handles
        browser.switch_to.window(tab)
        try:
            wait(browser, "typeof maps !== 'undefined' && maps.length === 4")
            click(browser, "#off")
            wait(browser, "$('changed').children.length > 0")
        finally:
            browser.close()
            browser.switch_to.window(page)
        assert browser.get_log("browser") == []
