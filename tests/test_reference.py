"""ExpansionNet v2 against recorded outputs of the published code on weights that are drawn from their names."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import drawn_file

from expnet.data.captions import Vocab
from expnet.decode.search import Beam, decode
from expnet.models.expansionnet import ExpansionNet
from expnet.models.official import import_official
from expnet.train.losses import xe

GOLDEN = Path(__file__).parent / "golden"
recorded = json.loads((GOLDEN / "reference_a.json").read_text())
arrays = np.load(GOLDEN / "reference_a.npz")


c = recorded["config"]
GROUPS, HEADS = tuple(c["num_exp_enc_list"]), c["num_heads"]             # what no file tells


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ExpansionNet:
    """The published tensors, drawn from their names and stored as the original's training script does, come in by the importer."""
    path = tmp_path_factory.mktemp("official") / "drawn.pth"
    torch.save({"model_state_dict": drawn_file(recorded, recorded["param_names"]), "optimizer_state_dict": {"state": {}},
                "scheduler_state_dict": {"lr_lambdas": [None]}, "data_loader_state_dict": {}}, path)
    net, report = import_official(path, Vocab(recorded["words"]), GROUPS, HEADS)
    assert (report.used, report.missing, report.unexpected, report.mismatched) == (len(recorded["param_names"]), (), (), ())
    sizes = {"features": "feat", "dim": "d_model", "feed_forward": "ff", "encoder_layers": "N_enc", "decoder_layers": "N_dec",
             "dynamic": "num_exp_dec", "max_len": "max_seq_len"}
    assert {ours: getattr(net.config, ours) for ours in sizes} == {ours: c[theirs] for ours, theirs in sizes.items()}
    return net


def real_part(pads: np.ndarray, length: int) -> torch.Tensor:
    """Mask [B, length], False for the trailing `pads` of each row."""
    return torch.arange(length) < (length - torch.from_numpy(pads.astype(np.int64)))[:, None]


@torch.no_grad()
def test_memory_and_logits(model):
    x, mask = torch.from_numpy(arrays["features"]), real_part(arrays["region_pads"], 9)
    tokens, real = torch.from_numpy(arrays["tokens"]).long(), real_part(arrays["token_pads"], 7)
    memory = model.encode(x, mask)
    logits = model(memory, tokens, real)
    assert (memory.x - torch.from_numpy(arrays["memory"]))[mask].abs().max() < 1e-5
    assert (logits - torch.from_numpy(arrays["logits"]))[real].abs().max() < 1e-5


def test_smoothed_loss_and_its_gradient(model):
    logits = torch.from_numpy(arrays["logits"])[:, :-1].clone().requires_grad_()
    loss = xe(logits, torch.from_numpy(arrays["loss_targets"]).long(), model.vocab.pad, 0.1)
    gradient, = torch.autograd.grad(loss, logits)
    assert abs(loss.item() - float(arrays["loss"])) < 1e-5
    assert (gradient - torch.from_numpy(arrays["loss_grad"])).abs().max() < 1e-5


@pytest.mark.parametrize("key", [k for k in recorded["beams"] if not k.startswith("e2e")])
def test_beams_token_for_token(model, key):
    size, limit = (int("".join(filter(str.isdigit, part))) for part in key.split("_"))
    wanted = recorded["beams"][key]
    memory = model.encode(torch.from_numpy(arrays["features"]))
    hyps = decode(model, memory, Beam(size, n_best=len(wanted["ids"][0]), style="official"), max_len=limit)
    for image, rows in enumerate(wanted["ids"]):
        for n, ids in enumerate(rows):
            length = len(ids) - 1                                            # theirs begin with SOS
            assert hyps.tokens[image, n, :length].tolist() == ids[1:], (image, n)
            assert np.abs(hyps.logp[image, n, :length].numpy() - wanted["logp"][image][n][1:]).max() < 1e-5
