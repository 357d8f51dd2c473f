// V views of every sample in one pass over the batch: pre-norm, mix, crop and resize, fader, sums.
// BYOL-A, arXiv:2103.06695; the fader: arXiv:2204.07402.
//
// exp(x) is computed once per sample and serves all views; where the batch fits in the cache and its samples are each
// other's partners, all of them first, so that each also serves the views that it is mixed into. A view mixes four rows
// at a time, and only the crop's rows and columns, just before the resize reads them.
// Reads x and a partner for each view; writes the views and 24 bytes of sums for each. The only buffer of the batch's
// size is that of exp(x), kept between calls.
#include <cmath>
#include <tuple>

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

// exp of a batch's samples, kept between calls; not larger, because from a slower memory it would save nothing.
constexpr int64_t kMostSharedBytes = int64_t(1) << 24;
template <typename Real>
Memory<Real>& shared_memory() {
  static thread_local Memory<Real> memory;
  return memory;
}

// Memory that will be read or written soon, fetched to the second-level cache a few lines at a time: more at once would
// hold up loads. The hardware's own prefetch cannot know the partner that comes next, nor keep up with the rest.
struct Ahead {
  const char *next = nullptr, *end = nullptr;

  template <typename T>
  static Ahead of(const T* start, int64_t count) {
    return {reinterpret_cast<const char*>(start), reinterpret_cast<const char*>(start + count)};
  }
  template <int Lines>
  BYOLA_IN_PLACE void fetch() {
    if (next >= end) return;
#pragma GCC unroll 8
    for (int k = 0; k < Lines; ++k) __builtin_prefetch(next + 64 * k, 0, 2);
    next += 64 * Lines;
  }
  void fetch_all() {
    while (next < end) fetch<4>();
  }
};

// Rows to mix, as they are read: in place, or converted to the compute type; and their pre-normalisation.
template <typename V>
struct Rows {
  using Real = typename V::Element;
  Spectrograms source;
  bool in_place;
  Four<V> shift, scale;

  Rows(const Spectrograms& rows, const PreNorm& norm)
      : source(rows), in_place(rows.dtype == dtype_of<Real>() && rows.frame_stride == 1),
        shift(Four<V>::set(Real(norm.mean))), scale(Four<V>::set(Real(norm.scale))) {}

