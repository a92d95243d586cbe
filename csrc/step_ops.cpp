// Registers the operators that update parameters: unbox, check, split into fixed chunks, call the loops.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/isa.h"
#include "cpu/step_scalars.h"
#include "table.h"

namespace gradkern {
namespace {

// Columns of a step's table, after element count and first chunk; gradkern.ops._step.columns.
enum Column : int64_t { kParam, kRemainder, kGrad, kUnits, kUnitSize, kId, kStep, kState0, kScale0 };
constexpr int64_t kColumns = kState0 + 2 * kMaxStates;

ParamCodec checked_param(const char* op, int64_t code) {
  STD_TORCH_CHECK(code >= 0 && code <= static_cast<int64_t>(ParamCodec::kBFloat16Stochastic), op,
                  ": unknown parameter codec ", code);
  return static_cast<ParamCodec>(code);
}

StateCodec checked_state(const char* op, int64_t code) {
  STD_TORCH_CHECK((code >= 0 && code <= 2) || code == 7 || code == 8, op, ": unknown state codec ", code);
  return static_cast<StateCodec>(code);
}

uint32_t key_of(double seed, int64_t step, int64_t id, int64_t offset) {
  const auto number = static_cast<uint64_t>(seed);
  uint32_t key = mixed_word(static_cast<uint32_t>(number));
  key = mixed_word(key ^ static_cast<uint32_t>(number >> 32));
  key = mixed_word(key ^ static_cast<uint32_t>(step));
  key = mixed_word(key ^ static_cast<uint32_t>(id));
  return mixed_word(key ^ static_cast<uint32_t>(static_cast<uint64_t>(offset) >> 32));
}

// hyper: the rule's own numbers, then the seed. codecs: parameter, gradient, state, transform.
void step_table(const char* op, const StepKernels& kernels, const Tensor& table_tensor, const Tensor& scalars,
                const Tensor& hyper_tensor, int64_t param_codec, int64_t grad_dtype, int64_t state_codec,
                int64_t transform, int64_t variant) {
  const Table table(op, table_tensor, kColumns);
  check_block(op, "scalars", scalars, kStepScalars);
  check_block(op, "hyper", hyper_tensor, 1);
  const int64_t states = kernels.states(variant);
  STD_TORCH_CHECK(states >= 0, op, ": unknown variant ", variant);
  STD_TORCH_CHECK(transform >= 0 && transform <= 2, op, ": unknown gradient transform ", transform);
  StepChunk base{};
  base.param_codec = checked_param(op, param_codec);
  base.grad_dtype = checked_dtype(op, grad_dtype);
  base.state_codec = checked_state(op, state_codec);
  base.transform = static_cast<GradTransform>(transform);
  const auto* block = static_cast<const double*>(scalars.const_data_ptr());
  if (block[kSkip] != 0.0) {
    return;
  }
  base.limit = static_cast<float>(block[kLimit]);
  const auto* hyper = static_cast<const double*>(hyper_tensor.const_data_ptr());
  const double seed = hyper[hyper_tensor.numel() - 1];
  const double grad_multiplier = block[kGradMultiplier];
  const int64_t param_bytes = param_item(base.param_codec);
  const int64_t remainder_bytes = remainder_item(base.param_codec);
  const int64_t grad_bytes = item_size(base.grad_dtype);
  const int64_t state_bytes = state_item(base.state_codec);
  // Tensors of one group nearly always share their step: form the scalars once and again only where it differs.
  const float first_step = table.count == 0 ? 1.0f : *reinterpret_cast<const float*>(table.address(0, kStep));
  const auto scalars_at = [&](float step) {
    return kernels.scalars(variant, hyper, grad_multiplier, static_cast<int64_t>(step));
  };
  const StepScalars shared = scalars_at(first_step);
  table.for_each_chunk([&](int64_t row, int64_t, int64_t offset, int64_t size) {
    StepChunk chunk = base;
    chunk.param = table.address(row, kParam) + offset * param_bytes;
    chunk.remainder = table.address(row, kRemainder) + offset * remainder_bytes;
    chunk.grad = table.address(row, kGrad) + offset * grad_bytes;
    for (int64_t k = 0; k < states; ++k) {
      chunk.state[k] = table.address(row, kState0 + 2 * k) + offset * state_bytes;
      chunk.scale[k] = table.address(row, kScale0 + 2 * k) + offset / kStateBlock;
    }
    chunk.units = reinterpret_cast<const float*>(table.address(row, kUnits));
    chunk.unit_size = table.integer(row, kUnitSize);
    chunk.offset = offset;
    chunk.size = size;
    const float step = *reinterpret_cast<const float*>(table.address(row, kStep));
    chunk.key = key_of(seed, static_cast<int64_t>(step), table.integer(row, kId), offset);
    kernels.loop(variant, chunk, step == first_step ? shared : scalars_at(step));
  });
}

#define GRADKERN_RULE(name, rule)                                                                                \
  void name##_step_table(Tensor table, Tensor scalars, Tensor hyper, int64_t param, int64_t grad, int64_t state, \
                         int64_t transform, int64_t variant) {                                                   \
    step_table(#name "_step_", kernels().name, table, scalars, hyper, param, grad, state, transform, variant);   \
  }
#include "rules/rules.inc"
#undef GRADKERN_RULE

}  // namespace
}  // namespace gradkern

STABLE_TORCH_LIBRARY_IMPL(gradkern, CPU, m) {
#define GRADKERN_RULE(name, rule) m.impl("_" #name "_step_table_", TORCH_BOX(&gradkern::name##_step_table));
#include "rules/rules.inc"
#undef GRADKERN_RULE
}
