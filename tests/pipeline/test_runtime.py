"""The runtime is the simulator: in one process, over shared memory and gloo, killed and resumed; who failed is told."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from recoup.errors import RecoupError
from recoup.pipeline import Simulator, delays
from recoup.pipeline.mitigation import NAMES
from recoup.pipeline.runtime import run, run_local, ticks
from tests.fresh import Done, Fresh
from tests.pipeline.ranks import COUNT, PATIENCE, STAGES, elastic, network, plan, rate, samples, work


def simulated(mitigation):
    model = network()
    simulator = Simulator(model, STAGES, delays(5), rate, 0.9, 1e-3, mitigation)
    return model.state_dict(), [simulator.step(x, y) for x, y in samples()]


def same(state, other):
    return list(state) == list(other) and all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("mitigation", NAMES)
def test_ranks_in_one_process_equal_the_simulator(mitigation, ranks):
    state, losses = simulated(mitigation)
    model = network()
    metrics = run_local(plan(model, mitigation), samples(), ranks)
    assert same(model.state_dict(), state)
    assert metrics.losses == losses
    assert metrics.scheduled == COUNT / (COUNT + 2 * ranks - 2)
    assert 0 < metrics.utilisation <= 1
    assert metrics.samples == COUNT


def torchrun(folder: Path) -> subprocess.CompletedProcess:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.pipeline.ranks"]
    return subprocess.run(
        [sys.executable, *command, str(folder), ",".join(NAMES), "none"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def agent(folder: Path) -> Done:
    return Fresh(elastic, 4, 0, str(folder), ",".join(NAMES), "machines").wait()


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "start"), [(2, torchrun), (4, agent)])
def test_processes_equal_the_simulator(ranks, start, tmp_path):
    done = start(tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "warn" not in done.stderr.lower()
    for mitigation in NAMES:
        state, losses = simulated(mitigation)
        for rank in range(ranks):
            found, measured, count, speed = torch.load(tmp_path / f"{mitigation}-{rank}.pt", weights_only=True)
            assert same(found, state)
            assert measured == (losses if rank == ranks - 1 else [])
            assert count == COUNT
            assert speed > 0


@pytest.mark.slow
def test_killed_ranks_are_restarted_and_go_on_over_others_with_the_same_weights(tmp_path):
    """Four ranks are restarted, killed again and fail; two go on, are killed and restarted, and end."""
    failed = Fresh(elastic, 4, 2, str(tmp_path), "lwpw+sc", "kill").wait()
    assert failed.returncode
    assert not list(tmp_path.glob("*.pt"))
    done = Fresh(elastic, 2, 2, str(tmp_path), "lwpw+sc", "kill again").wait()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert {path.name for path in tmp_path.glob("killed-*")} == {"killed-0", "killed-1", "killed-3"}
    state, losses = simulated("lwpw+sc")
    for rank in range(2):
        found, measured, count, _ = torch.load(tmp_path / f"lwpw+sc-{rank}.pt", weights_only=True)
        assert same(found, state)
        assert measured == (losses if rank == 1 else [])
        assert 0 < count < 20  # what was left to do
    assert len(list((tmp_path / "checkpoints").glob("rank*.pt"))) == 2


SILENT = f"it died, or is stuck for more than {PATIENCE} s"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("stop", {0: f"rank 1: {SILENT}", 2: f"rank 1: {SILENT}"}),
        (
            "nan",
            {
                1: f"rank 2: {SILENT}",
                0: f"rank 1: {SILENT}",
                2: "the loss of step 5 (rank 2, the last stage) is nan: what came from rank 1 is not finite, so the "
                "fault is before stage 4; nothing was updated",
            },
        ),
    ],
)
def test_a_rank_that_is_stuck_or_raises_is_an_error_on_the_others_in_time(fault, told, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "3"}
    # "stash" alone, as its first check is quick.
    running = [Fresh(work, str(tmp_path), "stash", fault, env={**shared, "RANK": str(rank)}) for rank in range(3)]
    try:
        for rank in told:
            done = running[rank].wait(120) if (fault, rank) != ("nan", 2) else running[rank].told()
            assert done.returncode in (7, None), done.stderr[-3000:]
            assert f"rank {rank}: pipeline: " in done.stdout
            assert told[rank] in done.stdout
    finally:
        for process in running:
            process.end()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_fewer_samples_than_the_pipeline_holds(count):
    model, other = network(), network()
    metrics = run_local(plan(model, "lwpv+sc"), samples()[:count], 4)
    simulator = Simulator(other, STAGES, delays(5), rate, 0.9, 1e-3, "lwpv+sc")
    assert metrics.losses == [simulator.step(x, y) for x, y in samples()[:count]]
    assert same(model.state_dict(), other.state_dict())


def repeated():
    """One activation used twice."""
    torch.manual_seed(4)
    act = nn.Tanh()
    return nn.Sequential(nn.Linear(6, 8), act, nn.Linear(8, 8), act, nn.Linear(8, 4))


@pytest.mark.parametrize("cut", [[2, 2, 1], [1, 2, 2], [4, 1]])
def test_a_module_that_occurs_twice(cut):
    model, other = repeated(), repeated()
    how = {"stages": [["0"], ["2"], ["4"]], "delays": delays(3)}
    run_local(plan(model, "sc", cut=cut, **how), samples(), len(cut))
    simulator = Simulator(other, [["0"], ["2"], ["4"]], delays(3), rate, 0.9, 1e-3, "sc")
    for x, y in samples():
        simulator.step(x, y)
    assert same(model.state_dict(), other.state_dict())


def test_bad_plans():
    with pytest.raises(RecoupError, match="4 children of the model cannot feed 5 ranks"):
        run_local(plan(network(), "none"), samples(), 5)
    with pytest.raises(RecoupError, match=r"the model is a str; it must be an nn\.Module"):
        run_local(plan("linear", "none"), samples(), 1)
    with pytest.raises(RecoupError, match="is 2 updates late, and a stage in it has a delay of 1"):
        run_local(plan(network(), "none", delays=[1] * 5), samples(), 2)
    with pytest.raises(RecoupError, match=r"stage 1 \(1, 2\) has modules in ranks \[0, 1\]"):
        run_local(plan(network(), "none", stages=[["0"], ["1", "2"], ["3"]], delays=[4, 2, 0]), samples(), 2)
    with pytest.raises(RecoupError, match="the cut must give each of the 2 ranks"):
        run_local(plan(network(), "none", cut=[4, 1]), samples(), 2)
    with pytest.raises(RecoupError, match="3 stages leave rank 1 of 4 without one"):
        plan(repeated(), "none", stages=[["0"], ["2"], ["4"]], delays=[9, 9, 9], cut=[1, 1, 2, 1]).check(4)
    only = nn.Sequential(nn.Linear(6, 4), nn.Tanh())
    with pytest.raises(RecoupError, match=r"no parameter of rank 1 of 2 \(children 1\) requires a gradient"):
        run_local(plan(only, "none", stages=[["0"], ["1"]], delays=[2, 0]), samples(), 2)
    with pytest.raises(RecoupError, match="there are no samples to train on"):
        run_local(plan(network(), "none"), [], 2)
    broken = [(x if k != 3 else x * torch.nan, y) for k, (x, y) in enumerate(samples())]
    with pytest.raises(RecoupError, match="the loss of step 3"):
        run_local(plan(network(), "none"), broken, 2)
    with pytest.raises(RecoupError, match="is not initialized"):
        run(plan(network(), "none"), samples())


def test_a_custom_cut_and_ticks():
    state, _ = simulated("sc")
    model = network()
    run_local(plan(model, "sc", cut=[3, 1]), samples(), 2)
    assert same(model.state_dict(), state)
    assert ticks(10, 4) == 16
