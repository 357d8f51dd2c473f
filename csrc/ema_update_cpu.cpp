// target <- t + w (o - t) if w < 1/2, else o - (1 - w) (o - t), with w = 1 - decay; each operation rounded once, never
// fused. BYOL, arXiv:2006.07733, eq. (1). Reads target and online once, writes target once: 12 bytes an element in
// float32, bound by memory. One parallel loop over the elements of all tensors, whose sizes may differ by any factor.
#include "library.h"
#include "tensors.h"

#include <algorithm>

namespace byola {

namespace {

using Tensors = std::vector<Tensor>;

// The part of two tensors from their element `from` to their element `to`.
using Move = void (*)(void* target, const void* online, int64_t from, int64_t to, double decay);

struct Pair {
  void* target;
  const void* online;
  Move move;
};

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

Move move_of(ScalarType target, ScalarType online, size_t number) {
  if (target == ScalarType::Float) {
    if (online == ScalarType::Float) return move<float, float>;
    if (online == ScalarType::Half) return move<float, Half>;
    if (online == ScalarType::BFloat16) return move<float, BFloat16>;
  }
  if (target == ScalarType::Double && online == ScalarType::Double) return move<double, double>;
  BYOLA_CHECK(target == ScalarType::Float || target == ScalarType::Double, "target[", number,
              "]: expected float32 or float64; half would never move");
  BYOLA_CHECK(false, "online[", number, "]: expected the dtype of the target (or half for float32)");
}

template <typename Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string text = "(";
  for (size_t k = 0; k < sizes.size(); ++k) text += (k ? ", " : "") + std::to_string(sizes[k]);
  return text + (sizes.size() == 1 ? ",)" : ")");
}

// Whether the elements fill one stretch of memory, in whatever order.
bool is_dense(const Tensor& x) {
  int64_t filled = 1;
  for (int64_t d = 0; d < x.dim();) {  // from the smallest stride to the largest
    if (x.size(d) != 1 && x.stride(d) == filled)
      filled *= x.size(d), d = 0;
    else
      ++d;
  }
  return filled == x.numel();
}

bool same_strides(const Tensor& x, const Tensor& y) {
  for (int64_t d = 0; d < x.dim(); ++d)
    if (x.size(d) != 1 && x.stride(d) != y.stride(d)) return false;
  return true;
}

}  // namespace

// The dispatcher comes here only if no tensor of the lists is on another device.
void ema_update__cpu(const Tensors& target, const Tensors& online, const Tensor& decay) {
  BYOLA_CHECK(target.size() == online.size(), "online: expected as many tensors as in target (", target.size(),
              "), got ", online.size());
  BYOLA_CHECK(decay.numel() == 1, "decay: expected a 0-d tensor");
  const Tensor decay_value = as_contiguous<double>(decay);
  const double keep = data<double>(decay_value)[0];

  std::vector<Pair> pairs;
  std::vector<int64_t> ends;  // of each pair, in the line of all elements
  Tensors copies;             // alive until the work is done
  std::vector<std::pair<const Tensor*, size_t>> gaps;  // targets with holes, and their copies
  pairs.reserve(target.size());
  ends.reserve(target.size());
  int64_t total = 0;
  for (size_t k = 0; k < target.size(); ++k) {
    const Tensor &t = target[k], &o = online[k];
    Move move = move_of(t.scalar_type(), o.scalar_type(), k);
    const auto sizes = t.sizes(), online_sizes = o.sizes();
    const bool alike = std::equal(sizes.begin(), sizes.end(), online_sizes.begin(), online_sizes.end());
    BYOLA_CHECK(alike, "online[", k, "]: expected shape ", shape_text(sizes), ", got ",
                shape_text(online_sizes));
    int64_t elements = 1;
    for (const int64_t size : sizes) elements *= size;
    if (!elements) continue;
    void* near = t.data_ptr();
    const void* far = o.data_ptr();
    if (!(t.is_contiguous() && o.is_contiguous())) {
      if (!is_dense(t)) {
        copies.push_back(torch::stable::contiguous(t));
        near = copies.back().data_ptr();
        gaps.emplace_back(&t, copies.size() - 1);
        copies.push_back(torch::stable::contiguous(o));
        far = copies.back().data_ptr();
      } else if (!same_strides(t, o)) {
        copies.push_back(torch::stable::empty_like(t));  // with its strides
        torch::stable::copy_(copies.back(), o);
        far = copies.back().data_ptr();
        move = move_of(t.scalar_type(), t.scalar_type(), k);
      }
    }
    pairs.push_back({near, far, move});
    ends.push_back(total += elements);
  }

  constexpr int64_t kBlock = 4096;  // elements: keeps the threads' shares on cache lines of a large tensor
  torch::stable::parallel_for(0, (total + kBlock - 1) / kBlock, 16, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(end * kBlock, total);
    int64_t first = begin * kBlock;
    size_t k = std::upper_bound(ends.begin(), ends.end(), first) - ends.begin();
    for (; first < last; first = ends[k++]) {
      const int64_t start = k ? ends[k - 1] : 0;
      pairs[k].move(pairs[k].target, pairs[k].online, first - start, std::min(last, ends[k]) - start, keep);
    }
  });
  for (const auto& [t, copy] : gaps) {
    Tensor whole = *t;
    torch::stable::copy_(whole, copies[copy]);
  }
}

}  // namespace byola
