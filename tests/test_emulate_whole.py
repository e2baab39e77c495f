"""What is emulated is what was asked for: a config that takes no layer is refused, and what stays in float is named."""

import copy
import re

import pytest
import torch
from torch import Tensor, nn

import recoup as rc
from recoup.network.emulated import emulated_layers
from recoup.network.multipliers import multipliers
from tests.networks import CONVOLUTIONS, images, small_net


def calibrated():
    net = small_net()
    return rc.calibrate_(net, [images(16)])


@pytest.mark.parametrize(
    ("config", "layers", "message"),
    [
        (
            rc.NBSMT(threads=4),
            {"classifier": rc.LBA.m7e4()},
            r"NBSMT\(threads=4.*takes none of 7 layers \(Conv2d\): .*run calibrate_\(model, batches\) first",
        ),
        (rc.NBSMT(), {"re:.*bn.*": rc.LightNorm()}, r"NBSMT.*takes none of 8 layers \(Conv2d, Linear\): .*calibrate_"),
        (rc.LBA(), {"re:.*bn.*": rc.NBSMT()}, r"NBSMT.* for 're:\.\*bn\.\*' finds no layer.*block1\.bn1 \(BatchNorm2d"),
        (None, {"re:.*bn.*": rc.LBA(), "stem": rc.LBA()}, r"LBA.* for 're:\.\*bn\.\*' finds no layer it can take"),
        (None, {"re:.*bn.*": rc.LightNorm(), "re:.*bn1": rc.LBA()}, r"LBA.* for 're:\.\*bn1' finds no layer"),
    ],
)
def test_a_config_that_takes_no_layer_is_refused_whatever_the_others_took(config, layers, message):
    model, x = small_net(), images(2)
    before = model(x)
    with pytest.raises(rc.RecoupError, match=message):
        rc.emulate_(model, config, layers)
    assert not emulated_layers(model)
    assert torch.equal(model(x), before)


def test_a_config_for_all_layers_where_there_are_none_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    with pytest.raises(rc.RecoupError, match=r"LightNorm.*finds no layer it can take: it stands in for BatchNorm1d"):
        rc.emulate_(model, rc.LightNorm(), {"0": rc.LBA()})
    assert not emulated_layers(model)


def test_a_config_whose_layers_were_all_given_to_others_by_the_map_stands():
    model = calibrated()
    rc.emulate_(model, rc.NBSMT(), {name: rc.NBSMT(threads=4) for name in CONVOLUTIONS})
    assert {layer.config.threads for layer in emulated_layers(model).values()} == {4}
    rc.restore_(model)
    rc.emulate_(model, None, {"stem": rc.LBA(), "re:.*": rc.LBA.biased(4, 4)})
    assert model.stem.config == rc.LBA()


