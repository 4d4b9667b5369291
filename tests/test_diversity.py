"""Diversity of captions: against slow versions of the definitions, and properties that hold for any captions."""
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from expnet.score.bleu import bleu
from expnet.score.cider import CiderD, DocumentFrequency
from expnet.score.diversity import collapse, distinct, ends_badly, is_novel, mutual_bleu, repeats, self_cider, similarities, spread, vocabulary
from expnet.tools import UserError

words = st.sampled_from("a red disc on ünder 犬 \u200b s".split(" "))
captions = st.lists(words, max_size=7)
sets = st.integers(2, 4).flatmap(lambda n: st.lists(st.lists(captions, min_size=n, max_size=n), min_size=1, max_size=4))
few = settings(max_examples=60, deadline=None, derandomize=True)


def slow_distinct(captions: list[list[str]], n: int) -> float:
    seen, total = [], 0
    for tokens in captions:
        total += len(tokens)
        for start in range(len(tokens) - n + 1):
            if tokens[start:start + n] not in seen: seen.append(tokens[start:start + n])
    return len(seen) / total if total else 0.0


def slow_self_cider(captions: list[list[str]], scorer: CiderD) -> float:
    "Every pair through the public CIDEr scorer, eigenvalues of the general (not the symmetric) solver."
    table = np.array([[scorer.score([a], [[b]])[0] / 10 for b in captions] for a in captions])
    values = np.sqrt(np.clip(np.linalg.eigvals(table).real, 0, None))
    return -math.log(values.max() / values.sum(), len(captions)) if values.sum() else 0.0


@few
@given(st.lists(captions, max_size=5), st.integers(1, 3))
def test_distinct_equals_a_slow_count(captions, n):
    assert distinct(captions, n) == slow_distinct(captions, n)


@few
@given(sets)
def test_self_cider_equals_all_pairs_through_the_scorer(sets):
    df = DocumentFrequency([*sets, [["a", "boat"]], [["red", "house", "on", "fire"]]])
    expected = [slow_self_cider(captions, CiderD(df, plain=True)) for captions in sets]
    np.testing.assert_allclose(self_cider(sets, df), expected, rtol=0, atol=1e-5)      # square roots of rounding errors


@few
@given(sets)
def test_values_are_defined_bounded_and_blind_to_order(sets):
    df = DocumentFrequency([*sets, [["a", "boat"]]])
    each, (corpus, alike) = self_cider(sets, df), mutual_bleu(sets)
    assert ((each >= 0) & (each <= 1 + 1e-9)).all() and ((alike >= 0) & (alike <= 1 + 1e-9)).all() and np.isfinite(corpus).all()
    turned = [captions[::-1] for captions in sets]
    np.testing.assert_allclose(self_cider(turned, df), each, rtol=0, atol=1e-6)
    np.testing.assert_allclose(mutual_bleu(turned)[1], alike, rtol=0, atol=1e-12)


@few
@given(sets)
def test_mutual_bleu_of_a_picture_is_the_mean_of_its_captions(sets):
    expected = [np.mean([bleu([c], [captions[:k] + captions[k + 1:]])[1][0] for k, c in enumerate(captions)], 0) for captions in sets]
    np.testing.assert_allclose(mutual_bleu(sets)[1], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("m", [2, 3, 5])
def test_spread_between_one_voice_and_none_in_common(m):
    assert abs(spread(np.ones((m, m)))) < 1e-6 and abs(spread(np.eye(m)) - 1) < 1e-12
    assert spread(np.zeros((m, m))) == 0
    mixed = np.eye(m); mixed[0, 1] = mixed[1, 0] = 0.5
    assert 0.5 < spread(mixed) < 1


def test_similarity_is_symmetric_with_ones_on_the_diagonal():
    people = ["a red disc on grass".split(), "one red disc lies here".split(), "a red disc on grass".split()]
    table = similarities(people, DocumentFrequency([people, [["a", "boat"]]]))
    np.testing.assert_allclose(table, table.T, rtol=0, atol=1e-15)
    np.testing.assert_allclose(np.diag(table), 1, rtol=0, atol=1e-12)
    assert abs(table[0, 2] - 1) < 1e-12 and 0 < table[0, 1] < 1


@few
@given(captions)
def test_collapsing_removes_repetition_and_nothing_else(tokens):
    short = collapse(tokens)
    assert not repeats(short) and collapse(short) == short and set(short) == set(tokens)
    assert repeats(tokens) == (short != tokens)
    slow = [w for k, w in enumerate(tokens) if k == 0 or tokens[k - 1] != w]
    assert short == slow


def test_habits_by_hand():
    assert [ends_badly(t.split()) for t in ("a dog with a", "a dog runs", "")] == [True, False, False]
    said = [["a", "dog"], ["a", "dog"], ["a", "cat"]]
    assert vocabulary(said) == 3 and is_novel(said, [["a", "cat"]]).tolist() == [1, 1, 0]


def test_unequal_or_single_captions_are_refused():
    with pytest.raises(UserError, match="equally many"): mutual_bleu([[["a"], ["b"]], [["a"]]])
    with pytest.raises(UserError, match="two or more"): self_cider([[["a"]]], DocumentFrequency([[["a"]]]))
    with pytest.raises(UserError, match="equally many"): mutual_bleu([])
