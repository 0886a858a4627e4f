"""The process's memory: what malloc does with what is freed."""

from fastxm import _C


def keep_freed_memory() -> bool:
    """Lets the process keep the memory that it frees, for good; False where malloc is not glibc's.

    glibc returns large blocks at once, and every page of them is faulted in again when the next
    training step asks for them: a fifth of a small model's step on a CPU. Before 2.35 it can keep
    no block of more than 32 MiB.
    """
    return bool(_C.keep_freed_memory())
