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

// The tensors of a Python list: borrowed from a tuple, which no other thread can change. Made and ended under the lock.
class Borrowed {
 public:
  ~Borrowed() {
    for (at::Tensor& x : tensors) c10::MaybeOwnedTraits<at::Tensor>::destroyBorrow(x);
    Py_XDECREF(held_);
  }
  // False for anything but a list of tensors and parameters, whose subclasses may have calls of their own.
  bool fill(PyObject* list) {
    if (!PyList_CheckExact(list) || !(held_ = PyList_AsTuple(list))) return false;
    tensors.reserve(PyTuple_GET_SIZE(held_));
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(held_); ++k) {
      PyObject* item = PyTuple_GET_ITEM(held_, k);
      if (!THPVariable_CheckExact(item)) return false;
      tensors.push_back(c10::MaybeOwnedTraits<at::Tensor>::createBorrow(THPVariable_Unpack(item)));
    }
    return true;
  }
  std::vector<at::Tensor> tensors;

 private:
  PyObject* held_ = nullptr;
};

// Lets other threads of Python run: a full queue of launches makes a launch wait.
struct Unlocked {
  ~Unlocked() { PyEval_RestoreThread(state); }
  PyThreadState* state = PyEval_SaveThread();
};

// ema_update_(target, online, decay) without gradients: None, NotImplemented for other arguments, NULL for an error.
PyObject* ema_update(PyObject* /*module*/, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Borrowed targets, onlines;
  if (count != 3 || !THPVariable_CheckExact(given[2]) || !targets.fill(given[0]) || !onlines.fill(given[1]))
    Py_RETURN_NOTIMPLEMENTED;
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("byola_fast::ema_update_", "")
                             .typed<void(at::TensorList, at::TensorList, const at::Tensor&)>();
  const at::Tensor& number = THPVariable_Unpack(given[2]);
  {
    const Unlocked unlocked;
    const at::AutoDispatchBelowADInplaceOrView below;
    op.call(targets.tensors, onlines.tensors, number);
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyMethodDef method = {"ema_update_", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(ema_update)), METH_FASTCALL,
                      nullptr};

}  // namespace

// A function of Python, not one of ctypes: an error looks at the stack, and no foreign frame may be there.
extern "C" PyObject* byola_ema_function() { return PyCFunction_New(&method, nullptr); }
#endif
