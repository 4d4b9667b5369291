"""The artefact folder: every byte is accounted for, and what cannot be used is refused in a sentence."""
import json
import shutil

import numpy as np
import onnx
import pytest
from exported import HOW, LONGEST, artefact, captioner

from expnet.cli.export import make_artefact
from expnet.data.vocabulary import Vocab
from expnet.deploy.artefact import damaged, label, seal, write_artefact
from expnet.deploy.runtime import Runtime, verify
from expnet.tools import UserError, read_json, write_json


@pytest.fixture
def copy(tmp_path):
    """A copy of the artefact that may be broken."""
    return shutil.copytree(artefact(), tmp_path / "copy")


def reseal(folder, **changes):
    """Seal `folder` again with `changes` in its settings, as somebody who means it would."""
    config = {name: value for name, value in read_json(folder / "config.json").items() if name != "sha256"}
    seal(folder, {name: value for name, value in (config | changes).items() if value is not ...})


def test_it_holds_what_it_should(copy):
    assert {p.name for p in copy.iterdir()} == {"beam_step.onnx", "caption.onnx", "caption.pyz", "config.json", "encoder.onnx", "golden.npz",
                                                "requirements.txt", "vocab.json"}
    config = read_json(copy / "config.json")
    assert set(config["sha256"]) == {p.name for p in copy.iterdir()} and config["agrees with torch"] == "4 of 4"
    assert {"torch", "onnx", "onnxruntime", "python"} <= set(config["versions"]) and config["beam"]["size"] == 5 and config["max_len"] == 20
    assert (config["precision"], config["preprocess"]["size"]) == ("fp32", 64)


@pytest.mark.parametrize("share", [0, 0.31, 0.77, 1])
def test_one_flipped_bit_of_any_file_is_found_and_the_file_named(copy, share):
    for path in sorted(copy.iterdir()):
        before = path.read_bytes()
        content = bytearray(before)
        content[int(share * (len(content) - 1))] ^= 4
        path.write_bytes(content)
        with pytest.raises(UserError) as error: verify(copy)
        assert path.name in str(error.value) and str(error.value).count("\n") == 0, path.name
        path.write_bytes(before)
    assert damaged(copy) == {}


def test_a_file_that_is_missing_or_cut_is_named_and_one_that_was_added_is_no_damage(copy):
    (copy / "notes.txt").write_text("bought in Modena")
    assert verify(copy)[0] == "every file is whole"
    for name in sorted(p.name for p in copy.iterdir()):
        if name == "notes.txt": continue
        before = (copy / name).read_bytes()
        (copy / name).write_bytes(before[:len(before) // 2])
        with pytest.raises(UserError, match=name): verify(copy)
        (copy / name).unlink()
        with pytest.raises(UserError, match=name): verify(copy)
        (copy / name).write_bytes(before)


def test_a_newer_format_is_refused(copy):
    reseal(copy, format=2, expnet="7.0")
    for use in (verify, Runtime):
        with pytest.raises(UserError, match="format 2, written by expnet 7.0.*use a newer expnet"): use(copy)


def test_another_vocabulary_is_refused_even_if_the_folder_agrees_with_itself(copy):
    words = captioner().vocab.words
    other = Vocab(words[:-1] + ["zebra"])
    other.save(copy / "vocab.json")
    with pytest.raises(UserError, match="config.json: made for the vocabulary"): Runtime(copy)
    reseal(copy, vocab=other.fingerprint)
    for use in (verify, Runtime):
        with pytest.raises(UserError, match="encoder.onnx: made for the vocabulary"): use(copy)


@pytest.mark.parametrize("name, value", [(name, value) for name in ("format", "vocab", "beam", "preprocess", "graphs", "sha256")
                                         for value in (None, [], "x", {}, -1.5, ...)])
def test_settings_of_the_wrong_kind_are_a_sentence(copy, name, value):
    config = read_json(copy / "config.json")
    write_json(copy / "config.json", {key: x for key, x in (config | {name: value}).items() if x is not ...})
    with pytest.raises(UserError) as error: verify(copy)
    assert "config.json" in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", '"text"', '{"format": 1}', "\x00\xff"])
def test_settings_that_are_no_settings_are_a_sentence(copy, text):
    (copy / "config.json").write_text(text, encoding="latin-1")
    for use in (verify, Runtime):
        with pytest.raises(UserError, match="config.json"): use(copy)


def test_notes_of_any_length_are_read_by_onnx(tmp_path):
    path, before = tmp_path / "encoder.onnx", onnx.load(artefact() / "encoder.onnx")
    shutil.copy(artefact() / "encoder.onnx", path)
    notes = {"long": "ß" * 300_000, "empty": "", "": "nothing"}
    label(path, notes)
    after = onnx.load(path)
    found = {pair.key: pair.value for pair in after.metadata_props}
    assert {name: found[name] for name in notes} == notes and json.loads(found["expnet.vocab"]) == captioner().vocab.words
    assert after.graph == before.graph


def test_an_export_leaves_nothing_of_an_older_one_and_nothing_of_somebody_else_is_touched(copy, tmp_path, monkeypatch):
    def graphs_only(model, folder, graphs, **settings):
        for name in graphs: shutil.copy(artefact() / f"{name}.onnx", folder)
        return {"opset": 20, "check": {}}
    monkeypatch.setattr("expnet.cli.export.export", graphs_only)
    (copy / "engines").mkdir()
    (copy / "caption.onnx").write_text("of an older export")
    lines = make_artefact(captioner(), copy, HOW, LONGEST)
    assert lines[0] == "every file is whole" and not (copy / "caption.onnx").exists() and (copy / "engines").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds something else"): make_artefact(captioner(), tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").exists()


def test_an_export_that_broke_off_is_no_artefact(copy):
    (copy / "config.json").unlink()
    with pytest.raises(UserError, match="config.json: no such file"): Runtime(copy)


def test_the_same_export_twice_is_the_same_program(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shutil.copy(artefact() / "encoder.onnx", tmp_path / name)
        write_artefact(tmp_path / name, {"beam": {}, "preprocess": {}}, captioner().vocab)
    assert (tmp_path / "one" / "caption.pyz").read_bytes() == (tmp_path / "two" / "caption.pyz").read_bytes()


def test_golden_pictures_that_are_none_are_a_sentence(copy):
    for content in (b"", b"PK\x03\x04 broken", np.float32([1]).tobytes()):
        (copy / "golden.npz").write_bytes(content)
        reseal(copy)
        with pytest.raises(UserError, match="golden.npz: not a file of golden pictures"): verify(copy)
