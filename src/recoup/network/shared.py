"""Settings that belong to a whole process or network and that several threads want changed for a while: who leaves
first must not put back what another still needs, nor who leaves last what was another's."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from threading import Lock, get_ident
from weakref import WeakKeyDictionary

from torch import nn

User = tuple[int, object]
"""A thread, and what tells this use from its others."""


class Shared:
    """A setting of the process: the first user changes it, the last one puts it back.

    A child that is forked meanwhile has the forking thread alone: another's lock is opened, another's use has ended.
    """

    def __init__(self, change: Callable[[], Callable[[], object] | None]) -> None:
        """``change`` makes the change and returns what puts it back, or None where there is nothing to change."""
        self.change, self.lock, self.users = change, Lock(), set[User]()
        self.put_back: Callable[[], object] | None = None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork)

    def enter(self) -> User | None:
        """The use to end with `leave`; None where there is nothing to put back. Whether there is is asked under the
        lock: one who finds it changed because another needs it so would see it fall when that one leaves."""
        with self.lock:
            if not self.users:
                self.put_back = self.change()
            if self.put_back is None:
                return None
            user = get_ident(), object()
            self.users.add(user)
            return user

    def leave(self, user: User) -> None:
        """End a use."""
        with self.lock:
            self.users.discard(user)
            self._end()

    def _end(self) -> None:
        if not self.users and self.put_back is not None:
            self.put_back()
            self.put_back = None

    def _after_fork(self) -> None:
        self.lock = Lock()
        self.users = {user for user in self.users if user[0] == get_ident()}
        self._end()


@dataclass(slots=True, eq=False)
class _Kept:
    """Whether a module was in train mode when a thread that changed it came."""

    training: bool
    thread: int


class TrainModes:
    """Train and eval modes of modules, changed for a while by any number of threads: each is put back in the end as the
    first found it, whoever leaves last, and within a thread as the one around left it.

    In a child that is forked meanwhile other threads' changes are undone."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.kept = WeakKeyDictionary[nn.Module, list[_Kept]]()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork)

    def change(self, modules: Iterable[nn.Module], train: Callable[[nn.Module], bool]) -> dict[nn.Module, _Kept]:
        """Set the modes; what is returned is for `put_back`."""
        wanted = {module: train(module) for module in modules}
        own = {}
        with self.lock:
            for module, mode in wanted.items():
                own[module] = _Kept(module.training, get_ident())
                self.kept.setdefault(module, []).append(own[module])
                module.training = mode
        return own

    def put_back(self, own: dict[nn.Module, _Kept]) -> None:
        """Undo a change; where another came after it, that one undoes it."""
        with self.lock:
            for module, kept in own.items():
                self._undo(module, kept)

    def _undo(self, module: nn.Module, kept: _Kept) -> None:
        changes = self.kept[module]
        after = changes.index(kept) + 1
        if after < len(changes):
            changes[after].training = kept.training
        else:
            module.training = kept.training
        changes.remove(kept)

    def _after_fork(self) -> None:
        self.lock = Lock()
        for module, changes in list(self.kept.items()):
            for kept in list(changes):
                if kept.thread != get_ident():
                    self._undo(module, kept)
