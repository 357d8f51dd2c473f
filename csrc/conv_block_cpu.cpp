// Convolution 3 x 3, BatchNorm, ReLU, max pooling 2 x 2, and their gradients; formulas in ops.conv_block.
// One input channel: conv_block_first.h. More: conv_block_winograd.h, where each group of windows is convolved, added to
// the statistics and pooled while it is in cache. The maximum needs no statistics, only gamma's sign: a second pass
// normalises the pooled quarter. The convolution's output is stored for a backward pass alone.
// Statistics are those of groups (mean, sum of squares around it), combined in double, in order.
#include <tuple>

#include "conv_block_first.h"
#include "conv_block_winograd.h"
#include "tensors.h"

namespace byola::BYOLA_SIMD {

namespace {

using Optional = std::optional<Tensor>;

// (B, C, F, T) with any strides -> (B, F, T, C) contiguous, and back.
template <typename Real>
Tensor channels_innermost(const Tensor& x) {
  return as_contiguous<Real>(torch::stable::transpose(torch::stable::transpose(x, 1, 2), 2, 3));
}
Tensor channels_second(const Tensor& x, ScalarType dtype) {
  const Tensor turned = torch::stable::transpose(torch::stable::transpose(x, 2, 3), 1, 2);
  return x.scalar_type() == dtype ? turned : torch::stable::to(turned, dtype);
}

template <typename Real>
Memory<Real> padded_copy(const Tensor& values, int64_t padded) {
  const Tensor whole = as_contiguous<Real>(values);
  Memory<Real> copy(padded);
  std::copy(data<Real>(whole), data<Real>(whole) + whole.numel(), copy.begin());
  return copy;
}

// gamma, beta and statistics of a call: row 0 centre, 1 r = 1 / std, 2 mean, 3 variance.
template <typename Real>
struct Norm {
  int64_t channels, padded;
  Memory<Real> gamma, beta, bias, sign;
  Tensor stats;

  Norm(const Tensor& x, const Optional& bias, const Tensor& gamma, const Tensor& beta, int64_t padded)
      : channels(gamma.numel()), padded(padded), gamma(padded_copy<Real>(gamma, padded)),
        beta(padded_copy<Real>(beta, padded)), bias(bias ? padded_copy<Real>(*bias, padded) : Memory<Real>(padded)),
        sign(padded), stats(torch::stable::new_empty(x, {4, channels}, dtype_of<Real>())) {
    for (int64_t c = 0; c < padded; ++c)
      sign[c] = this->gamma[c] > 0 ? Real(1) : this->gamma[c] < 0 ? Real(-1) : this->gamma[c];
  }
  void set(int64_t c, double centre, double mean, double variance, double eps) {
    Real* p = mutable_data<Real>(stats) + c;
    p[0] = Real(centre), p[channels] = Real(1 / std::sqrt(variance + eps));
    p[2 * channels] = Real(mean), p[3 * channels] = Real(variance);
  }
  void set_known(const Tensor& mean, const Tensor& variance, double eps) {
    const Tensor means = as_contiguous<double>(mean), variances = as_contiguous<double>(variance);
    for (int64_t c = 0; c < channels; ++c)
      set(c, data<double>(means)[c] - double(bias[c]), data<double>(means)[c], data<double>(variances)[c], eps);
  }
  Real centre(int64_t c) const { return data<Real>(stats)[c]; }
  Real scale(int64_t c) const { return gamma[c] * data<Real>(stats)[channels + c]; }
};

void check_shapes(const Tensor& x, const Tensor& weight, int64_t channels) {
  BYOLA_CHECK(x.dim() == 4 && x.size(0) > 0 && x.size(2) > 1 && x.size(3) > 1, "x: expected (B, C', F, T), F, T > 1");
  BYOLA_CHECK(weight.dim() == 4 && weight.size(0) == channels && weight.size(1) == x.size(1) && weight.size(2) == 3 &&
                  weight.size(3) == 3,
              "weight: expected shape (C, C', 3, 3)");
}

// One input channel.

// E[q_i q_j], i >= j, and the anchor, the mean: (56) float64.
template <typename V, typename Real>
void patch_moments(const Real* images, const Plane& plane, double* kept) {
  const int64_t size = plane.rows * plane.columns;
  std::vector<double> totals(plane.batch), sums(plane.batch * kMoments);
  torch::stable::parallel_for(0, plane.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      for (int64_t k = 0; k < size; ++k) totals[b] += double(images[b * size + k]);
  });
  double total = 0;
  for (const double value : totals) total += value;
  const double anchor = double(Real(total / double(plane.count())));
  torch::stable::parallel_for(0, plane.batch, 1, [&](int64_t begin, int64_t end) {
    std::vector<Real> lines(3 * line_size(plane));
    for (int64_t b = begin; b < end; ++b)
      add_moments<V>(images + b * size, plane, Real(anchor), lines.data(), sums.data() + b * kMoments);
  });
  std::fill(kept, kept + kMoments, 0.0);
  for (int64_t b = 0; b < plane.batch; ++b)
    for (int64_t k = 0; k < kMoments; ++k) kept[k] += sums[b * kMoments + k];
  for (int64_t k = 0; k < kMoments; ++k) kept[k] /= double(plane.count());
  kept[kMoments] = anchor;
}

// Means of patches and their covariances, from the moments; zeros for running statistics.
struct Patches {
  double mean[9], covariance[9][9];

