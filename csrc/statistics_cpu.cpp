// Mean and std of a batch, and running ones: from the sums of sample_sums_cpu, a few numbers.
#include <cmath>

#include "tensors.h"

namespace byola::BYOLA_SIMD {

namespace {

// Mean and unbiased std in the dtype of the statistics; 0 and 1 of nothing.
template <typename Real>
Tensor mean_and_std(Real mean, Real std, bool some) {
  Tensor stats = new_on_cpu({2}, dtype_of<Real>());
  mutable_data<Real>(stats)[0] = some ? mean : Real(0);
  mutable_data<Real>(stats)[1] = some ? std : Real(1);
  return stats;
}

// Chan's merge, each operation rounded once as in running_stats__reference.
template <typename Real>
Tensor merge(Tensor& mean, Tensor& variance, Tensor& count, Tensor& updates, const Tensor& sums, int64_t max_updates) {
  double kept[3] = {};
  for (const double *p = data<double>(sums), *end = p + sums.numel(); p < end; p += 3)
    if (std::isfinite(p[0]) && std::isfinite(p[1]) && std::isfinite(p[2]))
      for (int k = 0; k < 3; ++k) kept[k] += p[k];
  const double n = std::max(kept[0], 1.0), of_batch = kept[1] / n;
  const Real of_batch_variance = Real(std::max(kept[2] / n - of_batch * of_batch, 0.0));
  int64_t& seen = mutable_data<int64_t>(count)[0];
  int64_t& number = mutable_data<int64_t>(updates)[0];
  const int64_t added = max_updates >= 0 && number >= max_updates ? 0 : int64_t(kept[0]);
  Real &m = mutable_data<Real>(mean)[0], &v = mutable_data<Real>(variance)[0];
  seen += added;
  const Real weight = Real(added) / Real(std::max<int64_t>(seen, 1)), distance = Real(of_batch) - m;
  const Real spread = weight * (1 - weight) * (distance * distance);
  v = (1 - weight) * v + weight * of_batch_variance + spread;
  m += weight * distance;
  ++number;
  return mean_and_std<Real>(m, std::sqrt(v * Real(seen) / Real(std::max<int64_t>(seen - 1, 1))), seen > 0);
}

}  // namespace

// sums (..., 3) -> (2,) in the given dtype
Tensor batch_stats_cpu(const Tensor& sums, ScalarType dtype) {
  const auto [count, mean, std] = joint_statistics(sums);
  if (dtype == ScalarType::Double) return mean_and_std<double>(mean, std, count > 0);
  const Tensor stats = mean_and_std<float>(float(mean), float(std), count > 0);
  return dtype == ScalarType::Float ? stats : torch::stable::to(stats, dtype);
}

// mean, variance (), count, updates () int64, sums (B, 3) -> (2,) in the dtype of mean
Tensor running_stats__cpu(Tensor mean, Tensor variance, Tensor count, Tensor updates, const Tensor& sums,
                          int64_t max_updates) {
  BYOLA_CHECK(mean.numel() == 1 && variance.numel() == 1 && count.numel() == 1 && updates.numel() == 1,
              "running statistics: expected 0-d tensors");
  BYOLA_CHECK(count.scalar_type() == ScalarType::Long && updates.scalar_type() == ScalarType::Long &&
                  mean.scalar_type() == variance.scalar_type(),
              "running statistics: expected int64 counts, and one dtype of mean and variance");
  const Tensor parts = as_contiguous<double>(sums);
  if (mean.scalar_type() == ScalarType::Double)
    return merge<double>(mean, variance, count, updates, parts, max_updates);
  BYOLA_CHECK(mean.scalar_type() == ScalarType::Float, "mean: expected float32 or float64");
  return merge<float>(mean, variance, count, updates, parts, max_updates);
}

BYOLA_OPS(statistics, m) {
  m.impl("batch_stats", TORCH_BOX(&batch_stats_cpu));
  m.impl("running_stats_", TORCH_BOX(&running_stats__cpu));
}

}  // namespace byola::BYOLA_SIMD
