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

// How a parameter is stored beside the bits that its dtype has no room for; gradkern.ops._step.codecs.ParamCodec.
enum class ParamCodec : int64_t {
  kFloat32 = 0,
  kBFloat16 = 1,
  kFloat16 = 2,
  kBFloat16Master32 = 3,
  kFloat16Master32 = 4,
  kBFloat16Split16 = 5,
  kBFloat16Split8 = 6,
  kBFloat16Stochastic = 7,
};

inline int64_t param_item(ParamCodec codec) { return codec == ParamCodec::kFloat32 ? 4 : 2; }

inline int64_t remainder_item(ParamCodec codec) {
  switch (codec) {
    case ParamCodec::kBFloat16Master32:
    case ParamCodec::kFloat16Master32:
      return 4;
    case ParamCodec::kBFloat16Split16:
      return 2;
    case ParamCodec::kBFloat16Split8:
      return 1;
    default:
      return 0;
  }
}

// How optimizer state is stored; gradkern.ops._step.codecs.StateCodec.
enum class StateCodec : int64_t {
  kFloat32 = 0,
  kBFloat16 = 1,
  kFloat16 = 2,
  kBFloat16Stochastic = 7,
  kBlock8 = 8,
};

inline int64_t state_item(StateCodec codec) {
  return codec == StateCodec::kFloat32 ? 4 : codec == StateCodec::kBlock8 ? 1 : 2;
}

// Elements that share one exponent in 8-bit state.
constexpr int64_t kStateBlock = 64;

// What is done to a gradient before the rule sees it; gradkern.ops._step.codecs.GradTransform.
enum class GradTransform : int64_t { kNone = 0, kLimit = 1, kUnits = 2 };

// Constants of the counter-based generator.
constexpr uint32_t kMix1 = 0x21f0aaadu;
constexpr uint32_t kMix2 = 0x735a2d97u;
constexpr uint32_t kSecondWord = 0x9e3779b9u;

inline uint32_t mixed_word(uint32_t x) {
  x = (x ^ (x >> 16)) * kMix1;
  x = (x ^ (x >> 15)) * kMix2;
  return x ^ (x >> 15);
}

// base^n by binary exponentiation from the lowest bit, the order that every backend keeps.
inline double power(double base, int64_t n) {
  double result = 1.0;
  while (n > 0) {
    if (n & 1) {
      result *= base;
    }
    base *= base;
    n >>= 1;
  }
  return result;
}

// Scalars of one step for one tensor, formed in double and rounded once to float; each rule says what they are.
struct StepScalars {
  float v[8];
};

constexpr int64_t kMaxStates = 3;

// One chunk of one tensor for a step. Addresses are those of the chunk's first element (scales: of its first block).
struct StepChunk {
  void* param;
  void* remainder;
  const void* grad;
  void* state[kMaxStates];
  uint8_t* scale[kMaxStates];
  const float* units;  // one multiplier per unit, or null
  int64_t unit_size;   // elements in a unit
  int64_t offset;      // of the chunk in its tensor
  int64_t size;
  float limit;   // gradients are cut to [-limit, limit]
  uint32_t key;  // of the random words of this tensor and step
  ParamCodec param_codec;
  DType grad_dtype;
  StateCodec state_codec;
  GradTransform transform;
};

// One rule on one instruction set; `variant` is what the rule's header says.
struct StepKernels {
  StepScalars (*scalars)(int64_t variant, const double* hyper, double grad_multiplier, int64_t step);
  void (*loop)(int64_t variant, const StepChunk& chunk, const StepScalars& scalars);
  int64_t (*states)(int64_t variant);  // -1: there is no such variant
};

// One sample's gradient of a matrix, leftᵀ @ right of `tokens` rows, to be reduced to `rank` directions and quantised.
// Without `left` the gradient is `right` itself.
struct ReduceSample {
  const float* left;   // tokens x height
  const float* right;  // tokens x width
  const float* start;  // rank x width
  int64_t tokens;
  int64_t height;
  int64_t width;
  int64_t rank;
  float* scratch;       // reduce_scratch() floats
  int8_t* left_codes;   // min(tokens, rank) x height
  float* left_scales;   // min(tokens, rank)
  int8_t* right_codes;  // min(tokens, rank) x width
  float* right_scales;  // min(tokens, rank)
};

inline int64_t reduce_scratch(int64_t tokens, int64_t height, int64_t width, int64_t rank) {
  return rank * (tokens + height + width) + width + 4 * rank * (height > width ? height : width);
}

// One step of one parameter, as gradkern.rollback follows it.
struct ShadowStep {
  const float* gradient;       // or null
  const float* second_moment;  // or null: the preconditioner is step_size
  float* momenta;
  float* deltas;
  int64_t rows;  // 0 of a vector
  int64_t columns;
  float momentum, weight, decay, step_size, root_scale, eps;
  float* scratch;      // shadow_scratch() floats
  uint16_t* smoothed;  // bf16: rows + columns of a matrix, columns of a vector
  double* squares;     // two, of a vector
};

inline int64_t shadow_scratch(int64_t rows, int64_t columns) {
  int64_t levels = 0;
  while ((rows >> levels) != 0) {
    ++levels;
  }
  return (2 + levels) * columns;
}

// Every loop, once per instruction set. A null partial means that no sum of squares is wanted.
struct KernelTable {
#define GRADKERN_KERNEL(name, result, ...) result (*name)(__VA_ARGS__);
#include "kernel_list.inc"
#undef GRADKERN_KERNEL
#define GRADKERN_RULE(name, rule) StepKernels name;
#include "../rules/rules.inc"
#undef GRADKERN_RULE
};

}  // namespace gradkern
