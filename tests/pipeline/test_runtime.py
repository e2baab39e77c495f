"""The runtime equals the simulator, in one process and over gloo, killed and resumed; and says who failed."""

import os
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
import os, signal, sys
import torch, torch.distributed as dist
from torch import nn
from recoup.errors import RecoupError
from recoup.pipeline.runtime import initialize, run
from tests.pipeline.test_runtime import network, plan, samples

folder, mitigations, fault = sys.argv[1], sys.argv[2].split(","), sys.argv[3]
torch.set_num_threads(1)
initialize()
rank, first_try = dist.get_rank(), os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"


class Faulty:
    def __len__(self):
        return len(samples())

    def __getitem__(self, k):
        x, y = samples()[k]
        if fault == "kill" and k == 23 and rank == 0 and first_try:
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "nan" and k == 5:
            x = x * float("nan")
        if fault == "sleep" and k == 9 and rank == 0:
            import time
            time.sleep(60)
        return x, y


for mitigation in mitigations:
    net = network()
    try:
        made = plan(net, mitigation)
        if fault == "other" and not first_try:
            made = plan(net, mitigation, momentum=0.5)
        checkpoints = f"{folder}/checkpoints" if fault in ("kill", "other") else None
        metrics = run(made, Faulty(), folder=checkpoints, every=6, timeout=4 if fault == "sleep" else 30)
    except RecoupError as error:
        print(f"rank {rank}: {error}", flush=True)
        os._exit(7)
    torch.save([net.state_dict(), metrics.losses], f"{folder}/{mitigation}-{rank}.pt")
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
        nn.Sequential(nn.Linear(8, 8), nn.Tanh()),
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
    assert metrics.utilisation == COUNT / (COUNT + 2 * ranks - 2)


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
    for mitigation in NAMES:
        state, losses = simulated(mitigation)
        for rank in range(processes):
            found, measured = torch.load(tmp_path / f"{mitigation}-{rank}.pt", weights_only=True)
            assert same(found, state)
            assert measured == (losses if rank == processes - 1 else [])


def test_a_killed_rank_is_restarted_and_ends_with_the_same_weights(tmp_path):
    done = torchrun(tmp_path, 4, "lwpw+sc", "kill", restarts=2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "signal" in done.stderr.lower() or "SIGKILL" in done.stderr
    state, losses = simulated("lwpw+sc")
    for rank in range(4):
        found, measured = torch.load(tmp_path / f"lwpw+sc-{rank}.pt", weights_only=True)
        assert same(found, state)
        assert measured == (losses if rank == 3 else [])
    assert len(list((tmp_path / "checkpoints").glob("rank*.pt"))) == 4


def test_a_loss_that_is_no_number_names_sample_and_rank(tmp_path):
    done = torchrun(tmp_path, 2, "sc", "nan")
    assert done.returncode != 0
    assert "rank 1: pipeline: the loss of step 5 (rank 1, the last stage) is nan" in done.stdout


def test_a_silent_neighbour_is_an_error_in_time(tmp_path):
    done = torchrun(tmp_path, 2, "sc", "sleep")
    assert done.returncode != 0
    assert "could not receive from rank 0 within 4 s" in done.stdout


def test_bad_plans():
    with pytest.raises(RecoupError, match="4 children of the model cannot feed 5 ranks"):
        run_local(plan(network(), "none"), samples(), 5)
    with pytest.raises(RecoupError, match=r"needs an nn\.Sequential"):
        run_local(plan(nn.Linear(2, 2), "none", stages=[[""]], delays=[0]), samples(), 1)
    with pytest.raises(RecoupError, match="is 2 updates late, and a stage in it has a delay of 1"):
        run_local(plan(network(), "none", delays=[1] * 5), samples(), 2)
    with pytest.raises(RecoupError, match=r"stage 1 \(1, 2\) has modules in ranks \[0, 1\]"):
        run_local(plan(network(), "none", stages=[["0"], ["1", "2"], ["3"]], delays=[4, 2, 0]), samples(), 2)
    with pytest.raises(RecoupError, match="the cut must give each of the 2 ranks"):
        run_local(plan(network(), "none", cut=[4, 1]), samples(), 2)
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
