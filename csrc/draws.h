// The parameters of two views, as ops return them.
#pragma once

#include <tuple>

#include "tensors.h"

namespace byola::BYOLA_SIMD {

using Draws = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // lam, bank_index, crop, fader

Draws draw_wide_params_cpu(const Tensor& rng, const std::optional<Tensor>& bank_count, int64_t batch,
                           int64_t sample_offset, const Sizes& mels, const Sizes& frames, const Sizes& canvas,
                           double mixup_ratio, double fader_gain);

}  // namespace byola::BYOLA_SIMD
