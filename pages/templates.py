"""Templates of HTML pages. Each of them becomes one file that needs no other."""

from pathlib import Path

FOLDER = Path(__file__).parent
SHARED = {  # {marker in a template: the file that replaces it}
    "{{style}}": "shared.css",
    "{{script}}": "shared.js",
    "{{reading_style}}": "reading.css",
    "{{reading_script}}": "reading.js",
    "{{sliders}}": "sliders.html",
    "{{surprise}}": "surprise.html",
}


def template(name):  # -> the text of pages/name, with the parts that all pages share
    text = (FOLDER / name).read_text("utf-8")
    for marker, file in SHARED.items():
        text = text.replace(marker, (FOLDER / file).read_text("utf-8").rstrip())
    return text
