// Pre-normalise a batch and append its finite samples to the ring of past inputs. Reads x twice, the second time from
// the cache, and writes it once.
#include "tensors.h"

namespace byola::BYOLA_SIMD {

namespace {

// Call use(values, place in the row, lanes) for every vector of a pre-normalised sample.
template <typename V, typename S, typename F>
void each_vector(const Spectrograms& x, int64_t b, const PreNorm& norm, F use) {
  using Real = typename V::Element;
  const V shift = V::set(Real(norm.mean)), scale = V::set(Real(norm.scale));
  const int64_t frames = x.frames, step = x.frame_stride;
  for (int64_t f = 0; f < x.mels; ++f) {
    const S* source = x.row<S>(b, f);
    for (int64_t t = 0; t < frames; t += V::width)
      use((load_strided<V>(source + t * step, step, frames - t) - shift) * scale, f * frames + t, frames - t);
  }
}

// Whether all values of a pre-normalised sample are finite in the ring's dtype. A pass of its own: rows that are written
// and never read cost half as much as a copy.
template <typename S, typename R>
bool is_finite(const Spectrograms& x, int64_t b, const PreNorm& norm) {
  using V = Vector<S>;
  using Real = Compute<S>;
  const V none = V::set(0);
  V faults = none;  // inf and NaN times 0 are NaN, all other values add 0
  each_vector<V, S>(x, b, norm, [&](V value, int64_t, int64_t n) BYOLA_IN_PLACE {
    if constexpr (std::is_same_v<R, Real>) {
      faults = fma(n < V::width ? value.first_lanes(n) : value, none, faults);
    } else {
      R kept[V::width];
      store_lanes(value, kept, n);
      faults = fma(load_lanes<V>(kept, n), none, faults);
    }
  });
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
      int64_t written = 0;
      for (int64_t b = 0; b < batch; ++b) {
        if (!is_finite<S, R>(source, b, norm)) continue;
        R* row = mutable_data<R>(rows) + (next + written++) % n_memory * elements;
        each_vector<Vector<S>, S>(source, b, norm, [row](Vector<S> value, int64_t k, int64_t n) BYOLA_IN_PLACE {
          store_lanes(value, row + k, n);
        });
      }
      state[0] = (next + written) % n_memory;
      state[1] = std::min(state[1] + written, n_memory);
      state[2] += batch - written;
    });
  });
}

BYOLA_OPS(bank_push, m) { m.impl("bank_push_", TORCH_BOX(&bank_push__cpu)); }

}  // namespace byola::BYOLA_SIMD
