"""The feature file under fire: killed writers, many readers, damaged files, other layouts."""
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from expnet.data.captions import Item
from expnet.data.feature_store import FeatureStore, blank_store, row_writer
from expnet.data.features import describe, write_features
from expnet.data.images import BadImage, Preprocess, preprocess_from
from expnet.tools import UserError

fork, spawn = (multiprocessing.get_context(kind) for kind in ("fork", "spawn"))


class Patches(nn.Module):
    """A backbone whose answer depends on its mode, its weights and a little on what else is in the batch."""
    def __init__(self, scale: float = 1.0, pause: float = 0.0):
        super().__init__()
        self.prepare, self.spec = Preprocess(size=16), {"name": "patches", "grid": 4}
        self.scale, self.pause = nn.Parameter(torch.tensor(scale)), pause
        self.norm, self.off = nn.BatchNorm1d(16), nn.Dropout(0.5)

    def forward(self, images):
        time.sleep(self.pause)
        x = nn.functional.adaptive_avg_pool2d(images, 4).flatten(2).transpose(1, 2)
        return self.off(self.norm(x)) * self.scale + 1e-3 * len(images)


@pytest.fixture(scope="module")
def items(tmp_path_factory) -> list[Item]:
    torch.set_num_threads(1)
    folder, items = tmp_path_factory.mktemp("pictures"), []
    for k in range(50):
        picture = np.random.default_rng(k).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{k}.png")
        items.append(Item(f"picture {k} ü", str(folder / f"{k}.png"), "train"))
    return items


@pytest.fixture(scope="module")
def whole(items, tmp_path_factory) -> bytes:
    """The bytes of the file that an uninterrupted run writes."""
    path = tmp_path_factory.mktemp("whole") / "f.h5"
    write_features(path, items, Patches(), batch_size=4)
    return path.read_bytes()


@pytest.fixture
def path(whole, tmp_path):
    (tmp_path / "f.h5").write_bytes(whole)
    return tmp_path / "f.h5"


def expected(items) -> np.ndarray:
    model, prepare = Patches().eval(), Preprocess(size=16)
    with torch.no_grad():
        blocks = [model(torch.stack([prepare.read(item.path) for item in items[k:k + 4]])) for k in range(0, len(items), 4)]
    return torch.cat(blocks).half().numpy()


def test_every_row_belongs_to_its_picture(path, items):
    store, want = FeatureStore(path), expected(items)
    order = np.random.default_rng(0).integers(0, len(items), 70)
    x, mask = store.read([items[k].id for k in order])
    assert (x == want[order]).all() and mask.all() and mask.shape == (70, 16) and x.dtype == np.float16
    assert len(np.unique(want.reshape(50, -1), axis=0)) == 50  # or the line above would say little
    assert (len(store), store.regions, store.dim, store.spec) == (50, 16, 3, {"name": "patches", "grid": 4})
    assert preprocess_from(store.prepare) == Preprocess(size=16) and store.ids == [item.id for item in items]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_do_not_change_the_file(tmp_path, items, whole, workers):
    seen, before = [], torch.get_rng_state()
    report = write_features(tmp_path / "new" / "f.h5", items, Patches(), 4, workers, progress=lambda *at: seen.append(at))
    assert (tmp_path / "new" / "f.h5").read_bytes() == whole and os.listdir(tmp_path / "new") == ["f.h5"]
    assert seen[0] == (4, 50) and seen[-1] == (50, 50) and (report.written, report.kept, report.bad) == (50, 0, [])
    assert (torch.get_rng_state() == before).all()


def test_modes_of_the_backbone_come_back(tmp_path, items):
    model = Patches(); model.norm.eval()
    write_features(tmp_path / "f.h5", items[:3], model)
    assert model.training and model.off.training and not model.norm.training


def write_slowly(path, items, workers):
    os.setpgrp()  # so that orphaned workers can be found again
    write_features(path, items, Patches(pause=0.06), batch_size=4, workers=workers)


