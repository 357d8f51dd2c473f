// The two lists of ema_update_ as pairs of stretches of memory. byola_fast/ops/_ema_checks.py checks the lists once; the
// plan made from them is kept with the facts that it rests on: address, dtype, device, shape and strides of each tensor.
// Each call reads the facts again, and checks the lists again if one differs: a storage that was replaced, resized or
// freed is never written to.
// ATen and not the stable interface, whose handles of a thousand tensors take as long as their update.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cstdint>
#include <list>
#include <utility>
#include <vector>

#include "ema_update.cuh"

namespace byola {

namespace {

constexpr size_t kPlans = 16;  // kept by each thread

// What a plan rests on, of one tensor.
struct Facts {
  int64_t address, type;  // dtype, kind and number of the device
  at::IntArrayRef sizes, strides;

  Facts(const void* data, const at::Tensor& x)
      : address(reinterpret_cast<int64_t>(data)), sizes(x.sizes()), strides(x.strides()) {
    const at::Device device = x.device();
    type = int64_t(x.scalar_type()) << 16 | int64_t(uint8_t(device.type())) << 8 | uint8_t(device.index());
  }
  void append_to(std::vector<int64_t>& facts) const {
    facts.insert(facts.end(), {address, type, int64_t(sizes.size())});
    facts.insert(facts.end(), sizes.begin(), sizes.end());
    facts.insert(facts.end(), strides.begin(), strides.end());
  }
  // Whether `kept` points to the same facts; if so, it moves on to those of the next tensor.
  bool match(const int64_t*& kept) const {
    const bool same = kept[0] == address && kept[1] == type && kept[2] == int64_t(sizes.size()) &&
                      std::equal(sizes.begin(), sizes.end(), kept + 3) &&
                      std::equal(strides.begin(), strides.end(), kept + 3 + sizes.size());
    if (same) kept += 3 + 2 * sizes.size();
    return same;
  }
};

Facts target_facts(const at::Tensor& x) { return {x.mutable_data_ptr(), x}; }
Facts online_facts(const at::Tensor& x) { return {x.const_data_ptr(), x}; }

// Of dtypes that passed the checks.
ema::Kind kind_of(at::ScalarType target, at::ScalarType online) {
  if (target == at::kDouble) return ema::Kind::kDouble;
  if (online == at::kHalf) return ema::Kind::kFloatFromHalf;
  return online == at::kBFloat16 ? ema::Kind::kFloatFromBFloat16 : ema::Kind::kFloat;
}

// Whether two tensors of one shape leave no gaps and hold their elements in the same order.
bool is_alike(const at::Tensor& target, const at::Tensor& online) {
  if (target.is_contiguous() && online.is_contiguous()) return true;
  for (int64_t d = 0; d < target.dim(); ++d)
    if (target.size(d) != 1 && target.stride(d) != online.stride(d)) return false;
  return target.is_non_overlapping_and_dense();
}

struct Plan {
  size_t count;                                  // of each list
  std::vector<int64_t> facts;                    // of each target and its online tensor
  std::vector<ema::Pair> pairs;                  // of tensors that are not empty
  std::vector<std::pair<size_t, size_t>> apart;  // pairs that are not alike: number in `pairs`, number in the lists

  // The lists passed the checks.
  Plan(at::TensorList target, at::TensorList online) : count(target.size()) {
    pairs.reserve(count);
    for (size_t k = 0; k < count; ++k) {
      const at::Tensor &t = target[k], &o = online[k];
      target_facts(t).append_to(facts), online_facts(o).append_to(facts);
      if (!t.numel()) continue;
      if (!is_alike(t, o)) apart.emplace_back(pairs.size(), k);
      pairs.push_back({t.mutable_data_ptr(), o.const_data_ptr(), t.numel(), kind_of(t.scalar_type(), o.scalar_type())});
    }
  }
  bool fits(at::TensorList target, at::TensorList online) const {
    if (target.size() != count || online.size() != count) return false;
    const int64_t* kept = facts.data();
    for (size_t k = 0; k < count; ++k)
      if (!target_facts(target[k]).match(kept) || !online_facts(online[k]).match(kept)) return false;
    return true;
  }
};

// Throws the exceptions of Python.
void check_lists(at::TensorList target, at::TensorList online) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("byola_fast::ema_check_lists", "")
                             .typed<void(at::TensorList, at::TensorList)>();
  op.call(target, online);
}

// The plan of two lists, checked; throws before anything was written.
Plan& plan_of(at::TensorList target, at::TensorList online) {
  thread_local std::list<Plan> plans;  // the last used one first
  const auto fits = [&](const Plan& plan) { return plan.fits(target, online); };
  const auto found = std::find_if(plans.begin(), plans.end(), fits);
  if (found != plans.end()) {
    plans.splice(plans.begin(), plans, found);
  } else {
    check_lists(target, online);
    plans.emplace_front(target, online);
    if (plans.size() > kPlans) plans.pop_back();
  }
  return plans.front();
}

class EmaLists {
 public:
  EmaLists(at::TensorList target, at::TensorList online) : target_(target), plan_(plan_of(target, online)) {
    for (const auto& [n, k] : plan_.apart) copy_apart(plan_.pairs[n], target[k].detach(), online[k].detach());
  }

  // Of elements in the same order, none empty; alive as long as this object.
  const std::vector<ema::Pair>& pairs() const { return plan_.pairs; }

  // Write to the targets with gaps, whose copies were updated, and let autograd know that all targets changed.
  void finish() {
    for (auto& [target, result] : gaps_) target.copy_(result);
    for (const at::Tensor& target : target_)
      if (!target.is_inference()) target.unsafeGetTensorImpl()->bump_version();
  }

 private:
  void copy_apart(ema::Pair& pair, const at::Tensor& target, const at::Tensor& online) {
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

  at::TensorList target_;
  Plan& plan_;
  std::vector<at::Tensor> copies_;                       // of online tensors
  std::vector<std::pair<at::Tensor, at::Tensor>> gaps_;  // targets with gaps and their copies
};

// decay () of any float dtype, on the CPU
double decay_value(const at::Tensor& decay) {
  TORCH_CHECK_VALUE(decay.numel() == 1, "decay: expected a 0-d tensor, got shape ", decay.sizes());
  TORCH_CHECK_TYPE(at::isFloatingType(decay.scalar_type()), "decay: expected a floating-point tensor, got ",
                   decay.scalar_type());
  const double value = decay.item<double>();
  TORCH_CHECK_VALUE(value >= 0 && value <= 1, "decay: expected a number in [0, 1], got ", value);
  return value;
}

}  // namespace

}  // namespace byola
