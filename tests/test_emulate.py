"""Conversion: in place, reversible, by map, with float checkpoints, and nothing changed after an error."""

import copy
import functools
import pickle
import re

import pytest
import torch
from torch import nn

import recoup as rc
from recoup.nbsmt import NBSMTConv2d
from recoup.network.emulated import Emulated, emulated_layers
from recoup.network.replay import Outputs, replaying
from recoup.silicon.scalesim import topology
from tests.networks import CONVOLUTIONS, images, small_net


@pytest.fixture
def model():
    net = small_net()
    rc.calibrate_(net, [images(64)])
    return net


def test_only_calibrated_layers_are_taken_and_everything_comes_back(model):
    x = images(8, seed=1)
    before = model(x)
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert rc.emulate_(model, rc.NBSMT()) is model
    assert list(emulated_layers(model)) == CONVOLUTIONS
    assert not torch.equal(model(x), before)
    assert rc.restore_(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert torch.equal(model(x), before)
    assert not any(hasattr(module, "config") for module in model.modules())


def test_state_dict_keys_parameters_and_hooks_stay(model):
    keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    buffers = [name for name, _ in model.named_buffers()]
    calls = []
    layer = model.block1.conv1
    layer.register_forward_hook(lambda *_: calls.append(1))
    rc.emulate_(model, rc.NBSMT())
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == parameters
    assert [name for name, _ in model.named_buffers()] == buffers
    assert model.block1.conv1 is layer
    model(images(2))
    assert calls == [1]


def test_a_float_checkpoint_loads_strictly_and_a_converted_one_round_trips(model, tmp_path):
    other = small_net(seed=3)
    rc.emulate_(model, rc.NBSMT(threads=4))
    result = model.load_state_dict(other.state_dict(), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    path = tmp_path / "converted.pt"
    torch.save(model.state_dict(), path)
    again = small_net(seed=5)
    rc.calibrate_(again, [images(16, seed=9)])
    rc.emulate_(again, rc.NBSMT(threads=4))
    again.load_state_dict(torch.load(path, weights_only=True))
    x = images(4)
    assert torch.equal(again(x), model(x))  # the scales travelled in the metadata
    plain = small_net(seed=6)
    plain.load_state_dict(torch.load(path, weights_only=True), strict=True)


def test_a_loaded_checkpoint_takes_effect_at_once(model):
    rc.emulate_(model, rc.NBSMT())
    x = images(4)
    first = model(x)
    model.load_state_dict(small_net(seed=3).state_dict())
    second = model(x)
    assert not torch.equal(first, second)
    with torch.no_grad():
        model.block1.conv1.weight.data.mul_(-1)  # leaves the version counter alone
    assert not torch.equal(model(x), second)


def test_layer_maps_first_match_wins(model):
    four = rc.NBSMT(threads=4)
    rc.emulate_(model, rc.NBSMT(), {"block1.conv1": None, "re:block1\\..*": four, "re:.*": None})
    assert {name: layer.config.threads for name, layer in emulated_layers(model).items()} == {
        "block1.conv2": 4,
        "block1.shortcut": 4,
    }


def test_config_none_takes_only_what_the_map_names(model):
    rc.emulate_(model, None, {"block2.conv1": rc.NBSMT(threads=4)})
    assert list(emulated_layers(model)) == ["block2.conv1"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"block9.conv1": None}, "'block9.conv1' matches no layer"),
        ({"block1": None}, "container"),
        ({"re:(": None}, "no regular expression"),
        (
            {"block1.bn1": rc.NBSMT()},
            r"'block1.bn1' is a BatchNorm2d; NBSMT stands in for .*, and a BatchNorm2d is for Li",
        ),
        ({"stem": rc.NBSMT()}, "'stem'.*no activation scale.*calibrate_"),
        ({"block1.conv1": "NBSMT()"}, "no configuration"),
        ({7: None}, "names or 're:...'"),
        ([rc.NBSMT()], "must be a map"),
    ],
)
def test_bad_maps_change_nothing(model, layers, message):
    x = images(2)
    before = model(x)
    with pytest.raises(rc.RecoupError, match=message):
        rc.emulate_(model, rc.NBSMT(), layers)
    assert not emulated_layers(model)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            {"re:.*bn1": "nbsmt-2t"},
            r"NBSMT.* for 're:.\*bn1' finds .* \(BatchNorm2d\); a BatchNorm2d is for LightNorm \(such",
        ),
        ({"re:.*": None}, "the model has no layer to emulate"),
    ],
)
def test_policies_that_take_nothing_say_which_keys_matched_what(layers, message):
    with pytest.raises(rc.RecoupError, match=message):
        rc.emulate_(small_net(), rc.Policy(layers))


