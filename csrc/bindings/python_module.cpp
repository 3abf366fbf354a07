// SPDX-License-Identifier: Apache-2.0
// An empty module in the limited API: importing it loads the library, which registers the ops.
#include <Python.h>

extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                          "_C",
                                          "Registers torch.ops.sparse_unified.",
                                          -1,
                                          nullptr,
                                          nullptr,
                                          nullptr,
                                          nullptr,
                                          nullptr};
  return PyModule_Create(&definition);
}
