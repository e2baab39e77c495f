"""Claim: the kernels are as fast as in an earlier version: one run of a speed script, both versions call by call.

Two processes run the same script, each on its own checkout; whenever the script measures, they take turns: a call here,
the same call there, the order swapped every round, so that noise of the machine falls on both alike. What is compared
is the median, and the best, of a candidate's calls.

    git worktree add OTHER COMMIT
    python benchmarks/versions.py OTHER lba_speed --threads 1
"""

import argparse
import json
import math
import os
import runpy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE))


class Side:
    """One checkout's process, as the driver sees it: it announces a call, is let go, and tells its seconds."""

    def __init__(self, root: Path, script: str, options: list[str]):
        ours, theirs = os.pipe(), os.pipe()
        self.out: TextIO = os.fdopen(theirs[0])
        self.to: TextIO = os.fdopen(ours[1], "w", buffering=1)
        command = [sys.executable, str(Path(__file__).resolve()), "--side", f"{ours[0]},{theirs[1]}", str(root), script]
        paths = os.pathsep.join([str(root / "src"), str(root)])
        self.process = subprocess.Popen(
            [*command, *options],
            cwd=root,
            env={**os.environ, "PYTHONPATH": paths},
            pass_fds=(ours[0], theirs[1]),
            stdout=subprocess.DEVNULL,
        )
        os.close(ours[0])
        os.close(theirs[1])

    def announced(self) -> list[Any] | None:
        """The next call's measurement, round and candidate; None at the end."""
        line = self.out.readline()
        return json.loads(line) if line else None

    def seconds(self) -> float:
        """Let the call go and wait for it."""
        self.to.write("go\n")
        return json.loads(self.out.readline())


def taking_turns(reads: int, writes: int) -> Callable[..., dict[str, list[float]]]:
    """`measure.interleaved`, every call of which waits for its turn."""
    turn, tell = os.fdopen(reads), os.fdopen(writes, "w", buffering=1)
    measurements = 0

    def interleaved(
        variants: Mapping[str, Callable[[], object]],
        rounds: int = 9,
        warmup: int = 2,
        clock: Callable[[], float] = time.perf_counter,
    ) -> dict[str, list[float]]:
        nonlocal measurements
        measurements += 1
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for index in range(-warmup, rounds):
            for name, run in variants.items():
                tell.write(json.dumps([measurements, index, name]) + "\n")
                turn.readline()
                start = clock()
                run()
                taken = clock() - start
                tell.write(json.dumps(taken) + "\n")
                if index >= 0:
                    seconds[name].append(taken)
        return seconds

    return interleaved


def side(pipes: str, root: Path, script: str, options: list[str]) -> None:
    """One of the two processes: the script as it stands, with measuring in turns and nothing saved."""
    sys.path[:] = [str(root), str(root / "src"), *(p for p in sys.path if p != str(HERE))]
    from benchmarks import measure

    measure.interleaved = taking_turns(*map(int, pipes.split(",")))
    measure.save = lambda *_: root
    sys.argv = [f"{script}.py", *options]
    runpy.run_path(str(root / "benchmarks" / f"{script}.py"), run_name="__main__")


def compare(before: Side, now: Side) -> dict[tuple[int, str], tuple[list[float], list[float]]]:
    """Seconds of every candidate, before and now."""
    found: dict[tuple[int, str], tuple[list[float], list[float]]] = {}
    while (here := now.announced()) is not None:
        if (there := before.announced()) != here:
            raise SystemExit(f"the scripts differ: {here} here, {there} there")
        measurement, index, name = here
        order = (before, now) if index % 2 else (now, before)
        taken = {id(one): one.seconds() for one in order}
        if index >= 0:
            both = found.setdefault((measurement, name), ([], []))
            both[0].append(taken[id(before)])
            both[1].append(taken[id(now)])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("before", type=Path, help="a checkout of the earlier version")
    parser.add_argument("script", help="a speed script of both, as in lba_speed")
    arguments, options = parser.parse_known_args()
    root = arguments.before.resolve()
    found = compare(Side(root, arguments.script, options), Side(HERE, arguments.script, options))
    rows, ratios = [], []
    for (measurement, name), (old, new) in found.items():
        median, best = statistics.median(new) / statistics.median(old), min(new) / min(old)
        ratios.append(median)
        rows.append({"measurement": measurement, "name": name, "before": old, "now": new})
        print(f"{measurement:3} {name:40} {statistics.median(old):.3e} s, now {median:6.3f} (best {best:6.3f})")
    mean = math.exp(statistics.mean(map(math.log, ratios)))
    print(f"geometric mean of the medians' ratios: {mean:.3f}")
    from benchmarks.measure import save

    save(f"versions_{arguments.script}", {"options": options, "geometric_mean": mean, "rows": rows})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        side(sys.argv[2], Path(sys.argv[3]), sys.argv[4], sys.argv[5:])
    else:
        main()
