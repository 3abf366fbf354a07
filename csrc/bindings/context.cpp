// SPDX-License-Identifier: Apache-2.0
#include "bindings/context.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#if defined(SPARSE_UNIFIED_EMULATION)
#include "emulation/device.h"
#elif defined(SPARSE_UNIFIED_WITH_CUDA)
#include <dlfcn.h>

#include <map>
#include <mutex>
#endif

namespace sparse_unified {
namespace {

constexpr int64_t kRowAlignment = 16;

#if defined(SPARSE_UNIFIED_EMULATION)

cudaStream_t current_stream(const char*, int32_t) { return nullptr; }

DeviceInfo describe_device(int32_t) { return emulation::device_info(); }

#elif defined(SPARSE_UNIFIED_WITH_CUDA)

// NOTE: found at run time, so that one library loads where torch has no CUDA too.
cudaStream_t current_stream(const char* op, int32_t device) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const auto get_stream = [] {
    constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
    void* symbol = dlsym(RTLD_DEFAULT, kName);
    if (symbol == nullptr) {
      if (void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY)) {
        symbol = dlsym(library, kName);
      }
    }
    return reinterpret_cast<GetStream>(symbol);
  }();
  if (get_stream == nullptr) {
    fail(op, "torch", "be built with CUDA", "a build whose library has no CUDA streams");
  }
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

int attribute(cudaDeviceAttr which, int32_t device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, which, device);
  if (error != cudaSuccess) {
    throw std::runtime_error("sparse_unified: attribute " + std::to_string(which) +
                             " of cuda:" + std::to_string(device) +
                             " could not be read: " + cudaGetErrorString(error));
  }
  return value;
}

DeviceInfo read_device(int32_t device) {
  DeviceInfo info{};
  info.compute_capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                            attribute(cudaDevAttrComputeCapabilityMinor, device);
  info.num_multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  info.shared_bytes_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  info.shared_bytes_processor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  return info;
}

// Read once a device; a failure is not remembered.
DeviceInfo describe_device(int32_t device) {
  static std::mutex mutex;
  static std::map<int32_t, DeviceInfo> known;
  const std::lock_guard lock(mutex);
  const auto found = known.find(device);
  return found != known.end() ? found->second : known[device] = read_device(device);
}

// NOTE: torch's guard makes no call where the device is current already, so a thread may come here
// without a context, which the encoding of tensor maps needs; from CUDA 12 on this binds it.
void bind_context(int32_t device) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) {
    throw std::runtime_error("sparse_unified: cuda:" + std::to_string(device) +
                             " could not be used: " + cudaGetErrorString(error));
  }
}

#endif

#if defined(SPARSE_UNIFIED_WITH_CUDA) || defined(SPARSE_UNIFIED_EMULATION)

// The device without the multiprocessors that the process leaves to others (NCCL, other streams): a
// persistent kernel with more blocks than free ones takes twice as long.
DeviceInfo usable_part(const char* op, DeviceInfo info) {
  constexpr const char* kVariable = "SPARSE_UNIFIED_NUM_SMS";
  if (const char* text = std::getenv(kVariable)) {
    const int limit = std::atoi(text);
    check(limit >= 1, op, kVariable, "be at least 1", text);
    info.num_multiprocessors = std::min(info.num_multiprocessors, limit);
  }
  return info;
}

#endif

}  // namespace

bool runs_on_cuda([[maybe_unused]] const Tensor& tensor) {
#if defined(SPARSE_UNIFIED_EMULATION)
  return true;
#else
  return kHasCuda && device_of(tensor).is_cuda();
#endif
}

Context::Context(const char* op, const Tensor& like)
    : op_(op), like_(like), is_cuda_(runs_on_cuda(like)) {
#if defined(SPARSE_UNIFIED_WITH_CUDA) || defined(SPARSE_UNIFIED_EMULATION)
  if (!is_cuda_) return;
  const int32_t device = like.get_device_index();
#if !defined(SPARSE_UNIFIED_EMULATION)
  guard_.emplace(device);
  bind_context(device);
#endif
  stream_ = current_stream(op, device);
  device_ = usable_part(op, describe_device(device));
#endif
}

void Context::check([[maybe_unused]] cudaError_t error) const {
#if defined(SPARSE_UNIFIED_WITH_CUDA) || defined(SPARSE_UNIFIED_EMULATION)
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(op_) +
                             ": the kernel could not be launched: " + cudaGetErrorString(error));
  }
#endif
}

Tensor Context::workspace(int64_t bytes) const {
  return empty_like_sized(like_, {bytes}, ScalarType::Byte);
}

Tensor own_indices(const Tensor& indices) {
  return runs_on_cuda(indices) ? as_contiguous(indices) : contiguous_copy(indices);
}

Tensor contiguous_vector_rows(const Tensor& tensor) {
  return with_vector_rows(as_contiguous(tensor));
}

Tensor with_vector_rows(const Tensor& tensor) {
  const Tensor dense = with_dense_rows(tensor);
  const Matrix matrix = matrix_of(dense);
  const int64_t row_bytes = matrix.stride * element_bytes(check_float("grouped_ffn", "x", dense));
  const bool is_aligned =
      reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % kRowAlignment == 0 &&
      (matrix.rows <= 1 || row_bytes % kRowAlignment == 0);
  if (is_aligned) return dense;
  return dense.is_contiguous() ? contiguous_copy(dense) : as_contiguous(dense);
}

}  // namespace sparse_unified
