"""The samples of a study: those that are tested on, and those that scales and repairs are computed from."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch

from recoup.data.places import HELD_OUT, NoSplitError, TooFewError
from recoup.errors import RecoupError
from recoup.study.recipe import Recipe
from recoup.study.sources import Samples, Source

MOST = 1024
"""How many calibration images a recipe means that does not say, where there are as many."""


@contextmanager
def told_as(what: str) -> Iterator[None]:
    """Errors begin with what they are about."""
    try:
        yield
    except RecoupError as error:
        raise RecoupError(f"{what}: {error}") from None


class Drawing:
    """Draws samples, none for both uses.

    Args:
        recipe: says which.
        source: of its data.

    Attributes:
        recipe: the same with the number of calibration images, where it was left open.

    Raises:
        RecoupError: as `images`, where the number was left open.
    """

    def __init__(self, recipe: Recipe, source: Source) -> None:
        self.source, self.recipe = source, recipe
        self._kept: tuple[int, Samples] | None = None
        if recipe.calibration.images is None:
            seed = recipe.calibration.seeds[0]
            with self._told():
                try:
                    found = self._taken(MOST, seed)
                except TooFewError as error:
                    if not error.available:
                        raise
                    found = self._taken(error.available, seed)
            self.recipe, self._kept = with_images(recipe, len(found)), (seed, found)

    @property
    def named(self) -> str:
        """What samples are called."""
        return self.source.quality.samples

    @cached_property
    def test(self) -> Samples:
        """The test images, or windows."""
        test = self.recipe.test
        with told_as(f"test {self.named} (test.limit, .seed, .split; --limit, --test-seed, --test-split)"):
            return self.source.load(test.split, test.limit, test.seed)

    def images(self, seed: int, count: int | None = None) -> Samples:
        """The calibration images of a seed, or the first ``count`` of them; none of them is a test image.

        Raises:
            RecoupError: more than there are; a split that is not there, or all of whose images are tested on.
        """
        most = self.recipe.calibration.images
        assert most is not None
        limit = min(count or most, most)
        if self._kept is not None and self._kept[0] == seed:  # of one seed fewer are the first of more
            return self._kept[1].take(torch.arange(limit))
        with self._told():
            return self._taken(limit, seed)

    def kept(self, seed: int) -> Samples:
        """The calibration images of a seed, kept until another is asked for: reading a data set takes time."""
        if self._kept is None or self._kept[0] != seed:
            self._kept = (seed, self.images(seed))
        return self._kept[1]

    def augmented(self, images: Samples) -> bool:
        """Whether calibration images are augmented: as the recipe says, else where the data set knows how."""
        wanted = self.recipe.calibration.augment
        return images.augmentation is not None if wanted is None else wanted

    def batches(self, seed: int, count: int | None = None) -> Any:
        """The calibration images of a seed, or the first ``count`` of them, in batches."""
        images = self.kept(seed) if count is None else self.images(seed, count)
        return images.batches(self.recipe.calibration.batch_size, augment=self.augmented(images), seed=seed)

    def _told(self) -> Any:
        where = "(calibration.images, .split; --calibration-images, --calibration-split)"
        return told_as(f"calibration {self.named} {where}")

    def _taken(self, count: int, seed: int) -> Samples:
        if self._unseen is not None:
            return self._unseen.subset(count, seed)
        try:
            return self.source.load(self.recipe.calibration.split, count, seed)
        except NoSplitError as error:
            raise RecoupError(
                f"{error}; they may be drawn from the split that is tested on, of which test.limit (--limit) "
                "leaves a part"
            ) from None

    @cached_property
    def _unseen(self) -> Samples | None:
        """What the test leaves of its own split, if calibration images are drawn from that; else None."""
        data, split, test = self.recipe.data, self.recipe.calibration.split, self.recipe.test
        if split not in (test.split, *HELD_OUT):
            return None
        if split != test.split and self.source.load(split, 1, 0).split != self.test.split:
            return None
        if test.limit is None:
            raise RecoupError(
                f"{data}, {split}: all {self.named} of this split are tested on; with test.limit (--limit) they are "
                "drawn from the rest"
            )
        return self.source.rest(split, test.limit, test.seed)


def with_images(recipe: Recipe, count: int | None) -> Recipe:
    """A recipe with that many calibration images where it leaves the number open."""
    if recipe.calibration.images is not None:
        return recipe
    calibration = recipe.calibration.model_copy(update={"images": count})
    return recipe.model_copy(update={"calibration": calibration})
