"""Equations of docstrings as HTML: what is typed in ASCII, set with indices, powers and Greek letters, in its layout.

Nothing is loaded for it, and a docstring reads as well in a terminal as before. Words, and what stands in backticks,
stay as they are.

    python -m scripts.equations "s_i = Q_acc(x_i w_i + s_{i-1})"
"""

import re
import sys
import unicodedata
from html import escape

NAMES = {name: name for name in ("alpha", "beta", "gamma", "eta", "mu", "nu", "psi", "tau")} | {"eps": "epsilon"}
GREEK = {typed: unicodedata.lookup(f"Greek small letter {name}") for typed, name in NAMES.items()}
SIGNS = {"<=": "≤", ">=": "≥", "<-": "←", "+-": "±", " - ": " \N{MINUS SIGN} ", "->": "→"}
WORD = re.compile(rf"(?<![A-Za-z_`])({'|'.join(GREEK)})(?![A-Za-z])")
INDEX = re.compile(r"((?<![A-Za-z])[^\W\d_]'?|(?<![A-Za-z])[A-Za-z]{2,}|\))_(\w+'?|\{[^}]*\}|\([^()]*\))")


def equation(text: str) -> str:
    """A block of equations as one element of HTML."""
    return f'<pre class="equation">{"".join(map(_part, re.split(r"(`[^`]*`)", text)))}</pre>'


def _part(text: str) -> str:
    if text.startswith("`"):
        return f"<code>{escape(text[1:-1])}</code>"
    text = re.sub(r"<([^<>=]+, [^<>=]+)>", r"⟨\1⟩", text)
    for typed, sign in SIGNS.items():
        text = text.replace(typed, sign)
    text = WORD.sub(lambda found: GREEK[found[1]], text)
    text = re.sub(r"\bxhat\b", "x\N{COMBINING CIRCUMFLEX ACCENT}", text)
    text = re.sub(r"\bsqrt(?=\()", "√", text)
    text = re.sub(r"\bsum(?=_[a-z]\b| [a-z]_)", "Σ", text)
    return _powers(INDEX.sub(_index, escape(text, quote=False)))


def _index(found: re.Match[str]) -> str:
    base, index = found[1], found[2]
    if len(base) > 1 and base[-1] != "'" and index[0] not in "{(" and len(index) > 1:
        return found[0]  # a field's name, such as min_exponent
    return f"{base}<sub>{index.strip('{}()')}</sub>"


def _powers(text: str) -> str:
    """``a^b``, with b a word, a number, a call or what brackets hold, as a superscript; the innermost are set first."""
    while (place := text.rfind("^")) >= 0:
        head = re.compile(r"-?[\w.']*").match(text, place + 1)
        assert head is not None
        end = _closed(text, head.end()) if text[head.end() : head.end() + 1] == "(" and _calls(head[0]) else head.end()
        power = text[place + 1 : end]
        whole = power.startswith("(") and power.endswith(")")
        text = f"{text[:place]}<sup>{power[1:-1] if whole else power}</sup>{text[end:]}"
    return text


def _calls(head: str) -> bool:
    """Whether a bracket after it belongs to the power: 2^(n - 1) and 2^ceil(n), not 2^e (1 + f)."""
    return not head or (len(head) > 1 and head.isalpha())


def _closed(text: str, start: int) -> int:
    """Where the bracket that opens at ``start`` ends."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place + 1
    return len(text)


if __name__ == "__main__":
    print(equation(sys.argv[1]))
