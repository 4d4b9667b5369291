"""Evaluate as a whole: its speed, what odd input gives, several captions a picture, result files, and intervals that keep their promise."""
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from expnet.data.captions import Item
from expnet.score.compare import bootstrap, compare
from expnet.score.diversity import collapse
from expnet.score.evaluate import HABITS, METRICS, Scores, evaluate, evaluate_sets, pick, table
from expnet.score.results import as_number, read_references, read_results, write_results
from expnet.score.tokens import ptb_tokenize
from expnet.tools import UserError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "golden200.json").read_text(encoding="utf-8"))
few = settings(max_examples=60, deadline=None, derandomize=True)


# --- speed

def synthetic(images: int, seed: int = 0) -> tuple[dict[str, str], list[Item]]:
    "Captions of COCO's length (about 10 words) and skew of words: one hypothesis and five references an image."
    draw, words = random.Random(seed), [f"w{k}" for k in range(9000)]
    weights = [1 / (k + 5) for k in range(9000)]
    def caption() -> str: return " ".join(draw.choices(words, weights, k=draw.randint(8, 13))).capitalize() + "."
    return {str(k): caption() for k in range(images)}, [Item(str(k), "", "test", tuple(caption() for _ in range(5))) for k in range(images)]


def test_five_thousand_pictures_take_five_cpu_seconds():
    hyps, items = synthetic(5000)
    evaluate(dict(list(hyps.items())[:50]), items[:50])                            # warm
    began = time.process_time()
    scores = evaluate(hyps, items)
    took = time.process_time() - began
    print(f"\nevaluate, 5,000 hypotheses x 5 references, all default metrics: {took:.2f} CPU-seconds")
    assert list(scores.totals) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D"]
    assert took <= 5


# --- values

def test_raw_captions_give_the_recorded_totals():
    "From untokenised text to the totals of the Java tools: tokenizer, references, metrics, order."
    items = [Item(str(item["id"]), "", "test", tuple(item["refs"])) for item in GOLDEN["items"]]
    totals = evaluate({str(item["id"]): item["hyp"] for item in reversed(GOLDEN["items"])}, items).totals
    names = {"ROUGE-L": "ROUGE_L", "CIDEr-D": "CIDErD_pycocoevalcap"} | {f"BLEU-{n}": f"Bleu_{n}" for n in (1, 2, 3, 4)}
    for ours, theirs in names.items(): assert abs(totals[ours] - GOLDEN["overall"][theirs]) < 1e-9, ours


# --- any text

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(["", " ", "\n", "a dog\nruns", "Ein Hund läuft!", "犬が走る", "a\u0000b", "..."])
written = texts.filter(str.strip)
corpora = st.lists(st.tuples(texts, st.lists(written, min_size=1, max_size=3)), min_size=1, max_size=4)


@few
@given(corpora)
def test_every_text_gives_finite_bounded_values(corpus):
    items = [Item(str(k), "", "test", tuple(refs)) for k, (_, refs) in enumerate(corpus)]
    scores = evaluate({str(k): hyp for k, (hyp, _) in enumerate(corpus)}, items, METRICS | HABITS)
    for values in scores.per_image.values():
        assert np.isfinite(list(values.values())).all()
        assert all(-1e-9 <= values[name] <= 1 + 1e-6 for name in values if name.startswith(("BLEU", "ROUGE", "bad", "repeats")))
        assert 0 <= values["CIDEr-D"] <= 10 + 1e-9
        if values["words"] == 0: assert values["CIDEr-D"] == values["ROUGE-L"] == 0 and values["BLEU-1"] < 1e-6
    assert np.isfinite(list(scores.totals.values())).all() and len(str(scores).splitlines()) >= 2


@few
@given(corpora, st.sampled_from(["\n", "\r\n", "\t", "  "]))
def test_a_line_break_is_a_space(corpus, gap):
    items = [Item(str(k), "", "test", ("a dog runs on grass", "the dog is running")) for k in range(len(corpus))]
    hyps = {str(k): f"a dog {k} runs" for k in range(len(corpus))}
    broken = {name: text.replace(" ", gap) for name, text in hyps.items()}
    assert evaluate(broken, items).per_image == evaluate(hyps, items).per_image


@few
@given(st.sets(st.integers(0, 6), min_size=1), st.sets(st.integers(0, 6)))
def test_missing_and_unknown_ids_are_named(wanted, given_):
    items = [Item(str(k), "", "test", ("a dog",)) for k in sorted(wanted)]
    hyps = {str(k): "a cat" for k in given_}
    if wanted == given_:
        assert len(evaluate(hyps, items).per_image) == len(wanted)
        return
    with pytest.raises(UserError) as error: evaluate(hyps, items)
    assert ("images without a caption" in str(error.value)) == bool(wanted - given_)
    assert ("captions of unknown images" in str(error.value)) == bool(given_ - wanted)
    assert repr(str(min(wanted ^ given_))) in str(error.value)


