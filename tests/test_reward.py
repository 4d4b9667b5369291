"""The reward on token numbers: recorded values of the published code, the metric on words, BLEU of nltk; and what it costs."""
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from expnet.data.captions import Item, tokenize
from expnet.data.vocabulary import Vocab
from expnet.score.cider import CiderD
from expnet.score.reward import BleuReward, CiderDReward, References, load_references, save_references, spoken
from expnet.tools import UserError

GOLDEN = Path(__file__).parent / "golden"
SPECIALS = ["PAD", "SOS", "EOS", "UNK"]
measured = pytest.mark.skipif(not os.environ.get("EXPNET_MEASURE"), reason="set EXPNET_MEASURE=1 to measure time and memory")


def as_tokens(rows: list[list[str]], vocab: Vocab, n: int) -> torch.Tensor:
    "Tokenised samples, n a picture, as ids [B, n, L]; EOS must be written out."
    ids = [vocab.ids(row) for row in rows]
    longest = max(map(len, ids))
    return torch.tensor([row + [vocab.pad] * (longest - len(row)) for row in ids]).view(-1, n, longest)


# --- recorded values

def test_reward_equals_the_published_code():
    recorded = json.loads((GOLDEN / "reference_a.json").read_text())
    wanted, vocab = recorded["reward"], Vocab([*recorded["words"], "yes"])        # "yes": said by samples, though not in its vocabulary
    items = [Item(str(i), "", "train", tuple(texts)) for i, texts in enumerate(wanted["references"])]
    samples = as_tokens([row[1:] for group in wanted["samples"] for row in group], vocab, 5)
    got = CiderDReward(References.build(items, vocab))([str(i) for i in wanted["image"]], samples)
    assert np.abs(got - np.array(wanted["reward"])).max() < 1e-9


@pytest.fixture(scope="module")
def flickr8k() -> dict[str, list[Item]]:
    "Karpathy tokens of every picture by split, joined by spaces; skips without the data set."
    folder = os.environ.get("EXPNET_FLICKR8K")
    if not folder: pytest.skip("set EXPNET_FLICKR8K to a folder with dataset_flickr8k.json to run this test")
    images = json.loads((Path(folder) / "dataset_flickr8k.json").read_text(encoding="utf-8"))["images"]
    found = {"train": [], "val": [], "test": []}
    for im in images:
        texts = tuple(" ".join(s["tokens"]) for s in im["sentences"])
        found[im["split"]].append(Item(f"flickr-{im['imgid']}", "", im["split"], texts))
    return found


@pytest.mark.parametrize("eos", [True, False])
def test_reward_with_training_frequencies(flickr8k, eos):
    golden = json.loads((GOLDEN / "golden200.json").read_text(encoding="utf-8"))["items"]
    items = flickr8k["train"] + [Item(str(g["id"]), "", "test", tuple(g["refs_ptb"])) for g in golden]
    vocab = Vocab(sorted({w for g in golden for w in g["hyp_ptb"].split()} | set(SPECIALS)))  # of the references most words are unknown
    samples = as_tokens([[*g["hyp_ptb"].split(), "EOS"] for g in golden], vocab, 1)
    reward = CiderDReward(References.build(items, vocab, eos, tokenizer=str.split))
    wanted = [g["scores"]["CIDErD_traindf_eos" if eos else "CIDErD_traindf_noeos"] for g in golden]
    assert np.abs(reward([str(g["id"]) for g in golden], samples)[:, 0] - np.array(wanted)).max() < 1e-9


def test_eos_doubles_the_price_of_a_dangling_end(flickr8k):
    "Test captions against the other four of their picture, as they are and with `with a` appended."
    items, pairs = list(flickr8k["train"]), []
    for item in flickr8k["test"]:
        for number, text in enumerate(item.captions):
            items.append(Item(f"{item.id} {number}", "", "test", item.captions[:number] + item.captions[number + 1:]))
            pairs += [text, f"{text} with a"]
    vocab, ids = Vocab(sorted({w for text in pairs for w in text.split()} | set(SPECIALS))), [i.id for i in items[len(flickr8k["train"]):]]
    samples, price, preferred = as_tokens([[*text.split(), "EOS"] for text in pairs], vocab, 2), {}, {}
    for eos in (False, True):
        scores = CiderDReward(References.build(items, vocab, eos, tokenizer=str.split))(ids, samples)
        price[eos], preferred[eos] = -np.diff(scores.mean(0))[0], (scores[:, 1] > scores[:, 0]).mean()
        print(f"EOS {eos}: means {scores.mean(0).round(3)}, price {price[eos]:.3f}, preferred in {preferred[eos]:.1%}")
    assert price[True] > 2 * price[False] > 0 and preferred[True] < preferred[False] - 0.05


