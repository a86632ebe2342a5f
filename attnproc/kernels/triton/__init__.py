"""Fused kernels in Triton, one file each; what they compute stands in plain torch elsewhere."""
