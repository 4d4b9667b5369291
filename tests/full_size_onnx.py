"""The published sizes with random weights as ONNX: `python tests/full_size_onnx.py FOLDER` exports, runs and measures.

Prints JSON: CPU seconds, peak memory (GiB) and file sizes (MB) of each export, every one in a process of its own; the peak memory of one caption
by ONNX Runtime with each of the files, again in processes of their own; then CPU seconds of one picture, beam 5, 20 tokens, one thread, in one
process and in turns: plain torch that computes everything anew for each word, as published, this package in torch, and ONNX Runtime with each of
the files. The files stay in FOLDER, where tests/test_tensorrt.py hands them to NVIDIA's parser if EXPNET_FULL_SIZE names it."""
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from PIL import Image

from expnet import load
from expnet.data.vocabulary import Vocab
from expnet.data.images import Preprocess
from expnet.decode.recompute import Recompute
from expnet.decode.rules import words_only
from expnet.decode.search import Beam, decode
from expnet.deploy.export import export, pixels_of, quantise
from expnet.deploy.beam_step import one_call
from expnet.deploy.graphs import Encoder, Run
from expnet.models.backbone import make_backbone
from expnet.models.expansionnet import ExpansionNet, ExpansionNetConfig
from expnet.tools import undrawn, seed_all
from expnet.train.checkpoints import save_model

PRECISIONS = ("fp32", "fp16", "int8", "qdq")


def write(folder: Path) -> None:
    """A model folder, and a picture for the calibration."""
    seed_all(0)
    vocab = Vocab(["EOS", "PAD", "SOS", "UNK", *(f"word{i}" for i in range(9996))])
    with undrawn(): model = ExpansionNet(ExpansionNetConfig(), vocab, make_backbone("swin/large", None))
    for name, weight in model.named_parameters():
        if "norm" in name and name.endswith("weight"): torch.nn.init.ones_(weight)
        else: torch.nn.init.normal_(weight, std=0.02)
    save_model(folder / "model", model)
    Image.effect_noise((640, 480), 60).convert("RGB").save(folder / "photo.jpg")


def write_onnx(folder: Path, precision: str) -> dict:
    """One export: seconds, megabytes, and how the file compares with the model. Eight bits are made from the files in float32."""
    began, to = time.process_time(), folder / precision
    if precision in ("fp32", "fp16"):
        parts = ("encoder", "beam_step", "begin", "finish", "caption")
        check = export(load(folder / "model"), to, Beam(5), precision=precision, graphs=parts)["check"]
    else:
        to.mkdir(exist_ok=True)
        pixels = pixels_of(folder / "photo.jpg", Preprocess(384)) if precision == "qdq" else None
        encoder = quantise(folder / "fp32" / "encoder.onnx", to / "encoder.onnx", None if pixels is None else [pixels])
        one_call(encoder, **{part: folder / "fp32" / f"{part}.onnx" for part in ("beam_step", "begin", "finish")}, path=to / "caption.onnx")
        check = {}
    spent = time.process_time() - began
    if precision in ("fp32", "fp16"): export(load(folder / "model"), to, Beam(5), precision=precision, graphs=("step",))     # for TensorRT only
    return {"seconds": round(spent, 1), "MB": {path.name: round(path.stat().st_size / 1e6) for path in to.iterdir()}, **check}


def caption_alone(folder: Path, precision: str) -> dict:
    """One caption in ONNX Runtime and nothing else, so that the peak memory of this process is that of a program that captions."""
    pixels = pixels_of(folder / "photo.jpg", Preprocess(384))
    return {"words": int((Run(folder / precision / "caption.onnx")(pixels=pixels)["logp"][0, 0] != 0).sum())}


def compare(folder: Path, turns: int = 2) -> dict:
    """Median CPU seconds of one picture, every way in turn, and who says the same best sentence: random weights make near ties."""
    model = load(folder / "model")
    encoder, again = Encoder(model), Recompute(model)
    pixels = encoder.example()[0][:1]

    def published():
        with torch.backends.mkldnn.flags(enabled=False): return say(again)

    def say(captioner):
        with torch.no_grad(): x = ((pixels.float() / 255 - encoder.mean) / encoder.std).permute(0, 3, 1, 2)
        with torch.no_grad(): return decode(captioner, captioner.encode(x), Beam(5), 20, [words_only(model.vocab)]).tokens
    ways = {"published": published, "torch": lambda: say(model)}
    for name in PRECISIONS:
        run = Run(folder / name / "caption.onnx")
        ways[name] = lambda run=run: run(pixels=pixels)["tokens"]
    spent, said = {name: [] for name in ways}, {}
    for turn in range(turns + 1):
        for name, way in ways.items():
            began = time.process_time()
            said[name] = way()
            if turn: spent[name].append(time.process_time() - began)          # the first turn warms up
    alike = lambda a, b: all(x == y for x, y in zip(said[a][0, 0].tolist(), said[b][0, 0].tolist()))
    seconds = {name: round(median(values), 3) for name, values in spent.items()}
    return seconds | {"alike": {f"{a} {b}": alike(a, b) for a, b in (("published", "torch"), ("torch", "fp32"), ("fp32", "fp16"), ("fp32", "int8"), ("fp32", "qdq"))}}


def measure(folder: Path) -> dict:
    """All figures, each step in a process of its own."""
    write(folder)
    found = {}
    for step in (*PRECISIONS, *(f"caption-{name}" for name in PRECISIONS), "compare"):
        done = subprocess.run([sys.executable, __file__, str(folder), step], check=True, stdout=subprocess.PIPE, text=True)
        found[step] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, step = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "measure"
    if step.removeprefix("caption-") in PRECISIONS:
        result = write_onnx(folder, step) if step in PRECISIONS else caption_alone(folder, step.removeprefix("caption-"))
        result["peak GiB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)      # Linux counts in KiB
    else: result = {"measure": measure, "compare": compare, "write": write}[step](folder)
    print(json.dumps(result))
