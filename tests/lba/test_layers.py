import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import recoup as rc
from recoup import lba
from recoup.errors import RecoupError, RecoupWarning
from recoup.formats import Float, Int
from recoup.lba import FP8, LBA, LBAConv1d, LBAConv2d, LBALinear, quantize_operand
from recoup.network.emulated import emulated_layers, running
from tests.networks import images, small_net

WIDE = LBA(Float.lba(8, 23, 128), Float.lba(8, 23, 128))  # exact on small whole numbers


def whole(*shape):
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(0)).float()


def rounded(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_((parameter * 20).round())
    return layer


LAYERS = [
    (nn.Linear(6, 5), (3, 6)),
    (nn.Linear(6, 5, bias=False), (6,)),
    (nn.Linear(6, 5), (2, 3, 4, 6)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (3, 4, 11)),
    (nn.Conv1d(4, 6, 3, padding="same", padding_mode="circular"), (4, 9)),
    (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(1, 2), groups=2), (2, 4, 8, 9)),
    (nn.Conv2d(4, 6, 3, padding="same"), (4, 7, 7)),
    (nn.Conv2d(4, 6, 3, padding="valid", bias=False), (2, 4, 7, 7)),
    (nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect"), (2, 4, 6, 6)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: repr(v)[:60])
def test_wide_units_compute_the_layer(layer, shape):
    layer, x = rounded(copy.deepcopy(layer)), whole(*shape)
    expected = layer(x)
    keys = list(layer.state_dict())
    rc.emulate_(layer, WIDE)
    assert torch.equal(layer(x), expected)
    assert list(layer.state_dict()) == keys
    layer.mode = "baseline"
    assert torch.equal(layer(x), expected)
    rc.restore_(layer)
    assert torch.equal(layer(x), expected)
    assert "gain" not in dict(layer.named_buffers())


def test_the_constructors():
    x = torch.randn(2, 3, 6, 6)
    conv = LBAConv2d(3, 4, 3, config=LBA(chunk=9))
    assert conv(x).shape == (2, 4, 4, 4)
    assert LBALinear(6, 2)(x).shape == (2, 3, 6, 2)
    assert LBAConv1d(3, 4, 2)(x[:, :, 0]).shape == (2, 4, 5)
    assert "chunk=9" in repr(conv)


def test_linear_is_the_matrix_product():
    layer = nn.Linear(40, 7)
    x = torch.randn(5, 40)
    expected = lba.matmul(x, layer.weight.t(), LBA()) + layer.bias
    assert torch.equal(rc.emulate_(layer, LBA())(x), expected)


def test_operands_are_quantised_outside():
    layer, x = nn.Linear(40, 7), torch.randn(5, 40)
    q = [quantize_operand(t, FP8)[0] for t in (x, layer.weight)]
    rc.emulate_(layer, LBA(operands=FP8))
    assert torch.equal(layer(x), lba.matmul(q[0], q[1].t(), LBA()) + layer.bias)
    layer.mode = "baseline"
    assert torch.equal(layer(x), F.linear(*q) + layer.bias)
    rc.restore_(layer)
    codes, scales = zip(*(quantize_operand(t, Int(4)) for t in (x, layer.weight)), strict=True)
    rc.emulate_(layer, LBA.int12(operands=Int(4)))
    sums = lba.matmul(codes[0], codes[1].t(), LBA.int12())
    assert torch.equal(layer(x), sums * (scales[0] * scales[1]) + layer.bias)


def test_layer_maps_and_restore():
    model, x = small_net(), images(2)
    expected = model(x)
    rc.emulate_(model, LBA(), {"classifier": None, "re:block1.*": LBA.biased(3, 4)})
    layers = emulated_layers(model)
    assert "stem" in layers  # the first layer too
    assert "classifier" not in layers
    assert layers["block1.conv1"].config == LBA.biased(3, 4)
    assert not torch.equal(model(x), expected)
    with running(model, "float"):
        assert torch.equal(model(x), expected)
    with pytest.raises(RecoupError, match="emulated already"):
        rc.emulate_(model, LBA())
    assert torch.equal(rc.restore_(model)(x), expected)


def test_two_wings_in_one_model():
    model, x = small_net(), images(4)
    rc.calibrate_(model, [torch.relu(x)], {"stem": None, "block1.conv2": True, "block2.conv2": True, "re:.*": None})
    rc.emulate_(model, LBA(), {"re:block..conv2": rc.NBSMT(threads=2)})
    kinds = {type(layer).__name__ for layer in emulated_layers(model).values()}
    assert kinds == {"LBAConv2d", "LBALinear", "NBSMTConv2d"}
    assert model(x).isfinite().all()


@pytest.mark.parametrize("gradient", ["identity", "recursive_of", "immediate_diff"])
def test_it_trains(gradient):
    model, x = small_net(), images(4)
    rc.emulate_(model, LBA.biased(4, 4, gradient=gradient, operands=FP8)).train()
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()


def test_copies_pickles_and_compiles():
    model, x = rc.emulate_(small_net(), LBA.biased(5, 4)), images(2)
    rc.lba.correct_gain_(model, [images(8)])
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), expected)


