// Checks of values that the public ops make on the CPU: one pass each, where PyTorch would take several ops.
#include "tensors.h"

namespace byola::BYOLA_SIMD {

// x (...) of any float dtype: whether all are in [0, 1]; NaN is not.
bool all_weights_cpu(const Tensor& x) {
  const Tensor xs = compact(x);
  bool all = true;
  with_float_type(x.scalar_type(), "x", [&](auto kind) {
    using S = decltype(kind);
    for (int64_t k = 0, count = xs.numel(); k < count; ++k) {
      const auto value = static_cast<Compute<S>>(data<S>(xs)[k]);
      all = all && value >= 0 && value <= 1;
    }
  });
  return all;
}

// boxes (..., 4), int32 or int64: whether all are at least 1 x 1 and inside the canvas.
bool all_inside_cpu(const Tensor& boxes, int64_t mels, int64_t frames) {
  const Tensor wide = as_contiguous<int64_t>(boxes);
  const int64_t* box = data<int64_t>(wide);
  for (const int64_t* end = box + wide.numel(); box < end; box += 4)
    if (box[0] < 0 || box[1] < 0 || box[2] < 1 || box[3] < 1 || box[2] > mels || box[3] > frames ||
        box[0] > mels - box[2] || box[1] > frames - box[3])
      return false;
  return true;
}

BYOLA_OPS(checks, m) {
  m.impl("_all_weights", TORCH_BOX(&all_weights_cpu));
  m.impl("_all_inside", TORCH_BOX(&all_inside_cpu));
}

}  // namespace byola::BYOLA_SIMD
