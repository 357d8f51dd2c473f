// y = log((1 - lam) exp(x) + lam exp(z) + eps) and its gradients. BYOL-A, arXiv:2103.06695.
// Reads x and z once, writes y once: 12 bytes per element in float32. Limited by exp and log, not by memory.
#include <tuple>

#include "tensors.h"

namespace byola::BYOLA_SIMD {

namespace {

// Call f(sample, first, last) for stretches of one sample's elements, in parallel.
template <typename F>
void over_samples(int64_t batch, int64_t elements, F f) {
  constexpr int64_t kStretch = 8192;
  const int64_t stretches = std::max<int64_t>(1, (elements + kStretch - 1) / kStretch);
  torch::stable::parallel_for(0, batch * stretches, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t b = k / stretches, first = k % stretches * kStretch;
      f(b, b * elements + first, b * elements + std::min(first + kStretch, elements));
    }
  });
}

}  // namespace

// x, z (B, ...), lam (B,) -> (B, ...)
Tensor log_mixup_exp_cpu(const Tensor& x, const Tensor& z, const Tensor& lam) {
  const Tensor xs = compact(x), zs = compact(z);
  BYOLA_CHECK(x.scalar_type() == z.scalar_type() && x.numel() == z.numel(), "z: expected the dtype and shape of x");
  BYOLA_CHECK(x.dim() > 0 && lam.numel() == x.size(0), "lam: expected one weight for each sample");
  Tensor y = torch::stable::new_empty(x, x.sizes());
  const int64_t batch = x.size(0), elements = batch ? x.numel() / batch : 0;
  with_float_type(x.scalar_type(), "x", [&](auto kind) {
    using S = decltype(kind);
    using V = Vector<S>;
    using Real = Compute<S>;
    const Tensor weights = as_contiguous<Real>(lam);
    over_samples(batch, elements, [&](int64_t b, int64_t first, int64_t last) {
      const V of_z = V::set(data<Real>(weights)[b]), of_x = V::set(1) - of_z, eps = V::set(kEps);
      const auto mix = [&](auto a, auto c, auto weight, auto z_weight, auto epsilon) BYOLA_IN_PLACE {
        return log_positive(fma(weight, exp_or_zero(a), fma(z_weight, exp_or_zero(c), epsilon)));
      };
      const S *a = data<S>(xs), *c = data<S>(zs);
      S* to = mutable_data<S>(y);
      const auto four = [](const S* p) BYOLA_IN_PLACE {
        return Four<V>{load_lanes<V>(p, V::width), load_lanes<V>(p + V::width, V::width),
                       load_lanes<V>(p + 2 * V::width, V::width), load_lanes<V>(p + 3 * V::width, V::width)};
      };
      int64_t k = first;
      for (; k + 4 * V::width <= last; k += 4 * V::width) {
        const auto y4 = mix(four(a + k), four(c + k), Four<V>::all(of_x), Four<V>::all(of_z), Four<V>::all(eps));
        const V parts[] = {y4.a, y4.b, y4.c, y4.d};
        for (int j = 0; j < 4; ++j) store_lanes(parts[j], to + k + j * V::width, V::width);
      }
      for (; k < last; k += V::width)
        store_lanes(mix(load_lanes<V>(a + k, last - k), load_lanes<V>(c + k, last - k), of_x, of_z, eps), to + k,
                    last - k);
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> log_mixup_exp_backward_cpu(const Tensor& grad, const Tensor& x, const Tensor& z,
                                                      const Tensor& lam) {
  const Tensor gs = compact(grad), xs = compact(x);
  const Tensor zs = compact(z);
  BYOLA_CHECK(grad.scalar_type() == x.scalar_type() && grad.numel() == x.numel(),
              "grad: expected the dtype and shape of x");
  BYOLA_CHECK(x.scalar_type() == z.scalar_type() && x.numel() == z.numel(), "z: expected the dtype and shape of x");
  BYOLA_CHECK(x.dim() > 0 && lam.numel() == x.size(0), "lam: expected one weight for each sample");
  Tensor to_x = torch::stable::new_empty(x, x.sizes()), to_z = torch::stable::new_empty(z, z.sizes());
  const int64_t batch = x.size(0), elements = batch ? x.numel() / batch : 0;
  with_float_type(x.scalar_type(), "x", [&](auto kind) {
    using S = decltype(kind);
    using V = Vector<S>;
    using Real = Compute<S>;
    const Tensor weights = as_contiguous<Real>(lam);
    over_samples(batch, elements, [&](int64_t b, int64_t first, int64_t last) {
      const V of_z = V::set(data<Real>(weights)[b]), of_x = V::set(1) - of_z, eps = V::set(kEps);
      for (int64_t k = first; k < last; k += V::width) {
        const V a = of_x * exp(load_lanes<V>(data<S>(xs) + k, last - k));
        const V c = of_z * exp(load_lanes<V>(data<S>(zs) + k, last - k));
        const V scaled = load_lanes<V>(data<S>(gs) + k, last - k) / (a + c + eps);
        store_lanes(scaled * a, mutable_data<S>(to_x) + k, last - k);
        store_lanes(scaled * c, mutable_data<S>(to_z) + k, last - k);
      }
    });
  });
  return {to_x, to_z};
}

BYOLA_OPS(log_mixup_exp, m) {
  m.impl("log_mixup_exp", TORCH_BOX(&log_mixup_exp_cpu));
  m.impl("log_mixup_exp_backward", TORCH_BOX(&log_mixup_exp_backward_cpu));
}

}  // namespace byola::BYOLA_SIMD
