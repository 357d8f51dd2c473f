// lms = log(mel(|STFT(wav)|^2) + eps), optionally (lms - mean) / std: waveforms to log-mel spectrograms in one pass.
//
// Each lane of a vector is a frame. A piece of a waveform (96 frames) is copied into strips, strip[r][q] =
// wav[q hop + r], so that sample n of consecutive frames is one contiguous vector: row n % hop, from column n / hop.
// The same copy converts the dtype and pads by reflection. For each vector of frames, the steps are: window and first
// butterflies, read from the strips, of a transform of half the length (even samples real, odd ones imaginary); the
// other butterflies in the L1 cache; power; the bands' non-zero weights; the logarithm.
// Reads wav once, writes lms once; about 200 KB of scratch per thread for the defaults, no buffer of the batch's size.
#include <algorithm>
#include <map>
#include <memory>
#include <mutex>

#include "fft.h"
#include "tensors.h"

namespace byola::BYOLA_SIMD {

namespace {

constexpr int64_t kPiece = 96;  // frames

template <typename V>
struct Plan {
  using Real = typename V::Element;
  int64_t n_fft;
  bool halved;  // two real samples make one complex element
  Fft<V> fft;
  std::vector<Real> turn;  // halved: exp(-2 pi i k / n_fft) for k = 0 .. n_fft / 4

  explicit Plan(int64_t n) : n_fft(n), halved(n % 2 == 0), fft(halved ? n / 2 : n) {
    for (int64_t k = 0; halved && k <= n / 4; ++k) {
      const double angle = -2 * 3.14159265358979323846 * double(k) / double(n);
      turn.push_back(Real(std::cos(angle)));
      turn.push_back(Real(std::sin(angle)));
    }
  }

  static std::shared_ptr<const Plan> of(int64_t n) {  // cached by length
    static std::mutex mutex;
    static std::map<int64_t, std::shared_ptr<const Plan>> plans;
    const std::lock_guard<std::mutex> guard(mutex);
    auto& plan = plans[n];
    if (!plan) plan = std::make_shared<const Plan>(n);
    return plan;
  }
};

// The settings of one call.
template <typename V>
struct LogMel {
  using Real = typename V::Element;
  static constexpr int64_t W = V::width;

  std::shared_ptr<const Plan<V>> plan;
  int64_t samples, frames, hop, pad, rows, mels;
  std::vector<Real> window;  // times 1/2 if `halved` and 2^-15 for int16 (exact); zeros between if not `halved`
  const Real* bank;
  const int32_t* bands;
  int64_t bins, low, high;  // bins low to high - 1 have a weight in some band
  Real mean, scale;

  // Copy samples first to first + rows - 1 of the reflect-padded waveform; zeros after that, where no frame reads.
  template <typename S>
  void copy(const S* wav, int64_t first, Real* line) const {
    const auto until = [&](int64_t at) { return std::clamp<int64_t>(at - first, 0, rows); };
    const int64_t start = until(0), end = until(samples), reflected = until(samples + pad);
    for (int64_t r = 0; r < start; ++r) line[r] = static_cast<Real>(wav[-(first + r)]);
    for (int64_t r = start; r < end; ++r) line[r] = static_cast<Real>(wav[first + r]);
    for (int64_t r = end; r < reflected; ++r) line[r] = static_cast<Real>(wav[2 * (samples - 1) - (first + r)]);
    for (int64_t r = reflected; r < rows; ++r) line[r] = 0;
  }

  // Fill strips of `columns` (a multiple of the lanes), from frame t0 on; `lines` has room for one hop per lane.
  template <typename S>
  void fill(const S* wav, int64_t t0, int64_t columns, Real* lines, Real* strips) const {
    const int64_t padded = (rows + W - 1) / W * W;
    for (int64_t q = 0; q < columns; q += W) {
      for (int64_t lane = 0; lane < W; ++lane) copy(wav, (t0 + q + lane) * hop - pad, lines + lane * padded);
      for (int64_t r = 0; r < rows; r += W) transpose<V>(lines + r, padded, strips + r * columns + q, columns);
    }
  }

