"""The `expnet` command in processes of its own: one's own captions, bad files, one-line errors."""
import csv
import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import onnx
import pytest
import torch
from PIL import Image

from expnet.classics.show_tell import ShowTell, ShowTellConfig
from expnet.cli.export import calibration_pictures
from expnet.data.vocabulary import Vocab
from expnet.data.shapes import record
from expnet.deploy.tensorrt import cannot_try
from expnet.models.backbone import make_backbone
from expnet.models.expansionnet import ExpansionNet, ExpansionNetConfig
from expnet.tools import seed_all
from expnet.train.checkpoints import save_model


def expnet(*words, cwd: Path, ok: bool = True) -> subprocess.CompletedProcess:
    """Run the command as a shell would; with `ok`, fail the test if it fails."""
    done = subprocess.run([sys.executable, "-c", "from expnet.cli.app import main; main()", *map(str, words)], cwd=cwd, capture_output=True, text=True)
    assert not ok or done.returncode == 0, done.stderr
    return done


def one_line(done: subprocess.CompletedProcess, expected: str) -> None:
    """The command failed, and told why in one line."""
    assert done.returncode == 2
    assert done.stderr.startswith("expnet: ") and done.stderr.count("\n") == 1 and expected in done.stderr


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
    train = ("train", "data", "--out", "model", "--recipe", "tiny", "--epochs", "1", "--batch-size", "6", "--device", "cpu", "--phases")
    assert "none of these phases trains" in expnet(*train, "features", cwd=folder).stdout
    assert "1 pictures have no features and are left out" in expnet(*train, "xe", cwd=folder).stdout
    before = (folder / "model" / "config.json").read_bytes()
    one_line(expnet(*train, "xe", "--K", "2", cwd=folder, ok=False), "K was 1, now 2")
    assert (folder / "model" / "config.json").read_bytes() == before
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
    (["features", "nothing-here", "--backbone", "shapes", "--device", "cpu"], "nothing-here/items.jsonl: no such file"),
    (["train", ".", "--out", "m", "--device", "meta"], "device 'meta'"),
    (["train", ".", "--out", "m", "--track", "abacus"], "tracker 'abacus'"),
    (["caption", "no-model", "photos", "--json", "--sentences"], "--sentences is for text"),
    (["caption", "no-model", "photos", "--gallery", "g.foo"], "g.foo: the name of a gallery ends in"),
])
def test_a_mistake_is_one_line_that_names_it(folder, words, expected):
    one_line(expnet(*words, cwd=folder, ok=False), expected)
    assert not (folder / "nothing-here").exists() and not (folder / "m").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told_before_anything_is_trained(folder):
    one_line(expnet("train", ".", "--out", "m", "--device", "cuda", cwd=folder, ok=False), "no CUDA GPU is visible")


def test_help_lists_the_commands_in_their_order(folder):
    shown = expnet("--help", cwd=folder).stdout
    places = [shown.index(f" {name} ") for name in ("prepare", "features", "train", "evaluate", "caption", "quickstart")]
    assert places == sorted(places)


@pytest.fixture(scope="module")
def model(folder) -> Path:
    """A small model with the backbone of the drawn world, untrained."""
    seed_all(0)
    eye, words = make_backbone("shapes"), Vocab(["EOS", "PAD", "SOS", "UNK", *"abcdefgh"])
    config = replace(ExpansionNetConfig.preset("tiny", eye.dim), encoder_layers=1, decoder_layers=1, max_len=8)
    save_model(folder / "small", ExpansionNet(config, words, eye).eval())
    return folder / "small"


def test_bench_is_for_expansionnets(folder):
    eye, words = make_backbone("shapes"), Vocab(["EOS", "PAD", "SOS", "UNK", "a"])
    save_model(folder / "tell", ShowTell(ShowTellConfig.preset("tiny", eye.dim), words, eye).eval())
    one_line(expnet("bench", "decode", "tell", cwd=folder, ok=False), "tell: a ShowTell")


def test_qdq_is_calibrated_on_a_data_folder_and_tensorrt_is_asked_without_a_gpu(folder, model):
    """The validation pictures of a data folder calibrate; `expnet trt` says in one line what is missing, or builds."""
    expnet("prepare", "held", "captions.csv", "--images", "photos", "--val", "0.2", "--min-count", "2", cwd=folder)
    said = expnet("export", "small", "--out", "qdq", "--precision", "qdq", "--calibration", "held", "--beam", "2", "--max-len", "6", cwd=folder).stdout
    assert "token for token" in said and json.loads((folder / "qdq" / "config.json").read_text())["precision"] == "qdq"
    graph = onnx.load(folder / "qdq" / "encoder.onnx").graph
    read = {node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    assert {weight.data_type for weight in graph.initializer if weight.name in read} == {onnx.TensorProto.INT8}     # TensorRT reads no other
    done = expnet("trt", "qdq", "--check", cwd=folder, ok=not cannot_try())
    if cannot_try(): one_line(done, f"cannot try without a GPU: {cannot_try()}")
    else: assert done.stdout.count(": 0 errors, ") == 2
    if not find_spec("tensorrt"): one_line(expnet("trt", "qdq", cwd=folder, ok=False), "TensorRT is not installed")


@pytest.mark.parametrize("options, expected", [
    (["--precision", "qdq"], "needs pictures for its calibration: --calibration FOLDER"),
    (["--precision", "fp16", "--calibration", "photos"], "'fp16': nothing to calibrate"),
    (["--precision", "qdq", "--calibration", "empty"], "empty: no picture files in it"),
    (["--golden", "photos/train_000007.png"], "train_000007.png"),
])
def test_pictures_that_cannot_be_are_refused_before_the_old_artefact_is_touched(folder, model, options, expected):
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "old").mkdir(exist_ok=True)
    (folder / "old" / "config.json").write_text('{"format": 1}')
    one_line(expnet("export", "small", "--out", "old", *options, cwd=folder, ok=False), expected)
    assert (folder / "old" / "config.json").exists()


def test_calibration_pictures_are_taken_evenly_and_only_if_they_can_be_read(folder):
    names = lambda found: [int(Path(path).stem[-3:]) for path in found]
    assert names(calibration_pictures(str(folder / "photos"))) == [i for i in range(30) if i != 7]         # the seventh is broken
    assert names(calibration_pictures(str(folder / "photos"), most=10)) == list(range(0, 30, 3))
    assert len(calibration_pictures(str(folder / "photos"), most=1)) == 1
