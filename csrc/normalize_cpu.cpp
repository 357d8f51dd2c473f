// Count, sum and sum of squares of each sample; and (x - mean) / std with the joint statistics of such sums.
// Each op reads x once; normalize writes it once.
#include <cmath>

#include "tensors.h"

namespace byola::BYOLA_SIMD {

namespace {

void normalize_to(const Tensor& x, const Tensor& sums, Tensor& y) {
  const JointStatistics joint = joint_statistics(sums);
  with_float_type(x.scalar_type(), "x", [&](auto kind) {
    using S = decltype(kind);
    using V = Vector<S>;
    using Real = Compute<S>;
    const V shift = V::set(Real(joint.mean)), scale = V::set(Real(1 / joint.std));
    torch::stable::parallel_for(0, x.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
      const S* source = data<S>(x);
      S* target = mutable_data<S>(y);
      for (int64_t k = begin; k < end; k += V::width)
        store_lanes((load_lanes<V>(source + k, end - k) - shift) * scale, target + k, end - k);
    });
  });
}

// Write count, sum and sum of squares of n values, added up in double around their mean: for values that float32, or a
// pivot far from their mean, would not do justice to.
template <typename S>
void careful_sums(double* sums, const S* values, int64_t n) {
  double mean = 0, total = 0, squares = 0;
  for (int64_t k = 0; k < n; ++k) mean += double(values[k]);
  mean /= double(n);
  for (int64_t k = 0; k < n; ++k) {
    const double value = double(values[k]) - mean;
    total += value;
    squares += value * value;
  }
  sums[0] = double(n), sums[1] = total + mean * sums[0], sums[2] = squares + mean * (2 * total + mean * sums[0]);
}

}  // namespace

// x (B, ...) -> (B, 3)
Tensor sample_sums_cpu(const Tensor& x) {
  const Tensor xs = compact(x);
  const int64_t batch = x.size(0), elements = batch ? x.numel() / batch : 0;
  Tensor sums = new_on_cpu({batch, 3}, ScalarType::Double);
  with_float_type(x.scalar_type(), "x", [&](auto kind) {
    using S = decltype(kind);
    using V = Vector<S>;
    torch::stable::parallel_for(0, batch, grain(elements), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const S* source = data<S>(xs) + b * elements;
        // Subtract the first value, because the squares of a large mean would drown a small variance. Sum 8 vectors in
        // the compute dtype, then add them up in double. Lanes past the end add zeros.
        using Real = Compute<S>;
        const Real pivot = elements ? static_cast<Real>(source[0]) : Real(0);
        const V around = V::set(pivot);
        double total[V::width] = {}, squares[V::width] = {};
        for (int64_t k = 0; k < elements;) {
          V few = V::set(0), few_squares = few;
          for (const int64_t stop = std::min(k + 8 * V::width, elements); k < stop; k += V::width) {
            V value = load_lanes<V>(source + k, elements - k) - around;
            if (elements - k < V::width) value = value.first_lanes(elements - k);
            few = few + value;
            few_squares = fma(value, value, few_squares);
          }
          few.add_to(total);
          few_squares.add_to(squares);
        }
        double all = 0, all_squares = 0;
        for (int lane = 0; lane < V::width; ++lane) all += total[lane], all_squares += squares[lane];
        const double n = double(elements), off = all * all, spread = n * all_squares - off, p = double(pivot);
        double* sum = mutable_data<double>(sums) + 3 * b;
        sum[0] = n, sum[1] = all + n * p, sum[2] = all_squares + p * (2 * all + n * p);
        // The pivot is more than 8 standard deviations from the mean (an outlier), or float32 overflowed.
        if (!(off <= 64 * spread) || std::isinf(spread)) careful_sums(sum, source, elements);
      }
    });
  });
  return sums;
}

// x (...), sums (..., 3) -> (...)
Tensor normalize_cpu(const Tensor& x, const Tensor& sums) {
  Tensor y = torch::stable::new_empty(x, x.sizes());
  normalize_to(compact(x), sums, y);
  return y;
}

void normalize__cpu(Tensor x, const Tensor& sums) {
  if (x.is_contiguous()) return normalize_to(x, sums, x);
  torch::stable::copy_(x, normalize_cpu(x, sums));
}

BYOLA_OPS(normalize, m) {
  m.impl("sample_sums", TORCH_BOX(&sample_sums_cpu));
  m.impl("normalize", TORCH_BOX(&normalize_cpu));
  m.impl("normalize_", TORCH_BOX(&normalize__cpu));
}

}  // namespace byola::BYOLA_SIMD
