"""The world of shapes: what chapters 02 to 04 promise about scenes, pictures, captions and the judge."""
import random
import re
import time

import numpy as np
import pytest
from PIL import Image

from expnet.data import shape_language as language
from expnet.data.scenes import BACKGROUNDS, CLEAR, COLOURS, SHAPES, SIZES, Scene, contrast, draw, label_grid, layout, stencil
from expnet.data.shapes import HELD_COUNTS, HELD_PAIRS, record, shapes, write_world
from expnet.data.shape_language import captions, facts, scene_exact, scene_f1
from expnet.tools import read_json

WORLD = shapes(n_train=400, n_val=30, n_test=30, n_pairs=30, n_counts=30, seed=3)


def test_every_reference_is_true():
    for r in WORLD:
        texts = [*r.captions, *(t for style in language.STYLES for t in captions(r.scene, 2, style, r.seed))]
        assert len(set(r.captions)) == 5
        for text in texts:
            assert scene_exact(text, r.scene) and scene_f1(text, r.scene.to_dict()) == 1.0, (text, r.scene)
            assert 2 <= len(text.split()) <= 25


def test_mixed_length_and_styles():
    lengths = [len(t.split()) for r in WORLD for t in r.captions]
    assert 10.5 < np.mean(lengths) < 12.5
    means = [np.mean([len(t.split()) for r in WORLD[:100] for t in captions(r.scene, 5, style, 1)]) for style in language.STYLES]
    assert means[0] + 2 < means[1] < means[2] - 2


def corrupt(text, rng):
    "Replace one colour, shape or count word of `text` by another of its kind."
    words = text.lower().rstrip(".").split()
    kinds = [(k, language.LEXICON[w.strip(",")]) for k, w in enumerate(words) if w.strip(",") in language.LEXICON]
    place, (kind, meaning) = rng.choice([(k, e) for k, e in kinds if e[0] in ("colour", "shape", "shapes", "count")])
    words[place] = rng.choice([w for w, e in language.LEXICON.items() if e[0] == kind and e[1] != meaning])
    return " ".join(words)


def test_one_wrong_word_is_noticed():
    rng = random.Random(0)
    for r in WORLD:
        for text in r.captions:
            if text.count(" ") < 3: continue
            wrong = corrupt(text, rng)
            assert not scene_exact(wrong, r.scene) and scene_f1(wrong, r.scene) < 1, (wrong, r.scene)


def test_only_one_scene_fits():
    "A caption is exact for another scene only if that scene has the same counts, colours and shapes."
    def required(scene): return sorted((g.count, g.colour, g.shape) for g in scene.groups)
    for r, other in zip(WORLD, WORLD[1:]):
        if required(r.scene) != required(other.scene): assert not any(scene_exact(t, other.scene) for t in r.captions)


def test_any_text_has_a_score():
    rng, words = random.Random(1), [*language.LEXICON, "UNK", "<unk>", "of", "and", "with", "the", "é", "\n", "12"]
    for k in range(600):
        text = " ".join(rng.choice(words) for _ in range(rng.randrange(30)))
        score = scene_f1(text, WORLD[k % len(WORLD)].scene)
        assert 0 <= score <= 1 and (score == 1) == scene_exact(text, WORLD[k % len(WORLD)].scene)
    assert scene_f1("circle " * 60, WORLD[0].scene) < 0.1


def test_scenes_round_trip_and_know_their_relations():
    for r in WORLD:
        assert Scene.from_dict(r.scene.to_dict()) == r.scene
        assert facts(r.scene) == facts(r.scene.to_dict())
        placed = layout(r.scene, r.seed)
        for i, name, j in r.scene.relations:
            middles = [[(p.left + p.side / 2, p.top + p.side / 2) for p in placed if p.group == k] for k in (i, j)]
            (x1, y1), (x2, y2) = (np.mean(points, axis=0) for points in middles)
            holds = {"left of": x1 < x2, "right of": x1 > x2, "above": y1 < y2, "below": y1 > y2}
            assert holds.get(name, True), (name, r)


