"""What a wing tells the rest of recoup about itself: its card, and the repairs that win its accuracy back.

Nothing above the wings asks which wing a config is of; it asks the card. A config class and its layers are enough:

    Card(config=Trunc, layers={nn.Linear: TruncLinear})

and every other field has a default. `recoup.wings.register` makes a card known.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import nn

from recoup.errors import RecoupError
from recoup.fields import choice
from recoup.network.derived import replaced
from recoup.network.emulated import Emulated
from recoup.network.sites import Site, Spent
from recoup.network.systolic import Array

Stage = Literal["structure", "gain", "bias", "statistics"]
STAGES: tuple[str, ...] = get_args(Stage)
"""The stages of repair in the order of the signal; each is measured with the earlier ones in place."""


def _always(_: nn.Module) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Repair:
    """One way to win accuracy back, as a record that studies, reports and the command line read.

    Attributes:
        name: what tables and recipes call the repaired state, such as ``paired``.
        stage: what it changes; of a combination, what it changes last.
        meaning: a sentence or two for the report.
        sentence: how a verdict says it, as in "*a gain per channel* brings back 80 % of the loss".
        apply: does it, in place: ``apply(model, batches)``.
        needs_norms: whether it is about batch norm statistics, so that a network without them has no such state.
        needs_images: whether calibration images decide it.
        on_baseline: whether it is measured with the wing's baseline hardware and only its statistics are carried over.
        records: whether ``apply`` writes down itself what it did (`network.ledger.record`). False: what it changes in
            parameters, buffers, configs and extras is found out and written down (`network.applied`), so that it can be
            undone; that takes a copy of the network's tensors for the time.
        short: how plans call it, such as ``gain`` in ``gain+paired``; by default its name.
        parts: of a combination, the repairs that it does one after the other.
        applies: whether a network that runs on its hardware has something for it; a default plan leaves out what has
            not, and a study has no such state.
    """

    name: str
    stage: Stage
    meaning: str
    sentence: str
    apply: Callable[[nn.Module, Iterable[Any]], object]
    needs_norms: bool = False
    needs_images: bool = True
    on_baseline: bool = False
    records: bool = False
    short: str = ""
    parts: tuple["Repair", ...] = ()
    applies: Callable[[nn.Module], bool] = _always

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise RecoupError(f"Repair(name={self.name!r}): name must be a text that is not empty")
        choice("Repair", "stage", self.stage, get_args(Stage))
        if not callable(self.apply):
            raise RecoupError(f"Repair {self.name!r}: apply must be a function; got {self.apply!r}")

    @classmethod
    def combined(cls, name: str, meaning: str, sentence: str, parts: tuple["Repair", ...]) -> "Repair":
        """Several repairs, one after the other, of which those are done that a network has something for."""
        conditional = any(part.conditional for part in parts)

        def apply(model: nn.Module, batches: Iterable[Any]) -> None:
            for part in parts:
                if part.applies(model):
                    part.apply(model, batches)

        def applies(model: nn.Module) -> bool:
            return any(part.applies(model) for part in parts)

        return cls(
            name,
            parts[-1].stage,
            meaning,
            sentence,
            apply,
            needs_norms=any(part.needs_norms for part in parts),
            needs_images=any(part.needs_images for part in parts),
            parts=parts,
            applies=applies if conditional else _always,
        )

    @property
    def conditional(self) -> bool:
        """Whether there may be networks that have nothing for it."""
        return self.applies is not _always


@dataclass(frozen=True, slots=True)
class Baseline:
    """What a wing's accuracy is compared with: the float network, or hardware without the shortcut under study.

    Attributes:
        name: of its rows in results, such as ``8-bit``.
        title: in tables and plots.
        phrase: in sentences, as in "91.70 % *at 8 bit*".
        of: the baseline of one of the wing's configs; None: the float network.
        hardware: what it is, as in "*one thread* is the 8-bit baseline".
    """

    name: str
    title: str
    phrase: str
    of: Callable[[Any], Any] | None = None
    hardware: str = ""


BARE = "float statistics"
"""The state of a network on hardware, without repair."""
FLOAT = Baseline("float", "float", "in float")


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a training that runs otherwise than the rest: its name in the log, and what prepares the model."""

    name: str
    prepare: Callable[[nn.Module], object]


