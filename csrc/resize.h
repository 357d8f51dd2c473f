// Separable resize of crops: taps of one axis, rows resized along time, weighted sums of rows.
#pragma once

#include <algorithm>
#include <vector>

#include "tensors.h"

namespace byola::BYOLA_SIMD {

constexpr int kMaxTaps = 4;
constexpr const char* kFits = "size, canvas: expected at least 1 and the input's (F, T), and fewer than 2^31";

// Positions along an axis are int32; a canvas holds the input.
inline bool fits(const std::vector<int64_t>& size, const std::vector<int64_t>& canvas, int64_t mels, int64_t frames) {
  const auto within = [](int64_t n, int64_t minimum) {
    return n >= std::max<int64_t>(minimum, 1) && n < int64_t(1) << 31;
  };
  return within(size[0], 1) && within(size[1], 1) && within(canvas[0], mels) && within(canvas[1], frames);
}

inline bool is_bicubic(const std::string& interpolation) {
  BYOLA_CHECK(interpolation == "bilinear" || interpolation == "bicubic", "interpolation: got ", interpolation);
  return interpolation == "bicubic";
}

struct Box {
  int64_t start, extent;  // along one axis of the canvas
};

// Move a crop box inside the canvas along one axis, so that nothing is read out of bounds.
inline Box clamp_box(int64_t start, int64_t extent, int64_t canvas) {
  extent = std::clamp<int64_t>(extent, 1, canvas);
  return {std::clamp<int64_t>(start, 0, canvas - extent), extent};
}

// The taps of one axis, corners aligned: output o is at o (extent - 1) / (size - 1) of the crop. Quotient and remainder
// are exact integers, updated from output to output; the fraction t is rounded once.
template <typename V>
struct AxisTaps {
  using Real = typename V::Element;
  int taps = 2;
  Memory<int32_t> quotient, remainder;
  Memory<int32_t> index[kMaxTaps];  // position of each tap, clamped to the crop
  Memory<Real> weight[kMaxTaps];

  void prepare(int64_t size, int64_t extent, bool bicubic) {
    taps = bicubic ? 4 : 2;
    const int64_t padded = (size + V::width - 1) / V::width * V::width;
    quotient.assign(padded, 0);
    remainder.assign(padded, 0);
    const int64_t steps = std::max<int64_t>(size - 1, 1);
    const int32_t whole = int32_t((extent - 1) / steps), part = int32_t((extent - 1) % steps);
    for (int64_t o = 0, q = 0, r = 0; o < size; ++o) {
      quotient[o] = int32_t(q);
      remainder[o] = int32_t(r);
      q += whole;
      r += part;
      if (r >= steps) r -= steps, ++q;
    }
    const int32_t last = int32_t(extent - 1), first_tap = bicubic ? -1 : 0;
    for (int k = 0; k < taps; ++k) {
      index[k].resize(padded);
      weight[k].resize(padded);
      for (int64_t o = 0; o < padded; ++o) index[k][o] = std::clamp(quotient[o] + first_tap + k, 0, last);
    }
    const V one = V::set(1), divisor = V::set(Real(steps)), a = V::set(Real(-0.75));
    for (int64_t o = 0; o < padded; o += V::width) {
      const V t = V::from_ints(&remainder[o]) / divisor, s = one - t;
      if (bicubic) {  // the cubic convolution kernel at distances 1 + t, t, s = 1 - t and 1 + s
        const V outer = V::set(Real(-2.25)), inner = V::set(Real(1.25));
        (a * t * s * s).store(&weight[0][o]);
        fma(fma(inner, t, outer) * t, t, one).store(&weight[1][o]);
        fma(fma(inner, s, outer) * s, s, one).store(&weight[2][o]);
        (a * s * t * t).store(&weight[3][o]);
      } else {
        s.store(&weight[0][o]);
        t.store(&weight[1][o]);
      }
    }
    for (int k = 0; k < taps; ++k) std::fill(weight[k].begin() + size, weight[k].end(), Real(0));
  }
};

// The taps along time, in blocks of one vector of outputs. A block's taps lie in a window of the row. If the window
// spans at most two vectors, a permutation of two registers replaces the gather from memory.
template <typename V>
struct FrameTaps : AxisTaps<V> {
  using Real = typename V::Element;
  struct Block {
    int32_t window;
    bool near;
  };
  std::vector<Block> blocks;

  void prepare(int64_t size, int64_t extent, bool bicubic) {
    AxisTaps<V>::prepare(size, extent, bicubic);
    blocks.clear();
    for (int64_t o = 0; o < size; o += V::width) {
      const int64_t end = std::min<int64_t>(o + V::width, size) - 1;
      const int32_t window = this->index[0][o], span = this->index[this->taps - 1][end] - window + 1;
      blocks.push_back({window, span <= 2 * V::width});
      for (int k = 0; k < this->taps; ++k)
        for (int64_t lane = 0; lane < V::width; ++lane)
          this->index[k][o + lane] = o + lane < size ? this->index[k][o + lane] - window : 0;
    }
  }

