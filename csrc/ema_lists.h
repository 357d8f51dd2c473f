// The two lists of ema_update_: checked before anything is written, then paired as stretches of memory.
// Nothing is kept between calls: addresses, shapes and dtypes are read anew, so that no storage that was replaced,
// resized or freed meanwhile is written to. Checked in Python, a thousand tensors would cost many times the update.
// ATen and not the stable interface, whose handles of a thousand tensors take as long as their update.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "ema_update.cuh"

namespace byola {

namespace {

// What the checks need of a tensor; owns nothing.
struct View {
  const char* data;
  at::IntArrayRef sizes, strides;
  at::ScalarType dtype;
  at::Device device;

  explicit View(const at::Tensor& x)
      : data(static_cast<const char*>(x.const_data_ptr())), sizes(x.sizes()), strides(x.strides()),
        dtype(x.scalar_type()), device(x.device()) {}

  size_t dim() const { return sizes.size(); }
  int64_t elements() const {
    int64_t count = 1;
    for (const int64_t size : sizes) count *= size;
    return count;
  }
  // Elements from the first to the last in memory, gaps included; at least one.
  int64_t extent() const {
    int64_t last = 0;
    for (size_t d = 0; d < dim(); ++d) last += (sizes[d] - 1) * strides[d];
    return last + 1;
  }
  bool is_contiguous() const {
    int64_t filled = 1;
    for (size_t d = dim(); d-- > 0; filled *= sizes[d])
      if (sizes[d] != 1 && strides[d] != filled) return false;
    return true;
  }
  // (stride, size) of the dimensions of more than one element, from the smallest stride to the largest.
  std::vector<std::pair<int64_t, int64_t>> by_stride() const {
    std::vector<std::pair<int64_t, int64_t>> axes;
    for (size_t d = 0; d < dim(); ++d)
      if (sizes[d] != 1) axes.emplace_back(strides[d], sizes[d]);
    std::sort(axes.begin(), axes.end());
    return axes;
  }
  // Whether the elements fill one stretch of memory, in whatever order.
  bool is_dense() const {
    int64_t filled = 1;
    for (const auto& [stride, size] : by_stride()) {
      if (stride != filled) return false;
      filled *= size;
    }
    return true;
  }
  // Whether each axis steps over all that the faster ones reach; then no two elements share memory.
  bool is_nested() const {
    int64_t reach = 1;
    for (const auto& [stride, size] : by_stride()) {
      if (stride < reach) return false;
      reach += (size - 1) * stride;
    }
    return true;
  }
  bool same_strides(const View& other) const {
    for (size_t d = 0; d < dim(); ++d)
      if (sizes[d] != 1 && strides[d] != other.strides[d]) return false;
    return true;
  }
};

std::string shape_text(at::IntArrayRef sizes) {
  std::string text = "(";
  for (size_t d = 0; d < sizes.size(); ++d) text += (d ? ", " : "") + std::to_string(sizes[d]);
  return text + (sizes.size() == 1 ? ",)" : ")");
}

std::string name_of(at::ScalarType dtype) {
  return "torch." + std::string(c10::getDtypeNames(dtype).first);
}

ema::Kind kind_of(at::ScalarType target, at::ScalarType online, size_t number) {
  if (target == at::kFloat) {
    if (online == at::kFloat) return ema::Kind::kFloat;
    if (online == at::kHalf) return ema::Kind::kFloatFromHalf;
    if (online == at::kBFloat16) return ema::Kind::kFloatFromBFloat16;
  }
  if (target == at::kDouble && online == at::kDouble) return ema::Kind::kDouble;
  TORCH_CHECK_TYPE(target == at::kFloat || target == at::kDouble, "target[", number,
                   "]: expected float32 or float64, got ", name_of(target),
                   at::isReducedFloatingType(target) ? "; half would never move" : "");
  TORCH_CHECK_TYPE(false, "online[", number, "]: expected ", name_of(target),
                   target == at::kFloat ? " or half precision" : "", ", got ", name_of(online));
}

int64_t element_size(ema::Kind kind, bool online) {
  if (kind == ema::Kind::kDouble) return 8;
  return online && kind != ema::Kind::kFloat ? 2 : 4;
}

// A piece of memory of one tensor.
struct Range {
  const char *begin, *end;
  size_t number;
  bool is_online;

