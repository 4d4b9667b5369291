"""Plans, resumption, shares of processes and reading ahead, on stores that misbehave."""
import pickle
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expnet.data.batches import Batch, Batches, encode_captions, pad_rows, padding, plan_epoch, read_ahead, samples_to_rows, share
from expnet.data.captions import Item
from expnet.data.vocabulary import Vocab
from expnet.tools import UserError


class Table:
    """Two regions of three numbers a picture, all equal to its id; notes what was read."""
    def __init__(self): self.read_ids = []

    def read(self, ids):
        self.read_ids.append(list(ids))
        return np.tile(np.array([int(id) for id in ids], np.float16)[:, None, None], (1, 2, 3)), np.ones((len(ids), 2), bool)


def some(count: int = 23) -> tuple[list[Item], Vocab]:
    """Items whose captions name their picture and themselves."""
    items = [Item(str(i), "", "train", tuple(f"p{i} c{k} " + "x " * (7 * i * k % 11) for k in range(1 + i % 4))) for i in range(count)]
    return items, Vocab.build(items, 1)


def contents(batches: Batches, epoch: int, start: int = 0) -> list[tuple]:
    """Everything in the batches of an epoch, comparable."""
    return [(b.ids, b.x.tolist(), b.mask.tolist(), b.tokens.tolist()) for b in batches.epoch(epoch, start)]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(3, 40), min_size=1, max_size=120), st.integers(1, 9), st.integers(1, 4), st.integers(-3, 2**40),
       st.integers(0, 99))
def test_a_plan_holds_every_sample_once_and_every_process_its_share(lengths, each, world, seed, epoch):
    lengths, size = np.array(lengths), each * world
    plan = plan_epoch(lengths, size, seed, epoch)
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(lengths)))
    assert sorted(map(len, plan))[1:] == [size] * (len(plan) - 1)
    for batch in plan:
        parts = [share(batch, rank, world).tolist() for rank in range(world)]
        assert sorted(sum(parts, [])) == sorted(batch.tolist())
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_plan_does_not_depend_on_the_past():
    lengths = np.random.default_rng(1).integers(3, 30, 500)
    first = [b.tolist() for b in plan_epoch(lengths, 16, 5, 3)]
    for epoch in range(3): plan_epoch(lengths, 16, 5, epoch)
    assert first == [b.tolist() for b in plan_epoch(lengths, 16, 5, 3)]
    assert first != [b.tolist() for b in plan_epoch(lengths, 16, 6, 3)]


def test_pools_save_most_of_the_padding():
    lengths = 2 + np.random.default_rng(0).negative_binomial(9, 0.45, 5000).clip(3)
    plain = np.random.default_rng(1).permutation(5000)
    assert padding(lengths, plan_epoch(lengths, 50)) < 0.2 * padding(lengths, [plain[i:i + 50] for i in range(0, 5000, 50)])


@pytest.mark.parametrize("captions", [0, 1, 3])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_taken_up_in_the_middle_is_the_same(captions, shuffle):
    items, vocab = some()
    make = lambda: Batches(items, vocab, Table(), 4, captions=captions, shuffle=shuffle, seed=7)
    whole = contents(make(), 2)
    assert len(whole) == len(make())
    for start in (0, 1, len(whole) - 1, len(whole)): assert contents(make(), 2, start) == whole[start:]
    assert contents(pickle.loads(pickle.dumps(make())), 2) == whole
    for start in (-1, len(whole) + 1):
        with pytest.raises(UserError, match="an epoch has"): make().epoch(2, start)


@pytest.mark.parametrize("world", [2, 4, 6])                      # 4 does not divide the batch, and the last batch is short
@pytest.mark.parametrize("captions", [1, 2])
def test_processes_together_see_what_one_sees(world, captions):
    items, vocab = some()
    one = Batches(items, vocab, Table(), 6, captions=captions)
    all_ranks = [Batches(items, vocab, Table(), 6, captions=captions, rank=r, world=world) for r in range(world)]
    steps = list(zip(*(b.epoch(1) for b in all_ranks), strict=True))
    assert len(steps) == len(one)
    for whole, parts in zip(one.epoch(1), steps):
        said = lambda part: [(id, vocab.decode(row)) for id, row in zip(np.repeat(part.ids, captions), part.tokens)]
        assert sorted(sum((said(part) for part in parts if not part.filler), [])) == sorted(said(whole))
        assert all(len(part) for part in parts)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(0, 3), st.integers(1, 12))
def test_a_batch_splits_into_as_many_parts_as_asked_for(pictures, captions, parts):
    tokens = torch.arange(pictures * captions)[:, None].expand(-1, 4)
    batch = Batch([str(i) for i in range(pictures)], torch.arange(pictures)[:, None, None], torch.ones(pictures, 1), tokens, epoch=7)
    pieces = batch.split(parts)
    assert {piece.to("cpu").epoch for piece in pieces} == {7}
    real = [piece for piece in pieces if not piece.filler]
    assert len(pieces) == parts and all(len(piece) for piece in pieces) and len(real) == min(parts, pictures)
    assert sum((piece.ids for piece in real), []) == batch.ids
    assert torch.cat([piece.tokens for piece in real]).equal(batch.tokens) and torch.cat([piece.x for piece in real]).equal(batch.x)
    assert all(piece.filler for piece in Batch(batch.ids, batch.x, batch.mask, tokens, filler=True).split(parts))


