// SPDX-License-Identifier: Apache-2.0
// Encodes tensor maps through the driver, which is found at run time: the library loads where
// there is none. (The emulator has its own.)
#include "device/tensor_copy.h"

#if !defined(SPARSE_UNIFIED_EMULATION)

namespace sparse_unified {
namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

constexpr unsigned kFirstVersion = 12000;  // of CUDA with tensor maps

Encode find_encode() {
  void* symbol = nullptr;
  cudaDriverEntryPointQueryResult found{};
  const cudaError_t error = cudaGetDriverEntryPointByVersion(
      "cuTensorMapEncodeTiled", &symbol, kFirstVersion, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<Encode>(symbol);
}

}  // namespace

cudaError_t make_tensor_map(TensorMap* map, DType dtype, const void* base, int64_t num_rows,
                            int64_t num_columns, int64_t row_stride, int box_rows, int box_columns,
                            bool is_swizzled) {
  static const Encode encode = find_encode();
  if (encode == nullptr) return cudaErrorNotSupported;
  const CUtensorMapDataType type = dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                             : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(num_columns),
                               static_cast<cuuint64_t>(num_rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(row_stride) * 2};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns),
                             static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUtensorMapSwizzle swizzle = !is_swizzled        ? CU_TENSOR_MAP_SWIZZLE_NONE
                                     : box_columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B
                                                         : CU_TENSOR_MAP_SWIZZLE_64B;
  const CUresult result =
      encode(&map->map, type, 2, const_cast<void*>(base), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  // Also what an earlier kernel of this process did: the numbers of both enumerations agree.
  static_assert(int{CUDA_ERROR_INVALID_VALUE} == int{cudaErrorInvalidValue});
  static_assert(int{CUDA_ERROR_INVALID_CONTEXT} == int{cudaErrorDeviceUninitialized});
  static_assert(int{CUDA_ERROR_ILLEGAL_ADDRESS} == int{cudaErrorIllegalAddress});
  static_assert(int{CUDA_ERROR_LAUNCH_FAILED} == int{cudaErrorLaunchFailure});
  return static_cast<cudaError_t>(result);
}

}  // namespace sparse_unified

#endif
