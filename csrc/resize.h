// Separable resize of crops: rows of the crop made on demand, weighted sums of rows, then of taps along time.
#pragma once

#include <vector>

#include "taps.h"
#include "tensors.h"

namespace byola::BYOLA_SIMD {

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

// Resize one crop of one sample, in groups of output rows: make the input rows that they need, sum weighted rows (where
// the crop has as many rows as the output, each is its own sum), then taps along time.
//
// An input row is kept at its place in time, between margins that are always zero, as the canvas is. Next to the crop's
// edges lie copies of its first and last columns, as clamped taps read them; those in a margin are cleared afterwards.
// So every tap along time is a plain load and a permutation. Only rows and columns of the crop are made.
template <typename V>
class CropResizer {
 public:
  using Real = typename V::Element;

  CropResizer(int64_t mels, int64_t frames, const std::vector<int64_t>& size, const std::vector<int64_t>& canvas,
              bool bicubic)
      : mels_(mels), frames_(frames), size_(size), canvas_(canvas), bicubic_(bicubic) {
    lead_ = round_up((canvas[1] - frames) / 2 + 1);
    stride_ = lead_ + round_up(canvas[1] - (canvas[1] - frames) / 2 + 2) + 2 * V::width;
    memory_.assign((mels + 1 + kGroup) * stride_, Real(0));
  }

  // Length of an output row, rounded up to whole vectors.
  int64_t padded() const { return round_up(size_[1]); }

  // produce(f, c0, c1, rows) writes columns c0 to c1 - 1 of the four mel rows f[0] to f[3] to rows[0] + c0 ...; c0 is a
  // multiple of V::width, and whole vectors may be written.
  // emit(o, count, t, sum) receives outputs t to t + V::width - 1 of output rows o to o + count - 1: sum(k, start) returns
  // start plus those of row o + k.
  template <typename Produce, typename Emit>
  void run(const int64_t box[4], Produce produce, Emit emit) {
    const Box mel_box = clamp_box(box[0], box[2], canvas_[0]), frame_box = clamp_box(box[1], box[3], canvas_[1]);
    if (mel_box.extent != mel_taps_.extent) mel_taps_.prepare(size_[0], mel_box.extent, bicubic_);
    if (frame_box.extent != frame_taps_.extent) frame_taps_.prepare(size_[1], frame_box.extent, bicubic_);
    top_ = mel_box.start - (canvas_[0] - mels_) / 2;
    left_ = frame_box.start - (canvas_[1] - frames_) / 2;
    right_ = left_ + frame_box.extent;
    list_rows();
    bicubic_ ? resize<4>(produce, emit) : resize<2>(produce, emit);
  }

 private:
  static constexpr int64_t kGroup = 16;  // output rows at a time: few enough for the L1 cache

  static int64_t round_up(int64_t n) { return (n + V::width - 1) / V::width * V::width; }

  // Column 0 of an input row; row mels is zero. Behind it lie the rows of the group.
  Real* row(int64_t f) { return memory_.data() + f * stride_ + lead_; }
  Real* row_of_group(int64_t k) { return row(mels_ + 1 + k); }
  Real* row_of_crop(int64_t k) {
    const int64_t f = top_ + k;
    return row(f < 0 || f >= mels_ || left_ >= frames_ || right_ <= 0 ? mels_ : f);
  }

  // List the input rows that some output row needs.
  void list_rows() {
    used_.resize(mels_);
    count_used_ = 0;
    if (left_ >= frames_ || right_ <= 0) return;
    const bool all = mel_taps_.ratio_within(1, 1);  // no output row skips an input row
    if (!all) {
      needed_.assign(mel_taps_.extent, 0);
      for (int64_t o = 0; o < size_[0]; ++o)
        for (int k = 0; k < mel_taps_.taps; ++k) needed_[mel_taps_.position(o, k)] = 1;
    }
    const int64_t end = std::min(top_ + mel_taps_.extent, mels_);
    for (int64_t f = std::max<int64_t>(top_, 0); f < end; ++f)
      if (all || needed_[f - top_]) used_[count_used_++] = f;
  }