def test_a_batch_knows_its_epoch():
    items, vocab = some()
    assert [batch.epoch for batch in Batches(items, vocab, Table(), 4).epoch(3, start=1)][:2] == [3, 3]


def test_features_and_captions_belong_together_and_are_read_once():
    items, vocab = some()
    store = Table()
    for batch in Batches(items, vocab, store, 8).epoch(0):
        assert batch.x.dtype == torch.float16 and batch.mask.dtype == torch.bool and batch.tokens.dtype == torch.int64
        for id, x, row in zip(batch.ids, batch.x, batch.tokens):
            assert vocab.decode(row).split()[0] == f"p{id}" and bool((x == int(id)).all())
    assert all(len(set(ids)) == len(ids) for ids in store.read_ids)
    moved = batch.to("cpu")
    assert moved.ids == batch.ids and torch.equal(moved.tokens, batch.tokens)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(2, 6))
def test_captions_of_a_picture_take_turns(have, want):
    items = [Item("0", "", "train", ("a b",)), Item("1", "", "train", tuple(f"w{k}" for k in range(have)))]
    rows = encode_captions(items, Vocab.build(items, 1))
    used = [samples_to_rows(np.array([0, 1]), e, rows, want)[1].reshape(2, want) for e in range(have)]
    assert all((u[0] == 0).all() for u in used)
    counts = np.bincount(np.concatenate([u[1] for u in used]) - 1, minlength=have)
    if have >= want: assert (counts == want).all() and all(len(set(u[1])) == want for u in used)
    else: assert all(set(u[1] - 1) == set(range(have)) for u in used)


def test_cut_captions_end_with_eos_and_are_counted():
    items, vocab = some()
    batches = Batches(items, vocab, Table(), 5, max_len=6)
    for batch in batches.epoch(0):
        assert batch.tokens.shape[1] <= 6
        for row in batch.tokens.tolist():
            kept = [i for i in row if i != vocab.pad]
            assert kept[0] == vocab.sos and kept[-1] == vocab.eos and kept.count(vocab.eos) == 1
    assert batches.rows.cut == sum(len(vocab.encode(t)) > 6 for i in items for t in i.captions) > 0


def test_padding_stands_behind_and_nowhere_else():
    assert pad_rows([np.array([5, 6, 7]), np.array([8])], 9).tolist() == [[5, 6, 7], [8, 9, 9]]


FAULTS = [({"batch_size": 0}, "batch_size=0"), ({"batch_size": -2}, "batch_size=-2"),
          ({"rank": 2, "world": 2}, "rank=2"), ({"rank": -1}, "rank=-1"), ({"captions": -1}, "captions=-1"), ({"max_len": 2}, "max_len=2"),
          ({"items": []}, "no items"), ({"world": 0}, "world=0"),
          ({"items": [Item("bare", "", "train")]}, "item 'bare' .split train. has no caption"),
          ({"items": [Item("dots", "", "train", ("...",))]}, "item 'dots': the caption '...' has no words")]


@pytest.mark.parametrize("settings, message", FAULTS, ids=[m for _, m in FAULTS])
def test_settings_that_cannot_work_are_refused(settings, message):
    items, vocab = some(4)
    usual = {"items": items, "vocab": vocab, "store": Table(), "batch_size": 4}
    with pytest.raises(UserError, match=message): Batches(**usual | settings)


def test_missing_features_are_found_before_training():
    class Known(Table):
        def __contains__(self, id): return id not in ("2", "3")
    items, vocab = some(5)
    with pytest.raises(UserError, match="2 of 5 items are not in the store, the first is '2'"): Batches(items, vocab, Known(), 2)


def test_an_error_of_the_store_reaches_the_consumer_in_its_place():
    class Broken(Table):
        def read(self, ids):
            if len(self.read_ids) == 2: raise UserError("features.h5: no features for '7'")
            return super().read(ids)
    items, vocab = some()
    got, before = [], threading.active_count()
    with pytest.raises(UserError, match="no features for '7'"):
        for batch in Batches(items, vocab, Broken(), 4).epoch(0): got.append(batch)
    assert len(got) == 2 and threading.active_count() == before


def test_an_epoch_left_early_leaves_no_thread_and_reads_no_more():
    items, vocab = some()
    store, before = Table(), threading.active_count()
    stream = Batches(items, vocab, store, 2).epoch(0)
    next(stream)
    stream.close()
    assert threading.active_count() == before and len(store.read_ids) <= 3
    Batches(items, vocab, store, 2).epoch(0)  # never begun: no thread either
    assert threading.active_count() == before


def test_the_reader_is_ahead_by_two_and_no_more():
    begun, two = [], threading.Event()
    def make(n):
        begun.append(n)
        if n == 2: two.set()
        return n
    stream = read_ahead(make, range(10))
    assert next(stream) == 0 and two.wait(5)  # 1 and 2 are read while the consumer holds 0
    time.sleep(0.05)
    assert begun == [0, 1, 2]
    assert list(stream) == list(range(1, 10))
