// Registers the operators that update parameters: unbox, check, split into fixed chunks, call the loops.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/step_scalars.h"
#include "table.h"

namespace gradkern {
namespace {

// Operands: param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq (address 0 without amsgrad), step.
void adamw_step_table(Tensor table_tensor, Tensor scalars, int64_t param_dtype, int64_t grad_dtype, int64_t state_dtype,
                      double lr, double beta1, double beta2, double eps, double weight_decay, bool maximize) {
  const char* op = "adamw_step_";
  const Table table(op, table_tensor, 6);
  check_block(op, "scalars", scalars, kStepScalars);
  AdamWChunk base{};
  base.param_dtype = checked_dtype(op, param_dtype);
  base.grad_dtype = checked_dtype(op, grad_dtype);
  base.state_dtype = checked_dtype(op, state_dtype);
  const auto* block = static_cast<const double*>(scalars.const_data_ptr());
  if (block[kSkip] != 0.0) {
    return;
  }
  const double grad_multiplier = block[kGradMultiplier];
  const int64_t param_item = item_size(base.param_dtype);
  const int64_t grad_item = item_size(base.grad_dtype);
  const int64_t state_item = item_size(base.state_dtype);
  const auto adamw = kernels().adamw;
  const auto scalars_at = [&](float step) {
    return adamw_scalars(grad_multiplier, static_cast<int64_t>(step), lr, beta1, beta2, eps, weight_decay, maximize);
  };
  // Tensors of one group nearly always share their step: form the scalars once and again only where it differs.
  const float first_step = table.count == 0 ? 1.0f : *reinterpret_cast<const float*>(table.address(0, 5));
  const AdamWScalars shared = scalars_at(first_step);
  table.for_each_chunk([&](int64_t row, int64_t, int64_t offset, int64_t size) {
    AdamWChunk chunk = base;
    chunk.param = table.address(row, 0) + offset * param_item;
    chunk.grad = table.address(row, 1) + offset * grad_item;
    chunk.exp_avg = table.address(row, 2) + offset * state_item;
    chunk.exp_avg_sq = table.address(row, 3) + offset * state_item;
    unsigned char* max_exp_avg_sq = table.address(row, 4);
    chunk.max_exp_avg_sq = max_exp_avg_sq == nullptr ? nullptr : max_exp_avg_sq + offset * state_item;
    chunk.size = size;
    const float step = *reinterpret_cast<const float*>(table.address(row, 5));
    adamw(chunk, step == first_step ? shared : scalars_at(step));
  });
}

}  // namespace
}  // namespace gradkern

STABLE_TORCH_LIBRARY_IMPL(gradkern, CPU, m) { m.impl("_adamw_step_table_", TORCH_BOX(&gradkern::adamw_step_table)); }
