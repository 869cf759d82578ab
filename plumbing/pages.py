"""Templates of HTML pages. Each becomes one file that needs no other."""

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "pages"
SHARED = {  # what stands in several pages, and the place where it goes
    "{{style}}": "shared.css",
    "{{script}}": "shared.js",
    "{{sliders}}": "sliders.html",
    "{{surprise}}": "surprise.html",
}


def template(name):  # -> the text of pages/name, with what all pages share in its place
    text = (FOLDER / name).read_text("utf-8")
    for place, shared in SHARED.items():
        text = text.replace(place, (FOLDER / shared).read_text("utf-8").rstrip())
    return text
