// Discrete Fourier transforms of many signals at once: each lane of a vector is a signal, so no butterfly shuffles.
// Mixed radix, decimation in frequency, in place; results are in digit-reversed order (`position`).
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "storage.h"

// A butterfly that is not inlined passes its 16 vectors through memory.
#define BYOLA_BUTTERFLY inline __attribute__((always_inline))

namespace byola::BYOLA_SIMD {

template <typename V>
struct Complex {
  V re, im;
  friend Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
  friend Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
  Complex by(V cos, V sin) const { return {fnma(im, sin, re * cos), fma(im, cos, re * sin)}; }
  static Complex load(const typename V::Element* p) { return {V::load(p), V::load(p + V::width)}; }
  void store(typename V::Element* p) const { re.store(p), im.store(p + V::width); }
};

// a[q] <- sum over j of a[j] exp(-2 pi i j q / R), for odd R. Works on pairs a[j], a[R - j]; `roots` holds the cosine
// and sine of -2 pi j / R.
template <typename V, int R>
BYOLA_BUTTERFLY void dft(Complex<V> (&a)[R], const typename V::Element* roots) {
  static_assert(R % 2 == 1);
  constexpr int pairs = R / 2;
  Complex<V> sum[pairs], difference[pairs], first = a[0];
  for (int j = 0; j < pairs; ++j) {
    sum[j] = a[j + 1] + a[R - 1 - j], difference[j] = a[j + 1] - a[R - 1 - j];
    a[0] = a[0] + sum[j];
  }
  for (int q = 1; q <= pairs; ++q) {
    Complex<V> even = first, odd = {V::set(0), V::set(0)};
    for (int j = 1; j <= pairs; ++j) {
      const V cos = V::set(roots[2 * (j * q % R)]), sin = V::set(roots[2 * (j * q % R) + 1]);
      even = {fma(sum[j - 1].re, cos, even.re), fma(sum[j - 1].im, cos, even.im)};
      odd = {fma(difference[j - 1].re, sin, odd.re), fma(difference[j - 1].im, sin, odd.im)};
    }
    a[q] = {even.re - odd.im, even.im + odd.re}, a[R - q] = {even.re + odd.im, even.im - odd.re};
  }
}
template <typename V>
BYOLA_BUTTERFLY void dft(Complex<V> (&a)[2], const typename V::Element*) {
  const Complex<V> sum = a[0] + a[1];
  a[1] = a[0] - a[1], a[0] = sum;
}
template <typename V>
BYOLA_BUTTERFLY void dft(Complex<V> (&a)[4], const typename V::Element* = nullptr) {
  const Complex<V> even = a[0] + a[2], from_even = a[0] - a[2], odd = a[1] + a[3], d = a[1] - a[3];
  a[0] = even + odd, a[2] = even - odd;
  a[1] = {from_even.re + d.im, from_even.im - d.re}, a[3] = {from_even.re - d.im, from_even.im + d.re};
}
template <typename V>
BYOLA_BUTTERFLY void dft(Complex<V> (&a)[8], const typename V::Element*) {
  const V half = V::set(typename V::Element(0.70710678118654752440));
  Complex<V> e[4] = {a[0], a[2], a[4], a[6]}, o[4] = {a[1], a[3], a[5], a[7]};
  dft(e), dft(o);
  o[1] = {(o[1].re + o[1].im) * half, (o[1].im - o[1].re) * half};
  const Complex<V> turned = {(o[3].im - o[3].re) * half, (o[3].re + o[3].im) * half};  // conjugated; undone below
  a[0] = e[0] + o[0], a[4] = e[0] - o[0];
  a[1] = e[1] + o[1], a[5] = e[1] - o[1];
  a[2] = {e[2].re + o[2].im, e[2].im - o[2].re}, a[6] = {e[2].re - o[2].im, e[2].im + o[2].re};
  a[3] = {e[3].re + turned.re, e[3].im - turned.im}, a[7] = {e[3].re - turned.re, e[3].im + turned.im};
}

// The plan for one transform length. A pass splits a block of `length` into `radix` blocks and applies twiddle factors.
template <typename V>
struct Fft {
  using Real = typename V::Element;
  struct Pass {
    int64_t radix, length;
    std::vector<Real> twiddles;  // for k = 1 .. length / radix - 1 and q = 1 .. radix - 1: cos, sin
    std::vector<Real> roots;     // odd radix only: cos, sin for 0 .. radix - 1
  };
  int64_t length;
  std::vector<Pass> passes;
  std::vector<int64_t> position;  // index of each frequency's result

