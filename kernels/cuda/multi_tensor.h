/* The C interface of mfengine's CUDA library: pointers, sizes and a stream, so that one library serves every torch.
 *
 * kernels/multi_tensor.py calls it. Pointers are to memory of the device that mfengine_device() names; a call queues
 * its work on the stream and returns. Functions return 0, or a code that mfengine_error() puts in words.
 */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { MFENGINE_MAX_AVERAGES = 8 };
enum { MFENGINE_CHUNK = 16384 }; /* elements that one block works on */

enum mfengine_dtype { MFENGINE_FLOAT32 = 0, MFENGINE_BFLOAT16 = 1 };

/* A parameter with everything that belongs to it; each pointer is to numel elements, but for step. */
typedef struct {
  int64_t numel;
  float* param;
  const void* grad;   /* of config.grad_dtype; null for a parameter without one, whose averages and copy follow it all
                         the same */
  float* exp_avg;     /* first moment */
  float* exp_avg_sq;  /* second moment */
  const float* step;  /* one element: the number of this step, from 1 */
  uint16_t* copy;     /* bfloat16 copy of the new parameter, or null */
  float* averages[MFENGINE_MAX_AVERAGES]; /* the first config.num_averages are there */
} mfengine_tensor;

typedef struct {
  double lr, beta1, beta2, eps, weight_decay;
  double decays[MFENGINE_MAX_AVERAGES]; /* average <- decay average + (1 - decay) parameter */
  int32_t num_averages;
  int32_t grad_dtype;
} mfengine_adamw_config;

/* One step of AdamW, of the averages and of the copy. Gradients are multiplied by *grad_scale (null: 1); nothing at all
 * is written if *skip (null: 0) is not 0. */
int mfengine_adamw_ema(const mfengine_tensor* tensors, int32_t count, const mfengine_adamw_config* config,
                       const float* grad_scale, const float* skip, void* stream);

/* *sum <- sum of the squares of all gradients; the same bits for the same call. `partials` is room for one double per
 * chunk of MFENGINE_CHUNK elements of each tensor, rounded up. */
int mfengine_sum_of_squares(const mfengine_tensor* tensors, int32_t count, int32_t grad_dtype, double* partials,
                            double* sum, void* stream);

const char* mfengine_device(void); /* "cuda" or "cpu": where pointers point */
int mfengine_ready(void);          /* 0 if that device can be used */
int mfengine_oldest(void);         /* least compute capability that it was built for, 80 say; 0 on the host */
const char* mfengine_error(int code);

/* What caller and library must agree on: sizes of the two structs, MFENGINE_CHUNK, and a number that is raised when
 * what is between them changes otherwise. */
void mfengine_interface(int64_t agreed[4]);
enum { MFENGINE_INTERFACE = 1 };

#ifdef __cplusplus
}
#endif
