// Vectors of floats for AVX-512, AVX2 with FMA, or any machine; exp and log on them. Every kernel is compiled once for
// each instruction set, in a namespace of its name (BYOLA_SIMD); see ops/_native/cpu.py and library.cpp.
// No torch header. Never compile with -ffast-math: NaN and inf must propagate.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifndef BYOLA_SIMD
#define BYOLA_SIMD portable
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define BYOLA_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define BYOLA_AVX2 1
#endif
#if defined(BYOLA_AVX512) || defined(BYOLA_AVX2)
#include <immintrin.h>
#endif

namespace byola::BYOLA_SIMD {

// Lanes of one type in plain C++, for float64 and for machines without AVX2. lookup_near and lookup_far read
// window[index]; lookup_near needs every index below 2 * width.
template <typename T, int Width>
struct Lanes {
  static constexpr int width = Width;
  using Element = T;
  struct Index {
    int32_t v[Width];
    static Index load(const int32_t* p) {
      Index r;
      std::memcpy(r.v, p, sizeof r.v);
      return r;
    }
  };
  T v[Width];

  static Lanes load(const T* p) {
    Lanes r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
  }
  static Lanes load(const T* p, int64_t n) {  // the first n lanes, zeros in the others
    Lanes r = set(T(0));
    for (int k = 0; k < n && k < Width; ++k) r.v[k] = p[k];
    return r;
  }
  static Lanes set(T x) {
    Lanes r;
    for (int k = 0; k < Width; ++k) r.v[k] = x;
    return r;
  }
  void store(T* p) const { std::memcpy(p, v, sizeof v); }
  void store(T* p, int64_t n) const {
    for (int k = 0; k < n && k < Width; ++k) p[k] = v[k];
  }
  static Lanes lookup_near(const T* window, Index index) { return lookup_far(window, index); }
  static Lanes lookup_far(const T* window, Index index) {
    Lanes r;
    for (int k = 0; k < Width; ++k) r.v[k] = window[index.v[k]];
    return r;
  }
  static Lanes from_ints(const int32_t* p) {
    Lanes r;
    for (int k = 0; k < Width; ++k) r.v[k] = T(p[k]);
    return r;
  }
  Lanes first_lanes(int64_t n) const {  // zeros in the others
    Lanes r = set(T(0));
    for (int k = 0; k < n && k < Width; ++k) r.v[k] = v[k];
    return r;
  }
  void add_to(double* sums) const {  // sums[width]
    for (int k = 0; k < Width; ++k) sums[k] += double(v[k]);
  }
  friend Lanes operator+(Lanes a, Lanes b) {
    for (int k = 0; k < Width; ++k) a.v[k] += b.v[k];
    return a;
  }
  friend Lanes operator-(Lanes a, Lanes b) {
    for (int k = 0; k < Width; ++k) a.v[k] -= b.v[k];
    return a;
  }
  friend Lanes operator*(Lanes a, Lanes b) {
    for (int k = 0; k < Width; ++k) a.v[k] *= b.v[k];
    return a;
  }
  friend Lanes operator/(Lanes a, Lanes b) {
    for (int k = 0; k < Width; ++k) a.v[k] /= b.v[k];
    return a;
  }
  friend Lanes fma(Lanes a, Lanes b, Lanes c) {
    for (int k = 0; k < Width; ++k) a.v[k] = a.v[k] * b.v[k] + c.v[k];
    return a;
  }
  friend Lanes fnma(Lanes a, Lanes b, Lanes c) {  // c - a b
    for (int k = 0; k < Width; ++k) a.v[k] = c.v[k] - a.v[k] * b.v[k];
    return a;
  }
  // The first, or second, half of a[0], b[0], a[1], b[1], ...
  friend Lanes zip_low(Lanes a, Lanes b) { return zip(a, b, 0); }
  friend Lanes zip_high(Lanes a, Lanes b) { return zip(a, b, Width / 2); }
  static Lanes zip(Lanes a, Lanes b, int start) {
    Lanes r;
    for (int k = 0; k < Width; ++k) r.v[k] = k % 2 ? b.v[start + k / 2] : a.v[start + k / 2];
    return r;
  }
  friend Lanes exp(Lanes a) {
    for (int k = 0; k < Width; ++k) a.v[k] = std::exp(a.v[k]);
    return a;
  }
  friend Lanes log_positive(Lanes a) {
    for (int k = 0; k < Width; ++k) a.v[k] = std::log(a.v[k]);
    return a;
  }
};

#if defined(BYOLA_AVX512)

struct Floats {
  static constexpr int width = 16;
  static constexpr const char* name = "AVX-512";
  using Element = float;
  struct Index {
    __m512i v;
    static Index load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
  };
  __m512 v;

