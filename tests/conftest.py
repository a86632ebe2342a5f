"""What all suites share."""

import torch
from cases import stand_ins

__all__ = ["stand_ins"]

# The tensors are tiny; threads of several workers would only get in each other's way.
torch.set_num_threads(1)
