"""Triton kernels. Each module here needs triton and is imported only when it is chosen."""
