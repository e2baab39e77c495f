"""The memory of a pipeline is what it allocates, and a run beyond the machine is refused before it begins."""

import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from recoup import models
from recoup.errors import RecoupError
from recoup.pipeline import AdamW, Simulator, automatic, delays, memory
from recoup.pipeline.mitigation import NAMES
from tests.pipeline.networks import images


def build():
    torch.manual_seed(0)
    return models.resnet20(norm="group", width=8)


def sizes(tensors):
    return sum(
        storage for _, storage in {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors}
    )


@pytest.mark.parametrize("name", [*NAMES, "past", "adamw"])
def test_the_estimate_is_what_there_is(name):
    rule, how = (AdamW(), "lwpv") if name == "adamw" else (None, name)
    model, stages = build(), automatic(build())
    said = Simulator.memory(model, stages, delays(len(stages)), how, rule)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    assert before == {name: p.data_ptr() for name, p in model.named_parameters()}
    simulator = Simulator(model, stages, delays(len(stages)), 0.01, mitigation=how, optimizer=rule)
    rings = simulator.rings
    assert said.rings == sizes(rings._rows)
    assert said.newest == sizes([part for buffer in rings._newest for part in buffer])
    assert said.state == sizes([part for slots in rings._slots for parts in slots.values() for part in parts])
    assert said.returning == sizes([part for buffer in rings._back for part in buffer])
    assert said.copies == sizes([live for _, live in rings._copies])
    simulator.step(*images(1, shape=(1, 3, 8, 8))[0])
    assert said.total == sum(getattr(said, f) for f in memory.Memory.__dataclass_fields__)


def test_a_run_beyond_the_machine_is_refused_with_the_estimate(monkeypatch):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    monkeypatch.setattr(memory, "available", lambda device: 1000 if device.type == "cpu" else None)
    told = r"the weights of all versions take .* MiB \(rings .*, and cpu has 0.0 MiB left; use fewer stages"
    with pytest.raises(RecoupError, match=told):
        Simulator(model, [["0"], ["1"]], delays(2), 0.1)


def test_what_is_left_is_a_number_here():
    left = memory.available(torch.device("cpu"))
    assert left is None or left > 0


STEPS = """
import resource
import torch
from recoup.pipeline.memory import keep_freed

def step():
    return [torch.ones(750_000) for _ in range(10)]  # 3 MB each: glibc keeps up to 6 MB of free memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

step()
before = faults()
keep_freed()
step()
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_what_steps_free_is_kept_for_the_next():
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True, timeout=120)
    before, after = map(int, done.stdout.split())
    assert (
        before > 5_000
    )  # 73,000 where every step pays for all its pages; by luck of the addresses, glibc keeps most of them
    assert after < 100
