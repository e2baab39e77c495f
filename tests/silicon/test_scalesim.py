"""SCALE-Sim's files as its own examples have them."""

import pytest
import torch
from torch import nn

from recoup.errors import RecoupError
from recoup.silicon.scalesim import read_array, topology

CFG = """[general]
run_name = scale_example_run_32x32_os

[architecture_presets]
ArrayHeight:    32
ArrayWidth:     16
IfmapSramSzkB:    64
Dataflow : os
"""


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.Conv2d(8, 8, 3, groups=2, padding="same"),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def test_convolutions_with_their_padding_and_a_row_a_group():
    lines = topology(network(), torch.zeros(1, 3, 8, 8)).splitlines()
    assert lines == [
        "Layer name, IFMAP Height, IFMAP Width, Filter Height, Filter Width, Channels, Num Filter, Strides,",
        "0, 10, 10, 3, 3, 3, 8, 2,",
        "1_0, 6, 6, 3, 3, 4, 4, 1,",
        "1_1, 6, 6, 3, 3, 4, 4, 1,",
        "3, 1, 1, 1, 1, 128, 10, 1,",
    ]


class Tokens(nn.Module):
    """Four patches of an image, each a row of the linear layer; ``fold``: as images of their own before."""

    def __init__(self, fold=False):
        super().__init__()
        self.conv, self.linear, self.fold = nn.Conv2d(1, 6, 2, stride=2), nn.Linear(6, 5), fold

    def forward(self, x):
        if self.fold:
            x = x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(0, 3)[:, None]
        return self.linear(self.conv(x).flatten(2).transpose(1, 2))


def test_rows_of_one_file_are_of_one_image():
    for model, size in ((network(), (3, 8, 8)), (Tokens(), (1, 4, 4))):
        assert topology(model, torch.zeros(8, *size)) == topology(model, torch.zeros(1, *size))
    assert "linear, 4, 1, 1, 1, 6, 5, 1," in topology(Tokens(), torch.zeros(3, 1, 4, 4))


def test_layers_that_see_another_batch_are_refused():
    with pytest.raises(RecoupError, match=r"'conv' sees 8 images .*of a batch of 2.*kind='gemm'"):
        topology(Tokens(fold=True), torch.zeros(2, 1, 4, 4))
    mean = nn.Sequential(nn.Flatten(0), nn.Linear(32, 2))
    with pytest.raises(RecoupError, match=r"'1' sees 1 rows .*of a batch of 2"):
        topology(mean, torch.zeros(2, 16))
    assert "1, 1, 2, 32," in topology(mean, torch.zeros(2, 16), "gemm")


def test_matrix_products_count_every_multiplication():
    lines = topology(network(), torch.zeros(2, 3, 8, 8), "gemm").splitlines()
    assert lines == ["Layer, M, N, K,", "0, 32, 8, 27,", "1_0, 32, 4, 36,", "1_1, 32, 4, 36,", "3, 2, 10, 128,"]


def test_what_the_format_cannot_say_is_refused():
    with pytest.raises(RecoupError, match=r"'0': stride \(1, 2\).*kind='gemm'"):
        topology(nn.Sequential(nn.Conv2d(1, 1, 1, stride=(1, 2))), torch.zeros(1, 1, 4, 4))
    with pytest.raises(RecoupError, match="ran no Conv1d"):
        topology(nn.ReLU(), torch.zeros(1, 3))
    with pytest.raises(RecoupError, match="kind must be one of"):
        topology(network(), torch.zeros(1, 3, 8, 8), "mnk")


def test_the_array_of_a_configuration_file(tmp_path):
    path = tmp_path / "scale.cfg"
    path.write_text(CFG)
    assert read_array(path) == (32, 16)
    path.write_text(CFG.replace("ArrayWidth", "Width"))
    with pytest.raises(RecoupError, match="no ArrayHeight and ArrayWidth"):
        read_array(path)
    with pytest.raises(RecoupError, match="cannot be read"):
        read_array(tmp_path / "absent.cfg")