@pytest.mark.parametrize("seed, workers", [(0, 0), (1, 0), (2, 0), (3, 2)])
def test_kill_9_then_resume(tmp_path, items, whole, seed, workers):
    path, part, moments, want = tmp_path / "f.h5", tmp_path / "f.h5.part", random.Random(seed), expected(items)
    writers, kept = [], 0
    while len(writers) < 3 or not kept:
        writers.append(fork.Process(target=write_slowly, args=(path, items, workers)))
        writers[-1].start()
        while not part.exists(): time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.22) + 0.1 * max(0, len(writers) - 3))  # a busy computer gets more time
        os.kill(writers[-1].pid, signal.SIGKILL)
        writers[-1].join()
        assert writers[-1].exitcode == -signal.SIGKILL and not path.exists()
        store = FeatureStore(part)  # opens, and what it calls done is right
        rows, kept = [k for k, item in enumerate(items) if item.id in store], len(store)
        assert (store.read([items[k].id for k in rows])[0] == want[rows]).all()
    assert kept < 50
    report = write_features(path, items, Patches(), batch_size=4)
    assert (report.kept, report.written) == (kept, 50 - kept) and path.read_bytes() == whole and not part.exists()
    for writer in writers:
        with suppress(ProcessLookupError): os.killpg(writer.pid, signal.SIGKILL)


def test_torn_states(tmp_path, items, whole):
    path, part = tmp_path / "f.h5", tmp_path / "f.h5.part"
    part.write_bytes(whole)
    with h5py.File(part, "r+") as file:
        file["features"][8:12] = np.nan  # filled with who knows what, not flagged
        file["done"][8:12] = 0
        file["done"][30] = 0             # flag of one row lost
    (tmp_path / "f.h5.part.new").write_bytes(whole[:500])  # and an extension that died early
    assert items[9].id not in FeatureStore(part)
    model = Patches()
    model.pause = 0
    report = write_features(path, items, model, batch_size=4)
    assert (report.kept, report.written) == (45, 5)
    x, want = FeatureStore(path).read([item.id for item in items])[0], expected(items)
    assert (x[8:12] == want[8:12]).all() and np.isfinite(x).all()


def test_extend_keeps_what_is_there(tmp_path, items):
    path = tmp_path / "f.h5"
    write_features(path, items[10:20], Patches(), batch_size=4)
    old = FeatureStore(path)
    before = old.read([items[12].id])[0]
    nothing = Patches(scale=0.0)  # would be seen if an old row were computed again
    report = write_features(path, items[:30], nothing, batch_size=4)
    assert (report.kept, report.written) == (10, 20)
    new = FeatureStore(path)
    assert new.ids == [item.id for item in items[10:20] + items[:10] + items[20:30]]
    assert (new.read([items[12].id])[0] == before).all() and (old.read([items[12].id])[0] == before).all()
    assert len(np.unique(new.read([items[3].id])[0])) == 1
    stamp = path.read_bytes()
    report = write_features(path, items[5:9], nothing, batch_size=4)  # a smaller wish takes nothing away
    assert (report.kept, report.written) == (4, 0) and path.read_bytes() == stamp


def test_extension_killed_while_the_list_grows(tmp_path, items):
    path = tmp_path / "f.h5"
    write_features(path, items[:8], Patches(), batch_size=4)

    def stop(done, total):
        if done >= 16: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): write_features(path, items[:30], Patches(), batch_size=4, progress=stop)
    assert len(FeatureStore(path)) == 8 and len(FeatureStore(f"{path}.part")) == 16
    report = write_features(path, items, Patches(), batch_size=4)  # by now fifty are wanted
    assert (report.kept, report.written) == (16, 34)
    assert len(FeatureStore(path)) == 50 and os.listdir(tmp_path) == ["f.h5"]


def test_bad_pictures(tmp_path, items):
    bad = Item("broken", str(tmp_path / "broken.jpg"), "val"), Item("lost", str(tmp_path / "lost.jpg"), "val")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    mixed = [items[0], bad[0], items[1], bad[1]]
    for workers in (0, 1):
        path = tmp_path / f"{workers}.h5"
        report = write_features(path, mixed, Patches(), batch_size=4, workers=workers)  # one bad between two good
        assert report.written == 2 and [p for p, _ in report.bad] == [b.path for b in bad] and "no such file" in str(report)
        store = FeatureStore(path)
        assert "broken" not in store and len(store) == 2
        with pytest.raises(UserError, match="no features of picture 'broken'"): store.read(["broken"])
        with pytest.raises(BadImage, match="broken.jpg"):
            write_features(tmp_path / "r.h5", mixed, Patches(), batch_size=2, workers=workers, on_bad="raise")
    shutil.copy(items[2].path, bad[0].path)
    inode = path.stat().st_ino
    report = write_features(path, mixed, Patches(), batch_size=2)
    assert (report.written, report.kept, len(report.bad)) == (1, 2, 1) and "broken" in FeatureStore(path)
    assert path.stat().st_ino == inode  # filled in place, not copied
    with pytest.raises(UserError, match="none of 1 pictures.*lost.jpg: no such file"):
        write_features(tmp_path / "n.h5", bad[1:], Patches())


