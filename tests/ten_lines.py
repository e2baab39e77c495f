"""The wing of `test_wing_of_ten_lines.py`, for whatever test takes it: the text of its module, and its config class."""

import importlib
import sys

import pytest

MODULE = """
from dataclasses import dataclass

import torch
from torch import nn

import recoup as rc


@dataclass(frozen=True)
class Trunc:
    bits: int = 4


class TruncLinear(rc.wings.Emulated, nn.Linear):
    def forward(self, x):
        if self.mode == "float":
            return super().forward(x)
        step = 2.0**-self.config.bits
        return nn.functional.linear(x, torch.trunc(self.weight / step) * step, self.bias)


rc.wings.register(rc.wings.Card(config=Trunc, layers={nn.Linear: TruncLinear}))
"""


@pytest.fixture
def trunc(tmp_path, monkeypatch):
    """The config class, registered; forgotten afterwards."""
    (tmp_path / "stranger.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("stranger")
    yield module.Trunc
    from recoup import wings

    wings.forget(module.Trunc)
    del sys.modules["stranger"]
