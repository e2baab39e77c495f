"""CONTRIBUTING's map as a picture, drawn from the floors that the architecture test enforces.

python scripts/draw_map.py     # writes docs/images/map.svg; a test holds the file against this script
"""

import sys
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.architecture.tree import Tree
from tests.test_architecture import FLOORS, FOLDER, WINGS

TARGET = Path(__file__).resolve().parents[1] / "docs" / "images" / "map.svg"
LETTER, HIGH, GAP, EDGE = 7.6, 30, 10, 16
STYLE = """
text { font: 13px ui-monospace, monospace; fill: #1f2430 } .floor { fill: #eef1f6 } .room { fill: #fff;
stroke: #8a93a6 } .wing { fill: #dfe8ff; stroke: #4a63b5 } .note { font: 12px system-ui, sans-serif; fill: #5a6272 }
@media (prefers-color-scheme: dark) {
 text { fill: #e6e9f0 } .floor { fill: #262b36 } .room { fill: #1b1f28; stroke: #6d7689 } .wing { fill: #2b3a66 }
 .note { fill: #a4adbd } }
"""


def floors() -> list[list[str]]:
    """The rooms of every floor that has any, from the top."""
    there = {source.room for source in Tree.of_folder(FOLDER).values()}
    return [sorted(floor & there) for floor in reversed(FLOORS) if floor & there]


def width(room: str) -> float:
    """Of a room's box."""
    return round(len(room) * LETTER + 20, 1)


def drawn() -> str:
    """The picture: a band a floor, a box a room, the ground at the bottom."""
    rows = floors()
    across = max(sum(map(width, row)) + GAP * (len(row) - 1) for row in rows) + 2 * EDGE
    down = len(rows) * (HIGH + 2 * GAP) + 44
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across:g} {down:g}" width="{across:g}" role="img">',
        f"<title>The floors of recoup</title><style>{STYLE}</style>",
    ]
    for number, row in enumerate(rows):
        top = number * (HIGH + 2 * GAP) + 4
        parts.append(f'<rect class="floor" x="0" y="{top}" width="{across:g}" height="{HIGH + 2 * GAP - 6}" rx="6"/>')
        left = (across - sum(map(width, row)) - GAP * (len(row) - 1)) / 2
        for room in row:
            kind, wide = ("wing" if room in WINGS else "room"), width(room)
            box = f'x="{left:.1f}" y="{top + GAP - 3}" width="{wide:g}" height="{HIGH}" rx="4"'
            middle = f'x="{left + wide / 2:.1f}" y="{top + GAP + 17}" text-anchor="middle"'
            parts.append(f'<rect class="{kind}" {box}/><text {middle}>{escape(room)}</text>')
            left += width(room) + GAP
    note = "Imports point down or along a floor, never in a circle; a wing (blue) imports no other wing."
    parts.append(f'<text class="note" x="{across / 2:g}" y="{down - 16:g}" text-anchor="middle">{note}</text></svg>\n')
    return "\n".join(parts)


if __name__ == "__main__":
    TARGET.write_text(drawn(), "utf-8")
