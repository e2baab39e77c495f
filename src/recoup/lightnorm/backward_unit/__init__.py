"""LightNorm's backward unit in gates: sums, a divider, the extrema's gradients and lanes, joined into one."""
