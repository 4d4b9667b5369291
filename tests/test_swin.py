"""Own Swin against timm's and against recorded outputs of the published code; `python tests/test_swin.py` prints the speeds."""
import json
import time
import zlib
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import timm
import torch

from expnet.models.swin import SWINS, Swin, SwinConfig, from_timm, to_timm
from expnet.tools import UserError, count_parameters

GOLDEN = Path(__file__).parent / "golden"
recorded = json.loads((GOLDEN / "reference_a.json").read_text())
arrays = np.load(GOLDEN / "reference_a.npz")


def random_pair(name: str, timm_name: str) -> tuple[Swin, torch.nn.Module]:
    """Own Swin and timm's with the same random weights, none of them at its start value."""
    torch.manual_seed(0)
    ours, theirs = Swin(SWINS[name]).eval(), timm.create_model(timm_name, num_classes=0).eval()
    with torch.no_grad():
        for n, p in ours.named_parameters(): p.add_(torch.randn_like(p), alpha=1.0 if n.endswith("table") else 0.02)
    theirs.load_state_dict(to_timm(ours.state_dict()))
    return ours, theirs


@pytest.fixture(scope="module")
def large() -> tuple[Swin, torch.nn.Module]:
    return random_pair("large", "swin_large_patch4_window12_384")


@torch.no_grad()
def difference(ours: Swin, theirs: torch.nn.Module, pictures: int, size: int) -> float:
    x = torch.randn(pictures, 3, size, size, generator=torch.Generator().manual_seed(1))
    return float((ours(x) - theirs.forward_features(x).flatten(1, 2)).abs().max())


def test_tiny_equals_timm():
    assert difference(*random_pair("tiny", "swin_tiny_patch4_window7_224"), pictures=3, size=224) <= 1e-5


def test_large_equals_timm(large):
    assert difference(*large, pictures=1, size=384) <= 1e-5


def test_parameters_of_the_large_one(large):
    assert count_parameters(large[0]) == 195_198_516


def times(calls: dict, repeats: int) -> dict[str, float]:
    """Median CPU seconds of each call, taken in turn in this process."""
    seconds = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            seconds[name].append(time.process_time() - start)
    return {name: median(s[1:]) for name, s in seconds.items()}


@torch.no_grad()
def test_large_is_no_slower_than_timm(large):
    torch.set_num_threads(1)
    x = torch.randn(1, 3, 384, 384)
    took = times({"ours": lambda: large[0](x), "timm": lambda: large[1].forward_features(x)}, repeats=2)
    assert took["ours"] / took["timm"] <= 1.0, took


def drawn(name: str, shape: list[int]) -> torch.Tensor:
    """The published code's weight called `name` in the recording, drawn as golden's description says."""
    x = np.random.RandomState((zlib.crc32(name.encode()) + recorded["seed"]) % 2**32).standard_normal(shape)
    if len(shape) > 1: x = x / np.sqrt(shape[-1])
    else: x = 1 + 0.1 * x if "norm" in name and name.endswith("weight") else 0.1 * x
    return torch.from_numpy(x.astype(np.float32))


@torch.no_grad()
def test_recorded_regions_of_the_published_code():
    c, prefix = recorded["config"]["swin"], "swin_transf."
    net = Swin(SwinConfig(c["img"], c["embed"], tuple(c["depths"]), tuple(c["heads"]), c["window"], c["patch"])).eval()
    names = {n.removeprefix(prefix): s for n, s in recorded["e2e_names"].items() if n.startswith(prefix)}
    buffers = {n for n in names if n.endswith(("relative_position_index", "attn_mask"))}
    assert set(net.state_dict()) == set(names) - buffers                       # the published names, without renaming
    net.load_state_dict({n: drawn(prefix + n, names[n]) for n in net.state_dict()})
    regions = net(torch.from_numpy(arrays["images"]).float())
    assert (regions - torch.from_numpy(arrays["swin"])).abs().max() < 1e-5


@pytest.mark.parametrize("name, timm_name", [("base", "swin_base_patch4_window12_384"), ("small", "swin_small_patch4_window7_224"),
                                             ("large_224", "swin_large_patch4_window7_224")])
def test_names_and_shapes_of_the_other_sizes(name, timm_name):
    with torch.device("meta"): ours, theirs = Swin(SWINS[name]), timm.create_model(timm_name, num_classes=0)
    shapes = lambda state: {n: tuple(w.shape) for n, w in state.items()}
    assert shapes(from_timm(theirs.state_dict())) == shapes(ours.state_dict())


@torch.no_grad()
def test_a_frozen_net_sees_the_same_in_every_mode():
    """No state is kept between calls: gradients on or off, after a change of weights, in another precision and back."""
    torch.manual_seed(0)
    net, x = Swin(SWINS["micro"]).eval(), torch.randn(2, 3, 64, 64)
    first = net(x)
    with torch.enable_grad(): assert torch.allclose(net(x), first, atol=1e-5)
    for p in net.parameters(): p.mul_(1.5)
    changed = net(x)
    assert not torch.allclose(changed, first, atol=1e-3)
    with torch.inference_mode(): assert torch.allclose(net(x), changed, atol=1e-6)
    assert torch.allclose(net.double()(x.double()).float(), changed, atol=1e-5)


def test_training_in_autocast_with_checkpointing_learns():
    torch.manual_seed(0)
    net = Swin(replace(SWINS["micro"], drop_path=0.1), checkpointing=True).train()
    with torch.autocast("cpu", torch.bfloat16): loss = net(torch.randn(2, 3, 128, 64)).float().square().mean()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for n, p in net.named_parameters() if "norm.bias" != n)


@torch.no_grad()
def test_an_exported_net_takes_any_number_of_pictures():
    torch.manual_seed(0)
    net = Swin(SWINS["micro"]).eval()
    program = torch.export.export(net, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for pictures in (1, 2, 5):
        x = torch.randn(pictures, 3, 64, 64)
        assert torch.allclose(program.module()(x), net(x), atol=1e-5)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in called if "mkldnn" in name or "scaled_dot" in name or "index_put" in name or "copy" in name]


@pytest.mark.parametrize("fields", [{"size": 230}, {"window": 12}, {"heads": (3, 6, 12)}, {"heads": (5, 6, 12, 24)}])
def test_sizes_that_do_not_fit_are_refused(fields):
    with pytest.raises(UserError): SwinConfig(**fields)


if __name__ == "__main__":
    torch.set_num_threads(1)
    ours, theirs = random_pair("large", "swin_large_patch4_window12_384")
    half = Swin(SWINS["large"]).eval()
    half.load_state_dict(ours.state_dict())
    half.bfloat16()
    x = torch.randn(1, 3, 384, 384, generator=torch.Generator().manual_seed(0))

    def plain() -> None:
        with torch.backends.mkldnn.flags(enabled=False): ours(x)

    with torch.no_grad():
        took = times({"timm": lambda: theirs.forward_features(x), "ours": lambda: ours(x), "ours, torch's linear": plain,
                      "ours, bfloat16": lambda: half(x.bfloat16())}, repeats=5)
    for name, seconds in took.items(): print(f"{name:22} {seconds:.2f} CPU-s   {seconds / took['timm']:.2f} of timm")
    print(f"float32 / bfloat16: {took['ours'] / took['ours, bfloat16']:.2f}; largest difference to timm: {difference(ours, theirs, 1, 384):.1e}")
