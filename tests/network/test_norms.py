import pytest
import torch
from torch import nn

from recoup.network.norms import Statistics, has_norms, shift, tracking_norms


def network():
    return nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False))


def test_statistics_come_back_whole():
    model = network()
    before = Statistics.of(model)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    storage = norm.running_mean.data_ptr()
    norm(torch.randn(4, 3, 2, 2))
    assert not torch.equal(model.state_dict()["1.running_mean"], kept["1.running_mean"])
    before.put(model)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert norm.running_mean.data_ptr() == storage


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_a_change_that_fails_is_undone(failure):
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def change():
        model(torch.randn(4, 1, 2, 2))
        assert not torch.equal(model.state_dict()["1.running_mean"], before["1.running_mean"])
        raise failure

    with pytest.raises(failure), Statistics.all_or_none(model):
        change()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with Statistics.all_or_none(model) as kept:
        model(torch.randn(4, 1, 2, 2))
    assert model.state_dict()["1.num_batches_tracked"] == 1
    assert kept.buffers["1"]["num_batches_tracked"] == 0


def test_only_norms_with_running_statistics_count():
    assert has_norms(network())
    assert not has_norms(nn.Sequential(nn.Conv2d(1, 1, 1), nn.GroupNorm(1, 1)))
    assert list(Statistics.of(network()).buffers) == list(tracking_norms(network())) == ["1"]


def test_shift_by_hand():
    before = Statistics({"bn": {"running_mean": torch.tensor([1.0, 0.0]), "running_var": torch.tensor([4.0, 1.0])}})
    after = Statistics({"bn": {"running_mean": torch.tensor([2.0, 3.0]), "running_var": torch.tensor([1.0, 1.0])}})
    mean, variance = shift(before, after)["bn"]
    assert mean == pytest.approx((1 / 2 + 3) / 2)
    assert variance == pytest.approx(0.5)  # the geometric mean of 1/4 and 1


def test_dead_channels_are_left_out():
    dead = {"running_mean": torch.zeros(1), "running_var": torch.zeros(1)}
    assert shift(Statistics({"bn": dead}), Statistics({"bn": dead})) == {}
