// conv_block of many input channels: Winograd's F(4 x 4, 3 x 3), or F(2 x 2, 3 x 3) for images that it fits better.
//
// A tile Y of the output, M x M, holds whole pooling windows and needs a tile d of the input, (M + 2) x (M + 2):
// Y = A' [(G w G') * (B' d B)] A: 36 multiplications a channel for 144 (M = 2: 16 for 36). The sum over input channels
// makes (M + 2)^2 products of matrices, (tiles x inputs) by (inputs x outputs), for some tiles at a time, whose factors
// and results stay in the second-level cache. The gradient of the input is the same convolution with flipped,
// transposed weights; that of the weights is G' [sum over tiles of (B' d B) * (A dY A')] G.
// The points of M = 4 are 0, 3/4, -3/4, 3/2, -3/2 and infinity, where the error is half that of the usual 1 and 2: 8e-7
// of the result's spread in float32 (M = 2: 3e-7, a direct convolution: 2e-7 to 8e-7). Images are (B, F, T, C). Lavin
// and Gray, arXiv:1509.09308; points as Barabasz et al., arXiv:1803.10986.
#pragma once

#include <cmath>
#include <type_traits>

#include "conv_block_lanes.h"
#include "tensors.h"

namespace byola::BYOLA_SIMD {

constexpr int64_t kTiles = 24;  // at a time

// Tiles of images, edge x edge positions each; those at the ends may reach beyond. Numbers run through columns, rows,
// images.
struct Tiling {
  int64_t batch, rows, columns, edge, tile_rows, tile_columns;

  Tiling(int64_t batch, int64_t rows, int64_t columns, int64_t edge)
      : batch(batch), rows(rows), columns(columns), edge(edge), tile_rows((rows + edge - 1) / edge),
        tile_columns((columns + edge - 1) / edge) {}
  int64_t tiles() const { return batch * tile_rows * tile_columns; }
  int64_t groups() const { return (tiles() + kTiles - 1) / kTiles; }
  int64_t group_size(int64_t first) const { return std::min(kTiles, tiles() - first); }
  int64_t products() const { return tiles() * (edge + 2) * (edge + 2); }

  struct Tile {
    int64_t image, row, column;  // of its first output
  };
  Tile tile(int64_t number) const {
    const int64_t line = number / tile_columns;
    return {line / tile_rows, line % tile_rows * edge, number % tile_columns * edge};
  }
  bool has(int64_t row, int64_t column) const { return row >= 0 && row < rows && column >= 0 && column < columns; }
  int64_t position(int64_t image, int64_t row, int64_t column) const { return (image * rows + row) * columns + column; }
};

// Call f with the edge (as a type) that needs the fewest products.
template <typename F>
void with_edge(int64_t batch, int64_t rows, int64_t columns, F f) {
  if (Tiling(batch, rows, columns, 2).products() <= Tiling(batch, rows, columns, 4).products())
    return f(std::integral_constant<int, 2>{});
  return f(std::integral_constant<int, 4>{});
}

template <typename T>
inline T constant(double x) {
  if constexpr (std::is_arithmetic_v<T>) {
    return T(x);
  } else {
    return T::set(typename T::Element(x));
  }
}

// The four matrices on lines, of lanes or numbers.
template <int M>
struct Transform;

template <>
struct Transform<2> {
  template <typename T>
  static void input(const T* d, T* t) {  // B'
    t[0] = d[0] - d[2], t[1] = d[1] + d[2], t[2] = d[2] - d[1], t[3] = d[1] - d[3];
  }
  template <typename T>
  static void output(const T* m, T* y) {  // A'
    y[0] = (m[0] + m[1]) + m[2], y[1] = (m[1] - m[2]) - m[3];
  }
  template <typename T>
  static void gradient(const T* y, T* t) {  // A
    t[0] = y[0], t[1] = y[0] + y[1], t[2] = y[0] - y[1], t[3] = constant<T>(0) - y[1];
  }
  template <typename T>
  static void kernel(const T* w, T* u) {  // G
    const T half = constant<T>(0.5), ends = w[0] + w[2];
    u[0] = w[0], u[1] = half * (ends + w[1]), u[2] = half * (ends - w[1]), u[3] = w[2];
  }
  static void weights(const double* u, double* w) {  // G'
    const double even = (u[1] + u[2]) / 2;
    w[0] = u[0] + even, w[1] = (u[1] - u[2]) / 2, w[2] = even + u[3];
  }
};

template <>
struct Transform<4> {
  static constexpr double a = 0.75, b = 1.5, a2 = a * a, b2 = b * b;
  static constexpr double of_a = 1 / (2 * a2 * (a2 - b2)), of_b = 1 / (2 * b2 * (b2 - a2)), of_0 = 1 / (a2 * b2);

