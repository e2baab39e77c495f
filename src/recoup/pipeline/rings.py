"""All weights of a pipeline on one device: the newest, those that coming forwards will use, and what a pass sees.

Stage s keeps a ring of D + 2 rows. Version k lies in row k mod (D + 2): the weights that a forward pass begun after k
updates uses, which with a prediction are others than the newest. An update writes the next row, the other buffer of
whatever is kept twice, and nothing else; it counts as soon as the caller's number does, so one that fails leaves no
trace. A pass sees a row in place, as its parameters' data, or, below `layout.LARGE` elements and on a GPU, a copy.
"""

import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recoup.pipeline.gradients import Gradients
from recoup.pipeline.layout import Layout
from recoup.pipeline.lists import each
from recoup.pipeline.native import Native, form_of
from recoup.pipeline.optimizers import SGDM
from recoup.pipeline.saved import Rows, Saved
from recoup.pipeline.update import Update

NEVER = -1.0  # the rate of what is not predicted yet


@dataclass(slots=True)
class Source:
    """Where the elements of one copy, or of one parameter in place, come from: a view a row, and of both buffers."""

    stage: int
    rows: list[Tensor]
    newest: list[Tensor]
    back: list[Tensor]


class Release:
    """What a model's state_dict calls first: what it holds is a copy. A copy of the model has nothing to release."""

    def __init__(self, rings: "Rings | None" = None) -> None:
        self._rings = None if rings is None else weakref.ref(rings)

    def __call__(self, *_: Any) -> None:
        rings = None if self._rings is None else self._rings()
        if rings is not None:
            rings.release()

    def __reduce__(self) -> Any:
        return Release, ()


