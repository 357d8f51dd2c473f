"""Build and load the C++ and CUDA kernels of csrc."""