class Experts(nn.Module):
    """Three-dimensional weights that the module multiplies itself."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(3, 4, 8))
        self.pos_embed = nn.Parameter(torch.randn(5, 4))
        self.gamma = nn.Parameter(torch.ones(1, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nc,ecd->nd", x, self.up_proj)


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.rnn, self.experts = nn.Linear(4, 4), nn.LSTMCell(4, 4), Experts()
        self.up, self.norm, self.table = nn.ConvTranspose1d(4, 4, 1), nn.LayerNorm((4, 4)), nn.Embedding(9, 4)
        self.pos_embed = nn.Parameter(torch.zeros(1, 7, 4))
        self.query = nn.Parameter(torch.zeros(1, 4))
        self.weighted = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 1))


def test_what_may_multiply_and_stays_in_float_is_named_in_one_warning_with_class_and_share():
    with pytest.warns(rc.RecoupWarning) as seen:
        rc.emulate_(Several(), rc.LBA())
    assert len(seen) == 1
    told = str(seen[0].message)
    share = 100 * 96 / sum(p.numel() for p in Several().parameters())
    assert f"experts (tests.test_emulate_whole.Experts, {share:.3g} % of all weights)" in told
    assert "the model itself (tests.test_emulate_whole.Several, " in told
    assert re.search(r"no stand-in for them.*: rnn \(LSTMCell\), up \(ConvTranspose1d\)", told)
    assert re.search(r"they are parametrized \(.*\): weighted \(ParametrizedConv1d\)", told)
    assert not re.search("table|norm |original|fc", told)


def test_what_multiplies_is_told_from_norms_tables_and_scales():
    found = multipliers(Several())
    assert set(found) == {"", "fc", "rnn", "experts", "up", "weighted"}
    assert found["experts"].weights == 96
    assert found[""].weights == 4
    assert found["weighted"].weights == 16
    assert set(multipliers(nn.Sequential(nn.LazyLinear(3), nn.ReLU()))) == {"0"}
    assert not multipliers(nn.Sequential(nn.BatchNorm2d(4), nn.PReLU(4)))


def test_nothing_is_said_of_what_was_left_in_float_by_name_or_not_meant():
    rc.emulate_(Several(), rc.LBA(), dict.fromkeys(("", "rnn", "experts", "up", "weighted")))
    rc.emulate_(Several(), None, {"fc": rc.LBA()})
    with pytest.raises(rc.RecoupError, match="'rnn' is a LSTMCell; LBA stands in for"):
        rc.emulate_(Several(), rc.LBA(), {"rnn": rc.LBA()})
    with pytest.warns(rc.RecoupWarning, match="no stand-in for them.*: rnn"):
        rc.emulate_(Several(), None, {"re:fc|rnn": rc.LBA()})
    rc.emulate_(nn.Sequential(nn.BatchNorm2d(4), nn.LSTM(4, 4)), rc.LightNorm())


def test_layers_that_calibration_never_saw_are_named_and_those_it_left_are_not():
    model = nn.Sequential(calibrated(), nn.ReLU(), nn.Linear(10, 5), nn.Linear(5, 5))
    with pytest.warns(rc.RecoupWarning, match=r"2 layers .*not calibrated.*: 2 \(Linear\), 3 \(Linear\)$"):
        rc.emulate_(model, rc.NBSMT())
    assert list(emulated_layers(model[0])) == CONVOLUTIONS
    other = small_net()
    rc.calibrate_(other, [images(8)], {"block1.conv1": None})
    rc.emulate_(other, rc.NBSMT())
    assert len(emulated_layers(other)) == len(CONVOLUTIONS) - 1


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_scripted_layers_are_named():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    model = nn.Sequential(nn.Conv2d(3, 3, 1), scripted, nn.BatchNorm2d(3)).eval()
    with pytest.warns(rc.RecoupWarning, match=r"torch\.jit compiled them.*: 1\.0 "):
        rc.emulate_(model, rc.LBA(), {"2": None})
    with pytest.warns(rc.RecoupWarning, match=r"torch\.jit compiled them.*: 1\.1 "):
        rc.emulate_(model, rc.LightNorm())


@pytest.mark.parametrize("config", [rc.NBSMT(threads=4), rc.LBA.biased(4, 4), rc.LightNorm()])
def test_torch_fx_traces_emulated_models_as_float_ones(config):
    model, x = calibrated(), images(2)
    graph = [(node.op, node.target) for node in torch.fx.symbolic_trace(model).graph.nodes]
    rc.emulate_(model, config)
    traced = torch.fx.symbolic_trace(model)
    assert [(node.op, node.target) for node in traced.graph.nodes] == graph
    assert torch.equal(traced(x), model(x))
    assert emulated_layers(traced).keys() == emulated_layers(model).keys()
    twin = copy.deepcopy(model)
    assert torch.equal(torch.fx.symbolic_trace(twin)(x), model(x))
    rc.restore_(model)
    assert not any("__module__" in vars(module) for module in model.modules())


def test_where_nothing_can_be_taken_what_is_left_is_named():
    class Own(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return super().forward(input).relu()

    with pytest.raises(rc.RecoupError, match=r"no layer to emulate .*; 1 layers .*subclass may compute.*: 1 \(Own\)"):
        rc.emulate_(nn.Sequential(nn.ReLU(), Own(3)), rc.LightNorm())


def test_where_nothing_can_be_taken_the_layers_that_are_there_are_told_by_class():
    class Linear(nn.Module):
        """Such as a quantised layer of torch's, which is called the same and holds no weight."""

    told = rf"the model is made of 2 ReLU, 1 {__name__.replace('.', '[.]')}[.]Linear\)"
    with pytest.raises(rc.RecoupError, match=told):
        rc.emulate_(nn.Sequential(nn.ReLU(), Linear(), nn.ReLU()), rc.LBA())


@pytest.fixture
def _swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


CHANGES = {
    "to": lambda model: model.to("cpu", torch.float32),
    "half and back": lambda model: model.half().float(),
    "channels last": lambda model: model.to(memory_format=torch.channels_last),
    "other weights": lambda model: model.load_state_dict(small_net(seed=3).state_dict()),
    "other weights, assigned": lambda model: model.load_state_dict(small_net(seed=3).state_dict(), assign=True),
    "its own weights": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())),
}
SWAPPED = [rc.NBSMT(threads=4), rc.LBA.m7e4(), rc.TensorCore.hopper_fp8(), rc.LightNorm()]


def changed(config, change, x):
    """Outputs on hardware, with repairs after a change of the parameters, and in float."""
    model = rc.emulate_(rc.calibrate_(small_net(seed=1).eval(), [x]), config)
    model(x)
    if not isinstance(config, rc.LightNorm):
        rc.repair_(model, [x])
    CHANGES[change](model)
    found = [model(x)]
    with torch.no_grad():
        model.block1.conv1.weight.mul_(1.5)
    return [*found, model(x), rc.restore_(model)(x)]


@pytest.mark.filterwarnings("ignore::recoup.RecoupWarning")  # of what stays in float, and of repairs of other weights
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("config", SWAPPED, ids=repr)
def test_parameters_that_torch_swaps_give_the_bits_of_those_it_replaces(request, config, change):
    x = images(3)
    with torch.no_grad():
        expected = changed(config, change, x)
        request.getfixturevalue("_swapping")
        assert all(map(torch.equal, changed(config, change, x), expected))