  static __mmask16 first(int64_t n) { return n >= 16 ? 0xFFFF : __mmask16((1u << n) - 1); }
  static Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Floats load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  static Floats set(float x) { return {_mm512_set1_ps(x)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  static Floats lookup_near(const float* window, Index index) {
    return {_mm512_permutex2var_ps(_mm512_loadu_ps(window), index.v, _mm512_loadu_ps(window + 16))};
  }
  static Floats lookup_far(const float* window, Index index) { return {_mm512_i32gather_ps(index.v, window, 4)}; }
  static Floats from_ints(const int32_t* p) { return {_mm512_cvtepi32_ps(_mm512_loadu_si512(p))}; }
  Floats first_lanes(int64_t n) const { return {_mm512_maskz_mov_ps(first(n), v)}; }
  void add_to(double* sums) const {
    const __m256 low = _mm512_castps512_ps256(v), high = _mm512_extractf32x8_ps(v, 1);
    _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), _mm512_cvtps_pd(low)));
    _mm512_storeu_pd(sums + 8, _mm512_add_pd(_mm512_loadu_pd(sums + 8), _mm512_cvtps_pd(high)));
  }
  friend Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
  friend Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  friend Floats fnma(Floats a, Floats b, Floats c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a b
  friend Floats zip_low(Floats a, Floats b) {
    const __m512i order = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    return {_mm512_permutex2var_ps(a.v, order, b.v)};
  }
  friend Floats zip_high(Floats a, Floats b) {
    const __m512i order = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    return {_mm512_permutex2var_ps(a.v, order, b.v)};
  }
  // Keeps NaN: min and max return their second operand if either is NaN.
  static Floats clamp(Floats x, float low, float high) {
    return {_mm512_max_ps(_mm512_set1_ps(low), _mm512_min_ps(_mm512_set1_ps(high), x.v))};
  }
  static Floats round(Floats x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  static Floats times_power_of_two(Floats y, Floats n) { return {_mm512_scalef_ps(y.v, n.v)}; }
  static void split(Floats x, Floats& mantissa, Floats& exponent) {
    const __m512i bits = _mm512_castps_si512(x.v);
    const __m512i e = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3F400000)), 23);
    mantissa.v = _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(e, 23)));
    exponent.v = _mm512_cvtepi32_ps(e);
  }
  static Floats where_finite(Floats x, Floats y) {  // y; x in lanes with x = inf or NaN
    const __mmask16 finite = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(INFINITY), _CMP_LT_OQ);
    return {_mm512_mask_mov_ps(x.v, finite, y.v)};
  }
};

#elif defined(BYOLA_AVX2)

struct Floats {
  static constexpr int width = 8;
  static constexpr const char* name = "AVX2";
  using Element = float;
  struct Index {
    __m256i v;
    static Index load(const int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
  };
  __m256 v;

  static __m256i first(int64_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n > 8 ? 8 : int(n)), lane);
  }
  static Floats load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Floats load(const float* p, int64_t n) { return {_mm256_maskload_ps(p, first(n))}; }
  static Floats set(float x) { return {_mm256_set1_ps(x)}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(float* p, int64_t n) const { _mm256_maskstore_ps(p, first(n), v); }
  static Floats lookup_near(const float* window, Index index) {
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(window), index.v);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(window + 8), index.v);
    return {_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index.v, 28)))};
  }
  static Floats lookup_far(const float* window, Index index) { return {_mm256_i32gather_ps(window, index.v, 4)}; }
  static Floats from_ints(const int32_t* p) { return {_mm256_cvtepi32_ps(Index::load(p).v)}; }
  Floats first_lanes(int64_t n) const { return {_mm256_and_ps(v, _mm256_castsi256_ps(first(n)))}; }
  void add_to(double* sums) const {
    const __m128 low = _mm256_castps256_ps128(v), high = _mm256_extractf128_ps(v, 1);
    _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), _mm256_cvtps_pd(low)));
    _mm256_storeu_pd(sums + 4, _mm256_add_pd(_mm256_loadu_pd(sums + 4), _mm256_cvtps_pd(high)));
  }
  friend Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend Floats operator/(Floats a, Floats b) { return {_mm256_div_ps(a.v, b.v)}; }
  friend Floats fma(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  friend Floats fnma(Floats a, Floats b, Floats c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a b
  friend Floats zip_low(Floats a, Floats b) {
    return {_mm256_permute2f128_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v), 0x20)};
  }
  friend Floats zip_high(Floats a, Floats b) {
    return {_mm256_permute2f128_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v), 0x31)};
  }
  static Floats clamp(Floats x, float low, float high) {
    return {_mm256_max_ps(_mm256_set1_ps(low), _mm256_min_ps(_mm256_set1_ps(high), x.v))};
  }
  static Floats round(Floats x) { return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  static Floats times_power_of_two(Floats y, Floats n) {  // in two steps, because 2^n may overflow or be denormal
    const __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1);
    const __m256i bias = _mm256_set1_epi32(127), rest = _mm256_sub_epi32(whole, half);
    const __m256 a = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
    const __m256 b = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
    return {_mm256_mul_ps(_mm256_mul_ps(y.v, a), b)};
  }
  static void split(Floats x, Floats& mantissa, Floats& exponent) {
    const __m256i bits = _mm256_castps_si256(x.v);
    const __m256i e = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(0x3F400000)), 23);
    mantissa.v = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(e, 23)));
    exponent.v = _mm256_cvtepi32_ps(e);
  }
  static Floats where_finite(Floats x, Floats y) {
    const __m256 finite = _mm256_cmp_ps(x.v, _mm256_set1_ps(INFINITY), _CMP_LT_OQ);
    return {_mm256_blendv_ps(x.v, y.v, finite)};
  }
};

