"""Digests: the values of folders that exist, and that whatever differs gives another."""

import hashlib

import pytest
import torch
from torch import nn

from recoup.storage.digest import of_batches, of_file, of_model, of_state, of_tensors


class Net(nn.Module):
    """A parameter with a signed zero, statistics, and a buffer that no state_dict holds."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(2, 3), nn.BatchNorm1d(3)
        self.register_buffer("gain", torch.arange(3, dtype=torch.bfloat16), persistent=False)
        with torch.no_grad():
            self.linear.weight.copy_(torch.arange(6).reshape(3, 2))
            self.linear.bias.fill_(-0.0)


def batches():
    return [
        (torch.arange(4.0).reshape(2, 2), torch.tensor([0, 1])),
        {"x": torch.ones(1, dtype=torch.uint8), "n": 3},
    ]


def test_digests_are_those_of_the_folders_that_exist():
    assert of_model(Net()) == "e2cbdbc74bad9df4"
    assert of_state(Net()) == "2f9d314bad0aae4f6d1f2e4419c2a767fd0f6e049624e71c861ab37dcacac448"
    assert of_batches(batches()) == "e2d4e2bb4864a34c"


def zero(net):
    with torch.no_grad():
        net.linear.bias.abs_()  # a zero's sign


def step(net):
    net.norm.num_batches_tracked.add_(1)


def rename(net):
    net.other, net.linear = net.linear, nn.Identity()


@pytest.mark.parametrize("change", [zero, step, rename])
def test_every_change_of_a_network_is_seen(change):
    net = Net()
    change(net)
    assert of_model(net) != of_model(Net())
    assert of_state(net) != of_state(Net())


def test_a_buffer_outside_the_state_is_part_of_the_model():
    net = Net()
    net.gain.add_(1)
    assert of_model(net) != of_model(Net())
    assert of_state(net) == of_state(Net())


def test_the_form_of_a_state_is_seen():
    net = Net()
    net.linear.weight = nn.Parameter(net.linear.weight.detach().reshape(2, 3))
    assert of_state(net) != of_state(Net())


def test_layout_and_gradients_are_not_part_of_a_model():
    net = Net()
    net.linear.weight = nn.Parameter(net.linear.weight.detach().t().contiguous().t(), requires_grad=False)
    assert not net.linear.weight.is_contiguous()
    assert of_model(net) == of_model(Net())
    assert of_state(net) == of_state(Net())


def test_every_change_of_batches_is_seen():
    x, y = batches()[0]
    others = [
        [(x, y)],
        [(x, y), (x, y)],
        [(y, x)],
        [[x], [y]],
        [(x.double(), y)],
        [(x.reshape(4), y)],
        [{"x": x, "y": y}],
        [{"y": x, "x": y}],
        [(x, y.tolist())],
    ]
    digests = [of_batches(other) for other in others]
    assert len(set(digests)) == len(others)
    assert of_batches(iter(batches())) == of_batches(batches())


def test_a_file(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"\x00" * (1 << 20) + b"end")
    assert of_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(FileNotFoundError):
        of_file(tmp_path / "none")


def test_tensors_that_are_asked_often():
    x, y = torch.arange(6.0), torch.zeros(3)
    assert of_tensors(x, None, y) == of_tensors(x.clone(), y.clone())
    others = [(y, x), (x,), (x, y + 1), (x, -y), (x, y, y)]
    assert len({of_tensors(*tensors) for tensors in [(x, y), *others]}) == len(others) + 1
    assert of_tensors(torch.arange(6.0).reshape(2, 3).t()) == of_tensors(torch.tensor([0.0, 3, 1, 4, 2, 5]))
    assert of_tensors() == of_tensors(torch.empty(0))
