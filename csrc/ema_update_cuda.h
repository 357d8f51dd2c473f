// The launch of the CUDA kernels of ema_update_, for code that includes torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace byola::ema {

struct Pair;
struct Decay;

// Update all pairs on the current device, in order on the stream, without waiting.
cudaError_t launch_ema_update(const Pair* pairs, size_t count, const Decay& decay, cudaStream_t stream);

}  // namespace byola::ema
