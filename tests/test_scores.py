"""Caption scores: recorded values of the COCO tools, and properties that hold for any caption."""
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from expnet.score.bleu import bleu
from expnet.data.captions import Item
from expnet.score.cider import CiderD, DocumentFrequency
from expnet.score.evaluate import Scores, evaluate
from expnet.score.rouge import rouge_l
from expnet.score.tokens import ptb_tokenize
from expnet.tools import UserError

# pycocoevalcap 1.2 (BLEU, ROUGE-L, CIDEr-D) and ruotianluo/cider (plain CIDEr, training document frequencies) on 200 sets of captions
GOLDEN = json.loads((Path(__file__).parent/"golden"/"golden200.json").read_text(encoding="utf-8"))
HYPS = [item["hyp_ptb"].split() for item in GOLDEN["items"]]
REFS = [[ref.split() for ref in item["refs_ptb"]] for item in GOLDEN["items"]]


def recorded(name: str) -> tuple[float, np.ndarray]:
    "Corpus value and value per caption of the golden file."
    return GOLDEN["overall"][name], np.array([item["scores"][name] for item in GOLDEN["items"]])


def assert_recorded(name: str, total: float, each: np.ndarray) -> None:
    overall, captions = recorded(name)
    assert abs(total - overall) < 1e-9
    np.testing.assert_allclose(each, captions, rtol=0, atol=1e-9)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_bleu_equals_the_coco_tools(n):
    corpus, each = bleu(HYPS, REFS)
    assert_recorded(f"Bleu_{n}", corpus[n - 1], each[:, n - 1])


def test_lower_orders_do_not_depend_on_n():
    assert np.array_equal(bleu(HYPS, REFS, 2)[1], bleu(HYPS, REFS, 4)[1][:, :2])


def test_ciderd_equals_the_coco_tools():
    assert_recorded("CIDErD_pycocoevalcap", *CiderD().score(HYPS, REFS))


def test_the_tokens_of_the_golden_captions():
    assert [ptb_tokenize(item["hyp"]) for item in GOLDEN["items"]] == HYPS
    assert [[ptb_tokenize(ref) for ref in item["refs"]] for item in GOLDEN["items"]] == REFS


def test_rouge_equals_the_coco_tools():
    assert_recorded("ROUGE_L", *rouge_l(HYPS, REFS))


def test_plain_cider_equals_its_source():
    assert_recorded("CIDEr_plain_vrama91", *CiderD(plain=True).score(HYPS, REFS))


def test_frequencies_of_the_same_references_change_nothing():
    assert_recorded("CIDErD_pycocoevalcap", *CiderD(REFS).score(HYPS, REFS))


def test_evaluate_puts_every_number_in_its_place():
    items = [Item(str(item["id"]), "", "test", tuple(item["refs_ptb"])) for item in GOLDEN["items"]]
    hyps = {str(item["id"]): item["hyp_ptb"] for item in reversed(GOLDEN["items"])}
    scores = evaluate(hyps, items, tokenizer=str.split)
    names = {"CIDEr-D": "CIDErD_pycocoevalcap", "ROUGE-L": "ROUGE_L"} | {f"BLEU-{n}": f"Bleu_{n}" for n in (1, 2, 3, 4)}
    assert list(scores.totals) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D"] and scores.notes == ()
    for ours, theirs in names.items():
        assert_recorded(theirs, scores.totals[ours], np.array([scores.per_image[item.id][ours] for item in items]))


def test_scores_survive_the_file(tmp_path):
    items = [Item("café", "", "test", ("un chien noir court",)), Item("b", "", "test", ("a boat",))]
    scores = evaluate({"café": "un chien court", "b": ""}, items)
    scores.save(tmp_path/"scores.json")
    assert Scores.load(tmp_path/"scores.json") == scores and scores.notes == ("1 of 2 captions are empty",)
    assert "CIDEr-D" in str(scores) and "2 images" in str(scores)


@pytest.mark.parametrize("hyps, says", [
    ({"a": "x"}, r"without a caption \(1\): 'b'"), ({"a": "x", "b": "y", 7: "z"}, r"unknown images \(1\): 7"),
    ({"a": "x", "b": None}, r"not text \(1\): 'b'"), ({}, r"\(2\): 'a', 'b'")])
def test_evaluate_names_what_is_wrong(hyps, says):
    with pytest.raises(UserError, match=says):
        evaluate(hyps, [Item("a", "", "test", ("a dog",)), Item("b", "", "test", ("a boat",))])


# --- with the Flickr8k data set, where it is there

def flickr8k(split: str) -> list[list[list[str]]]:
    "Karpathy tokens of every image of `split`; skips without the data set."
    folder = os.environ.get("EXPNET_FLICKR8K")
    if not folder: pytest.skip("set EXPNET_FLICKR8K to a folder with dataset_flickr8k.json to run this test")
    images = json.loads((Path(folder)/"dataset_flickr8k.json").read_text(encoding="utf-8"))["images"]
    return [[s["tokens"] for s in image["sentences"]] for image in images if image["split"] == split]


def with_end(captions: list) -> list: return [tokens + ["EOS"] for tokens in captions]


def test_ciderd_with_training_frequencies():
    train = flickr8k("train")
    assert_recorded("CIDErD_traindf_noeos", *CiderD(train).score(HYPS, REFS))
    df = DocumentFrequency([with_end(group) for group in train])
    assert_recorded("CIDErD_traindf_eos", *CiderD(df).score(with_end(HYPS), [with_end(group) for group in REFS]))


def test_one_human_against_the_others():
    test = flickr8k("test")
    hyps, refs = [group[0] for group in test], [group[1:] for group in test]
    assert round(CiderD().score(hyps, refs)[0], 3) == 0.793
    assert round(bleu(hyps, refs)[0][3], 3) == 0.210


