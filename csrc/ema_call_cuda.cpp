// The call of ema_update_ from Python without PyTorch's binding of custom ops, which for each tensor of a list takes
// the interpreter's lock twice: a third of the time of a list of a thousand. Tensors are borrowed from the caller's
// lists, so none is counted; the dispatcher chooses the kernel, as for any call. Without Python's headers it is left out.
#if __has_include(<Python.h>)
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <vector>

namespace {

// The tensors of a Python list, valid as long as the list is not changed.
class Borrowed {
 public:
  ~Borrowed() {
    for (at::Tensor& x : tensors) c10::MaybeOwnedTraits<at::Tensor>::destroyBorrow(x);
  }
  // False for anything but a list of tensors and parameters, whose subclasses may have calls of their own.
  bool fill(PyObject* list) {
    if (!PyList_CheckExact(list)) return false;
    tensors.reserve(PyList_GET_SIZE(list));
    for (Py_ssize_t k = 0; k < PyList_GET_SIZE(list); ++k) {
      PyObject* item = PyList_GET_ITEM(list, k);
      if (!THPVariable_CheckExact(item)) return false;
      tensors.push_back(c10::MaybeOwnedTraits<at::Tensor>::createBorrow(THPVariable_Unpack(item)));
    }
    return true;
  }
  std::vector<at::Tensor> tensors;
};

}  // namespace

// ema_update_(target, online, decay) without gradients: None, NotImplemented for other arguments, NULL for an error.
extern "C" PyObject* byola_ema_update(PyObject* target, PyObject* online, PyObject* decay) {
  HANDLE_TH_ERRORS
  Borrowed targets, onlines;
  if (!THPVariable_CheckExact(decay) || !targets.fill(target) || !onlines.fill(online)) Py_RETURN_NOTIMPLEMENTED;
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("byola_fast::ema_update_", "")
                             .typed<void(at::TensorList, at::TensorList, const at::Tensor&)>();
  const at::AutoDispatchBelowADInplaceOrView below;
  op.call(targets.tensors, onlines.tensors, THPVariable_Unpack(decay));
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}
#endif
