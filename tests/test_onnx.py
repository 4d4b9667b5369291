"""Exported graphs in ONNX Runtime say what `decode` says: batches, beams, both searches, other captioners, half precision.

EXPNET_MEASURE=1 adds every beam at the presets `tiny` and `coco`; EXPNET_WORLD=FOLDER (of `expnet quickstart`) adds its trained model."""
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from drawn import drawn_file
from expnet import load
from expnet.data.vocabulary import Vocab
from expnet.decode.ensemble import Ensemble
from expnet.decode.recompute import Recompute
from expnet.decode.rules import words_only
from expnet.decode.search import Beam, Hyps, decode
from expnet.deploy.export import export, pixels_of, quantise
from expnet.deploy.beam_step import BeamStep, Begin, Finish, one_call
from expnet.deploy.graphs import Encoder, Growing, Run, to_onnx
from expnet.models.captioner import Captioner, Past
from expnet.models.expansionnet import ExpansionNet, ExpansionNetConfig
from expnet.models.official import import_official
from expnet.score.evaluate import evaluate
from expnet.tools import UserError, seed_all
from expnet.train.checkpoints import kind_of
from expnet.train.recipes import open_data

logging.getLogger("torch.__trace").disabled = True                        # pytest would keep every line of the exporter's diary
measured = pytest.mark.skipif(not os.environ.get("EXPNET_MEASURE"), reason="set EXPNET_MEASURE=1: minutes of exporting")
WORLD = os.environ.get("EXPNET_WORLD")
REGIONS, WORDS = 6, [*"abcdefghijklmnop"]


def sharpened(model: Captioner) -> Captioner:
    """`model`, random, made to prefer some words and to end sentences of its own accord."""
    model = model.eval().requires_grad_(False)
    model.head.weight.mul_(4)
    model.head.bias[model.vocab.eos] += 1.5
    return model


def small(**sizes) -> ExpansionNet:
    """A captioner of one layer, or of other `sizes`."""
    seed_all(0)
    sizes = dict(features=12, dim=32, heads=2, feed_forward=48, encoder_layers=1, decoder_layers=1, static=(4, 8), dynamic=3, max_len=12) | sizes
    return sharpened(ExpansionNet(ExpansionNetConfig(**sizes), Vocab(["EOS", "PAD", "SOS", "UNK", *WORDS])))


class Files:
    """The graphs of a captioner as files in `folder`; the encoder is shared by all searches."""
    def __init__(self, model: Captioner, folder: Path, regions: int | None = REGIONS):
        self.model, self.folder, self.encoder = model, folder, Encoder(model, regions)
        self.encoder_file = to_onnx(self.encoder, folder / "encoder.onnx")

    def caption(self, how: Beam, max_len: int = 12, forbidden=None) -> Run:
        """The one-call graph of a search."""
        step, place = BeamStep(self.encoder, how, max_len, forbidden), self.folder / f"{how.style}{how.size}"
        files = {name: to_onnx(graph, place / f"{name}.onnx") for name, graph in (("beam_step", step), ("begin", Begin(step)), ("finish", Finish(step)))}
        return Run(one_call(self.encoder_file, **files, path=place / "caption.onnx"))


def seen(batch: int, features: int = 12, regions: int = REGIONS) -> dict[str, torch.Tensor]:
    """Random pictures of `batch` numbers of real regions, from all down to none."""
    real = torch.linspace(regions, 0 if batch > 1 else regions, batch).long()
    return {"features": torch.randn(batch, regions, features), "real": torch.arange(regions) < real[:, None]}


def same(found: dict[str, torch.Tensor], hyps: Hyps, pad: int) -> None:
    """Tokens equal, log-probabilities to 1e-4, everything finite."""
    length = hyps.tokens.shape[-1]
    assert torch.equal(found["tokens"][..., :length], hyps.tokens)
    assert (found["tokens"][..., length:] == pad).all() and found["score"].isfinite().all()
    assert (found["logp"][..., :length] - hyps.logp).abs().max() < 1e-4
    assert (found["score"] - hyps.score).abs().max() < 1e-4


