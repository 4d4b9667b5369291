"""ExpansionNet v2 against recorded outputs of the published code on weights that are drawn from their names."""
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from expnet.data.captions import Vocab
from expnet.decode.search import Beam, decode
from expnet.models.expansionnet import ExpansionNet, ExpansionNetConfig
from expnet.train.losses import xe

GOLDEN = Path(__file__).parent / "golden"
recorded = json.loads((GOLDEN / "reference_a.json").read_text())
arrays = np.load(GOLDEN / "reference_a.npz")


def drawn(name: str, shape: list[int]) -> torch.Tensor:
    """The weight called `name` in the published code, drawn as golden's description says."""
    x = np.random.RandomState((zlib.crc32(name.encode()) + recorded["seed"]) % 2**32).standard_normal(shape)
    if len(shape) > 1:
        table = any(part in name for part in ("exp_vectors", "embed.weight", "pos_encoder"))
        x = x / 2 if table else x / np.sqrt(shape[-1])
        if name == "vocab_linear.weight": x = x * 3
    else:
        x = 1 + 0.1 * x if "norm" in name and name.endswith("weight") else 0.1 * x
        if name == "vocab_linear.bias": x[recorded["words"].index("EOS")] += 3.5
    return torch.from_numpy(x.astype(np.float32))


# our name -> the published names whose tensors, stacked along the first axis, it holds
WHOLE = {"input": ["input_linear"], "head": ["vocab_linear"], "encoder_fusion.reduce": ["enc_reduce_group"],
         "encoder_fusion.norm": ["enc_reduce_norm"], "decoder_fusion.reduce": ["dec_reduce_group"], "decoder_fusion.norm": ["dec_reduce_norm"],
         "words.embed": ["out_embedder.embed"], "words.position": ["pos_encoder"]}
LAYER = {"feed_forward.0": ["ff.linear_1"], "feed_forward.3": ["ff.linear_2"], "norm1": ["norm_1"], "norm2": ["norm_2"], "norm3": ["norm_3"],
         "cross.query": ["mha.Wq"], "cross.key": ["mha.Wk"], "cross.value": ["mha.Wv"], "cross.out": ["mha.out_linear"],
         "static.query": ["stc_exp.query_exp_vectors.weight"], "static.bias": ["stc_exp.bias_exp_vectors.weight"],
         "dynamic.query": ["dyn_exp.query_exp_vectors.weight"], "dynamic.bias": ["dyn_exp.bias_exp_vectors.weight"],
         "static.project": [f"stc_exp.{n}_embed" for n in ("key", "class_a", "class_b", "selector")],
         "dynamic.project": [f"dyn_exp.{n}" for n in ("cond_embed", "key_linear", "class_a_embed", "class_b_embed", "selector_embed")]}


def sources(name: str) -> list[str]:
    """The published names of our parameter `name`."""
    part, _, kind = name.rpartition(".")
    if part in WHOLE: return [f"{n}.{kind}" for n in WHOLE[part]]
    side, layer, rest = name.split(".", 2)
    if rest in LAYER: return [f"{side}s.{layer}.{n}" for n in LAYER[rest]]
    part, _, kind = rest.rpartition(".")
    return [f"{side}s.{layer}.{n}.{kind}" for n in LAYER[part]]


@pytest.fixture(scope="module")
def model() -> ExpansionNet:
    c = recorded["config"]
    config = ExpansionNetConfig(c["feat"], c["d_model"], c["num_heads"], c["ff"], c["N_enc"], c["N_dec"], tuple(c["num_exp_enc_list"]),
                                c["num_exp_dec"], c["max_seq_len"], dropout=0.0)
    net = ExpansionNet(config, Vocab(recorded["words"])).eval()
    used = []
    for name, weight in net.named_parameters():
        used += sources(name)
        weight.data.copy_(torch.cat([drawn(n, recorded["param_names"][n]) for n in sources(name)]).view_as(weight))
    assert sorted(used) == sorted(recorded["param_names"])               # every published tensor, each exactly once
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
