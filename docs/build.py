"""Make the site: `python docs/build.py [FOLDER]` stages README, chapters and API pages, and Sphinx renders them to FOLDER/html.

Chapters are staged as a reader wants them: hidden cells and directive lines are gone, outputs are those that are committed."""
import base64
import json
import re
import shutil
import sys
from pathlib import Path

from sphinx.cmd.build import build_main

ROOT = Path(__file__).resolve().parents[1]
PARTS = {"": "First steps", "data": "Data", "models": "Models", "decode": "Decoding", "score": "Scores", "train": "Training",
         "classics": "Classics", "phases": "Phases", "deploy": "Use"}           # folders of nbs, in reading order
UNUSED = ["mathjax/[!iot]*", "mathjax/input/*.js", "mathjax/input/mml", "mathjax/output/*.js", "mathjax/output/svg", "mathjax/tex-*-*.js",
          "mathjax/tex-svg.js", "locales"]                  # below _static: a formula needs tex-chtml.js, its extensions and fonts
PAGES = ["CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"]                          # beside the README, which is the first page


def write(path: Path, text: str) -> None:
    """Write `text` to `path` unless it is there already: Sphinx renders again only what has changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text: path.write_text(text, encoding="utf-8")


def chapters() -> list[Path]:
    """All notebooks, relative to the repository, in reading order: index first, then part by part."""
    found = [p.relative_to(ROOT) for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    return sorted(found, key=lambda p: (p.stem != "index", list(PARTS).index(part(p)), p.stem))


def part(path: Path) -> str:
    """The name of the folder that a chapter is in; "" at the top."""
    return "/".join(path.parts[1:-1])


def source(cell: dict) -> str:
    return "".join(cell["source"])


def module_of(notebook: dict) -> str:
    """The module that a notebook exports, such as expnet.data.shapes, or ""."""
    names = [m[1] for c in notebook["cells"] if (m := re.match(r"#\| *default_exp (\S+)", source(c)))]
    return f"expnet.{names[0]}" if names else ""


def readable(cell: dict) -> dict | None:
    """A cell without its directive lines, tagged `exported` if it goes into the package; None if it is hidden or empty."""
    directives = re.findall(r"^#\| *(\w+)", source(cell), re.M) if cell["cell_type"] == "code" else []
    text = re.sub(r"^#\|.*\n?", "", source(cell), flags=re.M) if directives else source(cell)
    if "hide" in directives or not text.strip(): return None
    tags = ["exported"] if {"export", "exports"} & set(directives) else []
    return {**cell, "source": text, "metadata": {**cell["metadata"], "tags": tags}}


def heading(path: Path) -> tuple[str, str]:
    """Title and gain of a chapter, from its first cell."""
    lines = source(json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"][0]).splitlines()
    return lines[0].lstrip("# "), next((line[2:] for line in lines if line.startswith("> ")), "")


def stage_chapter(path: Path, out: Path) -> str:
    """Write the readable form of a chapter below `out`; its module's name."""
    notebook = json.loads((ROOT / path).read_text(encoding="utf-8"))
    module, up = module_of(notebook), "../" * (len(path.parts) - 1)
    notebook["cells"] = [c for cell in notebook["cells"] if (c := readable(cell))]
    if module:
        link = f"All names of this chapter: [{module}]({up}api/{room(module)}.md#{anchor(module)})."
        notebook["cells"].append({"cell_type": "markdown", "id": "api-link", "metadata": {}, "source": link})
    write(out / path, json.dumps(notebook, ensure_ascii=False))
    return module


def room(module: str) -> str:
    """The page on which a module stands: its folder, or "basics"."""
    return module.split(".")[1] if module.count(".") > 1 else "basics"


def anchor(module: str) -> str:
    return module.replace(".", "").lower()


def stage_room(name: str, modules: dict[str, Path], out: Path) -> None:
    """Write the API page of the modules (name -> chapter) in one folder of the package."""
    parts = [f"## {module}\n\nExplained in the chapter [{heading(path)[0]}](../{path.as_posix()}).\n\n```{{eval-rst}}\n.. automodule:: {module}\n"
             "   :members:\n   :member-order: bysource\n```\n" for module, path in modules.items()]
    write(out / "api" / f"{name}.md", f"# expnet.{name}\n\n".replace("expnet.basics", "expnet") + "\n".join(parts))


def contents(names: list[str], options: str = ":hidden:\n") -> str:
    """A table of contents."""
    return "\n".join(["\n```{toctree}\n" + options, *names, "```\n"])


