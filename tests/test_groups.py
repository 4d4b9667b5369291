"""K words a step: parallel equals unrolled, nothing leaks, searches end, and K = 1 is the ordinary model."""
from dataclasses import replace

import pytest
import torch

from expnet.data.vocabulary import Vocab
from expnet.decode.groups import words_a_step
from expnet.decode.recompute import Recompute
from expnet.decode.rules import never
from expnet.decode.search import Beam, Greedy, decode
from expnet.deploy.packed import pack
from expnet.models.captioner import teacher_forcing, unroll
from expnet.models.dynamic_expansion import causal
from expnet.models.expansionnet import ExpansionNet, ExpansionNetConfig
from toy import Toy, captions, pictures

vocab = Vocab(["EOS", "PAD", "SOS", "UNK", *"abcdefghijkl"])
SIZES = ExpansionNetConfig(features=12, dim=32, heads=4, feed_forward=64, static=(2, 4), dynamic=4, max_len=15, dropout=0.0)


def model(K: int, **changes) -> ExpansionNet:
    """Three layers each, random weights, float64, a liking for endings."""
    torch.manual_seed(1)
    net = ExpansionNet(replace(SIZES, K=K, **changes), vocab).double().eval()
    with torch.no_grad():
        net.head.weight.mul_(3)
        net.head.bias[vocab.eos] += 1
    return net


@pytest.mark.parametrize("longest", [13, 14, 15])                           # with and without a partial last group
@pytest.mark.parametrize("K", [1, 2, 3, 4, 5, 6])
@torch.no_grad()
def test_parallel_equals_unrolled_equals_recomputed(K, longest):
    net, x, (inputs, targets) = model(K), torch.randn(4, 5, 12).double(), teacher_forcing(captions(vocab, 8, longest), vocab, K)
    real = targets != vocab.pad
    at_once = net(net.encode(x), inputs).log_softmax(-1)
    for other in (net, Recompute(net)):
        assert (at_once - unroll(other, other.encode(x), inputs))[real].abs().max() < 1e-10


@pytest.mark.parametrize("K", [1, 2, 3, 4])
def test_nothing_leaks_to_an_earlier_group(K):
    net, x = model(K), torch.randn(1, 5, 12).double()
    inputs, _ = teacher_forcing(captions(vocab, 1, 13), vocab, K)
    words = net.words(inputs).detach().requires_grad_()
    keep, outputs, memory = causal(torch.ones_like(inputs, dtype=torch.bool), K), [words], net.encode(x)
    for layer, kv in zip(net.decoder, memory.cache): outputs.append(layer(outputs[-1], keep, kv, memory.mask))
    logits = net.decoder_fusion(outputs[1:])[0]
    for t in range(inputs.shape[1]):
        gradient, = torch.autograd.grad(logits[t].square().sum(), words, retain_graph=True)
        reached = gradient[0].norm(dim=-1) > 0
        assert not reached[(t // K + 1) * K:].any()
        assert reached[:(t // K + 1) * K].all()                              # and its own group is seen whole


@torch.no_grad()
def test_one_word_a_step_is_the_ordinary_model_bit_for_bit():
    net, x, tokens = model(1), torch.randn(4, 5, 12).double(), captions(vocab, 8, 14)
    inputs, targets = teacher_forcing(tokens, vocab, 1)
    assert torch.equal(inputs, tokens[:, :-1]) and torch.equal(targets, tokens[:, 1:])
    same = words_a_step(net.float(), 1)
    assert torch.equal(same(same.encode(x.float()), inputs), net(net.encode(x.float()), inputs))
    real = inputs != vocab.pad
    lower = torch.ones(13, 13, dtype=torch.bool).tril() & real[:, :, None] & real[:, None]
    assert torch.equal(causal(real, 1), lower)


@pytest.mark.parametrize("K", [1, 2, 3, 4, 6])
@torch.no_grad()
def test_searches_with_groups(K):
    net, x = model(K), torch.randn(6, 5, 12).double()
    memory = net.encode(x)
    for how in (Greedy(), Beam(3, n_best=3)):
        hyps, again = decode(net, memory, how), decode(Recompute(net), Recompute(net).encode(x), how)
        assert torch.equal(hyps.tokens, again.tokens)
        assert hyps.tokens.shape[-1] <= SIZES.max_len - 1
        for row in hyps.tokens.flatten(0, 1).tolist():
            if vocab.eos in row: assert set(row[row.index(vocab.eos) + 1:]) <= {vocab.pad}
    alone = decode(net, net.encode(x[2:3]), Beam(3))
    together = decode(net, memory, Beam(3))
    length = alone.tokens.shape[-1]
    assert torch.equal(alone.tokens[0], together.tokens[2, :, :length])


@torch.no_grad()
def test_a_model_that_says_one_word_lends_its_weights():
    net = model(1)
    four = words_a_step(net, 4)
    assert four.K == 4 and len(four.words.position.weight) == 16
    assert all(torch.equal(w, four.state_dict()[name]) for name, w in net.state_dict().items() if name != "words.position.weight")
    hyps = decode(four.float(), four.encode(torch.randn(2, 5, 12)), Beam(2))
    packed = pack(four)
    torch.manual_seed(5)
    x = torch.randn(2, 5, 12)
    assert torch.equal(decode(packed, packed.encode(x), Beam(2)).tokens, decode(four, four.encode(x), Beam(2)).tokens)
    assert hyps.tokens.shape[-1] <= 14


@pytest.mark.parametrize("banned", [[], [4], list(range(8))])
@pytest.mark.parametrize("K", range(1, 7))
def test_greedy_rows_take_their_words_together(K, banned):
    "As they do one by one, which a rule that might read the words so far makes them do: with an end inside a group, and with no word left."
    net, many = Toy(K=K, max_len=12, seed=K), pictures(40)
    at_once, by_turns = (decode(net, net.encode(many), Greedy(), rules=[*rules, never(banned)]) for rules in ([], [lambda prefix, logp: logp]))
    assert torch.equal(at_once.tokens, by_turns.tokens) and torch.equal(at_once.logp, by_turns.logp)
    torch.testing.assert_close(at_once.score, by_turns.score)
    ended = (at_once.tokens == net.vocab.eos).any(-1)
    assert banned or 0 < ended.float().mean() < 1
