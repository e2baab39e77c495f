"""From a recipe to results: every measurement once, stored as soon as it is made."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from recoup.errors import RecoupError
from recoup.models.weights import file_and_key
from recoup.network.checks import instance, reduced_float32
from recoup.policy import Policy
from recoup.storage.digest import of_file
from recoup.storage.files import keeping
from recoup.storage.folder import reserve
from recoup.study.bench import Bench, Task
from recoup.study.configs import Config
from recoup.study.drawing import with_images
from recoup.study.hardware import Hardware, name_of, references
from recoup.study.lab import Lab
from recoup.study.machine import cpu_threads, describe
from recoup.study.measured import measured_rows, unpaired
from recoup.study.measures import tables
from recoup.study.progress import displayed
from recoup.study.recipe import Recipe
from recoup.study.repairs import FLOAT, NONE, State, default, states
from recoup.study.results import FILE as RESULTS
from recoup.study.results import Results, ShiftRow
from recoup.study.store import Locks, Store
from recoup.tasks.performing import check_division, perform
from recoup.tasks.shards import IncompleteError, Shard

RECIPE = "recipe.yaml"
MEASURED = ("accuracy", "flips", "nats", "differences")
IN_FEWER_BITS = (
    "Float layers may have computed in fewer bits than float32 has: torch was told to take {kinds}. Hardware, and the "
    "baselines of hardware, did not."
)
ON_THREADS = "Measurements were made on {counts} threads of torch, on which the last digits of float layers depend."
HEADER = "# Written by recoup: everything that decides the numbers in this folder.\n"


def made_from_results() -> list[str]:
    """The files that a report writes from results.json."""
    return ["report.html", *(f"{name}.csv" for name in (*MEASURED, "shifts", "costs", *tables()))]


def run(
    recipe: Recipe,
    *,
    overwrite: bool = False,
    progress: bool = True,
    workers: int | None = None,
    executor: Executor | None = None,
    shard: Shard | None = None,
    any_cpu: bool = False,
) -> Results:
    """Measure what a recipe asks for.

    The folder ``recipe.out`` receives recipe.yaml and measurements.json at once, and results.json when all is measured.
    Interrupted at any point, the same call goes on after the last finished measurement; so does one with further
    seeds, configs or states. Whether or not it was interrupted, the numbers are the same.

    With any of ``workers``, ``executor`` and ``shard`` every measurement runs on one thread of torch, or as many as
    ``recipe.cpu_threads`` says, so that its number is the same to the bit however the work is divided.

    Args:
        recipe: what to measure.
        overwrite: discard what another study left in the folder.
        progress: whether to show a progress bar on standard error, if that is a terminal.
        workers: processes on this machine; 1 is this process, and so is None, on torch's threads.
        executor: anything with the ``submit`` of `concurrent.futures.Executor`, instead of ``workers``: every worker
            loads the recipe's model and data itself, from the same folder.
        shard: only this part of the measurements, kept in a file of its own; the others may be made at the same time,
            in the same folder or in one whose files are put there later.
        any_cpu: take measurements of processors with another vector width, whose last bits may differ.

    Raises:
        RecoupError: a model, data or layers that do not fit; a folder with another study's measurements, or with a
            fuller report of this one, or in which another run is at work; files that do not fit: what is measured is
            kept; a worker that was lost or has other data.
        IncompleteError: a shard has made its part, and measurements of others are missing.
        KeyboardInterrupt: with a note that says what is kept.
    """
    instance(recipe, Recipe, "study.run", "recipe", "Recipe(model='resnet20', data='digits')")
    check_division("study.run", 1 if workers is None else workers, executor, shard)
    if shard is not None and overwrite:
        raise RecoupError("study: a shard shares its folder with others, so it does not overwrite it: empty it first")
    divided = workers is not None or executor is not None or shard is not None
    how: dict[str, Any] = {"workers": workers or 1, "executor": executor, "shard": shard}
    with cpu_threads(1 if divided and recipe.cpu_threads is None else recipe.cpu_threads):
        lab = Lab(recipe)
        recipe = lab.recipe
        lab.check()
        tasks, notes = plan(recipe, lab.has_norms, lab.hardware, lab.has_work)
        with Locks(Path(recipe.out), shard):
            store = Store(Path(recipe.out), lab.identity(), overwrite=overwrite, shard=shard, any_cpu=any_cpu)
            _claim(store, recipe, overwrite)
            return _finished(lab, tasks, store, notes, how, progress)


def _finished(
    lab: Lab, tasks: list[Task], store: Store, notes: list[str], how: Mapping[str, Any], progress: bool
) -> Results:
    """All measured, where and as far as ``how`` says, and written."""

    def kept() -> str:
        done = sum(task.key in store for task in tasks)
        return f"{done} of {len(tasks)} measurements are kept in {store.path}; the same command goes on from there"

    try:
        with keeping(kept):
            sent = how["executor"] is not None or how["workers"] > 1
            _measure(Bench(lab, torch.get_num_threads(), sent), tasks, store, progress, how)
            _check_complete(tasks, store)
            results = _results(lab, tasks, store, notes)
            results.save(store.folder)
    except KeyboardInterrupt as interrupt:
        if not getattr(interrupt, "__notes__", None):
            interrupt.add_note(kept())
        raise
    return results


def _check_complete(tasks: Sequence[Task], store: Store) -> None:
    """What other shards have made by now is read."""
    store.read_others()
    missing = [task.label for task in tasks if task.key not in store]
    if missing:
        raise IncompleteError(
            f"study: {len(missing)} of {len(tasks)} measurements are not made yet, the first of them {missing[0]!r}: "
            "run the other shards, or put their files here, then this again without a shard"
        )


def _claim(store: Store, recipe: Recipe, overwrite: bool) -> None:
    """Make sure that the folder holds this study or nothing, and write its recipe there."""
    results = store.folder / RESULTS
    if results.exists() and not overwrite:
        if not len(store):
            raise RecoupError(f"{results} is from another study; choose another folder with --out, or use --overwrite")
        _check_fuller(Results.load(results), recipe, results)

    def stays(text: str) -> bool:
        """Whether a recipe that is there is the user's own file, with their comments."""
        path = store.folder / RECIPE
        if text.startswith(HEADER):
            return False
        if with_images(Recipe.load(path), recipe.calibration.images) == recipe:
            return True
        raise RecoupError(f"{path} is another recipe; choose another folder with --out, or use --overwrite")

    made = (RESULTS, *made_from_results())
    reserve(store.folder, RECIPE, HEADER + recipe.to_yaml(), stays, results=made, overwrite=overwrite)


