"""What every classic promises: one pass equals the loop, rows are their own, eight pictures are learned by heart, a folder is the model."""
import os
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18

from expnet.classics.show_attend_tell import ShowAttendTell, ShowAttendTellConfig
from expnet.cli.app import shell
from expnet.data.batches import Batches, Pictures
from expnet.data.captions import Item, karpathy
from expnet.data.vocabulary import Vocab
from expnet.data.shapes import shapes, write_world
from expnet.decode.search import Beam, decode
from expnet.models.backbone import make_backbone
from expnet.models.captioner import unroll
from expnet.score.evaluate import evaluate
from expnet.tools import UserError, seed_all
from expnet.train.checkpoints import kind_of, load, save_model
from expnet.train.loop import Data, fit
from expnet.train.recipes import evaluate_split, open_data, prepare_world, recipe, train
from expnet.train.step import Learner, Phase, learn_words, lesson, training_mode

KINDS = ["ShowTell", "ShowAttendTell", "HardAttendTell"]
measured = pytest.mark.skipif(not os.environ.get("EXPNET_MEASURE"), reason="minutes of training: set EXPNET_MEASURE=1")


class Drawn:
    """Eight drawn pictures, as pictures or as the regions that the backbone of the drawn world sees."""
    def __init__(self):
        self.records, self.eye, self.pixels = shapes(8, 0, 0, 0, 0), make_backbone("shapes"), False
        self.items = [Item(r.id, "", "train", r.captions[:1]) for r in self.records]
        self.vocab = Vocab.build(self.items, min_count=1)
        pictures = torch.stack([self.eye.prepare(Image.fromarray(r.picture())) for r in self.records])
        with torch.no_grad(): self.x = {True: pictures.numpy(), False: self.eye(pictures).numpy()}

    def read(self, ids: list[str]) -> tuple[np.ndarray, np.ndarray]:
        places = [next(i for i, item in enumerate(self.items) if item.id == id) for id in ids]
        return self.x[self.pixels][places], np.ones((len(ids), 64), bool)


@pytest.fixture
def drawn() -> Drawn: return Drawn()


def tiny(kind: str, drawn: Drawn, **sizes):
    """A seeded model of this kind in its size for the drawn world."""
    make_config, make_model = kind_of(kind, "test")
    seed_all(0)
    return make_model(replace(make_config.preset("tiny", 128), **sizes), drawn.vocab, make_backbone("shapes"))


