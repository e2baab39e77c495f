"""A network as recoup handles it: its emulated layers, selections of them, batches, modes, norms."""
