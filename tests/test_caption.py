"""Captions of whatever a person brings: every form, every order, every accident; and the command around them."""
import json
import subprocess
import sys
from math import isclose
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from expnet.data.vocabulary import Vocab
from expnet.data.images import BadImage, Preprocess
from expnet.data.pictures import as_image
from expnet.decode.caption import as_sentence, caption, caption_stream
from expnet.models.backbone import make_backbone
from expnet.models.expansionnet import ExpansionNet, ExpansionNetConfig
from expnet.tools import seed_all
from expnet.train.checkpoints import load, save_model


@pytest.fixture(scope="module")
def model() -> ExpansionNet:
    """A random model of pictures, whose captions differ from picture to picture."""
    seed_all(3)
    words = Vocab(["\n", "EOS", "PAD", "SOS", "UNK", *(f"w{i:02}" for i in range(30))])
    net = ExpansionNet(ExpansionNetConfig.preset("tiny", 128), words, make_backbone("shapes")).eval()
    parts = [(net.head, 4), (net.input, 6), (net.words.embed, 0.1), *((part, k) for l in net.decoder for part, k in ((l.cross.out, 4), (l.cross.query, 3)))]
    with torch.no_grad():
        for part, factor in parts: part.weight.mul_(factor)                 # words matter less than what is seen
    return net


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Seven pictures of many kinds and sizes, and one file that is none."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number, mode in enumerate(("RGB", "L", "RGBA", "P", "CMYK", "RGB", "1")):
        pixels = np.kron(draw.integers(0, 256, (4, 5, 3), dtype=np.uint8), np.ones((9 + number, 8, 1), np.uint8))
        Image.fromarray(pixels).convert(mode).save(folder / f"{number} {mode}.{'tif' if mode == 'CMYK' else 'png'}")
    (folder / "7 broken.jpg").write_bytes(b"\xff\xd8\xff")
    return folder


def test_a_folder_in_any_batch_size_gives_each_file_its_own_caption(model, files):
    wanted = [caption(model, path)[0].captions for path in sorted(files.iterdir())[:-1]]
    assert len(set(wanted)) > 3                                             # else the comparison below says little
    for size in (1, 2, 3, 7, 50):
        said = caption(model, files, batch_size=size, on_bad="skip")
        assert [Path(c.name).name[0] for c in said] == list("01234567")
        assert [c.captions for c in said[:-1]] == wanted and said[-1].error and not said[-1].captions
    with pytest.raises(BadImage, match="7 broken.jpg"): caption(model, files)


def test_the_scores_of_the_words_add_up_to_the_score_of_the_caption(model, files):
    for c in model.caption(str(files / "*.png"), beam=4, n_best=3):
        assert len(c.captions) == len(c.scores) == len(c.words) == 3 and list(c.scores) == sorted(c.scores, reverse=True)
        for text, score, words in zip(c.captions, c.scores, c.words):
            assert " ".join(word for word, _ in words if word != "EOS") == text
            assert isclose(sum(logp for _, logp in words) / len(words), score, abs_tol=1e-5)            # EOS counts


def test_arrays_and_tensors_are_the_pictures_they_show(model, files):
    image = Image.open(files / "0 RGB.png")
    array = np.array(image)
    forms = [image, array, torch.from_numpy(array), torch.from_numpy(array).permute(2, 0, 1), array / 255, (torch.from_numpy(array) / 255).half(),
             np.asfortranarray(array), array[::-1][::-1]]
    assert len({caption(model, form)[0].captions for form in forms}) == 1
    assert [c.name for c in caption(model, [image, np.stack([array, array]), files / "1 L.png"])] == ["image 0", "image 1", "image 2", str(files / "1 L.png")]
    assert np.array_equal(np.asarray(as_image(torch.from_numpy(array) / 255)), array)                   # every byte survives
    for wrong in (np.zeros((0, 4, 3)), np.full((4, 4), -1), np.full((4, 4), 256), np.full((4, 4, 3), np.inf), np.zeros((4, 4, 2)), np.zeros(5)):
        with pytest.raises(BadImage, match="image 0"): caption(model, wrong)
        assert caption(model, wrong, on_bad="skip")[0].error


def test_a_stream_reads_no_further_than_it_must(model, files):
    taken = []
    def names():
        for path in [files / "0 RGB.png", files / "1 L.png", files / "5 RGB.png"]:
            taken.append(path)
            yield path
    stream = caption_stream(model, names(), batch_size=1)
    next(stream)
    assert len(taken) == 1
    assert len(list(stream)) == 2


def test_black_for_what_is_not_rgb_only_if_asked(model, files, tmp_path):
    Image.new("RGB", (40, 36)).save(tmp_path / "black.png")
    black = caption(model, tmp_path / "black.png")[0]
    for name, same in (("0 RGB.png", False), ("1 L.png", True), ("2 RGBA.png", True), ("3 P.png", True), ("4 CMYK.tif", True)):
        for picture in (files / name, Image.open(files / name)):
            said = caption(model, picture, as_original=True)[0]
            assert isclose(said.scores[0], black.scores[0], abs_tol=1e-4) == same
            assert not isclose(caption(model, picture)[0].scores[0], black.scores[0], abs_tol=1e-4)


def test_the_published_preprocessing_is_the_one_described(files):
    image = Image.open(files / "0 RGB.png")
    x = np.asarray(image.resize((384, 384), Image.Resampling.BILINEAR), np.float64) / 255
    x = (x - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    prepare = make_backbone("swin/micro", None).prepare
    assert np.abs(Preprocess(**{**prepare.to_dict(), "size": 384})(image).numpy() - x.transpose(2, 0, 1)).max() < 1e-5


def test_a_sentence_is_one_line(model):
    assert as_sentence(" two DOGS \n run") == "Two dogs run." and as_sentence("\n") == ""


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    """The model, stored."""
    return save_model(tmp_path_factory.mktemp("model") / "m", model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_and_close(folder, model, files, dtype):
    low = load(folder, dtype=dtype)
    assert {w.dtype for w in low.parameters()} == {dtype}
    one, two = (caption(m, files / "5 RGB.png", max_len=3)[0] for m in (low, model))
    assert abs(one.scores[0] - two.scores[0]) < 0.1


def run(*words, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess:
    """The command in a process of its own."""
    return subprocess.run([sys.executable, "-c", "from expnet.cli.app import main; main()", "caption", *map(str, words), "--device", "cpu"],
                          cwd=cwd, capture_output=True, text=True, input=stdin)


def test_a_list_on_standard_input_json_and_a_gallery(folder, files):
    done = run(folder, "-", "5 RGB.png", "--json", "--n-best", 2, "--gallery", "out/gallery.png", cwd=files, stdin="0 RGB.png\n\n7 broken.jpg\n1 L.png\n")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["image"] for line in lines] == ["0 RGB.png", "1 L.png", "5 RGB.png"]
    assert all(len(line["captions"]) == 2 and line["captions"][0]["words"] for line in lines)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("expnet: 7 broken.jpg: ")
    assert Image.open(files / "out" / "gallery.png").width > 300


def test_a_bad_file_stops_the_command_if_asked(folder, files):
    done = run(folder, "7 broken.jpg", "0 RGB.png", "--on-bad", "raise", "--dtype", "bf16", cwd=files)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("expnet: 7 broken.jpg") and done.stderr.count("\n") == 1
