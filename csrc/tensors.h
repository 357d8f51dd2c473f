// Helpers for tensors of the stable C++ interface: dtypes, pointers, strides, checks with messages.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "storage.h"

namespace byola::BYOLA_SIMD {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

// Opens the function that registers the ops of FILE_cpu.cpp. No static initialiser may do that: it would run on every
// CPU, and here the compiler may use any instruction of the set.
#define BYOLA_OPS(file, m) inline void add_##file(torch::stable::detail::StableLibrary& m)
#define BYOLA_CHECK(condition, ...) STD_TORCH_CHECK(condition, "byola_fast: ", __VA_ARGS__)

// Call f with a value of the C++ type of a floating-point dtype.
template <typename F>
void with_float_type(ScalarType dtype, const char* name, F f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::Half: return f(Half{});
    case ScalarType::BFloat16: return f(BFloat16{});
    default: BYOLA_CHECK(false, name, ": expected a floating-point tensor");
  }
}

template <typename T>
constexpr ScalarType dtype_of() {
  if constexpr (std::is_same_v<T, double>) return ScalarType::Double;
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  if constexpr (std::is_same_v<T, int32_t>) return ScalarType::Int;
  if constexpr (std::is_same_v<T, int64_t>) return ScalarType::Long;
}

// An uninitialised contiguous tensor, without the dispatcher, which takes five times as long.
inline Tensor new_on_cpu(const Sizes& sizes, ScalarType dtype) {
  Sizes strides(sizes.size(), 1);
  for (size_t k = sizes.size(); k-- > 1;) strides[k - 1] = strides[k] * sizes[k];
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), int32_t(dtype),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// The tensor itself if it is contiguous; PyTorch's own takes a call of the dispatcher to find out.
inline Tensor compact(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// The values of a small tensor (parameters, sums) in order, as T. Converted here where the dispatcher would take longer.
template <typename T>
Tensor as_contiguous(const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  if (dtype == dtype_of<T>()) return compact(x);
  const auto converted = [&](auto kind) {
    using S = decltype(kind);
    const Tensor given = compact(x);
    const auto sizes = x.sizes();
    Tensor values = new_on_cpu(Sizes(sizes.begin(), sizes.end()), dtype_of<T>());
    const S* from = static_cast<const S*>(given.data_ptr());
    std::transform(from, from + x.numel(), static_cast<T*>(values.data_ptr()), [](S value) { return T(value); });
    return values;
  };
  switch (dtype) {
    case ScalarType::Float: return converted(float{});
    case ScalarType::Double: return converted(double{});
    case ScalarType::Int: return converted(int32_t{});
    case ScalarType::Long: return converted(int64_t{});
    default: return compact(torch::stable::to(x, dtype_of<T>()));
  }
}

template <typename T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.data_ptr());
}
template <typename T>
T* mutable_data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

// Mean and 1 / max(std, eps) of the pre-normalisation.
struct PreNorm {
  double mean = 0, scale = 1;
};

inline PreNorm pre_norm(const std::optional<Tensor>& stats) {
  if (!stats) return {};
  BYOLA_CHECK(stats->numel() == 2, "stats: expected mean and std");
  double mean, std;
  if (stats->scalar_type() == ScalarType::Float && stats->is_contiguous()) {  // the usual case, without a conversion
    mean = data<float>(*stats)[0], std = data<float>(*stats)[1];
  } else {
    const Tensor values = as_contiguous<double>(*stats);
    mean = data<double>(values)[0], std = data<double>(values)[1];
  }
  return {mean, 1 / (std < kEps ? double(kEps) : std)};
}

struct JointStatistics {
  double count, mean, std;
};

// Mean and unbiased std, at least kEps, of the samples whose count, sum and sum of squares `sums` (..., 3) holds.
inline JointStatistics joint_statistics(const Tensor& sums) {
  const Tensor parts = as_contiguous<double>(sums);
  double count = 0, total = 0, squares = 0;
  for (const double *p = data<double>(parts), *end = p + parts.numel(); p < end; p += 3)
    count += p[0], total += p[1], squares += p[2];
  const double mean = total / (count < 1 ? 1 : count);
  const double variance = (squares - total * mean) / (count < 2 ? 1 : count - 1);
  const double floor = double(kEps);
  return {count, mean, variance < floor * floor ? floor : std::sqrt(variance)};  // NaN stays NaN
}

// A tensor (N, F, T) with any strides.
struct Spectrograms {
  const void* start;
  ScalarType dtype;
  int64_t count, mels, frames, sample_stride, mel_stride, frame_stride;

  explicit Spectrograms(const Tensor& x, const char* name) {
    BYOLA_CHECK(x.dim() == 3, name, ": expected shape (N, F, T)");
    start = x.data_ptr();
    dtype = x.scalar_type();
    count = x.size(0), mels = x.size(1), frames = x.size(2);
    sample_stride = x.stride(0), mel_stride = x.stride(1), frame_stride = x.stride(2);
  }
  template <typename S>
  const S* row(int64_t sample, int64_t mel) const {
    return static_cast<const S*>(start) + sample * sample_stride + mel * mel_stride;
  }
};

// Minimum number of samples per thread, for samples of `elements` elements.
inline int64_t grain(int64_t elements) { return std::max<int64_t>(1, 8192 / std::max<int64_t>(elements, 1)); }

}  // namespace byola::BYOLA_SIMD
