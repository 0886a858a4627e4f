"""The four rooms: fused operations with a plain formula behind each."""

from fastxm.ops.dispatch import backend

__all__ = ["backend"]