def test_duplicate_ids_are_refused_wherever_they_come_from(tmp_path):
    items = [Item("a", "", "test", ("a dog",))] * 2
    with pytest.raises(UserError, match=r"images listed twice \(1\): 'a'"): evaluate({"a": "a dog"}, items)
    (tmp_path / "r.json").write_text('[{"image_id": 1, "caption": "a"}, {"image_id": "1", "caption": "b"}]')
    with pytest.raises(UserError, match="entry 1.*duplicate id '1'"): read_results(tmp_path / "r.json")


# --- several captions a picture

def test_sets_equal_a_slow_loop():
    items = [Item(str(i["id"]), "", "test", tuple(i["refs"])) for i in GOLDEN["items"][:30]]
    sets = {str(i["id"]): [i["hyp"], i["refs"][0], i["hyp"] + " again"] for i in GOLDEN["items"][:30]}
    rows = evaluate_sets(sets, items)
    single = [evaluate({name: captions[k] for name, captions in sets.items()}, items) for k in range(3)]
    for item in items:
        for column in ("BLEU-4", "ROUGE-L", "CIDEr-D"):
            values = [scores.per_image[item.id][column] for scores in single]
            assert rows["best of 3"].per_image[item.id][column] == max(values)
            assert abs(rows["mean of 3"].per_image[item.id][column] - sum(values) / 3) < 1e-12
    assert rows["best of 3"].totals["CIDEr-D"] > single[0].totals["CIDEr-D"]
    assert set(rows["diversity"].totals) == {"distinct-1", "distinct-2", "mutual-BLEU-4", "Self-CIDEr"}


def test_collapse_is_never_applied_unasked():
    items = [Item("a", "", "test", ("a dog runs home",)), Item("b", "", "test", ("two cats sleep",))]
    stutter = {"a": "a dog dog runs home", "b": "two cats sleep"}
    plain, asked = evaluate(stutter, items), evaluate(stutter, items, rule=collapse)
    assert plain.notes == () and plain.totals["BLEU-1"] < asked.totals["BLEU-1"] and asked.notes == ("1 captions were changed by collapse",)
    several = {name: [text, "a dog"] for name, text in stutter.items()}
    short = {name: [" ".join(collapse(ptb_tokenize(text))) for text in texts] for name, texts in several.items()}
    asked, by_hand = evaluate_sets(several, items, rule=collapse), evaluate_sets(short, items)
    assert {row: scores.totals for row, scores in asked.items()} == {row: scores.totals for row, scores in by_hand.items()}


# --- files

@few
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5) | st.integers(0, 99).map(str), texts, max_size=5))
def test_results_survive_the_file(tmp_path_factory, captions):
    path = tmp_path_factory.mktemp("results") / "captions.json"
    write_results(path, captions)
    assert read_results(path) == captions and list(read_results(path)) == list(captions)


def test_coco_annotations_are_references(tmp_path):
    (tmp_path / "captions_val2014.json").write_text(json.dumps({"images": [{"id": 9}, {"id": 5}], "annotations": [
        {"image_id": 5, "id": 1, "caption": "A dog."}, {"image_id": 9, "id": 2, "caption": "A cat."}, {"image_id": 5, "id": 3, "caption": "One dog."}]}))
    assert [(i.id, i.captions) for i in read_references(tmp_path / "captions_val2014.json")] == [("9", ("A cat.",)), ("5", ("A dog.", "One dog."))]
    assert as_number("5") == 5 and as_number("²") == "²"


def test_scores_with_counts_survive_the_file(tmp_path):
    items = [Item("a", "", "test", ("a dog runs home",)), Item("b", "", "test", ("two cats",))]
    scores = evaluate({"a": "a dog", "b": "cats"}, items, pick(["default", "habits"]))
    scores.save(tmp_path / "scores.json")
    assert Scores.load(tmp_path / "scores.json") == scores and scores.counts["a"] == [2, 1, 0, 0, 2, 4]
    assert "vocabulary" in table({"x": scores}) and scores.totals["vocabulary"] == 3


# --- two runs

def with_counts(rows: np.ndarray) -> Scores:
    "Scores that hold BLEU counts: matched 1..4, length, reference a row."
    from expnet.score.bleu import geometric
    guessed = np.maximum(0, rows[:, 4:5] - np.arange(4))
    each = geometric(rows[:, :4], rows[:, 4], rows[:, 5], guessed)
    corpus = geometric(rows[:, :4].sum(0), rows[:, 4].sum(), rows[:, 5].sum(), guessed.sum(0))
    return Scores({f"BLEU-{n + 1}": float(corpus[n]) for n in range(4)},
                  {str(k): {f"BLEU-{n + 1}": float(v) for n, v in enumerate(row)} for k, row in enumerate(each)}, (), {str(k): row.tolist() for k, row in enumerate(rows)})


