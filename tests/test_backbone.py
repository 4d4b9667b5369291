"""Backbones by name: weights from every kind of file, model folders, what learns and what must not move."""
import json

import pytest
import timm
import torch
from torch import nn

from expnet.data.vocabulary import Vocab
from expnet.models import backbone as module
from expnet.models.backbone import Backbone, from_spec, make_backbone, parts
from expnet.models.expansionnet import ExpansionNet, ExpansionNetConfig
from expnet.models.swin import published_buffers, to_timm
from expnet.tools import UserError
from expnet.train.checkpoints import load, save_model


def pictures(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def micro() -> Backbone:
    torch.manual_seed(0)
    return make_backbone("swin/micro", weights=None)


@pytest.mark.parametrize("options", [{}, {"pooled": True}, {"checkpointing": True, "drop_path": 0.2}, {"size": 128}])
def test_a_model_folder_brings_its_backbone_back(tmp_path, options):
    torch.manual_seed(0)
    eye = make_backbone("swin/micro", weights=None, **options)
    model = ExpansionNet(ExpansionNetConfig.preset("tiny", eye.dim), Vocab(["EOS", "PAD", "SOS", "UNK", "a"]), eye).eval()
    again = load(save_model(tmp_path / "model", model))
    x = torch.randn(2, 3, eye.prepare.size, eye.prepare.size)
    assert again.backbone.spec == eye.spec
    assert torch.equal(again.backbone(x), eye(x)) and torch.equal(again.encode(x).x, model.encode(x).x)
    assert again.backbone.trunk.checkpointing == bool(options.get("checkpointing"))


def test_a_spec_written_before_there_were_options_still_works():
    spec = json.loads('{"name": "shapes", "options": {"batchnorm_eps": null}, "prepare": {"size": 64, "mean": [0.5, 0.5, 0.5], '
                      '"std": [0.5, 0.5, 0.5]}, "regions": 64, "dim": 128}')
    assert from_spec(spec).spec["options"] == spec["options"]                 # equal, or feature files would seem to be others'


@pytest.mark.parametrize("dialect", ["microsoft", "expansionnet", "timm", "safetensors"])
def test_files_of_every_dialect(tmp_path, micro, dialect):
    state = {n.removeprefix("trunk."): w for n, w in micro.state_dict().items()}
    extra = {**published_buffers(micro.trunk.config), "head.weight": torch.ones(5, 16), "head.bias": torch.ones(5)}
    path = tmp_path / ("net.safetensors" if dialect == "safetensors" else "net.pth")
    if dialect == "microsoft": torch.save({"model": {**state, **extra}}, path)
    if dialect == "expansionnet": torch.save({"model_state_dict": {f"swin_transf.{n}": w for n, w in state.items()} | {"head.weight": torch.ones(2)}}, path)
    if dialect == "timm": torch.save({**to_timm(state), "head.fc.weight": torch.ones(5, 16)}, path)
    if dialect == "safetensors":
        from safetensors.torch import save_file
        save_file({n: w.contiguous() for n, w in state.items()}, path)
    eye = make_backbone("swin/micro", weights=path)
    assert torch.equal(eye(pictures()), micro(pictures()))
    wanted = {"microsoft": set(extra), "expansionnet": set(), "timm": {"head.fc.weight"}, "safetensors": set()}
    assert set(eye.unused) == wanted[dialect]


def test_a_missing_and_a_misshaped_tensor_are_named(tmp_path, micro):
    state = {n.removeprefix("trunk."): w for n, w in micro.state_dict().items()}
    state["layers.1.blocks.0.attn.relative_position_bias_table"] = torch.zeros(169, 4)
    del state["norm.bias"]
    torch.save({"model": state}, tmp_path / "net.pth")
    with pytest.raises(UserError, match=r"1 missing \(norm.bias\).*1 of another shape \(layers.1.*\[169, 4\] for \[49, 4\]"):
        make_backbone("swin/micro", weights=tmp_path / "net.pth")


def test_published_weights_by_name_go_through_timm(monkeypatch):
    asked = []

    def create(name, pretrained, **options):
        asked.append((name, pretrained))
        torch.manual_seed(0)
        return timm.models.swin_transformer.SwinTransformer(embed_dim=96, num_classes=0).eval()

    monkeypatch.setattr(timm, "create_model", create)
    eye = make_backbone("swin/tiny")
    theirs, x = create("", False), torch.randn(1, 3, 224, 224)
    assert asked[0] == ("swin_tiny_patch4_window7_224.ms_in22k", True)
    with torch.no_grad(): assert (eye(x) - theirs.forward_features(x).flatten(1, 2)).abs().max() < 1e-5
    assert all(name.split(".")[0] in timm.list_models("swin_*") for name in module.PRETRAINED.values())


def test_no_network_is_a_clear_error(monkeypatch):
    def create(*args, **options): raise OSError("no route to host")
    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(UserError, match="cannot be fetched"): make_backbone("swin/large")


def test_gradients_reach_an_unfrozen_backbone_through_the_captioner(micro):
    torch.manual_seed(0)
    vocab = Vocab(["EOS", "PAD", "SOS", "UNK", "a"])
    model = ExpansionNet(ExpansionNetConfig.preset("tiny", micro.dim), vocab, micro.unfreeze(1)).train()
    tokens = torch.tensor([[2, 4, 4], [2, 4, 4]])
    model(model.encode(pictures()), tokens).square().mean().backward()
    learns = {n for n, p in micro.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert learns and learns == {n for n, _ in micro.named_parameters() if n.startswith(("trunk.layers.1.", "trunk.norm."))}
    assert micro.trunk.layers[1].training and not micro.trunk.layers[0].training and not micro.trunk.patch_embed.training


@pytest.mark.parametrize("name, last, learns", [("torchvision/resnet18", 1, ["7"]), ("timm/resnet18", 1, ["model.layer4"]),
                                                ("timm/vit_tiny_patch16_224", 2, ["model.blocks.10", "model.blocks.11", "model.norm"])])
def test_frozen_parts_do_not_move(name, last, learns):
    torch.manual_seed(0)
    eye = make_backbone(name, weights=None, size=224 if "vit" in name else 64).unfreeze(last).train()
    starts = tuple(f"trunk.{part}." for part in learns)
    before = {n: b.clone() for n, b in eye.named_buffers()}
    eye(torch.randn(2, 3, eye.prepare.size, eye.prepare.size)).square().mean().backward()
    assert all((p.grad is not None) == n.startswith(starts) for n, p in eye.named_parameters())
    moved = {n for n, b in eye.named_buffers() if not torch.equal(b, before[n])}
    assert all(n.startswith(starts) for n in moved) and (moved or not any(isinstance(m, nn.BatchNorm2d) for m in eye.modules()))
    eye.eval()
    assert not any(m.training for m in eye.modules())


@pytest.mark.parametrize("name, count", [("swin/tiny", 6), ("torchvision/resnet34", 6), ("torchvision/densenet121", 10),
                                         ("timm/vit_tiny_patch16_224", 14), ("timm/swin_tiny_patch4_window7_224", 6)])
def test_parts_of_known_networks(name, count):
    assert len(parts(make_backbone(name, weights=None).trunk)) == count


def test_preprocessing_is_that_of_the_weights():
    seen = {name: make_backbone(name, weights=None).prepare for name in ("torchvision/swin_t", "torchvision/efficientnet_b1", "swin/micro")}
    assert [(p.size, p.interpolation) for p in seen.values()] == [(224, "bicubic"), (240, "bilinear"), (64, "bilinear")]
    assert all(p.mean == (0.485, 0.456, 0.406) for p in seen.values())
    assert make_backbone("timm/vit_tiny_patch16_224", weights=None, size=256).regions == 256


def test_checkpointing_changes_no_gradient():
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        eye = make_backbone("timm/vit_tiny_patch16_224", weights=None, checkpointing=checkpointing).unfreeze().train()
        eye(torch.randn(1, 3, 224, 224)).square().mean().backward()
        grads.append([p.grad for p in eye.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads, strict=True))


@torch.no_grad()
def test_half_the_bits_by_one_call(micro):
    full = micro(pictures())
    half = micro.bfloat16()(pictures())
    assert half.dtype == torch.bfloat16 and torch.cosine_similarity(half.float(), full, dim=-1).min() > 0.999


@pytest.mark.parametrize("call, says", [(lambda: make_backbone("swin/huge"), "the sizes are micro, tiny"), (lambda: make_backbone("swin/micro"), "nobody published"),
                                        (lambda: make_backbone("swin"), "expected shapes"), (lambda: make_backbone("shapes/x"), "expected shapes"),
                                        (lambda: make_backbone("shapes", drop_path=0.1), "has no drop_path"),
                                        (lambda: make_backbone("swin/tiny", weights=None, size=300), "multiples of 224")])
def test_what_cannot_be_is_said(call, says):
    with pytest.raises(UserError, match=says): call()
