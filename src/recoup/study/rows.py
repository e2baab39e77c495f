"""What every row of a study's tables is made of: frozen records of plain, finite values."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Percent = Annotated[float, Field(ge=0, le=100)]
Rate = Annotated[float, Field(ge=0, le=1)]
Whole = Annotated[int, Field(ge=0)]


class Frozen(BaseModel):
    """Frozen, finite numbers only, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Row(Frozen):
    """A row of a wing's own table: of one config, named by its repr."""

    config: str


class CostRow(Frozen):
    """What a network costs for one image on the recipe's array: ``config`` is ``float`` or as in accuracy's rows.

    The fields are the totals of `recoup.costs.Cost`; ``traffic`` is in bytes, ``bits`` the mean width of accumulators.
    """

    config: str
    cycles: Whole
    traffic: Annotated[float, Field(ge=0)]
    bits: Annotated[float, Field(ge=0)]
    macs: Whole


class PricedRow(CostRow):
    """The same with a cell library: picojoules and um2, null where nothing has any. A note says what is not in them."""

    energy: Annotated[float, Field(ge=0)] | None
    area: Annotated[float, Field(ge=0)] | None


class NatsRow(Frozen):
    """Nats a token of a language model: of ``config`` in ``state``, calibrated with ``seed``, as in accuracy's rows.

    Mean cross-entropy of the following token over ``count`` test tokens, less is better; ``perplexity`` is its
    exponential; ``low`` and ``high`` are a 95 % interval over the test windows.
    """

    config: str
    state: str
    seed: int | None
    nats: Annotated[float, Field(ge=0)]
    perplexity: Annotated[float, Field(ge=1)]
    low: Annotated[float, Field(ge=0)]
    high: Annotated[float, Field(ge=0)]
    count: Annotated[int, Field(ge=1)]
    seconds: Annotated[float, Field(ge=0)]


class DifferenceRow(Frozen):
    """What a state loses against another on the same windows, window by window: more nats are worse.

    ``against``, ``against_state``: the other's config and state; ``low`` and ``high``: a 95 % interval over windows.
    """

    config: str
    state: str
    seed: int | None
    against: str
    against_state: str
    nats: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half the interval."""
        return (self.high - self.low) / 2


class FlipsRow(Frozen):
    """The images that a state answers otherwise than another: ``lost`` were right there, ``won`` wrong.

    ``against``, ``against_state``: the other's config and state; ``count``: test images. ``low`` and ``high``: a 95 %
    interval of what is lost, 100 (lost - won) / count points, over test images, paired image by image.
    """

    config: str
    state: str
    seed: int | None
    against: str
    against_state: str
    lost: Whole
    won: Whole
    count: Annotated[int, Field(ge=1)]
    low: float
    high: float


class TextRow(Frozen):
    """The text of a language model's study, and what a window of it is.

    ``unit``: what a token is, ``character`` or ``token``; ``vocabulary``: how many the network tells apart; ``train``
    and ``test``: the windows there are; ``unknown``: the share of test tokens that the tokenizer does not know.
    """

    file: str
    unit: str
    context: Annotated[int, Field(ge=1)]
    vocabulary: Whole
    train: Whole
    test: Whole
    unknown: Rate = 0.0

    @property
    def sentence(self) -> str:
        """What was predicted from what."""
        return (
            f"A window is {self.context:,} {self.unit}s; windows follow each other without overlap. Every {self.unit} "
            f"is predicted from those before it in its window alone. The first nine tenths of {self.file} are for "
            "calibration and repair, the last tenth is the test."
        )
