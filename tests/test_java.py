"""The Java programs: METEOR and the tokeniser where Java is, SPICE up to the jars that are missing, and plain words where nothing is."""
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

from expnet.score import java
from expnet.score.evaluate import pick
from expnet.score.java import Conversation, Meteor, java_missing, java_tokenize, meteor, running_meteor, spice, spice_missing
from expnet.score.tokens import ptb_tokenize
from expnet.tools import UserError

GOLDEN = json.loads((Path(__file__).parent/"golden"/"golden200.json").read_text(encoding="utf-8"))
HYPS = [item["hyp_ptb"].split() for item in GOLDEN["items"]]
REFS = [[ref.split() for ref in item["refs_ptb"]] for item in GOLDEN["items"]]
RECORDED = json.loads((Path(__file__).parent/"golden"/"ptb_vectors.json").read_text(encoding="utf-8"))
needs_java = pytest.mark.skipif(bool(java_missing()), reason=java_missing() or "Java is there")


def flickr8k() -> list[list[str]]:
    "The raw captions of every image; skips without the data set."
    folder = os.environ.get("EXPNET_FLICKR8K")
    if not folder: pytest.skip("set EXPNET_FLICKR8K to a folder with dataset_flickr8k.json to run this test")
    images = json.loads((Path(folder)/"dataset_flickr8k.json").read_text(encoding="utf-8"))["images"]
    return [[sentence["raw"] for sentence in image["sentences"]] for image in images]


# --- METEOR

@pytest.fixture(scope="module")
def program():
    "One METEOR process for all tests of this file."
    with Meteor() as program: yield program


@needs_java
def test_meteor_equals_the_recorded_values(program):
    total, each = program.score(HYPS, REFS)
    assert abs(total - GOLDEN["overall"]["METEOR"]) < 1e-4
    np.testing.assert_allclose(each, [item["scores"]["METEOR"] for item in GOLDEN["items"]], rtol=0, atol=1e-4)


@needs_java
def test_no_caption_shifts_the_answers_of_the_next(program):
    strange = ["", "|||", "a ||| b", "a\nb", "\r\n", "SCORE", "EVAL ||| 1", "日本 café 😀", "\ud800", "a " * 200, "\x00", "-lrb- 22\xa03/4"]
    known, refs = ["a", "dog", "runs"], [["the", "dog", "is", "running"]]
    hyps = [words for text in strange for words in ([text], known)]
    each = program.score(hyps, [group for text in strange for group in ([["a", "dog"], [text]], refs)])[1]
    assert len(set(each[1::2])) == 1 and 0.2 < each[1] < 1
    assert np.isfinite(each).all() and each[0] == 0 and ((each >= 0) & (each <= 1)).all()


@needs_java
def test_meteor_properties(program):
    np.testing.assert_allclose(program.score(HYPS[:50], [group[::-1] for group in REFS[:50]])[1], program.score(HYPS[:50], REFS[:50])[1], atol=1e-12)
    same = [group[0] for group in REFS if len(group[0]) > 1]
    assert (program.score(same, [[caption] for caption in same])[1] == 1).all()
    assert program.score([[]], [[[]]])[0] == 0


STAND_IN = [sys.executable, "-u", "-c", """
import sys
print("warning " * 50_000, file=sys.stderr)
for line in sys.stdin:
    parts = line.strip().split(" ||| ")
    if "die" in line: sys.exit("no memory")
    if parts[0] == "SCORE": print(len(parts))
    else: print(*parts[1:], "0.5", sep="\\n")
"""]  # answers as METEOR does, and fills the pipe of complaints first


@pytest.fixture
def stand_in(monkeypatch):
    "`meteor` with a program that needs no Java."
    def start(self, patience=300):
        Conversation.__init__(self, STAND_IN, None, patience, "METEOR")
        self.lock = threading.Lock()
    monkeypatch.setattr(Meteor, "__init__", start)
    running_meteor.cache_clear()
    yield
    running_meteor().close()
    running_meteor.cache_clear()


