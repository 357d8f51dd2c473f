// conv_block of many input channels: Winograd's F(2 x 2, 3 x 3), whose output tile is the pooling window.
//
// A tile of the output Y (2 x 2) needs a tile d of the input (4 x 4): Y = A' [(G w G') * (B' d B)] A with
//   B' = [1 0 -1 0; 0 1 1 0; 0 -1 1 0; 0 1 0 -1],  G = [1 0 0; .5 .5 .5; .5 -.5 .5; 0 0 1],  A' = [1 1 1 0; 0 1 -1 -1]:
// 16 multiplications for 36. The sum over input channels makes 16 products of matrices, (tiles x inputs) by (inputs x
// outputs), for kTiles tiles at a time, whose factors and results stay in the second-level cache. The gradient of the
// input is the same convolution with flipped, transposed weights; that of the weights is
// G' [sum over tiles of (B' d B) * (A dY A')] G. Images are (B, F, T, C): channels innermost. Arithmetic Lavin and Gray,
// arXiv:1509.09308.
#pragma once

#include <cmath>

#include "conv_block_lanes.h"

namespace byola {

constexpr int64_t kTiles = 24, kWeightTiles = 48;

// Windows of images, those at odd ends included; tile numbers run through columns, rows and images.
struct Tiling {
  int64_t batch, rows, columns, tile_rows, tile_columns;

  Tiling(int64_t batch, int64_t rows, int64_t columns)
      : batch(batch), rows(rows), columns(columns), tile_rows((rows + 1) / 2), tile_columns((columns + 1) / 2) {}
  int64_t tiles() const { return batch * tile_rows * tile_columns; }
  int64_t groups(int64_t size) const { return (tiles() + size - 1) / size; }

  struct Tile {
    int64_t image, row, column;  // of its first output
  };
  Tile tile(int64_t number) const {
    const int64_t line = number / tile_columns;
    return {line / tile_rows, line % tile_rows * 2, number % tile_columns * 2};
  }
  bool has(int64_t row, int64_t column) const { return row >= 0 && row < rows && column >= 0 && column < columns; }
  int64_t position(int64_t image, int64_t row, int64_t column) const { return (image * rows + row) * columns + column; }
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

// B' d B of tiles first to first + count - 1 of images (B, F, T, C): to[16][size][padded].
template <typename V, typename Real>
void transform_input(const Real* images, int64_t channels, const Tiling& tiling, int64_t first, int64_t count,
                     int64_t size, int64_t padded, const Real* zeros, Real* to) {
  for (int64_t t = 0; t < count; ++t) {
    const Tiling::Tile tile = tiling.tile(first + t);
    const Real* from[16];
    for (int k = 0; k < 16; ++k) {
      const int64_t row = tile.row - 1 + k / 4, column = tile.column - 1 + k % 4;
      const bool inside = tiling.has(row, column);
      from[k] = inside ? images + tiling.position(tile.image, row, column) * channels : zeros;
    }
    for (int64_t c = 0; c < channels; c += V::width) {
      V b[4][4];
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) {
        V d[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) d[r] = load_some<V>(from[4 * r + s] + c, channels - c);
        b[0][s] = d[0] - d[2], b[1][s] = d[1] + d[2], b[2][s] = d[2] - d[1], b[3][s] = d[1] - d[3];
      }
      Real* at = to + t * padded + c;
      const int64_t plane = size * padded;
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        (b[r][0] - b[r][2]).store(at + (4 * r + 0) * plane);
        (b[r][1] + b[r][2]).store(at + (4 * r + 1) * plane);
        (b[r][2] - b[r][1]).store(at + (4 * r + 2) * plane);
        (b[r][1] - b[r][3]).store(at + (4 * r + 3) * plane);
      }
    }
  }
}

// A dY A' of tiles: to[16][size][padded]; positions outside the images count as zeros.
template <typename V, typename Real>
void transform_gradient(const Real* images, int64_t channels, const Tiling& tiling, int64_t first, int64_t count,
                        int64_t size, int64_t padded, const Real* zeros, Real* to) {
  for (int64_t t = 0; t < count; ++t) {
    const Tiling::Tile tile = tiling.tile(first + t);
    const Real* from[4];
    for (int k = 0; k < 4; ++k) {
      const int64_t row = tile.row + k / 2, column = tile.column + k % 2;
      const bool inside = tiling.has(row, column);
      from[k] = inside ? images + tiling.position(tile.image, row, column) * channels : zeros;
    }
    for (int64_t c = 0; c < channels; c += V::width) {
      V y[4];
      for (int k = 0; k < 4; ++k) y[k] = load_some<V>(from[k] + c, channels - c);
      const V zero = V::set(0);
      const V lines[4][2] = {
          {y[0], y[1]}, {y[0] + y[2], y[1] + y[3]}, {y[0] - y[2], y[1] - y[3]}, {zero - y[2], zero - y[3]}};
      Real* at = to + t * padded + c;
      const int64_t plane = size * padded;
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        lines[r][0].store(at + (4 * r + 0) * plane);
        (lines[r][0] + lines[r][1]).store(at + (4 * r + 1) * plane);
        (lines[r][0] - lines[r][1]).store(at + (4 * r + 2) * plane);
        (zero - lines[r][1]).store(at + (4 * r + 3) * plane);
      }
    }
  }
}

