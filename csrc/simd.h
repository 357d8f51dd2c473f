// Vectors of floats for AVX-512, AVX2 with FMA, or any machine; exp and log on them, and on four of them at once. Every
// kernel is compiled once for each instruction set, in a namespace of its name (BYOLA_SIMD); see ops/_native/cpu.py and
// library.cpp.
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

// Vectors stay in registers only if what works on them is inlined, which compilers judge by size.
#define BYOLA_IN_PLACE __attribute__((always_inline))

namespace byola::BYOLA_SIMD {

// Lanes of one type in a vector of the compiler's own, for float64 and for machines without AVX2.
template <typename T, int Width>
struct Lanes {
  static constexpr int width = Width;
  static constexpr bool is_simd = false;
  using Element = T;
  struct Index {
    int32_t v[Width];
    static Index load(const int32_t* p, int32_t base = 0) {  // p[k] - base
      Index r;
      for (int k = 0; k < Width; ++k) r.v[k] = p[k] - base;
      return r;
    }
  };
  typedef T Lane __attribute__((vector_size(Width * sizeof(T))));
  Lane v;

  static Lanes load(const T* p) {
    Lanes r;
    std::memcpy(&r.v, p, sizeof r.v);
    return r;
  }
  static Lanes load(const T* p, int64_t n) {  // the first n lanes, zeros in the others
    Lanes r = set(T(0));
    for (int k = 0; k < n && k < Width; ++k) r.v[k] = p[k];
    return r;
  }
  static Lanes set(T x) { return {x - Lane{}}; }
  void store(T* p) const { std::memcpy(p, &v, sizeof v); }
  void store(T* p, int64_t n) const {
    for (int k = 0; k < n && k < Width; ++k) p[k] = v[k];
  }
  template <typename S>
  void store_as(S* p) const {  // converted
    typedef S Other __attribute__((vector_size(Width * sizeof(S))));
    const Other other = __builtin_convertvector(v, Other);
    std::memcpy(p, &other, sizeof other);
  }
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
  friend Lanes operator+(Lanes a, Lanes b) { return {a.v + b.v}; }
  friend Lanes operator-(Lanes a, Lanes b) { return {a.v - b.v}; }
  friend Lanes operator*(Lanes a, Lanes b) { return {a.v * b.v}; }
  friend Lanes operator/(Lanes a, Lanes b) { return {a.v / b.v}; }
  friend Lanes fma(Lanes a, Lanes b, Lanes c) { return {a.v * b.v + c.v}; }
  friend Lanes fnma(Lanes a, Lanes b, Lanes c) { return {c.v - a.v * b.v}; }  // c - a b
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
  friend Lanes exp_or_zero(Lanes a) { return exp(a); }
  friend Lanes log_positive(Lanes a) {
    for (int k = 0; k < Width; ++k) a.v[k] = std::log(a.v[k]);
    return a;
  }
};

#if defined(BYOLA_AVX512)

struct Floats {
  static constexpr int width = 16;
  static constexpr bool is_simd = true;
  static constexpr const char* name = "AVX-512";
  using Element = float;
  struct Index {
    __m512i v;
    static Index load(const int32_t* p, int32_t base = 0) {
      return {_mm512_sub_epi32(_mm512_loadu_si512(p), _mm512_set1_epi32(base))};
    }
  };
  __m512 v;

  static __mmask16 first(int64_t n) { return n >= 16 ? 0xFFFF : __mmask16((1u << n) - 1); }
  static Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Floats load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  static Floats set(float x) { return {_mm512_set1_ps(x)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  static Floats lookup_far(const float* window, Index index) { return {_mm512_i32gather_ps(index.v, window, 4)}; }
  static Floats permute(Floats x, Index index) { return {_mm512_permutexvar_ps(index.v, x.v)}; }
  static Floats from_ints(const int32_t* p) { return {_mm512_cvtepi32_ps(_mm512_loadu_si512(p))}; }
  Floats first_lanes(int64_t n) const { return {_mm512_maskz_mov_ps(first(n), v)}; }
  // n lanes of float16 or bfloat16, as bits
  using Bits16 = __m256i;
  static Bits16 load16(const void* p, int64_t n) { return _mm256_maskz_loadu_epi16(first(n), p); }
  static void store16(Bits16 bits, void* p, int64_t n) {
    n >= 16 ? _mm256_storeu_si256(static_cast<__m256i*>(p), bits) : _mm256_mask_storeu_epi16(p, first(n), bits);
  }
  static Floats from_float16(Bits16 bits) { return {_mm512_cvtph_ps(bits)}; }
  static Floats from_bfloat16(Bits16 bits) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  Bits16 to_float16() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  Bits16 to_bfloat16() const {  // to nearest, ties to even; every NaN becomes 0x7FC0
    const __m512i bits = _mm512_castps_si512(v),
                  odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7FC0)));
  }
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
  static Floats shifted_to_exponent(Floats x) {  // the lowest 9 bits as sign and exponent
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x.v), 23))};
  }
  // e times 2^23 and 2^(2 - e), where x 2^-e is in [0.75, 1.5).
  static void exponent(Floats x, Floats& e, Floats& scale) {
    const __m512i above = _mm512_sub_epi32(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x3F400000));
    const __m512i bits = _mm512_and_si512(above, _mm512_set1_epi32(-(1 << 23)));
    e.v = _mm512_cvtepi32_ps(bits);
    scale.v = _mm512_castsi512_ps(_mm512_sub_epi32(_mm512_set1_epi32(0x40800000), bits));
  }
};

