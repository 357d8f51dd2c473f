// Both views of every sample in one pass over the batch: pre-norm, mix, crop and resize, fader, sums.
// BYOL-A, arXiv:2103.06695; the fader: arXiv:2204.07402.
//
// exp(x) is computed once per sample and serves both views. Each view mixes only the crop's rows and columns (one exp
// of the partner and one log per element) and resizes each mixed row along time while it is in the L1 cache; an output
// row is a weighted sum of two or four resized rows. No buffer of the batch's size.
// Reads x and two partners per sample; writes two views and 48 bytes of sums.
#include <cmath>

#include "philox.h"
#include "resize.h"
#include "tensors.h"

namespace byola::BYOLA_SIMD {

namespace {

enum class Mixup { kLog, kLinear, kGaussian, kNone };

Mixup parse_mixup(const std::string& name) {
  if (name == "log") return Mixup::kLog;
  if (name == "linear") return Mixup::kLinear;
  if (name == "gaussian") return Mixup::kGaussian;
  BYOLA_CHECK(name == "none", "mixup: got ", name);
  return Mixup::kNone;
}

template <typename T>
inline void prefetch_row(const T* row, int64_t count) {
  for (int64_t k = 0; k < count; k += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + k, 0, 2);
}

// Rows to mix in: from the bank (pre-normalised) or from the pool (not).
template <typename V>
struct Partners {
  using Real = typename V::Element;
  Spectrograms rows;
  PreNorm norm;
  bool direct;  // rows can be read in place, without a copy

  Partners(const Spectrograms& source, const PreNorm& pre_norm) : rows(source), norm(pre_norm) {
    direct = rows.dtype == dtype_of<Real>() && rows.frame_stride == 1 && norm.mean == 0 && norm.scale == 1;
  }

  // Prefetch a mel row that will be read soon: the hardware cannot predict which partner comes next.
  void prefetch(int64_t index, int64_t mel) const {
    if (direct && index >= 0) prefetch_row(rows.row<Real>(index, mel), rows.frames);
  }

