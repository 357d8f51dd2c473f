// The Python module of the CPU kernels: build_info() for doctor(), exp and log for tests. No torch header.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "simd.h"

namespace {

// Apply f to float32 values in place, so that tests can cover every binade.
template <typename F>
void apply(const pybind11::buffer& values, F f) {
  const pybind11::buffer_info info = values.request(true);
  if (info.itemsize != 4 || info.ndim != 1 || info.strides[0] != 4)
    throw std::invalid_argument("expected (N,) float32");
  float* p = static_cast<float*>(info.ptr);
  using V = byola::Floats;
  for (int64_t k = 0; k < info.size; k += V::width) f(V::load(p + k, info.size - k)).store(p + k, info.size - k);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "CPU kernels of byola_fast; importing registers them with torch's dispatcher";
  m.def("build_info", [] {
    pybind11::dict info;
    info["simd"] = std::string(byola::Floats::name);
    info["compiler"] = std::string(__VERSION__);
    return info;
  });
  m.def("exp_", [](const pybind11::buffer& x) { apply(x, [](byola::Floats v) -> byola::Floats { return exp(v); }); });
  m.def("log_positive_",
        [](const pybind11::buffer& x) { apply(x, [](byola::Floats v) -> byola::Floats { return log_positive(v); }); });
}
