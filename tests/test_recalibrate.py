"""Recalibration against statistics computed by hand in float64, and everything as before when it fails."""

import copy

import pytest
import torch
from torch import nn

import recoup as rc
from recoup.network.emulated import running
from recoup.network.norms import tracking_norms
from tests.networks import images, small_net

NAMES = ["block1.bn1", "block1.bn2", "block2.bn1", "block2.bn2"]


def statistics(model):
    return {
        name: (module.running_mean.clone(), module.running_var.clone())
        for name, module in tracking_norms(model).items()
    }


def batch_moments(model, batches, mode="emulate"):
    """Mean over the batches of each batch norm's input mean, and the variance of the pooled population, unbiased."""
    seen = {name: [] for name in NAMES}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].double())
        )
        for name in NAMES
    ]
    model = model.eval()
    for name in NAMES:
        model.get_submodule(name).train()
    kept = copy.deepcopy(model.state_dict())
    with torch.no_grad(), running(model, mode):
        for batch in batches:
            model(batch)
    model.load_state_dict(kept)
    model.eval()
    for hook in hooks:
        hook.remove()
    out = {}
    for name, inputs in seen.items():
        pooled = torch.cat(inputs).transpose(0, 1).flatten(1)
        out[name] = (pooled.mean(1), pooled.var(1, unbiased=True))
    return out


def emulated(threads=4):
    model = small_net()
    rc.calibrate_(model, [images(64)])
    return rc.emulate_(model, rc.NBSMT(threads=threads))


# The batch norm kernel computes each batch's statistics in float32, the check in float64.
def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)


def test_average_is_the_population_of_all_batches():
    model = emulated()
    batches = [images(16, seed=s) for s in range(3)]
    expected = batch_moments(model, batches)
    rc.recalibrate_(model, batches, "average")
    for name, (mean, variance) in statistics(model).items():
        close(mean.double(), expected[name][0])
        close(variance.double(), expected[name][1])


def test_average_over_one_batch_is_torch_with_momentum_one():
    model, twin = emulated(), emulated()
    x = images(24, seed=7)
    rc.recalibrate_(model, [x], "average")
    for name in NAMES:
        norm = twin.get_submodule(name)
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        twin(x)
    for name, (mean, variance) in statistics(model).items():
        assert torch.equal(mean, twin.get_submodule(name).running_mean)
        torch.testing.assert_close(variance, twin.get_submodule(name).running_var, rtol=2e-7, atol=0)  # one rounding


def test_ema_is_torch_in_train_mode():
    model, twin = emulated(), emulated()
    batches = [images(16, seed=s) for s in range(3)]
    rc.recalibrate_(model, batches, "ema")
    for name in NAMES:
        twin.get_submodule(name).train()
    with torch.no_grad():
        for batch in batches:
            twin(batch)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


def test_paired_moves_the_stored_statistics_by_the_difference():
    model = emulated()
    batches = [images(16, seed=s) for s in range(2)]
    stored = statistics(model)
    off, on = batch_moments(model, batches, "baseline"), batch_moments(model, batches)
    rc.recalibrate_(model, iter(batches))  # paired is the default; one pass over the data is enough
    for name, (mean, variance) in statistics(model).items():
        moved = stored[name][0].double() + on[name][0] - off[name][0]
        close(mean.double(), moved)
        close(variance.double(), stored[name][1].double() * on[name][1] / off[name][1])


def test_paired_without_harm_moves_nothing():
    model = emulated(threads=1)
    before = statistics(model)
    rc.recalibrate_(model, [images(16)])
    for name, pair in statistics(model).items():
        assert all(torch.equal(a, b) for a, b in zip(pair, before[name], strict=True))


def test_paired_with_a_dead_channel_keeps_its_variance():
    model = small_net()
    with torch.no_grad():
        model.block1.conv1.weight[3] = 0
    rc.calibrate_(model, [images(32)])
    rc.emulate_(model, rc.NBSMT(threads=4))
    before = statistics(model)["block1.bn1"]
    rc.recalibrate_(model, [images(32)])
    after = statistics(model)["block1.bn1"]
    assert after[1][3] == before[1][3]
    assert all(bool(torch.isfinite(t).all()) for t in after)