  // Resize `count` rows of the crop, `row_stride` apart, block by block, so that a block's taps stay in registers. Rows
  // must be readable for two vectors past their end; `out` holds rows of whole vectors, `out_stride` apart.
  template <int Taps>
  void apply(const Real* rows, int64_t row_stride, int64_t count, Real* out, int64_t out_stride) const {
    for (size_t b = 0; b < blocks.size(); ++b) {
      const int64_t o = int64_t(b) * V::width;
      typename V::Index index[Taps];
      V weight[Taps];
      for (int k = 0; k < Taps; ++k) {
        index[k] = V::Index::load(&this->index[k][o]);
        weight[k] = V::load(&this->weight[k][o]);
      }
      const Real* window = rows + blocks[b].window;
      const auto resize = [&](auto lookup) {
        for (int64_t r = 0; r < count; ++r) {
          V sum = weight[0] * lookup(window + r * row_stride, index[0]);
          for (int k = 1; k < Taps; ++k) sum = fma(weight[k], lookup(window + r * row_stride, index[k]), sum);
          sum.store(out + r * out_stride + o);
        }
      };
      if (blocks[b].near)
        resize([](const Real* w, typename V::Index i) -> V { return V::lookup_near(w, i); });
      else
        resize([](const Real* w, typename V::Index i) -> V { return V::lookup_far(w, i); });
    }
  }
};

// Resize one crop of one sample: resize each row along time, then sum weighted rows into outputs.
// Rows in the margin are zero and are neither computed nor read.
template <typename V>
class CropResizer {
 public:
  using Real = typename V::Element;

  CropResizer(int64_t mels, int64_t frames, const std::vector<int64_t>& size, const std::vector<int64_t>& canvas,
              bool bicubic)
      : mels_(mels), frames_(frames), size_(size), canvas_(canvas), bicubic_(bicubic) {
    padded_ = round_up(size_[1]);
    row_stride_ = round_up(canvas_[1]) + 3 * V::width;
    scratch(staged_, kGroup * row_stride_);
    zeros_.assign(padded_, Real(0));
  }

  // Length of an output row, rounded up to whole vectors.
  int64_t padded() const { return padded_; }

  // produce(f, c0, c1, row) writes columns c0 to c1 - 1 of mel row f, and at most one vector more, to row[0], row[1]...
  // emit(o, sum) receives output row o: sum(t) returns outputs t to t + V::width - 1; those past the size are 0.
  template <typename Produce, typename Emit>
  void run(const int64_t box[4], Produce produce, Emit emit) {
    const Box mel_box = clamp_box(box[0], box[2], canvas_[0]), frame_box = clamp_box(box[1], box[3], canvas_[1]);
    if (mel_box.extent != mel_extent_) mel_taps_.prepare(size_[0], mel_extent_ = mel_box.extent, bicubic_);
    if (frame_box.extent != frame_extent_) frame_taps_.prepare(size_[1], frame_extent_ = frame_box.extent, bicubic_);
    if (bicubic_) {
      resize_rows<4>(mel_box, frame_box, produce);
      sum_rows<4>(emit);
    } else {
      resize_rows<2>(mel_box, frame_box, produce);
      sum_rows<2>(emit);
    }
  }

 private:
  static constexpr int64_t kGroup = 8;  // rows staged at a time: few enough for the L1 cache

  static int64_t round_up(int64_t n) { return (n + V::width - 1) / V::width * V::width; }

  template <int Taps, typename Produce>
  void resize_rows(Box mel_box, Box frame_box, Produce produce) {
    used_.assign(mel_box.extent, 0);
    for (int k = 0; k < Taps; ++k)
      for (int64_t o = 0; o < size_[0]; ++o) used_[mel_taps_.index[k][o]] = 1;
    rows_.assign(mel_box.extent, zeros_.data());
    Real* resized = scratch(resized_, (mel_box.extent + kGroup) * padded_);

    const int64_t top = mel_box.start - (canvas_[0] - mels_) / 2, left = frame_box.start - (canvas_[1] - frames_) / 2;
    const int64_t c0 = std::clamp<int64_t>(left, 0, frames_);
    const int64_t c1 = std::clamp<int64_t>(left + frame_box.extent, c0, frames_);
    if (c0 == c1) return;
    int64_t staged = 0;
    const auto flush = [&] {
      frame_taps_.template apply<Taps>(staged_.data(), row_stride_, staged, resized, padded_);
      resized += staged * padded_;
      staged = 0;
    };
    for (int64_t k = 0; k < mel_box.extent; ++k) {
      const int64_t f = top + k;
      if (!used_[k] || f < 0 || f >= mels_) continue;
      Real* row = staged_.data() + staged * row_stride_;
      std::fill(row, row + (c0 - left), Real(0));
      produce(f, c0, c1, row + (c0 - left));
      std::fill(row + (c1 - left), row + frame_box.extent + 2 * V::width, Real(0));
      rows_[k] = resized + staged * padded_;
      if (++staged == kGroup) flush();
    }
    flush();
  }

  template <int Taps, typename Emit>
  void sum_rows(Emit emit) const {
    for (int64_t o = 0; o < size_[0]; ++o) {
      const Real* rows[Taps];
      V weights[Taps];
      for (int k = 0; k < Taps; ++k) {
        rows[k] = rows_[mel_taps_.index[k][o]];
        weights[k] = V::set(mel_taps_.weight[k][o]);
      }
      emit(o, [&](int64_t t) -> V {
        V sum = weights[0] * V::load(rows[0] + t);
        for (int k = 1; k < Taps; ++k) sum = fma(weights[k], V::load(rows[k] + t), sum);
        return sum;
      });
    }
  }

  int64_t mels_, frames_, padded_, row_stride_, mel_extent_ = 0, frame_extent_ = 0;
  std::vector<int64_t> size_, canvas_;
  bool bicubic_;
  AxisTaps<V> mel_taps_;
  FrameTaps<V> frame_taps_;
  Memory<Real> staged_, zeros_, resized_;
  std::vector<const Real*> rows_;
  std::vector<char> used_;
};

}  // namespace byola::BYOLA_SIMD