@pytest.mark.parametrize("scale, dtype, words", [
    (1e6, "fp16", "too large for fp16"), (float("nan"), "fp32", "not finite"), (float("inf"), "fp16", "not finite")])
def test_numbers_that_cannot_be_stored(tmp_path, items, scale, dtype, words):
    with pytest.raises(UserError, match=f"0.png.*{words}"): write_features(tmp_path / "f.h5", items, Patches(scale), dtype=dtype)
    assert len(FeatureStore(tmp_path / "f.h5.part")) == 0


def test_fp32_keeps_large_numbers(tmp_path, items):
    write_features(tmp_path / "f.h5", items[:3], Patches(1e6), dtype="fp32")
    x = FeatureStore(tmp_path / "f.h5").read([items[0].id])[0]
    assert x.dtype == np.float32 and np.abs(x).max() > 70_000


def test_another_kind_of_file(path, items):
    other = Patches(); other.spec = {"name": "patches", "grid": 5}
    with pytest.raises(UserError, match='its spec is .*"grid": 4.*this run has .*"grid": 5'): write_features(path, items, other)
    other = Patches(); other.prepare = Preprocess(size=16, resize="crop")
    with pytest.raises(UserError, match='its prepare is .*"squash".*this run has .*"crop"'): write_features(path, items, other)
    with pytest.raises(UserError, match='its dtype is "fp16", this run has "fp32"'):
        write_features(path, items, Patches(), dtype="fp32")
    other = Patches(); other.forward = lambda images: torch.zeros(len(images), 9, 3)
    with pytest.raises(UserError, match=r"its shape is \[16, 3\], this run has \[9, 3\]"): write_features(path, items, other)
    os.replace(path, f"{path}.part")
    with pytest.raises(UserError, match="f.h5.part: its dtype"): write_features(path, items, Patches(), dtype="fp32")


def test_wishes_that_make_no_sense(path, items, monkeypatch):
    for wrong, words in [(dict(dtype="fp8"), "fp16 or fp32"), (dict(on_bad="shrug"), "skip or raise")]:
        with pytest.raises(UserError, match=words): write_features(path, items, Patches(), **wrong)
    with pytest.raises(UserError, match="no pictures"): write_features(path, [], Patches())
    with pytest.raises(UserError, match="two pictures have the id"):
        write_features(path, [items[0], Item(items[0].id, items[1].path, "val")], Patches())
    with pytest.raises(UserError, match="cannot be stored"): write_features(path, [Item("a\0b", items[0].path, "val")], Patches())
    write_features(path, items + items[:3], Patches())  # the same picture twice is one picture
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(UserError, match="the disk has 0.0 GB left"): write_features(f"{path}2", items, Patches())


def hold(path, ready):
    with h5py.File(path, "r+"):
        ready.set()
        time.sleep(60)


def test_only_one_writer(path, items):
    ready = fork.Event()
    holder = fork.Process(target=hold, args=(path, ready))
    holder.start()
    assert ready.wait(10)
    try:
        with pytest.raises(UserError, match="f.h5: another process is writing"): write_features(path, items, Patches())
        assert len(FeatureStore(path)) == 50  # reading is allowed
    finally: holder.kill(); holder.join()
    with h5py.File(path), pytest.raises(UserError, match="is open for reading in this process"):
        write_features(path, items, Patches())


def test_a_backbone_that_changes_its_mind(tmp_path, items):
    model = Patches()
    forward, calls = model.forward, []
    def fickle(images):
        calls.append(1)
        return forward(images)[:, :16 if len(calls) < 4 else 20].repeat(1, 1 if len(calls) < 4 else 2, 1)
    model.forward = fickle
    with pytest.raises(ValueError, match=r"features \(4, 32, 3\) for 4 rows of \(16, 3\)"):
        write_features(tmp_path / "f.h5", items, model, batch_size=4)
    store = FeatureStore(tmp_path / "f.h5.part")
    assert len(store) == 8 and (store.read(store.ids)[0] == expected(items)[:8]).all()


