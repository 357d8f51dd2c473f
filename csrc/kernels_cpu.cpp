// The functions of one instruction set in a table.
#include "kernels.h"
#include "simd.h"

namespace byola::BYOLA_SIMD {

namespace {

template <typename F>
void apply(float* p, int64_t count, F f) {
  using V = Floats;
  for (int64_t k = 0; k < count; k += V::width) f(V::load(p + k, count - k)).store(p + k, count - k);
}

}  // namespace

void add_ops(torch::stable::detail::StableLibrary& library);  // ops/_native/cpu.py writes it: one call for each file
EmaMove ema_move(ema::Kind kind);
AugmentViews augment_views_out_cpu;

Kernels kernels() {
  return {Floats::name,
          add_ops,
          augment_views_out_cpu,
          ema_move,
          [](float* p, int64_t count) { apply(p, count, [](Floats x) -> Floats { return exp(x); }); },
          [](float* p, int64_t count) { apply(p, count, [](Floats x) -> Floats { return log_positive(x); }); }};
}

}  // namespace byola::BYOLA_SIMD
