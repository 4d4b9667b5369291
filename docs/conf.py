"""Sphinx configuration of the site; docs/build.py writes the pages that it reads."""
import inspect
import re
import sys
from pathlib import Path
from typing import get_type_hints

from sphinx.util.inspect import stringify_signature

sys.path.insert(0, str(Path(__file__).parents[1]))
import expnet

project, author, release = "expnet", "The expnet authors", expnet.__version__
copyright = "2026, the expnet authors"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx-mathjax-offline"]
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
toc_object_entries = False
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
autodoc_mock_imports = ["tensorrt"]
python_use_unqualified_type_names = True
maximum_signature_line_length = 90
html_theme = "sphinx_book_theme"
html_title = "expnet"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = html_domain_indices = False
html_theme_options = {"show_toc_level": 2, "show_navbar_depth": 1, "max_navbar_depth": 2, "collapse_navbar": True, "use_download_button": False, "use_fullscreen_button": False}


def as_plain(app, what, name, obj, options, lines):
    """Docstrings are plain text with `code`: paragraphs stay, and nothing in them is taken for markup."""
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines))
    pieces = [re.split(r"`+([^`]+)`+", " ".join(p.split())) for p in paragraphs]
    escaped = [["".join(f"``{s}``\\ " if i % 2 else re.sub(r"([\\*|_`<>])", r"\\\1", s) for i, s in enumerate(piece))] for piece in pieces]
    lines[:] = [line for paragraph in escaped for line in (*paragraph, "")]


def without_annotated(app, what, name, obj, options, signature, returns):
    """The signature of a command shows types; what its options mean is said by --help."""
    if not name.startswith("expnet.cli") or not inspect.isfunction(obj): return None
    hints, plain = get_type_hints(obj), inspect.signature(obj)
    parameters = [p.replace(annotation=hints.get(p.name, p.empty)) for p in plain.parameters.values()]
    return stringify_signature(plain.replace(parameters=parameters, return_annotation=plain.empty), unqualified_typehints=True), ""


def without_fields(app, what, name, obj, skip, options):
    """The fields of a named tuple stand in its signature already; Python's own words about them say nothing."""
    return True if re.match(r"Alias for field number \d+$", getattr(obj, "__doc__", None) or "") else None


def setup(app):
    app.connect("autodoc-process-docstring", as_plain)
    app.connect("autodoc-process-signature", without_annotated)
    app.connect("autodoc-skip-member", without_fields)