def test_emulating_twice_names_the_layer(model):
    rc.emulate_(model, rc.NBSMT())
    with pytest.raises(rc.RecoupError, match=r"'block1.conv1'.*already.*restore_"):
        rc.emulate_(model, rc.NBSMT(threads=4))
    assert all(layer.config == rc.NBSMT() for layer in emulated_layers(model).values())


def test_without_calibration_the_remedy_is_named():
    with pytest.raises(rc.RecoupError, match="calibrate_"):
        rc.emulate_(small_net(), rc.NBSMT())


def test_restoring_a_float_model_does_nothing(model):
    assert rc.restore_(model) is model


def test_calibration_survives_restore_so_that_another_config_can_follow(model):
    x = images(4)
    rc.emulate_(model, rc.NBSMT(threads=4))
    four = model(x)
    rc.restore_(model)
    rc.emulate_(model, rc.NBSMT(threads=2))
    rc.restore_(model)
    rc.emulate_(model, rc.NBSMT(threads=4))
    assert torch.equal(model(x), four)


def test_copies_and_pickles_compute_the_same(model):
    rc.emulate_(model, rc.NBSMT(threads=4))
    x = images(4)
    expected = model(x)
    twin = copy.deepcopy(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(x), expected)
    assert torch.equal(loaded(x), expected)
    rc.restore_(twin)
    assert emulated_layers(model)
    assert isinstance(twin.block1.conv1, nn.Conv2d)
    assert not isinstance(twin.block1.conv1, NBSMTConv2d)


def test_grouped_convolutions_say_that_they_run_one_thread():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ReLU(),
        nn.Flatten(), nn.LazyLinear(3),
    ).eval()  # fmt: skip
    net(images(2))
    rc.calibrate_(net, [images(8)])
    with pytest.warns(rc.RecoupWarning, match="grouped convolutions and run one thread: 2"):
        rc.emulate_(net, rc.NBSMT(threads=4))
    assert "one thread because grouped" in repr(net[2])
    assert net[2].active_config.threads == 1
    assert net[4].active_config.threads == 4
    net(images(2))


def test_a_subclass_with_its_own_forward_is_passed_over_and_said_so(model):
    class Scaled(nn.Linear):
        def forward(self, input):  # noqa: A002
            return 2 * super().forward(input)

    net = nn.Sequential(model, nn.ReLU(), Scaled(10, 3))
    with pytest.warns(rc.RecoupWarning, match=r"subclass.*2 \(Scaled\)"):
        rc.emulate_(net, rc.NBSMT())


