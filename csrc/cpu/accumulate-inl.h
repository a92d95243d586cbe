// main_grad (+)= grad, and the chunk's sum of squares of the result from the same registers.

// One whole group. kFold: also fold its squares into 64 sums.
template <class Codec, bool kOverwrite, bool kFold>
GRADKERN_INLINE void accumulate_group(float* main_grad, const typename Codec::Stored* grad, double* sums) {
  for (int64_t l = 0; l < kRow; l += F32::kLanes) {
    F32 x[8];
    for (int64_t row = 0; row < 8; ++row) {
      const int64_t i = row * kRow + l;
      const F32 g = Codec::load(grad + i);
      x[row] = kOverwrite ? g : F32::load(main_grad + i) + g;
      x[row].store(main_grad + i);
    }
    if (kFold) {
      const Squares s0 = Squares(x[0]) + Squares(x[4]);
      const Squares s1 = Squares(x[1]) + Squares(x[5]);
      const Squares s2 = Squares(x[2]) + Squares(x[6]);
      const Squares s3 = Squares(x[3]) + Squares(x[7]);
      ((s0 + s2) + (s1 + s3)).store(sums + l);
    }
  }
}

template <class Codec, bool kOverwrite, bool kFold>
inline void accumulate_chunk(float* main_grad, const void* grad, int64_t size, double* partial) {
  const auto* from = static_cast<const typename Codec::Stored*>(grad);
  double sums[kFold ? kFolded : kRow];
  int64_t count = 0;
  int64_t i = 0;
  for (; i + kGroup <= size; i += kGroup, count += kFold ? kRow : 0) {
    accumulate_group<Codec, kOverwrite, kFold>(main_grad + i, from + i, sums + count);
  }
  if (i < size) {
    const int64_t rest = size - i;
    float main_tail[kGroup] = {};
    typename Codec::Stored grad_tail[kGroup] = {};
    __builtin_memcpy(grad_tail, from + i, rest * sizeof(typename Codec::Stored));
    if (!kOverwrite) {
      __builtin_memcpy(main_tail, main_grad + i, rest * sizeof(float));
    }
    accumulate_group<Codec, kOverwrite, kFold>(main_tail, grad_tail, sums + count);
    __builtin_memcpy(main_grad + i, main_tail, rest * sizeof(float));
    count += kFold ? kRow : 0;
  }
  if (kFold) {
    *partial = size > 0 ? fold_sums(sums, count) : 0.0;
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