#else

struct Floats : Lanes<float, 8> {
  static constexpr const char* name = "portable";
  Floats() = default;
  Floats(Lanes<float, 8> lanes) : Lanes<float, 8>(lanes) {}
};

#endif

using Doubles = Lanes<double, 4>;

// Transpose a square block of V::width rows by zipping the two halves of its rows log2(width) times.
template <typename V>
inline void transpose(const typename V::Element* from, int64_t from_stride, typename V::Element* to,
                      int64_t to_stride) {
  constexpr int n = V::width;
  V a[n], b[n];
  for (int k = 0; k < n; ++k) a[k] = V::load(from + k * from_stride);
  for (int stage = 1; stage < n; stage *= 2) {
    for (int k = 0; k < n / 2; ++k) b[2 * k] = zip_low(a[k], a[k + n / 2]), b[2 * k + 1] = zip_high(a[k], a[k + n / 2]);
    for (int k = 0; k < n; ++k) a[k] = b[k];
  }
  for (int k = 0; k < n; ++k) a[k].store(to + k * to_stride);
}

#if defined(BYOLA_AVX512) || defined(BYOLA_AVX2)

// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln 2 / 2; exp(r) by a minimax polynomial of degree 5.
// Error below 3 ulp in every binade (tests/ops/test_cpu_math.py); overflows to inf, underflows via denormals to 0.
inline Floats exp(Floats x) {
  x = Floats::clamp(x, -105.0f, 89.0f);
  const Floats n = Floats::round(x * Floats::set(1.44269504f));
  Floats r = fma(n, Floats::set(-0.693359375f), x);  // ln 2 in two parts; n times the first part is exact
  r = fma(n, Floats::set(2.12194440e-4f), r);
  Floats p = fma(Floats::set(0x1.10627cp-7f), r, Floats::set(0x1.572a08p-5f));
  p = fma(p, r, Floats::set(0x1.5557aep-3f));
  p = fma(p, r, Floats::set(0x1.fffdfcp-2f));
  p = fma(p, r, Floats::set(1.0f));
  p = fma(p, r, Floats::set(1.0f));
  return Floats::times_power_of_two(p, n);
}

// log(x) = e ln 2 + log(1 + r), 1 + r in [0.75, 1.5); log(1 + r) = r + r^2 q(r), q minimax of degree 7.
// Only for normal positive x, +inf and NaN: the values that (1 - lam) exp(x) + lam exp(z) + eps takes. Below 3 ulp.
inline Floats log_positive(Floats x) {
  Floats m, e;
  Floats::split(x, m, e);
  const Floats r = m - Floats::set(1.0f);
  Floats q = fma(Floats::set(0.05413231f), r, Floats::set(-0.12067359f));
  q = fma(q, r, Floats::set(0.14983921f));
  q = fma(q, r, Floats::set(-0.16822814f));
  q = fma(q, r, Floats::set(0.19977077f));
  q = fma(q, r, Floats::set(-0.24993442f));
  q = fma(q, r, Floats::set(0.33333549f));
  q = fma(q, r, Floats::set(-0.50000061f));
  const Floats y = fma(e, Floats::set(0.693147181f), fma(q, r * r, r));
  return Floats::where_finite(x, y);
}

#endif

}  // namespace byola::BYOLA_SIMD
