"""Which layers are slowed, and that the accuracy budget is met with few of them."""

import collections
import itertools
import json
import warnings

import pytest
import torch

import recoup as rc
from recoup.errors import RecoupError, RecoupWarning
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.observe import nbsmt_layers
from recoup.nbsmt.throttle import _harm, _of_least_harm, plan_throttling, throttle_
from recoup.network.emulated import running
from tests.networks import CONVOLUTIONS, images, small_net

HARSH = NBSMT(threads=4, policy="S", rounding="zero")


def network(config=HARSH, layers=None):
    """An emulated network and labelled images that 8-bit arithmetic gets right, all of them, but only just."""
    model, x = small_net(), images(1000, seed=1)
    with torch.no_grad():
        model.classifier.bias -= model(x).mean(0)  # so that no class always wins
        rc.calibrate_(model, [images(24)])
        rc.emulate_(model, config, layers)
        with running(model, "baseline"):
            best = model(x).topk(2)
    close = (best.values[:, 0] - best.values[:, 1]).argsort()[:480:4]
    return model, [(x[part], best.indices[part, 0]) for part in close.split(60)]


def threads(model):
    return {name: layer.config.threads for name, layer in nbsmt_layers(model, "test").items()}


def test_a_budget_that_is_met_slows_nothing():
    model, batches = network()
    plan = plan_throttling(model, batches, 100)
    assert plan.threads == {}
    assert plan.baseline.top1 == 100
    assert plan.before == plan.after == rc.evaluate(model, batches)
    throttle_(model, batches, 100)
    assert set(threads(model).values()) == {4}


def test_a_tight_budget_is_met_with_the_fewest_last_steps():
    model, batches = network()
    before = rc.evaluate(model, batches)
    budget = (100 - before.top1) / 2
    plan = plan_throttling(model, batches, budget)
    assert set(threads(model).values()) == {4}
    assert plan.before == before
    assert plan.before.top1 < 100 - budget <= plan.after.top1
    assert 0 < len(plan.threads) < len(CONVOLUTIONS)
    assert set(plan.threads.values()) <= {1, 2}
    assert throttle_(model, batches, budget) is model
    assert threads(model) == {name: plan.threads.get(name, 4) for name in CONVOLUTIONS}
    assert rc.evaluate(model, batches) == plan.after
    assert json.loads(json.dumps(plan.to_dict()))["threads"] == plan.threads


def test_it_finds_a_set_of_the_least_size():
    model, batches = network(HARSH.replace(threads=2))
    budget = (100 - rc.evaluate(model, batches).top1) / 2
    plan = plan_throttling(model, batches, budget)
    for chosen in itertools.combinations(CONVOLUTIONS, len(plan.threads) - 1):
        for name in chosen:
            model.get_submodule(name).config = NBSMT(threads=1)
        assert rc.evaluate(model, batches).top1 < 100 - budget
        for name in chosen:
            model.get_submodule(name).config = HARSH.replace(threads=2)


def test_no_budget_gives_eight_bit_accuracy():
    model, batches = network()
    throttle_(model, batches, 0)
    assert rc.evaluate(model, batches).top1 == 100


def test_threads_that_come_back_take_repairs_of_the_slow_layers_with_them():
    model, batches = network()
    throttle_(model, batches, (100 - rc.evaluate(model, batches).top1) / 2)
    slow = threads(model)
    assert 0 < list(slow.values()).count(4) < len(slow)
    rc.correct_bias_(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RecoupWarning, match="undid bias"):
            throttle_(model, batches, 100)
    assert threads(model) == slow
    assert any(layer.bias_correction is not None for layer in nbsmt_layers(model, "test").values())
    with pytest.warns(RecoupWarning, match=r"throttle_: undid bias"):
        throttle_(model, batches, 100)
    assert set(threads(model).values()) == {4}
    assert all(layer.bias_correction is None for layer in nbsmt_layers(model, "test").values())


@pytest.mark.slow
def test_throttling_is_planned_on_the_repaired_network_and_takes_its_repairs_back():
    model, batches = network()
    rc.correct_bias_(model)
    corrections = {name: layer.bias_correction for name, layer in nbsmt_layers(model, "test").items()}
    plan = plan_throttling(model, iter(batches), 0)
    assert plan.threads
    for name, layer in nbsmt_layers(model, "test").items():
        assert layer.bias_correction is corrections[name]
    with pytest.warns(RecoupWarning, match=r"throttle_: undid bias \(6 layers\)"):
        throttle_(model, batches, 0)
    for name, layer in nbsmt_layers(model, "test").items():
        assert layer.bias_correction is None
        assert layer.config.threads == plan.threads.get(name, 4)


