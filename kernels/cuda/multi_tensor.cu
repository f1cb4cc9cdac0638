// AdamW, the moving averages and the bfloat16 copy in one pass over memory, and the sum of squares for clipping. A
// launch covers many tensors. Their pointers are kernel arguments, so a step copies nothing to the device and does not
// wait for it.

#include <cuda_runtime.h>

#include "adamw_ema.h"

namespace {

using namespace mfengine;

constexpr int THREADS = 256;
constexpr int SPAN = THREADS * 4;  // elements that a block accesses when each thread accesses 16 bytes of float32
constexpr int WIDTH = 8;     // elements that a thread holds: two groups of four, a span apart
constexpr int TENSORS = 31;  // per launch: their arguments fit in 4 KB, the limit of older drivers

// ----------------------------------------------------------------------------
// Which tensor a block works on.

struct Launch {
  int count;
  int32_t first_block[TENSORS + 1];
  mfengine_tensor tensors[TENSORS];
};
static_assert(sizeof(Launch) + sizeof(mfengine_adamw_config) + 2 * sizeof(void*) <= 4096);

struct Place {
  int tensor;
  int64_t begin, end;  // elements
};

__device__ __forceinline__ Place find_place(const Launch& launch) {
  int low = 0, high = launch.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (static_cast<int32_t>(blockIdx.x) < launch.first_block[middle] ? high : low) = middle;
  }
  const int64_t begin = static_cast<int64_t>(blockIdx.x - launch.first_block[low]) * MFENGINE_CHUNK;
  const int64_t end = begin + MFENGINE_CHUNK, numel = launch.tensors[low].numel;
  return {low, begin, end < numel ? end : numel};
}

// Calls run(launch, blocks) for the tensors, TENSORS at a time.
template <typename Run>
int for_each_launch(const mfengine_tensor* tensors, int32_t count, Run run) {
  Launch launch;
  launch.count = 0;
  launch.first_block[0] = 0;
  for (int32_t i = 0; i < count; ++i) {
    launch.tensors[launch.count] = tensors[i];
    const int64_t chunks = (tensors[i].numel + MFENGINE_CHUNK - 1) / MFENGINE_CHUNK;
    launch.first_block[launch.count + 1] = launch.first_block[launch.count] + static_cast<int32_t>(chunks);
    ++launch.count;
    const bool last = i + 1 == count;
    if (launch.count == TENSORS || last) {
      const int32_t blocks = launch.first_block[launch.count];
      if (blocks > 0) run(launch, blocks);
      launch.count = 0;
    }
  }
  return cudaGetLastError();
}

// ----------------------------------------------------------------------------
// Memory. A thread accesses one element, or two groups of four that lie a span apart: the threads of a warp then access
// adjacent 16 bytes. Each element is used once, so the accesses are marked as streaming and leave the caches alone.

__device__ __forceinline__ bool aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

__device__ __forceinline__ void load(const float* p, float (&x)[1]) { x[0] = __ldcs(p); }

__device__ __forceinline__ void load(const uint16_t* p, float (&x)[1]) { x[0] = to_float(__ldcs(p)); }

__device__ __forceinline__ void load(const float* p, float (&x)[WIDTH]) {
#pragma unroll
  for (int i = 0; i < WIDTH; i += 4) {
    const float4 four = __ldcs(reinterpret_cast<const float4*>(p + i / 4 * SPAN));
    x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
  }
}

__device__ __forceinline__ void load(const uint16_t* p, float (&x)[WIDTH]) {
#pragma unroll
  for (int i = 0; i < WIDTH; i += 4) {
    const uint2 four = __ldcs(reinterpret_cast<const uint2*>(p + i / 4 * SPAN));
    x[i] = to_float(static_cast<uint16_t>(four.x)), x[i + 1] = to_float(static_cast<uint16_t>(four.x >> 16));
    x[i + 2] = to_float(static_cast<uint16_t>(four.y)), x[i + 3] = to_float(static_cast<uint16_t>(four.y >> 16));
  }
}

// The same elements at an address that is not a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ void load_unaligned(const T* p, float (&x)[WIDTH]) {
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) x[i] = to_float(__ldcs(p + i / 4 * SPAN + i % 4));
}

__device__ __forceinline__ void store(float* p, const float (&x)[1]) { __stcs(p, x[0]); }