def _check_fuller(before: Results, recipe: Recipe, path: Path) -> None:
    """Refuse to put a report in the place of a fuller one: of the same study, with seeds, states or configs gone."""
    had, has = before.recipe, recipe
    pairs: dict[str, tuple[Iterable[Any], Iterable[Any]]] = {
        "seeds": (had.calibration.seeds, has.calibration.seeds),
        "states": (had.states, has.states),
        "configs": (map(repr, had.configs), list(map(repr, has.configs))),
        "policies": (map(_known, had.policy), list(map(_known, has.policy))),
    }
    gone = {name: [str(one) for one in old if one not in new] for name, (old, new) in pairs.items()}
    told = "; ".join(f"{name} {', '.join(left)}" for name, left in gone.items() if left)
    if told:
        raise RecoupError(
            f"{path} is of a fuller study, whose report this one would replace; it leaves out {told}. Keep them in the "
            "recipe (what is measured is not measured again), choose another folder with --out, or use --overwrite"
        )


def _known(policy: Policy) -> str:
    """A policy by name and layer map: another map under the same name is another chip."""
    return f"{policy.name} (layer map {policy.digest[:8]})"


def plan(
    recipe: Recipe,
    has_norms: bool,
    hardware: Callable[[Config | Policy], Hardware] = Hardware.plain,
    has_work: Callable[[Config], bool] = lambda _: True,
) -> tuple[list[Task], list[str]]:
    """The measurements of a recipe in order, and what is left out with its reason.

    Args:
        recipe: what to measure.
        has_norms: whether the network has batch norm statistics.
        hardware: what the network's layers run on under a config or a policy.
        has_work: whether the network has something for a config's hardware.

    Raises:
        RecoupError: nothing is left to measure.
    """
    chosen = [state for state in recipe.states if has_norms or not state.needs_norms]
    notes = []
    if len(chosen) < len(recipe.states):
        gone = [state for state in recipe.states if state not in chosen]
        notes.append(f"The network has no BatchNorm statistics, so these states do not exist: {', '.join(gone)}.")
    configs, foreign = _that_apply(recipe, has_work)
    notes += foreign
    if not chosen:
        left = [f"'{state}'" for state in states(recipe.wings) if not State(state).needs_norms]
        asked, exist = ", ".join(recipe.states), " and ".join([", ".join(left[:-1]), left[-1]] if left[1:] else left)
        raise RecoupError(f"states {asked}: the network has no BatchNorm, so only {exist} exist")
    present = [hardware(config) for config in configs]
    for one in present:
        if not any(map(one.applies, chosen)):
            what = f"{one.name}, here a {one.title}" if one.mixed else one.name
            raise RecoupError(f"states {', '.join(recipe.states)}: none of them exists for {what}")
    gone = [state for state in chosen if not any(one.applies(state) for one in present)]
    if gone and list(recipe.states) != default(recipe.wings, baselines=bool(recipe.configs)):
        notes.append(f"None of the hardware has these states, so they are left out: {', '.join(gone)}.")
    tasks = [Task(FLOAT, NONE, None, None)]
    first = recipe.calibration.seeds[0]
    for seed in recipe.calibration.seeds:
        tasks += _baselines(present, chosen, seed)
        for one in present:
            own = [state for state in one.in_order(chosen) if _drawn(one, state, seed, first)]
            tasks += [Task(one.name, state, seed, one) for state in own]
    measured = [one for one in present if any(card.measure is not None for card in one.cards)]
    tasks += [Task(one.name, None, first, one) for one in measured]
    return tasks, notes


