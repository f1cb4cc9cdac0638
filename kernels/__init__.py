"""Triton and CUDA kernels with their launchers: no autograd, no knowledge of models. `mfengine.ops` calls them."""
