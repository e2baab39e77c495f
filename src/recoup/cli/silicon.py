"""`recoup silicon`: Verilog, proof, area, delay and energy of configs' hardware."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recoup.cli.common import Json, Wing, importable, load_wings
from recoup.cli.silicon_options import chosen_of, values_of
from recoup.cli.silicon_study import ACTIONS as OF_STUDY
from recoup.cli.silicon_study import of_study
from recoup.cli.silicon_tables import table
from recoup.errors import RecoupError
from recoup.storage.folder import make
from recoup.wings import wing_of

if TYPE_CHECKING:
    import numpy as np

    from recoup.silicon import Measured

ACTIONS = {
    "verilog": "write it",
    "verify": "hold it against the emulation",
    "area": "area, and delay with --liberty",
    "energy": "energy on a layer's operands",
    "topology": "SCALE-Sim's CSV of --model",
}

Action = Annotated[str, typer.Argument(help="; ".join(f"{name}: {what}" for name, what in ACTIONS.items()))]
Configs = Annotated[list[str] | None, typer.Argument(help="Presets or reprs.", show_default=False)]
Liberty = Annotated[list[Path] | None, typer.Option(help=".lib or .lib.gz. Repeatable: read together.")]
Array = Annotated[str | None, typer.Option(help="The array, such as 16x16 or SCALE-Sim's .cfg, not one element.")]
Change = Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE of the generator, such as registers=none.")]
Vectors = Annotated[str, typer.Option(help="Of verify: a number, or exhaustive.")]
Seed = Annotated[int, typer.Option(help="Of vectors, and of the outputs drawn for energy.")]
Baselines = Annotated[bool, typer.Option(help="The conventional counterparts beside each.")]
Glitches = Annotated[bool, typer.Option(help="Energy with inertial delay; without: a lower bound.")]
Operands = Annotated[
    list[Path] | None,
    typer.Option(help="Of energy: .npz of a layer's operands, in order; one for all configs, or one for each."),
]
ModelName = Annotated[str | None, typer.Option("--model", help="Of topology: a model, name or module:factory.")]
Shape = Annotated[str, typer.Option(help="Of topology: the shape of one input.")]
Gemm = Annotated[bool, typer.Option("--gemm", help="Of topology: matrix products, no convolutions.")]
Study = Annotated[
    Path | None,
    typer.Option(help="Of area, energy: a study's folder; its configs are measured, and its report has a chapter."),
]
Parts = Annotated[bool, typer.Option(help="Of area --study: a picture of the parts too, by a second mapping.")]
Out = Annotated[Path, typer.Option(help="Of verilog: the folder.")]


def silicon(
    action: Action,
    configs: Configs = None,
    liberty: Liberty = None,
    array: Array = None,
    change: Change = None,
    vectors: Vectors = "65536",
    seed: Seed = 0,
    baselines: Baselines = True,
    glitches: Glitches = True,
    operands: Operands = None,
    model: ModelName = None,
    shape: Shape = "3x32x32",
    gemm: Gemm = False,
    out: Out = Path(),
    study: Study = None,
    parts: Parts = True,
    wing: Wing = None,
    as_json: Json = False,
) -> None:
    """Hardware from configs: Verilog, proof that it equals the emulation, area, delay and energy; or a model's CSV.

    Energy is of NB-SMT alone: no other hardware takes a layer's operands. docs/silicon.md has the Python way.
    """
    load_wings(wing)
    if action not in ACTIONS:
        raise RecoupError(f"silicon {action!r}: the first argument must be one of {', '.join(ACTIONS)}")
    if action == "topology":
        typer.echo(_topology(model, shape, gemm), nl=False)
        return
    if study is not None:
        if action not in OF_STUDY or configs or array or operands:
            raise RecoupError(
                "--study FOLDER: is of silicon area and silicon energy alone, without configs, --array and --operands: "
                "the study has them"
            )
        values = values_of(change or [])
        of_study(action, study, values, liberty, baselines=baselines, glitches=glitches, parts=parts)
        return
    if not configs:
        raise RecoupError(f"silicon {action}: name one or more configs")
    modules = _modules(configs, array, change or [])
    amount = _amount(vectors)
    measures: dict[str, Callable[[Any, Any], dict[str, Any]]] = {
        "verilog": lambda module, _: _verilog(module, out),
        "verify": lambda module, _: module.verify(amount, seed, liberty=liberty).to_dict(),
        "area": lambda module, _: _area(module, liberty),
        "energy": lambda module, layer: module.energy(layer, liberty, glitches=glitches, seed=seed).to_dict(),
    }
    if action == "verilog":
        _prepare(out, modules)
    layers = _given(operands, liberty, len(modules)) if action == "energy" else [()] * len(modules)
    rows: list[dict[str, Any]] = []
    for text, own, layer in zip(configs, modules, layers, strict=True):
        for module in (own, *(_beside(action, own) if baselines else ())):
            typer.echo(f"{text}: {module.title} ...", err=True)
            rows.append({"config": text, **measures[action](module, layer)})
    typer.echo(json.dumps(rows, indent=1) if as_json else table(action, rows))
    if action == "verify" and not all(row["ok"] for row in rows):
        raise typer.Exit(1)


def _modules(configs: Sequence[str], array: str | None, changes: Sequence[str]) -> "list[Measured]":
    """The hardware of every config, with those of the options that its generator has.

    Raises:
        RecoupError: an option that none of the generators has.
    """
    from recoup.grammar import parse_config
    from recoup.silicon.generate import options_of

    values = values_of(changes)
    if array is not None:
        values["array"] = _array(array)
    read = [parse_config(text) for text in configs]
    chosen = chosen_of(values, configs, [options_of(config) for config in read])
    return [_built(text, config, options) for text, config, options in zip(configs, read, chosen, strict=True)]


def _built(text: str, config: Any, options: dict[str, Any]) -> "Measured":
    """A config's hardware; a preset's with its wing's usual options, where it cannot be without and none were given."""
    from recoup.silicon import build
    from recoup.silicon.generate import options_of

    try:
        return build(config, **options)
    except RecoupError as error:
        asked = [name for name in options_of(config) if name not in options and f" {name}=" in str(error)]
        card = wing_of(config, "silicon")
        usual = {name: card.usual[name] for name in asked if name in card.usual and text.strip() in card.presets}
        if usual:
            said = ", ".join(f"{name}={value!r}" for name, value in usual.items())
            typer.echo(f'{text}: the preset leaves it open, so {said} (another with --set "NAME=VALUE")', err=True)
            return build(config, **options, **usual)
        hint = "".join(f' (on the command line --set "{name}=...")' for name in asked)
        raise RecoupError(f"{error}{hint}") from error


