"""A search's recipe: everything that decides its numbers, as a YAML file.

::

    model: resnet20
    weights: resnet20-12fca82f.th
    data: cifar10:../shared/data/cifar10
    space:
      re:layer.*conv.*: [NBSMT(threads=1), nbsmt-2t, nbsmt-4t]
      linear: [float, lba-m7e4]
    cost: cycles
    limits: {cycles: 0.5}
    out: results/search-resnet20

Paths are relative to the folder the search is started from.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from recoup.search.spaces import Space
from recoup.study.recipe import AnyRecipe, Array, Calibration, Chip, Count, Scalar, Seed, Strict, Test, Text, listed


class Scoring(Strict):
    """The images that options are scored on: ``images`` of them (null: 1,000, or all there are where those are fewer),
    drawn with ``seed`` from ``split``, none of them a test image; null: from what ``test.limit`` leaves of the test's
    split, where that is enough, else from ``train``. A network loses less on images that it was trained on, so what is
    predicted from them is too little for others."""

    images: Count | None = None
    seed: Seed = 0
    batch_size: Count = 250
    split: Text | None = None


class TunedPoint(Strict):
    """A policy and the weights that ``recoup train --policy`` wrote for it: a point to measure beside the front, after
    a plan of `recoup.repair_`."""

    policy: Chip
    weights: Text
    repair: Text = "none"


class SearchRecipe(AnyRecipe):
    """What to search; see the module's docstring for its YAML.

    Attributes:
        model, weights, model_options, data, context: as in `recoup.study.recipe.Recipe`; of a ``text:FILE`` what counts
            images counts windows.
        space, same, at_most: as in `recoup.search.spaces.Space`; "float" or null is a layer in float.
        scoring: which images options are scored on.
        calibration: which images decide scales and repairs. The first seed scores, each seed is a draw when the front
            is measured. Where the number is open, 256, or all there are where those are fewer.
        test: which images the front is measured on; where nothing is said 1,000, or all there are.
        repair: a plan of `recoup.repair_`.
        metric: what damage is.
        reference: whether options are scored with everything else on its first option, not in float.
        probes: whole networks measured for the error bar.
        cost: what is to be small; one, or several of which each is swept.
        limits: cost -> the most it may be, relative to the first option everywhere, or with a unit.
        budget: points of top-1 (or nats) that may be lost; decides which point the verdict names. Null: half a point,
            or 0.01 nats of a text.
        points: of the front, a cost.
        refine: networks that may be measured by `recoup.search.refine`, which walks from the point within the budget,
            or from the least harmful, to cheaper ones: for where predictions rank poorly.
        tuned: fine-tuned points that join the front.
        array: rows and columns for cycles and areas.
        liberty: a cell library's file, or several that are read together: for energies, and areas in um2.
        out: the folder for records, tables and the report.
    """

    called = "search recipe"

    model: Text
    weights: Text | None = None
    model_options: dict[Text, Scalar] = Field(default_factory=dict)
    data: Text
    context: Count | None = None
    space: dict[Text, list[Text | None]] = Field(min_length=1)
    same: tuple[tuple[Text, ...], ...] = ()
    at_most: dict[Text, Count] = Field(default_factory=dict)
    scoring: Scoring = Scoring()
    calibration: Calibration = Calibration()
    test: Test = Test(limit=1000)
    repair: Text = "default"
    metric: Literal["kl", "mse", "nats", "top1"] = "kl"
    reference: bool = False
    probes: Annotated[int, Field(ge=0, strict=True)] = 8
    cost: Annotated[tuple[Text, ...], BeforeValidator(listed), Field(min_length=1)] = ("cycles",)
    limits: dict[Text, float | str] = Field(default_factory=dict)
    budget: Annotated[float, Field(ge=0)] | None = None
    points: Annotated[int, Field(ge=2, strict=True)] = 12
    refine: Annotated[int, Field(ge=0, strict=True)] = 0
    tuned: Annotated[tuple[TunedPoint, ...], BeforeValidator(listed)] = ()
    array: Array = Array()
    liberty: Annotated[tuple[Text, ...], BeforeValidator(listed)] = ()
    out: Text = "recoup-search"

    @model_validator(mode="after")
    def _sensible(self) -> "SearchRecipe":
        self.space_of()
        return self

    @property
    def may_lose(self) -> float:
        """The budget, said or not."""
        if self.budget is not None:
            return self.budget
        return 0.01 if self.data.startswith("text:") else 0.5

    def space_of(self) -> Space:
        """The space."""
        return Space(self.space, self.same, self.at_most)
