"""Photographs explain.py's pages and serve.py's for the README and the tour, in a real browser.

    python docs/screenshot.py [FOLDER [RUN]]    # docs/explain.png, learning.png and serve.png

RUN: the folder of a run with snapshots. Without one, train_jax.py trains its default recipe.

Needs requirements/test.txt, chromium and its chromedriver.
"""

import base64
import subprocess
import sys
import tempfile
from pathlib import Path
from shutil import which

from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

REPO = Path(__file__).resolve().parent.parent
MODEL = ["--model_size", "shakespeare", "--models_dir", REPO / "models"]
TEXT = "ROMEO: But soft, what light through yonder window breaks?"
CHOOSE = """
    document.querySelectorAll("#tokens .token")[arguments[0]].click();
    document.querySelectorAll("#heads .map")[arguments[1]].click();
    document.querySelector("#heads").scrollIntoView();
    window.scrollBy(0, 90);  // the maps, below the text, which stays in sight
"""
FORMED = """
    const [layer, head, snapshot] = data.formed[0] ?? [0, 0, last];
    set({layer, head, snapshot: Math.min(last, snapshot + 4), position: arguments[0]});
    document.querySelector("#formed").scrollIntoView();
"""
SET = """
    const input = document.getElementById(arguments[0]);
    input.value = arguments[1];
    input.dispatchEvent(new Event("input"));
"""


def explain(chrome, run):
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "explain.html"
        command = [sys.executable, REPO / "explain.py", TEXT, *MODEL, "--out", page]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        chrome.get(page.as_uri())
    chrome.execute_script(CHOOSE, TEXT.index("er window"), 3 * 6 + 3)


def learning(chrome, run):
    with tempfile.TemporaryDirectory() as folder:
        if run is None:
            run = Path(folder) / "mine"
            command = [sys.executable, REPO / "train_jax.py", "--snapshots", "60", "--out", run]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        page = Path(folder) / "learning.html"
        command = [sys.executable, REPO / "explain.py", TEXT, "--run", run, "--out", page]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        chrome.get(page.as_uri())
    chrome.execute_script(FORMED, TEXT.index("er window"))


def serve(chrome, run):
    """A text, other tokens taken at two places of it, and one chosen. It is another each time."""

    def wait(condition):
        WebDriverWait(chrome, 30).until(lambda chrome: chrome.execute_script(f"return {condition}"))

    def click(selector, i=0):
        chrome.find_elements("css selector", selector)[i].click()

    command = [sys.executable, REPO / "serve.py", *MODEL, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            chrome.get(server.stdout.readline().split()[-1])
            wait("state.n_ctx > 0")
            for name, value in (("prompt", TEXT[:16]), ("n_tokens", 56)):
                chrome.execute_script(SET, name, value)
            click("#write")
            wait("!state.writing && state.leaf.next")
            for token in (17, 41):
                click("#tokens .token", token)
                wait("document.querySelector('#next .here')")
                click("#next .pick:not(.here)")
                wait("!state.writing && state.leaf.next")
            click("#tokens .token", 41)
            wait("document.querySelector('#next .here')")
        finally:
            server.terminate()


def main(folder=REPO / "docs", run=None):
    options = webdriver.ChromeOptions()
    options.binary_location = which("chromium") or which("google-chrome")
    for flag in ("--headless=new", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(flag)
    with webdriver.Chrome(options, webdriver.ChromeService(which("chromedriver"))) as chrome:
        for show, height in ((explain, 750), (learning, 1000), (serve, 750)):
            size = {"width": 1000, "height": height, "deviceScaleFactor": 1, "mobile": False}
            chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            show(chrome, run)
            picture = chrome.execute_cdp_cmd("Page.captureScreenshot", {})["data"]
            (Path(folder) / f"{show.__name__}.png").write_bytes(base64.b64decode(picture))


if __name__ == "__main__":
    main(*sys.argv[1:])
