"""The linear layer on whichever library: same answers as torch's; `python tests/test_linear.py` prints the speeds."""
import time
from statistics import median

import pytest
import torch
from torch.nn import functional as F

from expnet.models.linear import Linear, has_onednn, linear, matmul, takes_onednn

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
    x, weight = torch.randn(64, 512), torch.randn(512, 512)
    bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert takes_onednn(x, weight) and takes_onednn(x.bfloat16(), weight.bfloat16()) == bf16
    assert not takes_onednn(x[:1], weight)                                # too small to be worth a call
    assert not takes_onednn(x.double(), weight.double()) and not takes_onednn(x.bfloat16(), weight)
    with torch.autocast("cpu", torch.bfloat16): assert not takes_onednn(x, weight)
    weight.requires_grad_()
    assert takes_onednn(x, weight) and not takes_onednn(x.bfloat16(), weight.bfloat16())
    with torch.no_grad(): assert takes_onednn(x.bfloat16(), weight.bfloat16()) == bf16


def slopes(y: torch.Tensor, tensors: list[torch.Tensor], how: str) -> list[torch.Tensor]:
    "The gradients of `tensors` when a slope that lies as `how` says reaches y."
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    if how == "turned": y, g = y.transpose(0, -1), g.transpose(0, -1).contiguous()
    if how == "with gaps": y, g = y[..., ::2], g[..., ::2]
    if how == "expanded": return torch.autograd.grad(y.sum(), tensors)
    return torch.autograd.grad(y, tensors, g)


def by_onednn(y: torch.Tensor) -> bool:
    "Whether oneDNN made y: its product is y's last step, or the one before a change of shape."
    return any("Product" in type(step).__name__ for step in (y.grad_fn, *(step for step, _ in y.grad_fn.next_functions)))


def assert_alike(ours, exact) -> None:
    for a, b in zip(ours, exact): assert (a - b).norm() < 1e-5 * b.norm()


@pytest.mark.parametrize("how", ["plain", "turned", "with gaps", "expanded"])
@pytest.mark.parametrize("shape", [(48, 320), (3, 16, 320), (2, 2, 12, 320)])
@pytest.mark.parametrize("learning", ["xwb", "xw", "x", "w", "wb", "xb", "b"])
def test_gradients(learning, shape, how):
    torch.manual_seed(0)
    tensors = {"x": torch.randn(shape), "w": torch.randn(200, 320) / 18, "b": torch.randn(200)}
    if learning in ("xw", "x"): tensors["b"] = None
    for name in learning: tensors[name].requires_grad_()
    wanted = [tensors[name] for name in learning]
    y, exact = linear(*tensors.values()), F.linear(*(t if t is None else t.double() for t in tensors.values()))
    assert by_onednn(y) == has_onednn()
    assert_alike([y], [exact])
    assert_alike(slopes(y, wanted, how), slopes(exact, wanted, how))


@pytest.mark.parametrize("how", ["plain", "turned", "with gaps", "expanded"])
@pytest.mark.parametrize("learning", ["ab", "a", "b"])
def test_gradients_of_pairs(learning, how):
    torch.manual_seed(0)
    pair = {"a": torch.randn(3, 170, 90).transpose(1, 2), "b": torch.randn(3, 170, 160)}
    for name in learning: pair[name].requires_grad_()
    wanted = [pair[name] for name in learning]
    y, exact = matmul(*pair.values()), pair["a"].double() @ pair["b"].double()
    assert by_onednn(y) == has_onednn()
    assert_alike([y], [exact])
    assert_alike(slopes(y, wanted, how), slopes(exact, wanted, how))


@needs_onednn
def test_weights_with_gaps_are_no_trap():
    "oneDNN's operator alone would take five hundred times as long for them."
    x, spent = torch.randn(512, 256), {}
    layouts = {"dense": torch.randn(300, 256), "gaps": torch.randn(300, 600)[:, 100:356], "gaps, turned": torch.randn(256, 700)[:, 100:400].T,
               "every other": torch.randn(300, 512)[:, ::2], "one row": torch.randn(1, 256).expand(300, -1)}
    for name, weight in layouts.items():
        assert (linear(x, weight) - (x.double() @ weight.double().T)).abs().max() < 1e-3
        start = time.process_time()
        for _ in range(5): linear(x, weight)
        spent[name] = time.process_time() - start
    assert max(spent.values()) < 20 * spent["dense"], spent


