"""Every wing keeps the promise of `Emulated.pure`, on which searches that keep outputs rely; a broken one is seen."""

import warnings

import pytest
import torch
from torch import nn

import recoup as rc
from recoup.nbsmt.layers import NBSMTLinear
from recoup.network.replay import Outputs, _key, replaying
from recoup.network.scales import MEASURED
from recoup.wings import cards
from tests.purity import impurities

MADE = {
    nn.Conv1d: (lambda: nn.Conv1d(6, 4, 3, padding=1), (2, 6, 9)),
    nn.Conv2d: (lambda: nn.Conv2d(6, 4, 3, groups=1), (2, 6, 5, 5)),
    nn.Linear: (lambda: nn.Linear(6, 4), (5, 6)),
    nn.BatchNorm1d: (lambda: nn.BatchNorm1d(6), (5, 6)),
    nn.BatchNorm2d: (lambda: nn.BatchNorm2d(6), (2, 6, 5, 5)),
    nn.BatchNorm3d: (lambda: nn.BatchNorm3d(6), (2, 6, 3, 3, 3)),
    nn.LayerNorm: (lambda: nn.LayerNorm(32), (5, 32)),
    nn.RMSNorm: (lambda: nn.RMSNorm(32), (5, 32)),
}
"""Float class -> a layer of it, and an input's shape; a wing that stands in for another class gets a line."""
ATTENTION = {"AttentionProducts"}  # several inputs, which are never kept


def stand_ins():
    for config, card in cards().items():
        for plain in card.layers:
            if plain.__name__ not in ATTENTION:
                yield pytest.param(config, plain, id=f"{config.__name__}-{plain.__name__}")


def emulated(config, plain):
    """A layer on hardware, with whatever extras it may have, and an input."""
    make, shape = MADE[plain]
    torch.manual_seed(0)
    model, x = nn.ModuleDict({"one": make()}).eval(), torch.rand(shape)
    card = cards()[type(config)]
    if card.works_on_scales(config):
        class_of = nn.Sequential(model["one"])
        rc.calibrate_(class_of, [x], {"0": True})
    rc.emulate_(model, config, {"one": config})
    layer = model["one"]
    assert isinstance(layer, rc.wings.Emulated)
    for name in layer.travelling:
        if name not in MEASURED and getattr(layer, name) is None:
            value = torch.arange(6).flip(0) if name == "order" else torch.rand(4) if name == "bias_correction" else None
            setattr(layer, name, value)
    return layer, x, make


def configs(kind):
    card = cards()[kind]
    return list(dict.fromkeys(card.presets.values())) or [kind()]


@pytest.mark.parametrize(("kind", "plain"), list(stand_ins()))
def test_every_wing_keeps_its_promise_or_makes_none(kind, plain):
    """A new wing and a new layer of one come here by themselves."""
    for config in configs(kind):
        layer, x, make = emulated(config, plain)
        if not layer.pure:
            with torch.no_grad():
                assert _key(layer, x) is None  # so nothing of it is kept
            return
        for mode in ("emulate", "baseline", "float"):
            layer.mode = mode
            assert not impurities(layer, x, make), (config, mode)


def test_some_wing_makes_the_promise():
    assert any(layer.pure for card in cards().values() for layer in card.layers.values())


class Aging(NBSMTLinear):
    """Of a class that makes the promise, and with a state of its own."""

    calls = 0

    def forward(self, input):  # noqa: A002 -- as the base class has it
        self.calls += 1
        return super().forward(input) + self.calls


class Shy(Aging):
    pure = True


def test_no_class_makes_the_promise_for_those_derived_from_it():
    assert NBSMTLinear.pure
    assert not Aging.pure
    assert Shy.pure
    layer, x, _ = emulated(rc.NBSMT(2), nn.Linear)
    layer.__class__ = Aging
    with torch.no_grad(), replaying(layer, Outputs()):
        assert torch.equal(layer(x) + 1, layer(x))
    layer.__class__ = NBSMTLinear
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Dropout(0.5))
    assert not layer.pure


class Counting(rc.wings.Emulated, nn.Linear):
    pure, calls = True, 0

    def forward(self, input):  # noqa: A002 -- as the base class has it
        self.calls += 1
        return super().forward(input) + self.calls


class Random(rc.wings.Emulated, nn.Linear):
    pure = True

    def forward(self, input):  # noqa: A002 -- as the base class has it
        return super().forward(input) + torch.rand(())


class Named(rc.wings.Emulated, nn.Linear):
    pure = True

    def forward(self, input):  # noqa: A002 -- as the base class has it
        return super().forward(input) * len(self.layer)


class Trained(rc.wings.Emulated, nn.Linear):
    pure = True

    def forward(self, input):  # noqa: A002 -- as the base class has it
        return super().forward(input) * (2 if self.training else 1)


class Untold(rc.wings.Emulated, nn.Linear):
    """An extra that no state_dict carries."""

    pure, gain = True, 1.0

    def forward(self, input):  # noqa: A002 -- as the base class has it
        return super().forward(input) * self.gain


class Writing(rc.wings.Emulated, nn.Linear):
    pure = True

    def forward(self, input):  # noqa: A002 -- as the base class has it
        return super().forward(input.mul_(2))


class Giving(rc.wings.Emulated, nn.Linear):
    pure = True

    def forward(self, input):  # noqa: A002 -- as the base class has it
        return input[:, :4]


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (Counting, "changes its calls"),
        (Random, "draws random numbers"),
        (Named, "a twin's output is another"),
        (Trained, "a twin's output is another"),
        (Untold, "a twin's output is another"),
        (Writing, "writes into its input"),
        (Giving, "gives a part of what it was given"),
    ],
)
def test_a_broken_promise_is_seen(trunc, broken, told):
    rc.wings.register(rc.wings.Card(config=trunc, layers={nn.Linear: broken}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer, x, make = emulated(trunc(), nn.Linear)
        if broken is Untold:
            layer.gain = 3.0
        assert any(told in fault for fault in impurities(layer, x, make))
