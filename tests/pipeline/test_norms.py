"""Normalizations against numpy and autograd of what they say they compute; their backward pass with newer weights."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from recoup.errors import RecoupError
from recoup.pipeline import Simulator, delays, norms

GENERATOR = np.random.default_rng(2)


def random(*shape, grad=True):
    return torch.tensor(GENERATOR.standard_normal(shape), requires_grad=grad)


def randomized(module):
    """In float64, with parameters unlike their initial ones."""
    module.double()
    for parameter in module.parameters():
        parameter.data += random(*parameter.shape, grad=False)
    return module


# 1e-12: some hundred float64 operations on numbers up to about 100, summed in another order than numpy's.
CLOSE = {"rtol": 0, "atol": 1e-12}


def response(x, eps):
    return x / np.sqrt((x * x).mean((2, 3), keepdims=True) + eps)


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_filter_response_norm_is_its_formula(eps):
    norm, x = randomized(norms.FilterResponseNorm2d(3, eps)), random(2, 3, 5, 4)
    gamma, beta, tau = (p.detach().numpy()[:, None, None] for p in norm.parameters())
    expected = np.maximum(gamma * response(x.detach().numpy(), eps) + beta, tau)
    np.testing.assert_allclose(norm(x).detach().numpy(), expected, **CLOSE)
    assert 0.2 < (expected == tau).mean() < 0.8  # both sides of the threshold


def test_filter_response_norm_has_the_gradients_of_its_formula():
    norm, x, g = randomized(norms.FilterResponseNorm2d(3, 0.1)), random(2, 3, 5, 4), random(2, 3, 5, 4, grad=False)
    gamma, beta, tau = (p.view(-1, 1, 1) for p in norm.parameters())
    z = gamma * x / torch.sqrt((x * x).mean((2, 3), keepdim=True) + 0.1) + beta
    wanted = [x, *norm.parameters()]
    expected = torch.autograd.grad(torch.maximum(z, tau), wanted, g)
    for mine, theirs in zip(torch.autograd.grad(norm(x), wanted, g), expected, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)
    assert torch.autograd.gradcheck(lambda x, *p: functional_call(norm, dict(zip(NAMES, p, strict=True)), x), wanted)


NAMES = ("weight", "bias", "threshold")


def overwrite(module):
    """New values for all parameters, under the graph; as the simulator does it."""
    for parameter in module.parameters():
        parameter.data.copy_(random(*parameter.shape, grad=False))


def test_filter_response_norm_keeps_its_mask_and_takes_the_newest_weights():
    eps = 0.1
    norm, x, g = randomized(norms.FilterResponseNorm2d(3, eps)), random(2, 3, 5, 4), random(2, 3, 5, 4, grad=False)
    y = norm(x)
    passed = (y > norm.threshold.view(-1, 1, 1)).numpy()
    overwrite(norm)
    to_x, *found = torch.autograd.grad(y, [x, *norm.parameters()], g)
    r, g, x = response(x.detach().numpy(), eps), g.numpy(), x.detach().numpy()
    expected = [(g * passed * r).sum((0, 2, 3)), (g * passed).sum((0, 2, 3)), (g * ~passed).sum((0, 2, 3))]
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs, **CLOSE)
    to_r = g * passed * norm.weight.detach().numpy()[:, None, None]
    inverse = 1 / np.sqrt((x * x).mean((2, 3), keepdims=True) + eps)
    np.testing.assert_allclose(to_x.numpy(), inverse * (to_r - r * (to_r * r).mean((2, 3), keepdims=True)), **CLOSE)


GEOMETRIES = {
    "plain": ((4, 6, 3), {}, (2, 4, 7, 6)),
    "strided": ((4, 6, (3, 2)), {"stride": (2, 1), "padding": (1, 2), "bias": False}, (2, 4, 7, 6)),
    "grouped": ((4, 6, 3), {"groups": 2, "dilation": 2, "padding": 2}, (1, 4, 7, 6)),
    "depthwise": ((4, 4, 3), {"groups": 4, "stride": 3, "bias": False}, (2, 4, 7, 6)),
    "1x1": ((4, 6, 1), {"eps": 0.2}, (2, 4, 3, 3)),
}


def made(name):
    arguments, options, shape = GEOMETRIES[name]
    return randomized(norms.StandardizedConv2d(*arguments, **options)), random(*shape)


def convolution(conv, x, w):
    """A convolution as the sum it is, in numpy."""
    (sy, sx), (py, px), (dy, dx) = conv.stride, conv.padding, conv.dilation
    count, depth, H, W = w.shape
    x = np.pad(x, ((0, 0), (0, 0), (py, py), (px, px)))
    rows, columns = (x.shape[2] - dy * (H - 1) - 1) // sy + 1, (x.shape[3] - dx * (W - 1) - 1) // sx + 1
    y = np.zeros((len(x), count, rows, columns))
    for o in range(count):
        first = o // (count // conv.groups) * depth
        for i in range(rows):
            for j in range(columns):
                patch = x[:, first : first + depth, i * sy : i * sy + dy * H : dy, j * sx : j * sx + dx * W : dx]
                y[:, o, i, j] = (patch[:, :, :H, :W] * w[o]).sum((1, 2, 3))
    return y if conv.bias is None else y + conv.bias.detach().numpy()[:, None, None]


@pytest.mark.parametrize("name", list(GEOMETRIES))
def test_weight_standardization_is_its_formula(name):
    conv, x = made(name)
    w = conv.weight.detach().numpy()
    mean, variance = (f((1, 2, 3), keepdims=True) for f in (w.mean, w.var))
    expected = convolution(conv, x.detach().numpy(), (w - mean) / np.sqrt(variance + conv.eps))
    np.testing.assert_allclose(conv(x).detach().numpy(), expected, **CLOSE)


def naive(conv, x):
    w = conv.weight
    mean = w.mean((1, 2, 3), keepdim=True)
    v = (w - mean) / torch.sqrt((w - mean).square().mean((1, 2, 3), keepdim=True) + conv.eps)
    return F.conv2d(x, v, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


@pytest.mark.parametrize("stale", [False, True], ids=["same weights", "newer weights"])
@pytest.mark.parametrize("name", list(GEOMETRIES))
def test_weight_standardization_goes_back_through_the_weights_it_finds(name, stale):
    conv, x = made(name)
    y, wanted = conv(x), [x, *conv.parameters()]
    g = random(*y.shape, grad=False)
    if stale:
        overwrite(conv)
    found = torch.autograd.grad(y, wanted, g)
    # linear in the input and in the standardized weights: a forward with the newest weights has the same gradients
    for mine, theirs in zip(found, torch.autograd.grad(naive(conv, x), wanted, g), strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


@pytest.mark.parametrize("name", list(GEOMETRIES))
def test_weight_standardization_passes_gradcheck(name):
    conv, x = made(name)
    names = [n for n, _ in conv.named_parameters()]
    call = lambda x, *p: functional_call(conv, dict(zip(names, p, strict=True)), x)  # noqa: E731
    assert torch.autograd.gradcheck(call, [x[:1, :, :4].detach().requires_grad_(), *conv.parameters()])


def test_weight_standardization_computes_only_gradients_that_are_asked_for():
    conv, x = made("plain")
    y = conv(x.detach())
    to_bias = torch.autograd.grad(y.sum(), conv.bias, retain_graph=True)[0]
    torch.testing.assert_close(to_bias, torch.full_like(to_bias, y[:, 0].numel()), **CLOSE)
    conv.requires_grad_(False)
    to_x = torch.autograd.grad(conv(x).sum(), x)[0]
    torch.testing.assert_close(to_x, torch.autograd.grad(naive(conv, x).sum(), x)[0], **CLOSE)


def test_weight_standardization_works_under_vmap():
    convs, x = [made("grouped")[0] for _ in range(3)], random(3, 2, 4, 7, 6)
    stacked = {n: torch.stack([dict(c.named_parameters())[n] for c in convs]).detach() for n in ("weight", "bias")}
    leaves = {n: w.clone().requires_grad_() for n, w in stacked.items()}
    y = torch.vmap(lambda p, x: functional_call(convs[0], p, x))(leaves, x)
    newer = random(*stacked["weight"].shape, grad=False)
    leaves["weight"].data.copy_(newer)
    g = random(*y.shape, grad=False)
    found = torch.autograd.grad(y, [x, *leaves.values()], g)
    for r, conv in enumerate(convs):
        torch.testing.assert_close(y[r], conv(x[r]), **CLOSE)
        conv.weight.data.copy_(newer[r])
        xr = x[r].detach().requires_grad_()
        expected = torch.autograd.grad(naive(conv, xr), [xr, conv.weight, conv.bias], g[r])
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine[r], theirs, **CLOSE)


def test_a_standardized_convolution_is_a_convolution_by_name():
    one, other = norms.StandardizedConv2d(2, 3, 3), nn.Conv2d(2, 3, 3)
    one.load_state_dict(other.state_dict())
    assert torch.equal(one.weight, other.weight)


class Online:
    """Online normalization sample by sample in numpy, as the paper's equations have it."""

    def __init__(self, C, forward, backward, eps, scaling):
        self.mu, self.var, self.e_y, self.e_1 = np.zeros(C), np.ones(C), np.zeros(C), np.zeros(C)
        self.a_f, self.a_b, self.eps, self.scaling = forward, backward, eps, scaling

    def forward(self, x, gamma, beta, training=True):
        """Of one sample [C, H, W]; the output and what its backward needs."""
        sigma = np.sqrt(self.var + self.eps)
        y = (x - self.mu[:, None, None]) / sigma[:, None, None]
        if training:
            mean, variance, a = x.mean((1, 2)), x.var((1, 2)), self.a_f
            self.var = a * self.var + (1 - a) * variance + a * (1 - a) * (mean - self.mu) ** 2
            self.mu = a * self.mu + (1 - a) * mean
        u = gamma[:, None, None] * y + beta[:, None, None]
        root = np.sqrt((u * u).mean() + self.eps) if self.scaling else 1.0
        return u / root, (y, sigma, u / root, root)

    def backward(self, g, kept, gamma):
        """To x, gamma and beta; with the gamma given, the newest."""
        y, sigma, z, root = kept
        u = (g - z * (g * z).mean()) / root if self.scaling else g
        across = gamma[:, None, None] * u - (1 - self.a_b) * self.e_y[:, None, None] * y
        self.e_y = self.e_y + (across * y).mean((1, 2))
        to_x = across / sigma[:, None, None] - (1 - self.a_b) * self.e_1[:, None, None]
        self.e_1 = self.e_1 + to_x.mean((1, 2))
        return to_x, (u * y).sum((1, 2)), u.sum((1, 2))


