"""Channel orders: what they mean, that they are found, and that they pay on real data."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import recoup as rc
from recoup.errors import RecoupError, RecoupWarning
from recoup.nbsmt import ops, reference, reorder
from recoup.nbsmt.config import NBSMT, PAIRINGS
from recoup.nbsmt.observe import nbsmt_layers, see
from recoup.nbsmt.profiling import profile
from recoup.nbsmt.reorder import arrange, reorder_, slot_of_position, squared_losses
from recoup.network.emulated import emulated_layers, running
from tests.networks import CONVOLUTIONS, images, small_net


def network(config=None):
    model = small_net()
    rc.calibrate_(model, [images(24)])
    return rc.emulate_(model, config or NBSMT(2))


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize("channels", [1, 4, 7, 16, 18])
def test_slots_are_those_of_the_threads(channels, threads, pairing):
    config = NBSMT(threads, pairing=pairing)
    owner_TS = reference.split_threads(torch.arange(channels) + 1, config, 0)
    slot_p = slot_of_position(channels, config, owner_TS.device)
    for slot in range(owner_TS.shape[1]):
        assert set(owner_TS[:, slot].tolist()) - {0} == set(((slot_p == slot).nonzero()[:, 0] + 1).tolist())


@pytest.mark.parametrize("policy", ["S", "S+A", "S+W", "S+Aw", "S+aW"])
@pytest.mark.parametrize("threads", [2, 4])
def test_squared_losses_of_all_operands(threads, policy):
    for zero, port in ((0, 5), (128, 5), (128, 4)):
        config = NBSMT(threads, policy, port=port)
        x, w = torch.arange(256) - zero, torch.arange(-128, 128)
        found = sum(u[:, None] * v for u, v in squared_losses(x, w, config, zero))
        x, w = x[:, None], w[None]
        others = [1] if threads == 2 else [1, 2]
        losses = [x * w - reference.contribution(x, w, torch.tensor(n), config, zero) for n in others]
        assert torch.equal(found, sum(loss.square() for loss in losses).double())


def cost(pairs, slot_p, order):
    ordered = pairs[order][:, order].clone().fill_diagonal_(0)
    return float(ordered[slot_p[:, None] == slot_p].sum())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 14), st.sampled_from([2, 4]), st.sampled_from(PAIRINGS), st.integers(0, 2**32 - 1))
def test_no_swap_improves_what_is_found(channels, threads, pairing, seed):
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.rand(channels, channels, generator=generator, dtype=torch.float64) ** 3
    pairs = pairs + pairs.T
    slot_p = slot_of_position(channels, NBSMT(threads, pairing=pairing), pairs.device)
    order = arrange(pairs, slot_p)
    assert sorted(order.tolist()) == list(range(channels))
    found = cost(pairs, slot_p, order)
    assert found <= cost(pairs, slot_p, torch.arange(channels))
    for i, j in itertools.combinations(range(channels), 2):
        swapped = order.clone()
        swapped[[i, j]] = order[[j, i]]
        assert cost(pairs, slot_p, swapped) >= found - 1e-9


def test_a_planted_matching_is_found():
    partner = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    pairs = torch.ones(40, 40, dtype=torch.float64)
    for a, b in partner.view(20, 2).tolist():
        pairs[a, b] = pairs[b, a] = 0
    slot_p = slot_of_position(40, NBSMT(2), pairs.device)
    assert cost(pairs, slot_p, arrange(pairs, slot_p)) <= 2  # at most one pair is missed by a local minimum


@pytest.mark.parametrize("config", [NBSMT(2), NBSMT(4, "S+aW", "zero", "adjacent")])
def test_an_order_permutes_columns_and_rows_alike(config):
    torch.manual_seed(0)
    layer, x = nn.Linear(13, 6, bias=False), torch.randn(8, 13).relu()
    rc.calibrate_(layer, [x], {"": True})
    rc.emulate_(layer, config)
    exact = layer.config.replace(threads=1)
    layer.order = torch.randperm(13)
    code = reference.quantize_activation(x, layer.activation_scale)
    scale = 2 * layer.weight.detach().abs().amax(1) / 255
    step = scale * see(layer, x).scale
    weight = torch.round(layer.weight.detach() / scale[:, None]).clamp(-128, 127).to(torch.int8)
    sums = ops.matmul(code[:, layer.order], weight[:, layer.order].t(), config)
    with torch.no_grad():
        assert torch.equal(layer(x), sums * step)
        with running(layer, "baseline"):
            assert torch.equal(layer(x), ops.matmul(code, weight.t(), exact) * step)


def test_a_channel_that_is_zero_half_the_time_meets_its_complement():
    torch.manual_seed(0)
    x = torch.rand(400, 8) + 0.2
    x[:200, [0, 1, 4, 5]] = 0  # with halves 0 meets 4: always both or none
    x[200:, [2, 3, 6, 7]] = 0
    layer = nn.Linear(8, 5)
    rc.calibrate_(layer, [x], {"": True})
    rc.emulate_(layer, NBSMT(2))
    assert profile(layer, [x])[0].collisions == 0.5
    reorder_(layer, [x])
    assert layer.order.dtype == torch.int64
    found = profile(layer, [x])[0]
    assert (found.collisions, found.error, found.utilization) == (0, 0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [2, 4])
def test_it_pays_on_digits_it_has_not_seen(threads):
    torch.manual_seed(0)
    model = rc.models.digits_net()
    train = rc.data.load("digits", "train").batches(128)
    test = list(rc.data.load("digits", "test").batches(128))[:2]
    with torch.no_grad():
        for x, _ in train:  # random weights, but batch norms that fit them: activations as skewed as real ones
            model.train()(x)
    rc.calibrate_(model.eval(), train)
    rc.emulate_(model, NBSMT(threads))
    before = profile(model, test)
    reorder_(model, list(train)[:3])
    after = profile(model, test)
    gains = [new.error / old.error for old, new in zip(before, after, strict=True)]
    assert len(gains) == 3
    assert max(gains) < 1
    assert sum(gains) / len(gains) < (0.85 if threads == 2 else 0.95)


def test_wide_layers_are_ordered_in_blocks(monkeypatch):
    monkeypatch.setattr(reorder, "BLOCK", 8)
    torch.manual_seed(0)
    x = torch.rand(64, 30) * (torch.rand(64, 30) < torch.rand(30))
    layer = nn.Linear(30, 5)
    rc.calibrate_(layer, [x], {"": True})
    rc.emulate_(layer, NBSMT(4))
    before = profile(layer, [x])[0].error
    reorder_(layer, [x])
    assert sorted(layer.order.tolist()) == list(range(30))
    slot_p = slot_of_position(30, NBSMT(4), x.device)
    assert torch.equal(slot_p[layer.order.argsort()] // 2, slot_p // 2)  # nothing leaves its block of two slots
    assert profile(layer, [x])[0].error < before


def test_a_generator_will_do_and_layers_without_gain_keep_no_order():
    model = network()
    assert reorder_(model, (images(8, seed) for seed in range(2))) is model
    orders = [layer.order for layer in nbsmt_layers(model, "test").values()]
    assert any(order is not None for order in orders)
    layer = nn.Linear(2, 3)
    x = torch.rand(9, 2)
    rc.calibrate_(layer, [x], {"": True})
    assert reorder_(rc.emulate_(layer, NBSMT(2)), [x]).order is None


def test_an_interrupt_leaves_the_orders():
    model, calls = network(), []

    def stop(module, args, output):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    handle = model.block2.conv2.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        reorder_(model, [images(4)] * 4)
    handle.remove()
    for name in CONVOLUTIONS:
        assert model.get_submodule(name).order is None
        assert not model.get_submodule(name)._forward_hooks


def test_bad_requests_are_refused():
    with pytest.raises(RecoupError, match="reorder_: the model has no NB-SMT layer"):
        reorder_(small_net(), [images(2)])
    for config in (NBSMT(1), NBSMT(2, "A"), NBSMT(4, "aW")):
        with pytest.raises(RecoupError, match="the order matters in no layer"):
            reorder_(network(config), [images(2)])
    with pytest.raises(RecoupError, match="there was no batch"):
        reorder_(network(), [])


def test_an_order_takes_repairs_of_another_back_and_says_so():
    model = rc.correct_bias_(network())
    with pytest.warns(RecoupWarning, match=r"reorder_: undid bias \(6 layers\), fitted for other hardware"):
        reorder_(model, [images(2)])
    assert all(layer.bias_correction is None for layer in emulated_layers(model).values())
    orders = {name: layer.order for name, layer in emulated_layers(model).items()}
    reorder_(model, [images(2)])  # twice is once
    assert all(same(layer.order, orders[name]) for name, layer in emulated_layers(model).items())


def same(one, other):
    return one is other is None or torch.equal(one, other)
