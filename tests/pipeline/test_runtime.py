"""The runtime equals the simulator, in one process and over gloo, killed and resumed; and says who failed."""

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
from recoup.pipeline.runtime import Plan, run, run_local, ticks

STAGES = [["0"], ["1.0"], ["1.1"], ["2"], ["3"]]
COUNT = 40

PROGRAM = """
import os, signal, sys, time
import torch, torch.distributed as dist
from recoup.errors import RecoupError
from recoup.pipeline.runtime import initialize, run
from tests.pipeline.test_runtime import network, plan, rate, samples

folder, mitigations, fault = sys.argv[1], sys.argv[2].split(","), sys.argv[3]
torch.set_num_threads(1)
initialize()
rank, attempt = dist.get_rank(), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
VICTIMS = [(0, 23), (3, 27), (1, 33)]  # rank and update, of every attempt


def faulty(k):
    if fault == "kill" and attempt < 3 and VICTIMS[attempt] == (rank, k):
        open(f"{folder}/killed-{rank}", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "stop" and rank == 1 and k == 9:
        os.kill(os.getpid(), signal.SIGSTOP)
    return rate(k)


data = [(x * float("nan") if fault == "nan" and k == 5 else x, y) for k, (x, y) in enumerate(samples())]
for mitigation in mitigations:
    net = network()
    try:
        checkpoints = f"{folder}/checkpoints" if fault == "kill" else None
        made = plan(net, mitigation, lr=faulty)
        metrics = run(made, data, folder=checkpoints, every=6, timeout=12 if fault in ("stop", "nan") else 60)
    except RecoupError as error:
        print(f"rank {rank}: {error}", flush=True)
        if fault == "nan" and rank == 2:
            time.sleep(60)  # who raises and does not end must not keep the others
        os._exit(7)
    torch.save([net.state_dict(), metrics.losses, metrics.samples, metrics.rate], f"{folder}/{mitigation}-{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def samples():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(1, 6, generator=generator), torch.randint(4, (1,), generator=generator)) for _ in range(COUNT)]


def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Sequential(nn.Linear(6, 8), nn.Tanh()),
        nn.Sequential(nn.Linear(8, 8), nn.GroupNorm(2, 8), nn.ReLU()),
        nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.2)),
        nn.Linear(8, 4),
    )


def rate(k):
    return 0.05 / (1 + 0.02 * k)


def plan(model, mitigation, momentum=0.9, **changes):
    values = {"model": model, "stages": STAGES, "delays": delays(5), "lr": rate, "momentum": momentum}
    return Plan(**{**values, "weight_decay": 1e-3, "mitigation": mitigation, **changes})


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


def torchrun(folder: Path, processes: int, mitigations: str, fault: str, restarts: int = 0):
    (folder / "program.py").write_text(PROGRAM)
    options = ["--standalone", "--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
    root = Path(__file__).parents[2]
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *options,
            str(folder / "program.py"),
            str(folder),
            mitigations,
            fault,
        ],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_equal_the_simulator(processes, tmp_path):
    done = torchrun(tmp_path, processes, ",".join(NAMES), "none")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "warn" not in done.stderr.lower()
    for mitigation in NAMES:
        state, losses = simulated(mitigation)
        for rank in range(processes):
            found, measured, count, speed = torch.load(tmp_path / f"{mitigation}-{rank}.pt", weights_only=True)
            assert same(found, state)
            assert measured == (losses if rank == processes - 1 else [])
            assert count == COUNT
            assert speed > 0


def test_killed_ranks_are_restarted_and_end_with_the_same_weights(tmp_path):
    done = torchrun(tmp_path, 4, "lwpw+sc", "kill", restarts=3)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert {path.name for path in tmp_path.glob("killed-*")} == {"killed-0", "killed-1", "killed-3"}
    state, losses = simulated("lwpw+sc")
    for rank in range(4):
        found, measured, count, _ = torch.load(tmp_path / f"lwpw+sc-{rank}.pt", weights_only=True)
        assert same(found, state)
        assert measured == (losses if rank == 3 else [])
        assert 0 < count < 20  # what was left to do
    assert len(list((tmp_path / "checkpoints").glob("rank*.pt"))) == 4


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("stop", {0: "rank 1: it died, or is stuck for more than 12 s", 2: "rank 1: it died, or is stuck for more"}),
        (
            "nan",
            {
                1: "rank 2: it died, or is stuck for more than 12 s",
                0: "rank 1: it died, or is stuck for more than 12 s",
                2: "the loss of step 5 (rank 2, the last stage) is nan: what came from rank 1 is not finite, so the "
                "fault is before stage 4; nothing was updated",
            },
        ),
    ],
)
def test_a_rank_that_is_stuck_or_raises_is_an_error_on_the_others_in_time(fault, told, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    root = Path(__file__).parents[2]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "WORLD_SIZE": "3"}
    shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    outputs = [(tmp_path / f"out-{rank}").open("w") for rank in range(3)]
    running = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "program.py"), str(tmp_path), "stash", fault],  # no slow first check
            cwd=root,
            env={**shared, "RANK": str(rank)},
            stdout=outputs[rank],
        )
        for rank in range(3)
    ]
    try:
        for rank in told:
            if (fault, rank) != ("nan", 2):
                assert running[rank].wait(120) == 7
            assert f"rank {rank}: pipeline: " in (text := (tmp_path / f"out-{rank}").read_text())
            assert told[rank] in text
    finally:
        for process in running:
            process.kill()
            process.wait()
        for output in outputs:
            output.close()


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