def test_gains_travel_with_a_state_dict_and_go_with_the_weight():
    model, x = rc.emulate_(small_net(), LBA.biased(4, 4)), images(2)
    rc.lba.correct_gain_(model, [images(8)])
    state = model.state_dict()
    other = rc.emulate_(small_net(1), LBA.biased(4, 4))
    other.load_state_dict(state)
    assert torch.equal(other(x), model(x))
    float_state = small_net(2).state_dict()
    with pytest.warns(RecoupWarning, match="gain belonged to other weights"):
        other.load_state_dict(float_state)
    assert all(layer.gain is None for layer in emulated_layers(other).values())
    fresh = small_net()
    assert not fresh.load_state_dict(state).missing_keys


@pytest.mark.parametrize("config", [LBA(), LBA(operands=FP8), LBA.int12(operands=Int(4))], ids=repr)
@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: repr(v)[:60])
def test_autocast_casts_the_input(layer, shape, config):
    layer, x = rc.emulate_(copy.deepcopy(layer), config), whole(*shape)
    expected = layer(x)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x.to(dtype)), expected)


@pytest.mark.parametrize(
    "config", [LBA(), LBA(operands=FP8), LBA(gradient="recursive_of"), LBA(backward=LBA()), LBA.int16()], ids=repr
)
@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: repr(v)[:60])
def test_an_empty_batch(layer, shape, config):
    last = isinstance(layer, nn.Linear)
    size = (0, *shape[-(1 if last else layer.weight.dim() - 1) :])
    x = torch.zeros(size, requires_grad=True)
    expected = layer(x)
    copied = rc.emulate_(copy.deepcopy(layer), config)
    for mode in ("emulate", "baseline"):
        copied.mode = mode
        copied.zero_grad()
        y = copied(x)
        assert y.shape == expected.shape
        y.sum().backward()
        assert torch.equal(copied.weight.grad, torch.zeros_like(copied.weight))


def test_autocast():
    model, x = rc.emulate_(small_net(), LBA()), images(2)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).isfinite().all()


def test_refused():
    with pytest.raises(RecoupError, match=r"layer 'weight' .*float32 weights; got torch.float16"):
        rc.emulate_(nn.ModuleDict({"weight": nn.Linear(4, 3).half()}), LBA())
    layer = rc.emulate_(nn.Sequential(nn.Linear(4, 3), nn.Conv2d(2, 3, 3)), LBA())
    with pytest.raises(RecoupError, match=r"layer '0' \(in_features=4.*must have 4 features"):
        layer[0](torch.zeros(2, 5))
    with pytest.raises(RecoupError, match=r"layer '1' .*must have 4 dimensions"):
        layer[1](torch.zeros(2, 5))
    with pytest.raises(RecoupError, match=r"layer '0' .*: operand input .*NaN"):
        layer[0](torch.full((1, 4), float("nan")))
    with torch.no_grad():
        next(layer[0].parameters())[1, 2] = torch.inf
    with pytest.raises(RecoupError, match=r"layer '0' .*: operand weight .* 1 NaN or infinite"):
        layer[0](torch.zeros(1, 4))
    for drop_in in (LBALinear, LBAConv1d):
        with pytest.raises(RecoupError, match=rf"{drop_in.__name__}: config must be an LBA, .* got 'm7e4'"):
            drop_in(4, 3, 1, config="m7e4")
    for config in (LBA(), LBA(operands=FP8)):
        with pytest.raises(RecoupError, match=r"layer '0' .* takes float32; the input is torch.float16 \[2, 4\]"):
            rc.emulate_(nn.Sequential(nn.Linear(4, 3)), config)(torch.zeros(2, 4).half())
    with pytest.raises(RecoupError, match="BatchNorm2d"):
        rc.emulate_(small_net(), LBA(), {"block1.bn1": LBA()})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(6, 6), torch.ones(3, 6)),
        (nn.Linear(6, 6, bias=False), torch.ones(2, 3, 6)),
        (nn.Conv1d(6, 6, 1), torch.ones(3, 6, 5)),
        (nn.Conv2d(6, 6, 3, padding=1), torch.ones(2, 6, 7, 7)),
        (nn.Conv2d(6, 6, 3, padding=1, bias=False), torch.ones(2, 6, 7, 7).to(memory_format=torch.channels_last)),
    ],
    ids=lambda v: repr(v)[:60] if isinstance(v, nn.Module) else str(v.stride()),
)
def test_results_may_be_changed_in_place(layer, x, training):
    """As a float layer's; the gradients are those of the network that changes nothing in place."""
    x = x * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    layer = rc.emulate_(copy.deepcopy(layer), LBA()).train(training)
    found = []
    for inplace in (True, False):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        y = torch.relu_(layer(leaf).add_(leaf)) if inplace else torch.relu(layer(leaf) + leaf)
        y.square().sum().backward()
        found.append([y, leaf.grad, *(p.grad for p in layer.parameters())])
    assert all(map(torch.equal, *found))


