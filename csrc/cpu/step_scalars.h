// The block of scalars that every optimizer rule reads: formed in double, in one fixed order, never by pow or exp.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels.h"

namespace gradkern {

// Positions in the fp64 block that step_scalars_ writes.
enum StepScalar : int64_t {
  kNorm = 0,            // L2 norm of the unscaled gradient, before clipping
  kGradMultiplier = 1,  // clip coefficient / loss scale, rounded to fp32
  kSkip = 2,            // 1 when the step is skipped
  kClipCoef = 3,        // min(1, max_norm / (norm + 1e-6))
  kSkipped = 4,         // how many steps were skipped so far
  kLimit = 5,           // gradients are cut to [-limit, limit] before the multiplier; inf where they are not
  kStepScalars = 6,
};

// An exact sum of non-negative doubles between 2^-300 and 2^308, kept as 32-bit limbs in 64-bit words: integer
// addition, so the result does not depend on order. A Kulisch accumulator cut to the range that sums of squares of fp32
// values have; what is larger counts as infinite, what is smaller as zero.
class ExactSum {
 public:
  static constexpr int64_t kLimbs = 22;
  static constexpr int64_t kBias = 352;  // position of 2^0; the lowest bit of 2^-300 stands at 0
  static constexpr int64_t kLargest = 32 * (kLimbs - 3) - 1;

  void add(double x) {
    uint64_t bits;
    __builtin_memcpy(&bits, &x, 8);
    const int64_t exponent = static_cast<int64_t>((bits >> 52) & 0x7FF);
    if (exponent == 0x7FF) {
      (std::isnan(x) ? nan_ : inf_) = true;
      return;
    }
    const uint64_t mantissa = (bits & 0xFFFFFFFFFFFFFull) | (1ull << 52);
    const int64_t position = exponent - 1075 + kBias;
    if (position < 0) {
      return;
    }
    if (position > kLargest) {
      inf_ = true;
      return;
    }
    const int64_t limb = position >> 5;
    const int64_t shift = position & 31;
    const uint64_t low = (mantissa & kMask) << shift;
    const uint64_t high = (mantissa >> 32) << shift;
    limbs_[limb] += low & kMask;
    limbs_[limb + 1] += (low >> 32) + (high & kMask);
    limbs_[limb + 2] += high >> 32;
  }

  // The sum as a double: carries first, then limbs from the lowest to the highest, each addition rounded.
  double value() const {
    if (nan_ || inf_) {
      return nan_ ? __builtin_nan("") : __builtin_inf();
    }
    double sum = 0.0;
    double weight = 0x1p-352;
    uint64_t carry = 0;
    for (int64_t k = 0; k < kLimbs; ++k) {
      const uint64_t word = limbs_[k] + carry;
      sum += static_cast<double>(word & kMask) * weight;
      carry = word >> 32;
      weight *= 0x1p32;
    }
    return sum;
  }

 private:
  static constexpr uint64_t kMask = 0xFFFFFFFFull;
  uint64_t limbs_[kLimbs] = {};
  bool nan_ = false;
  bool inf_ = false;
};

}  // namespace gradkern