  bool operator<(const Range& other) const { return begin < other.begin; }
};

struct Clash {
  const Range *target = nullptr, *other = nullptr;
};

// The first two ranges that meet and of which one is a target's. Online tensors may meet each other.
Clash find_clash(std::vector<Range>& target, std::vector<Range>& online) {
  for (auto* ranges : {&target, &online})
    if (!std::is_sorted(ranges->begin(), ranges->end())) std::sort(ranges->begin(), ranges->end());
  const Range *last_target = nullptr, *last_online = nullptr;  // that reach furthest so far
  auto t = target.begin();
  auto o = online.begin();
  while (t != target.end() || o != online.end()) {
    if (o == online.end() || (t != target.end() && !(*o < *t))) {
      if (last_target && t->begin < last_target->end) return {last_target, &*t};
      if (last_online && t->begin < last_online->end) return {&*t, last_online};
      last_target = &*t++;
    } else {
      if (last_target && o->begin < last_target->end) return {last_target, &*o};
      if (!last_online || last_online->end < o->end) last_online = &*o;
      ++o;
    }
  }
  return {};
}

// One range for each element, or for all of them where they leave no gaps.
void append_elements(std::vector<Range>& ranges, const View& x, int64_t size, size_t number, bool is_online) {
  if (x.is_dense()) return ranges.push_back({x.data, x.data + x.extent() * size, number, is_online});
  std::vector<int64_t> index(x.dim(), 0);
  for (int64_t left = x.elements(), offset = 0; left > 0; --left) {
    ranges.push_back({x.data + offset * size, x.data + (offset + 1) * size, number, is_online});
    for (size_t d = x.dim(); d-- > 0;) {
      offset += x.strides[d];
      if (++index[d] < x.sizes[d]) break;
      offset -= x.sizes[d] * x.strides[d], index[d] = 0;
    }
  }
}

class EmaLists {
 public:
  // Checks everything that can be seen without reading a device; throws before anything was written.
  EmaLists(at::TensorList target, at::TensorList online);

  // Of elements in the same order, none empty; alive as long as this object.
  std::vector<ema::Pair> pairs;

  // Brings the results to targets with gaps between their elements, which were updated in a copy, and lets autograd
  // know that all targets changed.
  void finish();

 private:
  void check_memory(const std::vector<size_t>& apart);
  void copy_apart(const std::vector<size_t>& apart);

