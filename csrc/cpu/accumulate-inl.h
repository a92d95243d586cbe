// main_grad (+)= grad, and the chunk's sum of squares of the result while it is in L1.

// Closer than elsewhere: with the folding between, requests far ahead come in bursts that the memory drops or queues.
constexpr int64_t kAccumulateAhead = 1024;

// One whole group. The squares of the previous group, if there is one, are folded between the loads of this one: folded
// in one go, they would leave the memory idle for as long as they take. What is streamed cannot be read again without
// going to memory, so `copy`, if there is one, receives the result too.
template <class Codec, Fold kKind>
GRADKERN_INLINE void accumulate_group(float* main_grad, const typename Codec::Stored* grad, float* copy,
                                      const float* previous, GroupSums& sums) {
  for (int64_t column = 0; column < kRow; column += F32::kLanes) {
    for (int64_t row = 0; row < 8; ++row) {
      const int64_t i = column * 8 + row * F32::kLanes;
      if (i % kLine<typename Codec::Stored> == 0) {
        prefetch(grad + i, kAccumulateAhead);
      }
      F32 x = Codec::load(grad + i);
      if (kKind == Fold::kAdd) {
        prefetch(main_grad + i, kAccumulateAhead);
        x = F32::load(main_grad + i) + x;
      }
      kKind == Fold::kOverwriteStreaming ? x.stream(main_grad + i) : x.store(main_grad + i);
      if (copy != nullptr) {
        x.store(copy + i);
      }
    }
    if (previous != nullptr) {
      sums.add_columns(previous, column);
    }
  }
  if (previous != nullptr) {
    sums.finish_group();
  }
}

template <class Codec, Fold kKind, bool kFold>
inline void accumulate_chunk(float* main_grad, const void* grad, int64_t size, double* partial) {
  constexpr bool kCopies = kFold && kKind == Fold::kOverwriteStreaming;
  alignas(64) float copies[kCopies ? 2 * kGroup : 1];
  const auto* from = static_cast<const typename Codec::Stored*>(grad);
  GroupSums sums;
  const float* previous = nullptr;
  int64_t i = 0;
  for (; i + kGroup <= size; i += kGroup) {
    float* const copy = kCopies ? copies + i % (2 * kGroup) : nullptr;
    accumulate_group<Codec, kKind>(main_grad + i, from + i, copy, previous, sums);
    if (kFold) {
      previous = kCopies ? copy : main_grad + i;
    }
  }
  if (previous != nullptr) {
    sums.add_group(previous);
  }
  if (i < size) {
    constexpr Fold kTail = kKind == Fold::kAdd ? Fold::kAdd : Fold::kOverwrite;
    const int64_t rest = size - i;
    float main_tail[kGroup] = {};
    typename Codec::Stored grad_tail[kGroup] = {};
    __builtin_memcpy(grad_tail, from + i, rest * sizeof(typename Codec::Stored));
    if (kTail == Fold::kAdd) {
      __builtin_memcpy(main_tail, main_grad + i, rest * sizeof(float));
    }
    accumulate_group<Codec, kTail>(main_tail, grad_tail, nullptr, nullptr, sums);
    __builtin_memcpy(main_grad + i, main_tail, rest * sizeof(float));
    if (kFold) {
      sums.add_group(main_tail);
    }
  }
  if (kFold) {
    *partial = sums.total();
  }
}

template <class Codec, Fold kKind>
inline void accumulate_kind(float* main_grad, const void* grad, int64_t size, double* partial) {
  partial != nullptr ? accumulate_chunk<Codec, kKind, true>(main_grad, grad, size, partial)
                     : accumulate_chunk<Codec, kKind, false>(main_grad, grad, size, partial);
}

template <class Codec>
inline void accumulate_as(float* main_grad, const void* grad, int64_t size, Fold fold, double* partial) {
  if (fold == Fold::kAdd) {
    return accumulate_kind<Codec, Fold::kAdd>(main_grad, grad, size, partial);
  }
  // Streaming stores want whole vectors: a tensor that starts elsewhere is written as usual.
  if (fold == Fold::kOverwriteStreaming && reinterpret_cast<uintptr_t>(main_grad) % sizeof(F32) == 0) {
    return accumulate_kind<Codec, Fold::kOverwriteStreaming>(main_grad, grad, size, partial);
  }
  accumulate_kind<Codec, Fold::kOverwrite>(main_grad, grad, size, partial);
}

void accumulate_loop(float* main_grad, const void* grad, DType dtype, int64_t size, Fold fold, double* partial) {
  switch (dtype) {
    case DType::kFloat32:
      return accumulate_as<Float32Codec>(main_grad, grad, size, fold, partial);
    case DType::kBFloat16:
      return accumulate_as<BFloat16Codec>(main_grad, grad, size, fold, partial);
    case DType::kFloat16:
      return accumulate_as<Float16Codec>(main_grad, grad, size, fold, partial);
  }
}