def test_the_result_may_be_changed_in_place():
    "As behind torch's layer: a ReLU in place, and gradients to match."
    torch.manual_seed(0)
    layer, x = Linear(256, 200), torch.randn(2, 32, 256)
    ours, exact = layer(x).relu_(), F.linear(x.double(), layer.weight.double(), layer.bias.double()).relu()
    assert_alike(*(torch.autograd.grad(y.square().sum(), list(layer.parameters())) for y in (ours, exact)))


def test_gradient_of_a_gradient():
    torch.manual_seed(0)
    x, weight = torch.randn(64, 256, requires_grad=True), (torch.randn(160, 256) / 16).requires_grad_()
    found = []
    for product, kind in ((linear, torch.float32), (F.linear, torch.float64)):
        y = product(x.to(kind), weight.to(kind)).tanh().square().sum()
        slope, = torch.autograd.grad(y, x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), (x, weight)))
    assert_alike(*found)


def test_double_precision_is_exact():
    x, weight, bias = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 4), (5, 4), (5,)))
    assert torch.autograd.gradcheck(linear, (x, weight, bias)) and torch.autograd.gradgradcheck(linear, (x, weight, bias))
    assert torch.autograd.gradcheck(matmul, (x, torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)))


def test_the_same_step_twice_is_the_same_to_the_bit():
    torch.manual_seed(0)
    layer, x = Linear(256, 200, gelu=True), torch.randn(64, 256)
    one, two = (torch.autograd.grad(layer(x).square().sum(), list(layer.parameters())) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two))


def test_under_autocast_the_layer_is_torchs():
    layer, x = Linear(256, 200), torch.randn(64, 256)
    with torch.autocast("cpu", torch.bfloat16): y = layer(x)
    assert y.dtype == torch.bfloat16 and not by_onednn(y)


@torch.no_grad()
def test_an_exported_graph_holds_no_private_operator():
    layer, x = Linear(512, 400, gelu=True).eval(), torch.randn(64, 512)
    for graph in (str(torch.export.export(layer, (x,)).graph), str(torch.jit.trace(layer, x).inlined_graph)):
        assert "linear" in graph and "mkldnn" not in graph


@torch.no_grad()
def test_compiled_and_deterministic():
    layer, x = Linear(512, 400, gelu=True).eval(), torch.randn(64, 512)
    assert torch.equal(layer(x), layer(x))
    assert torch.allclose(torch.compile(layer, backend="eager")(x), layer(x), atol=1e-5)


def gigaflops(calls: dict, products: int) -> dict[str, str]:
    "Billion operations a second of each call, which does 2 · `products` of them: from medians of CPU times, the calls taking turns."
    seconds = {name: [] for name in calls}
    for _ in range(10):
        for name, call in calls.items():
            start = time.process_time()
            call()
            seconds[name].append(time.process_time() - start)
    return {name: f"{2e-9 * products / median(s[1:]):.0f}" for name, s in seconds.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for rows, inputs, outputs in ((9216, 192, 768), (576, 768, 3072), (144, 1536, 6144)):
        x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
        calls = {"F.linear": lambda: F.linear(x, weight, bias), "linear": lambda: linear(x, weight, bias),
                 "linear, gelu": lambda: linear(x, weight, bias, gelu=True), "F.linear, F.gelu": lambda: F.gelu(F.linear(x, weight, bias))}
        print(f"{rows} x ({inputs} -> {outputs}) GFLOP/s:", gigaflops(calls, rows * inputs * outputs))
    for rows, inputs, outputs in ((2304, 1536, 512), (2304, 512, 2048), (240, 512, 10_000)):
        x, weight, bias, slope = (torch.randn(s, requires_grad=True) for s in ((rows, inputs), (outputs, inputs), (outputs,), (rows, outputs)))
        calls = {name: lambda f=f: torch.autograd.grad(f(x, weight, bias), (x, weight, bias), slope)
                 for name, f in (("F.linear", F.linear), ("linear", linear))}
        print(f"{rows} x ({inputs} -> {outputs}) forth and back, GFLOP/s:", gigaflops(calls, 3 * rows * inputs * outputs))
    for batch, m, k, n in ((16, 992, 144, 512), (16, 144, 992, 512)):
        a, b, slope = (torch.randn(batch, *s, requires_grad=True) for s in ((m, k), (k, n), (m, n)))
        calls = {name: lambda f=f: torch.autograd.grad(f(a, b), (a, b), slope) for name, f in (("a @ b", torch.matmul), ("matmul", matmul))}
        print(f"{batch} pairs ({m} x {k}) ({k} x {n}) forth and back, GFLOP/s:", gigaflops(calls, 3 * batch * m * k * n))