  // Power of the bins that some band needs, for the frames that start at `strips`; offsets[2 m] and offsets[2 m + 1]
  // locate the real and the imaginary part of element m.
  void power_of(const Real* strips, const int64_t* offsets, Real* spectrum, Real* spare, Real* power) const {
    const Real* w = window.data();
    const auto put = [&](int64_t k, Complex<V> x) { fma(x.re, x.re, x.im * x.im).store(power + W * k); };
    const auto at = [&](int64_t k) { return Complex<V>::load(spectrum + 2 * W * plan->fft.position[k]); };
    const auto load = [&](int64_t m) {
      const V even = V::load(strips + offsets[2 * m]), odd = V::load(strips + offsets[2 * m + 1]);
      return Complex<V>{even * V::set(w[2 * m]), odd * V::set(w[2 * m + 1])};
    };
    plan->fft.run(load, spectrum, spare);
    if (!plan->halved) {
      for (int64_t k = low; k < high; ++k) put(k, at(k));
      return;
    }
    // With E and O the transforms of even and odd samples, X[k] = E + w^k O and X[half - k] = conj(E - w^k O).
    const int64_t half = plan->fft.length;
    for (int64_t k = 0; 2 * k <= half; ++k) {
      if ((k < low || k >= high) && (half - k < low || half - k >= high)) continue;
      const Complex<V> z = at(k), y = at(k == 0 ? 0 : half - k);
      const Complex<V> even = {z.re + y.re, z.im - y.im}, odd = {z.im + y.im, y.re - z.re};
      const Complex<V> turned = odd.by(V::set(plan->turn[2 * k]), V::set(plan->turn[2 * k + 1]));
      put(k, even + turned), put(half - k, even - turned);
    }
  }

  V band(int64_t mel, const Real* power) const {
    const int64_t first = bands[2 * mel], last = bands[2 * mel + 1];
    const Real* weights = bank + mel * bins;
    V a = V::set(Real(kEps)), b = V::set(0);
    int64_t k = first;
    for (; k + 1 < last; k += 2) {
      a = fma(V::load(power + W * k), V::set(weights[k]), a);
      b = fma(V::load(power + W * (k + 1)), V::set(weights[k + 1]), b);
    }
    if (k < last) a = fma(V::load(power + W * k), V::set(weights[k]), a);
    return a + b;
  }

