"""Which geometries oneDNN's 8-bit convolution may do, and that every way gives the same bits on odd ones."""

import pytest
import torch
from torch import nn

import recoup as rc
from recoup.nbsmt import ops, trust
from recoup.nbsmt.cpu import Backend, Int8Convolution, probe
from recoup.nbsmt.wing import self_test
from tests.fresh import Fresh
from tests.nbsmt import odd_geometries


@pytest.mark.parametrize(
    ("weight", "stride", "padding", "dilation", "sound"),
    [
        ((8, 4, 3, 3), (1, 1), (1, 1), (1, 1), True),
        ((8, 4, 3, 3), (1, 2), (2, 2), (1, 1), True),
        ((8, 4, 3, 3), (1, 1), (3, 0), (1, 1), False),
        ((8, 4, 3, 3), (1, 1), (4, 4), (2, 2), True),
        ((8, 4, 3, 3), (1, 1), (0, 5), (2, 2), False),
        ((8, 4, 1, 1), (2, 2), (0, 0), (1, 1), True),
        ((8, 4, 1, 1), (2, 2), (0, 1), (1, 1), False),
        ((16, 1, 3, 5), (1, 2), (1, 1), (1, 1), False),
        ((8, 1, 1, 2), (1, 4), (0, 1), (1, 1), False),
        ((16, 1, 3, 3), (2, 2), (1, 1), (1, 1), True),
        ((16, 1, 3, 3), (2, 1), (1, 1), (1, 1), True),
        ((16, 2, 3, 3), (1, 2), (1, 1), (1, 1), True),
    ],
)
def test_geometries_that_are_sound(weight, stride, padding, dilation, sound):
    assert trust.sound(torch.Size(weight), stride, padding, dilation) is sound


@pytest.mark.parametrize(("width", "stride", "sound"), [
    (6, (1, 2), False), (7, (1, 2), True), (7, (1, 3), False), (6, (2, 2), True), (5, (1, 1), True),
])  # fmt: skip
def test_a_horizontal_stride_alone_needs_two_columns_of_outputs(width, stride, sound):
    """oneDNN with AMX gives [2, 2, 1, 3] of dilation 2, stride (1, 2), two groups on width 6 wrong."""
    assert trust.sound(torch.Size((2, 2, 1, 3)), stride, (0, 0), (1, 2), width) is sound


def test_a_dilation_has_no_meaning_along_one_tap():
    assert trust.plain_dilation((1, 3), (2, 4)) == (1, 4)
    assert trust.plain_dilation((2, 1), (3, 5)) == (3, 1)


@pytest.mark.slow
def test_odd_geometries_give_the_same_bits_on_every_path_and_no_crash():
    done = Fresh(odd_geometries.draw, 300).wait()
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr[-3000:]}"
    trusted, drawn = (int(word) for word in done.stdout.split()[::3])
    assert 0 < trusted < drawn


class _Wrong(Int8Convolution):
    """An 8-bit kernel that errs in its last output."""

    def __call__(self, operand):
        y = super().__call__(operand)
        y[-1, -1, -1, -1] += 1
        return y


def test_a_kernel_that_errs_is_found_named_once_and_replaced(monkeypatch):
    torch.manual_seed(0)
    x = torch.rand(3, 4, 6, 6)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1))
    rc.calibrate_(model, [x], {"0": True})
    rc.emulate_(model, rc.NBSMT(threads=2))
    with ops.backend("float32"):
        expected = model(x)
    monkeypatch.setattr(trust, "_right", {})
    monkeypatch.setattr(trust, "Int8Convolution", _Wrong)
    monkeypatch.setattr(ops, "current_backend", lambda: "int8")
    with pytest.warns(
        rc.RecoupWarning, match=r"layer '0'.*wrong for weight \[8, 8, 3, 3\].*input \[3, 8, 6, 6\]"
    ) as said:
        found = model(x)
    assert len(said) == 1
    assert trust.distrusted() == 1
    assert torch.equal(found, expected)
    assert torch.equal(model(x), expected)  # and warns no more: warnings are errors


@pytest.mark.skipif(probe().name != "int8", reason=f"the int8 path is not exact here: {probe().reason}")
def test_the_check_finds_nothing_on_an_ordinary_layer(monkeypatch):
    monkeypatch.setattr(trust, "_right", {})
    weight = torch.randint(-128, 128, (16, 8, 3, 3), dtype=torch.int8)
    assert trust.packed(weight, (1, 1), (1, 1), (1, 1), 1, (4, 8, 9, 9), "layer") is not None
    assert trust.distrusted() == 0


def test_the_doctor_is_told_what_is_distrusted(monkeypatch):
    """Geometries that the process met before count too, but are none of the common ones."""
    monkeypatch.setattr(trust, "_right", {"an odd one": False})
    monkeypatch.setattr("recoup.nbsmt.cpu.probe", lambda: Backend("int8", "AMX", "as if"))
    with monkeypatch.context() as changed:
        changed.setattr(trust, "Int8Convolution", _Wrong)
        told = self_test()
    assert "right on 0 of 12 common geometries, float32 does 3x3; 3x3, stride 2" in told
    assert told.endswith("; 13 distrusted in this process")
    monkeypatch.setattr(trust, "_right", {})
    assert sorted(trust.survey().values()) == [False] * trust.distrusted() + [True] * (12 - trust.distrusted())


@pytest.mark.skipif(probe().name != "int8", reason=f"the int8 path is not exact here: {probe().reason}")
def test_common_geometries_are_right(monkeypatch):
    monkeypatch.setattr(trust, "_right", {})
    assert all(trust.survey().values())
    assert "right on 12 of 12 common geometries; 0 distrusted" in self_test()
