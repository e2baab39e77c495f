"""Every network: parameter counts as published, names as in the public checkpoints, gradients for every parameter."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recoup import models
from recoup.errors import RecoupError
from recoup.models.cifar import Shortcut

# Trainable parameters, keys of the state dict. CIFAR: He et al. 2015, table 6; ImageNet: torchvision's model table.
SIZES = {
    "resnet20": (269_722, 116),
    "resnet32": (464_154, 188),
    "resnet44": (658_586, 260),
    "resnet56": (853_018, 332),
    "resnet110": (1_727_962, 656),
    "resnet18": (11_689_512, 122),
    "resnet34": (21_797_672, 218),
    "resnet50": (25_557_032, 320),
    "vgg11": (9_228_362, 50),
    "vgg13": (9_413_066, 62),
    "vgg16": (14_724_042, 80),
    "mobilenet_v1": (3_217_226, 164),
    "digits_net": (33_338, 26),
}
SMALL: list[tuple[str, dict[str, Any], int, int]] = [
    *((f"resnet{n}", {"norm": norm, "width": 8}, 3, 32) for n in (20, 32, 44, 56, 110) for norm in ("batch", "group")),
    *((name, {}, 3, 64) for name in ("resnet18", "resnet34", "resnet50")),
    *((name, {"norm": norm}, 3, 32) for name in ("vgg11", "vgg13", "vgg16") for norm in ("batch", "group", "none")),
    *(("mobilenet_v1", {"norm": norm, "width": 0.25}, 3, 32) for norm in ("batch", "group", "none")),
    *(("digits_net", {"norm": norm}, 1, 8) for norm in ("batch", "group", "none")),
]


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str) -> None:
    model = models.load(name)
    assert (sum(p.numel() for p in model.parameters()), len(model.state_dict())) == SIZES[name]


@pytest.mark.parametrize(("name", "options", "channels", "side"), SMALL)
def test_shapes_and_gradients(name: str, options: dict[str, Any], channels: int, side: int) -> None:
    model = models.load(name, num_classes=5, **options)
    out = model(torch.randn(4, channels, side, side))
    assert out.shape == (4, 5)
    F.cross_entropy(out, torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    kinds = {"batch": nn.BatchNorm2d, "group": nn.GroupNorm, "none": ()}[options.get("norm", "batch")]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)]
    assert all(isinstance(m, kinds) for m in norms)
    assert bool(norms) == (options.get("norm") != "none")
    if not norms:  # nothing else would centre the activations
        assert all(m.bias is not None for m in model.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("name", SIZES)
def test_other_channels(name: str) -> None:
    side = 8 if name == "digits_net" else 32
    assert models.load(name, in_channels=2)(torch.randn(2, 2, side, side)).shape[0] == 2


def test_names_of_the_cifar_checkpoints() -> None:
    names = list(models.resnet20().state_dict())
    assert names[:3] == ["conv1.weight", "bn1.weight", "bn1.bias"]
    assert "layer2.0.conv1.weight" in names
    assert names[-2:] == ["linear.weight", "linear.bias"]
    assert not [name for name in names if "shortcut" in name]


def test_names_of_the_imagenet_checkpoints() -> None:
    names = models.resnet18().state_dict()
    assert {"conv1.weight", "layer1.0.conv1.weight", "layer2.0.downsample.0.weight", "fc.weight"} <= names.keys()
    assert names["layer2.0.downsample.1.running_mean"].shape == (128,)
    assert "layer1.0.downsample.0.weight" not in names
    deep = models.resnet50()
    assert deep.state_dict()["layer1.0.downsample.0.weight"].shape == (256, 64, 1, 1)
    assert deep.get_submodule("layer2.0.conv1").stride == (1, 1)  # v1.5: the 3 x 3 convolution strides
    assert deep.get_submodule("layer2.0.conv2").stride == (2, 2)


def test_option_a_shortcut() -> None:
    x = torch.randn(2, 16, 8, 8)
    out = Shortcut(16, 32, 2)(x)
    assert out.shape == (2, 32, 4, 4)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_initialization_keeps_the_variance() -> None:
    torch.manual_seed(0)
    for module in models.mobilenet_v1().modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            # 288 weights at least: the deviation is known to 5 %, four of its own deviations are 20 %.
            assert module.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.2)


def test_digits_net_channels_split_into_threads() -> None:
    convolutions = [m for m in models.digits_net().modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [16, 32, 32, 64]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet20", {"norm": "none"}, r'resnet20\(norm="none"\): a residual network here needs'),
        ("resnet20", {"norm": "layer"}, 'norm must be "batch", "group" or "none"'),
        ("resnet20", {"norm": "group", "width": 12}, "12 channels cannot be split into 8 groups"),
        ("resnet20", {"width": 0}, r"resnet20\(width=0\): width must be an integer of 1 or more"),
        ("resnet110", {"in_channels": -1}, r"resnet110\(in_channels=-1\)"),
        ("resnet50", {"num_classes": True}, r"resnet50\(num_classes=True\)"),
        ("vgg16", {"num_classes": 1.5}, r"vgg16\(num_classes=1.5\)"),
        ("mobilenet_v1", {"width": 0}, r"mobilenet_v1\(width=0\): width must be above 0 and at most 4"),
        ("mobilenet_v1", {"width": 5}, "above 0 and at most 4"),
        ("digits_net", {"norm": "batch2"}, "norm must be"),
    ],
)
def test_refuses(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecoupError, match=message):
        models.load(name, **options)


def test_digits_net_learns_the_digits() -> None:
    import recoup.data

    torch.manual_seed(0)
    train, test = recoup.data.load("digits", "train"), recoup.data.load("digits")
    model, epochs = models.digits_net(), 8
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=epochs * (len(train) // 64))
    for epoch in range(epochs):
        for x, y in train.batches(64, shuffle=True, seed=epoch, drop_last=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in test.batches(596))
    assert hits / 596 > 0.97  # 98.3 % to 99.5 % were measured over eight seeds
