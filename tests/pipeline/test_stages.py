"""Which modules form which stage: the rule on every network it covers, and lists that do not fit a model."""

import math

import pytest
import torch
from torch import nn

from recoup import models
from recoup.errors import RecoupError
from recoup.pipeline import automatic, norms
from recoup.pipeline.stages import resolve

RESNETS = {models.resnet20: 9, models.resnet32: 15, models.resnet44: 21, models.resnet56: 27}  # blocks
VGGS = {models.vgg11: 8, models.vgg13: 10, models.vgg16: 13}  # convolutions; each with five poolings
NETWORKS = [
    *((net, {"norm": "group", "width": 8}, (1, 3, 16, 16), 1 + 3 * blocks + 3) for net, blocks in RESNETS.items()),
    *((net, {"norm": norm}, (1, 3, 32, 32), 2 * n + 5 + 3) for net, n in VGGS.items() for norm in ("group", "none")),
    (models.digits_net, {"norm": "group"}, (1, 1, 8, 8), 4 + 1 + 3),
    (models.digits_net, {"norm": "none"}, (1, 1, 8, 8), 4 + 1 + 3),
    (models.mobilenet_v1, {"norm": "group", "width": 0.25}, (1, 3, 16, 16), 1 + 2 * 13 + 3),
]


@pytest.mark.parametrize(
    ("factory", "options", "shape", "count"), NETWORKS, ids=[f"{f.__name__}-{o['norm']}" for f, o, *_ in NETWORKS]
)
def test_networks_of_ours(factory, options, shape, count):
    model = factory(**options)
    stages = automatic(model)
    assert len(stages) == count
    assert stages[-1] == []  # the loss
    named = resolve(model, stages)
    names = [name for stage in named for name in stage]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert len(set(names)) == len(names)
    stage_of = {name: index for index, stage in enumerate(named) for name in stage}
    order = [stage_of[name] for name in executed(model, shape)]
    assert order == sorted(order)  # a stage never comes before one that feeds it
    for stage in named:
        kinds = {name.rpartition(".")[0] for name in stage}
        layers = [k for k in kinds if isinstance(model.get_submodule(k), nn.Conv2d | nn.Linear)]
        assert len(layers) <= 1  # one layer a stage


def executed(model, shape):
    """All parameters in the order in which a forward pass uses them."""
    found, hooks = [], []
    for name, module in model.named_modules():
        own = [f"{name}.{n}" for n, _ in module.named_parameters(recurse=False)]
        hooks.append(module.register_forward_pre_hook(lambda *_, own=own: found.extend(own)))
    with torch.no_grad():
        model(torch.zeros(shape))
    for hook in hooks:
        hook.remove()
    return found


def test_a_residual_block():
    stages = automatic(models.resnet20(norm="group"))
    assert stages[:5] == [
        ["conv1", "bn1"],
        ["layer1.0.conv1", "layer1.0.bn1"],
        ["layer1.0.conv2", "layer1.0.bn2"],
        [],
        ["layer1.1.conv1", "layer1.1.bn1"],
    ]
    assert stages[-4:] == [[], [], ["linear"], []]  # sum, pooling, classifier, loss


def test_a_vgg_has_convolution_and_relu_apart():
    features = automatic(models.vgg11(norm="group"))[:5]
    assert features == [[f"features.{n}" for n in own] for own in ([0, 1], [2], [3], [4, 5], [6])]


def test_a_sequential():
    pool = nn.MaxPool2d(2)
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), pool),
        nn.Conv2d(8, 8, 3),
        norms.FilterResponseNorm2d(8),
        pool,  # the same module again: one more stage
        nn.Sequential(nn.Conv2d(8, 8, 1), norms.OnlineNorm2d(8), nn.PReLU(), nn.Dropout(0.1)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
        nn.LayerNorm(4),
    )
    stages = automatic(net)
    assert stages == [
        ["0.0", "0.1", "0.2"],
        ["0.3"],
        ["1", "2"],
        ["3"],
        ["4.0", "4.1", "4.2", "4.3"],
        ["5", "6"],
        ["7", "8"],
        [],
    ]
    assert sum(map(len, resolve(net, stages))) == len(list(net.parameters()))


def test_a_sequential_may_have_gaps():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    net.register_module("none", None)
    assert automatic(net) == [["0", "1"], []]


def test_another_model_is_refused_with_an_example():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

    with pytest.raises(RecoupError, match=r"no rule for a Net; .*\[\['body'\], \['head'\]\]"):
        automatic(Net())


def net():
    return nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), nn.ReLU(), nn.Linear(3, 2))


def test_names_cover_their_subtrees_in_the_models_order():
    assert resolve(net(), [["2"], ["0"]]) == [["2.weight", "2.bias"], [f"0.{i}.{p}" for i in (0, 1) for p in WB]]
    assert resolve(net(), [[], [""]])[1] == [f"{n}.{p}" for n in ("0.0", "0.1", "2") for p in WB]
    assert resolve(net(), [("0.1", "0.0"), iter(["2"])])[0] == [f"0.{i}.{p}" for i in (0, 1) for p in WB]


WB = ("weight", "bias")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([["0"]], "no stage holds 2: every module with parameters"),
        ([["0.0"], []], r"no stage holds 0\.1, 2"),
        ([], r"no stage holds 0\.0, 0\.1, 2"),
        ([["0"], ["0.1", "2"]], r"module '0\.1' is in stage 0 and in stage 1"),
        ([["0"], ["2"], [""]], r"module '' is in stage 2|module '0' is in stage 0 and in stage 2"),
        ([["0", "0"], ["2"]], "module '0' is in stage 0 and in stage 0"),
        ([["0"], ["3"]], "stage 1 names '3', which the model lacks; it has 0, "),
        ([["0"], "2"], "stage 1 is the string '2'; a stage is a list"),
        ([["0"], ["2.weight"]], r"stage 1 names '2\.weight', which the model lacks"),
    ],
)
def test_lists_that_do_not_fit(stages, message):
    with pytest.raises(RecoupError, match=message):
        resolve(net(), stages)


def test_a_name_that_begins_as_another_is_another():
    model = nn.ModuleDict({"a": nn.Linear(1, 1), "ab": nn.Linear(1, 1)})
    assert resolve(model, [["a"], ["ab"]]) == [["a.weight", "a.bias"], ["ab.weight", "ab.bias"]]


def test_parameters_that_stages_share():
    tied = net()
    tied.get_submodule("0.0").weight = tied[2].weight = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(RecoupError, match=r"'0\.0\.weight' \(stage 0\) and '2\.weight' \(stage 1\) are one parameter"):
        resolve(tied, [["0"], ["2"]])
    assert resolve(tied, [["0", "2"]])[0] == ["0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias", "2.bias"]


def test_a_layer_that_comes_twice_in_a_sequential_is_shared():
    layer = nn.Linear(2, 2)
    twice = nn.Sequential(layer, nn.ReLU(), layer)
    with pytest.raises(RecoupError, match=r"'0\.weight' \(stage 0\) and '2\.weight' \(stage 1\) are one parameter"):
        resolve(twice, automatic(twice))


def test_parameters_of_the_model_itself_are_missed_by_name():
    class Scaled(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(2, 2))
            self.scale = nn.Parameter(torch.tensor(math.pi))

    with pytest.raises(RecoupError, match="no stage holds scale"):
        resolve(Scaled(), [["0"]])


def test_dtypes():
    with pytest.raises(RecoupError, match=r"0\.weight is torch\.bfloat16"):
        resolve(nn.Sequential(nn.Linear(2, 2)).bfloat16(), [["0"]])
