"""What the operators call on the CPU; gpu.py has the same names."""

from recoup.lba.cpu import convolution, matmul
from recoup.lba.cpu_gradient import convolution_gradients, gradients

__all__ = ["convolution", "convolution_gradients", "gradients", "matmul"]
