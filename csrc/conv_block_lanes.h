// Lanes of channels for conv_block: the maximum of a pooling window, where it is, and choices by comparison.
// A place is 0 to 3 in reading order, kept in lanes of the compute type and stored as a byte; 4: ReLU clipped it.
#pragma once

#include <algorithm>

#include "storage.h"

namespace byola::BYOLA_SIMD {

constexpr int kClipped = 4;

// x where a > b; y elsewhere, and where either is NaN.
template <typename T, int W>
inline Lanes<T, W> where_greater(Lanes<T, W> a, Lanes<T, W> b, Lanes<T, W> x, Lanes<T, W> y) {
  return {a.v > b.v ? x.v : y.v};
}
// x where a = b, y elsewhere.
template <typename T, int W>
inline Lanes<T, W> where_equal(Lanes<T, W> a, Lanes<T, W> b, Lanes<T, W> x, Lanes<T, W> y) {
  return {a.v == b.v ? x.v : y.v};
}
// x where a or b is NaN, y elsewhere.
template <typename T, int W>
inline Lanes<T, W> where_nan(Lanes<T, W> a, Lanes<T, W> b, Lanes<T, W> x, Lanes<T, W> y) {
  return {((a.v != a.v) | (b.v != b.v)) ? x.v : y.v};
}
template <typename T, int W>
inline void store_places(Lanes<T, W> place, uint8_t* p, int64_t n) {
  for (int k = 0; k < n && k < W; ++k) p[k] = uint8_t(place.v[k]);
}
template <typename V>
inline V load_places(const uint8_t* p, int64_t n) {
  int32_t lanes[V::width] = {};
  for (int k = 0; k < n && k < V::width; ++k) lanes[k] = p[k];
  return V::from_ints(lanes);
}
// Where the maxima's patches start in a 4 x 4 of rows: 0, 1, 4 or 5; 8 for clipped ones.
template <typename V>
inline typename V::Index load_corners(const uint8_t* p, int64_t n) {
  int32_t lanes[V::width] = {};
  for (int k = 0; k < n && k < V::width; ++k) lanes[k] = p[k] + 2 * (p[k] / 2);
  return V::Index::load(lanes);
}
// window[index], index below 6 (8: any value); a whole register is read.
template <typename V>
inline V lookup_corner(const typename V::Element* window, typename V::Index index) {
  return V::lookup_far(window, index);
}

#if defined(BYOLA_AVX512)

inline Floats where_greater(Floats a, Floats b, Floats x, Floats y) {
  return {_mm512_mask_mov_ps(y.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), x.v)};
}
inline Floats where_equal(Floats a, Floats b, Floats x, Floats y) {
  return {_mm512_mask_mov_ps(y.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ), x.v)};
}
inline Floats where_nan(Floats a, Floats b, Floats x, Floats y) {
  return {_mm512_mask_mov_ps(y.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_UNORD_Q), x.v)};
}
inline void store_places(Floats place, uint8_t* p, int64_t n) {
  const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(place.v));
  _mm_mask_storeu_epi8(p, Floats::first(n), bytes);
}
template <>
inline Floats load_places<Floats>(const uint8_t* p, int64_t n) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(Floats::first(n), p)))};
}
template <>
inline Floats::Index load_corners<Floats>(const uint8_t* p, int64_t n) {
  const __m512i place = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(Floats::first(n), p));
  return {_mm512_add_epi32(place, _mm512_slli_epi32(_mm512_srli_epi32(place, 1), 1))};
}
template <>
inline Floats lookup_corner<Floats>(const float* window, Floats::Index index) {
  return {_mm512_permutexvar_ps(index.v, _mm512_loadu_ps(window))};
}

#elif defined(BYOLA_AVX2)

inline Floats where_greater(Floats a, Floats b, Floats x, Floats y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ))};
}
inline Floats where_equal(Floats a, Floats b, Floats x, Floats y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ))};
}
inline Floats where_nan(Floats a, Floats b, Floats x, Floats y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_UNORD_Q))};
}
inline __m128i load_bytes(const uint8_t* p, int64_t n) {  // eight
  uint64_t bytes = 0;
  std::memcpy(&bytes, p, n < 8 ? n : 8);
  return _mm_cvtsi64_si128(int64_t(bytes));
}
inline void store_places(Floats place, uint8_t* p, int64_t n) {
  const __m256i whole = _mm256_cvttps_epi32(place.v);
  const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  const int64_t bytes = _mm_cvtsi128_si64(_mm_packus_epi16(half, half));
  std::memcpy(p, &bytes, n < 8 ? n : 8);
}
template <>
inline Floats load_places<Floats>(const uint8_t* p, int64_t n) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(load_bytes(p, n)))};
}
template <>
inline Floats::Index load_corners<Floats>(const uint8_t* p, int64_t n) {
  const __m256i place = _mm256_cvtepu8_epi32(load_bytes(p, n));
  return {_mm256_add_epi32(place, _mm256_slli_epi32(_mm256_srli_epi32(place, 1), 1))};
}
template <>
inline Floats lookup_corner<Floats>(const float* window, Floats::Index index) {
  return {_mm256_permutevar8x32_ps(_mm256_loadu_ps(window), index.v)};
}

#endif

template <typename V>
inline V relu(V x) {  // keeps NaN
  const V zero = V::set(0);
  return where_greater(zero, x, zero, x);
}

// The maximum of a window, NaN if one value is, and its place: the first of equal ones.
template <typename V>
struct Largest {
  V value, place;

  Largest(V value, V place) : value(value), place(place) {}
  Largest(V y0, V y1, V y2, V y3) : value(y0), place(V::set(0)) {
    const V later[3] = {y1, y2, y3};
    for (int k = 0; k < 3; ++k) {
      place = where_greater(later[k], value, V::set(k + 1), place);
      value = where_greater(later[k], value, later[k], value);
    }
    value = where_nan(y0, y1, y0 + y1, value);
    value = where_nan(y2, y3, y2 + y3, value);
  }
  void clip() {
    const V zero = V::set(0);
    place = where_greater(value, zero, place, where_nan(value, value, place, V::set(kClipped)));
    value = relu(value);
  }
};

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Sums of `count` tasks of Values each, added up in the order of tasks, so that they do not depend on threads.
struct Chunks {
  int64_t total, count;
  Chunks(int64_t total, int64_t most) : total(total), count(std::max<int64_t>(1, std::min(total, most))) {}
  int64_t begin(int64_t chunk) const { return chunk * total / count; }
  int64_t end(int64_t chunk) const { return (chunk + 1) * total / count; }
};

}  // namespace byola::BYOLA_SIMD
