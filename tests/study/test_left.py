"""Layers that calibration leaves in float are named in a study's notes."""

from recoup.lba import LBA
from recoup.study import Recipe, State
from recoup.study.lab import LEFT, Lab
from tests.study.examples import FOUR, small_recipe


def left_by(recipe: Recipe) -> list[str]:
    """What is said of the layers that four threads leave."""
    lab = Lab(recipe)
    lab.accuracy(FOUR, State.NONE, 3)
    return lab.left(FOUR)


def test_the_first_and_the_last(tmp_path):
    assert left_by(small_recipe(tmp_path)) == [LEFT.format(hardware="NBSMT", names="features.0, classifier", more="")]


def test_those_with_negative_inputs_are_said_to_be_among_them(tmp_path):
    calibration = {"images": 32, "seeds": [3], "negative": "float"}
    (found,) = left_by(small_recipe(tmp_path, calibration=calibration))
    assert "the first and the last layer that multiply, and here those with negative inputs, unless" in found


def test_what_the_layer_map_or_other_hardware_takes_is_not_called_left(tmp_path):
    wanted = {"states": (), "profile_images": 0, "layers": {"features.0": FOUR, "classifier": None}}
    lab = Lab(small_recipe(tmp_path, configs=(FOUR, LBA.m7e4()), **wanted))
    for config in (FOUR, LBA.m7e4()):
        lab.accuracy(config, State.NONE, 3)
        assert lab.left(config) == []
