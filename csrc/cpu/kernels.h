// The torch-free boundary between the operators and the loops: plain pointers, fixed-width integers, doubles.
#pragma once

#include <cstdint>

namespace gradkern {

// Elements in one chunk: the unit of work and of the norm's partial sums. Fixed: results may depend on it.
constexpr int64_t kChunk = 4096;

enum class DType : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

inline int64_t item_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// What accumulation does with main_grad. Streaming stores overwrite it without first reading its lines into the cache,
// and leave it out of the cache; finish_streaming() orders them.
enum class Fold { kAdd, kOverwrite, kOverwriteStreaming };

// Scalars of one AdamW step for one tensor, formed in double and rounded once to float.
struct AdamWScalars {
  float grad_multiplier;  // clip coefficient / loss scale, negated for maximize
  float decay;            // 1 - lr * weight_decay
  float grad_weight;      // 1 - beta1
  float beta2;
  float sq_weight;       // 1 - beta2
  float inv_bias2_sqrt;  // 1 / sqrt(1 - beta2^t)
  float eps;
  float step_size;  // lr / (1 - beta1^t)
};

// One chunk of one tensor for AdamW; max_exp_avg_sq is null without amsgrad.
struct AdamWChunk {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;
  DType param_dtype;
  DType grad_dtype;
  DType state_dtype;
  int64_t size;
};

// Every loop, once per instruction set. A null partial means that no sum of squares is wanted.
struct KernelTable {
#define GRADKERN_KERNEL(name, result, ...) result (*name)(__VA_ARGS__);
#include "kernel_list.inc"
#undef GRADKERN_KERNEL
};

}  // namespace gradkern