  explicit Fft(int64_t n) : length(n), position(n, 0) {
    for (int64_t rest = n; rest > 1 || passes.empty();) {
      const int64_t radix = next_radix(rest), blocks = rest / radix;
      Pass pass{radix, rest, {}, {}};
      for (int64_t k = 1; k < blocks; ++k)
        for (int64_t q = 1; q < radix; ++q) push_root(pass.twiddles, k * q, rest);
      if (radix % 2 == 1)
        for (int64_t j = 0; j < radix; ++j) push_root(pass.roots, j, radix);
      passes.push_back(std::move(pass));
      rest = blocks;
    }
    for (int64_t k = 0; k < n; ++k) {
      int64_t rest = k;
      for (const Pass& pass : passes) {
        position[k] += rest % pass.radix * (pass.length / pass.radix);
        rest /= pass.radix;
      }
    }
  }

  // Transform `length` complex vectors: `load(m)` returns element m, `out` receives the result, `spare` has room for
  // the largest radix. The first pass reads through `load`; then each of its blocks is finished while in cache.
  template <typename Load>
  void run(Load load, Real* out, Real* spare) const {
    const Pass& first = passes[0];
    pass(first, out, spare, load);
    if (passes.size() == 1) return;
    for (int64_t q = 0; q < first.radix; ++q) finish(1, out + 2 * V::width * q * (length / first.radix), spare);
  }

 private:
  // Radix-8 butterflies need more than 16 vectors; without AVX-512 there are only 16 registers.
  static constexpr int64_t kLargest = V::width >= 16 ? 8 : 4;

  static int64_t next_radix(int64_t n) {
    for (int64_t radix = kLargest; radix > 1; radix /= 2)
      if (n % radix == 0) return radix;
    for (int64_t radix = 3; radix * radix <= n; radix += 2)
      if (n % radix == 0) return radix;
    return n;
  }

  static void push_root(std::vector<Real>& roots, int64_t k, int64_t n) {
    const double angle = -2 * 3.14159265358979323846 * double(k % n) / double(n);
    roots.push_back(Real(std::cos(angle)));
    roots.push_back(Real(std::sin(angle)));
  }

  void finish(size_t number, Real* block, Real* spare) const {
    const Pass& here = passes[number];
    pass(here, block, spare, [&](int64_t m) { return Complex<V>::load(block + 2 * V::width * m); });
    if (number + 1 == passes.size()) return;
    const int64_t step = here.length / here.radix;
    for (int64_t q = 0; q < here.radix; ++q) finish(number + 1, block + 2 * V::width * q * step, spare);
  }

  template <typename Load>
  static void pass(const Pass& pass, Real* out, Real* spare, Load load) {
    switch (pass.radix) {
      case 2: return butterflies<2>(pass, out, load);
      case 3: return butterflies<3>(pass, out, load);
      case 4: return butterflies<4>(pass, out, load);
      case 5: return butterflies<5>(pass, out, load);
      case 8:
        if constexpr (kLargest == 8) return butterflies<8>(pass, out, load);
      default: return any_radix(pass, out, spare, load);
    }
  }

  template <int Radix, typename Load>
  static void butterflies(const Pass& pass, Real* out, Load load) {
    const int64_t step = pass.length / Radix;
    const Real* twiddle = pass.twiddles.data();
    Complex<V> a[Radix];
    for (int j = 0; j < Radix; ++j) a[j] = load(j * step);
    dft(a, pass.roots.data());
    for (int q = 0; q < Radix; ++q) a[q].store(out + 2 * V::width * q * step);
    for (int64_t k = 1; k < step; ++k, twiddle += 2 * (Radix - 1)) {
      for (int j = 0; j < Radix; ++j) a[j] = load(k + j * step);
      dft(a, pass.roots.data());
      a[0].store(out + 2 * V::width * k);
      for (int q = 1; q < Radix; ++q)
        a[q].by(V::set(twiddle[2 * q - 2]), V::set(twiddle[2 * q - 1])).store(out + 2 * V::width * (k + q * step));
    }
  }

  template <typename Load>
  static void any_radix(const Pass& pass, Real* out, Real* spare, Load load) {
    const int64_t radix = pass.radix, step = pass.length / radix;
    for (int64_t k = 0; k < step; ++k) {
      for (int64_t j = 0; j < radix; ++j) load(k + j * step).store(spare + 2 * V::width * j);
      for (int64_t q = 0; q < radix; ++q) {
        Complex<V> sum = Complex<V>::load(spare);
        for (int64_t j = 1, root = q; j < radix; ++j, root = (root + q) % radix)
          sum = sum + Complex<V>::load(spare + 2 * V::width * j)
                          .by(V::set(pass.roots[2 * root]), V::set(pass.roots[2 * root + 1]));
        if (k > 0 && q > 0) {
          const Real* twiddle = pass.twiddles.data() + 2 * ((k - 1) * (radix - 1) + q - 1);
          sum = sum.by(V::set(twiddle[0]), V::set(twiddle[1]));
        }
        sum.store(out + 2 * V::width * (k + q * step));
      }
    }
  }
};

}  // namespace byola::BYOLA_SIMD