  // Pointers to column 0 of four mel rows; columns c0 to c1 - 1 may be read. `memory` holds four rows, `stride` apart.
  void point(const Real* to[4], int64_t sample, const int64_t f[4], int64_t c0, int64_t c1, Real* memory,
             int64_t stride) const {
    for (int k = 0; k < 4; ++k) {
      if (in_place) {
        to[k] = source.row<Real>(sample, f[k]);
        continue;
      }
      with_float_type(source.dtype, "partners", [&](auto kind) {
        using S = decltype(kind);
        const S* from = source.row<S>(sample, f[k]);
        const int64_t step = source.frame_stride;
        Real* row = memory + k * stride;
        for (int64_t c = c0; c < c1; c += V::width) load_strided<V>(from + c * step, step, c1 - c).store(row + c);
      });
      to[k] = memory + k * stride;
    }
  }
  // Some rows of a sample, unless they lie in place far apart.
  Ahead ahead(int64_t sample, int64_t top, int64_t count) const {
    if (!in_place || source.mel_stride > 2 * source.frames) return {};
    return Ahead::of(source.row<Real>(sample, top), count * source.mel_stride);
  }
  BYOLA_IN_PLACE Four<V> load(const Real* const from[4], int64_t c, int64_t c1) const {
    const int64_t n = c1 - c;
    return {load_lanes<V>(from[0] + c, n), load_lanes<V>(from[1] + c, n), load_lanes<V>(from[2] + c, n),
            load_lanes<V>(from[3] + c, n)};
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

// x (B, F, T), pool (P, F, T), bank (N, F, T), stats (2,) -> out (V, B, *size), sums (V, B, 3)
Tensor augment_views_out_cpu(const Tensor& x, const std::optional<Tensor>& pool, const std::optional<Tensor>& bank,
                             const std::optional<Tensor>& bank_count, const std::optional<Tensor>& stats,
                             const Tensor& lam, const Tensor& bank_index, const Tensor& crop, const Tensor& fader,
                             const Tensor& rng, int64_t sample_offset, int64_t first_view, const Sizes& canvas,
                             const std::string& interpolation, const std::string& mixup_name, Tensor out) {
  const Spectrograms source(x, "x");
  const int64_t batch = source.count, mels = source.mels, frames = source.frames;
  BYOLA_CHECK(out.dim() == 4 && out.is_contiguous() && out.scalar_type() == x.scalar_type() && out.size(1) == batch,
              "out: expected a contiguous (V, B, F, T) tensor in the dtype of x");
  const int64_t views = out.size(0), of_all = views * batch;
  BYOLA_CHECK(lam.numel() == of_all && bank_index.numel() == of_all && crop.numel() == 4 * of_all &&
                  fader.numel() == 2 * of_all && rng.numel() == 2,
              "parameters: expected ", views, " views of ", batch, " samples");
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
  Tensor sums = new_on_cpu({views, batch, 3}, ScalarType::Double);

  with_float_type(x.scalar_type(), "x", [&](auto kind) {
    using S = decltype(kind);
    using V = Vector<S>;
    using Real = Compute<S>;
    using V4 = Four<V>;
    const Tensor weights = as_contiguous<Real>(lam);
    const Rows<V> inputs(source, norm), partners(partner_rows, from_bank ? PreNorm{} : norm);
    const int64_t stride = (frames + V::width - 1) / V::width * V::width, sample_powers = mels * stride;
    const bool needs_exp = mixup == Mixup::kLog || mixup == Mixup::kGaussian;
    const auto layout = [](const Spectrograms& s) {
      return std::tuple(s.start, s.dtype, s.count, s.sample_stride, s.mel_stride, s.frame_stride);
    };
    const bool own_partners = layout(partner_rows) == layout(source) && !from_bank && batch > 1;
    const bool shared =
        mixup == Mixup::kLog && own_partners && batch * sample_powers * int64_t(sizeof(Real)) <= kMostSharedBytes;

    const auto compute_powers = [&](int64_t b, Real* powers, Real* memory) {
      const V4 shift = inputs.shift, scale = inputs.scale;
      Ahead next_input = inputs.ahead(b, 8, mels), next_powers = Ahead::of(powers + 8 * stride, sample_powers);
      for (int64_t start = 0; start < mels; start += 4) {
        int64_t f[4];  // past the end, the last row again
        const Real* from[4];
        Real* to[4];
        for (int k = 0; k < 4; ++k) f[k] = std::min(start + k, mels - 1), to[k] = powers + f[k] * stride;
        inputs.point(from, b, f, 0, frames, memory, stride);
        for (int64_t c = 0; c < frames; c += V::width) {
          exp_or_zero((inputs.load(from, c, frames) - shift) * scale).store(to, c);
          next_input.template fetch<V::width / 4>(), next_powers.template fetch<V::width / 4>();
        }
      }
    };

    Real* shared_powers = shared ? scratch(shared_memory<Real>(), batch * sample_powers) : nullptr;
    if (shared)
      torch::stable::parallel_for(0, batch, grain(elements), [&](int64_t begin, int64_t end) {
        static thread_local Memory<Real> memory;
        for (int64_t b = begin; b < end; ++b)
          compute_powers(b, shared_powers + b * sample_powers, scratch(memory, 4 * stride));
      });

    torch::stable::parallel_for(0, batch, grain(views * elements), [&](int64_t begin, int64_t end) {
      CropResizer<V> resizer(mels, frames, size, canvas, bicubic);
      static thread_local Memory<Real> powers_memory, normals_memory, rows_memory, fade_memory;
      Real* own_powers = scratch(powers_memory, needs_exp && !shared ? sample_powers : 0);
      Real* normals = scratch(normals_memory, mixup == Mixup::kGaussian ? mels * frames + V::width : 0);
      Real* memory = scratch(rows_memory, 8 * stride);
      Real* fade = scratch(fade_memory, resizer.padded());
      std::fill(fade, fade + resizer.padded(), Real(0));
      std::vector<double> ramp(size[1]);
      for (int64_t t = 0; t < size[1]; ++t) ramp[t] = double(t) / std::max<int64_t>(size[1] - 1, 1);

      for (int64_t b = begin; b < end; ++b) {
        const Real* powers = shared ? shared_powers + b * sample_powers : own_powers;
        if (needs_exp && !shared) compute_powers(b, own_powers, memory);

        for (int64_t view = 0; view < views; ++view) {
          const int64_t row = view * batch + b, partner = std::min(data<int64_t>(index)[row], partner_rows.count - 1);
          const V4 of_z = V4::set(data<Real>(weights)[row]), of_x = V4::set(1) - of_z, eps = V4::set(kEps);
          if (mixup == Mixup::kGaussian)
            draw_normals(normals, mels * frames, uint64_t(data<int64_t>(words)[0]), uint32_t(data<int64_t>(words)[1]),
                         uint32_t(sample_offset + b), uint32_t(first_view + view));

          // What the next view reads and its first outputs, fetched while this one is mixed.
          Ahead next_partner, next_input, next_out;
          const bool is_last = view == views - 1;
          if (!is_last || b + 1 < end) {
            const int64_t next = is_last ? b + 1 : row + batch;
            const int64_t* box = data<int64_t>(boxes) + 4 * next;
            const int64_t top = std::clamp<int64_t>(box[0] - (canvas[0] - mels) / 2, 0, mels - 1);
            const int64_t count = std::clamp<int64_t>(box[2], 0, mels - top);
            const int64_t sample = std::min(data<int64_t>(index)[next], partner_rows.count - 1);
            if (shared && sample >= 0)
              next_partner = Ahead::of(shared_powers + sample * sample_powers + top * stride, count * stride);
            else if (sample >= 0 && (mixup == Mixup::kLog || mixup == Mixup::kLinear))
              next_partner = partners.ahead(sample, top, count);
            if (is_last)
              next_input = shared ? Ahead::of(powers + sample_powers, sample_powers) : inputs.ahead(b + 1, 0, mels);
            next_out = Ahead::of(mutable_data<S>(out) + next * elements, std::min<int64_t>(16 * size[1], elements));
          }
          const auto fetch = [&]() BYOLA_IN_PLACE {
            next_partner.template fetch<V::width / 2>(), next_input.template fetch<V::width / 2>();
            next_out.template fetch<V::width / 4>();
          };
          const auto mix = [&](const int64_t* f, int64_t c0, int64_t c1, Real* const* to) {
            const Real *of_powers[4], *x[4], *z[4];
            for (int k = 0; k < 4; ++k) of_powers[k] = powers + f[k] * stride;
            const V4 x_shift = inputs.shift, x_scale = inputs.scale, z_shift = partners.shift, z_scale = partners.scale;
            const V4 weight = of_x, z_weight = of_z, epsilon = eps;
            if (mixup == Mixup::kGaussian) {
              for (int k = 0; k < 4; ++k) z[k] = normals + f[k] * frames;
              for (int64_t c = c0; c < c1; c += V::width, fetch()) {
                const V4 noise = exp_or_zero(z_weight * V4::load(z, c));
                log_positive(fma(weight, V4::load(of_powers, c), noise + epsilon)).store(to, c);
              }
            } else if (mixup == Mixup::kNone || partner < 0) {
              inputs.point(x, b, f, c0, c1, memory, stride);
              for (int64_t c = c0; c < c1; c += V::width, fetch())
                ((inputs.load(x, c, c1) - x_shift) * x_scale).store(to, c);
            } else if (shared) {
              for (int k = 0; k < 4; ++k) z[k] = shared_powers + partner * sample_powers + f[k] * stride;
              for (int64_t c = c0; c < c1; c += V::width, fetch())
                log_positive(fma(weight, V4::load(of_powers, c), fma(z_weight, V4::load(z, c), epsilon))).store(to, c);
            } else {
              partners.point(z, partner, f, c0, c1, memory, stride);
              if (mixup == Mixup::kLinear) inputs.point(x, b, f, c0, c1, memory + 4 * stride, stride);
              for (int64_t c = c0; c < c1; c += V::width, fetch()) {
                const V4 loaded = partners.load(z, c, c1), other = from_bank ? loaded : (loaded - z_shift) * z_scale;
                if (mixup == Mixup::kLinear)
                  fma(weight, (inputs.load(x, c, c1) - x_shift) * x_scale, z_weight * other).store(to, c);
                else
                  log_positive(fma(weight, V4::load(of_powers, c), fma(z_weight, exp_or_zero(other), epsilon)))
                      .store(to, c);
              }
            }
          };

          const double head = data<double>(ends)[2 * row], tail = data<double>(ends)[2 * row + 1];
          for (int64_t t = 0; t < size[1]; ++t) fade[t] = Real(head + (tail - head) * ramp[t]);
          // Sums around each lane's first output, because in float32 the squares of a large mean would drown a small
          // variance. Two rows at a time, so that an addition does not wait for the one before.
          double total[V::width] = {}, squares[V::width] = {};
          V pivot = V::set(0);
          S* target = mutable_data<S>(out) + row * elements;
          const auto emit = [&](int64_t o, int64_t count, int64_t t, auto sum) BYOLA_IN_PLACE {
            const V of_fade = V::load(fade + t);
            const int64_t row_size = size[1], n = row_size - t;
            S* to = target + o * row_size + t;
            if (o == 0 && t == 0) pivot = sum(0, of_fade);
            const V around = pivot;
            const auto put = [&](int64_t k, V& totals, V& total_squares) BYOLA_IN_PLACE {
              const V y = sum(k, of_fade);
              store_lanes(y, to + k * row_size, n);
              __builtin_prefetch(to + (k + count) * row_size, 1, 2);  // of the next rows
              V off = y - around;
              if (n < V::width) off = off.first_lanes(n);
              totals = totals + off;
              total_squares = fma(off, off, total_squares);
            };
            V even = V::set(0), odd = even, even_squares = even, odd_squares = even;
            int64_t k = 0;
            for (; k + 1 < count; k += 2) {
              put(k, even, even_squares);
              put(k + 1, odd, odd_squares);
            }
            if (k < count) put(k, even, even_squares);
            (even + odd).add_to(total);
            (even_squares + odd_squares).add_to(squares);
          };
          resizer.run(data<int64_t>(boxes) + 4 * row, mix, emit);
          next_partner.fetch_all(), next_input.fetch_all(), next_out.fetch_all();

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
