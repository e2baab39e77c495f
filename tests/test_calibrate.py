"""Activation scales: the definition, which layers, and refusals that change nothing."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import recoup as rc
from recoup.network.emulated import emulated_layers
from recoup.network.images import kept_images
from tests.networks import CONVOLUTIONS, images, small_net


def scales(model):
    return {n: m.activation_scale for n, m in model.named_modules() if getattr(m, "activation_scale", None) is not None}


def test_scale_is_the_mean_over_images_of_the_largest_activation():
    model = small_net()
    data = [images(5, seed=1), (images(3, seed=2), torch.zeros(3))]
    seen = []
    hook = model.block1.conv2.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    assert rc.calibrate_(model, data) is model
    hook.remove()
    peaks = torch.cat(seen).flatten(1).amax(1).double()
    assert scales(model)["block1.conv2"] == float(np.float32(float(peaks.mean()) / 255))
    assert list(scales(model)) == CONVOLUTIONS


def test_the_model_computes_as_before_and_gets_its_mode_back():
    model = small_net().train()
    model.block1.bn1.eval()
    state = copy.deepcopy(model.state_dict())
    rc.calibrate_(model, [images(4)])
    assert model.training
    assert not model.block1.bn1.training
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))


def test_maps_choose_layers():
    model = small_net()
    rc.calibrate_(model, [images(4)], {"classifier": True, "re:block2.*": None})
    assert list(scales(model)) == ["block1.conv1", "block1.conv2", "block1.shortcut", "classifier"]


def test_calibrating_anew_replaces_all_scales():
    model = small_net()
    rc.calibrate_(model, [images(4)], {"classifier": True})
    rc.calibrate_(model, [images(4, seed=5)])
    assert list(scales(model)) == CONVOLUTIONS


def test_an_emulated_model_is_calibrated_in_float():
    plain, emulated = small_net(), small_net()
    rc.calibrate_(emulated, [images(8, seed=4)])
    rc.emulate_(emulated, rc.NBSMT(threads=4))
    rc.calibrate_(plain, [images(8)])
    rc.calibrate_(emulated, [images(8)])
    assert scales(plain) == scales(emulated)


@pytest.mark.parametrize(
    "bad", [[], iter(()), [images(0)], [(images(2), 1), torch.full((2, 3, 8, 8), float("nan"))], [3]]
)
def test_bad_batches(bad):
    model = small_net()
    with pytest.raises(rc.RecoupError, match=r"no batch|empty|NaN|expected a tensor"):
        rc.calibrate_(model, bad)
    assert not scales(model)


def test_negative_inputs_are_refused_by_name():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(rc.RecoupError, match=r"negative inputs.*'1' \[4, 4, 6, 6\] down to -"):
        rc.calibrate_(model, [images(4)], activations="unsigned")
    assert not scales(model)


def gelu_net(blocks=6):
    """Every second linear layer sees negative inputs."""
    torch.manual_seed(0)
    layers = [part for _ in range(blocks) for part in (nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.ReLU())]
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), *layers, nn.Linear(8, 2)).eval()


def test_all_layers_with_negative_inputs_are_named_and_may_stay_in_float():
    model, x = gelu_net(), torch.rand(64, 8)
    negative = tuple(str(4 * block + 4) for block in range(6))
    with pytest.raises(rc.RecoupError, match=r'"auto" gives them signed .* negative="float"') as caught:
        rc.calibrate_(model, [x], activations="unsigned")
    assert caught.value.layers == negative
    assert all(f"'{name}' [64, 8] down to -" in str(caught.value) for name in negative)
    assert not scales(model)
    with pytest.warns(rc.RecoupWarning) as told:
        rc.calibrate_(model, [x], activations="unsigned", negative="float")
    assert [str(one.message) for one in told] == [
        "calibrate_: 6 of 12 layers have negative inputs, which unsigned 8-bit activations would clip, and stay in "
        f"float: {', '.join(negative)}"
    ]
    assert list(scales(model)) == [str(4 * block + 2) for block in range(6)]
    rc.emulate_(model, rc.NBSMT(threads=2))  # what was left by choice is not said again
    assert list(emulated_layers(model)) == list(scales(model))


def test_negative_inputs_of_layers_that_cannot_stay_in_float():
    model, x = gelu_net(), torch.rand(64, 8)
    only = {"re:.*": None, "4": True}
    with pytest.raises(rc.RecoupError, match="No other layer is to be calibrated"):
        rc.calibrate_(model, [x], dict(reversed(only.items())), activations="unsigned", negative="float")
    with pytest.raises(rc.RecoupError, match="negative must be one of 'error', 'float'"):
        rc.calibrate_(model, [x], negative="clip")
    with pytest.warns(rc.RecoupWarning, match="6 of 12"):
        rc.emulate_(rc.calibrate_(model, [x], activations="unsigned", negative="float"), rc.NBSMT())
    model[5] = nn.Identity()
    with pytest.raises(rc.RecoupError, match="restore_ the model first: layers that are emulated already") as caught:
        rc.calibrate_(model, [x], activations="unsigned", negative="float")
    assert "6" in caught.value.layers


def zeros(model):
    return {n: m.activation_zero for n, m in model.named_modules() if getattr(m, "activation_scale", None) is not None}


def test_codes_are_signed_where_inputs_are_negative_and_unsigned_elsewhere():
    """``negative`` has a say only under unsigned; what is never negative keeps its scale, bit for bit."""
    model, x, y = gelu_net(), torch.rand(8, 8), torch.rand(5, 8)
    seen = {}
    for name in map(str, range(2, 24, 2)):
        model[int(name)].register_forward_pre_hook(lambda _, args, n=name: seen.setdefault(n, []).append(args[0]))
    negative = [str(4 * block + 4) for block in range(6)]
    with pytest.warns(rc.RecoupWarning) as told:
        rc.calibrate_(model, [x, y], negative="float")
    assert [str(one.message) for one in told] == [
        'calibrate_: negative="float" has a say under activations="unsigned" only; under \'auto\' layers with negative '
        f"inputs get signed codes: {', '.join(negative)}"
    ]
    assert zeros(model) == {str(i): 128 if str(i) in negative else 0 for i in range(2, 26, 2)}
    for name, parts in seen.items():
        values = torch.cat(parts).detach()
        peaks = (values.abs() if name in negative else values).amax(1).double()
        steps = 127 if name in negative else 255
        assert scales(model)[name] == pytest.approx(float(peaks.mean()) / steps, rel=2**-24)  # float32
    auto = scales(model)
    rc.calibrate_(model, [x, y], activations="signed")
    assert set(zeros(model).values()) == {128}
    assert {n: s for n, s in scales(model).items() if n in negative} == {n: auto[n] for n in negative}
    with pytest.warns(rc.RecoupWarning, match="6 of 12"):
        rc.calibrate_(model, [x, y], activations="unsigned", negative="float")
    assert scales(model) == {n: s for n, s in auto.items() if n not in negative}
    assert set(zeros(model).values()) == {0}
    assert model[4].activation_zero is None
    with pytest.raises(rc.RecoupError, match="activations must be one of 'auto', 'unsigned', 'signed'"):
        rc.calibrate_(model, [x], activations="asymmetric")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_signed_codes_of_infinite_activations_are_refused(bad):
    model, x = gelu_net(1), torch.rand(8, 8)
    model[3] = nn.Threshold(-9, bad)
    nn.init.constant_(model[2].bias, -99.0)
    with pytest.raises(rc.RecoupError, match=r"the input \[8, 8\] of layer '4' holds NaN or infinity"):
        rc.calibrate_(model, [x])
    assert not scales(model)


def test_a_dead_layer_is_refused_by_name():
    model = small_net()
    with torch.no_grad():
        model.block2.bn1.weight.zero_()
        model.block2.bn1.bias.fill_(-1)
    with pytest.raises(rc.RecoupError, match=r"'block2.conv2'.*only zeros"):
        rc.calibrate_(model, [images(4)])


def test_infinite_activations_are_refused_by_name():
    model = small_net()
    with torch.no_grad():
        model.block1.bn1.weight[0] = float("inf")
    with pytest.raises(rc.RecoupError, match=r"block1.conv2.*NaN or infinity"):
        rc.calibrate_(model, [images(4)])


def test_nothing_left():
    with pytest.raises(rc.RecoupError, match="nothing to calibrate"):
        rc.calibrate_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)), [images(4)])


def test_a_named_layer_that_never_runs():
    model = small_net()
    model.spare = nn.Linear(3, 3)
    with pytest.raises(rc.RecoupError, match=r"'spare'.*never ran"):
        rc.calibrate_(model, [images(4)], {"spare": True})


def test_kept_images_are_shared_by_copies_and_left_out_of_pickles():
    model = small_net()
    rc.calibrate_(model, [images(4), images(4, seed=1)], keep=6)
    assert [len(batch) for batch in kept_images(model)] == [4, 2]
    assert kept_images(copy.deepcopy(model))[0] is kept_images(model)[0]
    with pytest.raises(rc.RecoupError, match="pass batches"):
        kept_images(pickle.loads(pickle.dumps(model)))


def test_an_interrupt_leaves_no_scale_and_no_hook():
    model = small_net().train()

    def batches():
        yield images(4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rc.calibrate_(model, batches())
    assert not scales(model)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_one_tensor_is_not_an_iterable_of_batches():
    with pytest.raises(rc.RecoupError, match=r"pass \[x\]"):
        rc.calibrate_(small_net(), images(4))


def test_kept_images_are_copies():
    model, buffer = small_net(), images(4)

    def batches():
        for _ in range(2):
            yield buffer
            buffer.zero_()

    rc.calibrate_(model, [images(4)])
    rc.calibrate_(model, batches())
    assert torch.equal(kept_images(model)[0], images(4))


def test_layers_that_are_emulated_already_are_always_calibrated():
    layer = rc.nbsmt.NBSMTConv2d(3, 4, 3)
    net = nn.Sequential(nn.ReLU(), layer, nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    rc.calibrate_(net, [images(4)])
    net(images(2))
    layer.bias_correction = torch.ones(4)
    rc.calibrate_(net, [2 * images(4)])
    assert layer.bias_correction is None


def test_layers_called_by_keyword_or_with_no_rows():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            y = torch.relu(self.a(x))
            self.b(y[:0])
            return self.c(self.b(input=y))

    model = Odd()
    rc.calibrate_(model, [torch.rand(8, 4)])
    assert list(scales(model)) == ["b"]
    rc.emulate_(model, rc.NBSMT())
    assert model(torch.rand(8, 4)).shape == (8, 2)


class Stem(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, input):  # noqa: A002
        return super().forward(input).abs()


class Block(nn.Module):
    """Owns a weight itself and layers besides."""

    def __init__(self, *layers):
        super().__init__()
        self.query, self.inner = nn.Parameter(torch.ones(1, 1)), nn.Sequential(*layers)

    def forward(self, x):
        return self.inner(x * self.query)


def inner(channels=4):
    return [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()]


@pytest.mark.parametrize(
    ("first", "last"),
    [
        (lambda: Stem(3, 4, 3), lambda: nn.ConvTranspose2d(4, 2, 2)),
        (lambda: nn.ConvTranspose2d(3, 4, 2), lambda: Stem(4, 2, 1)),
        (lambda: nn.Conv2d(3, 4, 3), lambda: nn.Conv2d(4, 2, 1)),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), lambda: nn.LazyConv2d(2, 1)),
    ],
)
def test_first_and_last_are_those_that_run_and_multiply_whatever_their_class(first, last):
    torch.manual_seed(0)
    model = nn.Sequential(first(), nn.ReLU(), *inner(), *inner(), *inner(), last()).eval()
    model = nn.Sequential(nn.BatchNorm2d(3), Block(model))
    x = torch.rand(2, 3, 8, 8)
    model(x)
    rc.calibrate_(model, [x])
    assert list(scales(model)) == ["1.inner.0.2", "1.inner.0.4", "1.inner.0.6"]
    with pytest.warns(rc.RecoupWarning, match=r"may multiply .*: 1 \(tests\.test_calibrate\.Block"):
        rc.emulate_(model, rc.NBSMT())
    assert list(emulated_layers(model)) == list(scales(model))


def test_recurrent_ends_leave_all_linear_layers_between():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.out, self.fc, self.rnn = nn.GRU(4, 4), nn.Linear(4, 4), nn.LSTM(4, 4)
            self.table = nn.Embedding(9, 4)

        def forward(self, x):
            return self.out(self.fc(self.rnn(self.table(x))[0].relu()).relu())[0]

    model = Net()
    rc.calibrate_(model, [torch.randint(9, (3, 5))])
    assert list(scales(model)) == ["fc"]
    rc.emulate_(model, rc.NBSMT())
    assert list(emulated_layers(model)) == ["fc"]
