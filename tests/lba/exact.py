"""The unit in fractions, one scalar at a time: written from the specification, shares nothing with the package."""

from fractions import Fraction


def exponent(x):
    """floor(log2 |x|) of a Fraction that is not zero."""
    n, d = abs(x.numerator), x.denominator
    e = n.bit_length() - d.bit_length()
    return e if (Fraction(2) ** e) <= abs(x) else e - 1


def whole_nearest(x):
    """The nearest integer, ties to even."""
    low = x.numerator // x.denominator
    rest = x - low
    if rest > Fraction(1, 2) or (rest == Fraction(1, 2) and low % 2):
        return low + 1
    return low


def largest(f):
    return Fraction(f.largest_value)


def quantise(x, f, underflow):
    """Q of a Fraction for a Float format with truncation or rounding to nearest."""
    if x == 0:
        return Fraction(0)
    sign, size = (1 if x > 0 else -1), abs(x)
    e = exponent(x)
    smallest = Fraction(2) ** f.min_exponent
    if underflow and not f.subnormals and size < smallest:
        return Fraction(0)
    if underflow and f.subnormals:
        e = max(e, f.min_exponent)
    quantum = Fraction(2) ** (e - f.mantissa)
    units = size / quantum
    units = units.numerator // units.denominator if f.rounding == "zero" else whole_nearest(units)
    return sign * min(units * quantum, largest(f))


def integer(x, f, scale):
    units = whole_nearest(x / Fraction(scale))
    low, high = -(2 ** (f.bits - 1)), 2 ** (f.bits - 1) - 1
    units = max(low, min(high, units)) if f.overflow == "saturate" else (units - low) % 2**f.bits + low
    return units * Fraction(scale)


def is_int(f):
    return type(f).__name__ == "Int"


def q(x, f, config):
    return integer(x, f, config.scale) if is_int(f) else quantise(x, f, config.underflow)


def over(total, f, config):
    if is_int(f):
        units = whole_nearest(total / Fraction(config.scale))
        return not -(2 ** (f.bits - 1)) <= units <= 2 ** (f.bits - 1) - 1
    return abs(total) >= largest(f)


def dot(xs, ws, config):
    """One output: its value, and per term and chunk what happened (see `indicator`)."""
    xs, ws = [Fraction(x) for x in xs], [Fraction(w) for w in ws]
    chunk = config.chunk or max(len(xs), 1)
    outer_format = config.promotion if config.promotion is not None else config.accumulator
    y, terms, outers = Fraction(0), [], []
    for start in range(0, len(xs), chunk):
        s = Fraction(0)
        for x, w in zip(xs[start : start + chunk], ws[start : start + chunk], strict=True):
            p = x * w
            saturated = config.product is not None and abs(p) >= largest(config.product)
            if config.product is not None:
                p = quantise(p, config.product, config.underflow)
            after = q(p + s, config.accumulator, config)
            terms.append((not over(p + s, config.accumulator, config), after != s, not saturated))
            s = after
        after = q(s + y, outer_format, config)
        outers.append((not over(s + y, outer_format, config), after != y))
        y = after
    return y, terms, outers


def indicators(terms, outers, config):
    """I_i of every term by the config's gradient."""
    kind, K = config.gradient, len(terms)
    if kind == "identity":
        return [1] * K
    column = 0 if kind.endswith("_of") else 1
    chunk = config.chunk or K
    result = []
    for i in range(K):
        c = i // chunk
        if kind.startswith("immediate"):
            passes = terms[i][column] and outers[c][column]
        else:
            inner = all(t[column] for t in terms[i : min((c + 1) * chunk, K)])
            passes = inner and all(o[column] for o in outers[c:])
        if column == 0:
            passes = passes and terms[i][2]
        result.append(int(passes))
    return result


def matmul(a, b, config):
    """Rows a and columns of b as nested lists of floats -> nested list of Fractions."""
    columns = list(zip(*b, strict=True))
    return [[dot(row, column, config)[0] for column in columns] for row in a]


def gradients(a, b, grad, config):
    """Gradients of a and b for grad, as nested lists of Fractions."""
    M, K, N = len(a), len(b), len(b[0])
    ga = [[Fraction(0)] * K for _ in range(M)]
    gb = [[Fraction(0)] * N for _ in range(K)]
    for m in range(M):
        for n in range(N):
            column = [b[k][n] for k in range(K)]
            _, terms, outers = dot(a[m], column, config)
            for k, live in enumerate(indicators(terms, outers, config)):
                ga[m][k] += Fraction(grad[m][n]) * Fraction(b[k][n]) * live
                gb[k][n] += Fraction(grad[m][n]) * Fraction(a[m][k]) * live
    return ga, gb
