// AdamW, moving averages and bfloat16 copy in one pass over memory; the sum of squares for clipping. Many tensors per
// launch: their pointers travel as kernel arguments, so a step copies nothing to the device and waits for nothing.

#include <cuda_runtime.h>

#include "adamw_ema.h"

namespace {

using namespace mfengine;

constexpr int THREADS = 256;
constexpr int WIDTH = 8;     // elements that a thread has in hand: 16 bytes of bfloat16, twice 16 of float32
constexpr int TENSORS = 29;  // per launch: the arguments fit the 4 KB that every driver takes

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
// Memory, N elements at a time: 16 bytes per access where N is WIDTH. Nothing is used twice, so nothing need stay in
// the caches.

__device__ __forceinline__ bool aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

template <int N>
__device__ __forceinline__ void load(const float* p, float (&x)[N]) {
  if constexpr (N == 1) {
    x[0] = __ldcs(p);
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float4 four = __ldcs(reinterpret_cast<const float4*>(p + i));
      x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
    }
  }
}

template <int N>
__device__ __forceinline__ void load(const uint16_t* p, float (&x)[N]) {
  if constexpr (N == 1) {
    x[0] = to_float(__ldcs(p));
  } else {
    const uint4 eight = __ldcs(reinterpret_cast<const uint4*>(p));
    const uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = to_float(static_cast<uint16_t>(pairs[i / 2] >> (16 * (i % 2))));
  }
}

template <int N>
__device__ __forceinline__ void store(float* p, const float (&x)[N]) {
  if constexpr (N == 1) {
    __stcs(p, x[0]);
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4)
      __stcs(reinterpret_cast<float4*>(p + i), make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]));
  }
}

template <int N>
__device__ __forceinline__ void store(uint16_t* p, const uint16_t (&x)[N]) {
  if constexpr (N == 1) {
    __stcs(p, x[0]);
  } else {
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = x[2 * i] | static_cast<uint32_t>(x[2 * i + 1]) << 16;
    __stcs(reinterpret_cast<uint4*>(p), make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
  }
}

// ----------------------------------------------------------------------------
// AdamW, averages, copy.

struct Shared {  // by the elements of a block
  Step step;
  float one_minus_decay[MFENGINE_MAX_AVERAGES];
  uint32_t stream;
};

template <int N, typename Grad>
__device__ __forceinline__ void update(const mfengine_tensor& tensor, int64_t at, const mfengine_adamw_config& config,
                                       const Shared& shared) {
  float param[N];
  load(tensor.param + at, param);
  if (tensor.grad != nullptr) {
    float grad[N], exp_avg[N], exp_avg_sq[N];
    load(static_cast<const Grad*>(tensor.grad) + at, grad);
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
    for (int i = 0; i < N; ++i)
      copy[i] = config.stochastic ? round_at_random(param[i], shared.stream, static_cast<uint32_t>(at + i))
                                  : round_to_nearest(param[i]);
    store(tensor.copy + at, copy);
  }
}

template <typename Grad>
__global__ void __launch_bounds__(THREADS, 3)  // 72 registers: at 64 there are spills for sm_120
    adamw_ema_kernel(const __grid_constant__ Launch launch, const __grid_constant__ mfengine_adamw_config config,
                     const float* grad_scale, const float* skip) {
  if (skip != nullptr && *skip != 0) return;
  const Place place = find_place(launch);
  const mfengine_tensor& tensor = launch.tensors[place.tensor];

  __shared__ Shared shared;
  if (threadIdx.x == 0) {
    shared.step = make_step(config, *tensor.step, grad_scale != nullptr ? *grad_scale : 1);
    shared.stream = stream_of(tensor.number, *tensor.step);
  }
  if (threadIdx.x < MFENGINE_MAX_AVERAGES)
    shared.one_minus_decay[threadIdx.x] = static_cast<float>(1 - config.decays[threadIdx.x]);
  __syncthreads();

  bool vectors = aligned(tensor.param) && aligned(tensor.grad) && aligned(tensor.exp_avg) &&
                 aligned(tensor.exp_avg_sq) && aligned(tensor.copy);
  for (int a = 0; a < config.num_averages; ++a) vectors = vectors && aligned(tensor.averages[a]);

  int64_t rest = place.begin;  // what is left for single elements
  if (vectors) {
    rest += (place.end - place.begin) / WIDTH * WIDTH;
    for (int64_t at = place.begin + threadIdx.x * WIDTH; at < rest; at += THREADS * WIDTH)
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

template <int N, typename Grad>
__device__ __forceinline__ double squares(const Grad* grad) {
  float x[N], sum = 0;
  load(grad, x);
#pragma unroll
  for (int i = 0; i < N; ++i) sum = fmaf(x[i], x[i], sum);
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
      rest += (place.end - place.begin) / WIDTH * WIDTH;
      for (int64_t at = place.begin + threadIdx.x * WIDTH; at < rest; at += THREADS * WIDTH)
        sum += squares<WIDTH>(grad + at);
    }
    for (int64_t at = rest + threadIdx.x; at < place.end; at += THREADS) sum += squares<1>(grad + at);
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
  for_each_launch(tensors, count, [&](const Launch& launch, int32_t blocks) {
    kernel<<<blocks, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(launch, partials + written);
    written += blocks;
  });
  sum_of_partials_kernel<<<1, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(partials, written, sum);
  return cudaGetLastError();
}

const char* mfengine_device(void) { return "cuda"; }

int mfengine_ready(void) {
  int devices = 0;
  return cudaGetDeviceCount(&devices);
}

const char* mfengine_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

int64_t mfengine_tensor_size(void) { return sizeof(mfengine_tensor); }
