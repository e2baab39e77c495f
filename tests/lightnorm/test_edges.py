"""Layers at their edges: wrong channels, empty batches, half-precision parameters, missing biases and counters, second
derivatives, errors in every mode; always beside what torch's batch norm does."""

import copy
import inspect
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore

import recoup as rc
from recoup.errors import RecoupError
from recoup.lightnorm import LightNorm, LightNorm1d, LightNorm2d, LightNorm3d, ops, synchronize_

RANGE = LightNorm.range()
HAS_BIAS = "bias" in inspect.signature(nn.BatchNorm2d).parameters  # torch 2.11 has it not


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("channels", [1, 5, 7, 64])
def test_wrong_channels_are_named(channels, affine, training):
    x = drawn(4, channels, 5, 5)
    model = rc.emulate_(nn.Sequential(nn.BatchNorm2d(6, affine=affine)), LightNorm()).train(training)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RecoupError, match=rf"layer '0' \(6, .*\[4, {channels}, 5, 5\] has {channels} channels"):
        model(x)
    assert all(map(torch.equal, model.state_dict().values(), before.values()))
    with pytest.raises(RuntimeError):
        nn.BatchNorm2d(6, affine=affine).train(training)(x)


def test_a_layer_without_vectors_takes_any_channels():
    for channels in (1, 7):  # as torch
        unit = LightNorm2d(6, affine=False, track_running_stats=False)
        assert torch.equal(unit(drawn(4, channels, 5, 5)), LightNorm2d(channels)(drawn(4, channels, 5, 5)))


def test_operators_look_at_their_vectors():
    """Kernels would read behind a vector's end."""
    x, six, five, code = drawn(4, 6, 5, 5), torch.ones(6), torch.ones(5), LightNorm().code
    with pytest.raises(RecoupError, match=r"layer: \[4, 6, 5, 5\] has 6 channels; its vectors have 6, 5"):
        ops.train(x, six, five, code, 1e-5, "layer")
    with pytest.raises(RecoupError, match="its vectors have 6, 6, 6, 5"):
        ops.infer(x, six, six, six, five, code, 1e-5, "layer")
    _, xhat, _, _, r, indices = ops.train(x, six, six, code, 1e-5, "layer")
    with pytest.raises(RecoupError, match="its vectors have 6, 5, 6"):
        ops.backward(x, xhat, r, five, indices, code, "layer")


@pytest.mark.parametrize("shape", [(0, 6, 5, 5), (4, 6, 0, 5), (0, 6, 20, 5)])
@pytest.mark.parametrize("config", [LightNorm(), LightNorm(axis="place"), RANGE], ids=repr)
def test_nothing_to_normalize(shape, config):
    unit = LightNorm2d(6, config=config)
    before = unit.running_mean.clone()
    assert unit(torch.zeros(shape)).shape == shape  # as torch's: nothing, and statistics stay
    assert torch.equal(unit.running_mean, before)
    x = torch.zeros(shape, requires_grad=True)
    y = unit.eval()(x)
    y.sum().backward()
    assert y.shape == shape
    assert x.grad is not None
    assert x.grad.shape == shape
    assert torch.equal(unit.weight.grad, torch.zeros(6))  # type: ignore[arg-type]


