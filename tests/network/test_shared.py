"""Settings of a process that several threads change at once."""

import os
from threading import Thread

import pytest
from torch import nn

from recoup.network.shared import Shared, TrainModes
from tests import forked


class Setting:
    """A number that counts how often it was changed and put back."""

    def __init__(self):
        self.value = 0

    def change(self):
        self.value += 1
        return self.put_back

    def put_back(self):
        self.value -= 1


@pytest.fixture
def setting():
    return Setting()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_whoever_leaves_last_puts_it_back(setting, order):
    shared = Shared(setting.change)
    users = [shared.enter(), shared.enter()]
    assert setting.value == 1
    shared.leave(users[order[0]])
    assert setting.value == 1
    shared.leave(users[order[1]])
    assert setting.value == 0


def test_where_there_is_nothing_to_change_nobody_leaves():
    shared = Shared(lambda: None)
    assert shared.enter() is None
    assert not shared.users


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_who_forks_within_a_use_ends_it_in_the_child_too(setting):
    shared = Shared(setting.change)
    user = shared.enter()

    def ends():
        held = setting.value
        shared.leave(user)
        ended = setting.value
        shared.leave(shared.enter())
        return (held, ended, setting.value) == (1, 0, 0)

    child = forked.begun(ends)
    shared.leave(user)
    assert forked.held(child)
    assert setting.value == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("own_first", [True, False])
def test_who_forks_within_a_change_of_modes_puts_back_anothers_in_the_child_too(own_first):
    modes, module = TrainModes(), nn.Identity()
    kept = {}

    def change(who):
        kept[who] = modes.change([module], lambda _: False)

    other = Thread(target=change, args=("other",))
    for turn in (0, 1):
        if own_first == (turn == 0):
            change("own")
        else:
            other.start()
            other.join()

    def puts_back():
        held = module.training
        modes.put_back(kept["own"])
        return (held, module.training) == (False, True)

    assert forked.held(forked.begun(puts_back))
    modes.put_back(kept["own"])
    assert not module.training
    modes.put_back(kept["other"])
    assert module.training