// Convolve by Winograd's algorithm.
template <typename V>
class Winograd {
 public:
  using Real = typename V::Element;
  static constexpr int64_t panel = Blocking<V>::vectors * V::width;
  const int64_t inputs, outputs, padded_inputs, padded_outputs;

  // weight (outputs, inputs, 3, 3); flipped: (inputs, outputs, 3, 3), turned by half a circle
  Winograd(const Real* weight, int64_t inputs, int64_t outputs, bool flipped)
      : inputs(inputs), outputs(outputs), padded_inputs(round_up(inputs, V::width)),
        padded_outputs(round_up(outputs, panel)), direct_(9 * inputs * outputs),
        transformed_(16 * padded_outputs * inputs), zeros_(padded_inputs) {
    for (int64_t i = 0; i < inputs; ++i) {
      for (int64_t o = 0; o < outputs; ++o) {
        const Real* w = weight + 9 * (flipped ? i * outputs + o : o * inputs + i);
        Real taps[9], g[4][3], u[16];
        for (int k = 0; k < 9; ++k) taps[k] = w[flipped ? 8 - k : k];
        for (int k = 0; k < 9; ++k) direct_[(k * inputs + i) * outputs + o] = taps[k];
        const Real half = Real(0.5);
        for (int s = 0; s < 3; ++s) {
          const Real ends = taps[s] + taps[6 + s], middle = taps[3 + s];
          g[0][s] = taps[s], g[1][s] = half * (ends + middle), g[2][s] = half * (ends - middle), g[3][s] = taps[6 + s];
        }
        for (int r = 0; r < 4; ++r) {
          const Real ends = g[r][0] + g[r][2], middle = g[r][1];
          u[4 * r] = g[r][0], u[4 * r + 1] = half * (ends + middle), u[4 * r + 2] = half * (ends - middle);
          u[4 * r + 3] = g[r][2];
        }
        for (int k = 0; k < 16; ++k) panel_of(k, o)[i * panel + o % panel] = u[k];
      }
    }
  }

  int64_t scratch_size() const { return 16 * kTiles * (padded_inputs + padded_outputs); }

  // Convolve the windows first to first + count - 1: returns y[4][kTiles][padded_outputs], part of the scratch.
  Real* run(const Real* images, const Tiling& tiling, int64_t first, int64_t count, Real* scratch) const {
    Real *v = scratch, *y = scratch + 16 * kTiles * padded_inputs;
    transform_input<V>(images, inputs, tiling, first, count, kTiles, padded_inputs, zeros_.data(), v);
    constexpr int R = Blocking<V>::rows, N = Blocking<V>::vectors;
    for (int64_t k = 0; k < 16; ++k)
      for (int64_t o = 0; o < padded_outputs; o += panel)
        for (int64_t t = 0; t < count;
             t += R)  // rows past count hold what was there before; nobody reads their results
          multiply<V, R, N, false>(v + (k * kTiles + t) * padded_inputs, padded_inputs, 1, panel_of(k, o), panel,
                                   inputs, y + (k * kTiles + t) * padded_outputs + o, padded_outputs);
    if (!transform_output(count, y)) convolve(images, tiling, first, count, y);
    return y;
  }

 private:
  Memory<Real> direct_, transformed_, zeros_;  // [9][inputs][outputs]; [16][panels][inputs][panel]; a position outside

  const Real* panel_of(int64_t k, int64_t o) const {
    return transformed_.data() + (k * padded_outputs + o / panel * panel) * inputs;
  }
  Real* panel_of(int64_t k, int64_t o) {
    return transformed_.data() + (k * padded_outputs + o / panel * panel) * inputs;
  }

