"""Model strings."""

import doctest
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import recoup.models
from recoup.errors import RecoupError
from recoup.models.loading import FACTORIES

MODULE = """
from torch import nn
import torch

class Net(nn.Module):
    def __init__(self, num_classes=4, width=2):
        super().__init__()
        self.linear = nn.Linear(width, num_classes)

def build(): return Net()
def nothing(): return None
def explode(): raise KeyError("the factory's own")
ready = Net()
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets_for_test").mkdir()
    (tmp_path / "nets_for_test" / "__init__.py").write_text(MODULE)
    (tmp_path / "nets_for_test" / "broken.py").write_text("raise OSError('no such driver')")
    (tmp_path / "nets_for_test" / "needs.py").write_text("import a_library_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_names_and_the_package_agree() -> None:
    assert sorted([*FACTORIES, "load", "load_chargpt", "load_weights_"]) == sorted(recoup.models.__all__)
    assert all(getattr(recoup.models, name) is factory for name, factory in FACTORIES.items())


def test_plain_names_and_options() -> None:
    model = recoup.models.load("resnet20", num_classes=7, norm="group", width=8)
    assert model.linear.weight.shape == (7, 32)  # type: ignore[union-attr]
    assert isinstance(model.bn1, nn.GroupNorm)
    assert model.training
    assert type(recoup.models.load("recoup.models:digits_net")) is type(recoup.models.digits_net())


def test_your_own(package: Path) -> None:
    assert recoup.models.load("nets_for_test:Net", num_classes=3, width=5).linear.weight.shape == (3, 5)  # type: ignore[union-attr]
    torch.save(recoup.models.load("nets_for_test:build").state_dict(), package / "w.pt")
    model = recoup.models.load("nets_for_test:Net", package / "w.pt")
    assert torch.equal(model.state_dict()["linear.bias"], torch.load(package / "w.pt")["linear.bias"])


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("resnet21", {}, "recoup.models has no factory 'resnet21'; it has resnet[0-9]+, .*resnet20, .*mobilenet_v1"),
        ("alexnet", {}, "has no factory 'alexnet'; it has .*digits_net, resnet18, resnet20"),
        ("load", {}, "has no factory 'load'"),
        ("nets_nobody_has.models:net", {}, "there is no module nets_nobody_has on Python's path"),
        ("nets_nobody_has.py:net", {}, "a module is named without .py: nets_nobody_has:net"),
        ("nets_for_test.models:net", {}, "there is no module nets_for_test.models"),
        ("nets_for_test.broken:net", {}, "importing nets_for_test.broken failed: OSError: no such driver"),
        ("nets_for_test.needs:net", {}, "importing nets_for_test.needs failed: No module named 'a_library_nobody_has'"),
        ("nets_for_test:ned", {}, "nets_for_test has no factory 'ned'; it has Net, build"),
        ("nets_for_test:zzz", {}, "nets_for_test has no factory 'zzz'; it has Net, build, nothing, explode$"),
        ("torch.nn:Lineer", {}, "torch.nn has no factory 'Lineer'; it has Linear, .* and [0-9]+ more$"),
        ("nets_for_test:__name__", {}, "has no factory '__name__'"),
        ("nets_for_test:nothing", {}, "the factory returned None, not an nn.Module"),
        ("os:getcwd", {}, "the factory returned a str, not an nn.Module"),
        ("nets_for_test:ready", {}, "a model already built"),
        (
            "nets_for_test:build",
            {"num_classes": 3},
            r"unexpected keyword argument 'num_classes'; the factory takes \(\)",
        ),
        ("torch.nn:Linear", {}, "missing a required argument: 'in_features'; the factory takes"),
        ("resnet20", {"depth": 3}, "unexpected keyword argument 'depth'"),
        ("resnet20", {"num_classes": 0}, r"resnet20\(num_classes=0\): num_classes must be an integer of 1 or more"),
        ("a b:c", {}, "a model is a name such as resnet20 or package.module:factory"),
        ("x:", {}, "a model is a name"),
        (":x", {}, "a model is a name"),
        ("os:path.join", {}, "a model is a name"),
    ],
)
@pytest.mark.usefixtures("package")
def test_refuses(spec: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecoupError, match=message):
        recoup.models.load(spec, **options)


@pytest.mark.usefixtures("package")
def test_what_the_factory_raises_passes_through() -> None:
    with pytest.raises(KeyError, match="the factory's own"):
        recoup.models.load("nets_for_test:explode")


@pytest.mark.parametrize("name", ["cifar", "digits", "imagenet", "loading", "mobilenet", "vgg", "weights"])
def test_docstring_examples(name: str) -> None:
    options = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
    failed, attempted = doctest.testmod(importlib.import_module(f"recoup.models.{name}"), optionflags=options)
    assert attempted
    assert not failed
