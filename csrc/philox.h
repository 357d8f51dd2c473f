// Philox4x32-10 (Salmon et al., SC 2011): key = seed, counter = (step, sample, view, slot). See ops/philox.py.
#pragma once

#include <array>
#include <cstdint>

namespace byola::BYOLA_SIMD {

enum Slot : uint32_t { kCrop = 0, kRatio = 1, kPartner = 2, kFader = 3, kNoise = 1u << 16 };

inline std::array<uint32_t, 4> philox(std::array<uint32_t, 4> c, uint64_t seed) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c[0], b = uint64_t(0xCD9E8D57u) * c[2];
    c = {uint32_t(b >> 32) ^ c[1] ^ k0, uint32_t(b), uint32_t(a >> 32) ^ c[3] ^ k1, uint32_t(a)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

}  // namespace byola::BYOLA_SIMD
