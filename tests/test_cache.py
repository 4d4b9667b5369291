"""Decoding with the cache says what the full recompute says, and the maps of a step are those of the full forward pass."""
import pytest
import torch
from torch.nn import functional as F

from expnet.data.vocabulary import Vocab
from expnet.decode.recompute import Recompute
from expnet.decode.search import Beam, decode
from expnet.deploy.packed import pack
from expnet.models.captioner import select, unroll
from expnet.models.dynamic_expansion import causal
from expnet.models.expansionnet import ExpansionNet, ExpansionNetConfig
from expnet.models.static_expansion import normalise

vocab = Vocab(["EOS", "PAD", "SOS", "UNK", *"abcdefghijklmnopqrstuvwxyz"])


@pytest.fixture(scope="module")
def model() -> ExpansionNet:
    """Three layers each, random weights, with opinions and a liking for endings."""
    torch.manual_seed(3)
    config = ExpansionNetConfig(features=24, dim=64, heads=4, feed_forward=128, static=(4, 8, 16), dynamic=8, max_len=24)
    net = ExpansionNet(config, vocab).eval()
    with torch.no_grad():
        for layer in net.decoder:                                         # pictures matter
            layer.cross.out.weight.mul_(2)
            layer.cross.query.weight.mul_(3)
        net.head.weight.mul_(2)
        net.words.position.weight.normal_()                               # places differ, so words do not just repeat
        net.head.bias[vocab.eos] += 2
    return net


@pytest.fixture(scope="module")
def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    """24 pictures of up to ten regions."""
    torch.manual_seed(4)
    return torch.randn(24, 10, 24), torch.arange(10) < torch.randint(4, 11, (24, 1))


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("kind, eps", [("float32", 1e-5), ("float64", 1e-10), ("packed", 1e-5)])
@torch.no_grad()
def test_cached_equals_recomputed(model, pictures, size, kind, eps):
    x, mask = pictures
    if kind == "float64": model, x = model.double(), x.double()
    fast = pack(model) if kind == "packed" else model
    try:
        again, cached = (decode(m, m.encode(x, mask), Beam(size, n_best=size), max_len=20) for m in (Recompute(model), fast))
    finally: model.float()
    lengths = (again.tokens != vocab.pad).sum(-1)
    assert len(lengths.unique()) >= 4                                     # EOS at different steps
    assert torch.equal(again.tokens, cached.tokens)
    assert (again.logp - cached.logp).abs().max() < eps


@torch.no_grad()
def test_log_probabilities_of_given_words(model, pictures):
    x, mask, tokens = pictures[0].double(), pictures[1], torch.randint(4, len(vocab), (48, 20))
    try:
        model.double()
        again, cached = (unroll(m, m.encode(x, mask), tokens) for m in (Recompute(model), model))
        at_once = model(model.encode(x, mask), tokens).log_softmax(-1)
    finally: model.float()
    assert (again - cached).abs().max() < 1e-10 and (again - at_once).abs().max() < 1e-10


@torch.no_grad()
def test_maps_of_a_step_are_those_of_the_full_pass(model, pictures):
    x, mask = pictures[0][:3], pictures[1][:3]
    memory, tokens = model.encode(x, mask), torch.randint(4, len(vocab), (6, 7))
    state, seen = select(model.start(memory), torch.tensor([0, 0, 1, 1, 2, 2])), []
    for t in range(7):
        step = model.step(memory, state, tokens[:, t:t + 1], look=True)
        assert step.aux["words"].shape[-1] == t + 1
        state, seen = step.state, [*seen, step.aux]
    keep, outputs = causal(torch.ones(6, 7, dtype=torch.bool)), [model.words(tokens)]
    for layer, kv in zip(model.decoder, memory.cache): outputs.append(layer(outputs[-1], keep, kv, memory.mask))
    y, block = outputs[-2], layer.dynamic
    cond, key, a, b, selector = block.project(layer.norm1(y)).chunk(5, -1)
    z, gate = block.scores(cond, key), torch.sigmoid(selector).mean(-1)[..., None]
    expansion = words = 0
    for signed, share in ((F.relu(z), gate), (F.relu(-z), 1 - gate)):
        W = normalise((signed.permute(0, 3, 1, 2) * keep[..., None]).flatten(2)).unflatten(2, (7, 8))
        P = normalise(signed * keep[:, :, None])
        expansion, words = expansion + share * W.sum(2), words + share * torch.einsum("rtse,rseu->rtu", W, P)
    z = layer.norm2(y + block(layer.norm1(y), keep))
    q, k = (v.unflatten(-1, (4, 16)).transpose(1, 2) for v in (layer.cross.query(z), layer.cross.key(memory.x).repeat_interleave(2, 0)))
    hidden = ~memory.mask.repeat_interleave(2, 0)[:, None, None]
    attention = (q @ k.transpose(2, 3) / 4).masked_fill(hidden, -torch.inf).softmax(-1).mean(1)
    for t, aux in enumerate(seen):
        assert (aux["attention"][:, 0] - attention[:, t]).abs().max() < 1e-5
        assert (aux["expansion"][:, 0] - expansion[:, t]).abs().max() < 1e-5
        assert (aux["words"][:, 0] - words[:, t, :t + 1]).abs().max() < 1e-5
    assert model.step(memory, model.start(memory), tokens[::2, :1]).aux == {}


@torch.no_grad()
def test_the_state_is_reordered_when_it_is_read(model, pictures):
    memory, tokens = model.encode(pictures[0][:2]), torch.randint(4, len(vocab), (6, 3))
    state = select(model.start(memory), torch.tensor([0, 0, 0, 1, 1, 1]))
    state = model.step(memory, state, tokens[:, :1]).state
    first, second = torch.tensor([2, 2, 0, 3, 5, 4]), torch.tensor([1, 0, 2, 5, 3, 3])
    twice = model.step(memory, select(select(state, first), second), tokens[:, 1:2])
    once = model.step(memory, select(state, first[second]), tokens[:, 1:2])
    assert torch.equal(twice.logp, once.logp)
    other = model.step(memory, state, tokens[:, 2:])                      # the same state can be continued twice
    assert torch.equal(other.logp, model.step(memory, state, tokens[:, 2:]).logp)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_padding_stays_finite_in_half_precision(model, pictures, dtype):
    x, mask = pictures[0][:4].to(dtype), pictures[1][:4].clone()
    mask[1] = False                                                       # a picture of nothing but padding
    tokens = torch.tensor([[vocab.sos, 5, 6, vocab.pad, vocab.pad]] * 4)
    try:
        model.to(dtype)
        memory = model.encode(x, mask)
        assert memory.x.isfinite().all()
        assert model(memory, tokens).isfinite().all()
        assert unroll(model, memory, tokens).isfinite().all()
    finally: model.float()