  explicit Patches(const double* kept) {
    for (int i = 0; i < 9; ++i) mean[i] = kept[45 + i];
    for (int i = 0; i < 9; ++i)
      for (int j = 0; j <= i; ++j) covariance[i][j] = covariance[j][i] = kept[i * (i + 1) / 2 + j] - mean[i] * mean[j];
  }
  template <typename Real>
  double project(const Real* w, int row) const {  // (S w)[row]
    double value = 0;
    for (int j = 0; j < 9; ++j) value += covariance[row][j] * double(w[j]);
    return value;
  }
};

template <typename V, typename Real = typename V::Element>
void first_forward(const Tensor& x, const Tensor& weight, Norm<Real>& norm, bool by_batch, double eps, double* kept,
                   Real* out, uint8_t* places) {
  const Plane plane{x.size(0), x.size(2), x.size(3), norm.channels};
  const Tensor images = as_contiguous<Real>(x), weights = as_contiguous<Real>(weight);
  if (by_batch) {
    patch_moments<V>(data<Real>(images), plane, kept);
    const Patches patches(kept);
    for (int64_t c = 0; c < norm.channels; ++c) {
      const Real* w = data<Real>(weights) + 9 * c;
      double centre = 0, variance = 0, whole = 0;
      for (int k = 0; k < 9; ++k) {
        centre += double(w[k]) * patches.mean[k], whole += double(w[k]);
        variance += double(w[k]) * patches.project(w, k);
      }
      norm.set(c, centre, centre + kept[kMoments] * whole + double(norm.bias[c]), variance < 0 ? 0 : variance, eps);
    }
  }
  Memory<Real> scaled(9 * norm.padded), shift(norm.padded);
  for (int64_t c = 0; c < norm.channels; ++c) {
    for (int k = 0; k < 9; ++k) scaled[k * norm.padded + c] = norm.scale(c) * data<Real>(weights)[9 * c + k];
    shift[c] = norm.beta[c] - norm.scale(c) * norm.centre(c);
  }
  const int64_t pooled = plane.pooled_rows(), line = plane.pooled_columns() * plane.channels;
  torch::stable::parallel_for(0, plane.batch * pooled, 8, [&](int64_t begin, int64_t end) {
    std::vector<Real> lines(4 * line_size(plane));
    for (int64_t i = begin; i < end; ++i) {
      const Real* image = data<Real>(images) + i / pooled * plane.rows * plane.columns;
      copy_lines(image, plane, i % pooled * 2, 4, Real(kept[kMoments]), lines.data());
      first_forward_row<V>(lines.data(), plane, scaled.data(), shift.data(), norm.padded, out + i * line,
                           places ? places + i * line : nullptr);
    }
  });
}

// sum g and sum g q of all channels: (10, padded).
template <typename V, typename Real>
std::vector<double> first_sums(const Real* images, const Plane& plane, Real anchor, const Real* grad,
                               const uint8_t* places, int64_t padded) {
  const int64_t pooled = plane.pooled_rows(), line = plane.pooled_columns() * plane.channels;
  const Chunks chunks(plane.batch * pooled, kFirstChunks);
  std::vector<double> parts(chunks.count * kSums * padded), sums(kSums * padded);
  torch::stable::parallel_for(0, chunks.count, 1, [&](int64_t begin, int64_t end) {
    std::vector<Real> lines(4 * line_size(plane)), corners(32 * (plane.pooled_columns() + 1));
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      for (int64_t i = chunks.begin(chunk); i < chunks.end(chunk); ++i) {
        const Real* image = images + i / pooled * plane.rows * plane.columns;
        copy_lines(image, plane, i % pooled * 2, 4, anchor, lines.data());
        for (int64_t j = 0; j < plane.pooled_columns(); ++j)
          for (int64_t k = 0; k < 16; ++k) corners[32 * j + k] = lines[k / 4 * line_size(plane) + 2 * j + k % 4];
        first_backward_row<V>(corners.data(), plane, grad + i * line, places + i * line, padded,
                              parts.data() + chunk * kSums * padded);
      }
    }
  });
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk)
    for (int64_t k = 0; k < kSums * padded; ++k) sums[k] += parts[chunk * kSums * padded + k];
  return sums;
}

