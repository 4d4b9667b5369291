"""A small captioner that knows eight drawn scenes, and its artefact, made once for all tests of a run."""
import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F

from expnet.data.captions import tokenize
from expnet.data.vocabulary import Vocab
from expnet.data.shapes import record
from expnet.decode.search import Beam
from expnet.models.backbone import make_backbone
from expnet.models.expansionnet import ExpansionNet, ExpansionNetConfig
from expnet.tools import seed_all

HOW, LONGEST = Beam(5, 5), 20


def scenes(n: int, split: str = "train") -> list[Image.Image]:
    """The first `n` pictures of a split of the drawn world."""
    return [Image.fromarray(record(split, i).picture()) for i in range(n)]


@cache
def captioner() -> ExpansionNet:
    """A tiny ExpansionNet with its backbone, twenty steps into learning eight captions."""
    seed_all(0)
    eye, texts = make_backbone("shapes"), [max(record("train", i).captions, key=len) for i in range(8)]
    vocab = Vocab(sorted({word for text in texts for word in tokenize(text)} | {"PAD", "SOS", "EOS", "UNK"}))
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(vocab.encode(text)) for text in texts], True, vocab.pad)
    model = ExpansionNet(ExpansionNetConfig.preset("tiny", eye.dim), vocab, eye)
    with torch.no_grad(): regions = eye(torch.stack([eye.prepare(picture) for picture in scenes(8)]))
    adam = torch.optim.AdamW((p for name, p in model.named_parameters() if not name.startswith("backbone.")), 3e-3)
    for _ in range(20):
        adam.zero_grad()
        F.cross_entropy(model(model.encode(regions), tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=vocab.pad).backward()
        adam.step()
    return model.eval()


@cache
def artefact() -> Path:
    """The folder of that captioner's artefact, one-call graph included; to be copied, not changed."""
    from expnet.cli.export import make_artefact
    folder = Path(tempfile.mkdtemp(prefix="artefact-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make_artefact(captioner(), folder, HOW, LONGEST, one_call=True, pictures=[*scenes(2), *scenes(2, "test")])
    return folder
