"""Which part of a plan a process makes, said by hand or by a batch system."""

import pytest

from recoup.errors import RecoupError
from recoup.tasks.shards import Shard


def slurm(own, count, first, last, step=1):
    names = ("ID", "COUNT", "MIN", "MAX", "STEP")
    return {f"SLURM_ARRAY_TASK_{n}": str(v) for n, v in zip(names, (own, count, first, last, step), strict=True)}


@pytest.mark.parametrize(
    ("text", "environment", "found"),
    [
        ("2/3", {}, Shard(2, 3)),
        ("auto", {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "3"}, Shard(2, 3)),
        ("auto", {"JOB_COMPLETION_INDEX": "0", "JOB_COMPLETIONS": "4"}, Shard(0, 4)),
        ("3/3", {}, None),
        ("-1/3", {}, None),
        ("half", {}, None),
        ("auto", {"JOB_COMPLETION_INDEX": "0"}, None),
        ("auto", {"JOB_COMPLETION_INDEX": "x", "JOB_COMPLETIONS": "4"}, None),
        ("auto", slurm(2, 3, 0, 2), Shard(2, 3)),
        ("auto", slurm(9, 3, 1, 9, 4), Shard(2, 3)),
        ("auto", {"SLURM_ARRAY_TASK_ID": "0"}, None),
        ("auto", {"SLURM_ARRAY_TASK_ID": "x", "SLURM_ARRAY_TASK_COUNT": "3"}, None),
        *(("auto", slurm(own, 3, 1, 7), None) for own in (1, 3, 7)),  # --array=1,3,7
        ("auto", slurm(2, 3, 1, 9, 4), None),
        ("auto", slurm(0, 0, 0, 0, 0), None),
    ],
)
def test_shards(text, environment, found, monkeypatch):
    slurms = (f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "COUNT", "MIN", "MAX", "STEP"))
    for name in (*slurms, "JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if found is not None:
        assert Shard.parse(text) == found
        return
    with pytest.raises(RecoupError, match="i/n"):
        Shard.parse(text)


def test_the_legal_range_is_named():
    with pytest.raises(RecoupError, match="shard 4/4: must be i/n with 0 <= i < n, here 0/4 to 3/4"):
        Shard.parse("4/4")
    with pytest.raises(RecoupError, match="shard 0/0: must be i/n with 0 <= i < n, such as 0/4"):
        Shard.parse("0/0")
