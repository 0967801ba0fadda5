"""Derivatives by torch: the only room that calls `torch.func` and `torch.autograd`."""
