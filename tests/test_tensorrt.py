"""What can be known of TensorRT without a GPU: NVIDIA's parser and builder take every graph, or the test says why it could not ask."""
import importlib.util
import json
import os
import subprocess
import sys

import onnx
import onnx.parser
import pytest
from exported import artefact, captioner

from expnet.deploy import tensorrt
from expnet.deploy.graphs import Encoder, Growing, to_onnx
from expnet.deploy.tensorrt import RANGES, TensorRT, build, cannot_try, kept, profile_of, try_without_gpu
from expnet.tools import UserError

parser = pytest.mark.skipif(bool(cannot_try()), reason=cannot_try())
REFUSED = {
    "Antialiasing is not supported": """g (float[batch, 3, 8, 8] x) => (float[batch, 3, 4, 4] y) {
        scales = Constant <value_floats = [1.0, 1.0, 0.5, 0.5]> ()  y = Resize <antialias = 1, mode = "linear"> (x, , scales) }""",
    "unsupported input type of BOOL": """g (bool[batch, 4] done) => (bool[batch, 1] all) {
        axes = Constant <value_ints = [1]> ()  all = ReduceMin (done, axes) }""",
    "has type UInt8": "g (uint8[batch, 2, 2, 3] x) => (uint8[batch, 3, 2, 2] y) { y = Transpose <perm = [0, 3, 1, 2]> (x) }"}


@parser
@pytest.mark.parametrize("name", ["encoder", "beam_step", "caption"])
def test_nvidias_parser_takes_every_graph_and_builds_an_engine(name):
    built = try_without_gpu(artefact() / f"{name}.onnx")
    assert built["layers"] > 100 and built["bytes"] > 100_000


@parser
def test_it_takes_the_growing_step_whose_past_may_be_empty(tmp_path):
    to_onnx(Growing(Encoder(captioner())), tmp_path / "step.onnx")
    assert try_without_gpu(tmp_path / "step.onnx")["layers"] > 100


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
