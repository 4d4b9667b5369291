"""What can be known of TensorRT without a GPU: NVIDIA's parser and builder take every graph, or the test says why it could not ask.

`pytest -s tests/test_tensorrt.py` prints the table of the chapter, a line for each graph. EXPNET_FULL_SIZE=FOLDER, where
tests/full_size_onnx.py left its files, adds the published sizes with Swin-L."""
import atexit
import importlib.util
import os
import shutil
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import onnx
import onnx.parser
import pytest
from exported import HOW, LONGEST, artefact, captioner, scenes

from expnet.deploy import tensorrt
from expnet.deploy.artefact import open_folder
from expnet.deploy.export import export
from expnet.deploy.tensorrt import RANGES, Plan, TensorRT, build, cannot_try, engines_of, kept, profile_of, try_without_gpu
from expnet.models.backbone import make_backbone
from expnet.models.captioner import Captioner
from expnet.tools import UserError, seed_all
from expnet.train.checkpoints import kind_of

parser = pytest.mark.skipif(bool(cannot_try()), reason=cannot_try())
REFUSED = {
    "Antialiasing is not supported": """g (float[batch, 3, 8, 8] x) => (float[batch, 3, 4, 4] y) {
        scales = Constant <value_floats = [1.0, 1.0, 0.5, 0.5]> ()  y = Resize <antialias = 1, mode = "linear"> (x, , scales) }""",
    "unsupported input type of BOOL": """g (bool[batch, 4] done) => (bool[batch, 1] all) {
        axes = Constant <value_ints = [1]> ()  all = ReduceMin (done, axes) }""",
    "has type UInt8": "g (uint8[batch, 2, 2, 3] x) => (uint8[batch, 3, 2, 2] y) { y = Transpose <perm = [0, 3, 1, 2]> (x) }"}


KINDS = {"ExpansionNet": {}, "ShowAttendTell": {}, "Transformer": {"K": 2}, "ActorCritic": {}}          # Transformer, K=2: SATIC
GRAPHS, FULL_SIZE = ("encoder", "step", "beam_step", "caption"), os.environ.get("EXPNET_FULL_SIZE")


