"""Workers from a batch system, a stand-in for SLURM: what is refused, dies at once or serves."""

import os
import re
import subprocess
import sys
import threading
import time

import pytest

from recoup.errors import RecoupError, RecoupWarning
from recoup.tasks.cluster import cluster

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of dask's own libraries
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Port 8787 is already in use"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
REFUSES = "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1"
DIES = "echo 'Submitted batch job 77'"
TAKES_ONE = f"mkdir $0.taken 2>/dev/null || {{ {REFUSES}; }}; {DIES}"
MUMBLES = "echo 'good morning'"
RUNS = 'cp $1 $0.$$.sh; sh $0.$$.sh >$0.$$.log 2>&1 & echo "Submitted batch job $!"'


@pytest.fixture(scope="module", autouse=True)
def distributed():
    """Imported where these tests run: it takes every other process of the suite seconds."""
    pytest.importorskip("dask.distributed", reason="the extra recoup[cluster] is not installed")
    pytest.importorskip("dask_jobqueue", reason="the extra recoup[cluster] is not installed")


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Have ``sbatch`` do what a line of shell says."""

    def made(line):
        for name, text in (("sbatch", line), ("scancel", "kill $1")):
            path = tmp_path / name
            path.write_text(f"#!/bin/sh\n{text}\n")
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return made


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (REFUSES, "`sbatch .*sh` ended with 1 and said: sbatch: error: invalid partition specified: gpu .*-p gpu"),
        ("printf '\\377 no' >&2; kill -9 $$", "`sbatch .*sh` ended with -9 and said: \ufffd no"),
        (MUMBLES, "Could not parse job id .* good morning"),
    ],
)
def test_a_batch_system_that_takes_no_job(line, said, slurm, capfd):
    slurm(line)
    with (
        pytest.raises(RecoupError, match=f"--cluster 'slurm:n=2,partition=gpu': slurm takes no job: {said}"),
        cluster("slurm:n=2,partition=gpu"),
    ):
        pytest.fail("entered without a job")
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_batch_system_that_does_not_answer_is_told_and_left_on_an_interrupt(slurm):
    slurm("exec sleep 30")
    told = []

    def tell(line):
        told.append(line)
        if len(told) == 2:
            raise KeyboardInterrupt

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt), cluster("slurm:n=2", seconds=0.1, tell=tell):
        pytest.fail("entered without a job")
    assert time.monotonic() - begun < 20
    assert told[0] == "--cluster 'slurm:n=2': sbatch has not answered for 0.1 s. Ctrl-C ends the wait"
    assert "for 0.2 s" in told[1]


def test_ctrl_c_is_one_where_dask_is_loaded_too(slurm):
    """dask-jobqueue takes the signal when it is loaded, which another test of this process may have done."""
    slurm("exec sleep 30")
    text = (
        "import os, signal, recoup.tasks.cluster as it\n"
        "def tell(line): os.kill(os.getpid(), signal.SIGINT)\n"
        "handler = signal.getsignal(signal.SIGINT)\n"
        "try:\n"
        "    with it.cluster('slurm:n=1', seconds=0.1, tell=tell): pass\n"
        "except KeyboardInterrupt: print('interrupted')\n"
        "print(handler == signal.getsignal(signal.SIGINT))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", text]
    ran = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert ran.stdout.split() == ["interrupted", "True"], ran.stderr


def test_of_a_batch_system_that_says_much_the_beginning_is_told(slurm):
    slurm("echo 'no such partition' >&2; head -c 100000 /dev/zero | tr '\\0' x >&2; exit 1")
    with pytest.raises(RecoupError, match=r"no such partition x+\.\.\. \(asked") as error, cluster("slurm:n=1"):
        pytest.fail("entered without a job")
    assert len(str(error.value)) < 1200


def test_jobs_of_which_some_are_refused_are_told_and_the_others_go_on(slurm):
    slurm(TAKES_ONE)
    told = []
    with cluster("slurm:n=3,partition=gpu", tell=told.append):
        pass
    assert len(told) == 1
    assert re.search("took 1 of 3 jobs, which go on: .*invalid partition specified", told[0])


def test_jobs_that_die_before_they_connect_are_told_with_the_place_of_their_logs(slurm):
    slurm(DIES)
    told = []
    with cluster("slurm:n=2", seconds=0.2, tell=told.append):
        deadline = time.monotonic() + 20
        while len(told) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "no worker of slurm for 0.2 s: `squeue` says whether jobs 77, 77 wait or are gone" in told[0]
    assert "slurm-JOB.out" in told[0]
    assert "for 0.4 s" in told[1]  # not every second of a night
    assert not [thread for thread in threading.enumerate() if thread.name == "recoup-jobs"]


def test_without_somebody_to_tell_it_is_a_warning(slurm):
    slurm(TAKES_ONE)
    with pytest.warns(RecoupWarning, match="took 1 of 2 jobs"), cluster("slurm:n=2"):
        pass


def test_the_folder_that_dask_is_configured_to_log_into_is_named(slurm, tmp_path):
    from dask import config

    slurm(DIES)
    told = []
    with config.set({"jobqueue.slurm.log-directory": str(tmp_path / "logs")}):  # noqa: SIM117 -- told apart
        with cluster("slurm:n=1", seconds=0.1, tell=told.append):
            deadline = time.monotonic() + 20
            while not told and time.monotonic() < deadline:
                time.sleep(0.05)
    assert str(tmp_path / "logs") in told[0]


def asked(bench, other):
    return bench + other


@pytest.mark.slow
def test_a_job_that_runs_measures(slurm, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    slurm(RUNS)
    told = []
    with cluster("slurm:n=1", tell=told.append) as executor:
        assert executor.submit(asked, 3, 4).result(timeout=60) == 7
    assert not told


def test_memory_that_is_no_size(slurm):
    slurm(REFUSES)
    told = "--cluster 'slurm:n=1,memory=lots': memory must be a size such as 4GB"
    with pytest.raises(RecoupError, match=told), cluster("slurm:n=1,memory=lots"):
        pytest.fail("entered")