@pytest.mark.parametrize("method", ["forward", "_conv_forward"])
@pytest.mark.parametrize("config", [rc.NBSMT(threads=2), rc.LBA(), rc.tensorcore.TensorCore.hopper_fp8()], ids=repr)
def test_a_layer_with_a_method_of_its_own_is_left_in_float_and_said_so(model, config, method):
    """Such a wrapper runs whatever the layer's class is: with it the layer would be float arithmetic under the
    hardware's name."""
    conv = model.block1.conv1
    plain = getattr(conv, method)
    setattr(conv, method, lambda *args: 2 * plain(*args))
    rc.calibrate_(model, [images(64)])
    with pytest.warns(rc.RecoupWarning, match=rf"left in float, because {method} was set .*: block1.conv1 \(Conv2d\)"):
        rc.emulate_(model, config)
    assert type(conv) is nn.Conv2d
    assert isinstance(model.block1.conv2, Emulated)
    rc.restore_(model)
    with pytest.raises(rc.RecoupError, match=f"'block1.conv1' .* {method} was set on the object itself"):
        rc.emulate_(model, config, {"block1.conv1": config})
    delattr(conv, method)
    rc.emulate_(model, config)
    assert isinstance(conv, Emulated)


def test_a_wrapper_that_calls_itself_one_of_ours_is_seen():
    """functools.wraps copies the name of the module that a function is from."""
    net = nn.ModuleDict({"p": rc.models.attention.AttentionProducts(), "q": rc.models.attention.AttentionProducts()})
    plain = net.p.forward
    net.p.forward = functools.wraps(plain)(functools.partial(plain))
    with pytest.warns(rc.RecoupWarning, match=r"forward was set on the object itself .*: p \(AttentionProducts\)"):
        rc.emulate_(net, rc.LBA.m7e4())
    assert set(emulated_layers(net)) == {"q"}


def test_costs_and_spaces_leave_out_a_layer_with_a_method_of_its_own():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    net[2].forward = lambda x, plain=net[2].forward: plain(x)
    cost = rc.cost(net, rc.Policy({"re:.*": rc.LBA.m7e4()}), (8,))
    assert cost.in_float == ("2",)
    rc.emulate_(net, rc.LBA.m7e4(), {"2": None})
    assert rc.cost(net, None, (8,)).layers == cost.layers
    rc.restore_(net)
    assert {
        name for group in rc.search.Space({"re:.*": [None, rc.LBA.m7e4()]}).groups(net) for name in group.layers
    } == {"0"}


def test_kept_outputs_are_not_given_for_a_layer_with_a_method_of_its_own():
    outputs, x = Outputs(), torch.randn(2, 3, 6, 6)
    one, two = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    two.load_state_dict(one.state_dict())
    two._conv_forward = lambda x, w, b, plain=two._conv_forward: 2 * plain(x, w, b)
    with torch.no_grad(), replaying(nn.ModuleList([one, two]), outputs):
        assert torch.equal(two(x), 2 * one(x))


@pytest.mark.parametrize("way", ["alone", "under another name"])
def test_layers_of_an_encoder_are_kept_off_its_fast_path_however_they_are_found(way):
    torch.manual_seed(0)
    encoder, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), torch.randn(2, 5, 16)
    holder = nn.Module()
    holder.first, holder.encoder = encoder.linear1, encoder
    with torch.no_grad():
        expected = encoder(x)
        if way == "alone":
            rc.emulate_(encoder.linear1, rc.LBA.m7e4())
        else:
            rc.emulate_(holder, rc.LBA.m7e4(), {"first": rc.LBA.m7e4(), "re:.*": None})
        assert not torch.equal(encoder(x), expected)
        rc.restore_(encoder)
        assert torch.equal(encoder(x), expected)


@pytest.mark.parametrize("config", [rc.NBSMT(threads=2), rc.LBA(), rc.TensorCore.hopper_fp8()], ids=repr)
def test_padding_set_after_construction_is_that_of_the_layer(config):
    conv, other = nn.Conv2d(3, 4, (3, 2), dilation=(1, 2)), nn.Conv2d(3, 4, (3, 2), dilation=(1, 2), padding="same")
    other.load_state_dict(conv.state_dict())
    x = torch.rand(1, 3, 8, 8)
    conv.padding = "same"
    assert torch.equal(conv(x), other(x))
    for layer in (conv, other):
        rc.calibrate_(layer, [x], {"": True})
        rc.emulate_(layer, config)
    assert torch.equal(conv(x), other(x))