def says_what_decode_says(run: Run, model: Captioner, how: Beam, max_len: int, features: int, regions: int = REGIONS) -> None:
    """For batches of 1, 3 and 6."""
    for batch in (1, 3, 6):
        inputs = seen(batch, features, regions)
        memory = model.encode(inputs["features"], inputs["real"])
        same(run(**inputs), decode(model, memory, how, max_len, [words_only(model.vocab)]), model.vocab.pad)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    return Files(small(), tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("how", [Beam(3, n_best=3), pytest.param(Beam(1), marks=measured), pytest.param(Beam(5, n_best=2), marks=measured),
                                 pytest.param(Beam(4, n_best=4, groups=2, diversity=0.5), marks=measured)])
def test_batches_and_beams(files, how):
    says_what_decode_says(files.caption(how), files.model, how, 12, 12)
    whole = onnx.load(files.folder / f"pool{how.size}" / "caption.onnx")
    onnx.checker.check_model(whole, full_check=True)
    loop = next(node for node in whole.graph.node if node.op_type == "Loop")
    every = [*whole.graph.node, *loop.attribute[0].g.node]
    assert {node.domain for node in every} == {""} and [entry.version for entry in whole.opset_import] == [20]
    statistics = {onnx.helper.get_node_attr_value(n, "stash_type") for n in every if n.op_type == "LayerNormalization"}
    assert statistics <= {1}                                              # 1: float32


@torch.no_grad()
def test_growing_step(files):
    model, layout = files.model, files.encoder.layout
    run, width = Run(to_onnx(Growing(files.encoder), files.folder / "step.onnx")), model.config.dim * 4
    for batch, beam, past in ((1, 1, 0), (1, 3, 0), (1, 5, 1), (3, 5, 7), (2, 3, 11)):
        inputs, rows = seen(batch), batch * beam
        memory = model.encode(**{"x": inputs["features"], "mask": inputs["real"]})
        previous, before = torch.randint(20, (batch, beam, 1)), torch.randn(batch, beam, past, width)
        found = run(previous=previous, past_0=before, **dict(zip(layout.memory_names, layout.from_memory(memory))))
        wanted = model.step(memory, [Past(before.flatten(0, 1).transpose(0, 1))], previous.view(rows, 1))
        assert (found["logp"].flatten(0, 1) - wanted.logp).abs().max() < 1e-4
        assert (found["next_past_0"].flatten(0, 1).transpose(0, 1) - wanted.state[0].kept).abs().max() < 1e-4


@torch.no_grad()
def test_a_turn_after_the_end_changes_nothing(files):
    step = BeamStep(files.encoder, Beam(3, n_best=2), 8)
    memory = files.encoder(*seen(3).values())
    out, going = Begin(step)(memory[0]), True
    while going: *out, score, place, going = step(*out, *memory)
    again = step(*out, *memory)
    for before, after in zip([*out[:6], score, place], [*again[:6], *again[-3:-1]]): assert torch.equal(before, after)


GOLDEN = Path(__file__).parent / "golden"
recorded = json.loads((GOLDEN / "reference_a.json").read_text())
KEYS = [key for key in recorded["beams"] if not key.startswith("e2e")]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Files:
    """The captioner whose published code's outputs are recorded."""
    folder = tmp_path_factory.mktemp("reference")
    torch.save({"model_state_dict": drawn_file(recorded, recorded["param_names"])}, folder / "drawn.pth")
    c = recorded["config"]
    model, _ = import_official(folder / "drawn.pth", Vocab(recorded["words"]), tuple(c["num_exp_enc_list"]), c["num_heads"])
    return Files(model.eval(), folder, regions=9)


@pytest.mark.parametrize("key", [pytest.param(key, marks=() if key == "beam5_max20" else measured) for key in KEYS])
def test_the_published_search(reference, key):
    wanted, (size, limit) = recorded["beams"][key], (int("".join(filter(str.isdigit, part))) for part in key.split("_"))
    run = reference.caption(Beam(size, n_best=len(wanted["ids"][0]), style="official"), limit, forbidden=())
    x = torch.from_numpy(np.load(GOLDEN / "reference_a.npz")["features"])
    found = run(features=x, real=torch.ones(x.shape[:2], dtype=torch.bool))
    for image, rows in enumerate(wanted["ids"]):
        for n, ids in enumerate(rows):
            assert found["tokens"][image, n, :len(ids) - 1].tolist() == ids[1:], (image, n)          # theirs begin with SOS
            assert np.abs(found["logp"][image, n, :len(ids) - 1].numpy() - wanted["logp"][image][n][1:]).max() < 1e-4


CLASSICS = {"Transformer": dict(dim=16, heads=2, feed_forward=24, encoder_layers=1, decoder_layers=1, K=2),
            "ShowTell": dict(words=8, hidden=16), "ShowAttendTell": dict(words=8, hidden=16, attention=12),
            "HardAttendTell": dict(words=8, hidden=16, attention=12), "ActorCritic": dict(words=8, hidden=16, attention=12, critic=8)}


@pytest.mark.parametrize("size", [pytest.param(1, marks=measured), 3, pytest.param(5, marks=measured)])
@pytest.mark.parametrize("kind", [kind if kind == "ShowAttendTell" else pytest.param(kind, marks=measured) for kind in CLASSICS])
def test_other_captioners(kind, size, tmp_path):
    config, build = kind_of(kind, "test")
    seed_all(0)
    model = sharpened(build(config(features=12, max_len=11, **CLASSICS[kind]), Vocab(["EOS", "PAD", "SOS", "UNK", *WORDS])))
    how = Beam(size, n_best=size)
    says_what_decode_says(Files(model, tmp_path).caption(how, 11), model, how, 11, 12)


def test_what_is_no_model_of_its_own_says_so():
    model = small()
    for other in (Ensemble([model, model]), Recompute(model)):
        with pytest.raises(UserError, match=f"a {type(other).__name__} cannot be exported"): Encoder(other, REGIONS)


def test_half_precision(tmp_path):
    done = export(small(dim=16), tmp_path, Beam(2), precision="fp16", graphs=("caption",), regions=REGIONS)
    assert done["check"]["same"] == 1 and done["check"]["logp"] < 0.05
    weights = [tensor for tensor in onnx.load(tmp_path / "caption.onnx").graph.initializer if np.prod(tensor.dims) > 100]
    kinds = {tensor.data_type for tensor in weights}
    assert onnx.TensorProto.FLOAT16 in kinds and onnx.TensorProto.FLOAT not in kinds
    nothing = seen(2) | {"real": torch.zeros(2, REGIONS, dtype=torch.bool)}
    assert all(value.isfinite().all() for value in Run(tmp_path / "caption.onnx")(**nothing).values())


def test_show_and_tell_in_half_precision_does_not_crash_the_runtime(tmp_path):
    """In a process of its own: ONNX Runtime 1.31 ends with a segmentation fault if its MatmulTransposeFusion sees this step."""
    config, build = kind_of("ShowTell", "test")
    seed_all(0)
    model = build(config(features=12, max_len=11, **CLASSICS["ShowTell"]), Vocab(["EOS", "PAD", "SOS", "UNK", *WORDS])).half().eval()
    path = to_onnx(BeamStep(Encoder(model, REGIONS), Beam(3), 11), tmp_path / "beam_step.onnx")
    for use in ("expnet.deploy.graphs import Run as Opened", "expnet.deploy.runtime import Session as Opened"):
        subprocess.run([sys.executable, "-c", f"from {use}; Opened({str(path)!r})"], check=True)


# --- larger models (EXPNET_MEASURE=1)

@measured
@pytest.mark.parametrize("preset", ["tiny", "coco"])
def test_presets(preset, tmp_path):
    features, regions, words = {"tiny": (128, 64, 96), "coco": (1536, 144, 9996)}[preset]
    seed_all(0)
    vocab = Vocab(["EOS", "PAD", "SOS", "UNK", *(f"w{i}" for i in range(words))])
    model = sharpened(ExpansionNet(ExpansionNetConfig.preset(preset, features), vocab))
    exported = Files(model, tmp_path, regions)
    for size in (1, 3, 5):
        how = Beam(size, n_best=size)
        says_what_decode_says(exported.caption(how, 20), model, how, 20, features, regions)


@pytest.mark.skipif(not WORLD, reason="set EXPNET_WORLD to a folder of `expnet quickstart`: minutes")
@torch.no_grad()
def test_trained_world(tmp_path):
    """Prints what the chapter of precisions tabulates."""
    model, items = load(Path(WORLD) / "model"), open_data(Path(WORLD) / "data").items
    test, val = ([item for item in items if item.split == split] for split in ("test", "val"))
    pixels, calibration = (pixels_of([item.path for item in part], model.backbone.prepare) for part in (test, val[:64]))
    files = Files(model, tmp_path, None)
    hyps = lambda how, part: decode(model, files.encoder.see(part)[0], how, 20, [words_only(model.vocab)])
    for size in (1, 3, 5):
        how = Beam(size, n_best=size)
        run = files.caption(how, 20)
        for part in (pixels[:1], pixels[1:4], pixels[4:10]): same(run(pixels=part), hyps(how, part), model.vocab.pad)
    runs = {"fp32": run}
    for name, examples in (("int8", None), ("qdq", calibration.split(1))):
        encoder = quantise(files.encoder_file, tmp_path / f"{name}.onnx", examples)
        parts = {part: tmp_path / "pool5" / f"{part}.onnx" for part in ("beam_step", "begin", "finish")}
        runs[name] = Run(one_call(encoder, **parts, path=tmp_path / f"caption_{name}.onnx"))
    export(model, tmp_path / "half", how, precision="fp16", graphs=("caption",))
    runs["fp16"] = Run(tmp_path / "half" / "caption.onnx")
    said = {"torch": [model.vocab.decode(row[0]) for part in pixels.split(50) for row in hyps(how, part).tokens]}
    for name, run in runs.items():
        found = [run(pixels=part) for part in pixels.split(50)]
        assert all(part[kind].isfinite().all() for part in found for kind in ("logp", "score")), name
        said[name] = [model.vocab.decode(row[0]) for part in found for row in part["tokens"]]
    table = {name: {"same": float(np.mean([a == b for a, b in zip(texts, said["torch"])])),
                    "CIDEr-D": evaluate(dict(zip((item.id for item in test), texts)), test).totals["CIDEr-D"]} for name, texts in said.items()}
    print(json.dumps(table, indent=1))
    assert table["fp32"]["same"] == 1 and table["fp16"]["same"] >= 0.95
    assert table["int8"]["CIDEr-D"] > 0.99 * table["fp32"]["CIDEr-D"]
