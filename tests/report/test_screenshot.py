"""The page in a browser: it is visible and fits a phone."""

import html
import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

from nio_hf.report.page import render_page
from tests.report.runs import full_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
)
PHONES, DESKTOP = (360, 390), 1280
HEIGHT = 2400

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")


@pytest.fixture(scope="module")
def page():
    return render_page(full_run(blocks=6, iterations=30))


def browse(content, folder, *flags):
    (folder / "page.html").write_text(content, encoding="utf-8")
    command = [str(BROWSER), *FLAGS.split(), f"--user-data-dir={folder / 'profile'}", *flags]
    command.append((folder / "page.html").as_uri())
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def framed(page, *widths):
    """The page in frames of these widths, since a window cannot be as narrow as a phone."""
    frames = (
        f'<iframe srcdoc="{html.escape(page)}" style="border:0;width:{width}px;height:{HEIGHT}px"></iframe>'
        for width in widths
    )
    return f'<!DOCTYPE html><meta charset="utf-8"><body style="margin:0;background:red">{"".join(frames)}'


def screenshot(content, folder, width):
    file = folder / "page.png"
    browse(content, folder, f"--screenshot={file}", f"--window-size={width},{HEIGHT}")
    with Image.open(file) as image:
        return image.convert("RGB")


def test_nothing_is_wider_than_the_window(page, tmp_path):
    widths = (*PHONES, 768, DESKTOP)
    script = """
        <script>
        addEventListener("load", () => {
          const roots = [...document.querySelectorAll("iframe")].map(frame => frame.contentDocument.documentElement);
          const broken = roots.map(root => [...root.querySelectorAll("img")].filter(img => !img.naturalWidth).length);
          const found = {widths: roots.map(root => root.scrollWidth), broken: broken};
          document.body.innerHTML = "<pre>" + JSON.stringify(found) + "</pre>";
        });
        </script>"""
    printed = browse(framed(page, *widths) + script, tmp_path, "--dump-dom")
    found = re.search(r"<pre>(.*?)</pre>", printed)
    assert found is not None, printed[-500:]
    assert json.loads(found[1]) == {"widths": list(widths), "broken": [0] * len(widths)}


@pytest.mark.parametrize("width", [PHONES[1], DESKTOP])
def test_the_page_shows(page, width, tmp_path):
    is_phone = width in PHONES
    image = screenshot(framed(page, width) if is_phone else page, tmp_path, 500 if is_phone else width)
    image = image.crop((0, 0, width, image.height))
    assert image.height > HEIGHT / 2
    colors = image.getcolors(image.width * image.height) or []
    assert len(colors) > 50, "the page is blank"
    background = max(colors)[1]
    assert background == (255, 255, 255)
    margin = image.crop((width - 8, 0, width, image.height)).getcolors()
    assert [color for _, color in margin] == [background], "something reaches to the right edge"