class Rings:
    """The weights.

    Args:
        model: its parameters show what a pass is to see; they begin as version 0.
        layout: of the parameters.
        update: what happens to them.
        update_size: gradients that are averaged.
        clip: the largest norm of a stage's gradient, or None.
        copied: let passes see copies only, which stay where they are.

    Attributes:
        fixed: whether a forward pass has used the newest version's row, so that another rate comes too late for it.
        foresees: whether an update depends on the rate of the one after it.
    """

    def __init__(
        self, model: nn.Module, layout: Layout, update: Update, update_size: int, clip: float | None, copied: bool
    ) -> None:
        self.layout, self.update, self.update_size, self.clip = layout, update, update_size, clip
        self._rows = [
            torch.zeros(D + 2, size, dtype=layout.dtype, device=layout.device)
            for D, size in zip(update.delays, layout.sizes, strict=True)
        ]
        self._row = [list(rows.unbind(0)) for rows in self._rows]
        self._newest = [self._zeros() for _ in range(2)] if update.predicts else []
        self._back = [self._zeros() for _ in range(2)] if update.turns else []
        self._slots = [{name: self._zeros() for name in update.rule.slots} for _ in range(2)]
        self._along = along = update.predicts and update.mitigation.prediction != "weight"
        self.foresees = along or update.turns
        self._foreseen = self._turned = NEVER
        self.fixed = self._live_newest = False
        self._version = 0
        self._sources = [self._source(p.stage, p.start, p.end, p.shape) for p in layout.places]
        self._copies: list[tuple[Source, Tensor]] = []
        self._in_place: list[int] = []
        self._watched: list[int] = []
        self._saved = Saved(model, weakref.WeakMethod(self._now))
        self._staging: list[Tensor] | None = None
        self._begin(copied)
        if self._in_place:
            self._hook = model.register_state_dict_pre_hook(Release(self))
        self._native = self._compiled() if layout.device.type == "cpu" and not copied else None
        for index, parameter in enumerate(layout.parameters):
            if self._native is not None and index not in self._in_place:
                self._native.copied(index, parameter.data_ptr())

    def _zeros(self) -> list[Tensor]:
        return [part.zero_() for part in self.layout.empty()]

    def _source(self, stage: int, start: int, end: int, shape: Sequence[int] | None = None) -> Source:
        def views(vectors: Sequence[Tensor]) -> list[Tensor]:
            parts = [vector[start:end] for vector in vectors]
            return parts if shape is None else [part.view(shape) for part in parts]

        newest, back = ([buffer[stage] for buffer in pair] for pair in (self._newest, self._back))
        return Source(stage, views(self._row[stage]), views(newest), views(back))

    @torch.no_grad()
    def _begin(self, copied: bool) -> None:
        """Version 0, and where passes will see weights."""
        layout = self.layout
        for parameter, source in zip(layout.parameters, self._sources, strict=True):
            for first in (source.rows[:1], source.newest[:1], source.back[:1]):
                for view in first:
                    view.copy_(parameter)
        small = layout.sizes if copied else layout.small
        lives = layout.empty(small)
        for stage, live in enumerate(lives):
            if small[stage]:
                self._copies.append((self._source(stage, 0, small[stage]), live.zero_()))
        for index, (parameter, place) in enumerate(zip(layout.parameters, layout.places, strict=True)):
            if place.end <= small[place.stage]:
                parameter.data = lives[place.stage][place.start : place.end].view(place.shape)  # no graph is alive yet
            else:
                self._in_place.append(index)
                if not self.update.mitigation.stash and (self.update.delays[place.stage] or self.update.turns):
                    self._watch(index)
        self.settle(0)
        layout.settled()

    def _watch(self, index: int) -> None:
        place = self.layout.places[index]
        self._saved.own(index, place.module)
        starts = {
            p.start: i
            for i, p in enumerate(self.layout.places)
            if p.stage == place.stage and p.start >= self.layout.small[p.stage]
        }
        rows = Rows(self.layout.sizes[place.stage], list(starts), list(starts.values()))
        self._saved.watch(self._rows[place.stage].untyped_storage().data_ptr(), rows)
        self._watched.append(index)

    def _compiled(self) -> Native | None:
        update, rule = self.update, self.update.rule
        if not isinstance(rule, SGDM):
            return None
        form = form_of(rule, update, self.layout, self.update_size, self.clip is not None)
        velocity = [slots["velocity"] for slots in self._slots]
        made = Native(self.layout, form, update.delays, self._rows, self._newest, velocity, self._back)
        spikes = rule.spikes(update.late) or [(1.0, 0.0)] * len(update.delays)
        for name, values in (("size", self.update_size), ("decay", rule.weight_decay), ("momentum", rule.momentum)):
            made.set(name, values)
        for name, values in (("a", [a for a, _ in spikes]), ("b", [b for _, b in spikes]), ("shrink", update.shrink)):
            made.set(name, values)
        made.set("ahead", update.forward)
        made.set("back", update.backward)
        return made

    def newest(self, k: int) -> list[Tensor]:
        """The newest weights after k updates, a vector a stage."""
        if self._newest:
            return self._newest[k & 1]
        return [rows[k % len(rows)] for rows in self._row]

    def slots(self, k: int) -> Mapping[str, list[Tensor]]:
        """The optimizer's state after k updates."""
        return self._slots[k & 1]

    def parts(self, version: int) -> list[Tensor]:
        """The weights of a forward pass begun at a version, a vector a stage."""
        return [self._of(rows, s, version) for s, rows in enumerate(self._row)]

    def _of(self, rows: list[Tensor], stage: int, version: int) -> Tensor:
        return rows[max(0, version - self.update.delays[stage]) % len(rows)]

    def _last(self, source: Source, k: int) -> Tensor:
        """The newest weights of a source."""
        return source.newest[k & 1] if source.newest else source.rows[k % len(source.rows)]

    def _returning(self, source: Source, k: int) -> Tensor:
        return source.back[k & 1] if source.back else self._last(source, k)

    def _now(self, index: int) -> Tensor:
        """What the backward pass that runs multiplies with."""
        return self._returning(self._sources[index], self._version)

    def show(self, version: int, k: int, rate: float) -> None:
        """Put the weights of a forward pass begun at a version into the model; the newest has number k."""
        if self._along and not self.fixed and self._foreseen != rate:
            self._predict(k, rate)
        self.fixed = True
        if self._native is None:
            self._put([self._of(s.rows, s.stage, version) for s, _ in self._copies])
        else:
            self._native.show(version)
        self._live_newest = False
        for index in self._in_place:
            source = self._sources[index]
            self.layout.put(index, self._of(source.rows, source.stage, version))

    def show_returning(self, version: int, k: int, rate: float) -> None:
        """Put the weights of a backward pass into the model, under the graph; with stash those of a version."""
        self._version = k
        if self.update.mitigation.stash:
            self.show(version, k, rate)
            return
        if self.update.turns and self._turned != rate:
            self._turn(k, rate)
        if self._native is None:
            self._put([self._returning(source, k) for source, _ in self._copies])
        else:
            self._native.show_returning(k)
        self._live_newest = False
        for index in self._in_place:
            self.layout.put(index, self._now(index))
        if self._watched:
            self.layout.age(self._watched)

    def stage(self, k: int, rate: float) -> None:
        """Bring the weights of a backward pass to memory that stays, for a graph's `unstage`."""
        if self.update.turns and self._turned != rate:
            self._turn(k, rate)
        if self._staging is None:
            self._staging = [torch.empty_like(live) for _, live in self._copies]
        each._foreach_copy_(self._staging, [self._returning(source, k) for source, _ in self._copies])

    @torch.no_grad()
    def unstage(self) -> None:
        """Let the graph see them."""
        each._foreach_copy_([live for _, live in self._copies], self._staging or [])

    def _put(self, values: list[Tensor]) -> None:
        if values:
            each._foreach_copy_([live for _, live in self._copies], values)

    @torch.no_grad()
    def _predict(self, k: int, rate: float) -> None:
        """Write the newest version's row with another rate than was foreseen."""
        w = self.newest(k)
        ahead = self.update.ahead(k, rate, w, self.slots(k), None)
        each._foreach_copy_([rows[k % len(rows)] for rows in self._row], ahead)
        self._foreseen = rate

    @torch.no_grad()
    def _turn(self, k: int, rate: float) -> None:
        each._foreach_copy_(self._back[k & 1], self.update.returning(k, rate, self.newest(k), self.slots(k)))
        self._turned = rate

    def forward(self) -> AbstractContextManager[Any]:
        """For the model's forward pass."""
        return self._saved.forward() if self._saved.active else nullcontext()

    def loss(self) -> AbstractContextManager[Any]:
        """For the loss, which may reach weights too."""
        return self._saved.hooks() if self._saved.active else nullcontext()

    def advance(self, k: int, rate: float, following: float, gradients: Gradients) -> list[int]:
        """Update k; stages whose gradient is not finite: if there are any, the update does not count.

        ``following``: the rate of update k + 1, with which coming passes are predicted; `NEVER`: not known yet.
        """
        factors = None if self.clip is None else self._factors(gradients)
        if self._native is None:
            broken = self._stepped(k, rate, following, gradients, factors)
        else:
            broken = self._ran(self._native, k, rate, following, gradients, factors)
        if not broken:
            self._live_newest = self._native is not None
            self._foreseen = self._turned = following
            self.fixed = False
        return broken

    def _factors(self, gradients: Gradients) -> list[float]:
        """What clipping multiplies every stage's gradient by, as `torch.nn.utils.clip_grad_norm_`."""
        norms = gradients.norms(self.update_size)
        return [min(1.0, (self.clip or 0.0) / (norm + 1e-6)) for norm in norms]

    def _ran(
        self, native: Native, k: int, rate: float, following: float, gradients: Gradients, factors: list[float] | None
    ) -> list[int]:
        native.set("rate", -rate)
        native.set("next", -following)
        if factors is not None:
            native.set("shrink", [a * b for a, b in zip(self.update.shrink, factors, strict=True)])
        if self.update.mitigation.annealing:
            native.set("late", self.update.annealing(k))
        return [] if native(k, gradients.each()) else gradients.broken()

    @torch.no_grad()
    def _stepped(
        self, k: int, rate: float, following: float, gradients: Gradients, factors: list[float] | None
    ) -> list[int]:
        if not gradients.finite():
            return gradients.broken()
        update, w, g = self.update, self.newest(k), gradients.parts(self.update_size)
        old, new = self.slots(k), self.slots(k + 1)
        into = self.newest(k + 1)
        update.step(k, rate, g, w, old, new, into, factors)
        if update.predicts and update.mitigation.prediction == "weight":
            ahead = update.ahead(k + 1, rate, into, new, w)
            each._foreach_copy_([rows[(k + 1) % len(rows)] for rows in self._row], ahead)
        elif update.predicts and following != NEVER:
            self._predict(k + 1, following)
        if update.turns and following != NEVER:
            turned = update.returning(k + 1, following, into, new)
            each._foreach_copy_(self._back[(k + 1) & 1], turned)
        return []

    def settle(self, k: int) -> None:
        """Put the newest weights into the model."""
        if not self._live_newest:
            self._put([self._last(source, k) for source, _ in self._copies])
        self._live_newest = False
        for index in self._in_place:
            self.layout.put(index, self._last(self._sources[index], k))

    def release(self) -> None:
        """Give parameters in place memory of their own, so that what is kept of them does not keep, or see, a ring."""
        for index in self._in_place:
            parameter = self.layout.parameters[index]
            if self.layout.undisturbed(index):
                self.layout.put(index, parameter.data.clone())

    def __del__(self) -> None:
        if getattr(self, "_in_place", None):
            self.release()
            self._hook.remove()

    def copy(self, index: int) -> None:
        """Show a parameter that lies in place as a copy from now on: it is used outside its module."""
        if index not in self._in_place:
            return
        self._in_place.remove(index)
        self._saved.disown(index)
        place, parameter = self.layout.places[index], self.layout.parameters[index]
        if index in self._watched:
            self._watched.remove(index)
        live = torch.empty(place.shape, dtype=self.layout.dtype)
        live.copy_(parameter.detach())
        parameter.data = live
        self._copies.append((self._sources[index], live))
        if self._native is not None:
            self._native.copied(index, live.data_ptr())
        self.layout.settled()

    def used(self, tensor: Tensor, running: Sequence[str]) -> None:
        """A pass saved a weight while some modules ran: one in place must be its own module's."""
        for index in list(self._in_place):
            place, parameter = self.layout.places[index], self.layout.parameters[index]
            inside = 0 <= tensor.data_ptr() - parameter.data_ptr() < place.count * parameter.element_size()
            if inside and index in self._watched and place.module not in running:
                self.copy(index)

    @torch.no_grad()
    def fill(self, k: int) -> None:
        """Let every version up to k be version 0."""
        for rows in self._rows:
            rows.copy_(rows[:1].clone().expand_as(rows))
        for pair in (self._newest, self._back):
            if pair:
                each._foreach_copy_(pair[1], pair[0])
        self.settle(k)

    def state(self, k: int) -> dict[str, Any]:
        """Everything after k updates, as copies."""
        rings = [
            torch.stack([rows[max(0, v) % len(rows)] for v in range(k - D, k + 1)])
            for rows, D in zip(self._row, self.update.delays, strict=True)
        ]
        slots = {name: torch.cat(parts) for name, parts in self.slots(k).items()}
        weights = torch.cat(self.newest(k))
        return {
            "optimizer": {"weights": weights, **slots},
            "ring": rings,
            "foreseen": self._foreseen,
            "fixed": self.fixed,
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Any], k: int) -> None:
        """The inverse of `state`."""
        kept = dict(state["optimizer"])
        sizes = self.layout.sizes
        for rows, ring, D in zip(self._row, state["ring"], self.update.delays, strict=True):
            for v in range(max(0, k - D), k + 1):
                rows[v % len(rows)].copy_(ring[v - (k - D)])
        if self._newest:
            each._foreach_copy_(self._newest[k & 1], list(kept["weights"].to(self.layout.device).split(sizes)))
        for name, parts in self.slots(k).items():
            each._foreach_copy_(parts, list(kept[name].to(self.layout.device).split(sizes)))
        self._foreseen, self.fixed, self._turned = float(state["foreseen"]), bool(state["fixed"]), NEVER
        self._live_newest = False
