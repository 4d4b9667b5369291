"""The repository keeps its own rules: clean notebooks, a package that equals them, chapters that are chapters."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
from base64 import b64decode
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
def test_a_chapter_imports_what_it_uses(path):
    lines = "\n".join(cells(path, "code")).splitlines()
    tree = ast.parse("\n".join("" if line.startswith(("!", "%")) else line for line in lines))
    imports = [alias for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names]
    words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    quoted = " ".join(node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    names = {(alias.asname or alias.name).split(".")[0] for alias in imports} - words - set(re.findall(r"\w+", quoted))
    assert not names, "imported for nothing: " + ", ".join(sorted(names))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_pictures_are_small(path):
    outputs = [o.get("data", {}) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] for o in c.get("outputs", [])]
    sizes = [len(b64decode("".join(data["image/png"]))) for data in outputs if "image/png" in data]
    assert max(sizes, default=0) < 40_960, "a picture of the book is below 40 KB"


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

# --- what can be counted -----------------------------------------------------------------------------------------------

SHORT = {"hard_attention": "one idea: a choice instead of a mean", "satic_checkpoint": "a reader of one file's layout", "packed": "one idea: four layers in one", "word_vectors": "a reader of files",
         "dropout": "one idea: eight decisions from one number", "losses": "one loss, by hand and in closed form", "own_words": "a measurement, not a part",
         "index": "the first page", "notation": "a page of tables"}
LONG = {"plot": "every picture helper, each with one shown example", "images": "every kind of picture file and every way it can be broken",
        "batches": "order, sharding and resuming are one promise", "backbone": "five families of backbones behind one function", "static_expansion": "the model's own idea, by hand, then looked into",
        "dynamic_expansion": "the model's own idea, by hand, then looked into", "expansionnet": "the whole model, with its pictures", "windows": "attention in windows, shifted, with its table of places",
        "search": "greedy, beam, diverse and published search in one loop", "reward": "three rewards and their vectors",
        "self_critical": "estimator, baselines and the published coupling, compared", "show_attend_tell": "the first attention, and what became of it",
        "actor_critic": "actor, critic and their three phases", "semi_autoregressive": "from one word a step to many, with its teacher"}


def name_of(path: Path) -> str:
    """A chapter's name without its running number."""
    return re.sub(r"^\d+_", "", path.stem)


def size_of(path: Path) -> tuple[int, int]:
    """Shown code cells and words of a chapter; solutions are not the chapter."""
    texts = (re.sub(r"<details>.*?</details>", "", text, flags=re.S) for text in cells(path, "markdown"))
    return sum(not re.search(r"^#\| *hide", c, re.M) for c in cells(path, "code")), sum(len(text.split()) for text in texts)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_chapter_is_one_evening_not_three(path):
    (shown, words), name = size_of(path), name_of(path)
    short = name in SHORT or name.endswith("command") or path.parent.name == "phases"            # phases and commands use what other chapters explain
    assert shown <= (42 if name in LONG else 30) and words <= (2000 if name in LONG else 1200), f"{shown} cells, {words} words: split it"
    assert short or shown >= 12 and words >= 300, f"{shown} cells, {words} words: too little for a chapter"


def test_no_exception_is_kept_for_nothing():
    sizes = {name_of(path): size_of(path) for path in NOTEBOOKS if path.parent.name != "phases"}
    assert {name for name in LONG if sizes[name][0] <= 30 and sizes[name][1] <= 1200} == set()
    assert {name for name in SHORT if sizes[name][0] >= 12 and sizes[name][1] >= 300} == set()


def functions(path: Path) -> list:
    """All function definitions in a module, methods included."""
    return [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


OPTIONS = {"expnet/cli/evaluate.py": "evaluate"}                                                     # a command's options are its signature


def test_functions_are_short():
    lines = {(str(p.relative_to(ROOT)), f.name): f.end_lineno - f.lineno + 1 for p in MODULES for f in functions(p)}
    long = {place: n for place, n in lines.items() if n > 25 and OPTIONS.get(place[0]) != place[1]}
    assert not long
    assert sorted(lines.values())[len(lines) // 2] <= 7


def test_nothing_is_defined_twice():
    bodies = {}
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
        assert len(names) == len(set(names)), path
        for f in functions(path):
            body = [n for n in f.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
            if len(body) >= 3: bodies.setdefault(ast.dump(ast.Module(body, [])), []).append(f"{path.relative_to(ROOT)}: {f.name}")
    assert [places for places in bodies.values() if len(places) > 1] == []


def test_comments_are_few_and_never_none():
    comments, code = {}, {}
    for path in MODULES:
        with open(path, "rb") as file: tokens = list(tokenize.tokenize(file.readline))
        comments[path] = sum(t.type == tokenize.COMMENT and not t.string.startswith(("# %%", "# AUTOGENERATED")) for t in tokens)
        code[path] = len({t.start[0] for t in tokens if t.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER)})
    assert 0.08 < sum(comments.values()) / sum(code.values()) < 0.12                                 # most is said in the chapters
    assert [str(p) for p in MODULES if comments[p] > 0.35 * max(code[p], 10)] == []


UNTOLD = {"root", "forward", "connect"}                    # a docstring would become the command's help; the class says it; reconnects, see its comment


def test_what_is_public_is_documented_with_shapes():
    untold, tensors, shapes = [], 0, 0
    for path in MODULES:
        top = ast.parse(path.read_text(encoding="utf-8")).body
        for n in [*top, *(m for c in top if isinstance(c, ast.ClassDef) for m in c.body)]:
            if not isinstance(n, (ast.FunctionDef, ast.ClassDef)) or n.name.startswith("_"): continue
            text, size = ast.get_docstring(n) or "", n.end_lineno - n.lineno
            if not text and size > 4 and n.name not in UNTOLD: untold.append(f"{path.relative_to(ROOT)}: {n.name}")
            if text and isinstance(n, ast.FunctionDef) and "Tensor" in ast.unparse(n.args) and path.parent.name in ("models", "decode", "train", "classics"):
                tensors, shapes = tensors + 1, shapes + bool(re.search(r"\[[\w·, /]+\]|scalar|tensors?\b", text))
    assert not untold
    assert shapes / tensors > 0.75, f"{shapes} of {tensors} functions that take tensors say their shapes"