def _array(text: str) -> tuple[int, int]:
    from recoup.silicon.scalesim import read_array

    if text.endswith(".cfg"):
        return read_array(Path(text))
    sizes = text.lower().split("x")
    if len(sizes) != 2 or not all(size.isdecimal() and int(size) for size in sizes):
        raise RecoupError(f"--array {text!r}: must be ROWSxCOLUMNS, such as 16x16, or a SCALE-Sim .cfg file")
    return int(sizes[0]), int(sizes[1])


def _amount(text: str) -> Any:
    if text == "exhaustive":
        return text
    if not text.isdecimal() or not int(text):
        raise RecoupError(f"--vectors {text!r}: must be a positive number or exhaustive")
    return int(text)


def _prepare(folder: Path, modules: "Sequence[Measured]") -> None:
    """Make the folder for modules, whose names are their files'.

    Raises:
        RecoupError: two of one name, or a folder that cannot be made.
    """
    twice = [name for name, count in Counter(module.name for module in modules).items() if count > 1]
    if twice:
        raise RecoupError(
            f"silicon verilog: {', '.join(twice)} is the name of several of these modules; write each into a folder of "
            "its own: --out FOLDER"
        )
    make(folder)


def _verilog(module: "Measured", folder: Path) -> dict[str, Any]:
    """The files that are written, and the latency."""
    path = folder / f"{module.name}.v"
    module.verilog(path)
    files = [str(path), str(path.with_suffix(".json"))]
    return {"module": module.title, "files": files, "latency": module.latency}


def _area(module: "Measured", liberty: list[Path] | None) -> dict[str, Any]:
    delay = {"delay": module.delay(liberty).to_dict()} if liberty else {}
    return {**module.area(liberty).to_dict(), **delay, "work": module.work}


def _beside(action: str, module: "Measured") -> "list[Measured]":
    """The counterparts that an action measures too; those that take other operands than the module are named."""
    others = list(module.counterparts().values()) if action in ("area", "energy") else []
    if action == "area":
        return others

    def inputs(one: "Measured") -> list[tuple[str, int, int]]:
        return [(port.name, port.width, port.parts) for port in one.inputs]

    for other in others:
        if inputs(other) != inputs(module):
            typer.echo(f"{other.title} takes other operands and is left out: name it as a config of its own", err=True)
    return [other for other in others if inputs(other) == inputs(module)]


def _given(operands: list[Path] | None, liberty: list[Path] | None, configs: int) -> "list[tuple[np.ndarray, ...]]":
    """A layer's operands for every config.

    Raises:
        RecoupError: no operands, a number of files that is neither one nor that of the configs, or no library.
    """
    if not operands:
        raise RecoupError(
            "silicon energy: --operands FILE.npz with a layer's operands is needed: toggles decide, and only real data "
            "has real ones; numpy.savez(FILE, *recoup.silicon.capture(model, images)[layer]) writes it"
        )
    if len(operands) not in (1, configs):
        raise RecoupError(f"silicon energy: {len(operands)} --operands for {configs} configs: one for all, or one each")
    if not liberty:
        raise RecoupError("silicon energy: --liberty FILE is needed: plain gates have no energy")
    layers = [_arrays(path) for path in operands]
    return layers * configs if len(layers) == 1 else layers


def _arrays(path: Path) -> "tuple[np.ndarray, ...]":
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            return tuple(file[name] for name in file.files)
    except (OSError, ValueError, zipfile.BadZipFile, TypeError, AttributeError) as error:
        raise RecoupError(f"--operands {str(path)!r}: is no .npz file of numpy's: {error}") from error


def _topology(model: str | None, shape: str, gemm: bool) -> str:
    import torch

    from recoup.models import load
    from recoup.silicon.scalesim import topology

    if model is None:
        raise RecoupError("silicon topology: --model NAME is needed")
    sizes = shape.lower().split("x")
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise RecoupError(f"--shape {shape!r}: must be sizes such as 3x32x32")
    with importable():
        network = load(model)
    return topology(network, torch.zeros(1, *map(int, sizes)), "gemm" if gemm else "conv")
