"""The numbers of several trained models on one data folder, as lines for nbs/classics/flickr8k.json.

python tests/side_by_side.py DATA OUT.json "NAME=MODEL FOLDER" ...   (METEOR needs Java; one thread; CPU time)"""
import json
import sys
from pathlib import Path

import torch

from expnet.classics.side_by_side import measure, side_by_side, speed
from expnet.decode.search import Beam
from expnet.score.evaluate import pick
from expnet.train.checkpoints import load
from expnet.train.recipes import open_data

COLUMNS = ["weights", "BLEU-1", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr-D", "said once", "words", "latency", "throughput"]


def main(folder: str, out: str, *named: str) -> None:
    torch.set_num_threads(1)
    data, rows = open_data(folder), {}
    for name, model in (text.rsplit("=", 1) for text in named):
        model = load(model)
        numbers = measure(model, data, Beam(5), metrics=pick(("default", "METEOR")))[2] | speed(model, data)
        rows[name] = {key: round(value, 4) for key, value in numbers.items()}
    Path(out).write_text(json.dumps(rows, indent=1))
    print(side_by_side(rows, COLUMNS))


if __name__ == "__main__": main(*sys.argv[1:])
