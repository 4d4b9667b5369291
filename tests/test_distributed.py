"""Two processes that torchrun started on a CPU do what one process does: same losses, same scores, and they may take turns."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from expnet.data.captions import load_items
from expnet.data.feature_store import FeatureStore
from expnet.models.backbone import make_backbone
from expnet.tools import read_jsonl
from expnet.train.recipes import extract, prepare_world

RUN = """
import json, os, sys
from expnet.models.backbone import make_backbone
from expnet.train.recipes import RECIPES, train
out, epochs, cut = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
losses = []
def watch(event):
    if event["event"] == "step":
        losses.append(event["loss"])
        if event["step"] == cut: raise SystemExit("cut")
how = RECIPES["tiny"].change(epochs=epochs, lr=2e-4, batch=5, accumulate=2, captions=2, warmup=5, validate=7, save_every=2, log_every=3)
try: train("data", out, how, "cpu", watch, backbone=make_backbone("shapes"))
finally:
    if losses: open(f"{out}.losses.json", "w").write(json.dumps(losses))
"""


def run(folder: Path, processes: int, out: str, epochs: int = 3, cut: int = 0) -> list[float]:
    """The losses of a run of the script by `processes` processes, begun or continued in the folder `out`."""
    (folder / "run.py").write_text(RUN)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] * (processes > 1)
    done = subprocess.run([sys.executable, *words, "run.py", out, str(epochs), str(cut)], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}, timeout=150)
    assert (done.returncode == 0) == (cut == 0), done.stderr[-3000:]
    return json.loads((folder / f"{out}.losses.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    prepare_world(folder / "data", n_train=64, n_val=7, n_test=1, n_pairs=1, n_counts=1)
    return folder


def test_two_processes_extract_and_learn_like_one(folder):
    """64 pictures in steps of 10 and parts of 5: no share is equal to another, and the last step has 4 pictures for 4 parts."""
    two = run(folder, 2, "two")
    extract(folder / "alone", make_backbone("shapes"), "cpu", load_items(folder / "data" / "items.jsonl"))
    stores = FeatureStore(folder / "data" / "features.h5"), FeatureStore(folder / "alone" / "features.h5")
    assert stores[0].ids == stores[1].ids and len(stores[0]) == 74
    assert abs(stores[0].read(stores[0].ids)[0].astype(float) - stores[1].read(stores[0].ids)[0]).max() < 2e-3
    one = run(folder, 1, "one")
    assert len(one) == len(two) == 4 * 3 * 7               # phases, epochs, steps
    assert max(abs(a - b) for a, b in zip(one[:20], two[:20])) < 1e-5
    histories = [[h for h in read_jsonl(folder / name / "xe" / "history.jsonl") if "epoch" in h] for name in ("one", "two")]
    assert [h["captions"] for h in histories[0]] == [h["captions"] for h in histories[1]]
    assert all(abs(a["CIDEr-D"] - b["CIDEr-D"]) < 1e-9 for a, b in zip(*histories))


def test_two_processes_continue_what_one_began(folder):
    begun = run(folder, 1, "both", cut=11)
    rest = run(folder, 2, "both")
    one = json.loads((folder / "one.losses.json").read_text())
    assert begun == one[:11]
    assert max(abs(a - b) for a, b in zip(rest[:11], one[10:])) < 1e-5      # the last state was written after 10 steps
