// What the library takes from the kernels of one instruction set.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "ema_update.cuh"

namespace byola {

// Updates the elements `from` to `to` - 1 of one target.
using EmaMove = void (*)(void* target, const void* online, int64_t from, int64_t to, double decay);

using Tensor = torch::stable::Tensor;
using AugmentViews = Tensor(const Tensor& x, const std::optional<Tensor>& pool, const std::optional<Tensor>& bank,
                            const std::optional<Tensor>& bank_count, const std::optional<Tensor>& stats,
                            const Tensor& lam, const Tensor& bank_index, const Tensor& crop, const Tensor& fader,
                            const Tensor& rng, int64_t sample_offset, int64_t first_view,
                            const std::vector<int64_t>& canvas, const std::string& interpolation,
                            const std::string& mixup_name, Tensor out);

struct Kernels {
  const char* name;
  void (*add_ops)(torch::stable::detail::StableLibrary& library);
  AugmentViews* augment_views;
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

// Those of the best instruction set that the CPU has.
const Kernels& chosen();

// Registers what is compiled once, for all CPUs; ops/_native/cpu.py writes it.
void add_common_ops(torch::stable::detail::StableLibrary& library);

}  // namespace byola
