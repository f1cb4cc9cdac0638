// The arithmetic of one element, for CUDA and for the host: products are fused where fmaf says so and nowhere else, so
// both compute the same bits (but for log and expm1 of the bias correction, whose last bits may differ).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "multi_tensor.h"

#ifdef __CUDACC__
#define MFENGINE_INLINE __host__ __device__ __forceinline__
#else
#define MFENGINE_INLINE inline
#endif

namespace mfengine {

// What all elements of a tensor share in one step.
struct Step {
  float grad_scale, one_minus_beta1, beta2, one_minus_beta2;
  float shrink;          // 1 - lr * weight_decay
  float size;            // lr / (1 - beta1^step)
  float inverse_root;    // 1 / sqrt(1 - beta2^step)
  float eps;
};

MFENGINE_INLINE Step make_step(const mfengine_adamw_config& config, float step, float grad_scale) {
  // 1 - beta^step without cancellation.
  const double correction1 = -expm1(step * log(config.beta1)), correction2 = -expm1(step * log(config.beta2));
  return {grad_scale,
          static_cast<float>(1 - config.beta1),
          static_cast<float>(config.beta2),
          static_cast<float>(1 - config.beta2),
          static_cast<float>(1 - config.lr * config.weight_decay),
          static_cast<float>(config.lr / correction1),
          static_cast<float>(1 / sqrt(correction2)),
          static_cast<float>(config.eps)};
}

// AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2).
MFENGINE_INLINE void adamw(float& param, float grad, float& exp_avg, float& exp_avg_sq, const Step& step) {
  grad *= step.grad_scale;
  exp_avg = fmaf(step.one_minus_beta1, grad - exp_avg, exp_avg);
  exp_avg_sq = fmaf(step.one_minus_beta2, grad * grad, step.beta2 * exp_avg_sq);
  const float root = fmaf(sqrtf(exp_avg_sq), step.inverse_root, step.eps);
  param = fmaf(-step.size, exp_avg / root, step.shrink * param);
}

MFENGINE_INLINE float average(float old, float param, float one_minus_decay) {
  return fmaf(one_minus_decay, param - old, old);
}

// ----------------------------------------------------------------------------
// bfloat16, as its bits.

MFENGINE_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

MFENGINE_INLINE float to_float(float x) { return x; }

MFENGINE_INLINE float to_float(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

MFENGINE_INLINE uint16_t round_to_nearest(float x) {
  const uint32_t bits = bits_of(x);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  if (!finite) return static_cast<uint16_t>(bits >> 16 | ((bits & 0xffffu) != 0));  // a nan stays one
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

}  // namespace mfengine
