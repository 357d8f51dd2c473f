// conv_block of one input channel, which is never convolved into memory: statistics of its 3 x 3 patches instead.
//
// With q = (p - anchor, 1), p the nine values around a position (zeros outside the image), the moments E[q q'] give mean
// and variance of any channel w . p (see ops.conv_block). Forward: a pooled value's window needs a 4 x 4 of the input;
// nine weights stay in registers while the windows of a row pass by: 16 broadcasts, 36 multiply-adds.
// Backward: the patch at each maximum is looked up in that 4 x 4, so that nine multiply-adds a pooled value are enough
// for the sums of g and g p. Reads the input twice forward and once backward; writes the pooled quarter.
#pragma once

#include <cmath>

#include "conv_block_lanes.h"

namespace byola::BYOLA_SIMD {

constexpr int64_t kMoments = 55, kSums = 10;  // of q; of a channel backward
constexpr int64_t kFirstChunks = 128;

struct Plane {
  int64_t batch, rows, columns, channels;
  int64_t pooled_rows() const { return rows / 2; }
  int64_t pooled_columns() const { return columns / 2; }
  int64_t count() const { return batch * rows * columns; }
};

// Rows row - 1 to row + count - 2 of an image, less the anchor, with a border; a line is `line_size` long.
inline int64_t line_size(const Plane& plane) { return plane.columns + 2 + 32; }

template <typename Real>
void copy_lines(const Real* image, const Plane& plane, int64_t row, int64_t count, Real anchor, Real* lines) {
  for (int64_t r = 0; r < count; ++r) {
    Real* line = lines + r * line_size(plane);
    const int64_t from = row - 1 + r;
    line[0] = -anchor, line[plane.columns + 1] = -anchor;
    if (from < 0 || from >= plane.rows) {
      std::fill(line, line + plane.columns + 2, -anchor);
    } else {
      for (int64_t t = 0; t < plane.columns; ++t) line[t + 1] = image[from * plane.columns + t] - anchor;
    }
  }
}

// Add the moments of one image's patches to sums[55]: products in rows of the compute type, rows in double.
template <typename V, typename Real>
void add_moments(const Real* image, const Plane& plane, Real anchor, Real* lines, double* sums) {
  for (int64_t row = 0; row < plane.rows; ++row) {
    copy_lines(image, plane, row, 3, anchor, lines);
    V products[kMoments];
    for (int64_t k = 0; k < kMoments; ++k) products[k] = V::set(0);
    for (int64_t t = 0; t < plane.columns; t += V::width) {
      const int64_t n = plane.columns - t;
      V q[9];
      for (int i = 0; i < 9; ++i) {
        const Real* p = lines + i / 3 * line_size(plane) + t + i % 3;
        q[i] = n >= V::width ? V::load(p) : V::load(p, n);
      }
#pragma GCC unroll 9
      for (int i = 0; i < 9; ++i) {
#pragma GCC unroll 9
        for (int j = 0; j <= i; ++j) products[i * (i + 1) / 2 + j] = fma(q[i], q[j], products[i * (i + 1) / 2 + j]);
        products[45 + i] = products[45 + i] + q[i];
      }
    }
    for (int64_t k = 0; k < kMoments - 1; ++k) {
      double lanes[V::width] = {};
      products[k].add_to(lanes);
      for (const double lane : lanes) sums[k] += lane;
    }
  }
  sums[kMoments - 1] += double(plane.rows * plane.columns);
}

// Write one pooled row of z's maxima, clipped: weights 9 x padded channels, times scale; places may be null.
template <typename V, typename Real>
void first_forward_row(const Real* lines, const Plane& plane, const Real* weights, const Real* shift, int64_t padded,
                       Real* out, uint8_t* places) {
  const int64_t size = line_size(plane), channels = plane.channels;
  for (int64_t c = 0; c < channels; c += V::width) {
    const int64_t n = channels - c;
    V w[9];
    for (int k = 0; k < 9; ++k) w[k] = V::load(weights + k * padded + c);
    const V start = V::load(shift + c);
    for (int64_t j = 0; j < plane.pooled_columns(); ++j) {
      const Real* corner = lines + 2 * j;
      V z[4] = {start, start, start, start};
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
#pragma GCC unroll 4
        for (int s = 0; s < 4; ++s) {
          const V value = V::set(corner[r * size + s]);
#pragma GCC unroll 4
          for (int k = 0; k < 4; ++k) {
            const int i = r - k / 2, l = s - k % 2;
            if (i >= 0 && i < 3 && l >= 0 && l < 3) z[k] = fma(w[3 * i + l], value, z[k]);
          }
        }
      }
      Largest<V> best(z[0], z[1], z[2], z[3]);
      best.clip();
      Real* to = out + j * channels + c;
      n >= V::width ? best.value.store(to) : best.value.store(to, n);
      if (places) store_places(best.place, places + j * channels + c, n);
    }
  }
}

