"""Recurrent layers for PyTorch: fused kernels over time, compiled by Numba, from cells written as one function."""
