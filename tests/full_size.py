"""The published sizes with random weights: `python tests/full_size.py FOLDER` writes them, imports them, captions a picture, and measures.

Prints JSON: peak memory of import and of captioning in GiB (each in a process of its own), CPU seconds of one picture in fp32 and bf16."""
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
from expnet.data.pickles import write_vocabulary
from expnet.models.backbone import make_backbone
from expnet.models.expansionnet import ExpansionNet, ExpansionNetConfig
from expnet.models.official import export_official, import_official
from expnet.tools import seed_all, undrawn
from expnet.train.checkpoints import save_model

WORDS = sorted(["EOS", "PAD", "SOS", "UNK", "\n", *(f"word{i}" for i in range(9995))])


def write(folder: Path) -> None:
    """A checkpoint and a vocabulary in the published layout, and a picture."""
    seed_all(0)
    vocab = Vocab(WORDS)
    with undrawn(): model = ExpansionNet(ExpansionNetConfig(), vocab, make_backbone("swin/large", None))
    for weight in model.parameters(): torch.nn.init.uniform_(weight, -0.05, 0.05)
    export_official(folder / "rf_model.pth", model)
    write_vocabulary(folder / "demo_coco_tokens.pickle", vocab)
    Image.effect_noise((640, 480), 60).convert("RGB").save(folder / "photo.jpg")


def convert(folder: Path) -> None:
    """The checkpoint as a model folder."""
    model, report = import_official(folder / "rf_model.pth", folder / "demo_coco_tokens.pickle")
    assert report.used == 520 and report.complete and not report.unexpected, report
    save_model(folder / "official", model)


def say(folder: Path, dtype: torch.dtype | None = None) -> None:
    """Captions of the picture."""
    said = load(folder / "official", dtype=dtype).caption(folder / "photo.jpg", beam=5, n_best=5)
    assert len(said[0].captions) == 5


def compare(folder: Path, turns: int = 5) -> dict[str, float]:
    """Median CPU seconds of one picture, both precisions measured in turns."""
    models = {"fp32": load(folder / "official"), "bf16": load(folder / "official", dtype=torch.bfloat16)}
    spent = {name: [] for name in models}
    for turn in range(turns + 1):
        for name, model in models.items():
            began = time.process_time()
            model.caption(folder / "photo.jpg", beam=5, max_len=20)
            if turn: spent[name].append(time.process_time() - began)      # the first turn warms up
    return {name: median(values) for name, values in spent.items()}


def measure(folder: Path) -> dict[str, float]:
    """All figures, each step in a process of its own."""
    write(folder)
    found = {}
    for step in ("convert", "say", "say_bf16", "compare"):
        done = subprocess.run([sys.executable, __file__, str(folder), step], check=True, capture_output=True, text=True)
        found[step] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, step = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "measure"
    steps = {"convert": convert, "say": say, "say_bf16": lambda f: say(f, torch.bfloat16), "compare": compare, "measure": measure}
    result = steps[step](folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20      # Linux counts in KiB
    print(json.dumps(result if step in ("compare", "measure") else round(peak, 3)))