struct Backward {
  Tensor to_x, to_weight, to_bias, to_gamma, to_beta;  // channels innermost, compute type
};

template <typename V, typename Real = typename V::Element>
void first_backward(const Tensor& x, const Tensor& weight, const Norm<Real>& norm, const Tensor& grad,
                    const Tensor& which, const double* kept, bool frozen, bool needs_x, Backward& to) {
  const Plane plane{x.size(0), x.size(2), x.size(3), norm.channels};
  const Tensor images = as_contiguous<Real>(x), weights = as_contiguous<Real>(weight);
  const Real anchor = Real(kept[kMoments]);
  const std::vector<double> sums =
      first_sums<V>(data<Real>(images), plane, anchor, data<Real>(grad), data<uint8_t>(which), norm.padded);
  const Patches patches(kept);
  double matrix[81] = {}, constant[9] = {};  // of the dense part of the input's gradient
  for (int64_t c = 0; c < norm.channels; ++c) {
    const Real* w = data<Real>(weights) + 9 * c;
    const double total = sums[c], r = double(data<Real>(norm.stats)[norm.channels + c]), a = double(norm.gamma[c]) * r;
    const double centre = double(norm.centre(c));
    double of_gamma = -centre * total;
    for (int k = 0; k < 9; ++k) of_gamma += double(w[k]) * sums[(k + 1) * norm.padded + c];
    of_gamma *= r;
    for (int k = 0; k < 9; ++k) {
      double value = sums[(k + 1) * norm.padded + c];
      if (!frozen) value -= total * patches.mean[k] + of_gamma * r * patches.project(w, k);
      mutable_data<Real>(to.to_weight)[9 * c + k] = Real(a * value);
      if (frozen) continue;
      constant[k] += a / double(plane.count()) * (total - of_gamma * r * centre) * double(w[k]);
      for (int l = 0; l < 9; ++l)
        matrix[9 * k + l] += a / double(plane.count()) * of_gamma * r * double(w[k]) * double(w[l]);
    }
    mutable_data<Real>(to.to_bias)[c] = frozen ? Real(a * total) : Real(0);
    mutable_data<Real>(to.to_gamma)[c] = Real(of_gamma), mutable_data<Real>(to.to_beta)[c] = Real(total);
  }
  if (!needs_x) return;
  Memory<Real> turned(9 * norm.padded), scale(norm.padded);
  for (int64_t c = 0; c < norm.channels; ++c) {
    scale[c] = norm.scale(c);
    for (int k = 0; k < 9; ++k) turned[k * norm.padded + c] = data<Real>(weights)[9 * c + k];
  }
  const int64_t size = plane.rows * plane.columns, pooled = plane.pooled_rows() * plane.pooled_columns();
  torch::stable::parallel_for(0, plane.batch, 1, [&](int64_t begin, int64_t end) {
    std::vector<Real> lines(3 * line_size(plane));
    std::vector<double> bordered((plane.rows + 2) * (plane.columns + 2));
    for (int64_t b = begin; b < end; ++b) {
      first_to_image(data<Real>(images) + b * size, plane, anchor, data<Real>(grad) + b * pooled * plane.channels,
                     data<uint8_t>(which) + b * pooled * plane.channels, turned.data(), scale.data(), norm.padded,
                     matrix, constant, lines.data(), bordered.data());
      for (int64_t k = 0; k < size; ++k)
        mutable_data<Real>(to.to_x)[b * size + k] =
            Real(bordered[(k / plane.columns + 1) * (plane.columns + 2) + k % plane.columns + 1]);
    }
  });
}