  // Columns c0 to c1 - 1 of one mel row: in place, or converted into `memory`.
  const Real* row(int64_t index, int64_t mel, int64_t c0, int64_t c1, Real* memory) const {
    if (direct) return rows.row<Real>(index, mel) + c0;
    with_float_type(rows.dtype, "partners", [&](auto kind) {
      using S = decltype(kind);
      const S* from = rows.row<S>(index, mel);
      const V shift = V::set(Real(norm.mean)), scale = V::set(Real(norm.scale));
      for (int64_t c = c0; c < c1; c += V::width) {
        const V value = load_strided<V>(from + c * rows.frame_stride, rows.frame_stride, c1 - c);
        ((value - shift) * scale).store(memory + (c - c0));
      }
    });
    return memory;
  }
};

// Standard normals of one sample and view by the Box-Muller transform, four per Philox call.
template <typename Real>
void draw_normals(Real* out, int64_t count, uint64_t seed, uint32_t step, uint32_t sample, uint32_t view) {
  constexpr double kTurn = 6.283185307179586;
  for (int64_t k = 0; k < count; k += 4) {
    const auto u = philox({step, sample, view, uint32_t(kNoise + k / 4)}, seed);
    for (int pair = 0; pair < 2; ++pair) {
      const double radius = std::sqrt(-2 * std::log(((u[2 * pair] >> 8) + 1) * 0x1p-24));
      const double angle = kTurn * ((u[2 * pair + 1] >> 8) * 0x1p-24);
      if (k + 2 * pair < count) out[k + 2 * pair] = Real(radius * std::cos(angle));
      if (k + 2 * pair + 1 < count) out[k + 2 * pair + 1] = Real(radius * std::sin(angle));
    }
  }
}

}  // namespace

// x (B, F, T), pool (P, F, T), bank (N, F, T), stats (2,) -> out (2, B, *size), sums (2, B, 3)
Tensor augment_views_out_cpu(const Tensor& x, const std::optional<Tensor>& pool, const std::optional<Tensor>& bank,
                             const std::optional<Tensor>& bank_count, const std::optional<Tensor>& stats,
                             const Tensor& lam, const Tensor& bank_index, const Tensor& crop, const Tensor& fader,
                             const Tensor& rng, int64_t sample_offset, const Sizes& canvas,
                             const std::string& interpolation, const std::string& mixup_name, Tensor out) {
  const Spectrograms source(x, "x");
  const int64_t batch = source.count, mels = source.mels, frames = source.frames;
  BYOLA_CHECK(out.dim() == 4 && out.is_contiguous() && out.scalar_type() == x.scalar_type() && out.size(0) == 2 &&
                  out.size(1) == batch,
              "out: expected a contiguous (2, B, F, T) tensor in the dtype of x");
  BYOLA_CHECK(lam.numel() == 2 * batch && bank_index.numel() == 2 * batch && crop.numel() == 8 * batch &&
                  fader.numel() == 4 * batch && rng.numel() == 2,
              "parameters: expected two views of B samples");
  const Sizes size{out.size(2), out.size(3)};
  BYOLA_CHECK(fits(size, canvas, mels, frames), kFits);
  const int64_t elements = size[0] * size[1];
  const bool bicubic = is_bicubic(interpolation);
  const Mixup mixup = parse_mixup(mixup_name);
  const PreNorm norm = pre_norm(stats);
  const bool from_bank = bank && bank_count && data<int64_t>(as_contiguous<int64_t>(*bank_count))[0] > 0;
  const Spectrograms partner_rows(from_bank ? *bank : pool ? *pool : x, "partners");
  BYOLA_CHECK(partner_rows.mels == mels && partner_rows.frames == frames, "partners: expected the (F, T) of x");

  const Tensor boxes = as_contiguous<int64_t>(crop), index = as_contiguous<int64_t>(bank_index);
  const Tensor words = as_contiguous<int64_t>(rng), ends = as_contiguous<double>(fader);
  Tensor sums = new_on_cpu({2, batch, 3}, ScalarType::Double);

  with_float_type(x.scalar_type(), "x", [&](auto kind) {
    using S = decltype(kind);
    using V = Vector<S>;
    using Real = Compute<S>;
    const Tensor weights = as_contiguous<Real>(lam);
    const Partners<V> partners(partner_rows, from_bank ? PreNorm{} : norm);
    const V shift = V::set(Real(norm.mean)), scale = V::set(Real(norm.scale)), eps = V::set(kEps);
    const int64_t stride = (frames + V::width - 1) / V::width * V::width;
    const bool needs_exp = mixup == Mixup::kLog || mixup == Mixup::kGaussian;

    torch::stable::parallel_for(0, batch, grain(2 * elements), [&](int64_t begin, int64_t end) {
      CropResizer<V> resizer(mels, frames, size, canvas, bicubic);
      static thread_local Memory<Real> powers_memory, normals_memory, partner_memory, fade_memory;
      Real* powers = scratch(powers_memory, needs_exp ? mels * stride + V::width : 0);  // exp of the clean input
      Real* normals = scratch(normals_memory, mixup == Mixup::kGaussian ? mels * frames + V::width : 0);
      Real* partner_row = scratch(partner_memory, stride + V::width);
      Real* fade = scratch(fade_memory, resizer.padded());

      for (int64_t b = begin; b < end; ++b) {
        const auto clean = [&](int64_t f, int64_t c, int64_t n) {
          const S* from = source.row<S>(b, f) + c * source.frame_stride;
          return (load_strided<V>(from, source.frame_stride, n) - shift) * scale;
        };
        if (needs_exp)
          for (int64_t f = 0; f < mels; ++f)
            for (int64_t c = 0; c < frames; c += V::width) exp(clean(f, c, frames - c)).store(powers + f * stride + c);

        for (int64_t view = 0; view < 2; ++view) {
          const int64_t row = view * batch + b, partner = std::min(data<int64_t>(index)[row], partner_rows.count - 1);
          const V of_z = V::set(data<Real>(weights)[row]), of_x = V::set(1) - of_z;
          if (mixup == Mixup::kGaussian)
            draw_normals(normals, mels * frames, uint64_t(data<int64_t>(words)[0]), uint32_t(data<int64_t>(words)[1]),
                         uint32_t(sample_offset + b), uint32_t(view));

          // The partner of the next view or sample, prefetched while this one is mixed.
          const int64_t next = view == 0 ? row + batch : row + 1 - batch;
          const int64_t next_partner = view == 0 || b + 1 < end ? data<int64_t>(index)[next] : -1;
          const auto mix = [&](int64_t f, int64_t c0, int64_t c1, Real* to) {
            if (mixup == Mixup::kLog || mixup == Mixup::kLinear) partners.prefetch(next_partner, f);
            if (view == 1 && b + 1 < end && source.frame_stride == 1) prefetch_row(source.row<S>(b + 1, f), frames);
            if (mixup == Mixup::kGaussian) {
              for (int64_t c = c0; c < c1; c += V::width, to += V::width) {
                const V noise = exp(of_z * V::load(normals + f * frames + c));
                log_positive(fma(of_x, V::load(powers + f * stride + c), noise + eps)).store(to);
              }
            } else if (mixup == Mixup::kNone || partner < 0) {
              for (int64_t c = c0; c < c1; c += V::width, to += V::width) clean(f, c, c1 - c).store(to);
            } else {
              const Real* z = partners.row(partner, f, c0, c1, partner_row);
              for (int64_t c = c0; c < c1; c += V::width, to += V::width, z += V::width) {
                const V other = load_lanes<V>(z, c1 - c);
                if (mixup == Mixup::kLinear)
                  fma(of_x, clean(f, c, c1 - c), of_z * other).store(to);
                else
                  log_positive(fma(of_x, V::load(powers + f * stride + c), fma(of_z, exp(other), eps))).store(to);
              }
            }
          };

          const double head = data<double>(ends)[2 * row], tail = data<double>(ends)[2 * row + 1];
          for (int64_t t = 0; t < resizer.padded(); ++t)
            fade[t] = t < size[1] ? Real(head + (tail - head) * (double(t) / std::max<int64_t>(size[1] - 1, 1))) : 0;
          // Sums around each lane's first output, because in float32 the squares of a large mean would drown a small
          // variance.
          double total[V::width] = {}, squares[V::width] = {};
          V pivot = V::set(0);
          S* target = mutable_data<S>(out) + row * elements;
          const auto emit = [&](int64_t o, auto sum) {
            V row_total = V::set(0), row_squares = V::set(0);
            for (int64_t t = 0; t < size[1]; t += V::width) {
              const V y = sum(t) + V::load(fade + t);
              store_lanes(y, target + o * size[1] + t, size[1] - t);
              if (o == 0 && t == 0) pivot = y;
              V off = y - pivot;
              if (size[1] - t < V::width) off = off.first_lanes(size[1] - t);
              row_total = row_total + off;
              row_squares = fma(off, off, row_squares);
            }
            row_total.add_to(total);
            row_squares.add_to(squares);
          };
          resizer.run(data<int64_t>(boxes) + 4 * row, mix, emit);

          Real pivots[V::width];
          pivot.store(pivots);
          double* sum = mutable_data<double>(sums) + 3 * row;
          sum[0] = double(elements), sum[1] = sum[2] = 0;
          for (int64_t k = 0; k < std::min<int64_t>(V::width, size[1]); ++k) {
            const double n = double(size[0] * ((size[1] - k + V::width - 1) / V::width)), p = double(pivots[k]);
            sum[1] += total[k] + n * p;
            sum[2] += squares[k] + p * (2 * total[k] + n * p);
          }
        }
      }
    });
  });
  return sums;
}

BYOLA_OPS(augment_views, m) { m.impl("augment_views_out", TORCH_BOX(&augment_views_out_cpu)); }

}  // namespace byola::BYOLA_SIMD
