// A sum of squares that rounds nowhere: the words that the loops of sumsq_exact add to, and their carries.
#pragma once

#include <cstdint>

#include "step_scalars.h"

namespace gradkern {

// The limbs of an ExactSum, then how many values were infinite and how many were NaN. Words are signed and may hold
// carries, so that adding is one integer addition a word, in any order.
struct ExactSquares {
  static constexpr int64_t kLimbs = ExactSum::kLimbs;
  static constexpr int64_t kWords = kLimbs + 2;
  static_assert(kLimbs == 22 && ExactSum::kBias == 352, "the loops and the other backends count on this layout");

  int64_t words[kWords] = {};

  void add(const ExactSquares& other) {
    for (int64_t k = 0; k < kWords; ++k) {
      words[k] += other.words[k];
    }
  }

  // Brings every limb but the last below 2^32: equal sums have equal words then.
  void carry() {
    for (int64_t k = 0; k + 1 < kLimbs; ++k) {
      words[k + 1] += words[k] >> 32;
      words[k] &= 0xFFFFFFFF;
    }
  }
};

}  // namespace gradkern