// More input channels.

// Mean and sum of squares around it, of a group's values, for all channels; y[M * M][kTiles][padded].
template <typename V, int M, typename Real>
int64_t group_statistics(const Real* y, const Tiling& tiling, int64_t first, int64_t count, int64_t channels,
                         int64_t padded, Real* means, Real* squares) {
  bool has[M * M * kTiles];
  int64_t n = 0;
  for (int64_t t = 0; t < count; ++t) {
    const Tiling::Tile tile = tiling.tile(first + t);
    for (int k = 0; k < M * M; ++k) n += has[k * kTiles + t] = tiling.has(tile.row + k / M, tile.column + k % M);
  }
  for (int64_t c = 0; c < channels; c += V::width) {
    V sum = V::set(0), square = sum;
    for (int64_t k = 0; k < M * M * kTiles; k += kTiles)
      for (int64_t t = k; t < k + count; ++t)
        if (has[t]) sum = sum + V::load(y + t * padded + c);
    const V mean = sum * V::set(1 / Real(n));
    for (int64_t k = 0; k < M * M * kTiles; k += kTiles) {
      for (int64_t t = k; t < k + count; ++t) {
        if (!has[t]) continue;
        const V off = V::load(y + t * padded + c) - mean;
        square = fma(off, off, square);
      }
    }
    mean.store(means + c), square.store(squares + c);
  }
  return n;
}

// Normalise and clip the maximum of sign y.
template <typename V, typename Real>
struct Finish {
  Memory<Real> scale, centre, shift;

  explicit Finish(const Norm<Real>& norm) : scale(norm.padded), centre(norm.padded), shift(norm.padded) {
    for (int64_t c = 0; c < norm.channels; ++c) {
      scale[c] = norm.scale(c) * norm.sign[c], centre[c] = norm.centre(c) * norm.sign[c], shift[c] = norm.beta[c];
    }
  }
  void run(Largest<V>& best, int64_t c) const {
    best.value = fma(V::load(scale.data() + c), best.value - V::load(centre.data() + c), V::load(shift.data() + c));
    best.clip();
  }
};

// Copy a tile's positions inside the images; y[M * M][kTiles][padded] to images (B, F, T, C).
template <int M, typename Real>
void copy_tile(const Real* y, const Tiling& tiling, const Tiling::Tile& tile, int64_t t, int64_t padded,
               int64_t channels, Real* images) {
  for (int k = 0; k < M * M; ++k) {
    const int64_t row = tile.row + k / M, column = tile.column + k % M;
    const Real* from = y + (k * kTiles + t) * padded;
    if (tiling.has(row, column))
      std::copy(from, from + channels, images + tiling.position(tile.image, row, column) * channels);
  }
}

