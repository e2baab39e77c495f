"""Silicon beside a study's accuracy: how large each config's hardware is, and its conventional counterparts."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from recoup.errors import RecoupError
from recoup.network.wing import BARE
from recoup.study.beside import Beside
from recoup.study.configs import title
from recoup.study.hardware import Hardware, Quoted
from recoup.study.results import Results
from recoup.study.rows import Frozen

SCHEMA = 2
SEVERAL = "a chip of several units, which are measured one by one: as configs of the study, or by `recoup silicon area`"


class AreaRow(Frozen):
    """The area of a config's module, or of a counterpart that stands beside it.

    Attributes:
        config: the config's name, its repr; a counterpart has that of the config it stands beside.
        kind: the config class; areas of different kinds are of different units and are not compared.
        counterpart: whether it is conventional hardware.
        module: what was measured.
        nand2: in two-input NANDs.
        work: operations a cycle.
    """

    config: str
    kind: str
    counterpart: bool
    module: str
    nand2: Annotated[float, Field(gt=0)]
    work: Annotated[float, Field(gt=0)]

    @property
    def per_operation(self) -> float:
        """NAND2-equivalents that one operation a cycle takes."""
        return self.nand2 / self.work


class Placed(AreaRow):
    """An area beside what a study says of its config.

    Attributes:
        title: the hardware's in the study.
        state, top1: its accuracy, percent, and after which repair; a counterpart has its baseline's.
    """

    title: str
    state: str
    top1: float | None


class Joined(Frozen):
    """The areas that a study's hardware has: ``left``: what has none, by title, and why; what measured them."""

    rows: tuple[Placed, ...]
    left: Mapping[str, str]
    tool: str
    liberty: tuple[tuple[str, str], ...]


class SiliconResults(Beside):
    """silicon.json: areas of configs by their names; ``left``: what has none, and why; what measured them."""

    file: ClassVar[str] = "silicon.json"
    what: ClassVar[str] = "the areas of a study"
    again: ClassVar[str] = "; `recoup silicon area --study FOLDER` measures them anew"
    name: ClassVar[str] = "silicon"
    chapter: ClassVar[str] = "recoup.report.chapters.silicon"

    schema_version: Literal[2] = SCHEMA
    rows: tuple[AreaRow, ...]
    left: Mapping[str, str]
    tool: str
    liberty: tuple[tuple[str, str], ...] = ()

    def joined(self, results: Results | None, quoted: Quoted | None = None) -> Joined:
        """With the accuracy and titles of the study as it is now; without a study areas by the configs' names.

        Args:
            results: the study.
            quoted: the state and top-1 that its report ends on for a hardware, or with True for its baseline.
        """
        if results is None or quoted is None:
            alone = [Placed(**row.model_dump(), title=row.config, state=BARE, top1=None) for row in self.rows]
            return Joined(rows=tuple(alone), left=self.left, tool=self.tool, liberty=self.liberty)
        rows: list[Placed] = []
        left: dict[str, str] = {}
        for one in results.present:
            own = [row for row in self.rows if [row.config] == list(map(repr, one.configs))]
            for row in own:
                state, top1 = quoted(one, row.counterpart)
                rows.append(Placed(**row.model_dump(), title=one.title, state=state, top1=top1))
            if not own:
                left[one.title] = self._reason(one)
        return Joined(rows=tuple(rows), left=left, tool=self.tool, liberty=self.liberty)

    def _reason(self, one: Hardware) -> str:
        """Why a hardware has no area."""
        if len(one.configs) != 1:
            return SEVERAL if one.configs else "none of its layers is emulated"
        return self.left.get(
            repr(one.configs[0]), f"{self.file} does not have it; `recoup silicon area --study` measures it"
        )


RESULTS = SiliconResults


def units(results: Results) -> dict[str, Any]:
    """What `areas` measures: the configs, by name, of all hardware of a study whose layers run on one unit alone."""
    return {repr(one.configs[0]): one.configs[0] for one in results.present if len(one.configs) == 1}


def areas(
    results: Results,
    build: Callable[[Any], Any],
    liberty: Any = None,
    baselines: bool = True,
    told: Callable[[str], object] = len,
) -> SiliconResults:
    """Measure every config of a study that has hardware; one that has none, or no tools, is listed with the reason.

    Args:
        results: the study.
        build: the hardware of a config.
        liberty: as `recoup.silicon.Measured.area` takes it.
        baselines: whether the conventional counterparts are measured too.
        told: called with what is measured next.
    """
    rows: list[AreaRow] = []
    left: dict[str, str] = {}
    tool, library = "", ()
    for name, unit in units(results).items():
        told(title(unit))
        try:
            own = build(unit)
            modules = [own, *(own.counterparts().values() if baselines else ())]
            sizes = [module.area(liberty) for module in modules]
        except RecoupError as error:
            left[name] = str(error)
            continue
        tool, library = sizes[0].tool, sizes[0].liberty
        for module, size in zip(modules, sizes, strict=True):
            rows.append(
                AreaRow(
                    config=name,
                    kind=type(unit).__name__,
                    counterpart=module is not own,
                    module=module.title,
                    nand2=size.nand2,
                    work=module.work,
                )
            )
    return SiliconResults(rows=tuple(rows), left=left, tool=tool, liberty=library)
