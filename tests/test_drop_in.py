"""Every emulated layer of every wing takes what its torch layer takes: changes in place, batches of any size and
strides, and storages that others resize."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

import recoup as rc

CONVOLUTIONS = {
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 4, 6, 5)),
    "conv2d without bias": (lambda: nn.Conv2d(4, 6, 3, padding="same", bias=False), (4, 4, 6, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False), (4, 4, 6, 5)),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (4, 4, 6, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, bias=False), (4, 4, 9)),
    "linear": (lambda: nn.Linear(4, 6), (5, 4)),
    "linear of tokens": (lambda: nn.Linear(4, 6, bias=False), (5, 3, 4)),
}
NORMS = {
    "batch norm 1d": (lambda: nn.BatchNorm1d(6), (32, 6)),
    "batch norm of sequences": (lambda: nn.BatchNorm1d(6), (5, 6, 7)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(6), (5, 6, 5, 4)),
    "batch norm of small images": (lambda: nn.BatchNorm2d(6), (9, 6, 2, 2)),
    "batch norm 3d": (lambda: nn.BatchNorm3d(6), (5, 6, 3, 3, 3)),
}
MULTIPLIERS = {
    "nbsmt": rc.NBSMT(threads=2),
    "nbsmt-4t": rc.NBSMT(threads=4),
    "lba": rc.LBA(),
    "lba-fine": rc.LBA(gradient="recursive_of"),
    "lba-fp8": rc.LBA(operands=rc.lba.FP8),
    "lba-backward": rc.LBA(backward=rc.LBA.biased(10, 5)),
}
LIGHT = {"lightnorm": rc.LightNorm(), "range": rc.LightNorm.range(chunks=1)}
CASES = [
    pytest.param(make, shape, config, id=f"{layer}, {name}")
    for layers, configs in ((CONVOLUTIONS, MULTIPLIERS), (NORMS, LIGHT))
    for layer, (make, shape) in layers.items()
    for name, config in configs.items()
]


def emulated(make, shape, config) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(make())
    if isinstance(config, rc.NBSMT):
        rc.calibrate_(model, [torch.rand(shape)], {"0": True})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*grouped convolutions and run one thread", rc.RecoupWarning)
        return rc.emulate_(model, config)


def result(model: nn.Module, x: torch.Tensor, change=None) -> list[torch.Tensor | None]:
    """Output and gradients of input and parameters, for a copy of the model."""
    model, x = copy.deepcopy(model), x.detach().requires_grad_()
    y = model(x)
    y = y if change is None else change(y)
    y.backward(torch.linspace(-1, 1, max(1, y.numel()))[: y.numel()].view(y.shape))
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


def add(y: torch.Tensor) -> torch.Tensor:
    y += 1
    return y


def scale(y: torch.Tensor) -> torch.Tensor:
    y[:1].mul_(2)
    return y


def doubled(y: torch.Tensor) -> torch.Tensor:
    return torch.cat([y[:1] * 2, y[1:]])


CHANGES = {"relu": (nn.ReLU(inplace=True), nn.ReLU()), "add": (add, lambda y: y + 1), "part": (scale, doubled)}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("make", "shape", "config"), CASES)
def test_outputs_may_be_changed_in_place(make, shape, config, train, change):
    model = emulated(make, shape, config).train(train)
    x = torch.rand(shape)
    inplace, plain = CHANGES[change]
    for found, expected in zip(result(model, x, inplace), result(model, x, plain), strict=True):
        assert found is not None
        assert expected is not None
        assert torch.equal(found, expected)
    with torch.no_grad():
        assert torch.equal(inplace(copy.deepcopy(model)(x)), plain(copy.deepcopy(model)(x)))


def variants(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The same kind of input with other strides, and batches of other sizes."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape), torch.contiguous_format)
    twice = torch.rand([2 * size for size in shape])
    return {
        "channels last": torch.rand(shape).contiguous(memory_format=last),
        "every other": twice[tuple(slice(None, None, 2) for _ in shape)],
        "transposed": torch.rand(*shape[:-2], shape[-1], shape[-2]).mT,
        "channels first": torch.rand(shape[1], shape[0], *shape[2:]).transpose(0, 1),
        "one image often": torch.rand(1, *shape[1:]).expand(shape),
        "one channel often": torch.rand(shape[0], 1, *shape[2:]).expand(shape),
        "one pixel often": torch.rand(*shape[:-1], 1).expand(shape),
        "behind others": torch.rand(shape[0] + 3, *shape[1:])[3:],
        "ragged": torch.rand(shape)[:3] if shape[0] < 9 else torch.rand(shape)[:-1],
    }


@pytest.mark.filterwarnings("ignore:.*a channel of constants has:recoup.RecoupWarning")
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("make", "shape", "config"), CASES)
def test_strides_change_no_bit(make, shape, config, train):
    model = emulated(make, shape, config).train(train)
    for name, x in variants(shape).items():
        assert torch.equal(copy.deepcopy(model)(x), copy.deepcopy(model)(x.clone().contiguous())), name
        # torch adds up the gradients of convolutions in an order that the memory format decides
        for ours, wanted in zip(result(model, x)[1:], result(model, x.contiguous())[1:], strict=True):
            torch.testing.assert_close(ours, wanted, msg=name)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("make", "shape", "config"), CASES)
def test_a_batch_of_none_has_the_shape_of_torchs(make, shape, config, train):
    model, plain = emulated(make, shape, config).train(train), make().train(train)
    x = torch.rand(0, *shape[1:], requires_grad=True)
    y = model(x)
    assert y.shape == plain(x).shape
    assert all(map(torch.equal, model.buffers(), plain.buffers()))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(("make", "shape", "config"), CASES)
def test_storages_may_be_resized_after_a_step(make, shape, config):
    """What FSDP does with parameters between forward and backward passes."""
    model, x = emulated(make, shape, config).train(), torch.rand(shape)
    expected = result(model, x)
    x = x.clone().requires_grad_()
    model(x).sum().backward()
    model.zero_grad()
    kept = {name: p.detach().clone() for name, p in [*model.named_parameters(), ("input", x)]}
    for name, p in [*model.named_parameters(), ("input", x)]:
        size = p.untyped_storage().nbytes()
        p.untyped_storage().resize_(0)
        p.untyped_storage().resize_(size)
        p.data.copy_(kept[name])
    for found, wanted in zip(result(model, x), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", [*MULTIPLIERS, *LIGHT])
def test_fully_sharded_training_equals_plain_training(one_process, name):
    from torch.distributed.fsdp import fully_shard

    config = {**MULTIPLIERS, **LIGHT}[name]
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.Flatten()
    )
    plain.append(nn.Linear(32, 4))
    x = torch.rand(16, 3, 6, 6)
    if isinstance(config, rc.NBSMT):
        rc.calibrate_(plain, [x], {"3": True})
    rc.emulate_(plain, config)
    sharded = copy.deepcopy(plain)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for layer in sharded:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    losses = []
    for model in (plain, sharded):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:3] == losses[3:]
