// Every op of the CPU backend, by its schema in byola_fast/ops/_schemas.py.
// Legend: B batch, F mels, T frames, N rows of the bank, P rows of the pool; views first.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace byola {

using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

// x, z (B, ...), lam (B,) -> (B, ...)
Tensor log_mixup_exp_cpu(const Tensor& x, const Tensor& z, const Tensor& lam);
std::tuple<Tensor, Tensor> log_mixup_exp_backward_cpu(
    const Tensor& grad, const Tensor& x, const Tensor& z, const Tensor& lam);

// x (B, F, T), crop (B, 4) -> (B, *size); its transpose: grad (B, *size) -> (B, *input_size)
Tensor resize_crop_cpu(
    const Tensor& x, const Tensor& crop, const Sizes& size, const Sizes& canvas, const std::string& interpolation);
Tensor resize_crop_backward_cpu(
    const Tensor& grad, const Tensor& crop, const Sizes& input_size, const Sizes& canvas,
    const std::string& interpolation);

// rng (2,), bank_count () -> lam (2, B), bank_index (2, B), crop (2, B, 4), fader (2, B, 2)
std::tuple<Tensor, Tensor, Tensor, Tensor> draw_params_cpu(
    const Tensor& rng, const std::optional<Tensor>& bank_count, int64_t batch, int64_t pool, int64_t pool_offset,
    int64_t sample_offset, const Sizes& mels, const Sizes& frames, const Sizes& canvas, double mixup_ratio,
    double fader_gain);

// x (B, F, T), pool (P, F, T), bank (N, F, T), stats (2,) -> out (2, B, *size), sums (2, B, 3)
Tensor augment_views_out_cpu(
    const Tensor& x, const std::optional<Tensor>& pool, const std::optional<Tensor>& bank,
    const std::optional<Tensor>& bank_count, const std::optional<Tensor>& stats, const Tensor& lam,
    const Tensor& bank_index, const Tensor& crop, const Tensor& fader, const Tensor& rng, int64_t sample_offset,
    const Sizes& canvas, const std::string& interpolation, const std::string& mixup, Tensor out);

// wav (B, samples) float or int16, window (n,), filter_bank (F, n_fft / 2 + 1), bands (F, 2), stats (2,) -> (B, F, T)
Tensor log_mel_cpu(
    const Tensor& wav, const Tensor& window, const Tensor& filter_bank, const Tensor& bands,
    const std::optional<Tensor>& stats, int64_t n_fft, int64_t hop_length, bool center);

// x (B, ...) -> (B, 3)
Tensor sample_sums_cpu(const Tensor& x);

// x (...), sums (..., 3)
Tensor normalize_cpu(const Tensor& x, const Tensor& sums);
void normalize__cpu(Tensor x, const Tensor& sums);

// rows (N, F, T), cursor (3,), x (B, F, T), stats (2,)
void bank_push__cpu(Tensor rows, Tensor cursor, const Tensor& x, const std::optional<Tensor>& stats);

}  // namespace byola
