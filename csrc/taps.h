// Taps of a resize along one axis, and weighted sums of the taps of one vector of outputs.
#pragma once

#include <algorithm>

#include "storage.h"

namespace byola::BYOLA_SIMD {

constexpr int kMaxTaps = 4;

// The taps of one axis, corners aligned: output o is at o (extent - 1) / (size - 1) of the crop. Quotient and remainder
// are exact integers, updated from output to output; the fraction t is rounded once.
template <typename V>
struct AxisTaps {
  using Real = typename V::Element;
  int taps = 2;
  int64_t size = 0, extent = 0;
  Memory<int32_t> whole;          // floor of the position of each output; the last one's past the size
  Memory<Real> weight[kMaxTaps];  // 0 past the size

  void prepare(int64_t outputs, int64_t inputs, bool bicubic) {
    taps = bicubic ? 4 : 2;
    size = outputs, extent = inputs;
    const int64_t padded = (size + V::width - 1) / V::width * V::width;
    whole.resize(padded);
    remainder_.resize(padded);
    const int64_t steps = std::max<int64_t>(size - 1, 1);
    const int32_t quotient = int32_t((extent - 1) / steps), part = int32_t((extent - 1) % steps);
    for (int64_t o = 0, q = 0, r = 0; o < size; ++o) {
      whole[o] = int32_t(q);
      remainder_[o] = int32_t(r);
      const int64_t carry = r + part >= steps;
      q += quotient + carry;
      r += part - (carry ? steps : 0);
    }
    std::fill(whole.begin() + size, whole.end(), whole[size - 1]);
    std::fill(remainder_.begin() + size, remainder_.end(), 0);
    for (int k = 0; k < taps; ++k) weight[k].resize(padded);
    const V one = V::set(1), divisor = V::set(Real(steps)), a = V::set(Real(-0.75));
    for (int64_t o = 0; o < padded; o += V::width) {
      const V t = V::from_ints(&remainder_[o]) / divisor, s = one - t;
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

  int first_tap() const { return taps == kMaxTaps ? -1 : 0; }
  // Position of a tap, clamped to the crop.
  int64_t position(int64_t o, int k) const { return std::clamp<int64_t>(whole[o] + first_tap() + k, 0, extent - 1); }
  bool is_identity() const { return extent == size; }
  // Inputs per output are at most numerator / denominator.
  bool ratio_within(int64_t numerator, int64_t denominator) const {
    return denominator * (extent - 1) <= numerator * (size - 1);
  }

 private:
  Memory<int32_t> remainder_;
};

// The taps of outputs o to o + V::width - 1, kept in registers for many rows: taps(row, start) returns start plus the
// weighted sum. Tap k of all outputs is a permutation, by the same index, of the inputs from k on.
//
// A gather from memory costs more than all the rest. So a permutation of one vector in registers replaces it where a
// vector of outputs spans at most a vector of inputs (NarrowTaps), and of two where it spans two (NearTaps).
template <typename V, int Taps>
struct FarTaps {
  using Real = typename V::Element;
  int64_t window;
  typename V::Index index;
  V weight[Taps];

  FarTaps(const AxisTaps<V>& axis, int64_t o)
      : window(axis.whole[o]), index(V::Index::load(&axis.whole[o], axis.whole[o])) {
#pragma GCC unroll 4
    for (int k = 0; k < Taps; ++k) weight[k] = V::load(&axis.weight[k][o]);
  }
  BYOLA_IN_PLACE V operator()(const Real* row, V sum) const {
#pragma GCC unroll 4
    for (int k = 0; k < Taps; ++k) sum = fma(weight[k], V::lookup_far(row + window + k, index), sum);
    return sum;
  }
};

template <typename V, int Taps>
struct NarrowTaps : FarTaps<V, Taps> {
  using FarTaps<V, Taps>::FarTaps;
  BYOLA_IN_PLACE V operator()(const typename V::Element* row, V sum) const {
#pragma GCC unroll 4
    for (int k = 0; k < Taps; ++k)
      sum = fma(this->weight[k], V::permute(V::load(row + this->window + k), this->index), sum);
    return sum;
  }
};

// For at most 1.8 inputs per output.
template <typename V, int Taps>
struct NearTaps : FarTaps<V, Taps> {
  using FarTaps<V, Taps>::FarTaps;
};

#if defined(BYOLA_AVX512)

template <int Taps>
struct NearTaps<Floats, Taps> {
  int64_t window;
  __m512i index[Taps];  // into two vectors: 15 outputs of 1.8 inputs and 4 taps take 31
  Floats weight[Taps];

  NearTaps(const AxisTaps<Floats>& axis, int64_t o) : window(axis.whole[o]) {
#pragma GCC unroll 4
    for (int k = 0; k < Taps; ++k) {
      index[k] = Floats::Index::load(&axis.whole[o], axis.whole[o] - k).v;
      weight[k] = Floats::load(&axis.weight[k][o]);
    }
  }
  BYOLA_IN_PLACE Floats operator()(const float* row, Floats sum) const {
    const __m512 low = _mm512_loadu_ps(row + window), high = _mm512_loadu_ps(row + window + 16);
#pragma GCC unroll 4
    for (int k = 0; k < Taps; ++k) sum = fma(weight[k], {_mm512_permutex2var_ps(low, index[k], high)}, sum);
    return sum;
  }
};

#elif defined(BYOLA_AVX2)

// A permutation of two vectors takes three instructions here. Instead, one of one vector gives taps k and k + 1 of four
// outputs, which span at most 8 inputs; the products' halves are added crosswise.
template <int Taps>
struct NearTaps<Floats, Taps> {
  int64_t low, high;  // windows of the first and the last four outputs
  __m256i of_low, of_high;
  __m256 low_weight[Taps / 2], high_weight[Taps / 2];

  NearTaps(const AxisTaps<Floats>& axis, int64_t o) : low(axis.whole[o]), high(axis.whole[o + 4]) {
    const __m256i whole = Floats::Index::load(&axis.whole[o], 0).v, tap = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    of_low = _mm256_sub_epi32(_mm256_permute2x128_si256(whole, whole, 0x00), _mm256_set1_epi32(int32_t(low)));
    of_high = _mm256_sub_epi32(_mm256_permute2x128_si256(whole, whole, 0x11), _mm256_set1_epi32(int32_t(high)));
    of_low = _mm256_add_epi32(of_low, tap);
    of_high = _mm256_add_epi32(of_high, tap);
#pragma GCC unroll 2
    for (int k = 0; k < Taps; k += 2) {
      const __m256 a = _mm256_loadu_ps(&axis.weight[k][o]), b = _mm256_loadu_ps(&axis.weight[k + 1][o]);
      low_weight[k / 2] = _mm256_permute2f128_ps(a, b, 0x20);
      high_weight[k / 2] = _mm256_permute2f128_ps(a, b, 0x31);
    }
  }
  BYOLA_IN_PLACE Floats operator()(const float* row, Floats start) const {
    __m256 a = _mm256_blend_ps(start.v, _mm256_setzero_ps(), 0xF0);
    __m256 b = _mm256_blend_ps(start.v, _mm256_setzero_ps(), 0x0F);
#pragma GCC unroll 2
    for (int k = 0; k < Taps; k += 2) {
      const __m256 x = _mm256_loadu_ps(row + low + k), z = _mm256_loadu_ps(row + high + k);
      a = _mm256_fmadd_ps(low_weight[k / 2], _mm256_permutevar8x32_ps(x, of_low), a);
      b = _mm256_fmadd_ps(high_weight[k / 2], _mm256_permutevar8x32_ps(z, of_high), b);
    }
    return {_mm256_add_ps(_mm256_blend_ps(a, b, 0xF0), _mm256_permute2f128_ps(a, b, 0x21))};
  }
};

#endif

}  // namespace byola::BYOLA_SIMD