def _baselines(present: Sequence[Hardware], chosen: list[State], seed: int) -> list[Task]:
    """The baselines that are hardware themselves, each once, bare and with the repairs that are measured on them."""
    tasks: dict[str, list[Task]] = {}
    named = references(present)
    for one in present:
        name, compared = named[one.name].name, one.compared
        if compared is not None and name not in tasks:
            repaired = [s for s in chosen if (found := one.repair(s)) is not None and found.on_baseline]
            tasks[name] = [Task(name, state, seed, Hardware.plain(compared)) for state in (NONE, *repaired)]
    return [task for made in tasks.values() for task in made]


def _that_apply(recipe: Recipe, has_work: Callable[[Config], bool]) -> tuple[list[Config | Policy], list[str]]:
    """The configs whose hardware the network has work for and all policies, and a note about the others."""
    configs: list[Config | Policy] = [config for config in recipe.configs if has_work(config)]
    gone = ", ".join(repr(config) for config in recipe.configs if config not in configs)
    configs += recipe.policy
    if gone and not configs:
        raise RecoupError(f"configs {gone}: the network has no norm that they take, so nothing is left to measure")
    return configs, [f"The network has no norm that they take, so these are left out: {gone}."] if gone else []


def _drawn(hardware: Hardware, state: str, seed: int, first: int) -> bool:
    """Whether a seed has a part in a measurement: only repairs and activation scales know calibration images."""
    repaired = hardware.repair(state)
    images = repaired is not None and repaired.needs_images
    return images or hardware.scaled or seed == first


