"""Published files: attacks are refused, damage is named, a file comes back bit for bit, other words take a model along."""
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import drawn_file

from expnet.data.vocabulary import Vocab
from expnet.data.pickles import read_plain, read_vocabulary, write_vocabulary
from expnet.models.official import export_official, import_official, transfer
from expnet.models.swin import to_timm
from expnet.tools import UserError
from expnet.train.checkpoints import load, save_model

recorded = json.loads((Path(__file__).parent / "golden" / "reference_a.json").read_text())
vocab, GROUPS, HEADS = Vocab(recorded["words"]), tuple(recorded["config"]["num_exp_enc_list"]), recorded["config"]["num_heads"]


class Call:
    """Pickled as a call of os.mkdir("executed")."""
    def __reduce__(self): return os.mkdir, ("executed",)


ATTACKS = {
    **{f"reduce, protocol {p}": pickle.dumps({"idx2word_list": [Call()]}, protocol=p) for p in range(6)},
    "inst": b"(S'executed'\nios\nmkdir\n.", "obj": b"(cos\nmkdir\nS'executed'\no.", "newobj": b"\x80\x02cos\nmkdir\nX\x08\x00\x00\x00executed\x85\x81.",
    "build": b"cos\nmkdir\n}b.", "extension": b"\x80\x02\x82\x01.", "persistent": b"Pexecuted\n.", "persistent, binary": b"X\x08\x00\x00\x00executedQ.",
    "only a global": b"cos\nsystem\n.", "attribute": b"\x80\x04\x8c\x02os\x8c\x0bpath.exists\x93.", "buffer": b"\x80\x05\x97.",
    "memo bomb": b"]r\xff\xff\xff\x7f.", "memo bomb, text": b"]p2000000000\n.", "long memo": b"]p" + b"9" * 5000 + b"\n.",
    "cut off": pickle.dumps(["a", "b"])[:-3], "empty": b"", "text": b"a list of words", "no stop": b"]", "stack empty": b"s.", "zip": b"PK\x03\x04",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_pickle_that_is_a_program_is_refused_and_not_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("words.pickle").write_bytes(ATTACKS[name])
    for reader in (read_plain, read_vocabulary):
        with pytest.raises(UserError, match="words.pickle"): reader("words.pickle")
    assert os.listdir() == ["words.pickle"]


def test_a_refusal_names_what_was_asked_for(tmp_path):
    for protocol, name in ((2, "GLOBAL"), (4, "STACK_GLOBAL")):
        (tmp_path / "words.pickle").write_bytes(pickle.dumps({"a": Call()}, protocol))
        with pytest.raises(UserError, match=f" {name} {os.mkdir.__module__} mkdir"): read_plain(tmp_path / "words.pickle")


def test_random_bytes_and_damaged_pickles_raise_nothing_but_user_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw, good = np.random.default_rng(0), pickle.dumps({"idx2word_list": ["a"] * 9, "sos_str": "SOS", "evil": Call()})
    for k in range(2000):
        data = bytearray(good) if k % 2 else bytearray(draw.bytes(40))
        for place in draw.integers(0, len(data), 3): data[place] = draw.integers(256)
        Path("x").write_bytes(data)
        try: read_plain("x")
        except UserError: pass
    assert os.listdir() == ["x"]


def test_plain_values_are_read_from_every_protocol(tmp_path):
    value = {"word2idx_dict": {"\n": 0, "é": 1}, "list": [1, 2**40, -3, 1.5, None, True, (), (1,), (1, 2, 3, 4)], "empty": [[], {}, ""]}
    for protocol in range(6):
        (tmp_path / "x").write_bytes(pickle.dumps(value, protocol))
        assert read_plain(tmp_path / "x") == value


def test_the_order_of_the_words_and_the_line_break_survive(tmp_path):
    words = Vocab(["\n", '"', "#", "EOS", "PAD", "SOS", "UNK", "a", "zucchini"])
    write_vocabulary(tmp_path / "w.pickle", words)
    theirs = pickle.loads((tmp_path / "w.pickle").read_bytes())
    assert sorted(theirs) == ["eos_str", "idx2word_list", "sos_str", "word2idx_dict"] and theirs["word2idx_dict"]["\n"] == 0
    assert read_vocabulary(tmp_path / "w.pickle").words == words.words
    theirs["word2idx_dict"]["a"] = 0
    (tmp_path / "w.pickle").write_bytes(pickle.dumps(theirs))
    with pytest.raises(UserError, match="disagree"): read_vocabulary(tmp_path / "w.pickle")
    (tmp_path / "w.pickle").write_bytes(pickle.dumps({"idx2word_list": ["a"]}))
    with pytest.raises(UserError, match="w.pickle: field 'word2idx_dict' is missing"): read_vocabulary(tmp_path / "w.pickle")
    (tmp_path / "w.pickle").write_bytes(pickle.dumps({"idx2word_list": ["a", ["b"]], "word2idx_dict": {"a": 0}}))
    with pytest.raises(UserError, match="holds something else than words"): read_vocabulary(tmp_path / "w.pickle")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("place", ["beside", "inside", "whole"])
def test_a_malicious_checkpoint_is_refused_and_not_run(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    torch.save({"beside": {"model_state_dict": {}, "extra": Call()}, "inside": {"model_state_dict": {"a": Call()}}, "whole": Call()}[place], "evil.pth")
    with pytest.raises(UserError, match=r"evil.pth: .*mkdir"): import_official("evil.pth", vocab)
    Path("old.pth").write_bytes(pickle.dumps(Call()))
    with pytest.raises(UserError, match="old.pth"): import_official("old.pth", vocab)
    assert sorted(os.listdir()) == ["evil.pth", "old.pth"]


def slow_mask(side: int, window: int) -> torch.Tensor:
    """The mask of shifted windows, place by place: 0 where two places of a window were neighbours before the shift, else -100."""
    shift, region = window // 2, lambda place: 0 if place < side - window else 1 if place < side - window // 2 else 2
    out = []
    for row in range(0, side, window):
        for column in range(0, side, window):
            area = [(region(row + i), region(column + j)) for i in range(window) for j in range(window)]
            out.append([[0.0 if a == b else -100.0 for b in area] for a in area])
    assert shift * 2 == window
    return torch.tensor(out)


def slow_index(window: int) -> torch.Tensor:
    """Row of the bias table for each pair of places, one by one."""
    places = [(i, j) for i in range(window) for j in range(window)]
    return torch.tensor([[(a[0] - b[0] + window - 1) * (2 * window - 1) + a[1] - b[1] + window - 1 for b in places] for a in places])


@pytest.fixture(scope="module")
def whole() -> dict[str, torch.Tensor]:
    """Every entry of an end-to-end file in the published layout: drawn weights, indices and masks found the slow way."""
    names, c = recorded["e2e_names"], recorded["config"]["swin"]
    tensors, sides = drawn_file(recorded, names), [c["img"] // c["patch"] >> s for s in range(len(c["depths"]))]
    for name in names:
        if name.endswith("relative_position_index"): tensors[name] = slow_index(c["window"])
        if name.endswith("attn_mask"): tensors[name] = slow_mask(sides[int(name.split(".")[2])], c["window"])
    assert {name: list(x.shape) for name, x in tensors.items()} == names
    return tensors


@pytest.mark.parametrize("prefix", ["", "swin_transf."])
def test_import_then_export_is_bit_equal(tmp_path, whole, prefix):
    tensors = {name: x for name, x in whole.items() if prefix or not name.startswith("swin_transf.")}
    torch.save({"model_state_dict": tensors, "optimizer_state_dict": {"state": {0: {"step": 3}}}}, tmp_path / "theirs.pth")
    model, report = import_official(tmp_path / "theirs.pth", vocab, GROUPS, HEADS)
    assert (report.used, report.complete, report.unexpected) == (len(tensors), True, ())
    again = load(save_model(tmp_path / "folder", model))                   # and through a model folder
    for number, net in enumerate((model, again)):
        export_official(tmp_path / f"{number}.pth", net)
        back = torch.load(tmp_path / f"{number}.pth", weights_only=True)["model_state_dict"]
        assert back.keys() == tensors.keys()
        assert [n for n, x in tensors.items() if x.dtype != back[n].dtype or not torch.equal(x, back[n])] == []


def test_three_renamed_and_two_mis_shaped_tensors_are_all_named(tmp_path, whole):
    renamed = ["encoders.1.stc_exp.class_b_embed.weight", "swin_transf.layers.1.blocks.0.attn.qkv.bias", "input_linear.weight"]
    shaped = ["decoders.0.dyn_exp.cond_embed.weight", "swin_transf.layers.0.downsample.reduction.weight"]
    damaged = {f"{name}_old" if name in renamed else name: x[:, 1:] if name in shaped else x for name, x in whole.items()}
    torch.save(damaged, tmp_path / "damaged.pth")
    model, report = import_official(tmp_path / "damaged.pth", vocab, GROUPS, HEADS, strict=False)
    assert sorted(report.missing) == sorted(renamed) and sorted(report.unexpected) == sorted(f"{name}_old" for name in renamed)
    assert sorted(text.split()[0] for text in report.mismatched) == sorted(shaped)
    assert all(w.isfinite().all() for w in model.state_dict().values())      # what was lacking has been drawn, not left unwritten
    with pytest.raises(UserError) as error: import_official(tmp_path / "damaged.pth", vocab, GROUPS, HEADS)
    assert all(name in str(error.value) for name in renamed + shaped)


def test_what_cannot_fit_is_said_in_one_line(tmp_path, whole):
    torch.save(whole, tmp_path / "w.pth")
    cases = [((Vocab(vocab.words[:-1]), GROUPS, HEADS), "41 words, the vocabulary has 40"), ((vocab, (1, 2), HEADS), "has 15"),
             ((vocab, GROUPS, 5), "not divisible")]
    for arguments, words in cases:
        with pytest.raises(UserError, match=words): import_official(tmp_path / "w.pth", *arguments)
    torch.save({"weight": torch.ones(2)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="no ExpansionNet v2 tensors"): import_official(tmp_path / "w.pth", vocab)


def test_weights_in_half_precision_come_in(tmp_path, whole):
    torch.save({n: x.half() if x.is_floating_point() else x for n, x in whole.items()}, tmp_path / "half.pth")
    model, report = import_official(tmp_path / "half.pth", vocab, GROUPS, HEADS)
    assert report.complete and {w.dtype for w in model.parameters()} == {torch.float32}


def test_other_words_and_fewer_places_keep_what_is_shared(tmp_path, whole):
    torch.save(whole, tmp_path / "w.pth")
    model, _ = import_official(tmp_path / "w.pth", vocab, GROUPS, HEADS)
    mine = Vocab(["new", *reversed(vocab.words[2:]), "newer", "EOS", "PAD"])
    seeded, carried = transfer(model, mine, max_len=20)
    assert (carried.shared, carried.new, carried.dropped, carried.positions, carried.new_positions) == (41, 2, 0, 20, 0)
    images, text = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 3, 64, 64))).float(), ["SOS", "w03", "w11", "w30"]
    both = [net.eval()(net.encode(images), torch.tensor([net.vocab.ids(text)]))[..., net.vocab.ids(vocab.words)] for net in (model, seeded)]
    torch.testing.assert_close(*both, atol=1e-5, rtol=1e-5)
    seeded.train()
    seeded(seeded.encode(images), torch.tensor([mine.ids(text)])).sum().backward()
    assert all(p.grad is not None for name, p in seeded.named_parameters() if not name.startswith("backbone."))
    assert seeded.words.embed.weight.grad[mine.index["w03"]].abs().sum() > 0
    halved, _ = transfer(model.bfloat16(), mine)
    assert halved.head.bias[mine.index["w11"]].item() == model.head.bias[vocab.index["w11"]].item()


def test_a_body_is_completed_by_a_swin_in_the_layout_of_timm(tmp_path, whole):
    swin = {name.removeprefix("swin_transf."): x for name, x in whole.items() if name.startswith("swin_transf.")}
    torch.save({name: x for name, x in whole.items() if not name.startswith("swin_transf.")}, tmp_path / "body.pth")
    torch.save(to_timm({name: x for name, x in swin.items() if not name.endswith(("relative_position_index", "attn_mask"))}), tmp_path / "swin.pth")
    model, report = import_official(tmp_path / "body.pth", vocab, GROUPS, HEADS, backbone=tmp_path / "swin.pth")
    own = model.backbone.state_dict()
    assert report.complete and all(torch.equal(own["trunk." + name], x) for name, x in swin.items()
                                   if not name.endswith(("relative_position_index", "attn_mask")))


@pytest.mark.alone                                                           # a neighbour would share the memory's speed and change the ratio
def test_the_published_sizes_fit_into_little_memory_and_half_precision_pays(tmp_path):
    """A file of 949 MB is drawn, imported, and captions a picture; needs 2 GB of disk and about a minute."""
    done = subprocess.run([sys.executable, str(Path(__file__).parent / "full_size.py"), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert max(found["convert"], found["say"], found["say_bf16"]) * 2**30 <= 2.5e9, found
    if torch.ops.mkldnn._is_mkldnn_bf16_supported() and re.search("avx512_bf16|amx_bf16", cpu_flags()):
        assert found["compare"]["fp32"] / found["compare"]["bf16"] >= 1.7, found


def cpu_flags() -> str:
    """What the processor can do, as Linux tells; "" elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""
