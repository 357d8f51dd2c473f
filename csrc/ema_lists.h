// Checks the two lists of ema_update_ before anything is written, and pairs their tensors as stretches of memory.
// Addresses, shapes and dtypes are read at every call, so a storage that was replaced, resized or freed is noticed.
// ATen and not the stable interface, whose handles of a thousand tensors take as long as their update.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "ema_update.cuh"

namespace byola {

namespace ema {

inline bool operator==(const Pair& a, const Pair& b) {
  return a.target == b.target && a.online == b.online && a.elements == b.elements && a.kind == b.kind;
}

}  // namespace ema

namespace {

std::string shape_text(at::IntArrayRef sizes) {
  std::string text = "(";
  for (size_t d = 0; d < sizes.size(); ++d) text += (d ? ", " : "") + std::to_string(sizes[d]);
  return text + (sizes.size() == 1 ? ",)" : ")");
}

std::string name_of(at::ScalarType dtype) { return "torch." + std::string(c10::getDtypeNames(dtype).first); }

ema::Kind kind_of(at::ScalarType target, at::ScalarType online, size_t number) {
  if (target == at::kFloat) {
    if (online == at::kFloat) return ema::Kind::kFloat;
    if (online == at::kHalf) return ema::Kind::kFloatFromHalf;
    if (online == at::kBFloat16) return ema::Kind::kFloatFromBFloat16;
  }
  if (target == at::kDouble && online == at::kDouble) return ema::Kind::kDouble;
  TORCH_CHECK_TYPE(target == at::kFloat || target == at::kDouble, "target[", number,
                   "]: expected float32 or float64, got ", name_of(target),
                   at::isReducedFloatingType(target) ? "; small updates round to zero in half precision" : "");
  TORCH_CHECK_TYPE(false, "online[", number, "]: expected ", name_of(target),
                   target == at::kFloat ? " or half precision" : "", ", got ", name_of(online));
}

int64_t element_size(ema::Kind kind, bool online) {
  if (kind == ema::Kind::kDouble) return 8;
  return online && kind != ema::Kind::kFloat ? 2 : 4;
}

// Whether two tensors of one shape leave no gaps and hold their elements in the same order.
bool is_alike(const at::Tensor& target, const at::Tensor& online) {
  if (target.is_contiguous() && online.is_contiguous()) return true;
  for (int64_t d = 0; d < target.dim(); ++d)
    if (target.size(d) != 1 && target.stride(d) != online.stride(d)) return false;
  return target.is_non_overlapping_and_dense();
}

class EmaLists {
 public:
  // Checks everything that can be checked without reading a device; throws before anything is written.
  EmaLists(at::TensorList target, at::TensorList online);

  // Stretches with the same order of elements, at least one; valid as long as this object.
  std::vector<ema::Pair> pairs;

  // Copies the results back to targets with gaps, and tells autograd that all targets changed.
  void finish();

 private:
  void require_separate_memory(const std::vector<int64_t>& layouts) const;
  void copy_apart(ema::Pair& pair, const at::Tensor& target, const at::Tensor& online);

