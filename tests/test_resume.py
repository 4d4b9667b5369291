"""A training run that is killed without warning and continued ends with the weights of a run that was left alone."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from expnet.data.feature_store import FeatureStore
from expnet.models.backbone import make_backbone
from expnet.tools import read_jsonl
from expnet.train.checkpoints import load_state
from expnet.train.recipes import extract, prepare_world

RUN = """
import os, sys, time
import expnet.train.checkpoints as checkpoints
from dataclasses import replace
from expnet.train.recipes import RECIPES, Extract, Recipe, train

plain = checkpoints.torch.save
def slow(state, path):                                   # half of the bytes, a pause long enough to be killed in, then all of them
    plain(state, path)
    if os.environ.get("SLOW"):
        whole = open(path, "rb").read()
        open(path, "wb").write(whole[:len(whole) // 2])
        time.sleep(0.3)
        open(path, "wb").write(whole)
checkpoints.torch.save = slow

how = RECIPES["tiny"].change(epochs=2, lr=2e-3, batch=4, captions=2, warmup=5, validate=4, save_every=2, log_every=3, dropout=0.2, samples=2, sample_len=8)
train("data", sys.argv[1], how, "cpu")
print("done")
"""
PHASES = ("xe", "xe_end_to_end", "scst", "scst_end_to_end")


def start(folder: Path, out: str, **environment: str) -> subprocess.Popen:
    """A training process in `folder` that writes to `out`."""
    return subprocess.Popen([sys.executable, "-c", RUN, out], cwd=folder, stdout=subprocess.DEVNULL,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    prepare_world(folder / "data", n_train=16, n_val=4, n_test=4, n_pairs=1, n_counts=1)
    extract(folder / "data", make_backbone("shapes"))
    assert start(folder, "through").wait(240) == 0
    return folder


def steps(out: Path, phase: str) -> int:
    """Steps of `phase` in the newest state; -1 if there is none."""
    return load_state(out / phase / "state.pt")["counters"]["step"] if (out / phase / "state.pt").exists() else -1


MOMENTS = {"in an epoch": lambda out: steps(out, "xe") >= 2,
           "while a state is written": lambda out: steps(out, "xe") >= 4 and any((out / "xe").glob(".state.pt.*.part")),
           "between phases": lambda out: (out / "xe" / "phase.json").exists(),
           "with a learning backbone": lambda out: steps(out, "xe_end_to_end") >= 2,
           "in reinforcement learning": lambda out: steps(out, "scst") >= 2}


def kill(folder: Path, out: Path, moment: str) -> None:
    """Go on with the run in `out` and kill it at the moment called `moment`."""
    slow = {"SLOW": "1"} if "written" in moment else {}
    process, until = start(folder, out.name, **slow), time.time() + 240
    while process.poll() is None and time.time() < until and not MOMENTS[moment](out): time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    if slow: assert list((out / "xe").glob(".state.pt.*.part")), "not killed while writing"


def test_killed_five_times_and_continued(folder):
    out = folder / "killed"
    for moment in MOMENTS: kill(folder, out, moment)
    assert start(folder, out.name).wait(240) == 0
    assert not list(out.rglob("*.part"))
    for phase in PHASES:
        one, two = (folder / name / phase for name in ("through", out.name))
        assert read_jsonl(one / "history.jsonl") == read_jsonl(two / "history.jsonl")
        states = [load_state(p / "state.pt") for p in (one, two)]
        assert [n for n, w in states[0]["model"].items() if not w.equal(states[1]["model"][n])] == []
        assert states[0]["counters"] == states[1]["counters"]
    for file in ("model.safetensors", "backbone.safetensors"):
        best = load_file(folder / "through" / file)
        assert [n for n, w in load_file(out / file).items() if not w.equal(best[n])] == []
    stores = [FeatureStore(folder / name / "features_again" / "features.h5") for name in ("through", out.name)]
    assert (stores[0].read(stores[0].ids)[0] == stores[1].read(stores[0].ids)[0]).all()
