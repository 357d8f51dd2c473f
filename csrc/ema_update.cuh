// target <- t + w (o - t) if w < 1/2, else o - (1 - w) (o - t), with w = 1 - decay; each operation rounded once, never
// fused. BYOL, arXiv:2006.07733, eq. (1). Reads target and online once, writes target once: 12 bytes an element in
// float32, bound by memory. One launch updates as many tensors as kernel arguments can hold: a table of addresses and
// sizes, divided into chunks of 4096 elements. Each block updates one chunk and finds its tensor by bisection.
// No torch or CUDA headers: any C++ compiler compiles this file, and tests run every block of a grid on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define BYOLA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define BYOLA_HOST_DEVICE inline
#endif

namespace byola::ema {

// Dtypes of target and online.
enum class Kind : uint8_t { kFloat, kFloatFromHalf, kFloatFromBFloat16, kDouble };

// Two stretches of memory.
struct Pair {
  void* target;
  const void* online;
  int64_t elements;
  Kind kind;
};

enum class Float : uint8_t { kFloat, kDouble, kHalf, kBFloat16 };

// A number, or its address on the device.
struct Decay {
  double value = 0;
  const void* on_device = nullptr;
  Float dtype = Float::kDouble;
};

constexpr int kThreads = 256;
constexpr int kUnroll = 4;
constexpr int kChunk = kThreads * kUnroll * 4;  // elements

// The tensors of one launch. `end[k]` is the number of chunks of the tensors up to k.
template <int kTensors>
struct Table {
  Decay decay;
  uint32_t chunks = 0;
  int32_t count = 0;
  void* target[kTensors];
  const void* online[kTensors];
  int64_t elements[kTensors];
  uint32_t end[kTensors];
  Kind kind[kTensors];
};

constexpr int kFew = 136, kMany = 1120;
constexpr int64_t kMaxChunks = 0x7fffffff;  // blocks along x
static_assert(sizeof(Table<kFew>) <= 4096, "kernel arguments of every architecture");
static_assert(sizeof(Table<kMany>) <= 32764, "kernel arguments from sm_70 on");

// Fill tables with the pairs, in order, and launch each; return the number of launches. `launch(table)` may throw.
template <int kTensors, typename Launch>
int64_t launch_tables(const Pair* pairs, size_t count, const Decay& decay, Launch launch) {
  int64_t launches = 0;
  Table<kTensors> table;
  table.decay = decay;
  const auto flush = [&] {
    if (!table.count) return;
    launch(table);
    ++launches;
    table.count = 0, table.chunks = 0;
  };
  for (size_t k = 0; k < count; ++k) {
    const Pair& pair = pairs[k];
    const int64_t chunks = (pair.elements + kChunk - 1) / kChunk;
    if (!chunks) continue;
    if (table.count == kTensors || table.chunks + chunks > kMaxChunks) flush();
    const int n = table.count++;
    table.target[n] = pair.target, table.online[n] = pair.online;
    table.elements[n] = pair.elements, table.kind[n] = pair.kind;
    table.end[n] = table.chunks += static_cast<uint32_t>(chunks);
  }
  flush();
  return launches;
}

// Raw bits of half precision.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

BYOLA_HOST_DEVICE float bits_to_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

BYOLA_HOST_DEVICE float widen(float x) { return x; }
BYOLA_HOST_DEVICE double widen(double x) { return x; }
BYOLA_HOST_DEVICE float widen(BFloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
BYOLA_HOST_DEVICE float widen(Half x) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude << 13));  // inf and NaN
  return bits_to_float(sign | (magnitude << 13)) * 0x1p112f;  // shifts the exponent's bias; exact for denormals too
#endif
}

#ifdef __CUDA_ARCH__
BYOLA_HOST_DEVICE float add(float x, float y) { return __fadd_rn(x, y); }
BYOLA_HOST_DEVICE float subtract(float x, float y) { return __fsub_rn(x, y); }
BYOLA_HOST_DEVICE float multiply(float x, float y) { return __fmul_rn(x, y); }
BYOLA_HOST_DEVICE double add(double x, double y) { return __dadd_rn(x, y); }
BYOLA_HOST_DEVICE double subtract(double x, double y) { return __dsub_rn(x, y); }
BYOLA_HOST_DEVICE double multiply(double x, double y) { return __dmul_rn(x, y); }
#else  // compile with -ffp-contract=off
template <typename T>
T add(T x, T y) {
  return x + y;
}
template <typename T>
T subtract(T x, T y) {
  return x - y;
}
template <typename T>
T multiply(T x, T y) {
  return x * y;
}
#endif

