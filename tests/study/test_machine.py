import os

import pytest
import torch

from recoup.cli.doctor import Check, examine
from recoup.errors import RecoupError
from recoup.study.machine import check_device, cores, cpu_threads, describe, processor
from recoup.wings import cards


def test_the_machine_is_described():
    machine = describe(torch.device("cpu"), cards().values())
    assert machine.backend in ("int8", "float32")
    assert machine.torch == torch.__version__
    assert 1 <= cores() <= (os.cpu_count() or 1)
    assert processor()


def test_cpu_threads_come_back():
    before = torch.get_num_threads()
    with cpu_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with cpu_threads(None):
        assert torch.get_num_threads() == before


def test_a_device_that_is_not_there():
    assert check_device("cpu").type == "cpu"
    with pytest.raises(RecoupError, match="device 'cuda:63': this machine has"):
        check_device("cuda:63")


def test_doctor_finds_this_installation_sound():
    checks = examine()
    assert [check for check in checks if not check.ok] == []
    assert {"recoup", "torch", "8-bit path", "CUDA", "self-test NBSMT", "self-test LBA", "data folder"} <= {
        check.name for check in checks
    }


def test_doctor_reports_a_fault(monkeypatch):
    def broken(*_):
        raise OSError("no compiler")

    monkeypatch.setattr("recoup.nbsmt.wing.matmul", broken)
    assert Check("self-test NBSMT", "OSError: no compiler", ok=False) in examine()
    monkeypatch.setattr("recoup.nbsmt.wing.matmul", lambda *_: torch.zeros(3, 1))
    assert any(not check.ok and "expected [99, 100, 10]" in check.value for check in examine())
