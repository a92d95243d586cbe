// The sum of squares of one chunk as a fixed tree, so that its bits depend on nothing but the numbers.
//
// The chunk, padded with zeros, is 8 groups of 8 rows of 64. Inside a group the 8 rows are folded in halves
// (4 + 4, 2 + 2, 1 + 1) to 64 sums; the 512 sums of the chunk are folded in halves down to one. Squares are exact in
// double and never negative, so padding with zeros changes no bit and absent groups may be skipped.

constexpr int64_t kRow = 64;
constexpr int64_t kFolded = kChunk / kGroup * kRow;

// Folds the 8 rows of a group to `sums[0..64)`.
GRADKERN_INLINE void fold_group(const float* group, double* sums) {
  for (int64_t l = 0; l < kRow; l += F32::kLanes) {
    const float* x = group + l;
#define GRADKERN_SQ(row) Squares(F32::load(x + (row) * kRow))
    const Squares s0 = GRADKERN_SQ(0) + GRADKERN_SQ(4);
    const Squares s1 = GRADKERN_SQ(1) + GRADKERN_SQ(5);
    const Squares s2 = GRADKERN_SQ(2) + GRADKERN_SQ(6);
    const Squares s3 = GRADKERN_SQ(3) + GRADKERN_SQ(7);
#undef GRADKERN_SQ
    ((s0 + s2) + (s1 + s3)).store(sums + l);
  }
}

// sums[0..count) += sums[half..half+count), which never overlap.
inline void fold_half(double* __restrict low, const double* __restrict high, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    low[i] += high[i];
  }
}

// Folds the first `count` of 512 sums, the rest being zero; count is a multiple of 64. Destroys `sums`.
inline double fold_sums(double* sums, int64_t count) {
  for (int64_t half = kFolded / 2; half >= 1; half /= 2) {
    if (count > half) {
      fold_half(sums, sums + half, count - half);
      count = half;
    }
  }
  return sums[0];
}

template <class Codec>
inline double sumsq_chunk(const void* src, int64_t size) {
  const auto* from = static_cast<const typename Codec::Stored*>(src);
  double sums[kFolded];
  float group[kGroup];
  int64_t count = 0;
  for (int64_t i = 0; i < size; i += kGroup, count += kRow) {
    if (size - i >= kGroup) {
      for (int64_t j = 0; j < kGroup; j += F32::kLanes) {
        Codec::load(from + i + j).store(group + j);
      }
    } else {
      __builtin_memset(group, 0, sizeof(group));
      decode<Codec>(from + i, size - i, group);
    }
    fold_group(group, sums + count);
  }
  return size > 0 ? fold_sums(sums, count) : 0.0;
}

double sumsq_loop(DType dtype, const void* src, int64_t size) {
  switch (dtype) {
    case DType::kFloat32:
      return sumsq_chunk<Float32Codec>(src, size);
    case DType::kBFloat16:
      return sumsq_chunk<BFloat16Codec>(src, size);
    case DType::kFloat16:
      return sumsq_chunk<Float16Codec>(src, size);
  }
  return 0.0;
}
