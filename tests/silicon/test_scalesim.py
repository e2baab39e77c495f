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