  // A' M A in place, into the first four planes; returns whether all values are finite.
  bool transform_output(int64_t count, Real* m) const {
    const V zero = V::set(0);
    V sums = zero;
    const int64_t plane = kTiles * padded_outputs;
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t c = 0; c < padded_outputs; c += V::width) {
        Real* at = m + t * padded_outputs + c;
        V a[2][4];
#pragma GCC unroll 4
        for (int s = 0; s < 4; ++s) {
          const V m0 = V::load(at + s * plane), m1 = V::load(at + (4 + s) * plane);
          const V m2 = V::load(at + (8 + s) * plane), m3 = V::load(at + (12 + s) * plane);
          a[0][s] = (m0 + m1) + m2, a[1][s] = (m1 - m2) - m3;
        }
#pragma GCC unroll 2
        for (int r = 0; r < 2; ++r) {
          const V left = (a[r][0] + a[r][1]) + a[r][2], right = (a[r][1] - a[r][2]) - a[r][3];
          left.store(at + 2 * r * plane), right.store(at + (2 * r + 1) * plane);
          sums = fma(left, zero, fma(right, zero, sums));  // NaN once a value is NaN or infinite
        }
      }
    }
    Real lanes[V::width];
    sums.store(lanes);
    return std::all_of(lanes, lanes + V::width, [](Real lane) { return lane == 0; });
  }

  // The definition, for windows with NaN or inf, which the transforms spread over the whole window.
  void convolve(const Real* images, const Tiling& tiling, int64_t first, int64_t count, Real* y) const {
    for (int64_t t = 0; t < count; ++t) {
      bool finite = true;
      for (int64_t k = 0; k < 4; ++k)
        for (int64_t o = 0; o < outputs; ++o) finite &= std::isfinite(y[(k * kTiles + t) * padded_outputs + o]);
      if (finite) continue;
      const Tiling::Tile tile = tiling.tile(first + t);
      for (int k = 0; k < 4; ++k) {
        Real* to = y + (k * kTiles + t) * padded_outputs;
        std::fill(to, to + outputs, Real(0));
        for (int tap = 0; tap < 9; ++tap) {
          const int64_t row = tile.row + k / 2 + tap / 3 - 1, column = tile.column + k % 2 + tap % 3 - 1;
          if (!tiling.has(row, column)) continue;
          const Real* from = images + tiling.position(tile.image, row, column) * inputs;
          for (int64_t i = 0; i < inputs; ++i)
            for (int64_t o = 0; o < outputs; ++o) to[o] += from[i] * direct_[(tap * inputs + i) * outputs + o];
        }
      }
    }
  }
};

// Sums over tiles of (B' d B) * (A dY A'): one chunk's [16][padded inputs][padded outputs].
template <typename V>
class WeightSums {
 public:
  using Real = typename V::Element;
  static constexpr int64_t panel = Blocking<V>::vectors * V::width;
  const int64_t inputs, outputs, padded_inputs, padded_outputs;

  WeightSums(int64_t inputs, int64_t outputs)
      : inputs(inputs), outputs(outputs), padded_inputs(round_up(inputs, V::width)),
        padded_outputs(round_up(outputs, panel)), zeros_(std::max(padded_inputs, padded_outputs)) {}

  int64_t size() const { return 16 * padded_inputs * padded_outputs; }
  int64_t scratch_size() const { return 16 * kWeightTiles * (padded_inputs + padded_outputs); }

  void add(const Real* images, const Real* grads, const Tiling& tiling, int64_t first, int64_t count, Real* scratch,
           Real* sums) const {
    Real *v = scratch, *w = scratch + 16 * kWeightTiles * padded_inputs;
    transform_input<V>(images, inputs, tiling, first, count, kWeightTiles, padded_inputs, zeros_.data(), v);
    transform_gradient<V>(grads, outputs, tiling, first, count, kWeightTiles, padded_outputs, zeros_.data(), w);
    constexpr int R = Blocking<V>::weight_rows, N = Blocking<V>::vectors;
    for (int64_t k = 0; k < 16; ++k)
      for (int64_t o = 0; o < padded_outputs; o += panel)
        for (int64_t i = 0; i < padded_inputs; i += R)
          multiply<V, R, N, true>(v + k * kWeightTiles * padded_inputs + i, 1, padded_inputs,
                                  w + k * kWeightTiles * padded_outputs + o, padded_outputs, count,
                                  sums + (k * padded_inputs + i) * padded_outputs + o, padded_outputs);
  }

  // G' sums G of one input, added up over chunks: to (outputs, inputs, 3, 3).
  void finish(const Real* sums, int64_t chunks, int64_t i, Real* to) const {
    std::vector<double> whole(16 * outputs);
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t k = 0; k < 16; ++k)
        for (int64_t o = 0; o < outputs; ++o)
          whole[k * outputs + o] += double(sums[chunk * size() + (k * padded_inputs + i) * padded_outputs + o]);
    for (int64_t o = 0; o < outputs; ++o) {
      double g[3][4];
      for (int s = 0; s < 4; ++s) {
        const double u0 = whole[s * outputs + o], u1 = whole[(4 + s) * outputs + o];
        const double u2 = whole[(8 + s) * outputs + o], u3 = whole[(12 + s) * outputs + o];
        g[0][s] = u0 + (u1 + u2) / 2, g[1][s] = (u1 - u2) / 2, g[2][s] = (u1 + u2) / 2 + u3;
      }
      for (int r = 0; r < 3; ++r) {
        Real* w = to + (o * inputs + i) * 9 + 3 * r;
        w[0] = Real(g[r][0] + (g[r][1] + g[r][2]) / 2), w[1] = Real((g[r][1] - g[r][2]) / 2);
        w[2] = Real((g[r][1] + g[r][2]) / 2 + g[r][3]);
      }
    }
  }

 private:
  Memory<Real> zeros_;
};

}  // namespace byola
