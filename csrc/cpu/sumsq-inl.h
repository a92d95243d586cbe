// The sum of squares of one chunk as a fixed tree, so that its bits depend on nothing but the numbers.
//
// The chunk, padded with zeros, is 8 groups of 8 rows of 64. Inside a group the 8 rows are folded in halves
// (4 + 4, 2 + 2, 1 + 1) to 64 sums; the 512 sums of the chunk are folded in halves down to one. Squares are exact in
// double and never negative, so padding with zeros changes no bit and absent groups may be skipped.

constexpr int64_t kRow = 64;
constexpr int64_t kFolded = kChunk / kGroup * kRow;

// Folds the 8 rows of kLanes neighbouring columns.
GRADKERN_INLINE Squares fold_columns(const float* x) {
  const Squares s0 = Squares(x).plus_square(x + 4 * kRow);
  const Squares s1 = Squares(x + kRow).plus_square(x + 5 * kRow);
  const Squares s2 = Squares(x + 2 * kRow).plus_square(x + 6 * kRow);
  const Squares s3 = Squares(x + 3 * kRow).plus_square(x + 7 * kRow);
  return (s0 + s2) + (s1 + s3);
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

// The folded groups of a chunk. A group joins those before it as soon as the tree pairs them, from its registers: group
// 6, for one, is added to group 2 and their sum to that of groups 0 and 4.
class GroupSums {
 public:
  // Takes kLanes columns of the next group; when it has all of them, finish_group().
  GRADKERN_INLINE void add_columns(const float* group, int64_t column) {
    Squares s = fold_columns(group + column);
    double* to = sums_ + column + (groups_ & 3) * kRow;
    if (groups_ >= 4) {
      s = Squares::load(to) + s;
    }
    if (groups_ >= 6) {
      to = sums_ + column + (groups_ & 1) * kRow;
      s = Squares::load(to) + s;
    }
    if (groups_ == 7) {
      to = sums_ + column;
      s = Squares::load(to) + s;
    }
    s.store(to);
  }

  GRADKERN_INLINE void finish_group() { ++groups_; }

  void add_group(const float* group) {
    for (int64_t column = 0; column < kRow; column += F32::kLanes) {
      add_columns(group, column);
    }
    finish_group();
  }

  // The sum of the chunk; to be asked for once.
  double total() {
    if (groups_ == 0) {
      return 0.0;
    }
    // What is left of the tree over groups where the last ones are absent.
    if (groups_ > 3 && groups_ < 8) {
      add_row(1, 3);
    }
    if (groups_ > 2 && groups_ < 7) {
      add_row(0, 2);
    }
    if (groups_ > 1 && groups_ < 8) {
      add_row(0, 1);
    }
    return fold_sums<kRow / 2>(sums_, kRow);
  }

 private:
  GRADKERN_INLINE void add_row(int64_t to, int64_t from) {
    for (int64_t i = 0; i < kRow; i += F32::kLanes) {
      double* const sums = sums_ + to * kRow + i;
      (Squares::load(sums) + Squares::load(sums_ + from * kRow + i)).store(sums);
    }
  }

  alignas(64) double sums_[kFolded / 2];
  int64_t groups_ = 0;
};

template <class Codec>
inline double sumsq_chunk(const void* src, int64_t size) {
  const auto* from = static_cast<const typename Codec::Stored*>(src);
  GroupSums sums;
  alignas(64) float group[kGroup];
  for (int64_t i = 0; i < size; i += kGroup) {
    if (size - i >= kGroup) {
      for (int64_t j = 0; j < kGroup; j += F32::kLanes) {
        prefetch(from + i + j);
        Codec::load(from + i + j).store(group + j);
      }
    } else {
      __builtin_memset(group, 0, sizeof(group));
      decode<Codec>(from + i, size - i, group);
    }
    sums.add_group(group);
  }
  return sums.total();
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
