// The launches of ema_update.cuh. Without torch headers nvcc compiles it in seconds for any architectures.
#include "ema_update_cuda.h"

#include "ema_update.cuh"

namespace byola::ema {

namespace {

template <int kTensors>
__global__ void __launch_bounds__(kThreads) ema_update_kernel(const __grid_constant__ Table<kTensors> table) {
  run(table, blockIdx.x, int(threadIdx.x));
}

template <int kTensors>
cudaError_t launch(const Pair* pairs, size_t count, const Decay& decay, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  launch_tables<kTensors>(pairs, count, decay, [&](const Table<kTensors>& table) {
    if (error != cudaSuccess) return;
    ema_update_kernel<kTensors><<<table.chunks, kThreads, 0, stream>>>(table);
    error = cudaGetLastError();
  });
  return error;
}

}  // namespace

cudaError_t launch_ema_update(const Pair* pairs, size_t count, const Decay& decay, cudaStream_t stream) {
  return count <= kFew ? launch<kFew>(pairs, count, decay, stream) : launch<kMany>(pairs, count, decay, stream);
}

}  // namespace byola::ema
