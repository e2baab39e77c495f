"""Hardware configurations as text: a preset's name or a configuration's repr, read without running anything."""

import ast
import re
from collections.abc import Callable
from typing import Any

from recoup.errors import RecoupError
from recoup.formats import Float, Int
from recoup.lba.config import LBA
from recoup.lightnorm.config import LightNorm
from recoup.nbsmt.config import NBSMT

Config = NBSMT | LBA | LightNorm

NBSMT_PRESETS: dict[str, NBSMT] = {"nbsmt-2t": NBSMT(threads=2), "nbsmt-4t": NBSMT(threads=4)}
LBA_PRESETS: dict[str, LBA] = {
    "lba-m7e4": LBA.m7e4(),
    "lba-m10e5": LBA.m10e5(),
    "lba-fp32": LBA.fp32(),
    "lba-hopper": LBA.hopper(),
    "lba-int16": LBA.int16(operands=Int(8)),
    "lba-int12": LBA.int12(operands=Int(4)),
}
LIGHTNORM_PRESETS: dict[str, LightNorm] = {
    "lightnorm": LightNorm(),
    "lightnorm-fp10": LightNorm.fp10(),
    "lightnorm-range": LightNorm.range(),
}
PRESETS: dict[str, Config] = {**NBSMT_PRESETS, **LBA_PRESETS, **LIGHTNORM_PRESETS}

# What a configuration's text may call, and nothing else.
CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    "NBSMT": NBSMT,
    "LBA": LBA,
    "LightNorm": LightNorm,
    "LightNorm.range": LightNorm.range,
    "LightNorm.fp10": LightNorm.fp10,
    "Float": Float,
    "Float.lba": Float.lba,
    "Float.ieee": Float.ieee,
    "Float.parse": Float.parse,
    "Int": Int,
    **{f"LBA.{name}": getattr(LBA, name) for name in ("biased", "m7e4", "m10e5", "fp32", "hopper", "int16", "int12")},
}
LONGEST, DEEPEST = 1000, 4  # characters and calls; Python's parser is not meant for hostile depth

_LEGAL = (
    f"a preset ({', '.join(PRESETS)}) or a repr such as NBSMT(threads=4, policy='S+A'), LBA.biased(7, 4) or "
    "LightNorm(block=8)"
)


def parse_config(text: str) -> Config:
    """The configuration that ``text`` names: a preset, or the repr of a config object.

    Only the constructors of configurations and formats are called, with plain values.

    Raises:
        RecoupError: anything else, and values the config itself refuses.

    >>> parse_config("nbsmt-4t")
    NBSMT(threads=4, policy='S+A', rounding='nearest', pairing='halves')
    >>> parse_config("LightNorm(forward=Float.parse('bfloat16'))").forward.bits
    16
    >>> parse_config("LBA(accumulator=Float.lba(4, 5, bias=10), chunk=None)").accumulator.bits
    10
    """
    name = text.strip()
    if name in PRESETS:
        return PRESETS[name]
    config = _built(_tree(name), text, DEEPEST)
    if not isinstance(config, Config):
        raise RecoupError(f"config {_short(text)}: must be {_LEGAL}")
    return config


def as_config(value: Any) -> Config:
    """A configuration from itself or its text; for recipes."""
    if isinstance(value, Config):
        return value
    if isinstance(value, str):
        return parse_config(value)
    raise RecoupError(f"config {_short(repr(value))}: must be {_LEGAL}")


def layer_option(text: str) -> tuple[str, str | None]:
    """NAME=CONFIG as a layer map's entry."""
    name, equals, config = _rpair(text)
    if not equals:
        raise RecoupError(f"--layers {text!r}: must be NAME=CONFIG, for example re:layer1.*=nbsmt-2t or fc=float")
    return name, None if config == "float" else config


def _rpair(text: str) -> tuple[str, str, str]:
    """Split at the '=' before the config: a config's own arguments hold '=' too, a regular expression may."""
    found = re.search(r"=(NBSMT|LBA|LightNorm)\b", text)
    if found:
        return text[: found.start()], "=", text[found.start() + 1 :]
    return text.rpartition("=")


def title(config: Config) -> str:
    """How tables call a configuration: what it is, and what differs from the defaults.

    >>> title(NBSMT(4, "S+Aw", "half_up"))
    '4 threads, S+Aw, rounding half_up'
    >>> title(LBA.biased(5, 5, chunk=64))
    'M5E5 (11 bits), chunk 64'
    >>> title(LightNorm(block=8, shared="max"))
    'LightNorm, FP10 1-5-4, blocks of 8, largest exponent shared'
    """
    if isinstance(config, LightNorm):
        return _norm_title(config)
    if isinstance(config, LBA):
        return _lba_title(config)
    plain = NBSMT()
    fields = [f for f in ("rounding", "pairing") if getattr(config, f) != getattr(plain, f)]
    extra = [f"{field} {getattr(config, field)}" for field in fields]
    threads = f"{config.threads} thread{'s' if config.threads > 1 else ''}"
    return ", ".join([threads, config.policy, *extra])