def test_a_layer_parametrized_while_emulated_is_not_restored_but_said():
    layer = nn.Linear(8, 8)
    rc.emulate_(layer, rc.LBA())
    nn.utils.parametrizations.weight_norm(layer)
    with pytest.raises(rc.RecoupError, match="parametrized after emulate_"):
        rc.restore_(layer)
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert type(rc.restore_(layer)) is nn.Linear


def test_a_norm_with_a_method_of_its_own_is_left_too(model):
    model.block1.bn1.forward = torch.compile(model.block1.bn1.forward, backend="eager")
    with pytest.warns(rc.RecoupWarning, match=r"forward was set on the object itself .*: block1.bn1 \(BatchNorm2d\)"):
        rc.emulate_(model, rc.LightNorm())
    assert type(model.block1.bn1) is nn.BatchNorm2d


def test_a_layer_frozen_by_a_train_of_its_own_is_taken(model):
    """What is set on the object and computes nothing."""
    conv, norm = model.block1.conv1, model.block1.bn1
    conv.train = lambda _=True: conv
    norm.train = lambda _=True: norm
    rc.emulate_(model, rc.LBA())
    rc.emulate_(model, rc.LightNorm())
    assert isinstance(conv, Emulated)
    assert isinstance(norm, Emulated)


def test_a_parametrized_layer_is_left_in_float_and_the_remedy_works(model):
    conv = nn.utils.parametrizations.weight_norm(model.block1.conv1)
    with pytest.warns(rc.RecoupWarning, match=r"parametrize.remove_parametrizations .*: block1.conv1 "):
        rc.emulate_(model, rc.NBSMT(threads=2))
    rc.restore_(model)
    nn.utils.parametrize.remove_parametrizations(conv, "weight")
    rc.emulate_(model, rc.NBSMT(threads=2))
    assert isinstance(conv, Emulated)


def test_repr_shows_the_config(model):
    rc.emulate_(model, rc.NBSMT(threads=4))
    assert re.search(r"NBSMTConv2d\(8, 12, .*NBSMT\(threads=4, policy='S\+A'", repr(model.block1.conv1))


def test_the_model_itself_may_be_the_layer():
    layer = nn.Conv2d(4, 4, 3)
    rc.calibrate_(layer, [torch.rand(2, 4, 6, 6)], {"": True})
    rc.emulate_(layer, rc.NBSMT())
    assert isinstance(layer, NBSMTConv2d)
    rc.restore_(layer)
    assert type(layer) is nn.Conv2d


def test_a_transformer_encoder_layer_calls_its_emulated_layers():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        plain = encoder(x)
        rc.calibrate_(encoder, [x], {"linear1": None, "linear2": True})
        with pytest.warns(rc.RecoupWarning, match="subclass"):
            rc.emulate_(encoder, rc.NBSMT(threads=4, policy="A", rounding="zero"))
        assert not torch.equal(encoder(x), plain)
        twin = copy.deepcopy(encoder)
        assert torch.equal(twin(x), encoder(x))
        rc.restore_(encoder)
        assert torch.equal(encoder(x), plain)
        assert not any(module._forward_pre_hooks for module in encoder.modules())


def test_a_correction_does_not_outlive_its_weights(model):
    rc.emulate_(model, rc.NBSMT(threads=4))
    rc.correct_bias_(model)
    assert model.block1.conv1.bias_correction is not None
    with pytest.raises(rc.RecoupError, match=r"'block1.conv1'.*weight is being replaced"):
        model.block1.conv1.weight = nn.Parameter(torch.zeros(12, 8, 3, 3))
    corrected = copy.deepcopy(model.state_dict())
    model.load_state_dict({name: value.clone() for name, value in corrected.items()})  # no metadata, the same weights
    assert model.block1.conv1.bias_correction is not None
    model.load_state_dict({"classifier.bias": torch.zeros(10)}, strict=False)
    assert model.block1.conv1.bias_correction is not None
    with pytest.warns(rc.RecoupWarning, match=r"bias_correction belonged to other weights"):
        model.load_state_dict({name: 2 * value for name, value in corrected.items()})  # a float checkpoint
    assert model.block1.conv1.bias_correction is None
    model.load_state_dict(corrected, assign=True)
    assert model.block1.conv1.bias_correction is not None
    model.load_state_dict(corrected)
    assert model.block1.conv1.bias_correction is not None
    corrected._metadata["block1.conv1"]["recoup"]["order"] = torch.zeros(8, dtype=torch.long)
    with pytest.raises(RuntimeError, match="no permutation of 8 channels"):
        model.load_state_dict(corrected)