BYOLA_HOST_DEVICE double read_decay(const Decay& decay) {
  if (!decay.on_device) return decay.value;
  switch (decay.dtype) {
    case Float::kFloat: return *static_cast<const float*>(decay.on_device);
    case Float::kHalf: return widen(*static_cast<const Half*>(decay.on_device));
    case Float::kBFloat16: return widen(*static_cast<const BFloat16*>(decay.on_device));
    default: return *static_cast<const double*>(decay.on_device);
  }
}

// Both branches of the formula as base + factor (o - t), with the same roundings: x - y is x + (-y).
template <typename T>
struct Weights {
  bool near;
  T factor;

  BYOLA_HOST_DEVICE explicit Weights(double decay) {
    const T weight = static_cast<T>(1.0 - decay);
    near = weight < T(0.5);
    factor = near ? weight : -subtract(T(1), weight);
  }
  BYOLA_HOST_DEVICE T operator()(T t, T o) const { return add(near ? t : o, multiply(factor, subtract(o, t))); }
};

// Four elements, read and written as one or two words of 16 bytes (of 8 for half precision).
template <typename T>
struct alignas(sizeof(T) == 2 ? 8 : 16) Four {
  T lane[4];
};

template <typename T>
BYOLA_HOST_DEVICE bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % alignof(Four<T>) == 0;
}

// One thread's part of a chunk of `count` elements, at most kChunk.
template <typename T, typename O>
BYOLA_HOST_DEVICE void move(T* __restrict__ target, const O* __restrict__ online, int count, double decay, int thread) {
  const Weights<T> weights(decay);
  int done = 0;
  if (is_aligned(target) && is_aligned(online)) {
    Four<T>* fours = reinterpret_cast<Four<T>*>(target);
    const Four<O>* far = reinterpret_cast<const Four<O>*>(online);
    const int all = count / 4;
    constexpr int kAtOnce = sizeof(T) == 8 ? kUnroll / 2 : kUnroll;
    Four<T> t[kAtOnce];
    Four<O> o[kAtOnce];
    for (int first = thread; first < all; first += kAtOnce * kThreads) {
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {  // issue every load before waiting for the first
        const int k = first + u * kThreads;
        if (k < all) t[u] = fours[k], o[u] = far[k];
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int k = first + u * kThreads;
        if (k >= all) break;
#pragma unroll
        for (int lane = 0; lane < 4; ++lane) t[u].lane[lane] = weights(t[u].lane[lane], widen(o[u].lane[lane]));
        fours[k] = t[u];
      }
    }
    done = 4 * all;
  }
#pragma unroll 4
  for (int k = done + thread; k < count; k += kThreads) target[k] = weights(target[k], widen(online[k]));
}

// The work of one thread of one block.
template <int kTensors>
BYOLA_HOST_DEVICE void run(const Table<kTensors>& table, uint32_t block, int thread) {
  int k = 0;
  for (int above = table.count - 1; k < above;) {  // the first tensor that ends after this block
    const int middle = (k + above) / 2;
    if (block < table.end[middle])
      above = middle;
    else
      k = middle + 1;
  }
  const int64_t from = int64_t(block - (k ? table.end[k - 1] : 0)) * kChunk;
  const int64_t left = table.elements[k] - from;
  const int count = left < kChunk ? int(left) : kChunk;
  const double decay = read_decay(table.decay);
  const auto pieces = [&](auto of_target, auto of_online) {
    using T = decltype(of_target);
    using O = decltype(of_online);
    move(static_cast<T*>(table.target[k]) + from, static_cast<const O*>(table.online[k]) + from, count, decay, thread);
  };
  switch (table.kind[k]) {
    case Kind::kFloat: return pieces(float{}, float{});
    case Kind::kFloatFromHalf: return pieces(float{}, Half{});
    case Kind::kFloatFromBFloat16: return pieces(float{}, BFloat16{});
    case Kind::kDouble: return pieces(double{}, double{});
  }
}

}  // namespace byola::ema