__device__ __forceinline__ void store(uint16_t* p, const uint16_t (&x)[1]) { __stcs(p, x[0]); }

__device__ __forceinline__ void store(float* p, const float (&x)[WIDTH]) {
#pragma unroll
  for (int i = 0; i < WIDTH; i += 4)
    __stcs(reinterpret_cast<float4*>(p + i / 4 * SPAN), make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]));
}

__device__ __forceinline__ void store(uint16_t* p, const uint16_t (&x)[WIDTH]) {
#pragma unroll
  for (int i = 0; i < WIDTH; i += 4)
    __stcs(reinterpret_cast<uint2*>(p + i / 4 * SPAN),
           make_uint2(x[i] | static_cast<uint32_t>(x[i + 1]) << 16, x[i + 2] | static_cast<uint32_t>(x[i + 3]) << 16));
}

// ----------------------------------------------------------------------------
// AdamW, averages, copy.

struct Shared {  // what all elements of a block need
  Step step;
  float one_minus_decay[MFENGINE_MAX_AVERAGES];
  bool grad_aligned;
};

template <int N, typename Grad>
__device__ __forceinline__ void update(const mfengine_tensor& tensor, int64_t at, const mfengine_adamw_config& config,
                                       const Shared& shared) {
  float param[N];
  load(tensor.param + at, param);
  if (tensor.grad != nullptr) {
    float grad[N], exp_avg[N], exp_avg_sq[N];
    const Grad* from = static_cast<const Grad*>(tensor.grad) + at;
    if constexpr (N == WIDTH) {
      // FSDP2's gradients are parts of one buffer and may begin at any element.
      if (shared.grad_aligned) load(from, grad);
      else load_unaligned(from, grad);
    } else {
      load(from, grad);
    }
    load(tensor.exp_avg + at, exp_avg);
    load(tensor.exp_avg_sq + at, exp_avg_sq);
#pragma unroll
    for (int i = 0; i < N; ++i) adamw(param[i], grad[i], exp_avg[i], exp_avg_sq[i], shared.step);
    store(tensor.param + at, param);
    store(tensor.exp_avg + at, exp_avg);
    store(tensor.exp_avg_sq + at, exp_avg_sq);
  }
  for (int a = 0; a < config.num_averages; ++a) {
    float old[N];
    load(tensor.averages[a] + at, old);
#pragma unroll
    for (int i = 0; i < N; ++i) old[i] = average(old[i], param[i], shared.one_minus_decay[a]);
    store(tensor.averages[a] + at, old);
  }
  if (tensor.copy != nullptr) {
    uint16_t copy[N];
#pragma unroll
    for (int i = 0; i < N; ++i) copy[i] = round_to_nearest(param[i]);
    store(tensor.copy + at, copy);
  }
}

template <typename Grad>
__global__ void __launch_bounds__(THREADS, 3)  // 72 registers: with 64, sm_120 spills
    adamw_ema_kernel(const __grid_constant__ Launch launch, const __grid_constant__ mfengine_adamw_config config,
                     const float* grad_scale, const float* skip) {
  if (skip != nullptr && *skip != 0) return;
  const Place place = find_place(launch);
  const mfengine_tensor& tensor = launch.tensors[place.tensor];

  __shared__ Shared shared;
  if (threadIdx.x == 0) {
    shared.step = make_step(config, *tensor.step, grad_scale != nullptr ? *grad_scale : 1);
    shared.grad_aligned = aligned(tensor.grad);
  }
  if (threadIdx.x < MFENGINE_MAX_AVERAGES)
    shared.one_minus_decay[threadIdx.x] = static_cast<float>(1 - config.decays[threadIdx.x]);
  __syncthreads();

  bool vectors =
      aligned(tensor.param) && aligned(tensor.exp_avg) && aligned(tensor.exp_avg_sq) && aligned(tensor.copy);
  for (int a = 0; a < config.num_averages; ++a) vectors = vectors && aligned(tensor.averages[a]);

  int64_t rest = place.begin;  // the first element that is handled alone
  if (vectors) {
    rest += (place.end - place.begin) / (2 * SPAN) * (2 * SPAN);
    for (int64_t at = place.begin + threadIdx.x * 4; at < rest; at += 2 * SPAN)
      update<WIDTH, Grad>(tensor, at, config, shared);
  }
  for (int64_t at = rest + threadIdx.x; at < place.end; at += THREADS) update<1, Grad>(tensor, at, config, shared);
}

