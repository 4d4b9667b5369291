"""A training run that is killed without warning and continued ends with the weights of a run that was left alone."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from expnet.models.backbone import make_backbone
from expnet.train.checkpoints import load_state
from expnet.train.recipes import extract, prepare_world

RUN = """
import sys
from dataclasses import replace
from expnet.train.recipes import RECIPES, train
from expnet.tools import seed_all
seed_all(0)
from expnet.models.expansionnet import ExpansionNetConfig
preset = ExpansionNetConfig.preset
ExpansionNetConfig.preset = lambda *words, **more: replace(preset(*words, **more), dropout=0.2)     # so that random numbers matter
how = RECIPES["tiny"]
train("data", sys.argv[1], replace(how, phase=replace(how.phase, epochs=3, batch_size=4, warmup=5, validate=4, save_every=2, log_every=3)))
"""


def start(folder: Path, out: str) -> subprocess.Popen:
    """A training process in `folder` that writes to `out`."""
    return subprocess.Popen([sys.executable, "-c", RUN, out], cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    prepare_world(folder / "data", n_train=24, n_val=4, n_test=4, n_pairs=1, n_counts=1)
    extract(folder / "data", make_backbone("shapes"))
    assert start(folder, "through").wait(120) == 0
    return folder


@pytest.mark.parametrize("after", [2, 8])
def test_kill_and_continue(folder, after):
    process, out = start(folder, f"killed{after}"), folder / f"killed{after}"
    until = time.time() + 120
    while process.poll() is None and time.time() < until:          # wait for a state of at least `after` steps, then kill
        if (out / "state.pt").exists() and load_state(out / "state.pt")["counters"]["step"] >= after: break
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert start(folder, out.name).wait(120) == 0
    one, two = (load_state(folder / name / "state.pt") for name in ("through", out.name))
    assert [n for n, w in one["model"].items() if not w.equal(two["model"][n])] == []
    assert one["counters"] == two["counters"]
    best = load_file(folder / "through" / "model.safetensors")
    assert [n for n, w in load_file(out / "model.safetensors").items() if not w.equal(best[n])] == []
