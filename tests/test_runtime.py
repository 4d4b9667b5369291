"""The runtime without torch says what torch says, and a bad input is a sentence."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from exported import HOW, LONGEST, artefact, captioner, scenes
from PIL import Image

from expnet.cli.export import make_artefact
from expnet.decode.caption import caption
from expnet.decode.search import Beam
from expnet.deploy.runtime import Runtime
from expnet.tools import UserError

BARE = """
import importlib.abc, runpy, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top not in sys.stdlib_module_names and top not in ("numpy", "PIL", "onnxruntime", "expnet", "__main__", "_distutils_hack", "google", "flatbuffers", "defusedxml"):
            raise ImportError(f"{name} is not on this computer")
sys.meta_path.insert(0, Refuse())
sys.path = [p for p in sys.path if p and p != sys.argv[1]]
sys.argv = sys.argv[2:]
sys.path.insert(0, sys.argv[0])
import expnet
assert expnet.__file__.startswith(sys.argv[0])                # not an installed one
runpy.run_path(sys.argv[0], run_name="__main__")
"""
ROOT = str(Path(__file__).parents[1])


def program(folder, *words, cwd="/"):
    """The artefact's own program in a process that has numpy, Pillow and ONNX Runtime only."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([sys.executable, "-c", BARE, ROOT, folder / "caption.pyz", *map(str, words)], env=env, cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Six pictures of every kind, and four files that are none."""
    folder, pictures = tmp_path_factory.mktemp("photos"), scenes(6)
    pictures[0].save(folder / "a.png")
    pictures[1].resize((300, 200)).save(folder / "b.jpg")
    pictures[2].convert("L").save(folder / "c.png")
    clear = pictures[3].copy()
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(folder / "d.png")
    Image.fromarray(np.asarray(pictures[4].convert("L")).astype(np.uint16) * 257).save(folder / "e.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures[5].save(folder / "f.jpg", exif=exif)
    (folder / "bad").mkdir()
    (folder / "bad" / "half.jpg").write_bytes((folder / "b.jpg").read_bytes()[:2000])
    (folder / "bad" / "page.jpg").write_text("<html>404</html>")
    (folder / "bad" / "empty.png").touch()
    (folder / "bad" / "zeros.png").write_bytes(bytes(5000))
    return folder


def test_a_beam_of_groups_starts_in_every_group(photos, tmp_path):
    how = Beam(4, n_best=4, groups=2, diversity=0.5)
    make_artefact(captioner(), tmp_path / "groups", how, LONGEST, one_call=True)
    theirs = caption(captioner(), photos, how, max_len=LONGEST)
    for route in ("two graphs", "one call"):
        ours = Runtime(tmp_path / "groups", route, threads=1).caption(photos)
        assert [c.captions for c in ours] == [c.captions for c in theirs]


@pytest.mark.parametrize("route", ["two graphs", "one call"])
@pytest.mark.parametrize("batch", [1, 3, 6])
def test_it_says_what_torch_says_word_for_word(photos, route, batch):
    ours = Runtime(artefact(), route, threads=1).caption(photos, batch)
    theirs = captioner().caption(photos, beam=HOW.size, n_best=HOW.n_best, max_len=LONGEST)
    assert len(ours) == 6 and [c.captions for c in ours] == [c.captions for c in theirs]
    assert len({c.captions for c in ours}) > 3                                # the pictures are told apart, so the test can fail
    np.testing.assert_allclose([c.scores for c in ours], [c.scores for c in theirs], atol=1e-4)
    for one, other in zip(ours, theirs):
        for words, wanted in zip(one.words, other.words):
            assert [w for w, _ in words] == [w for w, _ in wanted]
            np.testing.assert_allclose([p for _, p in words], [p for _, p in wanted], atol=1e-4)


def test_files_pictures_and_arrays_are_the_same_to_it(photos):
    runtime, picture = Runtime(artefact(), threads=1), Image.open(photos / "a.png")
    said = [runtime.caption(form)[0].captions for form in (photos / "a.png", str(photos / "a.png"), picture, np.asarray(picture), np.asarray(picture) / 255)]
    assert said == said[:1] * 5


def test_a_lone_file_works_and_one_that_is_half_a_model_says_so(photos, tmp_path):
    shutil.copy(artefact() / "caption.onnx", tmp_path / "mine.onnx")
    with pytest.raises(UserError, match="captions need"): Runtime(tmp_path / "mine.onnx")      # the name says what it is
    shutil.copy(artefact() / "caption.onnx", tmp_path)
    assert Runtime(tmp_path / "caption.onnx").caption(photos / "a.png") == Runtime(artefact(), "one call").caption(photos / "a.png")
    with pytest.raises(UserError, match="encoder.onnx: captions need encoder.onnx with beam_step.onnx or caption.onnx"): Runtime(artefact() / "encoder.onnx")


def test_its_program_needs_three_libraries_and_names_bad_files(photos):
    wanted = {c.name: c.captions[0] for c in captioner().caption(photos, beam=HOW.size, max_len=LONGEST)}
    done = program(artefact(), photos, photos / "bad")
    assert done.returncode == 0 and dict(line.split("\t") for line in done.stdout.splitlines()) == wanted
    assert [Path(line.split(": ")[1]).name for line in done.stderr.splitlines()] == ["empty.png", "half.jpg", "page.jpg", "zeros.png"]
    assert all(line.startswith("caption: ") for line in done.stderr.splitlines())
    assert program(artefact(), "--verify").stdout.count("token for token") == 2


@pytest.mark.parametrize("words, said", [(["none.jpg"], "none of the files could be captioned"), (["no*.jpg"], "no such file, folder or pattern"),
                                         (["bad"], "none of the files could be captioned")])
def test_its_program_ends_with_a_sentence_and_a_code(photos, words, said):
    done = program(artefact(), *words, cwd=photos)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_a_graph_that_is_missing_broken_or_another_is_a_sentence(tmp_path):
    copy = shutil.copytree(artefact(), tmp_path / "copy")
    (copy / "beam_step.onnx").write_bytes((artefact() / "beam_step.onnx").read_bytes()[:5000])
    with pytest.raises(UserError, match="beam_step.onnx: ONNX Runtime cannot read it"): Runtime(copy)
    (copy / "beam_step.onnx").write_text("no graph")
    with pytest.raises(UserError, match="beam_step.onnx: ONNX Runtime cannot read it"): Runtime(copy)
    (copy / "beam_step.onnx").unlink()
    with pytest.raises(UserError, match="beam_step.onnx: no such file"): Runtime(copy)


def test_without_onnx_runtime_one_line_says_what_to_install():
    code = "import sys; sys.modules['onnxruntime'] = None; from expnet.deploy.runtime import main; main(['a.png'], sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, artefact()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "caption: ONNX Runtime is not installed: pip install onnxruntime\n"


def test_the_modules_of_the_runtime_import_no_torch():
    code = "import sys; sys.modules['torch'] = None; import expnet.deploy.runtime, expnet.deploy.tensorrt; print('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "False\n"
