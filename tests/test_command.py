"""The `expnet` command in processes of its own: one's own captions, bad files, one-line errors."""
import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from expnet.data.shapes import record


def expnet(*words, cwd: Path, ok: bool = True) -> subprocess.CompletedProcess:
    """Run the command as a shell would; with `ok`, fail the test if it fails."""
    done = subprocess.run([sys.executable, "-c", "from expnet.cli.app import main; main()", *map(str, words)], cwd=cwd, capture_output=True, text=True)
    assert not ok or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Thirty drawn pictures and a CSV of their captions, as somebody might bring them; one file is broken."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "photos").mkdir()
    with open(folder / "captions.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        for r in (record("train", i) for i in range(30)):
            Image.fromarray(r.picture()).save(folder / "photos" / f"{r.id}.png")
            rows.writerows([f"{r.id}.png", text] for text in r.captions)
    (folder / "photos" / "train_000007.png").write_bytes(b"\x89PNG broken off")
    return folder


def test_own_captions_to_captions_of_files(folder):
    said = expnet("prepare", "data", "captions.csv", "--images", "photos", "--val", "0.2", "--test", "0.2", "--min-count", "2", cwd=folder).stdout
    assert "train: 18 pictures, 90 captions" in said and "test: 6 pictures" in said
    said = expnet("features", "data", "--backbone", "shapes", "--device", "cpu", cwd=folder).stdout
    assert "29 written" in said and "1 bad" in said
    said = expnet("train", "data", "--out", "model", "--recipe", "tiny", "--phases", "xe", "--epochs", "1", "--batch-size", "6", "--device", "cpu", cwd=folder).stdout
    assert "1 pictures have no features and are left out" in said
    said = expnet("evaluate", "model", "data", "--device", "cpu", "--out", "scores", cwd=folder).stdout
    assert "CIDEr-D" in said
    results = json.loads((folder / "scores" / "captions.json").read_text())
    assert set(results[0]) == {"image_id", "caption"} and len(results) in (5, 6)
    done = expnet("caption", "model", "photos", "--json", "--n-best", "2", "--gallery", "gallery.png", "--device", "cpu", cwd=folder)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 29 and all(len(line["captions"]) == 2 for line in lines)
    assert done.stderr.count("\n") == 1 and "train_000007.png" in done.stderr      # named, counted, not captioned
    assert Image.open(folder / "gallery.png").width > 500


@pytest.mark.parametrize("words, expected", [
    (["caption", "no-model", "photos"], "no-model: no such model folder"),
    (["train", "no-data", "--out", "m"], "no-data: no such data folder"),
    (["prepare", "new", "missing.csv"], "missing.csv"),
    (["features", "nothing-here", "--backbone", "shapes"], "nothing-here"),
])
def test_a_mistake_is_one_line_that_names_it(folder, words, expected):
    done = expnet(*words, cwd=folder, ok=False)
    assert done.returncode == 2
    assert done.stderr.startswith("expnet: ") and done.stderr.count("\n") == 1 and expected in done.stderr


def test_help_lists_the_commands_in_their_order(folder):
    shown = expnet("--help", cwd=folder).stdout
    places = [shown.index(f" {name} ") for name in ("prepare", "features", "train", "evaluate", "caption", "quickstart")]
    assert places == sorted(places)