def stage_part(folder: str, pages: list[Path], out: Path) -> str:
    """Write the page of a part: its chapters, and what each is good for. The page's name."""
    rows = [f"| [{title}](../{path.as_posix()}) | {gain} |" for path in pages for title, gain in [heading(path)]]
    name = f"parts/{folder or 'first'}"
    text = f"# {PARTS[folder]}\n\n| chapter | what is gained |\n|---|---|\n" + "\n".join(rows) + "\n"
    write(out / f"{name}.md", text + contents([f"/{p.with_suffix('').as_posix()}" for p in pages]))
    return name


def stage_map(out: Path) -> str:
    """Write the map of the book, an output of its first chapter, to `out`; the lines that show it."""
    cells = json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))["cells"]
    picture = next(o["data"]["image/png"] for c in cells if c.get("id") == "map" for o in c["outputs"] if "image/png" in o.get("data", {}))
    (out / "map.png").write_bytes(base64.b64decode(picture))
    return "\n## A map of the book\n\n![The parts of the book and what builds on what](map.png)\n"


def stage(out: Path) -> None:
    """Write everything that Sphinx reads to `out`, and remove what an earlier stage left there."""
    pages = chapters()
    modules = {module: path for path in pages if (module := stage_chapter(path, out))}
    rooms = list(dict.fromkeys(map(room, modules)))
    for name in rooms: stage_room(name, {m: path for m, path in modules.items() if room(m) == name}, out)
    write(out / "api/index.md", "# All names\n\nThe package, room by room, from its docstrings.\n" + contents(rooms, ":maxdepth: 2\n"))
    shutil.copytree(ROOT / "nbs/images", out / "nbs/images", dirs_exist_ok=True)
    for name in PAGES: write(out / name, (ROOT / name).read_text(encoding="utf-8"))
    parts = [stage_part(folder, inside, out) for folder in PARTS if (inside := [p for p in pages if part(p) == folder])]
    toc = contents(parts, ":hidden:\n:caption: The book\n")
    toc += contents(["api/index", *(Path(p).stem for p in PAGES if p.endswith(".md"))], ":hidden:\n:caption: Reference\n")
    write(out / "index.md", (ROOT / "README.md").read_text(encoding="utf-8") + stage_map(out) + toc)
    for old in out.rglob("*.ipynb"):
        if old.relative_to(out) not in pages: old.unlink()


def forget(html: Path) -> None:
    """Remove the pages of chapters that were renamed or are gone; Sphinx leaves them."""
    known = {path.with_suffix(".html") for path in chapters()}
    for page in (html / "nbs").rglob("*.html"):
        if page.relative_to(html) not in known: page.unlink()


def prune(html: Path) -> None:
    """Remove what no reader misses: most of MathJax, translations, source maps, pictures and icons of no page, marks around code without a colour."""
    for path in [p for pattern in UNUSED for p in (html / "_static").glob(pattern)] + list(html.rglob("*.map")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = ""
    for page in html.rglob("*.html"):
        plain = re.sub(r'<span class="[npw]">([^<]*)</span>', r"\1", page.read_text(encoding="utf-8"))
        write(page, plain)
        text += plain
    for picture in (html / "_images").iterdir():
        if picture.name not in text: picture.unlink()
    scripts = html / "_static/scripts"
    text += "".join(p.read_text(encoding="utf-8") for p in scripts.glob("*.js") if p.name != "fontawesome.js")
    write(scripts / "fontawesome.js", without_icons((scripts / "fontawesome.js").read_text(encoding="utf-8"), set(re.findall(r"fa-([a-z0-9-]+)", text))))


def without_icons(script: str, used: set[str]) -> str:
    """Font Awesome's script without the icons, nearly all of it, whose name and second names are not in `used`."""
    icon = r'"?([\w-]+)"?:\[\d+,\d+,\[([^\]]*)\],"\w+",(?:"[^"]*"|\[[^\]]*\])\],?'
    return re.sub(icon, lambda m: m[0] if used & {m[1], *re.findall(r'"([\w-]+)"', m[2])} else "", script)


def main(folder: Path) -> int:
    """Stage, render, forget, prune; Sphinx's exit code, which is not 0 after a warning."""
    stage(folder / "source")
    code = build_main(["-q", "-W", "--keep-going", "-c", str(ROOT / "docs"), "-d", str(folder / "doctrees"), str(folder / "source"), str(folder / "html")])
    forget(folder / "html")
    prune(folder / "html")
    return code


if __name__ == "__main__": sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "_docs").resolve()))