def test_paired_with_a_channel_that_the_hardware_makes_constant_keeps_its_variance():
    """One of 0 would divide whatever else comes by the root of eps alone."""
    baseline = small_net()
    changed = copy.deepcopy(baseline)
    with torch.no_grad():
        changed.block1.conv1.weight[3] = 0
    before, batch = statistics(baseline)["block1.bn1"], batch_moments(baseline, [images(32)])["block1.bn1"]
    assert batch[1][3] > 0
    rc.recalibrate_(changed, [images(32)], "paired", baseline=baseline)
    mean, variance = statistics(changed)["block1.bn1"]
    assert variance[3] == before[1][3]
    close(mean[3].double(), before[0][3] - batch[0][3])


def test_paired_with_an_explicit_baseline_serves_any_model():
    baseline = small_net()
    changed = copy.deepcopy(baseline)
    with torch.no_grad():
        changed.block1.conv1.weight.mul_(1.5)
    before, batch = statistics(baseline), batch_moments(baseline, [images(32)])["block1.bn1"]
    rc.recalibrate_(changed, [images(32)], "paired", baseline=baseline)
    mean, variance = statistics(changed)["block1.bn1"]
    close(mean.double(), before["block1.bn1"][0] + 0.5 * batch[0])
    torch.testing.assert_close(variance, 2.25 * before["block1.bn1"][1], rtol=1e-5, atol=0)
    assert all(torch.equal(a, b) for k in before for a, b in zip(before[k], statistics(baseline)[k], strict=True))


@pytest.mark.parametrize("method", ["paired", "average", "ema"])
def test_modes_momenta_and_counters_stay(method):
    model = emulated()
    model.block2.bn1.momentum = None
    model.train()
    counters = [model.get_submodule(name).num_batches_tracked.clone() for name in NAMES]
    rc.recalibrate_(model, [images(16)], method)
    assert model.training
    assert model.block1.dropout.training
    assert [model.get_submodule(name).momentum for name in NAMES] == [0.1, 0.1, None, 0.1]
    if method != "ema":
        assert [model.get_submodule(name).num_batches_tracked for name in NAMES] == counters


@pytest.mark.parametrize("method", ["paired", "average", "ema"])
@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError("disk")])
def test_an_interrupt_changes_nothing(method, failure):
    model = emulated()
    before = copy.deepcopy(model.state_dict())

    def batches():
        yield images(16)
        raise failure

    with pytest.raises(type(failure) if isinstance(failure, Exception) else failure):
        rc.recalibrate_(model, batches(), method)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert [model.get_submodule(name).momentum for name in NAMES] == [0.1] * 4
    assert not any(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_refusals():
    with pytest.raises(rc.RecoupError, match="no batch norm"):
        rc.recalibrate_(nn.Conv2d(3, 4, 3), [images(4)], "average")
    with pytest.raises(rc.RecoupError, match="no batch norm"):
        rc.recalibrate_(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), [images(4)], "average")
    with pytest.raises(rc.RecoupError, match="emulate_ it first"):
        rc.recalibrate_(small_net(), [images(4)])
    with pytest.raises(rc.RecoupError, match="paired, average, ema"):
        rc.recalibrate_(emulated(), [images(4)], "mean")  # type: ignore[arg-type]
    with pytest.raises(rc.RecoupError, match="no batch"):
        rc.recalibrate_(emulated(), [])
    with pytest.raises(rc.RecoupError, match="baseline belongs"):
        rc.recalibrate_(emulated(), [images(4)], "average", baseline=small_net())
    with pytest.raises(rc.RecoupError, match="only one of model and baseline"):
        rc.recalibrate_(small_net(), [images(4)], baseline=nn.BatchNorm2d(3))


def test_one_value_per_channel_is_too_few():
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4))
    with pytest.raises(rc.RecoupError, match="too small"):
        rc.recalibrate_(net, [images(1)], "average")
