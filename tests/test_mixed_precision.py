"""Automatic mixed precision as a GPU does it, on a CPU: LayerNorms, softmaxes and sums come back in float32 beside bfloat16 products."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from expnet.data.batches import Batch
from expnet.data.vocabulary import SPECIALS, Vocab
from expnet.decode.search import Beam, decode
from expnet.models.backbone import make_backbone
from expnet.models.captioner import Captioner, teacher_forcing
from expnet.tools import seed_all
from expnet.train.checkpoints import kind_of
from expnet.train.recipes import recipe
from expnet.train.step import Learner, training_mode
from toy import Cheap

KINDS = {"ExpansionNet": {}, "ShowTell": {}, "ShowAttendTell": {}, "HardAttendTell": {}, "ActorCritic": {}, "Transformer": {}, "SATIC": {"K": 2}}
# CUDA's list of what is computed in float32 (torch.amp's operator reference); the CPU has another, shorter one
FLOAT32 = {"layer_norm", "group_norm", "softmax", "log_softmax", "sum", "prod", "cumsum", "cumprod", "exp", "log", "log1p", "pow", "rsqrt", "reciprocal",
           "norm", "softplus", "nll_loss", "cross_entropy", "mse_loss", "l1_loss", "smooth_l1_loss", "kl_div", "cosine_similarity"}


class LikeAGPU(TorchFunctionMode):
    """Within it and torch.autocast("cpu"), functions on CUDA's list see float32."""
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in FLOAT32 and torch.is_autocast_enabled("cpu"):
            wide = lambda x: x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x
            args, kwargs = [wide(x) for x in args], {name: wide(x) for name, x in kwargs.items()}
        return func(*args, **kwargs)


def tiny(kind: str) -> Captioner:
    seed_all(0)
    config, build = kind_of("Transformer" if kind == "SATIC" else kind, "test")
    return build(replace(config.preset("tiny", 128), **KINDS[kind]), Vocab([*SPECIALS, *(f"w{i}" for i in range(40))]), make_backbone("shapes")).eval()


def regions(*shape: int) -> torch.Tensor: return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_searches_in_half_precision(kind):
    """The words found have the scores that one pass in the same precision gives them, to bfloat16's 8 bits: but for a few, since
    a score of the expansion that rounding carries across 0 goes from the likes to the dislikes."""
    model, x = tiny(kind), regions(8, 64, 128)
    with LikeAGPU(), torch.autocast("cpu", torch.bfloat16):
        said = decode(model, memory := model.encode(x), Beam(3), max_len=12)
        rows = torch.cat([torch.full((8, 1), model.vocab.sos), said.tokens[:, 0]], 1)
        inputs, targets = teacher_forcing(rows, model.vocab, model.K)
        at_once = model(memory, inputs).float().log_softmax(-1)
    logp, spoken = at_once.gather(-1, targets[..., None])[:, :said.logp.shape[-1], 0], said.tokens[:, 0] != model.vocab.pad
    assert ((logp - said.logp[:, 0]).abs() < 0.1)[spoken].float().mean() >= 0.85


@pytest.mark.parametrize("name", ["xe", "xe_end_to_end", "scst", "scst_end_to_end"])
@pytest.mark.parametrize("kind", KINDS)
def test_phases_in_half_precision(kind, name):
    "Three steps on one batch: the loss on words falls, every weight that learns has moved and is float32. A critic learns in its own recipe."
    model = tiny(kind)
    phase = replace(next(p for p in recipe("tiny").phases if p.name == name), precision="bf16", batch=4, accumulate=2, captions=2, lr=1e-3, sample_len=8)
    x = torch.rand(8, 3, 64, 64) if phase.end_to_end else regions(8, 64, 128)
    tokens = torch.randint(4, 44, (16, 9))
    tokens[:, 0], tokens[:, -1] = model.vocab.sos, model.vocab.eos
    batch = Batch([str(i) for i in range(8)], x, torch.ones(8, 64, dtype=torch.bool), tokens)
    learner, before = Learner(model, phase, "cpu", Cheap()), {name: w.clone() for name, w in model.named_parameters()}
    training_mode(model)
    with LikeAGPU(): means = [learner.step(batch, phase.lr) for _ in range(3)]
    still = [name for name, w in model.named_parameters() if w.requires_grad and torch.equal(w, before[name]) and not name.startswith("critic")]
    assert not still and all(w.dtype == torch.float32 for w in model.parameters())
    if phase.loss == "xe": assert means[-1]["loss"] < means[0]["loss"]
    else: assert all(np.isfinite(m["reward"]) for m in means)
