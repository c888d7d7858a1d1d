"""Kernels of `linear_kd_loss` over rows of logits: the torch reference, and the CUDA fast path in Triton.

The tests compare the reference to the formula in float64, and the fast path to the reference.
"""