def test_no_channels():
    for shape in ((4, 0, 5, 5), (4, 0, 1, 1)):
        assert LightNorm2d(0).eval()(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("shape", [(1, 6), (1, 6, 1)])
@pytest.mark.parametrize("free", [True, False])
def test_one_element_as_torch(shape, free):
    for layer in (nn.BatchNorm1d, LightNorm1d):
        unit = layer(6, track_running_stats=not free).train(not free)
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            unit(torch.zeros(shape))
    assert LightNorm1d(6).eval()(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("kept", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32])
def test_half_parameters_and_buffers(kept, given):
    """The values of half-precision parameters in float32: the bits of a float32 layer that holds them."""
    x = drawn(4, 6, 5, 5).to(given)
    half = LightNorm2d(6).to(kept)
    with torch.no_grad():
        assert half.running_mean is not None
        for value, seed in ((half.weight, 1), (half.bias, 2), (half.running_mean, 3)):
            value.copy_(drawn(6, seed=seed))
    full = copy.deepcopy(half).float()
    for training in (False, True):
        y, expected = half.train(training)(x), full.train(training)(x)
        assert y.dtype == given
        assert torch.equal(y, expected)
    assert full.running_var is not None
    assert torch.equal(half.running_var, full.running_var.to(kept))


@pytest.mark.parametrize("training", [True, False])
def test_no_second_derivatives(training):
    unit, x = LightNorm2d(6, config=RANGE).train(training), drawn(4, 6, 5, 5).requires_grad_()
    (slope,) = torch.autograd.grad(unit(x).square().sum(), x, create_graph=True)
    with pytest.raises(RecoupError, match=r"layer ''.*no second derivatives"):
        torch.autograd.grad(slope.square().sum(), x)


@pytest.mark.skipif(not HAS_BIAS, reason="this torch's batch norms always have a bias")
@pytest.mark.parametrize("training", [True, False])
def test_without_bias(training):
    model = nn.Sequential(nn.BatchNorm2d(6, bias=False))
    state = copy.deepcopy(model.state_dict())
    rc.emulate_(model, LightNorm())
    unit, other, x = LightNorm2d(6, bias=False), LightNorm2d(6), drawn(4, 6, 5, 5)
    assert list(unit.state_dict()) == [key.removeprefix("0.") for key in state]
    expected = other.train(training)(x)
    assert torch.equal(unit.train(training)(x), expected)
    y = model.train(training)(x)
    assert torch.equal(y, expected)
    y.sum().backward()
    rc.restore_(model)
    assert model[0].bias is None
    assert type(model[0]) is nn.BatchNorm2d
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("momentum", [0.3, None])
def test_without_a_counter_as_torch(momentum):
    x = drawn(40, 6)
    plain, unit = nn.BatchNorm1d(6, momentum=momentum), LightNorm1d(6, momentum=momentum, config=RANGE)
    for layer in (plain, unit):
        layer.num_batches_tracked = None
        layer(x)
    torch.testing.assert_close(unit.running_mean, plain.running_mean, rtol=1e-6, atol=1e-6)  # float32 sums there


def test_meta_and_inference():
    for training in (True, False):
        unit = LightNorm2d(6, device="meta").train(training)
        assert unit(torch.zeros(4, 6, 5, 5, device="meta")).shape == (4, 6, 5, 5)
        with torch.inference_mode():
            assert torch.equal(LightNorm2d(6).train(training)(drawn(4, 6, 5, 5)), _plain(training))


def _plain(training):
    return LightNorm2d(6).train(training)(drawn(4, 6, 5, 5))


def test_strictness_names_the_layer_everywhere():
    strict = rc.emulate_(nn.Sequential(nn.BatchNorm2d(6)), LightNorm(nonfinite="error"))
    x = drawn(4, 6, 5, 5)
    x[2, 0, 1, 1] = torch.nan
    for training, by_moments in ((True, False), (True, True), (False, False)):
        strict[0].by_moments = by_moments
        with pytest.raises(RecoupError, match=r"layer '0' .*given \[4, 6, 5, 5\]: the input holds 1 NaN or infinite"):
            strict.train(training)(x)
    strict[0].by_moments = False
    leaf = drawn(4, 6, 5, 5).requires_grad_()
    grad = torch.ones_like(leaf).index_fill(0, torch.tensor(1), torch.inf)
    with pytest.raises(RecoupError, match=r"layer '0' .*given \[4, 6, 5, 5\]: the gradient holds 150 NaN or infinite"):
        strict.train()(leaf).backward(grad)


@pytest.mark.parametrize("axis", ["channel", "place"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_values_stay_in_their_channels(axis, bad):
    unit, x, grad = LightNorm2d(6, config=LightNorm(axis=axis)), drawn(4, 6, 5, 5), drawn(4, 6, 5, 5, seed=1)
    poisoned = x.clone()
    poisoned[1, 4, 0, 0] = bad
    others = [0, 1, 2, 3, 5]
    for training in (True, False):
        clean = copy.deepcopy(unit).train(training)
        expected = clean(x)
        dirty = copy.deepcopy(unit).train(training)
        leaf = poisoned.clone().requires_grad_()
        y = dirty(leaf)
        y.backward(grad)
        assert y[:, 4].isnan().all()
        if axis == "place":  # a block of channels with an infinity shares the format's largest exponent
            assert torch.equal(y[:, others], expected[:, others])
        assert y[:, others].isfinite().all()
        assert leaf.grad is not None
        assert leaf.grad[:, others].isfinite().all()
        assert dirty.running_mean is not None
        assert dirty.running_mean.isnan().tolist() == [training and c == 4 for c in range(6)]


def test_one_warning_a_layer():
    model = nn.Sequential(LightNorm2d(2), LightNorm2d(2))
    x = torch.ones(4, 2, 3, 3)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            model(x)
    assert [w.category for w in told] == [rc.RecoupWarning] * 2
    assert [unit.saturated for unit in model] == [6, 6]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LightNorm2d(2, config=LightNorm(statistics=None))(x)
        LightNorm2d(2, eps=1e-3)(x)  # 1/s = 1000 fits


@pytest.mark.parametrize("method", ["average", "ema"])
def test_recalibration_stores_what_training_stores(method):
    batches = [drawn(16, 6, 5, 5, seed=seed) for seed in range(3)]
    model = rc.emulate_(nn.Sequential(nn.BatchNorm2d(6)), LightNorm())
    trained = copy.deepcopy(model)
    rc.recalibrate_(model.eval(), batches, method)
    if method == "ema":
        for x in batches:
            trained.train()(x)
        assert torch.equal(model[0].running_mean, trained[0].running_mean)
        assert torch.equal(model[0].running_var, trained[0].running_var)
        return
    trained[0].momentum = 1.0
    means, variances = [], []
    for x in batches:
        trained.train()(x)
        means.append(trained[0].running_mean.double())
        variances.append(trained[0].running_var.double())
    n = 16 * 25
    mean = sum(means) / 3
    spread = sum(m.square() for m in means) / 3 - mean.square()
    variance = (sum(variances) / 3 * (n - 1) / n + spread) * (3 * n / (3 * n - 1))
    torch.testing.assert_close(model[0].running_mean.double(), mean, rtol=1e-6, atol=1e-7)  # stored in float32
    torch.testing.assert_close(model[0].running_var.double(), variance, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("layer", "shape"), [(LightNorm1d, (40, 6)), (LightNorm1d, (4, 6, 9)), (LightNorm3d, (2, 6, 3, 3, 3))]
)
def test_checkpoints_both_ways(layer, shape):
    plain = layer.float_class(6)
    plain(drawn(*shape))
    unit = layer(6)
    assert not any(unit.load_state_dict(plain.state_dict()))  # no missing and no unexpected keys
    unit(drawn(*shape, seed=1))
    assert not any(plain.load_state_dict(unit.state_dict()))
    assert all(map(torch.equal, plain.state_dict().values(), unit.state_dict().values()))
    model = nn.Sequential(plain)
    rc.emulate_(model, LightNorm(axis="place"))
    assert not any(model.load_state_dict({f"0.{k}": v for k, v in unit.state_dict().items()}))
    rc.restore_(model)
    assert vars(model[0]).keys() == vars(layer.float_class(6)).keys()


@pytest.mark.parametrize("channels_last", [False, True])
def test_three_dimensions_in_any_memory_format(channels_last):
    x = drawn(2, 6, 3, 4, 5)
    given = x.contiguous(memory_format=torch.channels_last_3d) if channels_last else x
    y = LightNorm3d(6)(given)
    assert y.stride() == given.stride()
    assert torch.equal(y, LightNorm1d(6)(x.flatten(2)).view(x.shape))


IN_PLACE = {
    "relu": (lambda y, _: nn.functional.relu(y, inplace=True), lambda y, _: nn.functional.relu(y)),
    "shortcut": (lambda y, x: y.add_(x), lambda y, x: y + x),
    "scale": (lambda y, _: y.mul_(3.0), lambda y, _: y * 3.0),
}
SHAPES = [
    (LightNorm1d, (40, 6), torch.contiguous_format),
    (LightNorm1d, (4, 6, 20), torch.contiguous_format),
    (LightNorm2d, (4, 6, 5, 5), torch.contiguous_format),
    (LightNorm2d, (4, 6, 5, 5), torch.channels_last),
    (LightNorm2d, (9, 6, 2, 2), torch.contiguous_format),  # samples become places
    (LightNorm3d, (2, 6, 3, 4, 5), torch.contiguous_format),
    (LightNorm3d, (2, 6, 3, 4, 5), torch.channels_last_3d),
]


@pytest.mark.parametrize("config", [LightNorm(), RANGE, LightNorm(axis="place")], ids=repr)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("layer", "shape", "memory"), SHAPES, ids=str)
def test_results_may_be_changed_in_place(layer, shape, memory, training, config):
    """As a batch norm's; the gradients are those of the network that changes nothing in place."""
    grad = drawn(*shape, seed=1) * 1e-2
    for ways in IN_PLACE.values():
        found = []
        for change in ways:
            unit, x = layer(6, config=config).train(training), drawn(*shape)
            leaf = x.contiguous(memory_format=memory).requires_grad_()
            y = change(unit(leaf), leaf)
            y.backward(grad)
            assert leaf.grad is not None
            leaf.grad += 1.0  # an optimizer's right
            found.append([y, leaf.grad, unit.weight.grad, unit.bias.grad, unit.running_mean])
        assert all(map(torch.equal, *found))


def test_results_of_a_group_may_be_changed_in_place():
    x = drawn(4, 6, 4, 6)
    alone = LightNorm2d(6)
    expected = nn.functional.relu(alone(x) + x)
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        unit = synchronize_(LightNorm2d(6))
        y = nn.functional.relu(unit(x).add_(x), inplace=True)
        y.sum().backward()
    finally:
        dist.destroy_process_group()
    expected.sum().backward()
    assert torch.equal(y, expected)
    assert torch.equal(unit.weight.grad, alone.weight.grad)


def test_the_gradients_operator():
    x, six, code = drawn(4, 6, 5, 5), torch.ones(6), LightNorm().code
    _, xhat, _, _, r, indices = ops.train(x, six, six, code, 1e-5, "layer")
    torch.library.opcheck(torch.ops.recoup.lightnorm_backward.default, (x, xhat, r, six, indices, code, "layer"))
