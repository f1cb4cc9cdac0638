// The same interface, and the same arithmetic of an element, on the host, so that both can be tested without a GPU.

#include "adamw_ema.h"

namespace {

using namespace mfengine;

template <typename Grad>
void adamw_ema(const mfengine_tensor& tensor, const mfengine_adamw_config& config, float grad_scale) {
  const Step step = make_step(config, *tensor.step, grad_scale);
  const Grad* grad = static_cast<const Grad*>(tensor.grad);
  for (int64_t i = 0; i < tensor.numel; ++i) {
    float& param = tensor.param[i];
    if (grad != nullptr) adamw(param, to_float(grad[i]), tensor.exp_avg[i], tensor.exp_avg_sq[i], step);
    for (int a = 0; a < config.num_averages; ++a)
      tensor.averages[a][i] = average(tensor.averages[a][i], param, static_cast<float>(1 - config.decays[a]));
    if (tensor.copy != nullptr) tensor.copy[i] = round_to_nearest(param);
  }
}

template <typename Grad>
double squares(const mfengine_tensor& tensor) {
  const Grad* grad = static_cast<const Grad*>(tensor.grad);
  double sum = 0;
  for (int64_t i = 0; grad != nullptr && i < tensor.numel; ++i) {
    const double x = to_float(grad[i]);
    sum += x * x;
  }
  return sum;
}

}  // namespace

int mfengine_adamw_ema(const mfengine_tensor* tensors, int32_t count, const mfengine_adamw_config* config,
                       const float* grad_scale, const float* skip, void*) {
  if (skip != nullptr && *skip != 0) return 0;
  const auto run = config->grad_dtype == MFENGINE_BFLOAT16 ? adamw_ema<uint16_t> : adamw_ema<float>;
  for (int32_t i = 0; i < count; ++i) run(tensors[i], *config, grad_scale != nullptr ? *grad_scale : 1);
  return 0;
}

int mfengine_sum_of_squares(const mfengine_tensor* tensors, int32_t count, int32_t grad_dtype, double*, double* sum,
                            void*) {
  *sum = 0;
  for (int32_t i = 0; i < count; ++i)
    *sum += grad_dtype == MFENGINE_BFLOAT16 ? squares<uint16_t>(tensors[i]) : squares<float>(tensors[i]);
  return 0;
}

const char* mfengine_device(void) { return "cpu"; }

int mfengine_ready(void) { return 0; }

const char* mfengine_error(int) { return "no error"; }

int mfengine_oldest(void) { return 0; }

void mfengine_interface(int64_t agreed[4]) {
  agreed[0] = sizeof(mfengine_tensor);
  agreed[1] = sizeof(mfengine_adamw_config);
  agreed[2] = MFENGINE_CHUNK;
  agreed[3] = MFENGINE_INTERFACE;
}
