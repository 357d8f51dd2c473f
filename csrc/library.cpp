// The library of the CPU kernels: chooses their instruction set, registers their ops, and checks the lists of
// ema_update_. It holds the only static initialisers, since it alone is compiled for every CPU; being linked first, it
// also gives every CPU its own copies of what other files instantiate of the standard library. No Python.
#include <torch/csrc/stable/ops.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#include "ema_lists.h"
#include "kernels.h"

namespace byola {

namespace {

// ATEN_CPU_CAPABILITY limits the choice, as it does PyTorch's.
Kernels choose() {
#ifdef BYOLA_X86
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has_avx512 && !(limit && std::string(limit) == "avx2") ? avx512::kernels() : avx2::kernels();
#else
  return portable::kernels();
#endif
}

}  // namespace

const Kernels& chosen() {
  static const Kernels kernels = choose();
  return kernels;
}

namespace {

// One parallel loop over the elements of all tensors: their sizes may differ by any factor. The dispatcher calls this
// only if all tensors are on the CPU. Not by the stable interface, whose handles of a thousand tensors take a third of
// the update.
void ema_update__cpu(at::TensorList target, at::TensorList online, const at::Tensor& decay) {
  const double keep = decay_value(decay);
  EmaLists lists(target, online);
  const auto& pairs = lists.pairs;
  const auto move_of = chosen().ema_move;

  std::vector<int64_t> ends;  // elements of the pairs up to each one
  ends.reserve(pairs.size());
  int64_t total = 0;
  for (const ema::Pair& pair : pairs) ends.push_back(total += pair.elements);
  constexpr int64_t kBlock = 4096;  // elements; threads then share no cache line of a large tensor
  torch::stable::parallel_for(0, (total + kBlock - 1) / kBlock, 16, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(end * kBlock, total);
    int64_t first = begin * kBlock;
    size_t k = std::upper_bound(ends.begin(), ends.end(), first) - ends.begin();
    for (; first < last; first = ends[k++]) {
      const int64_t start = k ? ends[k - 1] : 0;
      move_of(pairs[k].kind)(pairs[k].target, pairs[k].online, first - start, std::min(last, ends[k]) - start, keep);
    }
  });
  lists.finish();
}

}  // namespace

}  // namespace byola

STABLE_TORCH_LIBRARY_IMPL(byola_fast, CPU, m) {
  byola::chosen().add_ops(m);
  byola::add_common_ops(m);
}
TORCH_LIBRARY_IMPL(byola_fast, CPU, m) { m.impl("ema_update_", &byola::ema_update__cpu); }

// For doctor() and tests, which call them by ctypes.
extern "C" const char* byola_simd() { return byola::chosen().name; }
extern "C" const char* byola_compiler() { return __VERSION__; }
extern "C" void byola_exp(float* values, int64_t count) { byola::chosen().exp_(values, count); }
extern "C" void byola_log_positive(float* values, int64_t count) { byola::chosen().log_positive_(values, count); }