def test_what_has_no_stand_in_is_told():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.up, self.rnn = nn.Linear(4, 4), nn.ConvTranspose2d(2, 2, 3), nn.LSTM(4, 4)
            self.attend = nn.MultiheadAttention(4, 2)

    told = r"3 layers left in float, because LBA has no stand-in .*up \(ConvTranspose2d\), rnn \(LSTM\), attend"
    with pytest.warns(rc.RecoupWarning, match=rf"{told}.*; 1 layers .*subclass.*attend\.out_proj") as seen:
        rc.emulate_(Mixed(), rc.LBA())
    assert len(seen) == 1


def convolved(kind, config):
    torch.manual_seed(0)
    conv = kind(8, 4, 3, dilation=2).eval()
    x = torch.randn(2, 8, *[9] * (conv.weight.dim() - 2))
    return rc.emulate_(rc.calibrate_(conv, [x], {"": True}), config), x


EDITS = [
    {"stride": 2},
    {"stride": (2,)},
    {"padding": 1},
    {"padding": [1]},
    {"dilation": 1},
    {"stride": 3, "padding": 2},
]
CONVOLVING = [rc.NBSMT(threads=2), rc.LBA(), rc.TensorCore.hopper_fp8()]


@pytest.mark.parametrize("edit", EDITS, ids=str)
@pytest.mark.parametrize("config", CONVOLVING, ids=repr)
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_numbers_set_on_a_convolution_count_for_every_dimension(kind, config, edit):
    (conv, x), (other, _) = convolved(kind, config), convolved(kind, config)
    for name, value in edit.items():
        setattr(conv, name, value)
        setattr(other, name, ((value,) if isinstance(value, int) else tuple(value)) * (1 if len(x.shape) == 3 else 2))
    for mode in ("emulate", "baseline"):
        conv.mode = other.mode = mode
        assert torch.equal(conv(x), other(x))
    assert topology(conv, x, "gemm") == topology(other, x, "gemm")
    if "dilation" in edit:
        assert topology(conv, x) == topology(other, x)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        ({"stride": 0}, "stride=0: it must be a whole number from 1 on, 2 of them"),
        ({"stride": (2, 2, 2)}, r"stride=\(2, 2, 2\)"),
        ({"stride": 1.5}, "stride=1.5"),
        ({"stride": None}, "stride=None"),
        ({"dilation": (1, 1.5)}, r"dilation=\(1, 1.5\)"),
        ({"padding": -1}, "padding=-1: it must be a whole number from 0 on, 2 of them, 'same' or 'valid'"),
        ({"padding": "some"}, "padding='some'"),
        ({"padding": "same", "stride": 2}, "padding='same' goes with stride 1; got stride=2"),
    ],
)
@pytest.mark.parametrize("mode", ["emulate", "baseline"])
@pytest.mark.parametrize("config", CONVOLVING, ids=repr)
def test_what_a_convolution_cannot_have_is_refused(config, mode, edit, told):
    conv, x = convolved(nn.Conv2d, config)
    for name, value in edit.items():
        setattr(conv, name, value)
    conv.mode = mode
    with pytest.raises(rc.RecoupError, match=told):
        conv(x)
    with pytest.raises((RuntimeError, TypeError)):  # as in torch
        conv._conv_forward(x, conv.weight, conv.bias)
