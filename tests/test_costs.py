"""One cost vector over all wings: each wing's own count, sums by hand, and what is not counted said."""

import json

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import recoup as rc
from recoup import costs
from recoup.costs import able, smallest_units
from recoup.lba import LBA
from recoup.lightnorm import traffic
from recoup.lightnorm.cost import block_bits
from recoup.models import chargpt
from recoup.models.attention import AttentionProducts
from recoup.nbsmt import Array, cycles
from recoup.network.systolic import layer_cycles
from tests.networks import CONVOLUTIONS, images, small_net

SHAPE = (3, 8, 8)


def test_cycles_are_the_wing_s_own_whether_the_hardware_is_there_or_not():
    model = small_net()
    policy = rc.Policy({"re:block1.*": rc.NBSMT(2), "re:block2.conv.": rc.NBSMT(4)})
    before = rc.cost(model, policy, SHAPE, Array(8, 4))
    rc.calibrate_(model, [images(16)], dict.fromkeys(CONVOLUTIONS, True))
    rc.emulate_(model, policy)
    own = cycles(model, SHAPE, Array(8, 4))
    assert before == rc.cost(model, None, SHAPE, Array(8, 4)) == rc.cost(model, policy, SHAPE, Array(8, 4))
    products = [layer for layer in before.layers if layer.macs]
    assert [(layer.name, layer.cycles, layer.macs) for layer in products] == [
        (layer.name, layer.cycles, layer.macs) for layer in own.layers
    ]
    assert (before.cycles, before.macs) == (own.cycles, own.macs)
    moved = {layer.name: layer.traffic for layer in own.layers}
    for layer in products:
        assert layer.traffic == moved[layer.name] * (1 if layer.name in CONVOLUTIONS[:5] else 4)
    assert before.units == (repr(rc.NBSMT(4)),)


def test_bits_are_weighted_by_products_and_chunks_take_a_cycle():
    model = nn.Sequential(nn.Linear(40, 8), nn.Linear(8, 4))
    found = rc.cost(model, {"0": LBA.m7e4(), "1": LBA.biased(4, 3, chunk=None)}, (40,))
    assert found.bits == (12 * 320 + 8 * 32) / 352
    plain = layer_cycles(1, 40, 8)
    assert [layer.cycles for layer in found.layers] == [plain + 3, layer_cycles(1, 8, 4)]
    floats = rc.cost(model, {}, (40,))
    assert (floats.bits, floats.traffic) == (32, 4 * (40 + 320 + 8 + 8 + 32 + 4))
    eight = rc.cost(model, {"re:.": LBA.int16(operands=rc.Int(8))}, (40,))
    assert eight.traffic == floats.traffic / 4


def test_a_norm_reads_and_writes_its_map():
    model = small_net()
    config = rc.LightNorm(shared="max")
    plain, narrow = (rc.cost(model, layers, SHAPE) for layers in ({}, {"re:.*bn.": config}))
    norms = traffic(model, torch.zeros(1, *SHAPE), config)
    maps = {layer.name: (layer.elements, layer.channels) for layer in norms.layers}
    for one, other in zip(plain.layers, narrow.layers, strict=True):
        if one.name not in maps:
            assert one == other
            continue
        elements, channels = maps[one.name]
        assert (one.cycles, one.macs, one.accumulator) == (0, 0, 0)
        assert one.traffic == 2 * elements * 4
        assert other.traffic == 2 * elements * block_bits(config.forward_blocks, None, channels) / 8


def test_attention_and_repeated_calls():
    tokens = torch.zeros(2, 8, dtype=torch.long)
    model = chargpt(characters=5, layers=1, width=8, heads=2, context=8)
    found = {layer.name: layer for layer in rc.cost(model, {"re:.*attention": LBA()}, tokens).layers}
    attention = found["blocks.0.attention"]
    assert attention.macs == 2 * 2 * 2 * 8 * 8 * 4
    assert attention.cycles == layer_cycles(8, 4, 8, groups=4) + layer_cycles(8, 8, 4, groups=4)
    assert attention.kind == AttentionProducts.__name__

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x))

    (row,) = rc.cost(Twice(), {}, (4,)).layers
    assert (row.macs, row.cycles) == (32, 2 * layer_cycles(1, 4, 4))


def test_what_is_not_counted_is_said():
    model = nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 4))
    found = rc.cost(model, {"0": rc.NBSMT(2)}, torch.zeros(3, 4))
    assert [(part.name, part.kind, part.macs) for part in found.uncounted] == [("1", "torch.nn.modules.rnn.GRU", 288)]
    assert found.absent["energy"].startswith("0: energy needs a Liberty file")
    assert found.energy is None
    assert "not counted: 1 (torch.nn.modules.rnn.GRU)" in str(found)
    assert "energy: 0: energy needs a Liberty file" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["cycles"] == found.cycles