  // Compute frames t0 to t1 - 1 of one waveform; `lms` is its (F, T).
  template <typename S, typename Out>
  void piece(const S* wav, int64_t t0, int64_t t1, Out* lms) const {
    static thread_local Memory<Real> memory;
    const int64_t n_fft = plan->n_fft, padded_rows = (rows + W - 1) / W * W;
    const int64_t columns = (t1 - t0 + W - 1) / W * W + (n_fft / hop + W - 1) / W * W;
    const int64_t spectrum_size = 2 * W * plan->fft.length;
    Real* spectrum = scratch(memory, 2 * spectrum_size + W * (bins + 1 + padded_rows) + padded_rows * columns);
    Real *spare = spectrum + spectrum_size, *power = spare + spectrum_size, *lines = power + W * (bins + 1);
    Real* strips = lines + W * padded_rows;
    fill(wav, t0, columns, lines, strips);
    static thread_local std::vector<int64_t> offsets;
    offsets.resize(2 * plan->fft.length);
    for (int64_t n = 0, row = 0, column = 0; n < n_fft; ++n) {
      const int64_t at = row * columns + column;
      if (plan->halved) {
        offsets[n] = at;
      } else {
        offsets[2 * n] = offsets[2 * n + 1] = at;
      }
      if (++row == hop) row = 0, ++column;
    }
    for (int64_t t = t0; t < t1; t += W) {
      power_of(strips + (t - t0), offsets.data(), spectrum, spare, power);
      for (int64_t mel = 0; mel < mels; ++mel) {
        const V y = (log_positive(band(mel, power)) - V::set(mean)) * V::set(scale);
        store_lanes(y, lms + mel * frames + t, t1 - t);
      }
    }
  }
};

}  // namespace

// wav (B, samples) float or int16, window (n,), filter_bank (F, n_fft / 2 + 1), bands (F, 2), stats (2,) -> (B, F, T)
Tensor log_mel_cpu(const Tensor& wav, const Tensor& window, const Tensor& filter_bank, const Tensor& bands,
                   const std::optional<Tensor>& stats, int64_t n_fft, int64_t hop_length, bool center) {
  BYOLA_CHECK(wav.dim() == 2, "wav: expected shape (B, samples)");
  BYOLA_CHECK(n_fft > 0 && hop_length > 0, "n_fft, hop_length: expected at least 1");
  BYOLA_CHECK(window.dim() == 1 && window.numel() <= n_fft, "window: expected shape (n,) with n <= n_fft");
  const int64_t batch = wav.size(0), samples = wav.size(1), bins = n_fft / 2 + 1, pad = center ? n_fft / 2 : 0;
  BYOLA_CHECK(filter_bank.dim() == 2 && filter_bank.size(1) == bins, "filter_bank: expected (F, n_fft // 2 + 1)");
  BYOLA_CHECK(samples > pad && samples + 2 * pad >= n_fft, "wav: too few samples for one frame");
  const int64_t mels = filter_bank.size(0), frames = 1 + (samples + 2 * pad - n_fft) / hop_length;
  BYOLA_CHECK(bands.dim() == 2 && bands.size(0) == mels && bands.size(1) == 2, "bands: expected shape (F, 2)");
  const Tensor wide_edges = as_contiguous<int64_t>(bands), edges = as_contiguous<int32_t>(bands);
  int64_t low = bins, high = 0;
  for (int64_t mel = 0; mel < mels; ++mel) {
    const int64_t first = data<int64_t>(wide_edges)[2 * mel], last = data<int64_t>(wide_edges)[2 * mel + 1];
    BYOLA_CHECK(first >= 0 && first <= last && last <= bins, "bands: expected 0 <= first <= last <= n_fft // 2 + 1");
    if (first < last) low = std::min(low, first), high = std::max(high, last);
  }
  const Tensor wavs = wav.stride(1) == 1 ? wav : torch::stable::contiguous(wav);
  const PreNorm norm = pre_norm(stats);
  const bool whole = wav.scalar_type() == ScalarType::Short;
  Tensor lms = new_on_cpu({batch, mels, frames}, whole ? ScalarType::Float : wav.scalar_type());

  const auto run = [&](auto kind, auto out_kind) {
    using S = decltype(kind);
    using Out = decltype(out_kind);
    using Real = Compute<S>;
    LogMel<Vector<S>> call;
    const Tensor bank = as_contiguous<Real>(filter_bank), shape = as_contiguous<Real>(window);
    call.plan = Plan<Vector<S>>::of(n_fft);
    call.samples = samples, call.frames = frames, call.pad = pad;
    call.hop = std::min(hop_length, samples + 2 * pad);  // a longer hop gives a single frame too
    call.rows = std::min(call.hop, n_fft), call.mels = mels, call.bins = bins, call.low = low, call.high = high;
    call.window.assign(2 * call.plan->fft.length, Real(0));
    const Real scale = Real(call.plan->halved ? 0.5 : 1.0) * Real(whole ? 0x1p-15 : 1.0);
    for (int64_t k = 0, start = (n_fft - shape.numel()) / 2; k < shape.numel(); ++k)
      call.window[call.plan->halved ? start + k : 2 * (start + k)] = data<Real>(shape)[k] * scale;
    call.bank = data<Real>(bank), call.bands = data<int32_t>(edges);
    call.mean = Real(norm.mean), call.scale = Real(norm.scale);
    const int64_t pieces = (frames + kPiece - 1) / kPiece;
    torch::stable::parallel_for(0, batch * pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t b = k / pieces, t0 = k % pieces * kPiece;
        call.piece(data<S>(wavs) + b * wavs.stride(0), t0, std::min(t0 + kPiece, frames),
                   mutable_data<Out>(lms) + b * mels * frames);
      }
    });
  };
  if (whole) {
    run(int16_t{}, float{});
  } else {
    with_float_type(wav.scalar_type(), "wav", [&](auto kind) { run(kind, kind); });
  }
  return lms;
}

BYOLA_OPS(log_mel, m) { m.impl("log_mel", TORCH_BOX(&log_mel_cpu)); }

}  // namespace byola::BYOLA_SIMD
