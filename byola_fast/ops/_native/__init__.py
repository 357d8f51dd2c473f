"""The C++ and CUDA kernels of csrc: building and loading them."""
