// What the kernels were built with, for doctor(). No torch header in here; pybind11 only.
#include <pybind11/pybind11.h>

#include <string>

#include "simd.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "CPU kernels of byola_fast; importing registers them with torch's dispatcher";
  m.def("build_info", [] {
    pybind11::dict info;
    info["simd"] = std::string(byola::Floats::name);
    info["compiler"] = std::string(__VERSION__);
    return info;
  });
}
