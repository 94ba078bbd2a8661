"""Triton kernels, imported as ``ood_fast.kernels``."""
