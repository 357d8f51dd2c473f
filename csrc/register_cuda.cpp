// ema_update_ for CUDA tensors, registered under the dispatcher's CUDA key. A separate library, not compiled for CPU
// users. The launches are in a file without torch, so any host compiler compiles this one.
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "ema_lists.h"
#include "ema_update_cuda.h"

namespace byola {

namespace {

// A decay on the CPU becomes a kernel argument; the kernel reads a decay on the device, without a sync.
ema::Decay decay_of(const at::Tensor& decay, const at::Device& device) {
  if (decay.is_cpu()) return {decay_value(decay)};
  TORCH_CHECK_VALUE(decay.device() == device, "decay: expected on the CPU or the device of target[0] (", device,
                    "), got ", decay.device());
  TORCH_CHECK_VALUE(decay.numel() == 1, "decay: expected a 0-d tensor, got shape ", shape_text(decay.sizes()));
  switch (decay.scalar_type()) {
    case at::kFloat: return {0, decay.const_data_ptr(), ema::Float::kFloat};
    case at::kDouble: return {0, decay.const_data_ptr(), ema::Float::kDouble};
    case at::kHalf: return {0, decay.const_data_ptr(), ema::Float::kHalf};
    case at::kBFloat16: return {0, decay.const_data_ptr(), ema::Float::kBFloat16};
    default: TORCH_CHECK_TYPE(false, "decay: expected a floating-point tensor, got ", name_of(decay.scalar_type()));
  }
}

// On the current stream of the targets' device, without a sync; may be captured in a CUDA graph.
void ema_update__cuda(at::TensorList target, at::TensorList online, const at::Tensor& decay) {
  if (target.empty() && online.empty()) return;
  const at::Device device = target.empty() ? online[0].device() : target[0].device();
  const c10::DeviceGuard guard(device);  // before the lists, which copy tensors with gaps on the current device
  const ema::Decay weight = decay_of(decay, device);
  EmaLists lists(target, online);
  TORCH_CHECK_VALUE(device.is_cuda(), "target[0]: expected on a CUDA device, got ", device);
  C10_CUDA_CHECK(ema::launch_ema_update(lists.pairs.data(), lists.pairs.size(), weight,
                                        c10::cuda::getCurrentCUDAStream(device.index())));
  lists.finish();
}

}  // namespace

}  // namespace byola

TORCH_LIBRARY_IMPL(byola_fast, CUDA, m) { m.impl("ema_update_", &byola::ema_update__cuda); }