  template <typename T>
  static void input(const T* d, T* t) {
    const T ca = constant<T>(a), cb = constant<T>(b), ca2 = constant<T>(a2), cb2 = constant<T>(b2);
    const T both = constant<T>(a2 * b2), sum = constant<T>(a2 + b2);
    const T even_a = fnma(cb2, d[2], d[4]), odd_a = ca * fnma(cb2, d[1], d[3]);
    const T even_b = fnma(ca2, d[2], d[4]), odd_b = cb * fnma(ca2, d[1], d[3]);
    t[0] = fma(both, d[0], fnma(sum, d[2], d[4]));
    t[1] = even_a + odd_a, t[2] = even_a - odd_a, t[3] = even_b + odd_b, t[4] = even_b - odd_b;
    t[5] = fma(both, d[1], fnma(sum, d[3], d[5]));
  }
  template <typename T>
  static void output(const T* m, T* y) {
    const T even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
    y[0] = m[0] + (even_a + even_b);
    y[1] = fma(constant<T>(a), odd_a, constant<T>(b) * odd_b);
    y[2] = fma(constant<T>(a2), even_a, constant<T>(b2) * even_b);
    y[3] = fma(constant<T>(a * a2), odd_a, fma(constant<T>(b * b2), odd_b, m[5]));
  }
  template <typename T>
  static void gradient(const T* y, T* t) {
    const T even_a = fma(constant<T>(a2), y[2], y[0]), odd_a = fma(constant<T>(a * a2), y[3], constant<T>(a) * y[1]);
    const T even_b = fma(constant<T>(b2), y[2], y[0]), odd_b = fma(constant<T>(b * b2), y[3], constant<T>(b) * y[1]);
    t[0] = y[0], t[1] = even_a + odd_a, t[2] = even_a - odd_a, t[3] = even_b + odd_b, t[4] = even_b - odd_b;
    t[5] = y[3];
  }
  template <typename T>
  static void kernel(const T* w, T* u) {
    const T even_a = w[0] + constant<T>(a2) * w[2], odd_a = constant<T>(a) * w[1];
    const T even_b = w[0] + constant<T>(b2) * w[2], odd_b = constant<T>(b) * w[1];
    u[0] = constant<T>(of_0) * w[0], u[1] = constant<T>(of_a) * (even_a + odd_a);
    u[2] = constant<T>(of_a) * (even_a - odd_a), u[3] = constant<T>(of_b) * (even_b + odd_b);
    u[4] = constant<T>(of_b) * (even_b - odd_b), u[5] = w[2];
  }
  static void weights(const double* u, double* w) {
    const double even_a = of_a * (u[1] + u[2]), even_b = of_b * (u[3] + u[4]);
    w[0] = of_0 * u[0] + (even_a + even_b), w[1] = of_a * a * (u[1] - u[2]) + of_b * b * (u[3] - u[4]);
    w[2] = a2 * even_a + (b2 * even_b + u[5]);
  }
};

// The blocks of a matrix product in registers: R rows by N vectors.
template <typename V>
struct Blocking {
  static constexpr int rows = 6, vectors = 2, weight_rows = 4;
};
#if defined(BYOLA_AVX512)
template <>
struct Blocking<Floats> {
  static constexpr int rows = 6, vectors = 4, weight_rows = 4;
};
#endif

// c (R x N vectors) = [c +] sum over k of a(r, k) b(k, N vectors); a(r, k) is at a[r * row + k * step].
template <typename V, int R, int N, bool Add>
inline void multiply(const typename V::Element* a, int64_t row, int64_t step, const typename V::Element* b,
                     int64_t b_stride, int64_t depth, typename V::Element* c, int64_t c_stride) {
  V sums[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[r][n] = Add ? V::load(c + r * c_stride + n * V::width) : V::set(0);
  for (int64_t k = 0; k < depth; ++k) {
    V line[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) line[n] = V::load(b + k * b_stride + n * V::width);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V value = V::set(a[r * row + k * step]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[r][n] = fma(value, line[n], sums[r][n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[r][n].store(c + r * c_stride + n * V::width);
}

template <typename V>
inline V load_some(const typename V::Element* p, int64_t n) {
  return n >= V::width ? V::load(p) : V::load(p, n);
}
template <typename V>
inline void store_some(V x, typename V::Element* p, int64_t n) {
  n >= V::width ? x.store(p) : x.store(p, n);
}

// B' d B of tiles first to first + count - 1 of images (B, F, T, C): to[(M + 2)^2][kTiles][padded].
template <typename V, int M, typename Real>
void transform_input(const Real* images, int64_t channels, const Tiling& tiling, int64_t first, int64_t count,
                     int64_t padded, const Real* zeros, Real* to) {
  constexpr int K = M + 2;
  for (int64_t t = 0; t < count; ++t) {
    const Tiling::Tile tile = tiling.tile(first + t);
    const Real* from[K * K];
    for (int k = 0; k < K * K; ++k) {
      const int64_t row = tile.row - 1 + k / K, column = tile.column - 1 + k % K;
      const bool inside = tiling.has(row, column);
      from[k] = inside ? images + tiling.position(tile.image, row, column) * channels : zeros;
    }
    for (int64_t c = 0; c < channels; c += V::width) {
      V columns[K][K];
#pragma GCC unroll 6
      for (int s = 0; s < K; ++s) {
        V d[K];
#pragma GCC unroll 6
        for (int r = 0; r < K; ++r) d[r] = load_some<V>(from[K * r + s] + c, channels - c);
        Transform<M>::input(d, columns[s]);
      }
#pragma GCC unroll 6
      for (int r = 0; r < K; ++r) {
        V line[K], turned[K];
#pragma GCC unroll 6
        for (int s = 0; s < K; ++s) line[s] = columns[s][r];
        Transform<M>::input(line, turned);
#pragma GCC unroll 6
        for (int s = 0; s < K; ++s) turned[s].store(to + ((K * r + s) * kTiles + t) * padded + c);
      }
    }
  }
}

// A dY A' of tiles: to[(M + 2)^2][kTiles][padded]; positions outside the images count as zeros.
template <typename V, int M, typename Real>
void transform_gradient(const Real* images, int64_t channels, const Tiling& tiling, int64_t first, int64_t count,
                        int64_t padded, const Real* zeros, Real* to) {
  constexpr int K = M + 2;
  for (int64_t t = 0; t < count; ++t) {
    const Tiling::Tile tile = tiling.tile(first + t);
    const Real* from[M * M];
    for (int k = 0; k < M * M; ++k) {
      const int64_t row = tile.row + k / M, column = tile.column + k % M;
      const bool inside = tiling.has(row, column);
      from[k] = inside ? images + tiling.position(tile.image, row, column) * channels : zeros;
    }
    for (int64_t c = 0; c < channels; c += V::width) {
      V columns[M][K];
#pragma GCC unroll 6
      for (int s = 0; s < M; ++s) {
        V y[M];
#pragma GCC unroll 6
        for (int r = 0; r < M; ++r) y[r] = load_some<V>(from[M * r + s] + c, channels - c);
        Transform<M>::gradient(y, columns[s]);
      }
#pragma GCC unroll 6
      for (int r = 0; r < K; ++r) {
        V line[M], turned[K];
#pragma GCC unroll 6
        for (int s = 0; s < M; ++s) line[s] = columns[s][r];
        Transform<M>::gradient(line, turned);
#pragma GCC unroll 6
        for (int s = 0; s < K; ++s) turned[s].store(to + ((K * r + s) * kTiles + t) * padded + c);
      }
    }
  }
}

template <typename V, int M>
class Winograd {
 public:
  using Real = typename V::Element;
  static constexpr int K = M + 2;
  static constexpr int64_t panel = Blocking<V>::vectors * V::width;
  const int64_t inputs, outputs, padded_inputs, padded_outputs;

  // weight (outputs, inputs, 3, 3); flipped: (inputs, outputs, 3, 3), turned by half a circle. It must live as long, and
  // only one object at a time in a thread: for one image, a fresh buffer took a tenth of the time.
  Winograd(const Real* weight, int64_t inputs, int64_t outputs, bool flipped)
      : inputs(inputs), outputs(outputs), padded_inputs(round_up(inputs, V::width)),
        padded_outputs(round_up(outputs, panel)), weight_(weight), flipped_(flipped), zeros_(padded_inputs) {
    static thread_local Memory<Real> memory;
    transformed_ = scratch(memory, K * K * padded_outputs * inputs);
    torch::stable::parallel_for(0, inputs, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t o = 0; o < padded_outputs; o += Doubles::width) transform(i, o);
    });
  }

  int64_t scratch_size() const { return K * K * kTiles * (padded_inputs + padded_outputs); }

  // Convolve tiles first to first + count - 1: returns y[M * M][kTiles][padded_outputs], part of the scratch.
  Real* run(const Real* images, const Tiling& tiling, int64_t first, int64_t count, Real* scratch) const {
    Real *v = scratch, *y = scratch + K * K * kTiles * padded_inputs;
    transform_input<V, M>(images, inputs, tiling, first, count, padded_inputs, zeros_.data(), v);
    constexpr int R = Blocking<V>::rows, N = Blocking<V>::vectors;
    for (int64_t k = 0; k < K * K; ++k)
      for (int64_t o = 0; o < padded_outputs; o += panel)
        for (int64_t t = 0; t < count;
             t += R)  // rows past count hold what was there before; nobody reads their results
          multiply<V, R, N, false>(v + (k * kTiles + t) * padded_inputs, padded_inputs, 1,
                                   transformed_ + panel_of(k, o), panel, inputs,
                                   y + (k * kTiles + t) * padded_outputs + o, padded_outputs);
    if (!transform_output(count, y)) convolve(images, tiling, first, count, y);
    return y;
  }

 private:
  const Real* weight_;
  bool flipped_;
  Real* transformed_;   // [K * K][panels][inputs][panel]
  Memory<Real> zeros_;  // one position

  int64_t panel_of(int64_t k, int64_t o) const { return (k * padded_outputs + o / panel * panel) * inputs; }

  Real tap(int64_t k, int64_t i, int64_t o) const {
    return flipped_ ? weight_[9 * (i * outputs + o) + 8 - k] : weight_[9 * (o * inputs + i) + k];
  }

  // G w G' of one input and some outputs; zeros past the last output.
  void transform(int64_t i, int64_t o) {
    constexpr int W = Doubles::width;
    double taps[9][W] = {};
    for (int k = 0; k < W && o + k < outputs; ++k) {
      const Real* w = weight_ + 9 * (flipped_ ? i * outputs + o + k : (o + k) * inputs + i);
      for (int place = 0; place < 9; ++place) taps[flipped_ ? 8 - place : place][k] = double(w[place]);
    }
    Doubles g[3][K], line[3], u[K];
    for (int r = 0; r < 3; ++r) {
      for (int s = 0; s < 3; ++s) line[s] = Doubles::load(taps[3 * r + s]);
      Transform<M>::kernel(line, g[r]);
    }
    for (int s = 0; s < K; ++s) {
      for (int r = 0; r < 3; ++r) line[r] = g[r][s];
      Transform<M>::kernel(line, u);
      for (int r = 0; r < K; ++r) u[r].store_as(transformed_ + panel_of(K * r + s, o) + i * panel + o % panel);
    }
  }

  // A' M A in place, into the first planes; returns whether all values are finite.
  bool transform_output(int64_t count, Real* m) const {
    const V zero = V::set(0);
    V sums = zero;
    const int64_t plane = kTiles * padded_outputs;
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t c = 0; c < padded_outputs; c += V::width) {
        Real* at = m + t * padded_outputs + c;
        V columns[K][M];
#pragma GCC unroll 6
        for (int s = 0; s < K; ++s) {
          V line[K];
#pragma GCC unroll 6
          for (int r = 0; r < K; ++r) line[r] = V::load(at + (K * r + s) * plane);
          Transform<M>::output(line, columns[s]);
        }
#pragma GCC unroll 6
        for (int r = 0; r < M; ++r) {
          V line[K], y[M];
#pragma GCC unroll 6
          for (int s = 0; s < K; ++s) line[s] = columns[s][r];
          Transform<M>::output(line, y);
#pragma GCC unroll 6
          for (int s = 0; s < M; ++s) {
            y[s].store(at + (M * r + s) * plane);
            sums = fma(y[s], zero, sums);  // NaN once a value is NaN or infinite
          }
        }
      }
    }
    Real lanes[V::width];
    sums.store(lanes);
    return std::all_of(lanes, lanes + V::width, [](Real lane) { return lane == 0; });
  }

  // The definition, for tiles with NaN or inf, which the transforms spread over the whole tile.
  void convolve(const Real* images, const Tiling& tiling, int64_t first, int64_t count, Real* y) const {
    for (int64_t t = 0; t < count; ++t) {
      bool finite = true;
      for (int64_t k = 0; k < M * M; ++k)
        for (int64_t o = 0; o < outputs; ++o) finite &= std::isfinite(y[(k * kTiles + t) * padded_outputs + o]);
      if (finite) continue;
      const Tiling::Tile tile = tiling.tile(first + t);
      for (int k = 0; k < M * M; ++k) {
        Real* to = y + (k * kTiles + t) * padded_outputs;
        std::fill(to, to + outputs, Real(0));
        for (int place = 0; place < 9; ++place) {
          const int64_t row = tile.row + k / M + place / 3 - 1, column = tile.column + k % M + place % 3 - 1;
          if (!tiling.has(row, column)) continue;
          const Real* from = images + tiling.position(tile.image, row, column) * inputs;
          for (int64_t i = 0; i < inputs; ++i)
            for (int64_t o = 0; o < outputs; ++o) to[o] += from[i] * tap(place, i, o);
        }
      }
    }
  }
};

// Sums over tiles of (B' d B) * (A dY A'): one chunk's [(M + 2)^2][padded inputs][padded outputs].
template <typename V, int M>
class WeightSums {
 public:
  using Real = typename V::Element;
  static constexpr int K = M + 2;
  static constexpr int64_t panel = Blocking<V>::vectors * V::width;
  const int64_t inputs, outputs, padded_inputs, padded_outputs;

  WeightSums(int64_t inputs, int64_t outputs)
      : inputs(inputs), outputs(outputs), padded_inputs(round_up(inputs, V::width)),
        padded_outputs(round_up(outputs, panel)), zeros_(std::max(padded_inputs, padded_outputs)) {}

  int64_t size() const { return K * K * padded_inputs * padded_outputs; }
  int64_t scratch_size() const { return K * K * kTiles * (padded_inputs + padded_outputs); }

  void add(const Real* images, const Real* grads, const Tiling& tiling, int64_t first, int64_t count, Real* scratch,
           Real* sums) const {
    Real *v = scratch, *w = scratch + K * K * kTiles * padded_inputs;
    transform_input<V, M>(images, inputs, tiling, first, count, padded_inputs, zeros_.data(), v);
    transform_gradient<V, M>(grads, outputs, tiling, first, count, padded_outputs, zeros_.data(), w);
    constexpr int R = Blocking<V>::weight_rows, N = Blocking<V>::vectors;
    for (int64_t k = 0; k < K * K; ++k)
      for (int64_t o = 0; o < padded_outputs; o += panel)
        for (int64_t i = 0; i < padded_inputs; i += R)
          multiply<V, R, N, true>(v + k * kTiles * padded_inputs + i, 1, padded_inputs,
                                  w + k * kTiles * padded_outputs + o, padded_outputs, count,
                                  sums + (k * padded_inputs + i) * padded_outputs + o, padded_outputs);
  }

  // G' sums G of one input, added up over chunks: to (outputs, inputs, 3, 3).
  void finish(const Real* sums, int64_t chunks, int64_t i, Real* to) const {
    std::vector<double> whole(K * K * outputs);
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t k = 0; k < K * K; ++k)
        for (int64_t o = 0; o < outputs; ++o)
          whole[k * outputs + o] += double(sums[chunk * size() + (k * padded_inputs + i) * padded_outputs + o]);
    for (int64_t o = 0; o < outputs; ++o) {
      double columns[K][3], line[K], w[3];
      for (int s = 0; s < K; ++s) {
        for (int r = 0; r < K; ++r) line[r] = whole[(K * r + s) * outputs + o];
        Transform<M>::weights(line, columns[s]);
      }
      for (int r = 0; r < 3; ++r) {
        for (int s = 0; s < K; ++s) line[s] = columns[s][r];
        Transform<M>::weights(line, w);
        for (int s = 0; s < 3; ++s) to[(o * inputs + i) * 9 + 3 * r + s] = Real(w[s]);
      }
    }
  }

 private:
  Memory<Real> zeros_;
};

}  // namespace byola::BYOLA_SIMD