CHANNELS = [
    (nn.Linear(20, 5), (3, 20)),
    (nn.Conv1d(4, 6, 3, padding=1, groups=2), (3, 4, 11)),
    (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), groups=2), (2, 4, 8, 9)),
]


@pytest.mark.parametrize(("layer", "shape"), CHANNELS, ids=["Linear", "Conv1d", "Conv2d"])
@pytest.mark.parametrize("config", [LBA.int16(operands=Int(4)), LBA.fp32(operands=lba.FP8)], ids=["int", "fp8"])
@pytest.mark.parametrize("mode", ["emulate", "baseline"])
def test_weights_have_a_scale_per_output_channel(layer, shape, config, mode):
    """Channel by channel, as a layer of one channel with a scale of its own is."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(1)))
        layer.weight *= 2.0 ** torch.arange(len(layer.weight)).view(-1, *[1] * (layer.weight.dim() - 1))
    model = rc.emulate_(nn.Sequential(copy.deepcopy(layer)), config.replace(weight_scale="channel"))
    model[0].mode = mode
    plain = rc.emulate_(nn.Sequential(copy.deepcopy(layer)), config)
    plain[0].mode = mode
    with torch.no_grad():
        found, together = model(x), plain(x)
        dim = 1 if layer.weight.dim() > 2 else -1
        for o in range(len(layer.weight)):
            alone = copy.deepcopy(plain)
            # All channels hold this one, so that the tensor's scale is this channel's.
            alone[0].weight.copy_(layer.weight[o : o + 1].expand_as(layer.weight))
            assert torch.allclose(found.select(dim, o) - layer.bias[o], alone(x).select(dim, o) - layer.bias[o])
    assert not torch.allclose(found, together)


def test_weight_scale_in_the_config():
    assert "weight_scale" not in LBA().to_dict()
    config = LBA.int12(operands=Int(4), weight_scale="channel")
    assert LBA.from_dict(config.to_dict()) == config
    assert repr(config).endswith("weight_scale='channel')")
    with pytest.raises(
        RecoupError, match=r"LBA\(weight_scale='row'\): weight_scale must be one of 'tensor', 'channel'"
    ):
        LBA(weight_scale="row")  # type: ignore[arg-type]


def test_a_dead_channel_is_zeros_where_every_channel_has_its_scale():
    layer = nn.Linear(4, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, -2.0, 3.0, 0.5], [1e-41, -1e-42, 0.0, 1e-41]])
    model = rc.emulate_(nn.Sequential(layer), LBA.int12(operands=Int(4), weight_scale="channel"))
    y = model(torch.ones(1, 4))
    assert y[0, 1] == 0
    assert y[0, 0] != 0
    with pytest.raises(RecoupError, match=r"weight_scale='channel'\): there are scales where weights are quantised"):
        LBA(weight_scale="channel")


def test_one_unit_serves_configs_that_differ_in_software_alone():
    card = rc.wings.cards()[LBA]
    config = LBA.int12(operands=Int(4))
    assert card.runs(config, config.replace(weight_scale="channel"))
    assert not card.runs(config, LBA.int16(operands=Int(4)))
    assert not card.runs(LBA.biased(4, 4), LBA.biased(4, 4, operands=Int(8), weight_scale="channel"))
    tensorcore = rc.wings.cards()[rc.TensorCore]
    assert not tensorcore.runs(rc.TensorCore.hopper_f16(), rc.TensorCore.hopper_fp8(scale="calibrated"))
    assert tensorcore.runs(rc.TensorCore.hopper_fp8(), rc.TensorCore.hopper_fp8(scale="calibrated"))
