// SPDX-License-Identifier: Apache-2.0
// Registers the CUDA kernels for the schemas of bindings/library.cpp. In the emulator they take the
// place of the CPU kernels, so that tests reach them through the same ops.
#include "bindings/cuda/ops.h"

#if defined(SPARSE_UNIFIED_EMULATION)
#define SPARSE_UNIFIED_CUDA_KEY CPU
#else
#define SPARSE_UNIFIED_CUDA_KEY CUDA
#endif

STABLE_TORCH_LIBRARY_IMPL(sparse_unified, SPARSE_UNIFIED_CUDA_KEY, m) {
  m.impl("route_topk", TORCH_BOX(&sparse_unified::cuda::route_topk));
  m.impl("route_topk_backward", TORCH_BOX(&sparse_unified::cuda::route_topk_backward));
  m.impl("sort_by_expert", TORCH_BOX(&sparse_unified::cuda::sort_by_expert));
  m.impl("permute", TORCH_BOX(&sparse_unified::cuda::permute));
  m.impl("combine", TORCH_BOX(&sparse_unified::cuda::combine));
  m.impl("combine_backward", TORCH_BOX(&sparse_unified::cuda::combine_backward));
  m.impl("grouped_ffn", TORCH_BOX(&sparse_unified::cuda::grouped_ffn));
  m.impl("grouped_ffn_train", TORCH_BOX(&sparse_unified::cuda::grouped_ffn_train));
  m.impl("grouped_ffn_combine", TORCH_BOX(&sparse_unified::cuda::grouped_ffn_combine));
  m.impl("grouped_ffn_backward", TORCH_BOX(&sparse_unified::cuda::grouped_ffn_backward));
  m.impl("pruned_ffn", TORCH_BOX(&sparse_unified::cuda::pruned_ffn));
  m.impl("pruned_ffn_train", TORCH_BOX(&sparse_unified::cuda::pruned_ffn_train));
  m.impl("pruned_ffn_backward", TORCH_BOX(&sparse_unified::cuda::pruned_ffn_backward));
}