# --- for any caption

words = st.text(st.characters(blacklist_categories=["Z", "C"]), min_size=1, max_size=4)  # any script, no spaces
captions = st.lists(st.one_of(st.sampled_from("a red disc on grass".split()), words), min_size=0, max_size=8)
groups = st.lists(captions, min_size=1, max_size=4)
corpora = st.lists(st.tuples(captions, groups), min_size=1, max_size=4)
few = settings(max_examples=60, deadline=None, derandomize=True)


@few
@given(corpora)
def test_scores_are_defined_and_bounded(corpus):
    hyps, refs = [hyp for hyp, _ in corpus], [group for _, group in corpus]
    totals, each = bleu(hyps, refs)
    assert np.isfinite(each).all() and (each >= 0).all() and (each <= 1 + 1e-12).all() and np.isfinite(totals).all()
    for plain in (False, True):
        scores = CiderD(plain=plain).score(hyps, refs)[1]
        assert np.isfinite(scores).all() and (scores >= 0).all() and (scores <= 10 + 1e-9).all()
        assert all(score == 0 for score, hyp in zip(scores, hyps) if not hyp)
    overlap = rouge_l(hyps, refs)[1]
    assert (overlap >= 0).all() and (overlap <= 1 + 1e-12).all() and all(x == 0 for x, hyp in zip(overlap, hyps) if not hyp)
    assert (each[[not hyp for hyp in hyps]] < 1e-300).all()


@few
@given(corpora, st.randoms(use_true_random=False))
def test_the_order_of_references_does_not_matter(corpus, random):
    hyps, refs = [hyp for hyp, _ in corpus], [group for _, group in corpus]
    mixed = [random.sample(group, len(group)) for group in refs]
    assert np.array_equal(bleu(hyps, refs)[1], bleu(hyps, mixed)[1])
    assert np.array_equal(rouge_l(hyps, refs)[1], rouge_l(hyps, mixed)[1])
    for plain in (False, True):
        cider = CiderD(plain=plain).score
        np.testing.assert_allclose(cider(hyps, refs)[1], cider(hyps, mixed)[1], rtol=0, atol=1e-12)


@few
@given(st.lists(words, min_size=4, max_size=9))
def test_a_caption_equal_to_its_reference_scores_the_maximum(caption):
    other = ["\0"] * 4  # a second image, of which nothing is shared: every n-gram of the first is rare
    hyps, refs = [caption, other], [[caption], [other]]
    np.testing.assert_allclose(bleu(hyps, refs)[1], 1, atol=1e-7)
    np.testing.assert_allclose(rouge_l(hyps, refs)[1], 1, atol=1e-12)
    for plain in (False, True): np.testing.assert_allclose(CiderD(plain=plain).score(hyps, refs)[1], 10, atol=1e-9)


@few
@given(captions, groups)
def test_ciderd_never_exceeds_plain_cider(hyp, group):
    hyps, refs = [hyp, ["a", "boat"]], [group, [["a", "boat"]]]
    assert CiderD().score(hyps, refs)[1][0] <= CiderD(plain=True).score(hyps, refs)[1][0] + 1e-12


# --- side by side with pycocoevalcap, where it is installed

full = st.lists(st.one_of(st.sampled_from("a red disc on grass".split()), words), min_size=1, max_size=8)  # no empty captions: see the quirk of ROUGE-L


@few
@given(st.lists(st.tuples(full, st.lists(full, min_size=1, max_size=4)), min_size=1, max_size=5))
def test_scores_equal_pycocoevalcap_on_any_captions(corpus):
    scorers = [pytest.importorskip(f"pycocoevalcap.{name}.{name}") for name in ("bleu", "rouge", "cider")]
    hyps, refs = [hyp for hyp, _ in corpus], [group for _, group in corpus]
    res = {k: [" ".join(hyp)] for k, hyp in enumerate(hyps)}
    gts = {k: [" ".join(ref) for ref in group] for k, group in enumerate(refs)}
    theirs = scorers[0].Bleu(4).compute_score(gts, res, verbose=0), scorers[1].Rouge().compute_score(gts, res), scorers[2].Cider().compute_score(gts, res)
    ours = bleu(hyps, refs), rouge_l(hyps, refs), CiderD().score(hyps, refs)
    for (total, each), (their_total, their_each) in zip(ours, theirs):
        np.testing.assert_allclose(total, their_total, rtol=0, atol=1e-9)
        np.testing.assert_allclose(each.T, their_each, rtol=0, atol=1e-9)


# --- what it costs

def test_scores_of_5000_captions_take_at_most_five_cpu_seconds(capsys):
    raws = [text for item in GOLDEN["items"] for text in (item["hyp"], *item["refs"])]  # 30,000 captions: every one once, then shuffled words
    shuffle = np.random.default_rng(0).permuted
    texts = [" ".join(shuffle(raws[k % len(raws)].split(" "))) if k >= len(raws) else raws[k] for k in range(30_000)]
    seconds, started = {}, time.process_time()
    tokens = [ptb_tokenize(text) for text in texts]
    hyps, refs = tokens[:5000], [tokens[k:k + 5] for k in range(5000, 30_000, 5)]
    for name, metric in {"tokens": None, "BLEU": bleu, "ROUGE-L": rouge_l, "CIDEr-D": CiderD().score}.items():
        if metric: metric(hyps, refs)
        seconds[name], started = time.process_time() - started, time.process_time()
    with capsys.disabled(): print({name: round(value, 2) for name, value in seconds.items()}, round(sum(seconds.values()), 2))
    assert sum(seconds.values()) < 5
