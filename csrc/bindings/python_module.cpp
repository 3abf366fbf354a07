// SPDX-License-Identifier: Apache-2.0
// A module in the limited API: importing it loads the library, which registers the ops.
#include <Python.h>

#include <exception>

#include "bindings/build_info.h"

namespace {

PyObject* build_info(PyObject*, PyObject*) {
  try {
    const auto facts = sparse_unified::build_info();
    PyObject* result = PyDict_New();
    for (const auto& [name, text] : facts) {
      PyObject* value = result == nullptr ? nullptr : PyUnicode_FromString(text.c_str());
      const bool is_set = value != nullptr && PyDict_SetItemString(result, name, value) == 0;
      Py_XDECREF(value);
      if (!is_set) {
        Py_XDECREF(result);
        return nullptr;
      }
    }
    return result;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS, "What the library was built from, as {name: text}."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                          "_C",
                                          "Registers torch.ops.sparse_unified.",
                                          -1,
                                          methods,
                                          nullptr,
                                          nullptr,
                                          nullptr,
                                          nullptr};
  return PyModule_Create(&definition);
}
