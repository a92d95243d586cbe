// main_grad (+)= grad, and the chunk's sum of squares of the result while it is in L1.

// One whole group. The squares of the previous group, if there is one, are folded between the loads of this one: folded
// in one go, they would leave the memory idle for as long as they take.
template <class Codec, bool kOverwrite>
GRADKERN_INLINE void accumulate_group(float* main_grad, const typename Codec::Stored* grad, const float* previous,
                                      double* previous_sums) {
  for (int64_t column = 0; column < kRow; column += F32::kLanes) {
    for (int64_t row = 0; row < 8; ++row) {
      const int64_t i = column * 8 + row * F32::kLanes;
      if (i % kLine<typename Codec::Stored> == 0) {
        prefetch(grad + i);
      }
      F32 x = Codec::load(grad + i);
      if (!kOverwrite) {
        prefetch(main_grad + i);
        x = F32::load(main_grad + i) + x;
      }
      x.store(main_grad + i);
    }
    if (previous != nullptr) {
      fold_columns(previous + column, previous_sums + column);
    }
  }
}

template <class Codec, bool kOverwrite, bool kFold>
inline void accumulate_chunk(float* main_grad, const void* grad, int64_t size, double* partial) {
  const auto* from = static_cast<const typename Codec::Stored*>(grad);
  double sums[kFolded];
  const float* previous = nullptr;
  int64_t count = 0;
  int64_t i = 0;
  for (; i + kGroup <= size; i += kGroup) {
    accumulate_group<Codec, kOverwrite>(main_grad + i, from + i, previous, sums + count - kRow);
    if (kFold) {
      previous = main_grad + i;
      count += kRow;
    }
  }
  if (previous != nullptr) {
    fold_group(previous, sums + count - kRow);
  }
  if (i < size) {
    const int64_t rest = size - i;
    float main_tail[kGroup] = {};
    typename Codec::Stored grad_tail[kGroup] = {};
    __builtin_memcpy(grad_tail, from + i, rest * sizeof(typename Codec::Stored));
    if (!kOverwrite) {
      __builtin_memcpy(main_tail, main_grad + i, rest * sizeof(float));
    }
    accumulate_group<Codec, kOverwrite>(main_tail, grad_tail, nullptr, nullptr);
    __builtin_memcpy(main_grad + i, main_tail, rest * sizeof(float));
    if (kFold) {
      fold_group(main_tail, sums + count);
      count += kRow;
    }
  }
  if (kFold) {
    *partial = size > 0 ? fold_sums<kFolded / 2>(sums, count) : 0.0;
  }
}

template <class Codec>
inline void accumulate_as(float* main_grad, const void* grad, int64_t size, bool overwrite, double* partial) {
  if (overwrite) {
    partial != nullptr ? accumulate_chunk<Codec, true, true>(main_grad, grad, size, partial)
                       : accumulate_chunk<Codec, true, false>(main_grad, grad, size, partial);
  } else {
    partial != nullptr ? accumulate_chunk<Codec, false, true>(main_grad, grad, size, partial)
                       : accumulate_chunk<Codec, false, false>(main_grad, grad, size, partial);
  }
}

void accumulate_loop(float* main_grad, const void* grad, DType dtype, int64_t size, bool overwrite, double* partial) {
  switch (dtype) {
    case DType::kFloat32:
      return accumulate_as<Float32Codec>(main_grad, grad, size, overwrite, partial);
    case DType::kBFloat16:
      return accumulate_as<BFloat16Codec>(main_grad, grad, size, overwrite, partial);
    case DType::kFloat16:
      return accumulate_as<Float16Codec>(main_grad, grad, size, overwrite, partial);
  }
}
