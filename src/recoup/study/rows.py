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
