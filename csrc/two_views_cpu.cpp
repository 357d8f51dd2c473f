// A whole call of augment or Augment without gradients: statistics, draws, both views, post-norm, and the memory's push.
// For one sample the calls of these ops from Python would take ten times as long as their work. The settings come as one
// tensor that Python keeps, because each argument of an op costs up to a microsecond.
#include "draws.h"
#include "kernels.h"
#include "tensors.h"

namespace byola::BYOLA_SIMD {

Tensor sample_sums_cpu(const Tensor& x);
Tensor batch_stats_cpu(const Tensor& sums, ScalarType dtype);
Tensor running_stats__cpu(Tensor mean, Tensor variance, Tensor count, Tensor updates, const Tensor& sums,
                          int64_t max_updates);
void normalize__cpu(Tensor x, const Tensor& sums);
void bank_push__cpu(Tensor rows, Tensor cursor, const Tensor& x, const std::optional<Tensor>& stats);

namespace {

// The settings as _two_views.py packs them; a double keeps its bits.
struct Settings {
  enum Flag { kPostNorm = 1, kAdvance = 2, kBatchStats = 4 };
  int64_t flags, rank, bicubic, mixup;
  int64_t mels[2], frames[2], canvas[2], max_updates;
  double mixup_ratio, fader_gain;
};
constexpr int64_t kWords = 13;
static_assert(sizeof(Settings) == kWords * sizeof(int64_t));

constexpr const char* kMixers[] = {"log", "linear", "gaussian", "none"};

Tensor copy_of(const int64_t* values, int64_t count) {
  Tensor copy = new_on_cpu({count}, ScalarType::Long);
  std::copy(values, values + count, mutable_data<int64_t>(copy));
  return copy;
}

}  // namespace

// x (B, F, T), settings (13,), rng (1,) seed or (2,) seed and step, stats (2,), rows (N, F, T), cursor (3,), running
// statistics mean, variance, count, updates () -> out (2, B, *size)
void two_views__cpu(const Tensor& x, const Tensor& settings, Tensor rng, const std::optional<Tensor>& stats,
                    const std::optional<Tensor>& rows, const std::optional<Tensor>& cursor,
                    const std::optional<Tensor>& mean, const std::optional<Tensor>& variance,
                    const std::optional<Tensor>& count, const std::optional<Tensor>& updates, Tensor out) {
  BYOLA_CHECK(settings.numel() == kWords && settings.scalar_type() == ScalarType::Long && settings.is_contiguous(),
              "settings: expected ", kWords, " int64");
  BYOLA_CHECK(rng.scalar_type() == ScalarType::Long && rng.is_contiguous() && (rng.numel() == 1 || rng.numel() == 2),
              "rng: expected seed, or seed and step, int64");
  BYOLA_CHECK(x.dim() == 3 && x.scalar_type() != ScalarType::Double, "x: expected (B, F, T), not float64");
  const Settings& set = *static_cast<const Settings*>(settings.data_ptr());
  const int64_t batch = x.size(0);
  const bool advance = set.flags & Settings::kAdvance;
  BYOLA_CHECK(set.mixup >= 0 && set.mixup < 4, "mixup: got ", set.mixup);
  BYOLA_CHECK(!rows || (rows->size(0) <= 1 << 24 && cursor && cursor->numel() == 3 && cursor->is_contiguous() &&
                        cursor->scalar_type() == ScalarType::Long),
              "rows, cursor: expected at most 2^24 rows, and three int64");
  BYOLA_CHECK(batch <= 1 << 24, "x: expected at most 2^24 samples");
  BYOLA_CHECK(!advance || rng.numel() == 2, "rng: expected a step to count");

  std::optional<Tensor> of_pre_norm = stats;
  if (mean)
    of_pre_norm = running_stats__cpu(*mean, *variance, *count, *updates, sample_sums_cpu(x), set.max_updates);
  else if (set.flags & Settings::kBatchStats)
    of_pre_norm = batch_stats_cpu(sample_sums_cpu(x), ScalarType::Float);

  // The state as it is before the call, in tensors of their own: the push changes it.
  const int64_t* words = data<int64_t>(rng);
  const int64_t seed_and_step[] = {words[0], rng.numel() == 2 ? words[1] : 0};
  const Tensor drawn_from = copy_of(seed_and_step, 2);
  std::optional<Tensor> held;
  if (rows) held = copy_of(data<int64_t>(*cursor) + 1, 1);
  BYOLA_CHECK(!held || (data<int64_t>(*held)[0] >= 0 && data<int64_t>(*held)[0] <= 1 << 24),
              "cursor: expected a count");
  const Sizes canvas{set.canvas[0], set.canvas[1]};
  const int64_t offset = int64_t(uint64_t(set.rank) * uint64_t(batch));
  const auto [lam, index, crop, fader] =
      draw_wide_params_cpu(drawn_from, held, batch, offset, {set.mels[0], set.mels[1]}, {set.frames[0], set.frames[1]},
                           canvas, set.mixup_ratio, set.fader_gain);
  const Tensor sums =
      chosen().augment_views(x, std::nullopt, rows, held, of_pre_norm, lam, index, crop, fader, drawn_from, offset, 0,
                             canvas, set.bicubic ? "bicubic" : "bilinear", kMixers[set.mixup], out);
  if (set.flags & Settings::kPostNorm) normalize__cpu(out, sums);
  if (!advance) return;
  if (rows) bank_push__cpu(*rows, *cursor, x, of_pre_norm);
  ++mutable_data<int64_t>(rng)[1];
}

BYOLA_OPS(two_views, m) { m.impl("_two_views_", TORCH_BOX(&two_views__cpu)); }

}  // namespace byola::BYOLA_SIMD