@pytest.mark.parametrize("scaling", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_online_norm_is_its_equations_sample_by_sample(batch, scaling):
    C, options = 3, {"alpha_forward": 0.9, "alpha_backward": 0.7, "eps": 1e-2, "layer_scaling": scaling}
    norm = randomized(norms.OnlineNorm2d(C, **options))
    model = Online(C, 0.9, 0.7, 1e-2, scaling)
    for _ in range(6):
        x, g = random(batch, C, 4, 5), random(batch, C, 4, 5, grad=False)
        gamma, beta = norm.weight.detach().numpy().copy(), norm.bias.detach().numpy()
        z = norm(x)
        pairs = [model.forward(sample, gamma, beta) for sample in x.detach().numpy()]
        np.testing.assert_allclose(z.detach().numpy(), np.stack([z for z, _ in pairs]), **CLOSE)
        norm.weight.data.mul_(1.25)  # under the graph: the backward pass takes the newest
        found = torch.autograd.grad(z, [x, norm.weight, norm.bias], g)
        expected = [model.backward(g, kept, gamma * 1.25) for g, (_, kept) in zip(g.numpy(), pairs, strict=True)]
        np.testing.assert_allclose(found[0].numpy(), np.stack([e[0] for e in expected]), **CLOSE)
        for i in (1, 2):
            np.testing.assert_allclose(found[i].numpy(), sum(e[i] for e in expected), **CLOSE)
        for name, value in (("mean", model.mu), ("variance", model.var), ("along", model.e_y), ("offset", model.e_1)):
            np.testing.assert_allclose(norm.get_buffer(name).numpy(), value, **CLOSE)


@pytest.mark.parametrize("scaling", [True, False])
def test_online_norm_in_evaluation_moves_nothing_and_has_plain_gradients(scaling):
    norm = randomized(norms.OnlineNorm2d(3, 0.5, eps=0.1, layer_scaling=scaling))
    norm(random(4, 3, 5, 5)).sum().backward()
    norm.eval()
    before, x = copy.deepcopy(dict(norm.named_buffers())), random(2, 3, 4, 4)
    model = Online(3, 0.5, 0.9, 0.1, scaling)
    model.mu, model.var = norm.mean.numpy(), norm.variance.numpy()
    numbers = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    expected = [model.forward(sample, *numbers, training=False)[0] for sample in x.detach().numpy()]
    np.testing.assert_allclose(norm(x).detach().numpy(), np.stack(expected), **CLOSE)
    assert torch.autograd.gradcheck(norm, [x])
    assert all(torch.equal(buffer, before[name]) for name, buffer in norm.named_buffers())


def test_online_norm_normalizes_what_is_stationary():
    norm = norms.OnlineNorm2d(2, 0.9, 0.9, layer_scaling=False).double()
    scale, shift = torch.tensor([3.0, 0.5]).view(-1, 1, 1), torch.tensor([5.0, -2.0]).view(-1, 1, 1)
    with torch.no_grad():
        outputs = torch.cat([norm(random(1, 2, 8, 8, grad=False) * scale + shift) for _ in range(300)])[100:]
    # 200 samples of 64 pixels, and statistics of about 10 of them: some 2 % of noise
    torch.testing.assert_close(outputs.mean((0, 2, 3)), torch.zeros(2, dtype=torch.float64), rtol=0, atol=0.05)
    torch.testing.assert_close(outputs.var((0, 2, 3)), torch.ones(2, dtype=torch.float64), rtol=0, atol=0.1)


def network():
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), norms.OnlineNorm2d(4, 0.9, 0.8), nn.ReLU()),
        nn.Sequential(norms.StandardizedConv2d(4, 4, 1), norms.FilterResponseNorm2d(4, 1e-2)),
        nn.Sequential(norms.OnlineNorm2d(4, 0.8, 0.9, layer_scaling=False)),
        nn.Sequential(nn.Flatten(), nn.Linear(36, 3)),
    ).double()


