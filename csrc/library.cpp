// Registers the CPU kernels under the dispatcher's CPU key; the schemas are declared in byola_fast/ops/_schemas.py.
// ema_update_cpu.cpp, whose lists need another interface, registers itself.
#include "library.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_IMPL(byola_fast, CPU, m) {
  m.impl("log_mixup_exp", TORCH_BOX(&byola::log_mixup_exp_cpu));
  m.impl("log_mixup_exp_backward", TORCH_BOX(&byola::log_mixup_exp_backward_cpu));
  m.impl("resize_crop", TORCH_BOX(&byola::resize_crop_cpu));
  m.impl("resize_crop_backward", TORCH_BOX(&byola::resize_crop_backward_cpu));
  m.impl("draw_params", TORCH_BOX(&byola::draw_params_cpu));
  m.impl("augment_views_out", TORCH_BOX(&byola::augment_views_out_cpu));
  m.impl("log_mel", TORCH_BOX(&byola::log_mel_cpu));
  m.impl("sample_sums", TORCH_BOX(&byola::sample_sums_cpu));
  m.impl("normalize", TORCH_BOX(&byola::normalize_cpu));
  m.impl("normalize_", TORCH_BOX(&byola::normalize__cpu));
  m.impl("bank_push_", TORCH_BOX(&byola::bank_push__cpu));
}
