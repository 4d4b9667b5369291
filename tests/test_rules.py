"""Every rule holds, whatever the model, the search and K say."""
import pytest
import torch
from hypothesis import given, settings, strategies as st
from test_search import HOWS, TOYS, cut
from toy import Toy, pictures

from expnet.decode.rules import ban, force, min_words, never, no_bad_end, no_ngram, no_repeat, no_unk, words_only
from expnet.decode.search import Beam, Greedy, decode
from expnet.tools import UserError

WORDY = {**TOYS, "words": st.integers(7, 10)}


def sentences(model, how, rules, max_len):
    """(words, finished) of every sentence that the rules allowed to the end."""
    hyps = decode(model, model.encode(pictures(2)), how, max_len, rules)
    for row, score in zip(hyps.tokens.flatten(0, 1), hyps.score.flatten()):
        words = cut(model, row)
        if score.isfinite(): yield (words[:-1], True) if words[-1] == model.vocab.eos else (words, False)


@settings(max_examples=1000, deadline=None)
@given(how=HOWS, max_len=st.integers(3, 9), n=st.integers(1, 3), least=st.integers(0, 4), forced=st.sets(st.sampled_from(["a", "disc", "red"]), max_size=2),
       use=st.sets(st.sampled_from(["words_only", "no_unk", "ban", "no_repeat", "no_ngram", "no_bad_end", "min_words", "force"]), min_size=1), **WORDY)
def test_every_rule_holds(how, max_len, n, least, forced, use, **toy):
    model = Toy(**toy)
    vocab, last = model.vocab, max_len - 1
    bad = [vocab.index["a"]]
    rules = {"words_only": words_only(vocab), "no_unk": no_unk(vocab), "ban": ban(["SOS", "nothing"], vocab), "no_repeat": no_repeat(),
             "no_ngram": no_ngram(n), "no_bad_end": no_bad_end(vocab, ["a"]), "min_words": min_words(least, vocab), "force": force(sorted(forced), vocab, max_len)}
    for words, finished in sentences(model, how, [rules[name] for name in sorted(use)], max_len):
        runs = [words[i:i + n] for i in range(len(words) - n + 1)]
        if "words_only" in use: assert not {vocab.pad, vocab.sos, vocab.unk} & set(words)
        if "no_unk" in use: assert vocab.unk not in words
        if "ban" in use: assert vocab.sos not in words
        if "no_repeat" in use: assert all(a != b for a, b in zip(words, words[1:]))
        if "no_ngram" in use: assert len(set(runs)) == len(runs)
        if "no_bad_end" in use and finished and words: assert words[-1] not in bad
        if "min_words" in use: assert len(words) >= min(least, last)
        if "force" in use: assert {vocab.index[w] for w in forced} <= set(words)


@settings(max_examples=150, deadline=None)
@given(how=HOWS, spare=st.integers(0, 4), **WORDY)
def test_forced_words_are_always_said(how, spare, **toy):
    """Also where the room is just enough; then, with one place more, the sentence can still end."""
    model = Toy(**toy)
    hyps = decode(model, model.encode(pictures(3)), how, 4 + spare, [force(["a", "disc", "red"], model.vocab, 4 + spare)])
    for row, score in zip(hyps.tokens.flatten(0, 1), hyps.score.flatten()):
        if score.isfinite(): assert {model.vocab.index[w] for w in ("a", "disc", "red")} <= set(row.tolist())
    assert hyps.score[:, 0].isfinite().all()


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 4), rows=st.lists(st.lists(st.integers(0, 3), min_size=7, max_size=7), min_size=1, max_size=4))
def test_no_ngram_equals_a_slow_one(n, rows):
    prefix = torch.tensor(rows)
    logp = no_ngram(n)(prefix, torch.zeros(len(rows), 4))
    for row, allowed in zip(rows, logp):
        seen = {tuple(row[i:i + n]) for i in range(len(row) - n + 1)}
        for word in range(4): assert bool(allowed[word] == 0) == (tuple(row[len(row) - n + 1:] + [word])[-n:] not in seen)


def test_rules_change_nothing_else_and_do_not_write_into_their_input():
    vocab, prefix, logp = Toy(9).vocab, torch.tensor([[4, 5, 4], [6, 7, 6]]), torch.randn(2, 9)
    for rule in (never([3]), words_only(vocab), no_repeat(), no_ngram(2), no_bad_end(vocab), min_words(9, vocab), force(["red"], vocab, 9), force(["the"], vocab, 5)):
        before, after = logp.clone(), rule(prefix, logp)
        assert logp.equal(before) and not after.equal(before)
        assert after[after.isfinite()].equal(before[after.isfinite()])


def test_words_that_cannot_be_forced():
    vocab = Toy(9).vocab
    with pytest.raises(UserError, match="'crimson'"): force(["crimson"], vocab, 9)
    with pytest.raises(UserError, match="3 words do not fit"): force(["a", "red", "disc"], vocab, 3)