  at::TensorList target_, online_;
  std::vector<size_t> numbers_;                          // of the pairs, in the lists
  std::vector<at::Tensor> copies_;                       // of online tensors
  std::vector<std::pair<at::Tensor, at::Tensor>> gaps_;  // targets with gaps and their copies
};

EmaLists::EmaLists(at::TensorList target, at::TensorList online) : target_(target), online_(online) {
  TORCH_CHECK_VALUE(target.size() == online.size(), "online: expected as many tensors as in target (", target.size(),
                    "), got ", online.size());
  std::vector<size_t> apart;     // pairs that are not alike
  std::vector<int64_t> layouts;  // of those: number, dimensions, sizes, both strides
  pairs.reserve(target.size()), numbers_.reserve(target.size());
  for (size_t k = 0; k < target.size(); ++k) {
    const at::Tensor &t = target[k], &o = online[k];
    const ema::Kind kind = kind_of(t.scalar_type(), o.scalar_type(), k);
    TORCH_CHECK_VALUE(t.sizes() == o.sizes(), "online[", k, "]: expected shape ", shape_text(t.sizes()), ", got ",
                      shape_text(o.sizes()));
    const at::Device device = target[0].device();
    for (const at::Tensor* x : {&t, &o})
      TORCH_CHECK_VALUE(x->device() == device, x == &t ? "target[" : "online[", k,
                        "]: expected on the device of target[0] (", device, "), got ", x->device());
    if (!t.numel()) continue;
    for (const at::Tensor* x : {&t, &o})
      TORCH_CHECK_VALUE(x->const_data_ptr(), x == &t ? "target[" : "online[", k,
                        "]: expected values, but its storage was freed");
    if (!is_alike(t, o)) {
      apart.push_back(pairs.size());
      layouts.insert(layouts.end(), {int64_t(pairs.size()), t.dim()});
      for (const at::IntArrayRef part : {t.sizes(), t.strides(), o.strides()})
        layouts.insert(layouts.end(), part.begin(), part.end());
    }
    pairs.push_back({t.mutable_data_ptr(), o.const_data_ptr(), t.numel(), kind});
    numbers_.push_back(k);
  }
  require_separate_memory(layouts);
  for (const size_t n : apart) copy_apart(pairs[n], target[numbers_[n]].detach(), online[numbers_[n]].detach());
}

// Refuses targets that share memory with another tensor. Python looks for them (byola_fast/ops/_ema_checks.py), once:
// the answer depends only on the pairs and layouts, so lists with the same ones as earlier lists need no search.
void EmaLists::require_separate_memory(const std::vector<int64_t>& layouts) const {
  if (pairs.empty()) return;
  using Key = std::tuple<void*, const void*, size_t>;
  constexpr size_t kMaxKept = 1 << 16;  // pairs, 2 MB
  thread_local std::map<Key, std::pair<std::vector<ema::Pair>, std::vector<int64_t>>> known;
  thread_local size_t kept = 0;
  const Key key{pairs[0].target, pairs[0].online, pairs.size()};
  const auto found = known.find(key);
  if (found != known.end() && found->second.first == pairs && found->second.second == layouts) return;

  static const auto have_clash = c10::Dispatcher::singleton()
                                     .findSchemaOrThrow("byola_fast::_ema_have_clash", "")
                                     .typed<bool(const at::Tensor&, int64_t)>();
  static const auto require = c10::Dispatcher::singleton()
                                  .findSchemaOrThrow("byola_fast::_ema_require_separate_memory", "")
                                  .typed<void(at::TensorList, at::TensorList)>();
  bool may_clash = !layouts.empty();
  if (!may_clash) {  // one range for each tensor: a tenth of the time of the full search
    const auto count = int64_t(pairs.size());
    const at::Tensor ranges = at::empty({2 * count, 2}, at::kLong);
    auto* range = ranges.mutable_data_ptr<int64_t>();
    for (const bool is_online : {false, true})
      for (const ema::Pair& pair : pairs) {
        const auto begin = reinterpret_cast<int64_t>(is_online ? pair.online : pair.target);
        *range++ = begin, *range++ = begin + pair.elements * element_size(pair.kind, is_online);
      }
    may_clash = have_clash.call(ranges, count);
  }
  if (may_clash) require.call(target_, online_);  // throws if they do
  if ((kept += pairs.size()) > kMaxKept) known.clear(), kept = pairs.size();
  known[key] = {pairs, layouts};
}

void EmaLists::copy_apart(ema::Pair& pair, const at::Tensor& target, const at::Tensor& online) {
  if (target.is_non_overlapping_and_dense()) {
    copies_.push_back(at::empty_like(target));  // with its strides
    copies_.back().copy_(online);
    if (pair.kind != ema::Kind::kDouble) pair.kind = ema::Kind::kFloat;
  } else {
    gaps_.emplace_back(target, target.contiguous());
    pair.target = gaps_.back().second.mutable_data_ptr();
    copies_.push_back(online.contiguous());
  }
  pair.online = copies_.back().const_data_ptr();
}

void EmaLists::finish() {
  for (auto& [target, result] : gaps_) target.copy_(result);
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
