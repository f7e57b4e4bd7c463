"""Arrays whose memory fills itself."""

from userfault.arrays._memory_of import memory_of
from userfault.arrays._new import empty, zeros
from userfault.arrays._open import open
from userfault.arrays._tensors import TensorFile

__all__ = ["TensorFile", "empty", "memory_of", "open", "zeros"]
