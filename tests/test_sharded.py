"""FSDP2 over two processes: an emulated network takes the steps of one process that averages two halves' gradients."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import recoup as rc
from tests.fresh import Fresh

CONFIGS = {
    "nbsmt": lambda: rc.NBSMT(threads=2),
    "lba": lambda: rc.LBA(gradient="recursive_of"),
    "lightnorm": rc.LightNorm,
    "tensor cores": rc.TensorCore.hopper_fp8,
}
STEPS, RATE = 3, 0.1


def network(config: str) -> tuple[nn.Sequential, torch.Tensor]:
    """An emulated network in training mode, and a batch of 16."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.Flatten()
    ).append(nn.Linear(32, 4))
    x = torch.rand(16, 3, 6, 6)
    if config == "nbsmt":
        rc.calibrate_(model, [x], {"3": True})
    return rc.emulate_(model, CONFIGS[config]()).train(), x


def averaged(config: str) -> tuple[list[list[float]], nn.Module]:
    """The losses of both halves at every step, and the network after them: SGD on the mean of the halves' gradients."""
    model, x = network(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    for _ in range(STEPS):
        halves = [copy.deepcopy(model) for _ in range(2)]
        found = [half(part).square().mean() for half, part in zip(halves, x.chunk(2), strict=True)]
        for loss in found:
            loss.backward()
        losses.append([loss.item() for loss in found])
        for p, one, other in zip(model.parameters(), *(half.parameters() for half in halves), strict=True):
            assert one.grad is not None
            assert other.grad is not None
            p.grad = (one.grad + other.grad) / 2
        optimizer.step()
    return losses, model


def rank(number: int, config: str, store: str) -> None:
    """A process of two: the same steps with ``fully_shard``, equal to the bit."""
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    model, x = network(config)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in model:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses, expected = averaged(config)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(x.chunk(2)[number]).square().mean()
        loss.backward()
        optimizer.step()
        assert loss.item() == losses[step][number], (step, loss.item(), losses)
    for (name, found), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(found.full_tensor(), wanted), name
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_two_processes_take_the_steps_of_one(config, tmp_path):
    started = [Fresh(rank, number, config, str(tmp_path / "store")) for number in range(2)]
    for process in started:
        done = process.wait()
        assert done.returncode == 0, done.stderr[-4000:]
