"""Triton kernels, installed as fastxm.kernels."""
