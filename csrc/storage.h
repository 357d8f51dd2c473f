// Element types of tensors, and conversion of their rows to and from the compute type (double for float64, else float).
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <new>
#include <type_traits>
#include <vector>

#include "simd.h"

namespace byola::BYOLA_SIMD {

using Half = torch::headeronly::Half;
using BFloat16 = torch::headeronly::BFloat16;

template <typename S>
using Vector = std::conditional_t<std::is_same_v<S, double>, Doubles, Floats>;
template <typename S>
using Compute = typename Vector<S>::Element;

constexpr float kEps = 0x1p-23f;  // torch.finfo(torch.float32).eps, the paper's epsilon whatever the dtype

// Load lanes 0 to n - 1 of a contiguous row; the other lanes are zero.
template <typename V, typename S>
inline V load_lanes(const S* p, int64_t n) {
  if constexpr (std::is_same_v<S, typename V::Element>) {
    return n >= V::width ? V::load(p) : V::load(p, n);
  } else if constexpr (V::is_simd && std::is_same_v<S, Half>) {
    return V::from_float16(V::load16(p, n));
  } else if constexpr (V::is_simd && std::is_same_v<S, BFloat16>) {
    return V::from_bfloat16(V::load16(p, n));
  } else {
    typename V::Element lanes[V::width] = {};
    for (int k = 0; k < n && k < V::width; ++k) lanes[k] = static_cast<typename V::Element>(p[k]);
    return V::load(lanes);
  }
}

// Round lanes 0 to n - 1 once, to the storage type, and store them.
template <typename V, typename S>
inline void store_lanes(V x, S* p, int64_t n) {
  if constexpr (std::is_same_v<S, typename V::Element>) {
    n >= V::width ? x.store(p) : x.store(p, n);
  } else if constexpr (V::is_simd && std::is_same_v<S, Half>) {
    V::store16(x.to_float16(), p, n);
  } else if constexpr (V::is_simd && std::is_same_v<S, BFloat16>) {
    V::store16(x.to_bfloat16(), p, n);
  } else {
    typename V::Element lanes[V::width];
    x.store(lanes);
    for (int k = 0; k < n && k < V::width; ++k) p[k] = static_cast<S>(static_cast<float>(lanes[k]));
  }
}

// load_lanes for rows with elements `stride` apart.
template <typename V, typename S>
inline V load_strided(const S* p, int64_t stride, int64_t n) {
  if (stride == 1) return load_lanes<V>(p, n);
  typename V::Element lanes[V::width] = {};
  for (int k = 0; k < n && k < V::width; ++k) lanes[k] = static_cast<typename V::Element>(p[k * stride]);
  return V::load(lanes);
}

// Memory aligned to cache lines: a vector of 64 bytes that straddles two lines costs twice as much.
template <typename T>
struct LineAllocator {
  using value_type = T;
  LineAllocator() = default;
  template <typename U>
  LineAllocator(const LineAllocator<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const LineAllocator&) const { return true; }
  bool operator!=(const LineAllocator&) const { return false; }
};
template <typename T>
using Memory = std::vector<T, LineAllocator<T>>;

// One thread's memory, kept between calls; it grows and never shrinks.
template <typename T>
inline T* scratch(Memory<T>& memory, int64_t size) {
  if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
  return memory.data();
}

}  // namespace byola::BYOLA_SIMD