@cache
def graphs(kind: str, precision: str) -> Path:
    """The folder with all graphs of a tiny captioner that looks through the backbone of the drawn world."""
    folder = Path(tempfile.mkdtemp(prefix="graphs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    export(tiny(kind), folder, HOW, LONGEST, precision, scenes(4) if precision == "qdq" else None, GRAPHS)
    return folder


def tiny(kind: str) -> Captioner:
    """A captioner of a kind in its tiny preset, ExpansionNet a little trained."""
    if kind == "ExpansionNet": return captioner()
    seed_all(0)
    (config, build), eye = kind_of(kind, "test"), make_backbone("shapes")
    return build(replace(config.preset("tiny", eye.dim), **KINDS[kind]), captioner().vocab, eye).eval()


def taken(path: Path, *names: str) -> dict[str, float]:
    """What NVIDIA's parser and builder make of the graph in file `path`; printed with its `names`."""
    built = try_without_gpu(path)
    print(f"\n| {' | '.join(names)} | {built['layers']:,} layers | {built['bytes'] / 1e6:.1f} MB | {built['seconds']:.1f} s |")
    return built


@parser
@pytest.mark.parametrize("precision", ["fp32", "fp16", "qdq"])
@pytest.mark.parametrize("kind", KINDS)
def test_nvidias_parser_takes_every_graph_and_builds_an_engine(kind, precision):
    for name in GRAPHS:
        path = graphs(kind, precision) / f"{name}.onnx"
        built = taken(path, kind, precision, name)
        assert built["layers"] > (100 if kind == "ExpansionNet" else 90), name
        assert built["bytes"] > max(100_000, path.stat().st_size / 2), name                        # an engine holds the weights


@pytest.mark.skipif(not FULL_SIZE, reason="set EXPNET_FULL_SIZE to a folder of tests/full_size_onnx.py: minutes, gigabytes")
@parser
@pytest.mark.parametrize("precision", ["fp32", "fp16", "qdq"])
@pytest.mark.parametrize("name", GRAPHS)
def test_it_takes_the_published_sizes(name, precision):
    path = Path(FULL_SIZE) / precision / f"{name}.onnx"
    if precision == "qdq" and name in ("step", "beam_step"): pytest.skip("8 bits are the encoder's; the steps are those of fp32")
    assert taken(path, "ExpansionNet, Swin-L", precision, name)["bytes"] > path.stat().st_size / 2


@parser
def test_it_refuses_eight_bits_whose_scales_are_computed_on_the_way(tmp_path):
    """The form for ONNX Runtime on processors."""
    export(captioner(), tmp_path / "new", HOW, LONGEST, "int8", graphs=("encoder",))
    with pytest.raises(UserError, match="TensorRT refuses it"): try_without_gpu(tmp_path / "new" / "encoder.onnx")


@parser
@pytest.mark.parametrize("reason", REFUSED)
def test_it_is_the_real_parser_for_it_refuses_what_tensorrt_refuses(tmp_path, reason):
    onnx.save(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {REFUSED[reason]}'), tmp_path / "g.onnx")
    with pytest.raises(UserError, match=f"TensorRT refuses it, 1 errors.*{reason}"): try_without_gpu(tmp_path / "g.onnx")


@parser
def test_a_file_that_is_no_graph_is_refused(tmp_path):
    (tmp_path / "g.onnx").write_text("no graph")
    with pytest.raises(UserError, match="TensorRT refuses it"): try_without_gpu(tmp_path / "g.onnx")


@parser
def test_a_crash_is_not_taken_for_success(tmp_path, monkeypatch):
    (tmp_path / "g.onnx").touch()
    monkeypatch.setattr(tensorrt, "TRY", "import os; os.abort()")
    with pytest.raises(UserError, match="could not be tried, exit code -6"): try_without_gpu(tmp_path / "g.onnx")


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_where_tensorrt_is_absent_one_line_says_so():
    for use in (lambda: build(artefact() / "encoder.onnx"), lambda: TensorRT(artefact())):
        with pytest.raises(UserError, match="TensorRT is not installed: it needs an NVIDIA GPU") as error: use()
        assert "\n" not in str(error.value)


def test_a_profile_opens_the_axes_by_their_places():
    assert profile_of((-1, 64, 64, 3), RANGES | {"batch": (1, 4, 9)}) == [(1, 64, 64, 3), (4, 64, 64, 3), (9, 64, 64, 3)]
    assert profile_of((-1, -1, -1, 8)) == [(1, 1, 0, 8), (1, 5, 10, 8), (8, 8, 20, 8)]


def test_an_engine_is_built_once_for_each_graph_gpu_version_and_profile(tmp_path):
    graph, made = tmp_path / "g.onnx", []
    def make():
        made.append(None)
        return b"engine %d" % len(made)
    graph.write_bytes(b"one")
    facts = ["H100", 9, 0, "11.4", RANGES]
    assert [kept(graph, facts, tmp_path / "engines", make) for _ in range(2)] == [b"engine 1"] * 2
    for i, other in enumerate((["H200"], 8), 2): assert kept(graph, [other, *facts[1:]], tmp_path / "engines", make) == b"engine %d" % i
    graph.write_bytes(b"two")
    assert kept(graph, facts, tmp_path / "engines", make) == b"engine 4"
    with pytest.raises(KeyboardInterrupt): kept(graph, ["stopped"], tmp_path / "engines", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert len(list((tmp_path / "engines").iterdir())) == 4


def test_engines_of_an_artefact_are_built_once_and_each_is_announced(tmp_path, monkeypatch):
    """With a pretended GPU: what is tested is what is built, kept and said."""
    gpu, built, said = SimpleNamespace(name="a GPU", major=9, minor=0), [], []
    pretended = SimpleNamespace(cuda=SimpleNamespace(get_device_properties=lambda number: gpu))
    monkeypatch.setattr(tensorrt, "library", lambda: SimpleNamespace(__version__="11.4"))
    monkeypatch.setattr(tensorrt, "on_gpu", lambda: pretended)
    monkeypatch.setattr(tensorrt, "build", lambda path, ranges: built.append((path.stem, ranges["batch"])) or Plan(path.stem.encode(), 1))
    opened = open_folder(artefact())
    for most in (4, 4, 2): assert engines_of(opened, tmp_path, most, said.append) == {"encoder": b"encoder", "beam_step": b"beam_step"}
    assert built == [("encoder", (1, 1, 4)), ("beam_step", (1, 1, 4)), ("encoder", (1, 1, 2)), ("beam_step", (1, 1, 2))]
    assert [line.split()[1] for line in said] == ["building", "an"] * 2 + ["an"] * 2 + ["building", "an"] * 2
    alone = replace(opened, graphs={"caption": opened.graphs["caption"]})
    with pytest.raises(UserError, match="encoder.onnx: not in this artefact"): engines_of(alone, tmp_path)
