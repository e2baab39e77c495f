"""What `recoup silicon` prints: one table for all configs, each beside its counterparts."""

from collections.abc import Sequence
from typing import Any

from recoup.silicon.verify import COVERAGE

Row = dict[str, Any]


def table(action: str, rows: Sequence[Row]) -> str:
    """The table of an action."""
    return {"verilog": _written, "verify": _verified, "area": _areas, "energy": _energies}[action](rows)


def _written(rows: Sequence[Row]) -> str:
    return "\n".join(f"{row['module']}: {', '.join(row['files'])}; latency {row['latency']}" for row in rows)


def _verified(rows: Sequence[Row]) -> str:
    head = ("config", "vectors", "mismatches", "faults", "redundant", "shown", "")
    body = [
        (
            row["config"],
            f"{row['vectors']:,}" + (" (all)" if row["exhaustive"] else ""),
            f"{row['mismatches']:,}",
            f"{row['faults']:,}",
            f"{len(row['redundant']):,}",
            "" if row["coverage"] is None else f"{row['coverage']:.2%}",
            row["verdict"],
        )
        for row in rows
    ]
    told = [_counterexample(row) for row in rows if row["counterexample"]]
    dull = [row["config"] for row in rows if not row["ok"] and not row["mismatches"]]
    if dull:
        named = ", ".join(dull)
        told.append(f"{named}: nothing differed, but the vectors show fewer than {COVERAGE:.1%} of the faults")
    return "\n".join([*_aligned([head, *body]), *told, rows[0]["tool"]])


def _counterexample(row: Row) -> str:
    found = row["counterexample"]
    return (
        f"{row['config']}: {found['port']} in step {found['step']} is {found['got']}, expected {found['expected']}; "
        f"operands {found['operands']}"
    )


def _areas(rows: Sequence[Row]) -> str:
    timed = "delay" in rows[0]
    head = ("config", "module", rows[0]["unit"], "per op", "NAND2", "registers", *(["delay ns"] if timed else []))
    body = [
        (
            *_labels(rows, row),
            f"{row['area']:,.0f}",
            _share(rows, row, lambda one: one["area"] / one["work"]),
            f"{row['nand2']:,.0f}",
            f"{row['registers'] / row['area']:.0%}",
            *([f"{row['delay']['ns']:.2f}"] if timed else []),
        )
        for row in rows
    ]
    said = "per op: area an operation, the config's own = 1"
    return "\n".join([*_aligned([head, *body], texts=2), said, _made(rows)])


def _energies(rows: Sequence[Row]) -> str:
    head = ("config", "module", "fJ a cycle", "fJ an op", "per op", "gated", "clock", "registers", "logic")
    body = [
        (
            *_labels(rows, row),
            f"{row['step']:,.0f}",
            f"{row['operation']:,.0f}",
            _share(rows, row, lambda one: one["operation"]),
            *(f"{row[name]:,.0f}" for name in ("gated", "clock", "registers", "logic")),
        )
        for row in rows
    ]
    kind = "without glitches: a lower bound" if rows[0]["lower_bound"] else "with glitches"
    said = f"per op: energy an operation, the config's own = 1; {kind}; wires {rows[0]['wires']}"
    return "\n".join([*_aligned([head, *body], texts=2), said, _made(rows)])


def _own(rows: Sequence[Row], row: Row) -> Row:
    """The row of the config that a counterpart stands beside."""
    return next(other for other in rows if other["config"] == row["config"])


def _labels(rows: Sequence[Row], row: Row) -> tuple[str, str]:
    return (row["config"] if _own(rows, row) is row else "", row["module"])


def _share(rows: Sequence[Row], row: Row, cost: Any) -> str:
    return f"{cost(row) / cost(_own(rows, row)):.2f}x"


def _made(rows: Sequence[Row]) -> str:
    """The tools, and the library by the beginning of its sha256."""
    library = ", ".join(f"{name} sha256 {digest[:12]}" for name, digest in rows[0]["liberty"])
    return f"{rows[0]['tool']}; {library or 'plain gates'}"


def _aligned(lines: Sequence[Sequence[str]], texts: int = 1) -> list[str]:
    """Columns of one width, the first ``texts`` of them to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
