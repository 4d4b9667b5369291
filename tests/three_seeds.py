"""What self-critical learning is worth on the drawn world: test CIDEr-D after each phase for three seeds of world, weights and order.

`python tests/three_seeds.py OUT` goes three times through the recipe of `expnet quickstart`, about seven CPU minutes each, and prints
the table. It continues where it was stopped, also in folders that quickstart wrote: OUT/0, OUT/1, OUT/2."""
import sys
from pathlib import Path
from statistics import mean, stdev

import torch

from expnet.models.backbone import make_backbone
from expnet.train.checkpoints import load
from expnet.train.recipes import evaluate_split, open_data, prepare_world, recipe, train
from expnet.train.step import Phase


def after_each_phase(out: Path, seed: int) -> dict[str, float]:
    "Test CIDEr-D, with three beams, of the model that each phase left."
    how, data = recipe("tiny").change(seed=seed), out / "data"
    if not (data / "items.jsonl").exists(): prepare_world(data, seed=seed)
    train(data, out / "model", how, "cpu", backbone=make_backbone("shapes"))
    names = [phase.name for phase in how.phases if isinstance(phase, Phase)]
    return {name: evaluate_split(load(out / "model" / name), open_data(data))[1].totals["CIDEr-D"] for name in names}


def row(name: str, values: list[float]) -> str:
    "A line of the table, with mean and spread."
    return " | ".join([f"| {name}", *(f"{v:.3f}" for v in values), f"{mean(values):.3f} ± {stdev(values):.3f} |"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = [after_each_phase(Path(sys.argv[1]) / str(seed), seed) for seed in range(3)]
    print("| after | seed 0 | seed 1 | seed 2 | mean ± spread |\n|---|---|---|---|---|")
    for name in found[0]: print(row(name, [scores[name] for scores in found]))
    print(row("rise from xe_end_to_end to the end", [s["scst_end_to_end"] - s["xe_end_to_end"] for s in found]))
