"""LightNorm's units for norms of rows in gates: layer norms and RMS norms, a block of a row's features a cycle."""