def test_the_simulator_moves_online_norms_statistics_as_interleaved_ticks_do():
    """Several samples' graphs at once, each of its own leaves, overwritten with the newest weights for its backward."""
    net, samples = network(), [(random(1, 1, 5, 5, grad=False), torch.tensor([k % 3])) for k in range(20)]
    simulated = copy.deepcopy(net)
    simulator = Simulator(simulated, [[str(s)] for s in range(4)], delays(4), 0.05, 0.0)
    losses, S, N = [], 4, len(samples)
    inputs, flows, graphs = {(0, k): x for k, (x, _) in enumerate(samples)}, {}, {}
    for tick in range(N + 2 * (S - 1)):
        for s, stage in enumerate(net):
            k, j = tick - s, tick - 2 * (S - 1) + s
            if 0 <= k < N:
                leaves = {n: p.detach().clone().requires_grad_() for n, p in stage.named_parameters()}
                x = inputs.pop((s, k)).detach().requires_grad_()
                y = functional_call(stage, leaves, (x,))
                graphs[s, k], inputs[s + 1, k] = (x, leaves, y), y
                if s == S - 1:
                    last = y.detach().requires_grad_()
                    value = F.cross_entropy(last, samples[k][1])
                    losses.append(value.item())
                    flows[s, k] = torch.autograd.grad(value, last)[0]
            if 0 <= j < N:
                x, leaves, y = graphs.pop((s, j))
                for n, p in stage.named_parameters():
                    leaves[n].data.copy_(p.detach())
                flows[s - 1, j], *found = torch.autograd.grad(y, [x, *leaves.values()], flows.pop((s, j)))
                for p, g in zip(stage.parameters(), found, strict=True):
                    p.data.add_(g, alpha=-0.05)
    assert [simulator.step(x, y) for x, y in samples] == losses
    for mine, theirs in zip(simulated.parameters(), net.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(simulated.buffers(), net.buffers(), strict=True):
        assert torch.equal(mine, theirs)
        assert not torch.equal(mine, torch.zeros_like(mine))  # all of them did move


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: norms.FilterResponseNorm2d(0), r"FilterResponseNorm2d\(num_features=0\)"),
        (lambda: norms.FilterResponseNorm2d(2, 0.0), r"FilterResponseNorm2d\(eps=0\.0\): eps must be above 0"),
        (lambda: norms.FilterResponseNorm2d(2)(torch.zeros(1, 3, 2, 2)), r"\(2\): input is \[1, 3, 2, 2\]"),
        (lambda: norms.OnlineNorm2d(2)(torch.zeros(2, 2, 2)), r"must be \[N, 2, H, W\]"),
        (lambda: norms.OnlineNorm2d(2.0), r"OnlineNorm2d\(num_features=2\.0\)"),
        (lambda: norms.OnlineNorm2d(2, alpha_forward=1.0), "alpha_forward must be from 0 to below 1"),
        (lambda: norms.OnlineNorm2d(2, alpha_backward=-0.1), r"alpha_backward=-0\.1"),
        (lambda: norms.OnlineNorm2d(2, eps=float("nan")), "eps=nan"),
        (lambda: norms.StandardizedConv2d(2, 2, 3, padding="same"), "padding='same'"),
        (lambda: norms.StandardizedConv2d(2, 2, 3, padding_mode="reflect"), "padding_mode='reflect'"),
        (lambda: norms.StandardizedConv2d(2, 2, 3, eps=-1.0), r"eps=-1\.0"),
        (lambda: norms.StandardizedConv2d(2, 2, 3)(torch.zeros(2, 4, 4)), r"\(2, 2\): input is \[2, 4, 4\]"),
        (lambda: norms.StandardizedConv2d(2, 2, 3)(torch.zeros(1, 3, 4, 4)), r"must be \[N, 2, H, W\]"),
    ],
)
def test_bad_arguments_and_inputs(call, message):
    with pytest.raises(RecoupError, match=message):
        call()
