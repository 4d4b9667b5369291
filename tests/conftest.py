"""What several test files share."""
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def site() -> Path:
    """The rendered site, in the folder that `make docs` writes: what has not changed is not rendered again."""
    pytest.importorskip("sphinx_book_theme", reason="the site needs the extra docs")
    done = subprocess.run([sys.executable, ROOT / "docs/build.py", ROOT / "_docs"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / "_docs/html"
