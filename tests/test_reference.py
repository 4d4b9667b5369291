"""ExpansionNet v2 against recorded outputs of the published code on weights that are drawn from their names."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import drawn_file

from expnet.data.vocabulary import Vocab
from expnet.decode.search import Beam, decode
from expnet.models.captioner import Memory
from expnet.models.expansionnet import ExpansionNet
from expnet.models.official import import_official
from expnet.train.losses import xe

GOLDEN = Path(__file__).parent / "golden"
recorded = json.loads((GOLDEN / "reference_a.json").read_text())
arrays = np.load(GOLDEN / "reference_a.npz")
c = recorded["config"]
GROUPS, HEADS = tuple(c["num_exp_enc_list"]), c["num_heads"]             # what no file tells


def imported(folder: Path, names: dict[str, list[int]]) -> ExpansionNet:
    """The tensors `names`, drawn and stored as the original's training script does, come in by the importer."""
    path = folder / "drawn.pth"
    torch.save({"model_state_dict": drawn_file(recorded, names), "optimizer_state_dict": {"state": {}},
                "scheduler_state_dict": {"lr_lambdas": [None]}, "data_loader_state_dict": {}}, path)
    net, report = import_official(path, Vocab(recorded["words"]), GROUPS, HEADS)
    assert (report.missing, report.unexpected, report.mismatched) == ((), (), ())
    assert report.used == sum(not name.endswith(("attn_mask", "relative_position_index")) for name in names)
    return net


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ExpansionNet:
    """The captioner of stored features."""
    return imported(tmp_path_factory.mktemp("features"), recorded["param_names"])


@pytest.fixture(scope="module")
def end_to_end(tmp_path_factory) -> ExpansionNet:
    """The captioner of pictures, own Swin included."""
    return imported(tmp_path_factory.mktemp("pictures"), recorded["e2e_names"])


def test_sizes_are_read_off_the_tensors(model, end_to_end):
    sizes = {"features": "feat", "dim": "d_model", "feed_forward": "ff", "encoder_layers": "N_enc", "decoder_layers": "N_dec",
             "dynamic": "num_exp_dec", "max_len": "max_seq_len"}
    assert {ours: getattr(model.config, ours) for ours in sizes} == {ours: c[theirs] for ours, theirs in sizes.items()}
    swin, named = end_to_end.backbone.trunk.config, c["swin"]
    assert (swin.size, swin.patch, swin.dim, swin.window) == tuple(named[k] for k in ("img", "patch", "embed", "window"))
    assert [list(swin.depths), list(swin.heads)] == [named["depths"], named["heads"]]


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


def same_beams(net: ExpansionNet, memory: Memory, key: str) -> None:
    """The published search from `memory` gives the recorded sentences, token for token, and their log-probabilities."""
    size, limit = (int("".join(filter(str.isdigit, part))) for part in key.split("_")[-2:])
    wanted = recorded["beams"][key]
    hyps = decode(net, memory, Beam(size, n_best=len(wanted["ids"][0]), style="official"), max_len=limit)
    for image, rows in enumerate(wanted["ids"]):
        for n, ids in enumerate(rows):
            length = len(ids) - 1                                            # theirs begin with SOS
            assert hyps.tokens[image, n, :length].tolist() == ids[1:], (image, n)
            assert np.abs(hyps.logp[image, n, :length].numpy() - wanted["logp"][image][n][1:]).max() < 1e-5


@pytest.mark.parametrize("key", [k for k in recorded["beams"] if not k.startswith("e2e")])
def test_beams_token_for_token(model, key):
    same_beams(model, model.encode(torch.from_numpy(arrays["features"])), key)


@torch.no_grad()
def test_from_pictures_to_sentences(end_to_end):
    images = torch.from_numpy(arrays["images"]).float()
    memory = end_to_end.encode(images)
    assert (end_to_end.backbone(images) - torch.from_numpy(arrays["swin"])).abs().max() < 1e-5
    torch.testing.assert_close(memory.x, torch.from_numpy(arrays["e2e_memory"]), atol=1e-5, rtol=1e-5)
    same_beams(end_to_end, memory, "e2e_beam3_max20")
