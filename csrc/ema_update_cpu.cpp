// target <- t + w (o - t) if w < 1/2, else o - (1 - w) (o - t), with w = 1 - decay; each operation rounded once, never
// fused. BYOL, arXiv:2006.07733, eq. (1). Reads target and online once, writes target once: 12 bytes an element in
// float32, bound by memory. One parallel loop over the elements of all tensors: their sizes may differ by any factor.
#include <torch/csrc/stable/ops.h>
#include <torch/library.h>

#include <algorithm>

#include "ema_lists.h"
#include "storage.h"

namespace byola {

namespace {

// Update the elements `from` to `to` - 1 of one target.
using Move = void (*)(void* target, const void* online, int64_t from, int64_t to, double decay);

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

Move move_of(ema::Kind kind) {
  switch (kind) {
    case ema::Kind::kFloat: return move<float, float>;
    case ema::Kind::kFloatFromHalf: return move<float, Half>;
    case ema::Kind::kFloatFromBFloat16: return move<float, BFloat16>;
    default: return move<double, double>;
  }
}

// The dispatcher calls this only if all tensors are on the CPU.
void ema_update__cpu(at::TensorList target, at::TensorList online, const at::Tensor& decay) {
  const double keep = decay_value(decay);
  EmaLists lists(target, online);
  const auto& pairs = lists.pairs;

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

TORCH_LIBRARY_IMPL(byola_fast, CPU, m) { m.impl("ema_update_", &byola::ema_update__cpu); }