def _lba_title(config: LBA) -> str:
    total = config.accumulator
    if isinstance(total, Int):
        parts = [f"int{total.bits}, {'wraps' if total.overflow == 'wrap' else 'saturates'}"]
    else:
        exponent = (total.max_exponent - total.min_exponent).bit_length()
        parts = [f"M{total.mantissa}E{exponent} ({total.bits} bits)"]
        parts += [f"rounding {total.rounding}"] if total.rounding != "zero" else []
        expected = LBA.biased(total.mantissa, min(max(exponent, 1), 8), -total.min_exponent, chunk=config.chunk)
        parts += ["fused"] if config.product is None else []
        parts += ["own product format"] if config.product not in (None, expected.product) else []
    parts.append("no chunks" if config.chunk is None else f"chunk {config.chunk}")
    parts += ["without underflow"] if not config.underflow else []
    parts += ["promoted"] if config.promotion is not None else []
    if config.operands is not None:
        kind = config.operands
        parts.append(f"W/A {'int' + str(kind.bits) if isinstance(kind, Int) else f'FP{kind.bits}'}")
    return ", ".join(parts)


def _norm_title(config: LightNorm) -> str:
    plain = LightNorm()
    parts = ["LightNorm", _format_title(config.forward)]
    usual = plain.backward if config.forward == plain.forward else config.forward
    parts += [f"gradients {_format_title(config.backward)}"] if config.backward != usual else []
    expected = None if config.forward is None else plain.statistics
    parts += [f"statistics {_format_title(config.statistics)}"] if config.statistics != expected else []
    if config.block is not None:
        parts.append(f"blocks of {config.block}")
        parts += ["largest exponent shared"] if config.shared == "max" else []
    parts += [f"{config.chunks} chunk{'s' * (config.chunks > 1)}"] if config.chunks != plain.chunks else []
    parts += [f"scale {config.scale}"] if config.scale != plain.scale else []
    parts += ["non-finite values refused"] if config.nonfinite == "error" else []
    return ", ".join(parts)


def _format_title(form: Float | None) -> str:
    """A width, exponent and mantissa, and what is not usual in them: FP10 1-5-4."""
    if form is None:
        return "float"
    text = f"FP{form.bits} 1-{form.bits - 1 - form.mantissa}-{form.mantissa}"
    usual = form.min_exponent + form.max_exponent == 1
    text += "" if usual else f" 2^{form.min_exponent}..2^{form.max_exponent}"
    text += " to nearest" if form.rounding == "nearest" else ""
    text += " with subnormals" if form.subnormals else ""
    return text + (f" up to {form.largest_value:g}" if form.largest is not None else "")


def _tree(text: str) -> ast.expr:
    if len(text) > LONGEST:
        raise RecoupError(f"config {_short(text)}: longer than {LONGEST} characters; must be {_LEGAL}")
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise RecoupError(f"config {_short(text)}: must be {_LEGAL}{_unclosed(text)}") from None
    if not isinstance(tree, ast.Call):
        raise RecoupError(f"config {_short(text)}: must be {_LEGAL}")
    return tree


def _built(node: ast.expr, text: str, depth: int) -> Any:
    """The value of an expression of constructors and plain values."""
    if not isinstance(node, ast.Call):
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError):
            raise RecoupError(f"config {_short(text)}: arguments must be plain numbers or quoted strings") from None
    constructor = CONSTRUCTORS.get(ast.unparse(node.func))
    if constructor is None or depth == 0:
        inner = "arguments must be plain numbers or quoted strings, or formats such as Float.lba(4, 7, bias=10)"
        raise RecoupError(f"config {_short(text)}: {inner if depth < DEEPEST else 'must be ' + _LEGAL}")
    keywords = [keyword.arg for keyword in node.keywords]
    if None in keywords or len(set(keywords)) < len(keywords):
        raise RecoupError(f"config {_short(text)}: arguments must be given once, as name=value")
    positional = [_built(value, text, depth - 1) for value in node.args]
    named = {str(keyword.arg): _built(keyword.value, text, depth - 1) for keyword in node.keywords}
    try:
        return constructor(*positional, **named)
    except TypeError as error:  # an unknown or doubled argument, or a value of a type no field takes
        raise RecoupError(f"config {_short(text)}: {str(error).replace('.__init__', '')}") from None


def _unclosed(text: str) -> str:
    split = text.count("(") != text.count(")")
    return "; in a YAML list in brackets put it in double quotes, or the comma splits it" if split else ""


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
