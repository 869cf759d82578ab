"""Templates of HTML pages. Each becomes one file that needs no other."""

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "pages"


def template(name):  # -> the text of pages/name, with what all pages share in its place
    text = (FOLDER / name).read_text("utf-8")
    for place, shared in (("{{style}}", "shared.css"), ("{{script}}", "shared.js")):
        text = text.replace(place, (FOLDER / shared).read_text("utf-8").rstrip())
    return text
