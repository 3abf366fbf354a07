// SPDX-License-Identifier: Apache-2.0
// The main loop of a consumer warpgroup on Hopper: the products of one tile from the stages of the
// ring that a producer fills. The products of a stage are issued before those of the stage in front
// of it are waited for, so that the tensor cores never run dry; then that stage is handed back.
#pragma once

#include "device/pipeline_sm90a.h"
#include "device/warp.h"
#include "device/warpgroup.h"
#include "device/wgmma.h"

namespace sparse_unified {

constexpr int kStageK = 64;  // of both operands, a stage
constexpr int kStepK = 16;   // of wgmma
constexpr int kStageSteps = kStageK / kStepK;

// Descriptors of the operands in one stage.
struct StageOperands {
  uint64_t a;
  uint64_t b;
};

// d [64, N] = sum over num_stages stages of A B; from `at` on, which is left behind the last one.
// What d holds beyond N / 2 values is of no interest.
//   operands(stage, steps)  StageOperands of a stage of the ring with so many steps
//   steps(k)         steps of 16 k of the k-th stage that count; the last stages of a sum may have
//                    less than kStageSteps
//   meanwhile()      what is done while the products of the first stage run
// With kFences the operands were written by the generic proxy as well; with kIsNarrow B is MN-major
// in 64-byte swizzle. There is at least one stage.
template <typename T, int kN, Major kMajorA, Major kMajorB, bool kIsNarrow, bool kFences,
          int kStages, int kBlocks, int kCount, class Operands, class Steps, class Meanwhile>
SPARSE_UNIFIED_DEVICE void multiply_stages(float (&d)[kCount], int num_stages,
                                           const RingBarriers<kStages, kBlocks>& ring,
                                           RingPosition<kStages>& at, const Operands& operands,
                                           const Steps& steps, const Meanwhile& meanwhile) {
  constexpr uint64_t kStepA = kMajorA == Major::kK ? kDescriptorStepK : kDescriptorStepMN;
  constexpr uint64_t kStepB = kMajorB == Major::kK ? kDescriptorStepK
                              : kIsNarrow          ? kDescriptorStepNarrow
                                                   : kDescriptorStepMN;
  // The first num_steps steps of the stage `at`, one by one.
  const auto multiply_some = [&](int num_steps, bool is_accumulating) {
    const StageOperands stage = operands(at.stage, num_steps);
#pragma unroll 1
    for (int step = 0; step < num_steps; ++step) {
      wgmma_fence();
      wgmma<T, kN, kMajorA, kMajorB>(d, stage.a + step * kStepA, stage.b + step * kStepB,
                                     is_accumulating || step > 0);
      wgmma_commit();
    }
  };
  const auto wait = [&] {
    ring.wait_full(at);
    if constexpr (kFences) fence_async_proxy();
  };
  wait();
  multiply_some(min(steps(0), kStageSteps), false);
  meanwhile();
  int previous_stage = at.stage;
  at.advance();
  // NOTE: once, or the compiler peels the first two stages off and has three copies of the loop.
#pragma unroll 1
  for (int k = 1; k < num_stages; ++k, at.advance()) {
    wait();
    const int num_steps = steps(k);
    if (num_steps >= kStageSteps) {
      const StageOperands stage = operands(at.stage, kStageSteps);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kStageSteps; ++step) {
        wgmma<T, kN, kMajorA, kMajorB>(d, stage.a + step * kStepA, stage.b + step * kStepB, true);
      }
      wgmma_commit();
      wgmma_wait<1>();
    } else {
      multiply_some(num_steps, true);
      wgmma_wait<0>();
    }
    ring.release(previous_stage);
    previous_stage = at.stage;
  }
  wgmma_finish(d);
  ring.release(previous_stage);
}

}  // namespace sparse_unified
