"""Searches against slow ones, against all sentences, and their promises on random captioners."""
from math import ceil, log

import pytest
import torch
from hypothesis import given, settings, strategies as st
from toy import WORDS, Toy, pictures

from expnet.data.vocabulary import Vocab
from expnet.decode.sampling import Sample
from expnet.decode.search import Beam, Greedy, decode
from expnet.models.captioner import Step, select, unroll
from expnet.models.expansionnet import ExpansionNet, ExpansionNetConfig
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


@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize("length", ["mean", "wu", "none"])
def test_a_wide_beam_finds_the_best_of_all_sentences(K, length):
    """As wide as the vocabulary it is exact for two words; as wide as all beginnings, for any number."""
    model = Toy(6, K=K, seed=K, dtype=torch.float64)
    memory, V, eos = model.encode(pictures(6)), 6, model.vocab.eos
    for size, places in ((V, 2), (V**3, 4)):
        how = Beam(size, length=length)
        hyps = decode(model, memory, how, max_len=places + 1)
        for image in range(6):
            scores, level = [], [((), 0.0)]
            for _ in range(places):
                level = [(w + (v,), s + p) for w, s in level for v, p in enumerate(next_logp(model, memory, image, w))]
                scores += [(s / how.divisor(len(w)), w) for w, s in level if w[-1] == eos]
                level = [b for b in level if b[0][-1] != eos]
            best, words = max(scores + [(s / how.divisor(places), w) for w, s in level])
            assert hyps.score[image, 0].item() == pytest.approx(best, abs=1e-6)
            assert cut(model, hyps.tokens[image, 0]) == words


def test_the_early_stop_stops_early():
    """A model that is sure of a short sentence is not asked for all places."""
    model = Toy(8, sharp=0., max_len=200)
    model.table[:, :, model.vocab.eos] = 4
    model.sharp, asked = 1., []
    step = model.step
    model.step = lambda *given, **options: asked.append(1) or step(*given, **options)
    decode(model, model.encode(pictures(3)), Beam(4))
    pool = len(asked)
    asked.clear()
    decode(model, model.encode(pictures(3)), Beam(4, n_best=4, length="none"))
    assert pool < 60 and len(asked) < 199


def test_in_the_official_style_a_finished_sentence_can_be_overtaken():
    words = ["EOS", "PAD", "SOS", "UNK", "snow", "a", "red", "disc", "square"]
    tired = {"EOS": .24, "a": .19, "red": .19, "disc": .19, "square": .19}
    following = {"SOS": {"a": .7, "snow": .3}, "a": {"red": 1.}, "snow": {"EOS": 1.}, "red": {"disc": .52, "square": .48}, "disc": tired, "square": tired}
    table = torch.zeros(9, 9)
    for last, nexts in following.items():
        for word, p in nexts.items(): table[words.index(last), words.index(word)] = p
    model = Toy(9, max_len=8)
    model.vocab = Vocab(words)
    model.step = lambda memory, state, previous, look=False: Step(table[previous].log(), state)
    pool, official = (decode(model, model.encode(pictures(1)), Beam(2, style=style)) for style in ("pool", "official"))
    assert pool.texts(model.vocab) == [["snow"]] and pool.score.item() == pytest.approx(log(.3) / 2)
    assert official.texts(model.vocab) == [["a red disc"]] and official.score.item() < log(.3) / 3


@pytest.mark.parametrize("options", [{}, dict(temperature=0.5), dict(temperature=2.), dict(top_k=3), dict(top_p=0.7),
                                     dict(top_k=4, top_p=0.8, temperature=1.5)])
def test_samples_are_distributed_as_they_should(options):
    """First and second words of 40,000 samples against the probabilities computed by hand, chi-squared below its 0.9999 point."""
    model, n = Toy(9, sharp=1., seed=3), 40_000
    memory = model.encode(pictures(1))
    tokens = decode(model, memory, Sample(n, seed=5, **options), max_len=3).tokens[0]
    for prefix in [(), (int(tokens[tokens[:, 0] != model.vocab.eos][0, 0]),)]:
        p = torch.tensor(next_logp(model, memory, 0, prefix)).double().div(options.get("temperature", 1.)).softmax(-1)
        order = sorted(range(9), key=lambda v: -p[v])
        keep = order[:options.get("top_k", 9)]
        p = torch.where(torch.tensor([v in keep for v in range(9)]), p, 0.) / p[keep].sum()
        mass, nucleus = 0., []
        for v in keep:
            if mass < options.get("top_p", 2.): nucleus.append(v)
            mass += float(p[v])
        p = torch.where(torch.tensor([v in nucleus for v in range(9)]), p, 0.) / p[nucleus].sum()
        rows = tokens if not prefix else tokens[tokens[:, 0] == prefix[0]]
        counts = torch.bincount(rows[:, len(prefix)], minlength=9)
        assert counts[p == 0].sum() == 0
        expected = p[p > 0] * len(rows)
        assert ((counts[p > 0] - expected)**2 / expected).sum() < 31.8                          # 8 degrees of freedom, 0.9999


