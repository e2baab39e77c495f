"""Which images a study tests on and which it calibrates with: all that does not fit is found before a measurement."""

import pytest
import torch
from PIL import Image

from recoup.data import load
from recoup.errors import RecoupError
from recoup.models import mobilenet_v1
from recoup.study import Recipe, run
from recoup.study.lab import Lab
from recoup.study.machine import cpu_threads
from tests.study.examples import small_recipe


@pytest.fixture(autouse=True)
def _one_thread():
    with cpu_threads(1):
        yield


def two_classes():
    return mobilenet_v1(num_classes=2)


@pytest.fixture(params=["val", "test"])
def folder(request, tmp_path):
    """Twelve pictures of two classes, of which no split is called train."""
    for index in range(12):
        place = tmp_path / "pictures" / request.param / ("a" if index % 2 else "b")
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (36, 36), (index * 20, 100, 255 - index * 20)).save(place / f"{index}.png")
    return tmp_path / "pictures", request.param


def recipe(tmp_path, folder, calibration, test):
    data = f"imagefolder:{folder},resize=34,crop=32"
    changes = {"model": f"{__name__}:two_classes", "data": data, "states": ["bias correction"], "profile_images": 0}
    seeds = {"seeds": [3], "images": 4, "augment": False}
    return small_recipe(
        tmp_path / "new", **changes, calibration=seeds | calibration, test={"batch_size": 4, "seed": 1} | test
    )


@pytest.mark.parametrize(
    ("calibration", "test", "told"),
    [
        ({}, {}, "no split 'train'; there is {split}; they may be drawn from the split that is tested on"),
        ({"split": "test"}, {}, "all images of this split are tested on; with test.limit"),
        ({"split": "test"}, {"limit": 12}, "none is left"),
        ({"split": "test", "images": 5}, {"limit": 8}, "subset of 5 images: it must be an integer from 1 to 4"),
        ({"split": "test"}, {"limit": 13}, "test images .*limit of 13 images: it must be an integer from 1 to 12"),
        ({}, {"split": "train"}, "test images .*no split 'train'; there is {split}"),
        ({"split": "test"}, {"limit": 8, "seed": None}, "test images .*--test-seed.*sorted by class"),
    ],
)
def test_what_does_not_fit_is_found_first(tmp_path, monkeypatch, folder, calibration, test, told):
    monkeypatch.setattr(Lab, "accuracy", None)
    path, split = folder
    with pytest.raises(RecoupError, match=told.format(split=split)) as error:
        run(recipe(tmp_path, path, calibration, test), progress=False)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_a_split_is_divided_into_tested_images_and_others(tmp_path, folder):
    path, split = folder
    lab = Lab(recipe(tmp_path, path, {"split": split}, {"limit": 8}))
    taken = [set(map(str, _files(data))) for data in (lab.test, lab.drawing.images(0), lab.drawing.images(1))]
    assert [len(files) for files in taken] == [8, 4, 4]
    assert not taken[0] & (taken[1] | taken[2])
    made = run(recipe(tmp_path, path, {"split": split}, {"limit": 8}), progress=False)
    assert made.test_images == 8


def test_a_recipe_that_leaves_the_number_of_calibration_images_open_takes_what_there_is(tmp_path, folder):
    """A newcomer's few pictures, fewer than the 1,024 that are customary; what was found is what the folder says."""
    path, split = folder
    whole = recipe(tmp_path, path, {"split": split, "images": None}, {"limit": 8})
    made = run(whole, progress=False)
    assert made.calibration_images == Recipe.load(tmp_path / "new" / "recipe.yaml").calibration.images == 4
    assert run(whole, progress=False).to_dict()["accuracy"] == made.to_dict()["accuracy"]  # the same folder


def test_where_there_are_enough_it_takes_1024(tmp_path):
    lab = Lab(Recipe(model="digits_net", data="digits", configs=["LBA()"], out=str(tmp_path)))
    assert lab.recipe.calibration.images == 1024
    drawn = load("digits", "train", limit=1024, seed=0)
    assert torch.equal(lab.drawing.images(0).labels, drawn.labels)


def _files(data):
    return [data.images.encoded.name(int(place)) for place in data.images.indices]
