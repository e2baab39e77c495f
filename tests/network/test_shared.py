"""Settings of a process that several threads change at once."""

import os
import warnings
from threading import Thread

import pytest
from torch import nn

from recoup.network.shared import Shared, TrainModes


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 says where there are threads
        child = os.fork()
    if not child:
        good = False
        try:
            held = setting.value
            shared.leave(user)
            ended = setting.value
            shared.leave(shared.enter())
            good = (held, ended, setting.value) == (1, 0, 0)
        finally:
            os._exit(not good)
    shared.leave(user)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        good = False
        try:
            held = module.training
            modes.put_back(kept["own"])
            good = (held, module.training) == (False, True)
        finally:
            os._exit(not good)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    modes.put_back(kept["own"])
    assert not module.training
    modes.put_back(kept["other"])
    assert module.training