def test_one_process_is_kept_and_a_dead_one_replaced(stand_in):
    total, each = meteor([["a"], ["b"]], [[["x"]], [["x"], ["y"]]])
    first = running_meteor().process.pid
    assert total == 0.5 and each.tolist() == [3, 4]
    meteor([["a"]], [[["x"]]])
    assert running_meteor().process.pid == first
    with pytest.raises(UserError, match="METEOR gave no answer: .*no memory"): meteor([["die"]], [[["x"]]])
    assert meteor([["a"]], [[["x"]]])[1].tolist() == [3] and running_meteor().process.pid != first


def test_an_interrupt_ends_the_conversation(stand_in, monkeypatch):
    meteor([["a"]], [[["x"]]])
    process = running_meteor().process
    def interrupt(*_): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(Conversation, "ask", interrupt)
        with pytest.raises(KeyboardInterrupt): meteor([["a"]], [[["x"]]])
    assert process.poll() is not None
    assert meteor([["a"]], [[["x"]]])[1].tolist() == [3]


def test_nothing_runs_on_after_python_ends():
    code = f"""
from expnet.score.java import Conversation
talk = Conversation({[sys.executable, "-u", "-c", "import os, sys" + chr(10) + "for line in sys.stdin: print(os.getpid())"]!r})
print(talk.ask("x")[0])
"""
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    with pytest.raises(ProcessLookupError): os.kill(pid, 0)


# --- the tokeniser

@needs_java
def test_our_tokens_equal_the_java_program_on_captions_read_alone():
    raws = [pair["raw"] for kind in ("hard", "random") for pair in RECORDED[kind]]
    assert [raw for raw, tokens in zip(raws, java_tokenize(raws)) if tokens != ptb_tokenize(raw)] == []


