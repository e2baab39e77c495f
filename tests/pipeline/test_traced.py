"""Parts of a traced model compose to the model bit for bit, at any cut; ranks that hold them equal the simulator."""

import random
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import recoup as rc
from recoup import models
from recoup.errors import RecoupError
from recoup.models.transformer import chargpt
from recoup.pipeline import AdamW, Simulator, automatic, chain, delays
from recoup.pipeline.plan import Plan
from recoup.pipeline.runtime import run_local
from tests.pipeline.networks import images


class Dropping(nn.Module):
    """A residual network with dropout, a shortcut with parameters and a value that is used late."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.one, self.two, self.side = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.drop, self.pool = nn.Dropout(0.3), nn.AdaptiveAvgPool2d(1)
        self.late = nn.Dropout2d(0.2)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        y = self.drop(self.two(torch.relu_(self.one(x))))
        x = self.late(y + self.side(x))
        return self.head(torch.flatten(self.pool(x), 1))


DROPPING = [["stem", "norm"], ["one"], ["two", "drop", "side"], ["late"], ["pool"], ["head"], []]
BUILDS = {
    "resnet20": lambda: models.resnet20(norm="group", width=8),
    "batch norm": lambda: models.resnet20(width=8),
    "resnet18": lambda: models.resnet18(3),
    "vgg11": lambda: models.vgg11(norm="group"),
    "mobilenet": models.mobilenet_v1,
    "chargpt": lambda: chargpt(11, 2, 8, 2, 6),
    "dropping": Dropping,
}


def build(name):
    torch.manual_seed(0)
    return BUILDS[name]()


def sample(name):
    generator = torch.Generator().manual_seed(1)
    if name == "chargpt":
        return torch.randint(11, (1, 6), generator=generator)
    return torch.randn(2, 3, 32, 32, generator=generator)


@pytest.mark.parametrize("name", [name for name in BUILDS if name != "dropping"])
def test_parts_compose_to_the_model_with_all_gradients(name):
    model, x = build(name), sample(name)
    expected = model(x)
    wanted = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    model.load_state_dict(build(name).state_dict())  # batch norm's statistics have moved
    chain_ = chain(model)
    draw, S = random.Random(2), len(chain_.stages)
    for _ in range(3):
        cuts = [0, *sorted(draw.sample(range(1, S), draw.randint(1, 4))), S]
        entered, left = [], (x,)
        for first, end in pairwise(cuts):
            entered.append(tuple(v.detach().requires_grad_(v.is_floating_point()) for v in left))
            left = chain_.part(first, end)(*entered[-1])
            entered[-1] = entered[-1], left
        assert torch.equal(left, expected)
        model.zero_grad()
        (left.square().sum()).backward()
        for (inputs, _), (_, outputs) in zip(reversed(entered[1:]), reversed(entered[:-1]), strict=True):
            pairs = [(o, i.grad) for o, i in zip(outputs, inputs, strict=True) if o.requires_grad]
            torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        for p, g in zip(model.parameters(), wanted, strict=True):
            assert torch.equal(p.grad, g)
        model.load_state_dict(build(name).state_dict())


def test_stages_where_nothing_is_listed():
    assert chain(build("dropping")).stages == [
        ["stem", "norm"], ["one"], ["two", "drop"], ["side"], ["late"], ["pool"], ["head"], []
    ]  # fmt: skip
    resnet = chain(build("resnet20")).stages
    assert [s for s in resnet if s][:3] == [["conv1", "bn1"], ["layer1.0.conv1", "layer1.0.bn1"], [
        "layer1.0.conv2", "layer1.0.bn2", "layer1.0.shortcut"]]  # fmt: skip
    assert len(resnet) == len(automatic(build("resnet20")))
    assert chain(build("chargpt")).stages == [["pos"], ["tok"], [], ["blocks.0"], ["blocks.1", "lnf"], ["head"], []]


HOWS = {
    "none": {},
    "stash": {"mitigation": "stash"},
    "lwpv+sc": {"mitigation": "lwpv+sc"},
    "adamw": {"mitigation": "coasting+stash", "optimizer": AdamW(), "clip": 0.5},
    "updates of 3": {"mitigation": "sc", "update_size": 3},
}


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("how", HOWS)
def test_ranks_cut_inside_blocks_equal_the_simulator(how, ranks):
    one, other = Dropping(), Dropping()
    other.load_state_dict(one.state_dict())
    samples = images(12, shape=(1, 3, 6, 6))
    options = {"stages": DROPPING, "delays": delays(7), "lr": 0.01, "seed": 4, **HOWS[how]}
    losses = run_local(Plan(one, **options), samples, ranks).losses
    simulator = Simulator(other, **options)
    assert losses == [simulator.step(x, y) for x, y in samples]
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(("name", "ranks"), [("resnet20", 3), ("chargpt", 2), ("vgg11", 2), ("mobilenet", 4)])
def test_networks_of_this_package_on_ranks(name, ranks):
    one, other = build(name), build(name)
    stages = chain(one).stages
    text = name == "chargpt"
    samples = [(sample(name)[: 1 if text else 2], torch.tensor([3] * (6 if text else 2))) for _ in range(3)]
    loss = (lambda out, y: F.cross_entropy(out.flatten(0, 1), y)) if text else F.cross_entropy
    options = {"stages": stages, "delays": delays(len(stages)), "lr": 0.01, "mitigation": "lwpv", "loss": loss}
    losses = run_local(Plan(one, **options), samples, ranks).losses
    simulator = Simulator(other, **options)
    assert losses == [simulator.step(x, y) for x, y in samples]
    mine, theirs = one.state_dict(), other.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.slow
@pytest.mark.parametrize("config", [rc.LBA.m7e4(), rc.LightNorm()], ids=["lba", "lightnorm"])
def test_emulated_layers_on_ranks(config):
    one, other = (rc.emulate_(models.resnet20(norm="batch", width=8), config) for _ in range(2))
    other.load_state_dict(one.state_dict())
    stages = automatic(models.resnet20(width=8))
    samples = images(2, shape=(2, 3, 16, 16))
    options = {"stages": stages, "delays": delays(len(stages)), "lr": 0.01, "mitigation": "stash"}
    losses = run_local(Plan(one, **options), samples, 2).losses
    simulator = Simulator(other, **options)
    assert losses == [simulator.step(x, y) for x, y in samples]
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


class Branches(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.how = how

    def forward(self, x):
        if self.how == "control" and x.sum() > 0:
            return self.one(x)
        if self.how == "dropout":
            x = F.dropout(self.one(x), 0.1, self.training)
        y = self.one(x)
        if self.how == "thrice":
            return y + self.two(y) + self.three(y)
        if self.how == "tied":
            return self.three(self.two(y @ self.one.weight)) @ (self.one.weight * 2)
        if self.how == "derived":
            w = self.one.weight * 2
            return self.three(self.two(y @ w)) @ w
        return self.three(self.two(y))


@pytest.mark.parametrize(
    ("how", "stages", "told"),
    [
        ("control", None, r"torch.fx cannot follow Branches.forward: line \d+ of forward: TraceError"),
        ("control", None, r"a Simulator takes stages listed by hand: \[\['one'\], \['two'\], \['three'\]\]"),
        ("dropout", None, "dropout is functional dropout, whose training flag tracing freezes: use"),
        ("plain", [["three"], ["two"], ["one"]], "two is in stage 1 and runs after one of stage 2"),
        ("plain", [["one"], ["two"]], "no stage holds three"),
    ],
)
def test_what_cannot_be_a_chain(how, stages, told):
    with pytest.raises(RecoupError, match=told):
        chain(Branches(how), stages)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("thrice", "one is used 3 times, on both sides of the cut before stage 2"),
        ("tied", "is used on both sides of the cut|made of parameters alone"),
        ("derived", "made of parameters alone, is used on both sides of the cut before stage 2"),
    ],
)
def test_cuts_that_cannot_be(how, told):
    plan = Plan(Branches(how), [["one"], ["two"], ["three"]], delays(3), 0.1, cut=[2, 1])
    with pytest.raises(RecoupError, match=told):
        plan.check(2)