# sentence_bleu of nltk 3.10.4, uniform weights, SmoothingFunction().method1, for n = 1..4
NLTK = {"a brown dog EOS": [1.0, 1.0, 1.0, 1.0],
        "a dog EOS": [0.7165313105737893, 0.5066641486392106, 0.26397239179159177, 0.19053627645285995],
        "a brown dog with a EOS": [0.846481724890614, 0.7571162714266755, 0.7139503373537127, 0.6731821382417487],
        "dogs run on the red grass EOS": [1.0, 0.7071067811865476, 0.2154434690031884, 0.12574334296829354],
        "ball": [0.049787068367863944, 0.015744053406497194, 0.01072629872067152, 0.008853531856477262],
        "cat sleeps": [0.0, 0.0, 0.0, 0.0], "a a a a EOS": [0.6, 0.12247448713915889, 0.07937005259840997, 0.07071067811865477],
        "two dogs run after a ball on grass EOS": [1.0, 0.9354143466934853, 0.7211247851537042, 0.5946035575013605]}


def test_bleu_equals_nltk():
    item = Item("0", "", "train", ("a brown dog with a ball", "a brown dog", "two dogs run after a red ball on the grass"))
    vocab = Vocab.build([item, Item("1", "", "train", ("cat sleeps",))], 1)
    refs, samples = References.build([item], vocab), as_tokens([text.split() for text in NLTK], vocab, len(NLTK))
    for n in range(1, 5):
        got = BleuReward(refs, {n: 1.0})(["0"], samples)[0]
        np.testing.assert_allclose(got, [values[n - 1] for values in NLTK.values()], rtol=0, atol=1e-12)
    mix = BleuReward(refs, {1: .2, 2: .3, 4: .5})(["0"], samples)[0]
    np.testing.assert_allclose(mix, [.2 * v[0] + .3 * v[1] + .5 * v[3] for v in NLTK.values()], rtol=0, atol=1e-12)


# --- for any captions

words = st.one_of(st.sampled_from("a red disc on grass".split()), st.text("xyz", min_size=1, max_size=2))
captions = st.lists(words, min_size=0, max_size=7)
worlds = st.lists(st.tuples(st.lists(captions, min_size=1, max_size=3), st.lists(captions, min_size=2, max_size=2)), min_size=1, max_size=4)
few = settings(max_examples=60, deadline=None, derandomize=True)


def rewards_of(world, eos: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    "CIDEr-D of numbers, CIDEr-D of words, BLEU-2: of two samples for each picture; the vocabulary lacks the rarer words."
    items = [Item(str(i), "", "train", tuple(" ".join(row) for row in refs)) for i, (refs, _) in enumerate(world)]
    vocab = Vocab(sorted({w for _, rows in world for row in rows for w in row} | set(SPECIALS)))
    samples = as_tokens([row + ["EOS"] for _, rows in world for row in rows], vocab, 2)
    refs = References.build(items, vocab, eos, tokenizer=str.split)
    end = ["EOS"] if eos else []
    texts = [[row + end for row in rows] for rows, _ in world]
    slow = [CiderD(texts).score([row + end], [group])[0] for (_, rows), group in zip(world, texts) for row in rows]
    ids = [item.id for item in items]
    return CiderDReward(refs)(ids, samples), np.array(slow).reshape(-1, 2), BleuReward(refs, {2: 1.0})(ids, samples)


@few
@given(worlds, st.booleans())
def test_numbers_score_as_words_do(world, eos):
    fast, slow, bleu = rewards_of(world, eos)
    np.testing.assert_allclose(fast, slow, rtol=0, atol=1e-9)
    assert (bleu >= 0).all() and (bleu <= 1 + 1e-12).all()


@few
@given(worlds)
def test_order_of_references_and_of_pictures_does_not_matter(world):
    mixed = [(refs[::-1], samples) for refs, samples in world][::-1]
    for a, b in zip(rewards_of(world, True), rewards_of(mixed, True)): np.testing.assert_allclose(a, b[::-1], rtol=0, atol=1e-12)


def test_unknown_words_are_not_the_word_UNK():
    item = Item("0", "", "train", ("a rare zebu", "a zebu"))
    refs = References.build([item, Item("1", "", "train", ("a dog",))], Vocab(sorted(["a", "dog", *SPECIALS])))
    samples = as_tokens([["a", "UNK", "EOS"], ["a", "PAD", "EOS"], ["a", "SOS", "EOS"]], refs.vocab, 3)
    a, b, c = CiderDReward(refs)(["0"], samples)[0]
    assert a == b == c


def test_what_stands_behind_the_end_changes_nothing():
    vocab = Vocab(sorted(["a", "dog", *SPECIALS]))
    row = lambda *tail: vocab.ids(["a", "dog", "EOS", *tail])
    said = torch.tensor([[row("PAD", "PAD"), row("dog", "dog"), row("EOS", "a")]])
    refs = References.build([Item("0", "", "train", ("a dog",)), Item("1", "", "train", ("dog",))], vocab)
    best = 7.5                                                                     # three tokens have no quadruple
    assert spoken(said, vocab).sum(-1).tolist() == [[3, 3, 3]]
    assert CiderDReward(refs)(["0"], said)[0] == pytest.approx([best] * 3, abs=1e-9)


@pytest.mark.parametrize("damage, says", [
    (lambda f: (f / "references.json").unlink(), "references.json: no such file"), (lambda f: (f / "references.npz").write_bytes(b"x"), "references.npz"),
    (lambda f: (f / "references.npz").unlink(), "references.npz"), (lambda f: (f / "references.json").write_text("{}"), "field 'base' is missing"),
    (lambda f: (f / "references.npz").write_bytes((f / "references.npz").read_bytes()[:300]), "references.npz")])
def test_a_damaged_store_is_named(tmp_path, damage, says):
    vocab = Vocab(sorted(["a", "dog", *SPECIALS]))
    save_references(tmp_path, References.build([Item("0", "", "train", ("a dog",))], vocab))
    assert CiderDReward(load_references(tmp_path, vocab))(["0"], as_tokens([["a", "EOS"]], vocab, 1)).shape == (1, 1)
    damage(tmp_path)
    with pytest.raises(UserError, match=says): load_references(tmp_path, vocab)


# --- what it costs (EXPNET_MEASURE=1)

def synthetic(pictures: int, seed: int = 0) -> list[Item]:
    "Pictures with five captions of COCO's length (mean 10.5 words) over 10,000 words by Zipf's law."
    rng = np.random.default_rng(seed)
    names = [f"{a}{b}{c}{d}" for a in "bdfgklmnpr" for b in "aeiou" for c in "bdfgklmnprst" for d in "aeiouyxzwvqhjcbdf"][:10_000]
    share = (1 / np.arange(1, len(names) + 1)).cumsum()
    lengths = np.clip(rng.poisson(10.5, (pictures, 5)), 5, 50)
    text = lambda n: " ".join([names[k] for k in share.searchsorted(rng.random(n) * share[-1])])
    return [Item(str(i), "", "train", tuple(map(text, row))) for i, row in enumerate(lengths)]


def constructor() -> None:
    "Build the references of a training set of COCO's size; print CPU seconds and peak memory as JSON (a process of its own)."
    items = synthetic(113_287)
    vocab = Vocab.build(items, 5)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    reward = CiderDReward(References.build(items, vocab))
    seconds, peak = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "before_mb": before / 1e3, "peak_mb": peak / 1e3, "n-grams": len(reward.idf) - 1}))


