"""A GPU on the CPU: what the tests of the CUDA engine run on.

`runtime` runs CUDA threads as fibers.  The kernels get there in two ways: `ptx` translates what
NVIDIA's own compiler made of them, `shim.h` lets g++ compile the .cu itself.  `device` puts either
under the engine, in place of a GPU.
"""
