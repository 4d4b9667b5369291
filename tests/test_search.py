"""Searches against slow ones, against all sentences, and their promises on random captioners."""
from itertools import product
from math import ceil

import pytest
import torch
from hypothesis import given, settings, strategies as st
from toy import Toy, pictures

from expnet.decode.sampling import Sample
from expnet.decode.search import Beam, Greedy, decode
from expnet.models.captioner import unroll
from expnet.tools import UserError

TOYS = dict(words=st.integers(5, 10), K=st.integers(1, 3), sharp=st.sampled_from([0.5, 2., 4.]), seed=st.integers(0, 999))
HOWS = st.one_of(st.just(Greedy()), st.builds(lambda s, n, length, alpha: Beam(s, min(s, n), length, alpha), st.integers(1, 6), st.integers(1, 6),
                                              st.sampled_from(["mean", "wu", "none"]), st.floats(0, 1.5)),
                 st.builds(lambda s, n: Beam(s, min(s, n), style="official"), st.integers(1, 6), st.integers(1, 6)),
                 st.builds(lambda g, w, d: Beam(g * w, g * w, groups=g, diversity=d), st.integers(2, 3), st.integers(1, 2), st.floats(0, 3)),
                 st.builds(lambda n, t, k, p: Sample(n, t, k, p, seed=1), st.integers(1, 4), st.floats(0.3, 2), st.sampled_from([None, 1, 3]),
                           st.sampled_from([None, 0.3, 0.9])))


def next_logp(model, memory, image, words):
    """log-probabilities [V] of the word after `words` of one picture, asked for from the beginning."""
    one = model.encode(memory.x[image:image + 1])
    inputs = torch.tensor([[model.vocab.sos] * model.K + list(words)])
    whole = len(words) // model.K * model.K + model.K
    return unroll(model, one, inputs[:, :whole])[0, len(words)].tolist()


def slow_beam(model, memory, image, how, max_len):
    """The search of one picture in plain Python, as EXPANSIONNET.md 4.1 or as the pool beam's description says it."""
    beams = [((), 0.0)]
    eos, official = model.vocab.eos, how.style == "official"
    ended = lambda words: eos in words
    for _ in range(max_len - 1):
        if all(ended(w) for w, _ in beams): break
        grown = [(w + (v,), s + lp) for w, s in beams if not ended(w) for v, lp in enumerate(next_logp(model, memory, image, w))]
        old = [b for b in beams if ended(b[0])]
        grown.sort(key=lambda b: -b[1])
        beams = sorted(old + grown, key=lambda b: -b[1])[:how.size] if official else old + grown[:how.size - len(old)]
    rule = {"mean": lambda n: n, "wu": lambda n: ((5 + n) / 6)**how.alpha, "none": lambda n: 1}[how.length]
    if official: rule = lambda n: n + 1
    return sorted([(s / rule(len(w)), w) for w, s in beams], reverse=True)[:how.n_best]


def cut(model, tokens):
    """A row of Hyps as a tuple of words, EOS included."""
    words = tokens.tolist()
    return tuple(words[:words.index(model.vocab.eos) + 1] if model.vocab.eos in words else words)


@settings(max_examples=60, deadline=None)
@given(how=HOWS.filter(lambda h: isinstance(h, Beam) and h.groups == 1), max_len=st.integers(2, 8), **TOYS)
def test_a_beam_equals_the_slow_search(how, max_len, **toy):
    model = Toy(dtype=torch.float64, **toy)
    memory = model.encode(pictures(3))
    hyps = decode(model, memory, how, max_len)
    for image in range(3):
        slow = slow_beam(model, memory, image, how, max_len)
        fast = hyps.score[image].tolist()
        assert len(slow) <= len(fast) and fast[:len(slow)] == pytest.approx([s for s, _ in slow], abs=1e-6)
        assert [cut(model, t) for t in hyps.tokens[image, :len(slow)]] == [w for _, w in slow]


@settings(max_examples=150, deadline=None)
@given(how=HOWS, max_len=st.integers(2, 9), batch=st.integers(1, 4), **TOYS)
def test_promises(how, max_len, batch, **toy):
    model = Toy(**toy)
    memory = model.encode(pictures(batch))
    hyps = decode(model, memory, how, max_len, look=True)
    n = how.n if isinstance(how, Sample) else getattr(how, "n_best", 1)
    assert hyps.tokens.shape[:2] == (batch, n) and hyps.tokens.shape[2] <= max_len - 1
    ended = (hyps.tokens == model.vocab.eos).cumsum(-1)
    behind = (ended - (hyps.tokens == model.vocab.eos).long()) > 0
    assert (hyps.tokens[behind] == model.vocab.pad).all() and (hyps.logp[behind] == 0).all()
    whole = hyps.score > -torch.inf
    sos = torch.full((*hyps.tokens.shape[:2], model.K), model.vocab.sos)
    inputs = torch.cat([sos, hyps.tokens], -1).flatten(0, 1)
    inputs = inputs[:, :ceil(hyps.tokens.shape[2] / model.K) * model.K]
    rescored = unroll(model, memory, inputs)[:, :hyps.tokens.shape[2]].gather(-1, hyps.tokens.flatten(0, 1)[..., None])[..., 0]
    said = ~behind & whole[..., None]
    assert torch.allclose(rescored.view(hyps.logp.shape)[said], hyps.logp[said], atol=1e-5)
    for image, row, t in said.nonzero().tolist():                     # the maps belong to the words: they hold the words before
        group = t // model.K * model.K
        expected = [model.vocab.sos] * model.K + hyps.tokens[image, row, :group].tolist()
        assert hyps.aux["said"][image, row, t, :len(expected)].tolist() == expected
        assert (hyps.aux["said"][image, row, t, len(expected):] == 0).all()


@settings(max_examples=60, deadline=None)
@given(how=HOWS, max_len=st.integers(2, 9), **TOYS)
def test_neighbours_change_nothing(how, max_len, **toy):
    model = Toy(**toy)
    together = decode(model, model.encode(pictures(4)), how, max_len)
    fewer = decode(model, model.encode(pictures(2)), how, max_len)
    for image in range(2):
        for a, b in zip(together.tokens[image], fewer.tokens[image]): assert cut(model, a)[:len(b)] == cut(model, b)
    assert torch.allclose(together.score[:2], fewer.score, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(max_len=st.integers(2, 9), **TOYS)
def test_a_beam_of_one_is_greedy(max_len, **toy):
    model = Toy(**toy)
    memory = model.encode(pictures(4))
    greedy = decode(model, memory, Greedy(), max_len)
    for style in ("pool", "official"): assert decode(model, memory, Beam(1, style=style), max_len).tokens.equal(greedy.tokens)