def test_the_steps_of_a_number_are_those_that_leave_the_least_harm():
    model, _ = network(NBSMT(4), {"block1.conv2": NBSMT(2), "block1.shortcut": NBSMT(1)})
    layers = {name: layer for name, layer in nbsmt_layers(model, "test").items() if name.startswith("block1")}
    harm = {"block1.conv1": {4: 9.0, 2: 8.0}, "block1.conv2": {2: 3.0}, "block1.shortcut": {}}
    # The first step of block1.conv1 removes 1, both together 9: with two steps they are better than one of each layer.
    assert _of_least_harm(harm, layers, 1) == [("block1.conv2", 1)]
    assert _of_least_harm(harm, layers, 2) == [("block1.conv1", 2), ("block1.conv1", 1)]
    assert _of_least_harm(harm, layers, 3) == [("block1.conv2", 1), ("block1.conv1", 2), ("block1.conv1", 1)]
    assert _of_least_harm(harm, layers, 0) == []


@pytest.mark.parametrize("at", [3, 12, 40])
def test_an_interrupt_leaves_everything_as_it_was(at):
    model, batches = network()
    rc.correct_bias_(model)
    before = {n: (x.config, x.bias_correction, x.mode) for n, x in nbsmt_layers(model, "test").items()}
    calls = itertools.count()

    def stop(module, args, output):
        if next(calls) == at:
            raise KeyboardInterrupt

    handle = model.block2.conv2.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        throttle_(model, batches, 0)
    handle.remove()
    for name, layer in nbsmt_layers(model, "test").items():
        assert (layer.config, layer.bias_correction, layer.mode) == before[name]


@pytest.mark.parametrize("budget", [-0.1, float("nan"), float("inf"), "1", True])
def test_bad_budgets_are_refused(budget):
    model, batches = network()
    with pytest.raises(RecoupError, match=r"throttle_\(budget=.*0 or more"):
        throttle_(model, batches, budget)


def test_bad_requests_are_refused():
    model, batches = network()
    with pytest.raises(RecoupError, match="throttle_: the model has no NB-SMT layer"):
        throttle_(small_net(), batches, 1)
    with pytest.raises(RecoupError, match="there was no batch"):
        throttle_(model, [], 1)
    with pytest.raises(RecoupError, match="no labels"):
        throttle_(model, [images(3)], 1)


def test_data_that_change_between_readings_are_noticed():
    model, batches = network()

    class Drifting(list):
        """Every reading but the first has wrong labels."""

        readings = 0

        def __iter__(self):
            self.readings += 1
            return iter([(x, y if self.readings == 1 else (y + 1) % 10) for x, y in batches])

    with pytest.raises(RecoupError, match="differ from reading to reading"):
        throttle_(model, Drifting(batches), 0)


def chain(**config):
    """Four linear layers on two threads, some with an accumulator; labels are those of 8-bit arithmetic."""
    torch.manual_seed(0)
    layers = {name: torch.nn.Linear(16, 16, bias=False) for name in ("first", "a", "b", "last")}
    model = torch.nn.Sequential(collections.OrderedDict(layers)).eval()
    with torch.no_grad():
        model.b.weight.copy_(torch.eye(16))
        model.first.weight.copy_(torch.eye(16))
        model.a.weight.copy_(torch.randn(16, 16))
    x = torch.rand(200, 16)
    rc.calibrate_(model, [x])
    rc.emulate_(model, None, config)
    with running(model, "baseline"):
        return model, [(x, model(x).argmax(1))]


def test_a_plan_that_misses_its_budget_is_never_returned():
    """Under an accumulator one thread is not 8-bit arithmetic; a layer that does no harm alone takes no step."""
    model, data = chain(a=NBSMT(2, accumulator=rc.Int(14)), b=NBSMT(2, accumulator=rc.Int(16)))
    with pytest.raises(RecoupError, match=r"one thread in every layer top-1 is .* the accumulators cost more"):
        plan_throttling(model, data, 1.0)
    with pytest.raises(RecoupError, match="the accumulators cost more"):
        throttle_(model, data, 1.0)
    assert threads(model) == {"a": 2, "b": 2}


def test_plans_that_need_all_their_steps_are_measured():
    model, data = chain(a=NBSMT(2, "S", "zero", accumulator=rc.Int(20)), b=NBSMT(2))
    plan = plan_throttling(model, data, 0.0)
    assert plan.threads == {"a": 1}
    assert plan.before.top1 < 100
    assert plan.after.top1 == plan.baseline.top1 == 100
    throttle_(model, data, 0.0)
    assert rc.evaluate(model, data) == plan.after


def test_the_harm_of_one_thread_is_measured_under_an_accumulator():
    model, data = chain(a=NBSMT(2, accumulator=rc.Int(14)), b=NBSMT(2))
    found = _harm(model, nbsmt_layers(model, "test"), data, False)
    assert set(found["a"]) == {2, 1}
    assert found["a"][1] > 0
    assert set(found["b"]) == {2}