// y and places may be null.
template <typename V, int M, typename Real = typename V::Element>
void many_forward(const Tensor& x, const Tensor& weight, Norm<Real>& norm, bool by_batch, double eps, Real* y,
                  Real* out, uint8_t* places) {
  const Tensor images = channels_innermost<Real>(x), weights = as_contiguous<Real>(weight);
  const Tiling tiling(x.size(0), x.size(2), x.size(3), M);
  const Winograd<V, M> conv(data<Real>(weights), x.size(1), norm.channels, false);
  const int64_t groups = tiling.groups(), channels = norm.channels, padded = norm.padded;
  const int64_t rows = tiling.rows / 2, columns = tiling.columns / 2;
  Memory<Real> means(by_batch ? groups * padded : 0), squares(means.size());
  std::vector<int64_t> counts(groups);
  std::optional<Finish<V, Real>> finish;
  if (!by_batch) finish.emplace(norm);
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    Memory<Real> scratch(conv.scratch_size());
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * kTiles, count = tiling.group_size(first), line = conv.padded_outputs;
      const Real* tiles = conv.run(data<Real>(images), tiling, first, count, scratch.data());
      if (by_batch)
        counts[group] = group_statistics<V, M>(tiles, tiling, first, count, channels, line,
                                               means.data() + group * padded, squares.data() + group * padded);
      for (int64_t t = 0; t < count; ++t) {
        const Tiling::Tile tile = tiling.tile(first + t);
        if (y) copy_tile<M>(tiles, tiling, tile, t, line, channels, y);
        for (int k = 0; k < M * M / 4; ++k) {
          const int64_t row = k / (M / 2), column = k % (M / 2), i = tile.row / 2 + row, j = tile.column / 2 + column;
          if (i >= rows || j >= columns) continue;
          const Real* corner = tiles + ((2 * row * M + 2 * column) * kTiles + t) * line;
          const int64_t window = ((tile.image * rows + i) * columns + j) * channels, step = kTiles * line;
          for (int64_t c = 0; c < channels; c += V::width) {
            const V sign = V::load(norm.sign.data() + c);
            const auto value = [&](int64_t k) { return sign * V::load(corner + k * step + c); };
            Largest<V> best(value(0), value(1), value(M), value(M + 1));
            if (finish) finish->run(best, c);
            store_some(best.value, out + window + c, channels - c);
            if (places) store_places(best.place, places + window + c, channels - c);
          }
        }
      }
    }
  });
  if (!by_batch) return;
  std::vector<double> mean(padded), square(padded);
  double n = 0;
  for (int64_t group = 0; group < groups; ++group) {
    const double more = double(counts[group]), all = n + more;
    for (int64_t c = 0; c < padded; ++c) {
      const double off = double(means[group * padded + c]) - mean[c];
      mean[c] += off * more / all, square[c] += double(squares[group * padded + c]) + off * off * n * more / all;
    }
    n = all;
  }
  for (int64_t c = 0; c < channels; ++c) norm.set(c, mean[c], mean[c] + double(norm.bias[c]), square[c] / n, eps);
  finish.emplace(norm);
  torch::stable::parallel_for(0, x.size(0) * rows * columns, 64, [&](int64_t begin, int64_t end) {
    for (int64_t window = begin * channels; window < end * channels; window += channels) {
      for (int64_t c = 0; c < channels; c += V::width) {
        Largest<V> best(load_some<V>(out + window + c, channels - c),
                        places ? load_places<V>(places + window + c, channels - c) : V::set(0));
        finish->run(best, c);
        store_some(best.value, out + window + c, channels - c);
        if (places) store_places(best.place, places + window + c, channels - c);
      }
    }
  });
}

// A pooled gradient with what places it.
template <typename V, typename Real>
struct Pooled {
  const Real* grad;
  const uint8_t* places;
  V read(int64_t at, int64_t n, V& place) const {
    place = load_places<V>(places + at, n);
    return where_equal(place, V::set(kClipped), V::set(0), load_some<V>(grad + at, n));
  }
};

