"""Gradients are float32's wherever ``backward`` is called."""

import pytest
import torch
from torch import nn

import recoup as rc

CONFIGS = [
    rc.NBSMT(1),
    rc.NBSMT(2),
    rc.LBA(),
    rc.LBA.m10e5(),
    rc.LBA(gradient="recursive_of"),
    rc.TensorCore.hopper_fp8(),
    rc.TensorCore.hopper_fp8().replace(backward="float32"),
    rc.TensorCore.blackwell_mxfp8(),
    rc.LightNorm(),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_backward_inside_autocast_gives_the_same_gradients(config):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(128, 64))
    if isinstance(config, rc.LightNorm):  # alone: torch's own products take part in autocast
        net = nn.Sequential(nn.BatchNorm2d(32), nn.Flatten(), nn.LayerNorm(512))
    x = torch.randn(4, 32, 4, 4)
    if isinstance(config, rc.NBSMT):
        rc.calibrate_(net, [x], {"re:.*": True})
    rc.emulate_(net, config)
    found = []
    for inside in (False, True):
        own = x.clone().requires_grad_()
        net.zero_grad()
        loss = net(own).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            loss.backward()
        found.append([own.grad, *(parameter.grad.clone() for parameter in net.parameters())])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("config", [rc.NBSMT(), rc.LBA(), rc.TensorCore.hopper_fp8(), rc.LightNorm()], ids=str)
def test_backward_on_the_meta_device_which_has_no_autocast(config):
    net = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32))
    if isinstance(config, rc.NBSMT):
        rc.calibrate_(net, [torch.randn(4, 32)], {"0": True})
    rc.emulate_(net, config).to("meta")
    net(torch.randn(4, 32, device="meta")).sum().backward()
    assert [p.grad.shape for p in net.parameters()] == [p.shape for p in net.parameters()]
