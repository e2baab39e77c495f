"""Silicon beside a study's accuracy: area and energy of each config's hardware and of its counterparts."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from recoup.errors import RecoupError
from recoup.network.wing import BARE
from recoup.study.beside import Beside
from recoup.study.configs import title
from recoup.study.hardware import Hardware, Quoted
from recoup.study.quality import TOP1, Quality
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
        parts: by kind of part, in the same unit, from a mapping of their own; their sum is a little more. May be empty.
    """

    config: str
    kind: str
    counterpart: bool
    module: str
    nand2: Annotated[float, Field(gt=0)]
    work: Annotated[float, Field(gt=0)]
    parts: Mapping[str, Annotated[float, Field(ge=0)]] = {}

    @property
    def per_operation(self) -> float:
        """NAND2-equivalents that one operation a cycle takes."""
        return self.nand2 / self.work


class Placed(AreaRow):
    """An area beside what a study says of its config.

    Attributes:
        title: the hardware's in the study.
        state, reached: its top-1 in percent, or its nats, and after which repair; a counterpart has its baseline's.
    """

    title: str
    state: str
    reached: float | None


class EnergyRow(Frozen):
    """The energy of a config's module, or of a counterpart, on the operands of a study's network.

    Attributes:
        config: the hardware's name, a config's repr or a policy's: chips of one unit differ in the layers that it runs.
        kind, counterpart, module: as in `AreaRow`.
        image, gated: uJ of all emulated layers an image; the second with clocks that run only when they are needed.
        operation: fJ an operation.
        layers: how many layers these are.
    """

    config: str
    kind: str
    counterpart: bool
    module: str
    image: Annotated[float, Field(gt=0)]
    gated: Annotated[float, Field(gt=0)]
    operation: Annotated[float, Field(gt=0)]
    layers: Annotated[int, Field(ge=1)]


class Energies(Frozen):
    """Energies of a study's hardware by its names; ``left``: what has none, and why; how they were measured.

    Attributes:
        rows, left, missing: as in `SiliconResults`.
        images: test images whose operands were captured.
        lanes: outputs drawn of every layer.
        lower_bound: whether without glitches.
        tool, liberty: what measured them.
    """

    rows: tuple[EnergyRow, ...]
    left: Mapping[str, str]
    missing: Mapping[str, Mapping[str, str]] = {}
    images: Annotated[int, Field(ge=1)]
    lanes: Annotated[int, Field(ge=64)]
    lower_bound: bool
    tool: str = ""
    liberty: tuple[tuple[str, str], ...] = ()


class PlacedEnergy(EnergyRow):
    """An energy beside what a study says of its config, as `Placed`."""

    title: str
    state: str
    reached: float | None


class Joined(Frozen):
    """The areas and energies that a study's hardware has.

    Attributes:
        rows, left, tool, liberty: the areas; what has none, by title, and why; what measured them.
        spent, unspent: the energies; what has none, by title, and why. Counterparts that have none are among them.
        energies: how they were measured; None: they were not.
        quality: what the study's networks are judged by.
    """

    rows: tuple[Placed, ...]
    left: Mapping[str, str]
    tool: str
    liberty: tuple[tuple[str, str], ...]
    spent: tuple[PlacedEnergy, ...] = ()
    unspent: Mapping[str, str] = {}
    energies: Energies | None = None
    quality: Quality = TOP1