// sum g and sum g (y - centre): (2, padded).
template <typename V, typename Real>
std::vector<double> pooled_sums(const Pooled<V, Real>& pooled, const Real* y, const Tiling& tiling,
                                const Norm<Real>& norm) {
  const int64_t rows = tiling.rows / 2, columns = tiling.columns / 2, channels = norm.channels, padded = norm.padded;
  const Chunks chunks(tiling.batch * rows, kFirstChunks);
  std::vector<double> parts(chunks.count * 2 * padded), sums(2 * padded);
  torch::stable::parallel_for(0, chunks.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      double* part = parts.data() + chunk * 2 * padded;
      for (int64_t i = chunks.begin(chunk); i < chunks.end(chunk); ++i) {
        const Real* upper = y + tiling.position(i / rows, i % rows * 2, 0) * channels;
        const Real* lower = upper + tiling.columns * channels;
        for (int64_t c = 0; c < channels; c += V::width) {
          const int64_t n = channels - c;
          const V centre = load_some<V>(data<Real>(norm.stats) + c, n);
          V total = V::set(0), product = total;
          for (int64_t j = 0; j < columns; ++j) {
            V place;
            const V g = pooled.read((i * columns + j) * channels + c, n, place);
            const int64_t at = 2 * j * channels + c;
            V value = load_some<V>(upper + at, n);
            value = where_equal(place, V::set(1), load_some<V>(upper + at + channels, n), value);
            value = where_equal(place, V::set(2), load_some<V>(lower + at, n), value);
            value = where_equal(place, V::set(3), load_some<V>(lower + at + channels, n), value);
            total = total + g, product = fma(g, value - centre, product);
          }
          total.add_to(part + c), product.add_to(part + padded + c);
        }
      }
    }
  });
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk)
    for (int64_t k = 0; k < 2 * padded; ++k) sums[k] += parts[chunk * 2 * padded + k];
  return sums;
}

// The gradient of the convolution's output: scale g at the maxima + slope (y - centre) + constant.
template <typename V, typename Real>
void unpool(const Pooled<V, Real>& pooled, const Real* y, const Tiling& tiling, const Norm<Real>& norm,
            const Memory<Real>& slope, const Memory<Real>& constant, Real* to) {
  const int64_t rows = tiling.rows / 2, columns = tiling.columns / 2, channels = norm.channels;
  Memory<Real> scale(norm.padded);
  for (int64_t c = 0; c < channels; ++c) scale[c] = norm.scale(c);
  const int64_t lines = (tiling.rows + 1) / 2;  // of windows, those at odd ends included
  torch::stable::parallel_for(0, tiling.batch * lines, 2, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const int64_t image = line / lines, i = line % lines;
      for (int64_t j = 0; 2 * j < tiling.columns; ++j) {
        const bool whole = i < rows && j < columns;
        for (int64_t c = 0; c < channels; c += V::width) {
          const int64_t n = channels - c;
          V place = V::set(kClipped), g = V::set(0);
          if (whole)
            g = pooled.read(((image * rows + i) * columns + j) * channels + c, n, place) * V::load(scale.data() + c);
          const V centre = load_some<V>(data<Real>(norm.stats) + c, n);
          const V by = V::load(slope.data() + c), plus = V::load(constant.data() + c);
          for (int k = 0; k < 4; ++k) {
            const int64_t row = 2 * i + k / 2, column = 2 * j + k % 2;
            if (!tiling.has(row, column)) continue;
            const int64_t at = tiling.position(image, row, column) * channels + c;
            const V dense = fma(by, load_some<V>(y + at, n) - centre, plus);
            store_some(dense + where_equal(place, V::set(k), g, V::set(0)), to + at, n);
          }
        }
      }
    }
  });
}