@measured
def test_constructor_for_coco():
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    print(result)
    assert result["seconds"] <= 60 and result["peak_mb"] <= 1500


class ScorerAsUsed:
    "pycocoevalcap's scorer as the published code uses it: frequencies fixed, the references of a picture prepared for every sample."
    def __init__(self, corpus: list[list[str]]):
        from pycocoevalcap.cider.cider_scorer import CiderScorer
        self.make, first = CiderScorer, CiderScorer()
        for refs in corpus: first.cook_append(None, refs)
        first.compute_doc_freq()
        self.frequency, self.pictures = first.document_frequency, len(corpus)

    def __call__(self, samples: list[tuple[str, list[str]]]) -> list[float]:
        pictures = self.pictures
        class Fixed(list):
            def __len__(self): return pictures                                     # it takes ln N from here
        scorer = self.make()
        scorer.document_frequency, scorer.crefs = self.frequency, Fixed()
        for text, refs in samples: scorer.cook_append(text, refs)
        return scorer.compute_cider()


@measured
def test_speed_against_the_scorer_as_used():
    torch.set_num_threads(1)
    items = synthetic(4_000)
    vocab, rng = Vocab.build(items, 5), np.random.default_rng(1)
    texts = [[" ".join([*tokenize(text), "EOS"]) for text in item.captions] for item in items]
    slow, fast = ScorerAsUsed(texts), CiderDReward(References.build(items, vocab))
    chosen = rng.choice(len(items), 50, replace=False)
    rows = [[w if rng.random() < 0.7 else vocab.words[rng.integers(len(vocab))] for w in text.split()[:-1]][:19] + ["EOS"]
            for i in chosen for text in texts[i]]                                  # references with three words in ten replaced
    samples, ids = as_tokens(rows, vocab, 5), [items[i].id for i in chosen]
    said = [" ".join(vocab.words[i] for i in row[spoken(row, vocab)].tolist()) for row in samples.flatten(0, 1)]
    jobs = [(text, texts[i]) for text, i in zip(said, np.repeat(chosen, 5))]
    np.testing.assert_allclose(fast(ids, samples).ravel(), slow(jobs), rtol=0, atol=1e-9)
    seconds = {"slow": [], "fast": []}
    for _ in range(7):
        start = time.process_time(); slow(jobs); middle = time.process_time()
        for _ in range(10): fast(ids, samples)
        seconds["slow"].append(middle - start); seconds["fast"].append((time.process_time() - middle) / 10)
    a, b = (statistics.median(seconds[name]) for name in ("slow", "fast"))
    print(f"captions a CPU-second: as used {250 / a:,.0f}, here {250 / b:,.0f}, ratio {a / b:.1f}")
    assert a / b >= 20


if __name__ == "__main__": constructor()
