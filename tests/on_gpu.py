"""How fast the published sizes are on a CUDA GPU, with random weights: `python tests/on_gpu.py` prints a line of JSON for each figure.

Wall-clock medians after a warm-up, the device waited for. `coco` is the recipe; a step is one call of `Learner.step`."""
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

from expnet.data.batches import Batch
from expnet.data.vocabulary import SPECIALS, Vocab
from expnet.decode.recompute import Recompute
from expnet.decode.search import Beam, decode
from expnet.models.backbone import make_backbone
from expnet.models.expansionnet import ExpansionNet, ExpansionNetConfig
from expnet.tools import seed_all
from expnet.train.recipes import RECIPES
from expnet.train.step import Learner
from toy import Cheap

PHASES = {phase.name: phase for phase in RECIPES["coco"].phases}
PICTURES, CAPTIONS = 113_287, 566_747                  # of the training split of COCO


def show(what: str, **numbers) -> None: print(json.dumps({"what": what} | numbers), flush=True)


def net(device: str) -> ExpansionNet:
    "ExpansionNet v2 with Swin-L at 384 pixels, 10,000 words."
    seed_all(0)
    vocab = Vocab([*SPECIALS, *(f"w{i}" for i in range(9_996))])
    return ExpansionNet(ExpansionNetConfig(), vocab, make_backbone("swin/large", None)).to(device).eval()


def seconds(step: Callable[[], object], turns: int) -> float:
    "Median over `turns` calls, after two that do not count."
    spent = []
    for _ in range(turns + 2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent[2:])


def peak_gb(step: Callable[[], object]) -> float:
    "The most memory of the GPU that tensors take in one call."
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() / 1e9


@torch.no_grad()
def features(model: ExpansionNet, batch: int = 64) -> None:
    "Phase 1: pictures to regions."
    pixels = torch.randn(batch, 3, 384, 384, device="cuda", dtype=next(model.parameters()).dtype)
    spent = seconds(lambda: model.backbone(pixels), 5)
    show("features", dtype=str(pixels.dtype), pictures_a_second=batch / spent, minutes_for_coco=PICTURES / batch * spent / 60)


@torch.no_grad()
def captions(model: ExpansionNet, batch: int, beam: int = 5) -> None:
    "Pixels to words: 20 places, none ends early; the cache, and the whole decoder at every word."
    pixels = torch.randn(batch, 3, 384, 384, device="cuda", dtype=next(model.parameters()).dtype)
    say = lambda of: decode(of, of.encode(pixels), Beam(beam), max_len=20)
    ways = {"cache": model} | ({"recompute": Recompute(model)} if pixels.dtype == torch.float32 else {})
    spent = {name: seconds(lambda: say(of), 3) for name, of in ways.items()}
    show("captions", dtype=str(pixels.dtype), batch=batch, beam=beam, a_second=batch / spent["cache"], **spent)


def steps(model: ExpansionNet, name: str) -> None:
    "A training step of a phase of the recipe `coco`, at the size that is computed at a time."
    phase, ids = PHASES[name], [str(i) for i in range(PHASES[name].batch * PHASES[name].accumulate)]
    x = torch.randn(len(ids), 3, 384, 384) if phase.end_to_end else torch.randn(len(ids), 144, 1536)
    tokens = torch.randint(4, 10_000, (len(ids) * phase.captions, 14))
    tokens[:, 0], tokens[:, -1] = model.vocab.sos, model.vocab.eos
    batch = Batch(ids, x, torch.ones(len(ids), 144, dtype=torch.bool), tokens)
    learner = Learner(model, phase, "cuda", Cheap())
    step = lambda: learner.step(batch, 1e-9)
    spent = seconds(step, 3)
    samples = CAPTIONS if phase.loss == "xe" else PICTURES
    show(name, precision=phase.precision, samples=len(ids), seconds_a_step=spent, peak_gb=peak_gb(step),
         hours_of_steps_on_coco=phase.epochs * samples / len(ids) * spent / 3600)


if __name__ == "__main__":
    if not torch.cuda.is_available(): sys.exit("tests/on_gpu.py: no CUDA GPU is visible")
    show("device", name=torch.cuda.get_device_name(), torch=torch.__version__)
    model = net("cuda")
    for batch in (1, 32): captions(model, batch)
    features(model)
    for name in ("xe", "xe_end_to_end", "scst", "scst_end_to_end"): steps(model, name)
    half = model.to(torch.bfloat16).eval()
    for batch in (1, 32): captions(half, batch)
    features(half)