template <typename V, int M, typename Real = typename V::Element>
void many_backward(const Tensor& x, const Tensor& weight, const Norm<Real>& norm, const Tensor& grad,
                   const Tensor& which, const Tensor& kept, bool frozen, bool needs_x, Backward& to) {
  const Tensor images = channels_innermost<Real>(x), weights = as_contiguous<Real>(weight);
  const Tensor y = channels_innermost<Real>(kept);
  const Tiling tiling(x.size(0), x.size(2), x.size(3), M);
  const int64_t inputs = x.size(1), channels = norm.channels;
  const Pooled<V, Real> pooled{data<Real>(grad), data<uint8_t>(which)};
  const std::vector<double> sums = pooled_sums(pooled, data<Real>(y), tiling, norm);
  Memory<Real> slope(norm.padded), constant(norm.padded);
  for (int64_t c = 0; c < channels; ++c) {
    const double r = double(data<Real>(norm.stats)[channels + c]), a = double(norm.gamma[c]) * r;
    const double of_gamma = r * sums[norm.padded + c], n = double(tiling.batch * tiling.rows * tiling.columns);
    if (!frozen) slope[c] = Real(-a * of_gamma * r / n), constant[c] = Real(-a * sums[c] / n);
    mutable_data<Real>(to.to_bias)[c] = frozen ? Real(a * sums[c]) : Real(0);
    mutable_data<Real>(to.to_gamma)[c] = Real(of_gamma), mutable_data<Real>(to.to_beta)[c] = Real(sums[c]);
  }
  const Tensor to_y = torch::stable::new_empty(y, y.sizes());
  unpool(pooled, data<Real>(y), tiling, norm, slope, constant, mutable_data<Real>(to_y));
  const Real* gradients = data<Real>(to_y);

  if (needs_x) {
    const Winograd<V, M> conv(data<Real>(weights), channels, inputs, true);
    torch::stable::parallel_for(0, tiling.groups(), 1, [&](int64_t begin, int64_t end) {
      Memory<Real> scratch(conv.scratch_size());
      for (int64_t group = begin; group < end; ++group) {
        const int64_t first = group * kTiles, count = tiling.group_size(first);
        const Real* tiles = conv.run(gradients, tiling, first, count, scratch.data());
        for (int64_t t = 0; t < count; ++t)
          copy_tile<M>(tiles, tiling, tiling.tile(first + t), t, conv.padded_outputs, inputs,
                       mutable_data<Real>(to.to_x));
      }
    });
  }

  const WeightSums<V, M> products(inputs, channels);
  const int64_t groups = tiling.groups(), most = (int64_t{1} << 22) / products.size();
  const Chunks chunks(groups, std::clamp<int64_t>(most, 1, 16));
  Memory<Real> parts(chunks.count * products.size());
  torch::stable::parallel_for(0, chunks.count, 1, [&](int64_t begin, int64_t end) {
    Memory<Real> scratch(products.scratch_size());
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      for (int64_t group = chunks.begin(chunk); group < chunks.end(chunk); ++group) {
        const int64_t first = group * kTiles, count = tiling.group_size(first);
        products.add(data<Real>(images), gradients, tiling, first, count, scratch.data(),
                     parts.data() + chunk * products.size());
      }
    }
  });
  torch::stable::parallel_for(0, inputs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      products.finish(parts.data(), chunks.count, i, mutable_data<Real>(to.to_weight));
  });
}

template <typename F>
void with_lanes(ScalarType dtype, F f) {
  return dtype == ScalarType::Double ? f(Doubles{}) : f(Floats{});
}

int64_t padded_channels(int64_t channels) { return round_up(channels, 64); }  // a multiple of every panel

}  // namespace

// x (B, C', F, T), weight (C, C', 3, 3), others (C,) -> out and which (B, C, F / 2, T / 2), kept, stats (4, C)
std::tuple<Tensor, Tensor, Tensor, Tensor> conv_block_cpu(const Tensor& x, const Tensor& weight, const Optional& bias,
                                                          const Tensor& gamma, const Tensor& beta, const Optional& mean,
                                                          const Optional& variance, double eps, ScalarType dtype,
                                                          bool keep) {
  const int64_t channels = gamma.numel(), batch = x.size(0), rows = x.size(2), columns = x.size(3);
  check_shapes(x, weight, channels);
  BYOLA_CHECK(beta.numel() == channels && (!bias || bias->numel() == channels), "bias, beta: expected shape (C,)");
  const bool by_batch = !mean || !variance, first = x.size(1) == 1;
  BYOLA_CHECK(by_batch || (mean->numel() == channels && variance->numel() == channels), "mean: expected shape (C,)");
  const Sizes shape = {batch, rows / 2, columns / 2, channels}, none = {0};
  const Tensor which = torch::stable::new_empty(x, keep ? shape : none, ScalarType::Byte);
  Tensor out, kept, stats;
  with_lanes(x.scalar_type(), [&](auto lanes) {
    using V = decltype(lanes);
    using Real = typename V::Element;
    Norm<Real> norm(x, bias, gamma, beta, padded_channels(channels));
    if (!by_batch) norm.set_known(*mean, *variance, eps);
    stats = norm.stats;
    const Tensor pooled = torch::stable::new_empty(x, shape, dtype_of<Real>());
    uint8_t* places = keep ? mutable_data<uint8_t>(which) : nullptr;
    if (first) {
      double moments[kMoments + 1] = {};
      first_forward<V>(x, weight, norm, by_batch, eps, moments, mutable_data<Real>(pooled), places);
      kept = torch::stable::new_empty(x, keep ? Sizes{kMoments + 1} : none, ScalarType::Double);
      if (keep) std::copy(moments, moments + kMoments + 1, mutable_data<double>(kept));
    } else {
      const Tensor y =
          torch::stable::new_empty(x, keep ? Sizes{batch, rows, columns, channels} : none, dtype_of<Real>());
      with_edge(batch, rows, columns, [&](auto edge) {
        many_forward<V, edge>(x, weight, norm, by_batch, eps, keep ? mutable_data<Real>(y) : nullptr,
                              mutable_data<Real>(pooled), places);
      });
      kept = keep ? channels_second(y, dtype) : torch::stable::new_empty(x, none, dtype);
    }
    out = channels_second(pooled, dtype);
  });
  return {out, keep ? channels_second(which, ScalarType::Byte) : which, kept, stats};
}

