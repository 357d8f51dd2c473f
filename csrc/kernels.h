// What the library takes from the kernels of one instruction set.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>

#include "ema_update.cuh"

namespace byola {

// Updates the elements `from` to `to` - 1 of one target.
using EmaMove = void (*)(void* target, const void* online, int64_t from, int64_t to, double decay);

struct Kernels {
  const char* name;
  void (*add_ops)(torch::stable::detail::StableLibrary& library);
  EmaMove (*ema_move)(ema::Kind kind);
  void (*exp_)(float* values, int64_t count);  // in place, for tests
  void (*log_positive_)(float* values, int64_t count);
};

namespace avx512 {
Kernels kernels();
}
namespace avx2 {
Kernels kernels();
}
namespace portable {
Kernels kernels();
}

}  // namespace byola
