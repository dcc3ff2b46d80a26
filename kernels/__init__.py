"""Triton kernels and their launch plans; nothing here knows of torch.library or FX."""
