// Of one chunk, the sum of magnitudes in the tree of sumsq-inl.h, or the largest magnitude. The loops are plain: every
// instruction set's compiler widens them, and elementwise additions have the same bits at any width.

inline double abs_sum(const float* values, int64_t groups) {
  double sums[kFolded];
  for (int64_t i = 0; i < groups; ++i) {
    const float* x = values + i * kGroup;
    double* to = sums + i * kRow;
    for (int64_t c = 0; c < kRow; ++c) {
      double row[8];
      for (int64_t r = 0; r < 8; ++r) {
        row[r] = __builtin_fabs(static_cast<double>(x[r * kRow + c]));
      }
      to[c] = ((row[0] + row[4]) + (row[2] + row[6])) + ((row[1] + row[5]) + (row[3] + row[7]));
    }
  }
  return fold_sums<kFolded / 2>(sums, groups * kRow);
}

// Magnitudes order like their bits, a NaN above infinity: the largest bits are a NaN if there is one.
inline double abs_max(const float* values, int64_t size) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t bits = magnitude_bits(values + i);
    largest = bits > largest ? bits : largest;
  }
  float x;
  __builtin_memcpy(&x, &largest, 4);
  return static_cast<double>(x);
}

double abs_norm_loop(DType dtype, const void* src, int64_t size, bool maximum) {
  if (size == 0) {
    return 0.0;
  }
  alignas(64) float decoded[kChunk];
  const auto* values = static_cast<const float*>(src);
  const int64_t groups = (size + kGroup - 1) / kGroup;
  if (dtype != DType::kFloat32 || size % kGroup != 0) {
    if (size % kGroup != 0) {
      __builtin_memset(decoded + (groups - 1) * kGroup, 0, kGroup * sizeof(float));
    }
    decode(dtype, src, size, decoded);
    values = decoded;
  }
  return maximum ? abs_max(values, size) : abs_sum(values, groups);
}