def _measure(bench: Bench, tasks: list[Task], store: Store, progress: bool, how: Mapping[str, Any]) -> None:
    lab, shard = bench.lab, how["shard"]
    assert lab is not None
    mine = tasks if shard is None else tasks[shard.index :: shard.count]
    with displayed(mine, progress) as lab.display:
        for doubt in lab.doubts():
            lab.display.say(doubt)
        elsewhere = sum(task.key in store.foreign for task in mine)
        if elsewhere:
            lab.display.say(
                f"{elsewhere} measurements of a processor with other float kernels are made again; --any-cpu takes them"
            )
        for task in mine:
            if task.key in store:
                lab.display.finish()
        perform(bench, tasks, store, **how, begin=lab.display.begin, finish=lab.display.finish)


def _results(lab: Lab, tasks: list[Task], store: Store, notes: list[str]) -> Results:
    recipe, first = lab.recipe, lab.recipe.calibration.seeds[0]
    measured = {task.config for task in tasks}
    present = [lab.hardware(config) for config in recipe.chips if name_of(config) in measured]
    counted, unsure = lab.costs([one.name for one in present])
    text = lab.source.text(lab.outputs)
    strange = 0.0 if text is None else text.unknown
    unsure += [f"The tokenizer does not know {100 * strange:.2g} of 100 test tokens."] if strange else []
    notes += [note for note in unsure if note not in notes]
    threads = sorted({store[task.key].get("threads", 0) for task in tasks} - {0})
    notes += [ON_THREADS.format(counts=" and ".join(map(str, threads)))] if len(threads) > 1 else []
    fewer = " and ".join(f"{name} in {value}" for name, value in reduced_float32().items())
    notes += [IN_FEWER_BITS.format(kinds=fewer)] if fewer else []
    notes += unpaired(tasks, store)
    notes += [note for task in tasks for note in store[task.key]["notes"]]
    images, count = lab.drawing.images(first, 1), recipe.calibration.images
    assert count is not None  # counted when the lab was made
    return Results(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        recipe=recipe,
        machine=describe(lab.device, recipe.wings),
        model_name=type(lab.model).__name__,
        parameters=sum(parameter.numel() for parameter in lab.model.parameters()),
        weights_sha256=None if recipe.weights is None else of_file(file_and_key(recipe.weights)[0]),
        hardware={one.name: {repr(config): n for config, n in one.layers} for one in present},
        norms=lab.has_norms,
        untrained=lab.untrained,
        outputs=lab.outputs,
        classes=lab.source.classes(),
        data_name=images.name,
        test_images=len(lab.test),
        calibration_images=count,
        augmented=lab.drawing.augmented(images),
        **measured_rows(tasks, store, references(present)),
        text=text,
        tables=_tables(recipe, tasks, store),
        shifts=tuple(_shifts(tasks, store, first)),
        costs=tuple(counted),
        notes=tuple(dict.fromkeys(notes)),
        seconds=round(sum(store[task.key]["seconds"] for task in tasks), 3),
    )


def _tables(recipe: Recipe, tasks: list[Task], store: Store) -> dict[str, tuple[Any, ...]]:
    """The wings' own rows."""
    kinds = tables(recipe.wings)
    rows: dict[str, list[Any]] = {name: [] for name in kinds}
    for task in tasks:
        if task.state is None:
            value = store[task.key]
            for name in kinds.keys() & value.keys():
                rows[name] += [kinds[name](config=task.config, **row) for row in value[name]]
    return {name: tuple(found) for name, found in rows.items()}


def _shifts(tasks: list[Task], store: Store, first: int) -> Iterator[ShiftRow]:
    """Of the first seed."""
    for task in tasks:
        if task.state is not None and task.seed == first:
            for layer, (mean, variance) in store[task.key]["shift"].items():
                yield ShiftRow(config=task.config, layer=layer, mean=mean, variance=variance)