#elif defined(BYOLA_AVX2)

struct Floats {
  static constexpr int width = 8;
  static constexpr bool is_simd = true;
  static constexpr const char* name = "AVX2";
  using Element = float;
  struct Index {
    __m256i v;
    static Index load(const int32_t* p, int32_t base = 0) {
      return {_mm256_sub_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_set1_epi32(base))};
    }
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
  static Floats lookup_far(const float* window, Index index) { return {_mm256_i32gather_ps(window, index.v, 4)}; }
  static Floats permute(Floats x, Index index) { return {_mm256_permutevar8x32_ps(x.v, index.v)}; }
  static Floats from_ints(const int32_t* p) { return {_mm256_cvtepi32_ps(Index::load(p).v)}; }
  Floats first_lanes(int64_t n) const { return {_mm256_and_ps(v, _mm256_castsi256_ps(first(n)))}; }
  using Bits16 = __m128i;
  static Bits16 load16(const void* p, int64_t n) {
    Bits16 bits = _mm_setzero_si128();
    n >= 8 ? std::memcpy(&bits, p, 16) : std::memcpy(&bits, p, 2 * n);
    return bits;
  }
  static void store16(Bits16 bits, void* p, int64_t n) {
    n >= 8 ? std::memcpy(p, &bits, 16) : std::memcpy(p, &bits, 2 * n);
  }
  static Floats from_float16(Bits16 bits) { return {_mm256_cvtph_ps(bits)}; }
  static Floats from_bfloat16(Bits16 bits) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  Bits16 to_float16() const { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  Bits16 to_bfloat16() const {
    const __m256i bits = _mm256_castps_si256(v),
                  odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i r = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7FC0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
  }
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
  static Floats shifted_to_exponent(Floats x) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x.v), 23))};
  }
  static void exponent(Floats x, Floats& e, Floats& scale) {
    const __m256i above = _mm256_sub_epi32(_mm256_castps_si256(x.v), _mm256_set1_epi32(0x3F400000));
    const __m256i bits = _mm256_and_si256(above, _mm256_set1_epi32(-(1 << 23)));
    e.v = _mm256_cvtepi32_ps(bits);
    scale.v = _mm256_castsi256_ps(_mm256_sub_epi32(_mm256_set1_epi32(0x40800000), bits));
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

// Four vectors, op by op. exp and log of one vector wait for the result of every op; those of four fill the wait.
template <typename V>
struct Four {
  using Element = typename V::Element;
  V a, b, c, d;

  static Four set(Element x) { return all(V::set(x)); }
  static Four all(V x) { return {x, x, x, x}; }
  static Four load(const Element* const rows[4], int64_t c) {
    return {V::load(rows[0] + c), V::load(rows[1] + c), V::load(rows[2] + c), V::load(rows[3] + c)};
  }
  BYOLA_IN_PLACE void store(Element* const rows[4], int64_t k) const {
    a.store(rows[0] + k), b.store(rows[1] + k), c.store(rows[2] + k), d.store(rows[3] + k);
  }
  friend Four operator+(Four x, Four y) { return {x.a + y.a, x.b + y.b, x.c + y.c, x.d + y.d}; }
  friend Four operator-(Four x, Four y) { return {x.a - y.a, x.b - y.b, x.c - y.c, x.d - y.d}; }
  friend Four operator*(Four x, Four y) { return {x.a * y.a, x.b * y.b, x.c * y.c, x.d * y.d}; }
  friend Four fma(Four x, Four y, Four z) {
    return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b), fma(x.c, y.c, z.c), fma(x.d, y.d, z.d)};
  }
  static Four clamp(Four x, float low, float high) {
    return {V::clamp(x.a, low, high), V::clamp(x.b, low, high), V::clamp(x.c, low, high), V::clamp(x.d, low, high)};
  }
  static Four shifted_to_exponent(Four x) {
    return {V::shifted_to_exponent(x.a), V::shifted_to_exponent(x.b), V::shifted_to_exponent(x.c),
            V::shifted_to_exponent(x.d)};
  }
  static void exponent(Four x, Four& e, Four& scale) {
    V::exponent(x.a, e.a, scale.a), V::exponent(x.b, e.b, scale.b);
    V::exponent(x.c, e.c, scale.c), V::exponent(x.d, e.d, scale.d);
  }
};

// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln 2 / 2; scale exp(r) by a minimax polynomial of degree 5.
template <typename F>
BYOLA_IN_PLACE inline F reduced_exp(F x, F n, float scale) {
  F r = fma(n, F::set(-0.693359375f), x);  // ln 2 in two parts; n times the first part is exact
  r = fma(n, F::set(2.12194440e-4f), r);
  F p = fma(F::set(scale * 0x1.10627cp-7f), r, F::set(scale * 0x1.572a08p-5f));
  p = fma(p, r, F::set(scale * 0x1.5557aep-3f));
  p = fma(p, r, F::set(scale * 0x1.fffdfcp-2f));
  p = fma(p, r, F::set(scale));
  return fma(p, r, F::set(scale));
}

// exp(x), but 0 below 2^-125: for sums with eps, which such terms do not change. Error below 3 ulp; overflows to inf.
// x / ln 2 + 1.5 2^23 + 126 rounds to an integer whose low bits are n + 126, so one shift makes 2^(n - 1) of it.
template <typename F>
BYOLA_IN_PLACE inline F flushed_exp(F x) {
  x = F::clamp(x, -87.5f, 89.0f);
  const F magic = F::set(12582912.0f + 126.0f), shifted = fma(x, F::set(1.44269504f), magic);
  return reduced_exp(x, shifted - magic, 2.0f) * F::shifted_to_exponent(shifted);
}

// log(x) = e ln 2 + log(1 + r), 1 + r in [0.75, 1.5); log(1 + r) = r + r^2 q(r), q minimax of degree 7. Only for
// x >= 2^-125, +inf and NaN, as (1 - lam) exp(x) + lam exp(z) + eps is. Below 3 ulp. 1 + r is a product with a positive
// power of two, so that inf and NaN pass through it.
template <typename F>
BYOLA_IN_PLACE inline F log_of_large(F x) {
  F e, scale;
  F::exponent(x, e, scale);
  const F r = fma(x * scale, F::set(0.25f), F::set(-1.0f));
  F q = fma(F::set(0x1.bb73f4p-5f), r, F::set(-0x1.ee477cp-4f));
  q = fma(q, r, F::set(0x1.32deep-3f));
  q = fma(q, r, F::set(-0x1.5887fcp-3f));
  q = fma(q, r, F::set(0x1.99216cp-3f));
  q = fma(q, r, F::set(-0x1.ffdd9ep-3f));
  q = fma(q, r, F::set(0x1.5555e6p-2f));
  q = fma(q, r, F::set(-0x1.000014p-1f));
  return fma(e, F::set(0.693147181f * 0x1p-23f), fma(q, r * r, r));
}

#if defined(BYOLA_AVX512) || defined(BYOLA_AVX2)

inline Floats exp_or_zero(Floats x) { return flushed_exp(x); }
inline Floats log_positive(Floats x) { return log_of_large(x); }

// Error below 3 ulp in every binade (tests/ops/test_cpu_math.py); overflows to inf, underflows via denormals to 0.
inline Floats exp(Floats x) {
  x = Floats::clamp(x, -105.0f, 89.0f);
  const Floats n = Floats::round(x * Floats::set(1.44269504f));
  return Floats::times_power_of_two(reduced_exp(x, n, 1.0f), n);
}

#endif

template <typename V>
BYOLA_IN_PLACE inline Four<V> exp_or_zero(Four<V> x) {
  if constexpr (V::is_simd) return flushed_exp(x);
  return {exp_or_zero(x.a), exp_or_zero(x.b), exp_or_zero(x.c), exp_or_zero(x.d)};
}
template <typename V>
BYOLA_IN_PLACE inline Four<V> log_positive(Four<V> x) {
  if constexpr (V::is_simd) return log_of_large(x);
  return {log_positive(x.a), log_positive(x.b), log_positive(x.c), log_positive(x.d)};
}

}  // namespace byola::BYOLA_SIMD