def captions_right(rng: np.random.Generator, n: int, skill: float, hard: np.ndarray) -> np.ndarray:
    "Made-up counts of `n` captions: longer ones and harder pictures match less."
    length = rng.integers(7, 14, n)
    matched, left = [], length
    for _ in range(4):
        left = rng.binomial(left, np.clip(skill * hard, 0, 1))
        matched.append(left)
        left = np.maximum(0, left - 1)
    return np.stack([*matched, length, np.full(n, 10)], 1)


def test_bootstrapped_bleu_is_the_bleu_of_the_drawn_captions():
    "Against the slow way: draw captions, score them as a corpus of their own."
    items = [Item(str(i["id"]), "", "test", tuple(i["refs"])) for i in GOLDEN["items"][:40]]
    a = evaluate({str(i["id"]): i["hyp"] for i in GOLDEN["items"][:40]}, items)
    b = evaluate({str(i["id"]): i["refs"][0] for i in GOLDEN["items"][:40]}, items)
    hyps = ({str(i["id"]): i["hyp"] for i in GOLDEN["items"][:40]}, {str(i["id"]): i["refs"][0] for i in GOLDEN["items"][:40]})
    drawn = bootstrap(a, b, "BLEU-4", samples=3, seed=7)
    rng = np.random.default_rng(7)
    for row, expected in zip(rng.multinomial(40, np.full(40, 1 / 40), size=3), drawn):
        copies = [Item(f"{i.id}-{c}", "", "test", i.captions) for i, times in zip(items, row) for c in range(times)]
        one, two = ({i.id: said[i.id.rsplit("-", 1)[0]] for i in copies} for said in hyps)
        slow = evaluate(two, copies, {"BLEU": METRICS["BLEU"]}).totals["BLEU-4"] - evaluate(one, copies, {"BLEU": METRICS["BLEU"]}).totals["BLEU-4"]
        assert abs(slow - expected) < 1e-9


@pytest.mark.parametrize("metric", ["BLEU-1", "BLEU-4"])
def test_intervals_of_corpus_bleu_keep_their_promise(metric):
    rng = np.random.default_rng(0)
    everyone = rng.beta(8, 4, 40_000)
    a, b = captions_right(rng, 40_000, 1.0, everyone), captions_right(rng, 40_000, 1.06, everyone)
    truth = with_counts(b).totals[metric] - with_counts(a).totals[metric]
    hits, experiments = 0, 100
    for seed in range(experiments):
        rows = np.random.default_rng(seed).choice(40_000, 150, replace=False)
        found = compare(with_counts(a[rows]), with_counts(b[rows]), metric, samples=300, seed=seed)
        hits += found.low <= truth <= found.high
    print(f"\n{metric}: {hits} of {experiments} intervals hold the true difference {truth:.4f}")
    assert 0.87 <= hits / experiments <= 0.99


def test_the_same_run_twice_differs_by_nothing():
    run = with_counts(captions_right(np.random.default_rng(1), 30, 1.0, np.full(30, 0.7)))
    found = compare(run, run, "BLEU-3")
    assert (found.low, found.high, found.clear) == (0, 0, False)


# --- the commands

def expnet(*words, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", "from expnet.cli.app import main; main()", *map(str, words)], cwd=cwd, capture_output=True, text=True)


def test_a_file_of_captions_is_scored_and_compared_without_a_model(tmp_path):
    items = GOLDEN["items"]
    (tmp_path / "refs.json").write_text(json.dumps({"images": [{"id": i["id"]} for i in items], "annotations": [
        {"image_id": i["id"], "id": k, "caption": text} for i in items for k, text in enumerate(i["refs"])]}))
    write_results(tmp_path / "model.json", {str(i["id"]): i["hyp"] for i in items})
    write_results(tmp_path / "people.json", {str(i["id"]): i["refs"][0] for i in items})
    for name in ("model", "people"):
        done = expnet("score", f"{name}.json", "--references", "refs.json", "--out", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "model" / "scores.json").read_text())
    assert abs(saved["totals"]["CIDEr-D"] - GOLDEN["overall"]["CIDErD_pycocoevalcap"]) < 1e-9 and len(saved["per_image"]) == len(items)
    done = expnet("compare", "model", "people", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("interval") == 6 and "clear" in done.stdout
    done = expnet("score", "model.json", "--references", "nothing.json", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "nothing.json: no such file" in done.stderr