@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_equals_the_loop_and_rows_are_their_own(kind, drawn):
    model, generator = tiny(kind, drawn).eval(), torch.Generator().manual_seed(0)
    x, mask = torch.randn(3, 9, 128, generator=generator), torch.ones(3, 9, dtype=torch.bool)
    tokens = torch.randint(4, len(drawn.vocab), (6, 7), generator=generator)
    tokens[:, 0] = drawn.vocab.sos
    mask[1, 5:] = False
    with torch.no_grad():
        memory = model.encode(x, mask)
        parallel, loop = model(memory, tokens).log_softmax(-1), unroll(model, memory, tokens)
        alone = model(model.encode(x[1:2, :5]), tokens[2:4]).log_softmax(-1)
        longer = model(memory, torch.cat([tokens, torch.full((6, 3), drawn.vocab.pad)], 1)).log_softmax(-1)
    torch.testing.assert_close(parallel, loop, atol=1e-5, rtol=0)
    torch.testing.assert_close(parallel[2:4], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(parallel, longer[:, :7], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_eight_pictures_are_learned_by_heart_and_the_folder_says_the_same(kind, drawn, tmp_path):
    model = tiny(kind, drawn)
    phase = replace(recipe("tiny", kind).phases[1], captions=1, epochs=1)
    learner, batches = Learner(model, phase, "cpu"), Batches(drawn.items, drawn.vocab, drawn, 8)
    training_mode(model)
    for epoch in range(100): learner.step(batches.load(batches.plan(epoch)[0], epoch), phase.lr * min(1, (epoch + 1) / 10))
    model.eval()
    captions = lambda model: [texts[0] for texts in decode(model, model.encode(torch.from_numpy(drawn.x[False])), Beam(3)).texts(drawn.vocab)]
    said = captions(model)
    score = lambda captions: evaluate({item.id: text for item, text in zip(drawn.items, captions)}, drawn.items).totals["CIDEr-D"]
    assert score(said) > 0.97 * score([item.captions[0] for item in drawn.items])
    assert captions(load(save_model(tmp_path / kind, model))) == said


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("who", ["body", "all"])
def test_the_statistics_of_the_backbone_stay_and_those_of_the_body_learn(kind, who, drawn):
    model, drawn.pixels = tiny(kind, drawn), True
    statistics = lambda: {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}
    before = statistics()
    learner, batches = Learner(model, Phase(train=who, captions=1), "cpu"), Batches(drawn.items, drawn.vocab, drawn, 4)
    training_mode(model)
    for batch in batches.epoch(0): learner.step(batch, 1e-3)
    moved = {name for name, values in statistics().items() if not torch.equal(values, before[name])}
    assert any(name.startswith("backbone.") for name in before)
    assert moved == {name for name in before if not name.startswith("backbone.")}


def test_a_batch_of_one_picture_can_be_learned(drawn):
    model = tiny("ShowTell", drawn)
    learner, batches = Learner(model, Phase(captions=1), "cpu"), Batches(drawn.items[:1], drawn.vocab, drawn, 4)
    training_mode(model)
    assert learner.step(next(batches.epoch(0)), 1e-3)["loss"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_own_words_change_what_is_read_and_not_what_is_asked(kind, drawn):
    model, batch = tiny(kind, drawn).eval(), Batches(drawn.items, drawn.vocab, drawn, 8).load(np.arange(8))
    with torch.no_grad():
        memory = model.encode(batch.x)
        (plain, targets), (mixed, same) = (lesson(model, memory, batch, Phase(own=own, epochs=1)) for own in (0.0, 0.9))
        assert (mixed != plain).any() and torch.equal(targets, same)
        losses = [learn_words(model, memory, batch, Phase(own=own, epochs=2))["loss"].item() for own in (0.0, 0.9)]
    assert losses[0] == losses[1]                             # the share begins at 0 in the first of two epochs


def test_pictures_that_vary_are_learned_by_a_body_behind_a_frozen_backbone(tmp_path, drawn):
    dataset = write_world(tmp_path / "world", 12, 4, 4, 1, 1)
    items = karpathy(dataset, dataset.parent)
    drawn.vocab = Vocab.build(items, min_count=1)
    model = tiny("ShowTell", drawn)
    before = {name: w.clone() for name, w in model.backbone.state_dict().items()}
    data = Data(items, drawn.vocab, pictures=Pictures(items, drawn.eye.prepare, 64), backbone=drawn.eye)
    history = fit(model, data, Phase(augment=True, epochs=2, batch=5, warmup=0, log_every=1), tmp_path / "out", device="cpu")
    assert [row["epoch"] for row in history if "epoch" in row] == [1, 2]
    assert all(torch.equal(w, before[name]) for name, w in model.backbone.state_dict().items())
    with pytest.raises(UserError, match="needs pictures"):
        fit(model, replace(data, pictures=None), Phase(name="again", augment=True), tmp_path / "out", device="cpu")


@measured
@pytest.mark.parametrize("kind, least", [("ShowTell", 1.0), ("ShowAttendTell", 1.6), ("HardAttendTell", 1.6)])
def test_four_minutes_on_the_drawn_world_are_enough(kind, least, tmp_path):
    prepare_world(tmp_path / "data")
    train(tmp_path / "data", tmp_path / "none", recipe("tiny", kind), "cpu", only=["features"], backbone=make_backbone("shapes"))
    began = time.process_time()
    train(tmp_path / "data", tmp_path / "model", recipe("tiny", kind), "cpu", only=recipe("tiny", kind).names[:2])
    spent = time.process_time() - began
    scores = evaluate_split(load(tmp_path / "model"), open_data(tmp_path / "data"))[1]
    shown = {name: round(scores.totals[name], 3) for name in ("CIDEr-D", "BLEU-4", "scene-exact")}
    print(f"{kind}: {shown}, {spent:.0f} CPU-seconds")
    assert scores.totals["CIDEr-D"] >= least and spent < 240


def test_the_import_command_reads_a_tutorials_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    body = {"linear": nn.Linear(512, 6), "bn": nn.BatchNorm1d(6)}
    eye = nn.ModuleDict({"resnet": nn.Sequential(*list(resnet18().children())[:-1]), **body})
    mouth = nn.ModuleDict({"embed": nn.Embedding(7, 6), "lstm": nn.LSTM(6, 5), "linear": nn.Linear(5, 7)})
    torch.save(eye.state_dict(), "encoder.ckpt")
    torch.save(mouth.state_dict(), "decoder.ckpt")
    (tmp_path / "words.txt").write_text("<pad>\n<start>\n<end>\n<unk>\na\ndog\nruns")
    line = "expnet import decoder.ckpt --vocab words.txt --out model --kind ShowTell"
    assert "ShowTell with --backbone" in shell(line) and not (tmp_path / "model").exists()
    assert ", 0 missing, 0 mismatched, 0 unexpected" in shell(f"{line} --backbone encoder.ckpt")
    model = load(tmp_path / "model")
    assert type(model).__name__ == "ShowTell" and torch.equal(model.head.weight, mouth["linear"].weight)
    Image.effect_noise((60, 40), 50).convert("RGB").save("photo.jpg")
    assert model.caption("photo.jpg", beam=2)[0].captions


class TutorialsWay(nn.Module):
    """Show, Attend and Tell as the tutorial computes it: regions [R, N, D] for every caption, keys anew for every word."""
    def __init__(self, c: ShowAttendTellConfig, vocab: int):
        super().__init__()
        self.key, self.query, self.score = nn.Linear(c.features, c.attention), nn.Linear(c.hidden, c.attention), nn.Linear(c.attention, 1)
        self.embed, self.cell = nn.Embedding(vocab, c.words), nn.LSTMCell(c.words + c.features, c.hidden)
        self.first_h, self.first_c, self.gate = nn.Linear(c.features, c.hidden), nn.Linear(c.features, c.hidden), nn.Linear(c.hidden, c.features)
        self.head = nn.Linear(c.hidden, vocab)

    def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        h, c, scores = self.first_h(x.mean(1)), self.first_c(x.mean(1)), []
        for word in self.embed(tokens).unbind(1):
            shares = self.score(F.relu(self.key(x) + self.query(h)[:, None]))[..., 0].softmax(1)
            view = (x * shares[..., None]).sum(1) * self.gate(h).sigmoid()
            h, c = self.cell(torch.cat([word, view], 1), (h, c))
            scores.append(self.head(h))
        return torch.stack(scores, 1)


@measured
@pytest.mark.parametrize("sizes, vocab, regions, pictures, places, least", [
    ((2048, 512, 512, 512), 9490, 196, 1, 12, 2.5), ((128, 128, 128, 64), 64, 64, 8, 16, 1.1)], ids=["published", "tiny"])
def test_a_step_is_cheaper_than_the_tutorials(sizes, vocab, regions, pictures, places, least):
    seed_all(0)
    config, words = ShowAttendTellConfig(*sizes, dropout=0.0), Vocab(["EOS", "PAD", "SOS", "UNK", *(f"w{i:04}" for i in range(vocab - 4))])
    ours, theirs = ShowAttendTell(config, words), TutorialsWay(config, vocab)
    x, tokens = torch.randn(pictures, regions, sizes[0]), torch.randint(4, vocab, (5 * pictures, places))
    ways, spent = {"ours": lambda: ours(ours.encode(x), tokens), "theirs": lambda: theirs(x.repeat_interleave(5, 0), tokens)}, {"ours": [], "theirs": []}
    for _ in range(5):
        for name, way in ways.items():
            began = time.process_time()
            F.cross_entropy(way().flatten(0, 1), tokens.flatten()).backward()
            spent[name].append(time.process_time() - began)
    medians = {name: sorted(values)[2] for name, values in spent.items()}
    print({name: f"{1000 * value:.0f} ms" for name, value in medians.items()}, f"ratio {medians['theirs'] / medians['ours']:.2f}")
    assert medians["theirs"] > least * medians["ours"]
