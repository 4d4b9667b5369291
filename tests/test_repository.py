"""The repository keeps its own rules: clean notebooks, a package that equals them, chapters that are chapters."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MODULES = sorted(p for p in (ROOT / "expnet").rglob("*.py") if p.name not in ("_modidx.py", "__init__.py"))


def cells(path: Path, kind: str) -> list[str]:
    """The sources of the cells of one kind in a notebook."""
    return ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


def test_notebooks_are_clean_and_the_package_is_in_sync(tmp_path):
    copy = tmp_path / "repository"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "_docs", "scratch", "__pycache__", "*.egg-info", ".*cache", ".hypothesis"))
    bin = Path(sys.executable).parent
    for command in ("nbdev-clean", "nbdev-export"):
        subprocess.run([bin / command], cwd=copy, check=True, capture_output=True, env={**os.environ, "PATH": f"{bin}:{os.environ['PATH']}"})
    files = [p.relative_to(copy) for folder in ("nbs", "expnet") for p in (copy / folder).rglob("*") if p.suffix in (".ipynb", ".py")]
    assert len(files) > 20
    changed = [str(f) for f in files if not (ROOT / f).exists() or (ROOT / f).read_bytes() != (copy / f).read_bytes()]
    assert not changed, "run `make run` and commit: " + ", ".join(changed)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_chapter_is_a_chapter(path):
    text, code = cells(path, "markdown"), cells(path, "code")
    assert re.match(r"# .+\n\n> .+", text[0]), "begins with a title and one sentence that says what is gained"
    assert sum(len(t.split()) for t in text) >= 200, "a chapter needs sentences"
    assert "## What we have now" in text[-1] or path.stem == "index"
    assert all(len(c.splitlines()) <= 45 for c in code), "a cell fits on a screen"
    assert not any("expect_fail(lambda" in c for c in code), "expect_fail is a context manager: that call checks nothing"
    assert not any(re.search(r"^\s*from \S+ import \*", c, re.M) for c in code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_links_between_chapters_lead_somewhere(path):
    targets = [t for text in cells(path, "markdown") for t in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in t]
    assert [t for t in targets if not (path.parent / t).exists()] == []


def test_the_readme_is_filled_in_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)\)", text)
    assert "@@" not in text
    assert targets and [t for t in targets if "://" not in t and not (ROOT / t).exists()] == []


ROOMS = ["tools", "data", "models", "decode", "score", "train", "classics", "deploy", "cli"]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_rooms_below_it(path):
    own = path.relative_to(ROOT / "expnet").with_suffix("").parts
    package = ["expnet", *own[:-1]]
    for node in (n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.ImportFrom)):
        base = package[:len(package) - node.level + 1] if node.level else []
        target = [*base, *(node.module or "").split(".")]
        if target[0] != "expnet" or len(target) < 2 or target[1] not in ROOMS: continue
        assert ROOMS.index(target[1]) <= ROOMS.index(own[0]), f"{'.'.join(own)} imports {'.'.join(target)}"


def test_modules_need_no_notebook_package():
    for path in MODULES:
        used = {n.module.split(".")[0] for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.ImportFrom) and n.module and not n.level}
        assert not used & {"fastcore", "nbdev", "IPython", "execnb"}, path.name


def test_a_fresh_process_imports_every_module():
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in MODULES]
    code = "import sys; sys.modules['IPython'] = sys.modules['fastcore'] = None\n" + "\n".join(f"import {n}" for n in names)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