// grad and which (B, C, F / 2, T / 2) -> gradients of x, weight, bias, gamma and beta
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_block_backward_cpu(const Tensor& grad, const Tensor& x,
                                                                           const Tensor& weight, const Tensor& gamma,
                                                                           const Tensor& which, const Tensor& kept,
                                                                           const Tensor& stats, bool frozen,
                                                                           bool needs_x) {
  const int64_t channels = gamma.numel();
  check_shapes(x, weight, channels);
  BYOLA_CHECK(which.dim() == 4 && grad.dim() == 4, "conv_block: expected keep for a backward pass");
  for (int64_t k = 0; k < 4; ++k) BYOLA_CHECK(grad.size(k) == which.size(k), "grad: expected the shape of which");
  const Tensor places =
      torch::stable::contiguous(torch::stable::transpose(torch::stable::transpose(which, 1, 2), 2, 3));
  Backward to;
  Tensor to_weight = torch::stable::empty_like(weight);
  with_lanes(x.scalar_type(), [&](auto lanes) {
    using V = decltype(lanes);
    using Real = typename V::Element;
    constexpr ScalarType compute = dtype_of<Real>();
    Norm<Real> norm(x, std::nullopt, gamma, gamma, padded_channels(channels));
    norm.stats = as_contiguous<Real>(stats);
    const Sizes shape = needs_x ? Sizes{x.size(0), x.size(2), x.size(3), x.size(1)} : Sizes{0, 1, 1, 1};
    to.to_x = torch::stable::new_empty(x, shape, compute);
    to.to_weight = torch::stable::new_empty(x, {channels, x.size(1), 3, 3}, compute);
    for (Tensor* values : {&to.to_bias, &to.to_gamma, &to.to_beta})
      *values = torch::stable::new_empty(x, {channels}, compute);
    const Tensor grads = channels_innermost<Real>(grad);
    if (x.size(1) == 1) {
      BYOLA_CHECK(kept.numel() == kMoments + 1, "kept: expected 56 moments");
      const Tensor moments = as_contiguous<double>(kept);
      first_backward<V>(x, weight, norm, grads, places, data<double>(moments), frozen, needs_x, to);
    } else {
      BYOLA_CHECK(kept.dim() == 4, "kept: expected the convolution's output");
      with_edge(x.size(0), x.size(2), x.size(3),
                [&](auto edge) { many_backward<V, edge>(x, weight, norm, grads, places, kept, frozen, needs_x, to); });
    }
    torch::stable::copy_(to_weight, to.to_weight);
    for (Tensor* values : {&to.to_bias, &to.to_gamma, &to.to_beta})
      if (gamma.scalar_type() != compute) *values = torch::stable::to(*values, gamma.scalar_type());
  });
  return {channels_second(to.to_x, x.scalar_type()), to_weight, to.to_bias, to.to_gamma, to.to_beta};
}

BYOLA_OPS(conv_block, m) {
  m.impl("conv_block", TORCH_BOX(&conv_block_cpu));
  m.impl("conv_block_backward", TORCH_BOX(&conv_block_backward_cpu));
}

}  // namespace byola::BYOLA_SIMD