def test_everything_is_visible():
    "In the frame, clear of the background, at least 60 % uncovered, and separate from the next object."
    for r in WORLD:
        pixels, full = Image.new("L", (64, 64)), []
        for k, p in enumerate(layout(r.scene, r.seed)):
            group, left, top, side = r.scene.groups[p.group], round(p.left), round(p.top), round(p.side)
            assert min(left, top) >= 0 and max(left, top) + side <= 64
            assert contrast(COLOURS[group.colour], BACKGROUNDS[r.scene.background]) >= CLEAR
            mask = stencil(group.shape, side).point(lambda v: 255 * (v > 127))
            pixels.paste(k + 1, (left, top), mask)
            full.append(np.count_nonzero(mask))
        seen = np.bincount(np.asarray(pixels).ravel(), minlength=len(full) + 1)[1:]
        assert (seen >= 0.6 * np.array(full)).all(), r


def test_overlapping_shapes_share_pixels():
    some = shapes(n_train=600, n_val=0, n_test=0, n_pairs=0, n_counts=0)
    both = [r for r in some if any(name == "overlapping" for _, name, _ in r.scene.relations)]
    for r in both:
        cover = []
        for p in layout(r.scene, r.seed)[:2]:
            mask = Image.new("L", (64, 64))
            mask.paste(stencil(r.scene.groups[p.group].shape, round(p.side)), (round(p.left), round(p.top)))
            cover.append(np.asarray(mask) > 127)
        assert np.sum(cover[0] & cover[1]) >= 6, r
    assert len(both) > 50


def test_labels_name_every_group():
    for r in WORLD:
        grid = label_grid(r.scene, 8, r.seed)
        named = set(zip(grid["colour"].flat, grid["shape"].flat, grid["size"].flat)) - {(-1, -1, -1)}
        assert named == {(list(COLOURS).index(g.colour), SHAPES.index(g.shape), SIZES.index(g.size)) for g in r.scene.groups}


def test_splits_hold_out_what_they_promise():
    for r in WORLD:
        pairs = sum((g.colour, g.shape) in HELD_PAIRS for g in r.scene.groups)
        counts = sum((g.count, g.shape) in HELD_COUNTS for g in r.scene.groups)
        assert (pairs, counts) == (r.split == "test_pairs", r.split == "test_counts"), r
    assert len(HELD_PAIRS) == 8 and len({r.id for r in WORLD}) == len({r.seed for r in WORLD}) == len(WORLD)


def test_same_seed_same_world():
    small = shapes(n_train=5, n_val=3, n_test=0, n_pairs=2, n_counts=0, seed=3)
    assert small == WORLD[:5] + WORLD[400:403] + WORLD[460:462]
    assert (small[2].picture() == WORLD[2].picture()).all()
    assert (draw(small[2].scene, seed=1) != draw(small[2].scene, seed=2)).any()
    assert record("train", 0, seed=4) != record("train", 0, seed=3)
    assert draw(small[0].scene, 224).shape == (224, 224, 3)


def test_json_comes_back(tmp_path):
    path = write_world(tmp_path, n_train=4, n_val=1, n_test=1, n_pairs=1, n_counts=1, seed=3)
    entries = read_json(path)["images"]
    assert [e["imgid"] for e in entries] == list(range(8))
    for e, r in zip(entries, [*WORLD[:4], WORLD[400], WORLD[430], WORLD[460], WORLD[490]]):
        assert e["split"] == r.split and Scene.from_dict(e["scene"]) == r.scene and e["scene"]["seed"] == r.seed
        assert (np.asarray(Image.open(tmp_path / e["filepath"] / e["filename"])) == r.picture()).all()
        assert [s["raw"] for s in e["sentences"]] == list(r.captions)
        assert all(" ".join(s["tokens"]) == re.sub("[,.]", "", s["raw"].lower()) for s in e["sentences"])


def test_the_reader_of_coco_reads_it(tmp_path):
    reader = pytest.importorskip("expnet.data.captions")
    path = write_world(tmp_path, n_train=3, n_val=0, n_test=0, n_pairs=0, n_counts=0, seed=3)
    items = reader.karpathy(path, tmp_path)
    assert [(i.captions, Scene.from_dict(i.scene)) for i in items] == [(r.captions, r.scene) for r in WORLD[:3]]
    assert all(scene_exact(text, i.scene) for i in items for text in i.captions)


def test_three_hundred_pictures_a_second():
    start = time.process_time()
    for k in range(300): record("train", k, seed=9).picture()
    assert 300 / (time.process_time() - start) >= 300
