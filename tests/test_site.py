"""The site: rendered without a warning, every link, anchor and picture there, small enough to carry around."""
import json
import re
import runpy
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("sphinx_book_theme", reason="the site needs the extra docs")
ROOT = Path(__file__).parents[1]
NOTEBOOKS = [p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]


class Page(HTMLParser):
    """What a page offers (ids) and what it asks for (targets)."""
    def __init__(self, path: Path):
        super().__init__()
        self.ids, self.targets = set(), set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        for key, value in attributes:
            if key in ("id", "name") and value: self.ids.add(value)
            if key in ("href", "src") and value: self.targets.add(value)


def test_every_chapter_and_module_has_a_page(site):
    missing = [p.stem for p in NOTEBOOKS if not (site / p.relative_to(ROOT).with_suffix(".html")).exists()]
    assert not missing
    api = "".join(p.read_text(encoding="utf-8") for p in (site / "api").glob("*.html"))
    modules = [m[1] for p in NOTEBOOKS if (m := re.search(r"#\| default_exp ([\w.]+)", p.read_text(encoding="utf-8")))]
    assert len(modules) > 30 and [m for m in modules if f'id="expnet.{m}.' not in api] == []


def test_the_page_of_a_renamed_chapter_goes(tmp_path):
    known = NOTEBOOKS[0].relative_to(ROOT).with_suffix(".html")
    for page in (known, Path("nbs/data/99_gone.html"), Path("index.html")):
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / page).write_text("<p>a page</p>", encoding="utf-8")
    runpy.run_path(str(ROOT / "docs/build.py"))["forget"](tmp_path)
    assert {p.relative_to(tmp_path) for p in tmp_path.rglob("*.html")} == {known, Path("index.html")}


def test_links_anchors_and_pictures_are_there(site):
    pages = {p: Page(p) for p in site.rglob("*.html") if "_static" not in p.parts}
    broken = []
    for path, page in pages.items():
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc: continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not file.exists() or file in pages and parts.fragment and unquote(parts.fragment) not in pages[file].ids:
                broken.append(f"{path.relative_to(site)}: {target}")
    assert not broken
    assert sum(len(p.targets) for p in pages.values()) > 1000


def test_readers_see_no_machinery(site):
    shown = [p for p in (site / "nbs").rglob("*.html") if re.search(r">#\| ?(hide|exports?|default_exp)", p.read_text(encoding="utf-8"))]
    assert not shown
    hidden = [m for p in NOTEBOOKS for c in json.loads(p.read_text(encoding="utf-8"))["cells"] if "".join(c["source"]).startswith("#| hide\nfrom matplotlib_inline") for m in [p]]
    assert hidden and "set_matplotlib_formats" not in (site / hidden[0].relative_to(ROOT).with_suffix(".html")).read_text(encoding="utf-8")


def test_solutions_are_folded_away_and_rendered(site):
    """A hidden part keeps its summary, and what is in it is text, lists and code, not Markdown's signs."""
    found = 0
    for path in NOTEBOOKS:
        page = (site / path.relative_to(ROOT).with_suffix(".html")).read_text(encoding="utf-8")
        texts = ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown"]
        inside = re.findall(r"<details><summary>(.*?)</summary>(.*?)</details>", page, re.S)
        assert sum(text.count("<details>") for text in texts) == len(inside), path.stem
        assert all(title.strip() and re.search(r"<(p|ol|ul|div)\b", part) and "```" not in part and "**" not in re.sub(r"(?s)<(pre|code).*?</\1>", "", part) for title, part in inside), path.stem
        found += len(inside)
    assert found


def test_the_first_page_is_the_readme(site):
    page, readme = (site / "index.html").read_text(encoding="utf-8"), (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line for line in readme.splitlines() if line.startswith("|") and re.search(r"\d\.\d{3}", line)]
    assert rows and all(number in page for row in rows for number in re.findall(r"\d\.\d{3}", row))
    assert "quickstart.png" in page


def test_nothing_is_fetched_and_all_is_small(site):
    """Offline means offline: no script, style or picture comes from elsewhere; the formulas' fonts are here."""
    for path in site.rglob("*.html"):
        assert not re.search(r'<(script|img|link rel="stylesheet")[^>]*(src|href)="https?:', path.read_text(encoding="utf-8")), path
    assert list(site.rglob("MathJax_Main-Regular.woff"))
    assert sum(f.stat().st_size for f in site.rglob("*") if f.is_file()) < 15e6