def test_a_sample_depends_on_its_seed_and_place_alone():
    model = Toy(10, sharp=0.5)
    draw = lambda n, how: decode(model, model.encode(pictures(n)), how).tokens
    few, many = draw(2, Sample(3, seed=7)), draw(5, Sample(3, seed=7))
    assert [cut(model, t) for t in few.flatten(0, 1)] == [cut(model, t) for t in many[:2].flatten(0, 1)]
    assert draw(2, Sample(3, seed=7)).equal(few) and not draw(2, Sample(3, seed=8))[..., :2].equal(few[..., :2])
    g = torch.Generator().manual_seed(1)
    a, b = draw(2, Sample(3, generator=g)), draw(2, Sample(3, generator=g))
    assert a.shape != b.shape or not a.equal(b)
    torch.manual_seed(4); a = draw(2, Sample(3))
    torch.manual_seed(4); assert draw(2, Sample(3)).equal(a)


@settings(max_examples=40, deadline=None)
@given(groups=st.integers(2, 4), width=st.integers(1, 2), **{**TOYS, "words": st.integers(8, 10)})
def test_diverse_groups_differ(groups, width, **toy):
    """With a cost above any log-probability no two groups begin alike; with none all groups say the same."""
    model = Toy(**toy)
    memory, size = model.encode(pictures(3)), groups * width
    apart = decode(model, memory, Beam(size, size, groups=groups, diversity=1000.))
    for image in range(3):
        firsts = [t[0] for t in apart.tokens[image].tolist()]
        assert len(set(firsts)) >= groups
    same = decode(model, memory, Beam(size, size, groups=groups))
    one = decode(model, memory, Beam(width, width))
    for image in range(3):
        assert {cut(model, t) for t in same.tokens[image]} == {cut(model, t) for t in one.tokens[image]}


@pytest.mark.parametrize("how", [Greedy(), Beam(3), Beam(3, style="official"), Beam(4, groups=2), Sample(2), Sample(2, top_k=3), Sample(2, top_p=0.5)])
@pytest.mark.parametrize("K", [1, 2])
def test_nan_names_the_token_and_the_image(how, K):
    class Broken(Toy):
        def step(self, memory, state, previous, look=False):
            step = super().step(memory, state, previous)
            rows = len(previous) // len(memory.x)
            if state["said"].shape[1] >= 2 * K: step.logp[2 * rows:3 * rows, -1] = torch.nan
            return step
    model = Broken(8, K=K, sharp=0.1, max_len=12)
    model.table[..., model.vocab.eos] = -1e3
    with pytest.raises(FloatingPointError, match=f"NaN at token {3 * K} of image 2"): decode(model, model.encode(pictures(4)), how)


def test_the_rules_may_leave_nothing():
    """No exception: the sentence ends, its score says so."""
    model = Toy(8)
    nothing = lambda prefix, logp: torch.full_like(logp, -torch.inf) if prefix.shape[1] == 2 else logp.index_fill(1, torch.tensor([0]), -torch.inf)
    for how in (Greedy(), Beam(3, 2), Beam(4, 4, groups=2), Beam(3, 3, style="official"), Sample(3, seed=0), Sample(3, seed=0, top_p=0.9)):
        hyps = decode(model, model.encode(pictures(2)), how, rules=[nothing])
        assert hyps.score.isneginf().all() and hyps.tokens.shape[2] == 2 and hyps.logp.isfinite().all()


def test_bad_optionsare_refused():
    for bad in (dict(size=0), dict(size=2, n_best=3), dict(length="sum"), dict(size=4, groups=3), dict(groups=0), dict(diversity=-1.), dict(style="x"),
                dict(style="official", groups=3), dict(style="official", length="wu"), dict(length="wu", alpha=-1.)):
        with pytest.raises(UserError): Beam(**bad)
    for bad in (dict(n=0), dict(temperature=0.), dict(top_k=0), dict(top_p=0.), dict(top_p=1.5), dict(seed=1, generator=torch.Generator())):
        with pytest.raises(UserError): Sample(**bad)


@torch.no_grad()
def test_the_maps_of_a_real_model_are_those_of_the_sentence_said_alone():
    torch.manual_seed(0)
    model = ExpansionNet(ExpansionNetConfig.preset("tiny", features=12), Vocab(WORDS)).eval()
    model.head.weight.mul_(4)
    memory = model.encode(torch.randn(3, 6, 12))
    hyps = decode(model, memory, Beam(3, 3), max_len=8, look=True)
    tokens = torch.cat([torch.full((9, 1), model.vocab.sos), hyps.tokens.flatten(0, 1)], 1)
    state, length = select(model.start(memory), torch.arange(9) // 3), hyps.tokens.shape[2]
    for t in range(length):
        step = model.step(memory, state, tokens[:, t:t + 1], look=True)
        state = step.state
        said = (hyps.logp[..., t] != 0).flatten()
        for name, values in step.aux.items():
            mine = hyps.aux[name][..., t, :].flatten(0, 1)
            assert torch.allclose(mine[said, :values.shape[-1]], values[said, 0], atol=1e-5), name
            assert (mine[said, values.shape[-1]:] == 0).all() and (mine[~said] == 0).all()
    assert set(hyps.aux) == {"attention", "expansion", "words"}
