// One step of one parameter as gradkern.rollback._conservation follows it, and its preconditioner made small.

GRADKERN_INLINE uint16_t bf16_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return 0x7fc0;
  }
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Momentum and delta of `size` elements; their preconditioners to `preconditioners`.
GRADKERN_INLINE void shadow_elements(const ShadowStep& step, int64_t at, int64_t size, float* preconditioners) {
  const float momentum = step.momentum, weight = step.weight, decay = step.decay, step_size = step.step_size;
  float* __restrict const p = preconditioners;
  float* __restrict const m = step.momenta + at;
  float* __restrict const d = step.deltas + at;
  if (step.second_moment != nullptr) {
    const float* __restrict const v = step.second_moment + at;
    const float root_scale = step.root_scale, eps = step.eps;
    for (int64_t i = 0; i < size; ++i) {
      p[i] = (1.0f / (__builtin_sqrtf(v[i]) * root_scale + eps)) * step_size;
    }
  } else {
    for (int64_t i = 0; i < size; ++i) {
      p[i] = step_size;
    }
  }
  if (step.gradient != nullptr) {
    const float* __restrict const g = step.gradient + at;
    for (int64_t i = 0; i < size; ++i) {
      m[i] = m[i] * momentum + g[i] * weight;
    }
  } else {
    for (int64_t i = 0; i < size; ++i) {
      m[i] = m[i] * momentum;
    }
  }
  for (int64_t i = 0; i < size; ++i) {
    d[i] = d[i] * decay - p[i] * m[i];
  }
}

// A matrix: means over columns and over rows of 1 / P squared. Rows are added in pairs, pairs in pairs, and so on.
// scratch: two rows, and one for every level of pairs.
inline void shadow_matrix(const ShadowStep& step) {
  const int64_t columns = step.columns;
  float* __restrict const inverse = step.scratch;
  float* __restrict const sums = inverse + columns;
  float* const levels = sums + columns;
  const auto width = static_cast<float>(columns), height = static_cast<float>(step.rows);
  for (int64_t row = 0; row < step.rows; ++row) {
    shadow_elements(step, row * columns, columns, inverse);
    for (int64_t i = 0; i < columns; ++i) {
      inverse[i] = 1.0f / inverse[i];
    }
    step.smoothed[row] = bf16_of(lanes_dot(inverse, inverse, columns) / width);
    for (int64_t i = 0; i < columns; ++i) {
      sums[i] = inverse[i] * inverse[i];
    }
    int64_t level = 0;
    for (int64_t number = row; number & 1; number >>= 1, ++level) {
      const float* const earlier = levels + level * columns;
      for (int64_t i = 0; i < columns; ++i) {
        sums[i] = earlier[i] + sums[i];
      }
    }
    __builtin_memcpy(levels + level * columns, sums, static_cast<size_t>(columns) * sizeof(float));
  }
  // What is left, as if zeros followed to the next power of two.
  bool is_first = true;
  for (int64_t level = 0; (step.rows >> level) != 0; ++level) {
    if (((step.rows >> level) & 1) == 0) {
      continue;
    }
    const float* const part = levels + level * columns;
    for (int64_t i = 0; i < columns; ++i) {
      sums[i] = is_first ? part[i] : part[i] + sums[i];
    }
    is_first = false;
  }
  for (int64_t i = 0; i < columns; ++i) {
    step.smoothed[step.rows + i] = bf16_of(sums[i] / height);
  }
}

// A vector: the preconditioner itself; and the sums of squares of the gradient, and of the preconditioner where the
// momentum is not zero. scratch: two rows.
inline void shadow_vector(const ShadowStep& step) {
  const int64_t size = step.columns;
  float* const preconditioners = step.scratch;
  float* const moving = preconditioners + size;
  shadow_elements(step, 0, size, preconditioners);
  for (int64_t i = 0; i < size; ++i) {
    step.smoothed[i] = bf16_of(preconditioners[i]);
    moving[i] = step.momenta[i] != 0.0f ? preconditioners[i] : 0.0f;
  }
  step.squares[0] = step.gradient == nullptr ? 0.0 : lanes_dot_wide(step.gradient, step.gradient, size);
  step.squares[1] = lanes_dot_wide(moving, moving, size);
}

void shadow_step_loop(const ShadowStep& step) {
  if (step.rows > 0) {
    shadow_matrix(step);
  } else {
    shadow_vector(step);
  }
}
