// The sum of squares of one chunk as a fixed tree, so that its bits depend on nothing but the numbers.
//
// The chunk, padded with zeros, is 8 groups of 8 rows of 64. Inside a group the 8 rows are folded in halves
// (4 + 4, 2 + 2, 1 + 1) to 64 sums; the 512 sums of the chunk are folded in halves down to one. Squares are exact in
// double and never negative, so padding with zeros changes no bit and absent groups may be skipped.

constexpr int64_t kRow = 64;
constexpr int64_t kFolded = kChunk / kGroup * kRow;

// Folds the 8 rows of kLanes neighbouring columns to `sums[0..kLanes)`.
GRADKERN_INLINE void fold_columns(const float* x, double* sums) {
  const Squares s0 = Squares(x).plus_square(x + 4 * kRow);
  const Squares s1 = Squares(x + kRow).plus_square(x + 5 * kRow);
  const Squares s2 = Squares(x + 2 * kRow).plus_square(x + 6 * kRow);
  const Squares s3 = Squares(x + 3 * kRow).plus_square(x + 7 * kRow);
  ((s0 + s2) + (s1 + s3)).store(sums);
}

// Folds the 8 rows of a group to `sums[0..64)`.
GRADKERN_INLINE void fold_group(const float* group, double* sums) {
  for (int64_t column = 0; column < kRow; column += F32::kLanes) {
    fold_columns(group + column, sums + column);
  }
}

// Folds the first `count` of 2 kHalf sums, the rest being zero, in halves down to one. Destroys `sums`.
template <int64_t kHalf>
inline double fold_sums(double* __restrict sums, int64_t count) {
  if (count == 2 * kHalf) {
    for (int64_t i = 0; i < kHalf; ++i) {  // a constant bound: whole vectors, no checks
      sums[i] += sums[i + kHalf];
    }
    count = kHalf;
  } else if (count > kHalf) {
    for (int64_t i = kHalf; i < count; ++i) {
      sums[i - kHalf] += sums[i];
    }
    count = kHalf;
  }
  if constexpr (kHalf > 1) {
    return fold_sums<kHalf / 2>(sums, count);
  } else {
    return sums[0];
  }
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
        prefetch(from + i + j);
        Codec::load(from + i + j).store(group + j);
      }
    } else {
      __builtin_memset(group, 0, sizeof(group));
      decode<Codec>(from + i, size - i, group);
    }
    fold_group(group, sums + count);
  }
  return size > 0 ? fold_sums<kFolded / 2>(sums, count) : 0.0;
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
