"""Clusters that cannot be reached or are none: a sentence, and how long was waited."""

import pytest

from recoup.errors import RecoupError
from recoup.tasks.cluster import cluster


@pytest.fixture(scope="module", autouse=True)
def distributed():
    """Imported where these tests run: it takes every other process of the suite seconds."""
    return pytest.importorskip("dask.distributed", reason="the extra recoup[cluster] is not installed")


@pytest.mark.parametrize(("kind", "program"), [("slurm", "sbatch"), ("pbs", "qsub"), ("lsf", "bsub")])
def test_a_machine_without_the_batch_system(kind, program, monkeypatch, tmp_path):
    pytest.importorskip("dask_jobqueue", reason="the extra recoup[cluster] is not installed")
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(RecoupError, match=f"there is no {program} here: run this where {kind} takes jobs"),
        cluster(f"{kind}:n=2"),
    ):
        pass


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("nowhere", "must be tcp://HOST:PORT"),
        ("slurm:partition=cpu", "slurm.*n=WORKERS"),
        ("slurm:n=2,colour=red", "slurm.*n=WORKERS"),
        ("slurm:n=0", "slurm.*n=WORKERS"),
        ("tcp://127.0.0.1:9", "no scheduler answers within 0.2 s"),
    ],
)
def test_clusters_that_are_none(where, told):
    with pytest.raises(RecoupError, match=told), cluster(where, 0.2):
        pass