  // Make four rows: columns of the input, and copies of the first and the last column of the crop beside them.
  template <typename Produce>
  void make_rows(const int64_t f[4], Produce produce) {
    const int64_t c0 = std::max<int64_t>(left_, 0) / V::width * V::width, c1 = std::min(right_, frames_);
    Real* const rows[4] = {row(f[0]), row(f[1]), row(f[2]), row(f[3])};
    produce(f, c0, c1, rows);
    for (Real* r : rows) {
      std::fill(r + frames_, r + round_up(frames_), Real(0));
      r[left_ - 1] = r[left_];
      r[right_] = r[right_ + 1] = r[right_ - 1];
    }
  }

  // Clear the copies of columns of the input that lie in a margin.
  void clear_margins() {
    if (left_ != 0 && right_ != frames_ && right_ + 1 != frames_) return;
    const auto clear = [&](Real* r) {
      if (left_ == 0) r[-1] = 0;
      if (right_ == frames_ || right_ + 1 == frames_) r[frames_] = r[right_ + 1] = 0;
    };
    for (int64_t k = 0; k < count_used_; ++k) clear(row(used_[k]));
    for (int64_t k = 0; k < kGroup; ++k) clear(row_of_group(k));
  }

  template <int Taps, typename Produce, typename Emit>
  void resize(Produce produce, Emit emit) {
    const Real* rows[kGroup];
    int64_t made = 0;
    for (int64_t o = 0; o < size_[0]; o += kGroup) {
      const int64_t count = std::min(kGroup, size_[0] - o);
      const int64_t needed = top_ + mel_taps_.position(o + count - 1, Taps - 1);
      while (made < count_used_ && used_[made] <= needed) {
        int64_t f[4];  // past the end, the last row again
        for (int k = 0; k < 4; ++k) f[k] = used_[std::min(made + k, count_used_ - 1)];
        make_rows(f, produce);
        made += 4;
      }
      for (int64_t k = 0; k < count; ++k) rows[k] = sum_rows<Taps>(o + k, row_of_group(k)) + mel_taps_.first_tap();
      sum_taps<Taps>(rows, o, count, emit);
    }
    clear_margins();
  }

  // Return the weighted sum of the rows of output row o, from the first column of the crop on.
  template <int Taps>
  const Real* sum_rows(int64_t o, Real* sums) {
    if (mel_taps_.is_identity()) return row_of_crop(o) + left_;
    const Real* taps[Taps];
    V weight[Taps];
#pragma GCC unroll 4
    for (int k = 0; k < Taps; ++k) {
      taps[k] = row_of_crop(mel_taps_.position(o, k));
      weight[k] = V::set(mel_taps_.weight[k][o]);
    }
    // the columns that are not always zero, with the copies
    const int64_t begin = left_ < 0 ? 0 : (left_ - 1 + lead_) / V::width * V::width - lead_;
    const int64_t end = right_ > frames_ ? frames_ : right_ + 2;
    for (int64_t c = begin; c < end; c += V::width) {
      V sum = weight[0] * V::load(taps[0] + c);
#pragma GCC unroll 4
      for (int k = 1; k < Taps; ++k) sum = fma(weight[k], V::load(taps[k] + c), sum);
      sum.store(sums + c);
    }
    return sums + left_;
  }

  template <int Taps, typename Emit>
  void sum_taps(const Real* const* rows, int64_t o, int64_t count, Emit emit) const {
    const auto in_blocks = [&](auto taps_of) {
      for (int64_t t = 0; t < size_[1]; t += V::width) {
        const auto taps = taps_of(t);
        emit(o, count, t, [&](int64_t k, V start) BYOLA_IN_PLACE -> V { return taps(rows[k], start); });
      }
    };
    if constexpr (V::is_simd) {
      if (frame_taps_.ratio_within(1, 1))
        return in_blocks([&](int64_t t) { return NarrowTaps<V, Taps>(frame_taps_, t); });
      if (frame_taps_.ratio_within(9, 5))
        return in_blocks([&](int64_t t) { return NearTaps<V, Taps>(frame_taps_, t); });
    }
    in_blocks([&](int64_t t) { return FarTaps<V, Taps>(frame_taps_, t); });
  }

  int64_t mels_, frames_, lead_, stride_, top_ = 0, left_ = 0, right_ = 0, count_used_ = 0;
  std::vector<int64_t> size_, canvas_;
  bool bicubic_;
  AxisTaps<V> mel_taps_, frame_taps_;
  Memory<Real> memory_;
  std::vector<int64_t> used_;
  std::vector<char> needed_;
};

}  // namespace byola::BYOLA_SIMD