// ----------------------------------------------------------------------------
// Sum of squares: a partial sum per block, then all of them in one block, each in a fixed order.

__device__ __forceinline__ double sum_of_block(double x) {
  __shared__ double warps[THREADS / 32];
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_down_sync(0xffffffffu, x, distance);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  for (double warp : warps) sum += warp;
  return sum;
}

__device__ __forceinline__ double square(float x) { return static_cast<double>(x) * x; }

// The sum of squares of the elements in 16 bytes.
__device__ __forceinline__ double squares(const float* grad) {
  const float4 x = __ldcs(reinterpret_cast<const float4*>(grad));
  return (square(x.x) + square(x.y)) + (square(x.z) + square(x.w));
}

__device__ __forceinline__ double squares(const uint16_t* grad) {
  const uint4 x = __ldcs(reinterpret_cast<const uint4*>(grad));
  const uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
  double sum = 0;
#pragma unroll
  for (uint32_t pair : pairs)
    sum += square(to_float(static_cast<uint16_t>(pair))) + square(to_float(static_cast<uint16_t>(pair >> 16)));
  return sum;
}

template <typename Grad>
__global__ void __launch_bounds__(THREADS)
    sum_of_squares_kernel(const __grid_constant__ Launch launch, double* partials) {
  const Place place = find_place(launch);
  const Grad* grad = static_cast<const Grad*>(launch.tensors[place.tensor].grad);
  double sum = 0;
  if (grad != nullptr) {
    int64_t rest = place.begin;
    if (aligned(grad)) {
      constexpr int width = 16 / sizeof(Grad);
      rest += (place.end - place.begin) / width * width;
#pragma unroll 4
      for (int64_t at = place.begin + threadIdx.x * width; at < rest; at += THREADS * width) sum += squares(grad + at);
    }
    for (int64_t at = rest + threadIdx.x; at < place.end; at += THREADS) sum += square(to_float(__ldcs(grad + at)));
  }
  sum = sum_of_block(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(THREADS) sum_of_partials_kernel(const double* partials, int64_t count, double* sum) {
  double mine = 0;
  for (int64_t i = threadIdx.x; i < count; i += THREADS) mine += partials[i];
  mine = sum_of_block(mine);
  if (threadIdx.x == 0) *sum = mine;
}

}  // namespace

// ----------------------------------------------------------------------------
// The C interface.

int mfengine_adamw_ema(const mfengine_tensor* tensors, int32_t count, const mfengine_adamw_config* config,
                       const float* grad_scale, const float* skip, void* stream) {
  const auto kernel =
      config->grad_dtype == MFENGINE_BFLOAT16 ? adamw_ema_kernel<uint16_t> : adamw_ema_kernel<float>;
  return for_each_launch(tensors, count, [&](const Launch& launch, int32_t blocks) {
    kernel<<<blocks, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(launch, *config, grad_scale, skip);
  });
}

int mfengine_sum_of_squares(const mfengine_tensor* tensors, int32_t count, int32_t grad_dtype, double* partials,
                            double* sum, void* stream) {
  const auto kernel = grad_dtype == MFENGINE_BFLOAT16 ? sum_of_squares_kernel<uint16_t> : sum_of_squares_kernel<float>;
  int64_t written = 0;
  const int code = for_each_launch(tensors, count, [&](const Launch& launch, int32_t blocks) {
    kernel<<<blocks, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(launch, partials + written);
    written += blocks;
  });
  if (code) return code;
  sum_of_partials_kernel<<<1, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(partials, written, sum);
  return cudaGetLastError();
}

const char* mfengine_device(void) { return "cuda"; }

int mfengine_ready(void) {
  int devices = 0;
  return cudaGetDeviceCount(&devices);
}

const char* mfengine_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

int mfengine_oldest(void) { return MFENGINE_OLDEST; }

void mfengine_interface(int64_t agreed[4]) {
  agreed[0] = sizeof(mfengine_tensor);
  agreed[1] = sizeof(mfengine_adamw_config);
  agreed[2] = MFENGINE_CHUNK;
  agreed[3] = MFENGINE_INTERFACE;
}
