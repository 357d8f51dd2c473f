// Pre-normalise a batch and append its finite samples to the ring of past inputs. Reads x once, writes it once.
#include "tensors.h"

namespace byola::BYOLA_SIMD {

namespace {

// Write one pre-normalised sample to a row; return whether all its values are finite in the ring's dtype.
template <typename S, typename R>
bool write_row(const Spectrograms& x, int64_t b, const PreNorm& norm, R* row) {
  using V = Vector<S>;
  using Real = Compute<S>;
  const V shift = V::set(Real(norm.mean)), scale = V::set(Real(norm.scale)), none = V::set(0);
  V faults = none;  // inf and NaN times 0 are NaN, all other values add 0
  for (int64_t f = 0; f < x.mels; ++f, row += x.frames) {
    const S* source = x.row<S>(b, f);
    for (int64_t t = 0; t < x.frames; t += V::width) {
      const int64_t n = x.frames - t;
      const V value = load_strided<V>(source + t * x.frame_stride, x.frame_stride, n);
      store_lanes((value - shift) * scale, row + t, n);
      faults = faults + load_lanes<V>(row + t, n) * none;
    }
  }
  Real lanes[V::width];
  faults.store(lanes);
  Real sum = 0;
  for (Real lane : lanes) sum += lane;
  return sum == 0;
}

}  // namespace

// rows (N, F, T), cursor (3,), x (B, F, T), stats (2,)
void bank_push__cpu(Tensor rows, Tensor cursor, const Tensor& x, const std::optional<Tensor>& stats) {
  const Spectrograms source(x, "x");
  BYOLA_CHECK(rows.dim() == 3 && rows.is_contiguous(), "rows: expected a contiguous (N, F, T) tensor");
  BYOLA_CHECK(rows.size(1) == source.mels && rows.size(2) == source.frames, "x: expected the rows' (F, T)");
  BYOLA_CHECK(cursor.scalar_type() == ScalarType::Long && cursor.numel() == 3 && cursor.is_contiguous(),
              "cursor: expected three int64, contiguous");
  const PreNorm norm = pre_norm(stats);
  const int64_t n_memory = rows.size(0), batch = source.count, elements = source.mels * source.frames;
  int64_t* state = mutable_data<int64_t>(cursor);
  const int64_t next = (state[0] % n_memory + n_memory) % n_memory;  // a damaged checkpoint may hold any value
  with_float_type(x.scalar_type(), "x", [&](auto source_kind) {
    with_float_type(rows.scalar_type(), "rows", [&](auto row_kind) {
      using S = decltype(source_kind);
      using R = decltype(row_kind);
      // Staged first, so that a sample with inf or NaN never reaches the ring.
      std::vector<R> staged(elements);
      int64_t written = 0;
      for (int64_t b = 0; b < batch; ++b) {
        if (!write_row<S>(source, b, norm, staged.data())) continue;
        R* target = mutable_data<R>(rows) + (next + written) % n_memory * elements;
        std::memcpy(static_cast<void*>(target), staged.data(), elements * sizeof(R));
        ++written;
      }
      state[0] = (next + written) % n_memory;
      state[1] = std::min(state[1] + written, n_memory);
      state[2] += batch - written;
    });
  });
}

BYOLA_OPS(bank_push, m) { m.impl("bank_push_", TORCH_BOX(&bank_push__cpu)); }

}  // namespace byola::BYOLA_SIMD
