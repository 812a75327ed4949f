"""Triton kernels, each beside a plain torch twin with the same signature.

The twin is the specification, the fallback (CPU, Apple GPUs, float64) and the oracle of the tests.
"""
