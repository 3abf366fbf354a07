// SPDX-License-Identifier: Apache-2.0
// The most that one thread of this processor reaches, for the benchmark: chains of independent
// fused multiply-adds on registers, and a triad whose stores go past the caches. Called through
// ctypes, which lets several threads run at once.
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#define SPARSE_UNIFIED_LEVEL(level) __attribute__((target("arch=" level), noinline))
#else
#define SPARSE_UNIFIED_LEVEL(level) __attribute__((noinline))
#endif

namespace {

// More chains than the latency of a multiply-add times those begun in a cycle, and few enough for
// the 16 registers of AVX2.
constexpr int kChains = 12;

// NOTE: a macro, because a function takes its instruction set from no template argument.
#define SPARSE_UNIFIED_PEAK(name, level, bytes)                          \
  SPARSE_UNIFIED_LEVEL(level) double name(int64_t steps, float* sink) {  \
    using Vector = float __attribute__((vector_size(bytes)));            \
    const Vector scale = Vector{} + sink[0], shift = Vector{} + sink[1]; \
    Vector chains[kChains];                                              \
    for (int c = 0; c < kChains; ++c) chains[c] = shift * float(c);      \
    for (int64_t step = 0; step < steps; ++step) {                       \
      for (int c = 0; c < kChains; ++c) {                                \
        chains[c] = chains[c] * scale + shift;                           \
      }                                                                  \
    }                                                                    \
    for (int c = 1; c < kChains; ++c) chains[0] += chains[c];            \
    sink[2] = chains[0][0];                                              \
    return 2.0 * kChains * (bytes / 4) * double(steps);                  \
  }

SPARSE_UNIFIED_PEAK(peak_baseline, "x86-64", 16)
#if defined(__x86_64__)
SPARSE_UNIFIED_PEAK(peak_v3, "x86-64-v3", 32)
SPARSE_UNIFIED_PEAK(peak_v4, "x86-64-v4", 64)

__attribute__((target("avx512f,avx512bf16"), noinline)) double peak_bf16(int64_t steps,
                                                                         float* sink) {
  const __m512bh scale = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  __m512 chains[kChains];
  for (int c = 0; c < kChains; ++c) chains[c] = _mm512_set1_ps(sink[1] * float(c));
  for (int64_t step = 0; step < steps; ++step) {
    for (int c = 0; c < kChains; ++c) chains[c] = _mm512_dpbf16_ps(chains[c], scale, scale);
  }
  for (int c = 1; c < kChains; ++c) chains[0] += chains[c];
  sink[2] = _mm512_cvtss_f32(chains[0]);
  return 2.0 * kChains * 32 * double(steps);
}
#endif

}  // namespace

extern "C" {

// Runs the multiply-adds of level 0 (baseline), 1 (AVX2), 2 (AVX-512) or 3 (AVX-512 on bf16, fp32
// sums) and returns their floating-point operations; 0 where the processor lacks the level.
__attribute__((visibility("default"))) double sparse_unified_peak(int level, int64_t steps) {
  volatile float one = 1.0f, tiny = 1e-9f;  // so that nothing is known before it runs
  float sink[3] = {one, tiny, 0.0f};
  if (level == 0) return peak_baseline(steps, sink);
#if defined(__x86_64__)
  if (level == 1 && __builtin_cpu_supports("x86-64-v3")) return peak_v3(steps, sink);
  if (level == 2 && __builtin_cpu_supports("x86-64-v4")) return peak_v4(steps, sink);
  if (level == 3 && __builtin_cpu_supports("avx512bf16")) return peak_bf16(steps, sink);
#endif
  return 0.0;
}

// out[i] = x[i] + 3 y[i] for i in [0, n); n a multiple of 4, out aligned to 16 bytes.
__attribute__((visibility("default"))) void sparse_unified_triad(float* out, const float* x,
                                                                 const float* y, int64_t n) {
#if defined(__x86_64__)
  const __m128 three = _mm_set1_ps(3.0f);
  for (int64_t i = 0; i < n; i += 4) {
    _mm_stream_ps(out + i, _mm_loadu_ps(x + i) + three * _mm_loadu_ps(y + i));
  }
  _mm_sfence();
#else
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] + 3.0f * y[i];
#endif
}

}  // extern "C"
