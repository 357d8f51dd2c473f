// Crop given boxes and resize them, and the transpose. BYOL-A, arXiv:2103.06695.
// Reads the crop's part of x, writes y; intermediate results take a few rows of scratch.
#include "resize.h"
#include "tensors.h"

namespace byola::BYOLA_SIMD {

// x (B, F, T), crop (B, 4) -> (B, *size)
Tensor resize_crop_cpu(const Tensor& x, const Tensor& crop, const Sizes& size, const Sizes& canvas,
                       const std::string& interpolation) {
  const Spectrograms source(x, "x");
  const bool bicubic = is_bicubic(interpolation);
  const Tensor boxes = as_contiguous<int64_t>(crop);
  BYOLA_CHECK(boxes.numel() == 4 * source.count, "crop: expected shape (B, 4)");
  BYOLA_CHECK(fits(size, canvas, source.mels, source.frames), kFits);
  Tensor y = new_on_cpu({source.count, size[0], size[1]}, x.scalar_type());
  with_float_type(x.scalar_type(), "x", [&](auto kind) {
    using S = decltype(kind);
    using V = Vector<S>;
    torch::stable::parallel_for(0, source.count, grain(size[0] * size[1]), [&](int64_t begin, int64_t end) {
      CropResizer<V> resizer(source.mels, source.frames, size, canvas, bicubic);
      for (int64_t b = begin; b < end; ++b) {
        S* target = mutable_data<S>(y) + b * size[0] * size[1];
        const auto produce = [&](const int64_t* f, int64_t c0, int64_t c1, Compute<S>* const* rows) {
          for (int k = 0; k < 4; ++k) {
            const S* from = source.row<S>(b, f[k]);
            const int64_t step = source.frame_stride, ahead = 12 * source.mel_stride;  // three times four rows
            for (int64_t c = c0; c < c1; c += V::width) {
              load_strided<V>(from + c * step, step, c1 - c).store(rows[k] + c);
              __builtin_prefetch(from + c * step + ahead, 0, 2);
            }
          }
        };
        const auto emit = [&](int64_t o, int64_t count, int64_t t, auto sum) BYOLA_IN_PLACE {
          S* to = target + o * size[1] + t;
          const int64_t row_size = size[1], n = row_size - t;
          for (int64_t k = 0; k < count; ++k) {
            store_lanes(sum(k, V::set(0)), to + k * row_size, n);
            __builtin_prefetch(to + (k + count) * row_size, 1, 2);  // of the next rows
          }
        };
        resizer.run(data<int64_t>(boxes) + 4 * b, produce, emit);
      }
    });
  });
  return y;
}

// The transpose: grad (B, *size) -> (B, *input_size)
Tensor resize_crop_backward_cpu(const Tensor& grad, const Tensor& crop, const Sizes& input_size, const Sizes& canvas,
                                const std::string& interpolation) {
  const Spectrograms source(grad, "grad");
  const bool bicubic = is_bicubic(interpolation);
  const Tensor boxes = as_contiguous<int64_t>(crop);
  BYOLA_CHECK(boxes.numel() == 4 * source.count, "crop: expected shape (B, 4)");
  BYOLA_CHECK(fits({source.mels, source.frames}, canvas, input_size[0], input_size[1]), kFits);
  const int64_t mels = input_size[0], frames = input_size[1];
  Tensor to_x = torch::stable::new_empty(grad, {source.count, mels, frames});
  with_float_type(grad.scalar_type(), "grad", [&](auto kind) {
    using S = decltype(kind);
    using V = Vector<S>;
    using Real = Compute<S>;
    torch::stable::parallel_for(0, source.count, grain(source.mels * source.frames), [&](int64_t begin, int64_t end) {
      AxisTaps<V> mel_taps, frame_taps;
      std::vector<Real> columns, rows, line;
      for (int64_t b = begin; b < end; ++b) {
        const int64_t* box = data<int64_t>(boxes) + 4 * b;
        const Box mel_box = clamp_box(box[0], box[2], canvas[0]), frame_box = clamp_box(box[1], box[3], canvas[1]);
        mel_taps.prepare(source.mels, mel_box.extent, bicubic);
        frame_taps.prepare(source.frames, frame_box.extent, bicubic);
        // Scatter each output row's gradient along time to the crop's frames, then add it to the rows of its taps.
        rows.assign(mel_box.extent * frame_box.extent, Real(0));
        for (int64_t o = 0; o < source.mels; ++o) {
          line.assign(frame_box.extent, Real(0));
          const S* from = source.row<S>(b, o);
          for (int64_t t = 0; t < source.frames; ++t)
            for (int k = 0; k < frame_taps.taps; ++k)
              line[frame_taps.position(t, k)] += frame_taps.weight[k][t] * Real(from[t * source.frame_stride]);
          for (int k = 0; k < mel_taps.taps; ++k) {
            Real* row = &rows[mel_taps.position(o, k) * frame_box.extent];
            const Real weight = mel_taps.weight[k][o];
            for (int64_t c = 0; c < frame_box.extent; ++c) row[c] += weight * line[c];
          }
        }
        S* target = mutable_data<S>(to_x) + b * mels * frames;
        const int64_t top = mel_box.start - (canvas[0] - mels) / 2, left = frame_box.start - (canvas[1] - frames) / 2;
        for (int64_t f = 0; f < mels; ++f)
          for (int64_t t = 0; t < frames; ++t) {
            const int64_t k = f - top, c = t - left;
            const bool inside = k >= 0 && k < mel_box.extent && c >= 0 && c < frame_box.extent;
            target[f * frames + t] = static_cast<S>(inside ? rows[k * frame_box.extent + c] : Real(0));
          }
      }
    });
  });
  return to_x;
}

BYOLA_OPS(resize_crop, m) {
  m.impl("resize_crop", TORCH_BOX(&resize_crop_cpu));
  m.impl("resize_crop_backward", TORCH_BOX(&resize_crop_backward_cpu));
}

}  // namespace byola::BYOLA_SIMD
