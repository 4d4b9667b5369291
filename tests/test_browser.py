"""In headless Chromium: chapters run in JupyterLab, the site fits on a phone, and the page of `expnet serve` captions what is dropped on it."""
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from socket import create_server
from urllib.request import urlopen

import pytest
from PIL import Image

from expnet.data.shapes import record
from test_serve import BAD, tiny

ROOT = Path(__file__).parents[1]
WAIT = 300_000                                              # milliseconds for one thing to appear, on a slow computer
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this computer")]


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="browser tests need the extra dev")
    with api.sync_playwright() as tool:
        chromium = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1300, "height": 900})
    page.set_default_timeout(WAIT)
    yield page
    page.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Address and folder of a JupyterLab over a copy of the book."""
    home = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "nbs", home / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    with create_server(("127.0.0.1", 0)) as free: port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **{name: str(home / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")}}
    words = ["--no-browser", "--allow-root", f"--port={port}", "--IdentityProvider.token=", f"--ServerApp.root_dir={home / 'nbs'}"]
    process = subprocess.Popen([sys.executable, "-m", "jupyterlab", *words], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: urlopen(f"http://127.0.0.1:{port}/api").status == 200, WAIT / 1000)
        yield f"http://127.0.0.1:{port}", home / "nbs"
    finally:
        process.terminate()
        process.wait()


def wait_for(ready, seconds: float) -> None:
    """Return when `ready()` is true; an OSError counts as not yet."""
    end = time.time() + seconds
    while time.time() < end:
        try:
            if ready(): return
        except OSError: pass
        time.sleep(0.5)
    raise TimeoutError(f"not ready after {seconds} seconds")


@pytest.mark.parametrize("chapter", ["00_tools", "models/17_dropout", "decode/25_search"])
def test_a_chapter_runs_from_top_to_bottom_in_jupyterlab(page, lab, chapter):
    address, folder = lab
    file = folder / f"{chapter}.ipynb"
    code = lambda: [c for c in json.loads(file.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code" and c["source"]]
    for cell in (book := json.loads(file.read_text(encoding="utf-8")))["cells"]:
        if cell["cell_type"] == "code": cell.update(outputs=[], execution_count=99)                 # stale prompts, to be replaced
    file.write_text(json.dumps(book), encoding="utf-8")
    page.goto(f"{address}/lab/workspaces/{Path(chapter).name}/tree/{chapter}.ipynb")
    page.wait_for_selector(".jp-Notebook .jp-Cell >> nth=2")
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]")
    page.click(".lm-MenuBar-itemLabel:text-is('Run')")
    page.click(".lm-Menu-itemLabel:text-is('Run All Cells')")

    def saved() -> bool:
        page.wait_for_timeout(2000)                                                                 # lets the page work, which time.sleep does not
        page.keyboard.press("Control+s")
        return all(c["execution_count"] not in (None, 99) for c in code())
    wait_for(saved, 2 * WAIT / 1000)
    assert [c["execution_count"] for c in code()] == list(range(1, len(code()) + 1))
    assert not [o for c in code() for o in c["outputs"] if o["output_type"] == "error"]
    assert any(c["outputs"] for c in code())


# What stands to the right of the screen must be in a box that scrolls; pictures must have pixels.
UNREADABLE = """async () => {
    document.querySelectorAll("details").forEach(part => part.open = true);
    await window.MathJax?.startup?.promise;
    const way = node => node && node != document.body ? (getComputedStyle(node).overflowX == "visible" ? way(node.parentElement) : getComputedStyle(node).overflowX) : "visible";
    const lost = node => node.getBoundingClientRect().right > innerWidth + 1 && !["auto", "scroll"].includes(way(node));
    const parts = [...document.querySelectorAll(".bd-article :is(p, li, h1, h2, h3, pre, table, img, summary, dt, dd, mjx-container)")];
    const empty = [...document.images].filter(image => !image.naturalWidth);
    const wide = document.documentElement.scrollWidth > innerWidth ? [document.body] : [];
    return [...wide, ...parts.filter(lost), ...empty].map(node => node.tagName + " " + (node.src ?? node.textContent.trim().slice(0, 40)));
}"""


def test_every_page_of_the_site_can_be_read_on_a_phone(browser, site):
    page = browser.new_page(viewport={"width": 400, "height": 800})
    page.set_default_timeout(WAIT)
    faults, files = {}, sorted(p for p in site.rglob("*.html") if "_static" not in p.parts)
    for file in files:
        page.goto(file.as_uri())
        if found := page.evaluate(UNREADABLE): faults[str(file.relative_to(site))] = found
    page.goto((site / "index.html").as_uri())
    page.evaluate("document.body.append(Object.assign(document.createElement('div'), {style: 'width: 500px', textContent: 'too wide'}))")
    assert page.evaluate(UNREADABLE)                                                                # it would be noticed
    page.close()
    assert len(files) > 80 and not faults


def test_the_site_shows_formulas_finds_words_and_turns_dark(page, site):
    page.goto((site / "nbs/models/22_dynamic_expansion.html").as_uri())
    page.wait_for_selector("mjx-container")
    assert page.locator("mjx-merror").count() == 0
    assert page.locator("svg.fa-magnifying-glass, svg.fa-circle-half-stroke").count() >= 2         # of all icons, those in use are left
    colours = {}
    for mode in ("light", "dark"):
        page.locator(".theme-switch-button:visible").click()
        page.locator(f".theme-change-button[data-mode={mode}]:visible").click()
        page.wait_for_selector(f"html[data-theme={mode}]")
        colours[mode] = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colours["light"] != colours["dark"]
    page.goto((site / "search.html").as_uri() + "?q=selector")
    page.wait_for_selector("#search-results li a")


@pytest.fixture(scope="module")
def served():
    pytest.importorskip("starlette", reason="serve needs the extra serve")
    from expnet.cli.serve import Desk, Limits, application, running
    from expnet.deploy.runtime import Runtime
    from exported import artefact
    pytest.importorskip("onnxruntime", reason="exported models need the extra onnx")
    with running(application(Desk({"tiny": tiny(), "exported": Runtime(artefact())}, Limits(megabytes=2)))) as address: yield address


def test_pictures_dropped_on_the_page_are_captioned_and_bad_files_explained(page, served, tmp_path):
    for i in range(3): Image.fromarray(record("test", i).picture()).save(tmp_path / f"good{i}.png")
    (tmp_path / "text.jpg").write_text("dear diary")
    (tmp_path / "empty.png").touch()
    (tmp_path / "long.png").write_bytes(bytes(3_000_000))
    (tmp_path / "fifty.jpg").write_bytes(BAD["50 megapixels"][0]())
    (tmp_path / "bomb.zip").write_bytes(BAD["zip bomb"][0]())
    page.goto(served)
    page.wait_for_selector("select[name=model] option", state="attached")
    page.fill("input[name=n]", "2")
    assert page.locator("#going").is_hidden()
    page.set_input_files("#drop input", sorted(tmp_path.iterdir()))
    page.wait_for_function("document.querySelectorAll('article').length == 8 && !document.querySelector('.state') && [...document.images].every(image => image.complete)")
    assert page.locator("#count").text_content() == "8 of 8" and page.locator("#going").is_hidden()
    errors = {article.locator(".name").inner_text(): article.locator(".error").inner_text() for article in page.locator("article:has(.error)").all()}
    assert set(errors) == {"text.jpg", "empty.png", "long.png", "fifty.jpg", "bomb.zip"}
    assert "at most 40 megapixels" in errors["fifty.jpg"] and "not a picture" in errors["bomb.zip"]
    assert "empty file" in errors["empty.png"] and "not a picture" in errors["text.jpg"] and "at most 2" in errors["long.png"]
    good = page.locator("article:has(.caption)")
    assert good.count() == 3 and good.first.locator(".caption").count() == 2
    lit = "canvas => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.some(x => x)"
    canvas = good.first.locator("canvas")
    assert not canvas.evaluate(lit)
    good.first.locator(".word").first.hover()
    assert canvas.evaluate(lit)                                                                     # the word's map lies over the picture
    page.mouse.move(0, 0)
    assert not canvas.evaluate(lit)


def test_settings_of_the_page_reach_the_model_and_a_phone_can_use_it(browser, served, tmp_path):
    page = browser.new_page(viewport={"width": 400, "height": 800})
    Image.fromarray(record("test", 5).picture()).save(tmp_path / "one.png")
    page.goto(served)
    page.select_option("select[name=search]", "temperature")
    page.fill("input[name=temperature]", "2")
    with page.expect_request(re.compile("temperature=2.*seed=")): page.set_input_files("#drop input", tmp_path / "one.png")
    page.wait_for_selector(".caption")
    page.fill("input[name=temperature]", "-3")
    page.set_input_files("#drop input", tmp_path / "one.png")
    page.wait_for_selector(".error")
    assert "temperature" in page.locator(".error").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    page.close()


def test_an_exported_model_answers_and_what_it_fixed_is_locked(page, served, tmp_path):
    Image.fromarray(record("test", 5).picture()).save(tmp_path / "one.png")
    page.goto(served)
    page.wait_for_selector("select[name=model] option", state="attached")
    assert page.locator("#fixed").is_hidden() and page.locator("input[name=beam]").is_enabled()
    page.select_option("select[name=model]", "exported")
    assert page.locator("#fixed").is_visible() and page.locator("input[name=beam]").is_disabled() and page.locator("select[name=search]").is_disabled()
    page.fill("input[name=n]", "2")
    page.set_input_files("#drop input", tmp_path / "one.png")
    page.wait_for_selector(".caption >> nth=1")
    assert page.locator(".score").count() == 2 and page.locator(".error").count() == 0


def test_a_picture_dropped_by_hand_and_a_server_that_is_gone(page, tmp_path):
    pytest.importorskip("starlette", reason="serve needs the extra serve")
    from expnet.cli.serve import Desk, application, running
    file = io.BytesIO()
    Image.fromarray(record("test", 5).picture()).save(file, "PNG")
    drop = """data => {
        const files = new DataTransfer();
        files.items.add(new File([new Uint8Array(data)], "one.png"));
        document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: files, bubbles: true, cancelable: true }));
    }"""
    with running(application(Desk({"tiny": tiny()}))) as address:
        page.goto(address)
        page.wait_for_selector("select[name=model] option", state="attached")
        page.evaluate(drop, list(file.getvalue()))
        page.wait_for_selector(".caption")
    page.evaluate(drop, list(file.getvalue()))
    page.wait_for_selector(".error")
    assert "is the server still running" in page.locator(".error").inner_text()
