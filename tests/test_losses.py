"""The loss against its dense form, and the training step against the same step as the published code writes it."""
import os
import statistics
import time

import pytest
import torch

from as_published import as_published, dense_loss
from expnet.data.vocabulary import Vocab
from expnet.models.expansionnet import ExpansionNet, ExpansionNetConfig
from expnet.tools import seed_all
from expnet.train.losses import xe
from expnet.train.optimisers import groups, make_optimiser

SPECIALS = ["EOS", "PAD", "SOS", "UNK"]
measured = pytest.mark.skipif(not os.environ.get("EXPNET_MEASURE"), reason="set EXPNET_MEASURE=1 to measure time and memory")


def net(words: int, dropout: float, **sizes) -> ExpansionNet:
    "A seeded model of a vocabulary of `words`; the published sizes unless given."
    seed_all(0)
    return ExpansionNet(ExpansionNetConfig(dropout=dropout, **sizes), Vocab([*SPECIALS, *(f"w{i}" for i in range(words - 4))]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_closed_form_equals_the_dense_one(smoothing, dtype):
    torch.manual_seed(0)
    logits, targets = (3 * torch.randn(4, 7, 50)).to(dtype).requires_grad_(), torch.randint(0, 50, (4, 7))
    targets[targets == 1] = 2
    targets[2, 4:] = 1
    wanted, got = dense_loss(logits.float(), targets, 1, smoothing), xe(logits, targets, 1, smoothing)
    assert abs(wanted.item() - got.item()) < 2e-5
    slopes = [torch.autograd.grad(loss, logits)[0].float() for loss in (wanted, got)]
    assert (slopes[0] - slopes[1]).abs().max() < (1e-6 if dtype == torch.float32 else 1e-3)


def test_the_published_way_computes_the_same():
    "Outputs and gradients of our blocks and of the published way: the comparison of speeds compares like with like."
    sizes = dict(features=12, dim=16, heads=2, feed_forward=24, encoder_layers=2, decoder_layers=2, static=(3, 5), dynamic=3, max_len=12)
    ours, theirs = net(20, 0.0, **sizes), as_published(net(20, 0.0, **sizes))
    x, mask = torch.randn(3, 6, 12), torch.arange(6) < torch.tensor([6, 4, 5])[:, None]
    tokens = torch.randint(4, 20, (6, 7))
    tokens[1, 5:] = tokens[4, 3:] = 1
    grads = []
    for model, loss in ((ours, xe), (theirs, dense_loss)):
        value = loss(model(model.encode(x, mask), tokens[:, :-1]), tokens[:, 1:], 1)
        grads.append([value.detach(), *torch.autograd.grad(value, list(model.parameters()))])
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(*grads))


def seconds(model: ExpansionNet, loss, optimiser, onednn: bool, batch) -> float:
    "CPU seconds of one training step, its large products by oneDNN or all by torch's usual library."
    torch.backends.mkldnn.enabled = onednn
    start = time.process_time()
    x, tokens = batch
    value = loss(model(model.encode(x), tokens[:, :-1]), tokens[:, 1:], model.vocab.pad)
    optimiser.zero_grad()
    value.backward()
    optimiser.step()
    return time.process_time() - start


@measured
def test_speed_of_a_training_step():
    torch.set_num_threads(1)
    x, tokens = torch.randn(16, 144, 1536), torch.randint(4, 10_000, (16, 16))
    for row in range(16):
        if row % 6: tokens[row, -(row % 6):] = 1
    for dropout in (0.3, 0.0):
        ours, theirs = net(10_000, dropout), as_published(net(10_000, dropout))
        optimiser = make_optimiser("radam", groups(ours, 2e-4))
        runs = {"here": (ours, xe, optimiser, True), "here, without oneDNN": (ours, xe, optimiser, False),
                "published": (theirs, dense_loss, torch.optim.RAdam(theirs.parameters(), 2e-4, betas=(0.9, 0.98), eps=1e-9, foreach=False), True)}
        found = {name: [] for name in runs}
        for turn in range(6):
            for name, run in runs.items(): found[name].append(seconds(*run, (x, tokens)))
        cost = {name: statistics.median(times[1:]) for name, times in found.items()}
        print(f"dropout {dropout}: CPU seconds a step:", {name: f"{s:.2f}" for name, s in cost.items()})
        if dropout: assert cost["published"] / cost["here"] >= 1.4