def told_when_full(path, items, limit) -> str:
    """What a writer says whose files may not grow beyond `limit` bytes, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try: write_features(path, items, Patches(), batch_size=4)
    except UserError as error: return str(error)
    return "nothing"


def test_full_disk(tmp_path, items, whole):
    path, about = tmp_path / "f.h5", describe(Patches(), "fp16", "cpu")
    for name, place, kept in [("features", 10 * 96 + 40, 0), ("done", 22, 22)]:  # where the disk ends
        blank_store(f"{path}.part", [item.id for item in items], about)
        with h5py.File(f"{path}.part") as file: limit = file[name].id.get_offset() + place
        assert path.with_name("f.h5.part").stat().st_size == len(whole)
        with fork.Pool(1) as pool: words = pool.apply(told_when_full, (path, items, limit))
        assert "f.h5.part: cannot be written (File too large)" in words and not path.exists()
        assert len(FeatureStore(f"{path}.part")) == kept
        assert write_features(path, items, Patches(), batch_size=4).kept == kept
        assert np.allclose(FeatureStore(path).read([item.id for item in items])[0], expected(items), atol=5e-3)  # a batch of two
        os.remove(path)


def test_damaged_files(path, whole, tmp_path):
    for size in (0, 5, 100, 1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.h5").write_bytes(whole[:size])
        with pytest.raises(UserError, match="cut.h5: "): FeatureStore(tmp_path / "cut.h5")
        with pytest.raises(UserError, match="cut.h5: "): write_features(tmp_path / "cut.h5", [Item("a", "b", "c")], Patches())
    (tmp_path / "text.h5").write_text("hello " * 500)
    with pytest.raises(UserError, match="text.h5: not a readable HDF5 file"): FeatureStore(tmp_path / "text.h5")
    with pytest.raises(UserError, match="none.h5: no such file"): FeatureStore(tmp_path / "none.h5")
    with h5py.File(tmp_path / "else.h5", "w") as file: file["pictures"] = [1]
    with pytest.raises(UserError, match="else.h5: holds no usable features .no .features"): FeatureStore(tmp_path / "else.h5")
    with h5py.File(tmp_path / "int.h5", "w") as file: file["1_features"] = np.ones((2, 3), np.int32)
    with pytest.raises(UserError, match="int.h5: .*type int32"): FeatureStore(tmp_path / "int.h5")
    store = FeatureStore(path)
    os.truncate(path, 3000)  # while it is open
    with pytest.raises(UserError, match="f.h5: the features of .* end too early"): store.read(store.ids)


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_the_original_layout(tmp_path, kind):
    rng, want = np.random.default_rng(0), {}
    with h5py.File(tmp_path / "o.h5", "w") as file:
        for k in (391895, 42, 7):
            want[str(k)] = file[f"{k}_features"] = rng.standard_normal((12, 5)).astype(kind)
        file.create_dataset("8_features", data=want["7"], compression="gzip")
        want["8"] = want["7"]
    store = FeatureStore(tmp_path / "o.h5")
    asked = ["42", "8", "391895", "42", "7"]
    for _ in range(2):
        x, mask = store.read(asked)
        assert x.dtype == kind and mask.all() and (x == np.stack([want[k] for k in asked])).all()
    assert "42" in store and "43" not in store and len(store) == 4 and store.spec is None
    with pytest.raises(UserError, match="o.h5: no features of picture '43'"): store.read(["43"])
    with pytest.raises(UserError, match="unknown origin"): write_features(tmp_path / "o.h5", [Item("a", "b", "c")], Patches())
    del store
    with h5py.File(tmp_path / "o.h5", "a") as file: file["9_features"] = np.zeros((12, 4), kind)
    with pytest.raises(UserError, match="'9' has .*others"): FeatureStore(tmp_path / "o.h5").read(["9"])


@pytest.mark.parametrize("compressed", [False, True])
def test_lengths(tmp_path, compressed):
    x, lengths = np.random.default_rng(0).standard_normal((4, 10, 3)).astype(np.float32), [3, 10, 0, 7]
    with h5py.File(tmp_path / "r.h5", "w") as file:
        file.create_dataset("features", data=x, compression="gzip" if compressed else None)
        file["ids"], file["done"], file["lengths"] = [b"a", b"b", b"c", b"d"], [1, 1, 1, 1], lengths
    got, mask = FeatureStore(tmp_path / "r.h5").read(["d", "a", "c"])
    assert got.shape == (3, 7, 3) and mask.sum(1).tolist() == [7, 3, 0]
    assert (got[0] == x[3, :7]).all() and (got[1, :3] == x[0, :3]).all() and not got[1, 3:].any() and not got[2].any()


def read_randomly(store: FeatureStore, want: np.ndarray, ids: list[str], seed: int) -> int:
    """Number of wrong batches out of 500."""
    rng, wrong = np.random.default_rng(seed), 0
    for _ in range(500):
        rows = rng.integers(0, len(ids), 16)
        wrong += not (store.read([ids[row] for row in rows])[0] == want[rows]).all()
    return wrong


def test_many_readers(path, items):
    store, want, ids = FeatureStore(path), expected(items), [item.id for item in items]
    read_randomly(store, want, ids, 0)  # open before the fork
    with fork.Pool(3) as forked, spawn.Pool(1) as fresh, ThreadPoolExecutor(4) as threads:
        jobs = [pool.apply_async(read_randomly, (store, want, ids, seed)) for seed in range(3) for pool in (forked, fresh)]
        jobs += [threads.submit(read_randomly, store, want, ids, seed) for seed in range(8)]
        results = [job.get(240) if hasattr(job, "get") else job.result(240) for job in jobs]
    assert results == [0] * 14


def test_many_threads_at_once(path, items):
    """A read that is interrupted between finding its place and reading must not read elsewhere."""
    store, want, ids = FeatureStore(path), expected(items), [item.id for item in items]

    class Dawdling:  # gives way where it hurts most
        def __init__(self, raw): self.raw = raw
        def seek(self, start): self.raw.seek(start); time.sleep(1e-4); return start
        def readinto(self, out): return self.raw.readinto(out)
    store._raw = Dawdling(store._raw)
    with ThreadPoolExecutor(4) as threads:
        rows = np.random.default_rng(0).integers(0, len(ids), (24, 5))
        got = threads.map(lambda block: store.read([ids[row] for row in block])[0], rows)
        assert all((x == want[block]).all() for x, block in zip(got, rows))


def inherit(store, want, ids, seed): os._exit(read_randomly(store, want, ids, seed))


def seconds(read, batches) -> float:
    """Processor time that `read` takes for all `batches`, the best of three rounds."""
    rounds = []
    for _ in range(3):
        begin = time.process_time()
        for ids in batches: read(ids)
        rounds.append(time.process_time() - begin)
    return min(rounds)


def test_one_array_is_read_faster_than_one_dataset_a_picture(tmp_path):
    """Small files that the operating system has in memory: this measures the work around the disk, and only its direction."""
    names, sheet = [str(k) for k in range(120)], np.random.default_rng(0).standard_normal((36, 512)).astype(np.float16)
    blank_store(tmp_path / "one.h5", names, {"spec": {}, "prepare": {}, "dtype": "fp16", "shape": sheet.shape})
    with h5py.File(tmp_path / "one.h5", "r+") as one, h5py.File(tmp_path / "many.h5", "w") as many:
        for row, name in enumerate(names): one["features"][row] = many[f"{name}_features"] = sheet + np.float16(row % 7)
        one["done"][:] = 1

    def read_each(ids):  # as the original does: open the file, then one dataset after the other
        with h5py.File(tmp_path / "many.h5") as file: return np.stack([file[f"{name}_features"][()] for name in ids])
    store, batches = FeatureStore(tmp_path / "one.h5"), [names[k:k + 40][::-1] for k in range(0, 120, 40)]
    assert (store.read(batches[0])[0] == read_each(batches[0])).all()
    assert seconds(lambda ids: store.read(ids), batches) < seconds(read_each, batches)


def test_an_inherited_store(path, items):
    """Fork without pickling: parent and children share the object and, until they reopen, the place in the file."""
    store, want, ids = FeatureStore(path), expected(items), [item.id for item in items]
    children = [fork.Process(target=inherit, args=(store, want, ids, seed)) for seed in range(4)]
    for child in children: child.start()
    assert read_randomly(store, want, ids, 9) == 0
    for child in children: child.join()
    assert [child.exitcode for child in children] == [0] * 4


def test_a_store_travels_as_its_path(path):
    store = FeatureStore(path)
    assert len(pickle.dumps(store)) < 200 + len(str(path))
    again = pickle.loads(pickle.dumps(store))
    assert store.ids[3] in again and again.dim == 3 and (again.read(again.ids)[0] == store.read(store.ids)[0]).all()


def test_rows_never_move_the_book_keeping(tmp_path):
    """Why a kill is harmless: after creation nothing outside the three arrays changes, and the file does not grow."""
    about = describe(Patches(), "fp16", "cpu")
    blank_store(str(tmp_path / "f.h5"), [f"{k}" for k in range(20)], about)
    before = (tmp_path / "f.h5").read_bytes()
    with h5py.File(tmp_path / "f.h5") as file:
        inside = {(d.id.get_offset(), d.nbytes) for d in (file["features"], file["done"])}
    with row_writer(tmp_path / "f.h5") as put:
        for k in range(0, 20, 5): put(list(range(k, k + 5)), np.full((5, 16, 3), 7, np.float16))
    after = (tmp_path / "f.h5").read_bytes()
    assert len(after) == len(before)
    moved = [k for k in range(len(after)) if before[k] != after[k]]
    assert moved and all(any(start <= k < start + size for start, size in inside) for k in moved)
