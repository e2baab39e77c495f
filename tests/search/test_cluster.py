"""A search on a real Dask cluster of two worker processes, one of which is killed: nothing is lost."""

import os
import signal
import warnings

import pytest

from recoup.search import score
from recoup.tasks.cluster import OnCluster, cluster
from tests.search.cases import labelled, space
from tests.search.test_scoring import numbers

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of dask's own libraries
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def distributed():
    """Imported where these tests run: it takes every other process of the suite seconds."""
    return pytest.importorskip("dask.distributed", reason="the extra recoup[cluster] is not installed")


@pytest.fixture
def client(distributed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
        )
        with made, distributed.Client(made) as client:
            yield client


@pytest.mark.slow
def test_a_killed_worker_takes_nothing_with_it(client, tmp_path):
    model, batches = labelled()
    expected = numbers(score(model, batches, space(), probes=3))
    lines, killed = [], []

    def progress(line):
        lines.append(line)
        if len(lines) == 3:
            killed.append(next(iter(client.run(os.getpid).values())))
            os.kill(killed[0], signal.SIGKILL)

    found = score(model, batches, space(), probes=3, out=tmp_path, executor=OnCluster(client), progress=progress)
    assert numbers(found) == expected
    assert len(lines) == len(list((tmp_path / "records").iterdir())) == found.made == 14
    assert killed
    with cluster(client.scheduler.address) as executor:
        assert score(model, batches, space(), probes=4, out=tmp_path, executor=executor).made == 1
