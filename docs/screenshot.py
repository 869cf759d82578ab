"""Photographs explain.py's page for the README, in a real browser.

    python docs/screenshot.py [PNG]        # docs/explain.png

Needs requirements/test.txt, chromium and its chromedriver.
"""

import base64
import subprocess
import sys
import tempfile
from pathlib import Path
from shutil import which

from selenium import webdriver

REPO = Path(__file__).resolve().parent.parent
TEXT = "ROMEO: But soft, what light through yonder window breaks?"
CHOOSE = """
    document.querySelectorAll("#tokens .token")[arguments[0]].click();
    document.querySelectorAll("#heads .map")[arguments[1]].click();
    document.querySelector("#heads").scrollIntoView();
    window.scrollBy(0, -210);  // below the text, which stays in sight
"""


def main(png=REPO / "docs" / "explain.png"):
    options = webdriver.ChromeOptions()
    options.binary_location = which("chromium") or which("google-chrome")
    for flag in ("--headless=new", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(flag)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "explain.html"
        explain = [sys.executable, REPO / "explain.py", TEXT, "--model_size", "shakespeare"]
        models = ["--models_dir", REPO / "models", "--out", page]
        subprocess.run([*explain, *models], check=True, stdout=subprocess.DEVNULL)
        with webdriver.Chrome(options, webdriver.ChromeService(which("chromedriver"))) as chrome:
            size = {"width": 1000, "height": 750, "deviceScaleFactor": 1, "mobile": False}
            chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            chrome.get(page.as_uri())
            chrome.execute_script(CHOOSE, TEXT.index("er window"), 3 * 6 + 3)
            picture = chrome.execute_cdp_cmd("Page.captureScreenshot", {})["data"]
    Path(png).write_bytes(base64.b64decode(picture))


if __name__ == "__main__":
    main(*sys.argv[1:])