def _never(_: Any) -> bool:
    return False


def _none(_: Any) -> None:
    return None


def _stands_for(emulated: type[Emulated], plain: type[nn.Module]) -> bool:
    """A subclass of the float layer, or a class of its own that names it, as batch norms that converters leave do."""
    return issubclass(emulated, plain) or getattr(emulated, "float_class", None) is plain


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A wing: its config class, its layers, and what others need to know to name, measure and repair it.

    Attributes:
        config: the frozen config class; ``repr`` of an object is its text in recipes and on the command line.
        layers: float layer class -> the `Emulated` class that stands in for it.
        title: how tables call a config; by default its repr.
        presets: names that recipes and the command line know.
        renamed: former names of presets -> the present ones; the old ones are read, with a warning.
        constructors: what a config's text may call, by name; by default the config class alone.
        example: one more config text for help and errors.
        baseline: what accuracy is compared with.
        repairs: in the order in which they are applied.
        default: the names of those that a study measures unless it says otherwise.
        quoted: names in the order in which a verdict prefers them; fixed here, not picked by result.
        plan: names of those that `repair_` applies by default; those that need norms where there are none are left out.
        plan_without_norms: what it applies instead to a network without batch norm statistics.
        seedless: whether the bare hardware knows nothing of calibration images. False: it works on activation scales
            that `calibrate_` measures.
        scaled: of a seedless wing, whether one of its configs works on such scales all the same.
        adapt: the `Emulated` class for a float class that ``layers`` does not list (a subclass, a class of another
            package), or None; it holds that class as its ``float_class``.
        take_back: what else a wing put under a model by hand, taken away again when it is restored.
        ready: whether a layer is taken without being named in a layer map.
        declined: whether a layer that is not ready was left in float by choice, so that it need not be said.
        unready: what to do about a model in which none is, for errors.
        multiplies: whether it is hardware for products, so that what multiplies and stays in float must be said.
        kin: whether a module without a stand-in is of the kind that this hardware is for, which nothing but its name
            tells; said by class.
        float_only: classes of torch that its kind of hardware would run and that it has no stand-in for; said by class.
        float_only_note: more about them, for that warning.
        needs_norms: whether it is hardware for norms alone, so that studies leave it out, with a note, where a network
            has none that it stands in for.
        trains: whether networks can be trained on the emulated layers.
        channels_last: whether the emulation is faster on images channels last, so that studies give it their test
            images so; where several wings are present, if all are.
        phases: of fine-tuning, where it has more than one; the last runs the hardware as it is.
        path: which of several equal paths the hardware's emulation takes on this processor: its name, the instruction
            set, and why; None where there is nothing to say.
        self_test: computes something known with the wing's operators and says what works; raises where it does not.
        cost: ``cost(site, config, array)``, what a layer of those sizes costs on this hardware.
        runs: ``runs(unit, config)``, whether hardware that was built for the config ``unit`` also runs ``config``.
        placed: ``placed(config, array)``, how many of the units that ``rtl`` generates a die with such an array has;
            by default one for each of its elements where the hardware ``multiplies``, else one.
        measure: the module of its rows and how they are measured, such as ``recoup.study.measures.nbsmt``.
        chapter: the module of its part of the report.
        rtl: the module that generates its hardware, as `recoup.gates.module` says. Areas and energies of a network
            come from it: the unit's, times ``placed``, and times the ``steps`` that ``cost`` says (of a wing that does
            not say and ``multiplies``: the layer's multiply-accumulates by those of a step of the unit).
        usual: options of that generator by name, which the command line gives it for presets that leave them open, and
            says so.
    """

    config: type
    layers: Mapping[type[nn.Module], type[nn.Module]]
    title: Callable[[Any], str] = repr
    presets: Mapping[str, Any] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    constructors: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    example: str = ""
    baseline: Baseline = FLOAT
    repairs: tuple[Repair, ...] = ()
    default: tuple[str, ...] = ()
    quoted: tuple[str, ...] = ()
    plan: tuple[str, ...] = ()
    plan_without_norms: tuple[str, ...] = ()
    seedless: bool = True
    scaled: Callable[[Any], bool] = _never
    adapt: Callable[[type[nn.Module]], type[nn.Module] | None] = _none
    take_back: Callable[[nn.Module], object] = _none
    ready: Callable[[nn.Module], bool] = _always
    declined: Callable[[nn.Module], bool] = _never
    unready: str = ""
    multiplies: bool = False
    kin: Callable[[nn.Module], bool] = _never
    float_only: tuple[type[nn.Module], ...] = ()
    float_only_note: str = ""
    needs_norms: bool = False
    trains: bool = False
    channels_last: bool = False
    phases: tuple[Phase, ...] = ()
    path: Callable[[], tuple[str, str, str]] | None = None
    self_test: Callable[[], str] | None = None
    cost: Callable[[Site, Any, Array], Spent] | None = None
    runs: Callable[[Any, Any], bool] = operator.eq
    placed: Callable[[Any, Array], int] | None = None
    measure: str | None = None
    chapter: str | None = None
    rtl: str | None = None
    usual: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.config, type):
            raise RecoupError(f"Card(config={self.config!r}): config must be a class")
        if self.config.__hash__ is None:
            raise RecoupError(
                f"Card(config={self.config.__name__}): its objects have no hash: make it @dataclass(frozen=True)"
            )
        if not isinstance(self.layers, Mapping) or not self.layers:
            raise RecoupError(
                f"Card(config={self.config.__name__}): layers is empty; map float layers to emulated ones"
            )
        for plain, emulated in self.layers.items():
            classes = isinstance(plain, type) and isinstance(emulated, type)
            if not (classes and issubclass(emulated, Emulated) and _stands_for(emulated, plain)):
                raise RecoupError(
                    f"Card(config={self.config.__name__}): layers: {emulated!r} must be a class that derives from "
                    f"recoup.wings.Emulated and from {getattr(plain, '__name__', plain)}"
                )
        for name in ("measure", "chapter", "rtl"):
            path = getattr(self, name)
            if path is not None and (not isinstance(path, str) or not path):
                raise RecoupError(f"Card({name}={path!r}): {name} must be a module's path, such as 'package.module'")
        self._check_repairs()

    def _check_repairs(self) -> None:
        if not isinstance(self.repairs, tuple) or not all(isinstance(repair, Repair) for repair in self.repairs):
            raise RecoupError(f"Card(config={self.config.__name__}): repairs must be a tuple of Repair objects")
        known = {repair.name for repair in self.repairs}
        if len(known) < len(self.repairs):
            raise RecoupError(f"Card(config={self.config.__name__}): two of its repairs have one name")
        if BARE in known:
            raise RecoupError(
                f"Card(config={self.config.__name__}): {BARE!r} is the state without repair; name it otherwise"
            )
        for name in (*self.default, *self.quoted, *self.plan, *self.plan_without_norms):
            if name not in known:
                raise RecoupError(f"Card(config={self.config.__name__}): {name!r} is none of its repairs")

    def stand_in(self, module: nn.Module) -> type[nn.Module] | None:
        """The emulated class for a float module; None where the wing has none, the module is emulated already, or
        methods were set on the module itself, which would run whatever its class is (`derived.replaced`)."""
        if isinstance(module, Emulated) or replaced(module):
            return None
        return self.for_class(type(module))

    def for_class(self, kind: type[nn.Module]) -> type[nn.Module] | None:
        """The emulated class for the modules of a class; None where the wing has none."""
        return self.layers.get(kind) or self.adapt(kind)

    def units_on(self, config: Any, array: Array) -> int:
        """How many units of a config a die with an array has: as ``placed`` says, or by its default."""
        if self.placed is not None:
            return self.placed(config, array)
        return array.rows * array.cols if self.multiplies else 1

    def works_on_scales(self, config: Any) -> bool:
        """Whether a config of the wing works on activation scales that `calibrate_` measures."""
        return not self.seedless or self.scaled(config)

    def repair(self, name: str) -> Repair | None:
        """The repair of a name, if the wing has it."""
        return next((repair for repair in self.repairs if repair.name == name), None)

    @property
    def callables(self) -> dict[str, Callable[..., Any]]:
        """What a config's text may call: the constructors, by default the class itself."""
        return dict(self.constructors) or {self.config.__name__: self.config}