def test_layers_that_no_hardware_runs_are_named():
    model = small_net()
    some = rc.cost(model, {"re:block1.*": rc.LBA.m7e4()}, (3, 8, 8))
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    products = [layer.name for layer in some.layers if layer.macs and not layer.name.startswith("block1")]
    assert set(some.in_float) == {*norms, *products}
    assert some.to_dict()["in_float"] == list(some.in_float)
    assert f"no hardware runs {', '.join(products)} and {len(norms)} norms: counted as float" in str(some)
    whole = rc.cost(model, None, (3, 8, 8))
    assert "no hardware runs any layer: counted as float" in str(whole)
    both = ([layer for layer in one.layers if layer.name in some.in_float] for one in (some, whole))
    assert next(both) == next(both)
    linear = nn.Sequential(nn.Linear(4, 4))
    assert "no hardware" not in str(rc.cost(linear, {"0": rc.LBA.m7e4()}, (4,)))

    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    with pytest.warns(rc.RecoupWarning, match="cost: 1 of 2 emulated layers never ran: idle"):
        rc.cost(Idle(), {"re:.*": rc.NBSMT(2)}, (4,))


def test_a_unit_runs_fewer_threads():
    assert smallest_units({rc.NBSMT(1), rc.NBSMT(2), rc.NBSMT(4), LBA()}) == [repr(LBA()), repr(rc.NBSMT(4))]
    assert smallest_units({rc.NBSMT(2, "A"), rc.NBSMT(4)}) == [repr(rc.NBSMT(2, "A")), repr(rc.NBSMT(4))]
    assert smallest_units({rc.NBSMT(1, "A"), rc.NBSMT(1)}) == [repr(rc.NBSMT(1, "A"))]  # they run each other
    assert smallest_units({LBA(), LBA(chunk=64), LBA(gradient="immediate_of")}) == [repr(LBA())]  # the same gates
    assert smallest_units({LBA(), LBA(chunk=None)}) == sorted([repr(LBA()), repr(LBA(chunk=None))])
    assert able(rc.NBSMT(4), rc.NBSMT(1, "A"))
    assert not able(rc.NBSMT(2), rc.NBSMT(4))
    assert not able(rc.NBSMT(2), LBA())


@pytest.mark.parametrize(
    ("policy", "shape", "options", "told"),
    [
        ({"block9": LBA()}, SHAPE, {}, "cost: the layer map's key 'block9' matches no layer"),
        ({"stem": rc.LightNorm()}, SHAPE, {}, r"cost: LightNorm.* cannot take layer 'stem': a Conv2d is for NBSMT"),
        (
            {},
            (1, 8, 8),
            {},
            r"input of shape \[1, 1, 8, 8\], at layer 'stem' .* whose input is \[1, 1, 8, 8\]: RuntimeErr",
        ),
        ({}, torch.zeros(2, 3), {}, r"cost: the model does not take an input of shape \[2, 3\], at layer 'stem'"),
        ({}, (0, 3), {}, "cost: a shape has positive whole sizes"),
        ({}, SHAPE, {"array": 16}, r"cost\(array=16\): array must be"),
        ({}, SHAPE, {"liberty": "sg13g2"}, "liberty: 'sg13g2' is no file"),
        ({}, SHAPE, {"liberty": 3}, "liberty=3: must be a path, several paths, or None"),
        ({}, SHAPE, {"liberty": []}, "liberty=.*must be a path, several paths, or None"),
    ],
)
def test_bad_input(policy, shape, options, told):
    with pytest.raises(rc.RecoupError, match=told):
        rc.cost(small_net(), policy, shape, **options)


class Operators(TorchDispatchMode):
    """Notes which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ran.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_cost_counts_each_layer_once_and_runs_the_network_and_nothing_else(monkeypatch):
    model, shape = nn.Sequential(*[nn.Linear(4, 4) for _ in range(20)]), (3, 4)
    with Operators() as alone, torch.no_grad():
        model(torch.zeros(1, *shape))
    counted, spent_on = [], costs.spent_on

    def counting(site, config, array):
        counted.append(site.name)
        return spent_on(site, config, array)

    monkeypatch.setattr(costs, "spent_on", counting)
    with Operators() as heard:
        rc.cost(model, {"re:.": LBA.m7e4()}, shape)
    assert counted == [str(layer) for layer in range(20)]
    assert [heard.ran.count(name) for name in alone.ran] == [alone.ran.count(name) for name in alone.ran]
    assert len(heard.ran) < len(alone.ran) + 20  # checks of the batch, once; nothing more a layer