class SiliconResults(Beside):
    """silicon.json: areas of configs by their names; ``left``: what has none, and why; ``missing``: by config the
    counterparts that have none beside one that has, by title, and why; what measured them; energies.

    Areas and energies are measured by commands of their own; neither replaces the other's.
    """

    file: ClassVar[str] = "silicon.json"
    what: ClassVar[str] = "the areas and energies of a study"
    again: ClassVar[str] = "; `recoup silicon area --study FOLDER` measures them anew"
    name: ClassVar[str] = "silicon"
    chapter: ClassVar[str] = "recoup.report.chapters.silicon"

    schema_version: Literal[2] = SCHEMA
    rows: tuple[AreaRow, ...]
    left: Mapping[str, str]
    missing: Mapping[str, Mapping[str, str]] = {}
    tool: str
    liberty: tuple[tuple[str, str], ...] = ()
    energies: Energies | None = None

    def joined(self, results: Results | None, quoted: Quoted | None = None) -> Joined:
        """With the accuracy and titles of the study as it is now; without a study by the configs' names.

        Args:
            results: the study.
            quoted: the state and top-1 that its report ends on for a hardware, or with True for its baseline.
        """
        placed: list[Placed] = []
        spent: list[PlacedEnergy] = []
        left: dict[str, str] = {}
        unspent: dict[str, str] = {}
        energies = self.energies
        if results is None or quoted is None:
            placed = [Placed(**row.model_dump(), title=row.config, state=BARE, reached=None) for row in self.rows]
            if energies is not None:
                bare = {"state": BARE, "reached": None}
                spent = [PlacedEnergy(**row.model_dump(), title=row.config, **bare) for row in energies.rows]
            left, unspent = _left_out(self), _left_out(energies) if energies else {}
        else:
            for one in results.present:
                unit = repr(one.configs[0]) if len(one.configs) == 1 else ""
                found = _beside(one, [row for row in self.rows if row.config == unit], quoted)
                placed += [Placed(**values) for values in found]
                left |= _beside_which(one.title, self.missing.get(unit, {}))
                if not found:
                    left[one.title] = _reason(one, self.left.get(unit), "area")
                if energies is not None:
                    found = _beside(one, [row for row in energies.rows if row.config == one.name], quoted)
                    spent += [PlacedEnergy(**values) for values in found]
                    unspent |= _beside_which(one.title, energies.missing.get(one.name, {}))
                    if not found:
                        unspent[one.title] = _reason(one, energies.left.get(one.name), "energy")
        return Joined(
            rows=tuple(placed), left=left, tool=self.tool, liberty=self.liberty,
            spent=tuple(spent), unspent=unspent, energies=energies,
            quality=TOP1 if results is None else results.quality,
        )  # fmt: skip


def _beside(one: Hardware, rows: list[Any], quoted: Quoted) -> list[dict[str, Any]]:
    """The rows of a hardware, each with the accuracy that stands beside it."""
    found = []
    for row in rows:
        state, reached = quoted(one, row.counterpart)
        found.append({**row.model_dump(), "title": one.title, "state": state, "reached": reached})
    return found


def _left_out(measured: SiliconResults | Energies) -> dict[str, str]:
    """What has no figure, by the configs' names, counterparts too."""
    found = dict(measured.left)
    for config, counterparts in measured.missing.items():
        found |= _beside_which(config, counterparts)
    return found


def _beside_which(title: str, counterparts: Mapping[str, str]) -> dict[str, str]:
    """Counterparts that have no figure, as they are listed, and why."""
    return {f"{module} beside {title}": reason for module, reason in counterparts.items()}


def _reason(one: Hardware, known: str | None, action: str) -> str:
    """Why a hardware has no area or energy."""
    if len(one.configs) != 1:
        return SEVERAL if one.configs else "none of its layers is emulated"
    return known or f"{SiliconResults.file} does not have it; `recoup silicon {action} --study` measures it"


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
    parts: bool = True,
) -> SiliconResults:
    """Measure every config of a study that has hardware; one that has none, or no tools, is listed with the reason, and
    so is a counterpart that cannot be measured.

    Args:
        results: the study.
        build: the hardware of a config.
        liberty: as `recoup.silicon.Measured.area` takes it.
        baselines: whether the conventional counterparts are measured too.
        told: called with what is measured next.
        parts: whether their parts are measured too, by a second mapping.
    """
    rows: list[AreaRow] = []
    left: dict[str, str] = {}
    missing: dict[str, dict[str, str]] = {}
    tool, library = "", ()
    for name, unit in units(results).items():
        told(title(unit))
        try:
            own = build(unit)
            size = own.area(liberty, parts=parts)
        except RecoupError as error:
            left[name] = str(error)
            continue
        tool, library = size.tool, size.liberty
        rows.append(_area_row(name, unit, own, size))
        failed: dict[str, str] = {}
        for other in counterparts_of(own, failed) if baselines else ():
            try:
                rows.append(_area_row(name, unit, other, other.area(liberty, parts=parts), counterpart=True))
            except RecoupError as error:
                failed[other.title] = str(error)
        if failed:
            missing[name] = failed
    return SiliconResults(rows=tuple(rows), left=left, missing=missing, tool=tool, liberty=library)


def counterparts_of(own: Any, failed: dict[str, str]) -> list[Any]:
    """The counterparts of a module; where they cannot be made, none, and ``failed`` says why."""
    try:
        return list(own.counterparts().values())
    except RecoupError as error:
        failed["what is conventional"] = str(error)
        return []


def _area_row(name: str, unit: Any, module: Any, size: Any, *, counterpart: bool = False) -> AreaRow:
    return AreaRow(
        config=name,
        kind=type(unit).__name__,
        counterpart=counterpart,
        module=module.title,
        nand2=size.nand2,
        work=module.work,
        parts={part: area / size.area * size.nand2 for part, area in size.parts.items()},
    )