@needs_java
def test_java_tokenizer_is_the_one_of_the_coco_tools(tmp_path, monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")
    raws = [pair["raw"] for pair in RECORDED["hard"][::30]] + ["A café, 日本 and (two) letters S.", "", "The end"]
    module = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    if not os.access(Path(module.__file__).parent, os.W_OK): pytest.skip("the COCO tools write into their own folder, which is read-only")
    theirs = module.PTBTokenizer().tokenize({k: [{"caption": raw}] for k, raw in enumerate(raws)})
    assert [" ".join(tokens) for tokens in java_tokenize(raws, apart=False)] == [theirs[k][0] for k in range(len(raws))]


@needs_java
def test_all_of_flickr8k_is_cut_alike():
    raws = [raw for group in flickr8k() for raw in group]
    assert len(raws) == 40_000 and [raw for raw, tokens in zip(raws, java_tokenize(raws)) if tokens != ptb_tokenize(raw)] == []


@needs_java
@pytest.mark.parametrize("text", ["a\rb", "a\x0bb\u2028c\x85d", "", " ", "\x00", "\u200b", "x" * 10_000])
def test_the_java_tokenizer_keeps_the_lines_apart(text):
    assert java_tokenize([text, "the end", text], apart=False)[1] == ["the", "end"]


# --- SPICE

STUB = """#!{python}
import json, sys, time
assert sys.argv[1:4] == ["-Xmx8G", "-Dfile.encoding=UTF-8", "-jar"] and sys.argv[6] == "-out" and sys.argv[8:] == ["-subset", "-silent"]
records = json.load(open(sys.argv[5], encoding="utf-8"))
if records[0]["test"] == "die": sys.exit("Exception: no\\nparser")
if records[0]["test"] == "sleep": time.sleep(60)
share = lambda r: len(set(r["test"].split()) & set(" ".join(r["refs"]).split())) / (len(r["test"].split()) or float("nan"))
json.dump([{{"image_id": r["image_id"], "scores": {{"All": {{"f": share(r)}}}}}} for r in records[::-1]], open(sys.argv[7], "w"))
"""


@pytest.fixture
def spice_folder(tmp_path, monkeypatch):
    "A folder with (empty) jars, and a `java` that answers with the share of words found in the references."
    (tmp_path/"lib").mkdir()
    for name in ("spice-1.0.jar", *(f"lib/{jar}" for jar in java.PARSER)): (tmp_path/name).touch()
    command = tmp_path/"bin"/"java"
    command.parent.mkdir()
    command.write_text(STUB.format(python=sys.executable))
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    return tmp_path


def test_spice_speaks_the_protocol_of_files(spice_folder):
    total, each = spice([["a", "dog"], [], ["a\n|||", "café"]], [[["a"], ["b"]], [["x"]], [["café", "a"]]], spice_folder)
    assert each.tolist() == [0.5, 0, 1] and total == 0.5
    with pytest.raises(UserError, match="SPICE failed: Exception: no parser"): spice([["die"]], [[["x"]]], spice_folder)
    with pytest.raises(UserError, match="not ready after 1 s"): spice([["sleep"]], [[["x"]]], spice_folder, patience=1)


def test_spice_names_the_missing_jars_and_where_they_go(spice_folder):
    (spice_folder/"lib"/java.PARSER[1]).unlink()
    with pytest.raises(UserError) as caught: spice([["a"]], [[["a"]]], spice_folder)
    message = str(caught.value)
    assert java.PARSER[1] in message and java.PARSER[0] not in message.replace(java.PARSER[1], "") and str(spice_folder/"lib") in message
    assert "\n" not in message


@needs_java
def test_spice_without_a_parser_model_fails_in_words(tmp_path):
    tools = java.coco_tools()
    shutil.copytree(tools/"spice", tmp_path/"spice")
    shutil.copy(tools/java.TOKENIZER, tmp_path/"spice"/"lib"/java.PARSER[0])  # an older version of the same program
    with zipfile.ZipFile(tmp_path/"spice"/"lib"/java.PARSER[1], "w") as empty: empty.writestr("nothing", "")
    assert spice_missing(tmp_path/"spice") == ""
    with pytest.raises(UserError, match="SPICE failed: .*"): spice([["a", "dog"]], [[["a", "dog"]]], tmp_path/"spice", patience=60)


# --- without

def test_one_sentence_for_each_thing_that_is_missing(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(java, "coco_tools", lambda: None)
        patch.setattr(java, "find_java", lambda: "java")
        assert "pip install" in java_missing() and "pycocoevalcap" in spice_missing()
        patch.setattr(java, "coco_tools", lambda: tmp_path)
        assert str(tmp_path/"meteor"/"meteor-1.5.jar") in java_missing()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    running_meteor.cache_clear()
    for call in (lambda: meteor([["a"]], [[["a"]]]), lambda: spice([["a"]], [[["a"]]]), lambda: java_tokenize(["a"]),
                 lambda: pick(["default", "METEOR"]), lambda: pick(["spice"])):
        with pytest.raises(UserError, match="cannot run: Java is not installed") as caught: call()
        assert "\n" not in str(caught.value)


# --- what it costs: CPU seconds, those of the programs included

def cpu(call) -> float:
    before = os.times()
    call()
    return sum(os.times()[:4]) - sum(before[:4])


@needs_java
def test_cost(capsys):
    groups = flickr8k()
    raws = [raw for group in groups[:6000] for raw in group]
    refs = [[ptb_tokenize(raw) for raw in group] for group in groups[:1000]]
    hyps = [group[0] for group in refs[1:] + refs[:1]]

    def first_of(captions: int):
        with Meteor() as program: program.score(hyps[:captions], refs[:captions])

    costs = {"METEOR start": cpu(lambda: first_of(1)), "METEOR start and 1,000": cpu(lambda: first_of(1000)),
             "Java tokeniser, 30,000": cpu(lambda: java_tokenize(raws)),
             "ptb_tokenize, 30,000": cpu(lambda: [ptb_tokenize(raw) for raw in raws])}
    with capsys.disabled(): print({name: round(seconds, 2) for name, seconds in costs.items()})
    assert costs["ptb_tokenize, 30,000"] < costs["Java tokeniser, 30,000"]