  at::TensorList target_, online_;
  std::vector<size_t> numbers_;  // of the pairs, in the lists
  std::vector<at::Tensor> copies_;
  std::vector<std::pair<at::Tensor, size_t>> gaps_;  // a target with gaps and the number of its copy
};

EmaLists::EmaLists(at::TensorList target, at::TensorList online) : target_(target), online_(online) {
  TORCH_CHECK_VALUE(target.size() == online.size(), "online: expected as many tensors as in target (", target.size(),
                    "), got ", online.size());
  std::vector<size_t> apart;  // pairs whose elements do not lie alike
  pairs.reserve(target.size()), numbers_.reserve(target.size());
  for (size_t k = 0; k < target.size(); ++k) {
    const View t(target[k]), o(online[k]);
    const ema::Kind kind = kind_of(t.dtype, o.dtype, k);
    TORCH_CHECK_VALUE(t.sizes == o.sizes, "online[", k, "]: expected shape ", shape_text(t.sizes), ", got ",
                      shape_text(o.sizes));
    const at::Device device = target[0].device();
    TORCH_CHECK_VALUE(t.device == device, "target[", k, "]: expected on the device of target[0] (", device, "), got ",
                      t.device);
    TORCH_CHECK_VALUE(o.device == device, "online[", k, "]: expected on the device of target[0] (", device, "), got ",
                      o.device);
    const int64_t elements = t.elements();
    if (!elements) continue;
    TORCH_CHECK_VALUE(t.data && o.data, t.data ? "online[" : "target[", k, "]: expected values, but its storage was ",
                      "freed");
    const bool alike = (t.is_contiguous() && o.is_contiguous()) || (t.same_strides(o) && t.is_dense());
    if (!alike) apart.push_back(pairs.size());
    pairs.push_back({target[k].mutable_data_ptr(), o.data, elements, kind});
    numbers_.push_back(k);
  }
  check_memory(apart);
  copy_apart(apart);
}

void EmaLists::check_memory(const std::vector<size_t>& apart) {
  std::vector<Range> target, online;
  target.reserve(pairs.size()), online.reserve(pairs.size());
  size_t next = 0;
  bool nested = true;
  for (size_t n = 0; n < pairs.size(); ++n) {
    const ema::Pair& pair = pairs[n];
    int64_t target_extent = pair.elements, online_extent = pair.elements;
    if (next < apart.size() && apart[next] == n) {
      const View t(target_[numbers_[n]]), o(online_[numbers_[n]]);
      target_extent = t.extent(), online_extent = o.extent();
      nested = nested && t.is_nested();
      ++next;
    }
    const auto* t = static_cast<const char*>(pair.target);
    const auto* o = static_cast<const char*>(pair.online);
    target.push_back({t, t + target_extent * element_size(pair.kind, false), numbers_[n], false});
    online.push_back({o, o + online_extent * element_size(pair.kind, true), numbers_[n], true});
  }
  Clash clash = find_clash(target, online);
  if (!apart.empty() && (clash.target || !nested)) {  // it may be the gaps between elements that others fill
    target.clear(), online.clear();
    for (size_t n = 0; n < pairs.size(); ++n) {
      const size_t k = numbers_[n];
      append_elements(target, View(target_[k]), element_size(pairs[n].kind, false), k, false);
      append_elements(online, View(online_[k]), element_size(pairs[n].kind, true), k, true);
    }
    clash = find_clash(target, online);
  }
  if (!clash.target) return;
  const size_t k = clash.target->number, other = clash.other->number;
  TORCH_CHECK_VALUE(clash.other->is_online || k != other, "target[", k,
                    "]: expected elements with memory of their own, got strides ", shape_text(target_[k].strides()));
  TORCH_CHECK_VALUE(false, "target[", k, "]: expected memory of its own, got that of ",
                    clash.other->is_online ? "online[" : "target[", other, "]");
}

void EmaLists::copy_apart(const std::vector<size_t>& apart) {
  for (const size_t n : apart) {
    ema::Pair& pair = pairs[n];
    const at::Tensor near = target_[numbers_[n]].detach(), far = online_[numbers_[n]].detach();
    if (View(near).is_dense()) {
      copies_.push_back(at::empty_like(near));  // with its strides
      copies_.back().copy_(far);
      pair.online = copies_.back().data_ptr();
      if (pair.kind != ema::Kind::kDouble) pair.kind = ema::Kind::kFloat;
    } else {
      copies_.push_back(near.contiguous());
      pair.target = copies_.back().data_ptr();
      gaps_.emplace_back(near, copies_.size() - 1);
      copies_.push_back(far.contiguous());
      pair.online = copies_.back().data_ptr();
    }
  }
}

void EmaLists::finish() {
  for (auto& [target, copy] : gaps_) target.copy_(copies_[copy]);
  for (const at::Tensor& target : target_)
    if (!target.is_inference()) target.unsafeGetTensorImpl()->bump_version();
}

// decay () of any float dtype, on the CPU
double decay_value(const at::Tensor& decay) {
  TORCH_CHECK_VALUE(decay.numel() == 1, "decay: expected a 0-d tensor, got shape ", shape_text(decay.sizes()));
  TORCH_CHECK_TYPE(at::isFloatingType(decay.scalar_type()), "decay: expected a floating-point tensor, got ",
                   name_of(decay.scalar_type()));
  const double value = decay.item<double>();
  TORCH_CHECK_VALUE(value >= 0 && value <= 1, "decay: expected a number in [0, 1], got ", value);
  return value;
}

}  // namespace

}  // namespace byola
