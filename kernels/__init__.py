"""Triton and CUDA kernels with their launchers, without autograd or models. `mfengine.ops` calls them."""