// Add sum g and sum g q of one pooled row to sums (10, padded); corners: 32 values of each window, its 4 x 4 first.
template <typename V, typename Real>
void first_backward_row(const Real* corners, const Plane& plane, const Real* grad, const uint8_t* places,
                        int64_t padded, double* sums) {
  const int64_t channels = plane.channels;
  const V clipped = V::set(kClipped), zero = V::set(0);
  for (int64_t c = 0; c < channels; c += V::width) {
    const int64_t n = channels - c;
    V total[kSums];
    for (V& sum : total) sum = zero;
    for (int64_t j = 0; j < plane.pooled_columns(); ++j) {
      const int64_t at = j * channels + c;
      const V given = n >= V::width ? V::load(grad + at) : V::load(grad + at, n);
      const V g = where_equal(load_places<V>(places + at, n), clipped, zero, given);
      const auto corner = load_corners<V>(places + at, n);
      total[0] = total[0] + g;
#pragma GCC unroll 9
      for (int k = 0; k < 9; ++k)
        total[k + 1] = fma(g, lookup_corner<V>(corners + 32 * j + k / 3 * 4 + k % 3, corner), total[k + 1]);
    }
    for (int64_t k = 0; k < kSums; ++k) total[k].add_to(sums + k * padded + c);
  }
}

// Add to one image's gradient, with a border of one (rows + 2, columns + 2): each position n spreads nine values,
// a g w of the channels whose maximum it is, less (constant + matrix (p - anchor)) of all channels.
template <typename Real>
void first_to_image(const Real* image, const Plane& plane, Real anchor, const Real* grad, const uint8_t* places,
                    const Real* weights, const Real* scale, int64_t padded, const double* matrix,
                    const double* constant, Real* lines, double* bordered) {
  const int64_t wide = plane.columns + 2, size = line_size(plane);
  std::fill(bordered, bordered + (plane.rows + 2) * wide, 0.0);
  for (int64_t row = 0; row < plane.rows; ++row) {
    copy_lines(image, plane, row, 3, anchor, lines);
    for (int64_t t = 0; t < plane.columns; ++t) {
      double q[9];
      for (int k = 0; k < 9; ++k) q[k] = double(lines[k / 3 * size + t + k % 3]);
      for (int k = 0; k < 9; ++k) {
        double value = constant[k];
        for (int l = 0; l < 9; ++l) value += matrix[9 * k + l] * q[l];
        bordered[(row + k / 3) * wide + t + k % 3] -= value;
      }
    }
  }
  for (int64_t i = 0; i < plane.pooled_rows(); ++i) {
    for (int64_t j = 0; j < plane.pooled_columns(); ++j) {
      const int64_t at = (i * plane.pooled_columns() + j) * plane.channels;
      double windows[4][9] = {};
      for (int64_t c = 0; c < plane.channels; ++c) {
        if (places[at + c] == kClipped) continue;
        const double g = double(scale[c]) * double(grad[at + c]);
        for (int k = 0; k < 9; ++k) windows[places[at + c]][k] += g * double(weights[k * padded + c]);
      }
      for (int place = 0; place < 4; ++place)
        for (int k = 0; k < 9; ++k)
          bordered[(2 * i + place / 2 + k / 3) * wide + 2 * j + place % 2 + k % 3] += windows[place][k];
    }
  }
}

}  // namespace byola::BYOLA_SIMD
