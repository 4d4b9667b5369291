"""The linear layer on whichever library: same answers as torch's; `python tests/test_linear.py` prints the speeds."""
import time
from statistics import median

import pytest
import torch
from torch.nn import functional as F

from expnet.models.linear import Linear, has_onednn, linear, takes_onednn

needs_onednn = pytest.mark.skipif(not has_onednn(), reason="this CPU has no AVX-512, or torch no oneDNN: the layer is torch's own")


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 144, 577])
@torch.no_grad()
def test_equals_double_precision(rows, bias, gelu):
    torch.manual_seed(0)
    layer, x = Linear(192, 70, bias, gelu), torch.randn(2, rows, 192)
    exact = F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    assert (layer(x) - (F.gelu(exact) if gelu else exact)).abs().max() < 3e-6


@needs_onednn
def test_only_where_it_may():
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    assert takes_onednn(x, weight) and takes_onednn(x.bfloat16(), weight.bfloat16()) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert not takes_onednn(x, weight.requires_grad_())
    with torch.no_grad(): assert takes_onednn(x, weight)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): assert not takes_onednn(x, weight)
    assert not takes_onednn(x.double(), weight.detach().double()) and not takes_onednn(x.bfloat16(), weight.detach())


@torch.no_grad()
def test_an_exported_graph_holds_no_private_operator():
    layer, x = Linear(8, 5, gelu=True).eval(), torch.randn(3, 8)
    for graph in (str(torch.export.export(layer, (x,)).graph), str(torch.jit.trace(layer, x).inlined_graph)):
        assert "linear" in graph and "mkldnn" not in graph


@torch.no_grad()
def test_compiled_and_deterministic():
    layer, x = Linear(64, 32, gelu=True).eval(), torch.randn(7, 64)
    assert torch.equal(layer(x), layer(x))
    assert torch.allclose(torch.compile(layer, backend="eager")(x), layer(x), atol=1e-6)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for rows, inputs, outputs in ((9216, 192, 768), (576, 768, 3072), (144, 1536, 6144)):
        x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
        calls = {"F.linear": lambda: F.linear(x, weight, bias), "linear": lambda: linear(x, weight, bias),
                 "linear, gelu": lambda: linear(x, weight, bias, gelu=True), "F.linear, F.gelu": lambda: F.gelu(F.linear(x, weight, bias))}
        seconds = {name: [] for name in calls}
        for _ in range(10):
            for name, call in calls.items():
                start = time.process_time()
                call()
                seconds[name].append(time.process_time() - start)
        speed = {name: f"{2e-9 * rows * inputs * outputs / median(s[1:]):.0f}" for name, s in seconds.items()}
        print(f"{rows} x ({inputs} -> {outputs}) GFLOP/s:", speed)
