// target <- t + w (o - t) if w < 1/2, else o - (1 - w) (o - t), with w = 1 - decay; each operation rounded once, never
// fused. BYOL, arXiv:2006.07733, eq. (1). Reads target and online once, writes target once: 12 bytes an element in
// float32, bound by memory.
#include "kernels.h"
#include "storage.h"

namespace byola::BYOLA_SIMD {

namespace {

template <typename S, typename O>
void move(void* target, const void* online, int64_t from, int64_t to, double decay) {
  using V = Vector<S>;
  const S weight = S(1 - decay), rest = S(1) - weight;
  S* t = static_cast<S*>(target);
  const O* o = static_cast<const O*>(online);
  const auto each = [&](auto interpolate) {
    int64_t k = from;
    for (; k + V::width <= to; k += V::width) interpolate(V::load(t + k), load_lanes<V>(o + k, V::width)).store(t + k);
    if (k < to) interpolate(load_lanes<V>(t + k, to - k), load_lanes<V>(o + k, to - k)).store(t + k, to - k);
  };
  if (weight < S(0.5))
    each([by = V::set(weight)](V near, V far) -> V { return near + by * (far - near); });
  else
    each([by = V::set(rest)](V near, V far) -> V { return far - by * (far - near); });
}

}  // namespace

EmaMove ema_move(ema::Kind kind) {
  switch (kind) {
    case ema::Kind::kFloat: return move<float, float>;
    case ema::Kind::kFloatFromHalf: return move<float, Half>;
    case ema::Kind::kFloatFromBFloat16: return move<float, BFloat16>;
    default: return move<double, double>;
  }
}

}  // namespace byola::BYOLA_SIMD
