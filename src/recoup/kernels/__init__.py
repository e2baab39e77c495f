"""How fast kernels are built and run, whatever they compute."""
