// Gradients to signed 8-bit blocks and back (state_codec-inl.h), a chunk at a time.

// As Block8<true>::encode, with magnitudes cut to 127: nothing finite may round to infinity.
GRADKERN_INLINE U32 stash_code(F32 x, U32 base, U32 words) {
  constexpr int kShift = Block8<true>::kShift;
  const U32 bits = U32::of(x).unless_nan(x, U32::all(0x7FC00000u));
  const U32 magnitude = bits & U32::all(0x7FFFFFFFu);
  const U32 code = (magnitude + words.template shr<32 - kShift>()).template shr<kShift>() - base;
  return U32::minimum(U32::maximum(code, U32::all(0)), U32::all(127)).signed_as(bits);
}

// One block; returns its exponent.
GRADKERN_INLINE uint8_t stash_block(const float* x, uint32_t key, uint32_t offset, uint32_t infinity, uint8_t* codes) {
  U32 most = U32::all(0);
  for (int64_t i = 0; i < kStateBlock; i += F32::kLanes) {
    const F32 value = F32::load(x + i);
    most = U32::maximum(most, U32::of(value).unless_nan(value, U32::all(0x7FC00000u)) & U32::all(0x7FFFFFFFu));
  }
  const uint32_t exponent = Block8<true>::exponent(most.largest(), infinity);
  const U32 base = Block8<true>::base(exponent);
  for (int64_t i = 0; i < kStateBlock; i += 4 * F32::kLanes) {
    U32 code[4];
    for (int64_t j = 0; j < 4; ++j) {
      const int64_t at = i + j * F32::kLanes;
      code[j] = stash_code(F32::load(x + at), base, random_words(key, offset + static_cast<uint32_t>(at)));
    }
    U32::store4_s8(codes + i, code[0], code[1], code[2], code[3]);
  }
  return static_cast<uint8_t>(exponent);
}

template <class Codec>
inline double stash_chunk(const void* grad, int64_t offset, int64_t size, uint32_t key, uint8_t* codes,
                          uint8_t* exponents, uint32_t infinity) {
  const auto* from = static_cast<const typename Codec::Stored*>(grad);
  GroupSums sums;
  alignas(64) float group[kGroup];
  for (int64_t i = 0; i < size; i += kGroup) {
    const int64_t rest = size - i < kGroup ? size - i : kGroup;
    if (rest < kGroup) {
      __builtin_memset(group, 0, sizeof(group));
    }
    decode<Codec>(from + i, rest, group);
    sums.add_group(group);
    for (int64_t j = 0; j < rest; j += kStateBlock) {
      const uint32_t at = static_cast<uint32_t>(offset + i + j);
      uint8_t* const to = codes + i + j;
      uint8_t tail[kStateBlock];
      const bool whole = rest - j >= kStateBlock;
      exponents[(i + j) / kStateBlock] = stash_block(group + j, key, at, infinity, whole ? to : tail);
      if (!whole) {
        __builtin_memcpy(to, tail, rest - j);
      }
    }
  }
  return sums.total();
}

double stash_loop(const void* grad, DType dtype, int64_t offset, int64_t size, uint32_t key, uint8_t* codes,
                  uint8_t* exponents) {
  switch (dtype) {
    case DType::kFloat32:
      return stash_chunk<Float32Codec>(grad, offset, size, key, codes, exponents, 255u);
    case DType::kBFloat16:
      return stash_chunk<BFloat16Codec>(grad, offset, size, key, codes, exponents, 255u);
    case DType::kFloat16:
      return stash_chunk<Float16Codec>(grad, offset, size, key, codes, exponents, 143u);  // 2^16 is beyond fp16
  }
  return 0.0;
}

void unstash_loop(void* grad, DType dtype, int64_t size, const uint8_t* codes, const uint8_t* exponents,
                  float multiplier) {
  alignas(64) float values[kStateBlock];
  for (int64_t i = 0; i < size; i += kStateBlock) {
    const int64_t rest = size - i < kStateBlock ? size - i : kStateBlock;
    const uint8_t* from = codes + i;
    uint8_t tail[kStateBlock] = {};
    if (rest < kStateBlock) {
      __builtin_memcpy(tail, from, rest);
      from = tail;
    }
    const U32 base = Block8<true>::base(exponents[i / kStateBlock]);
    for (int64_t j = 0; j < kStateBlock; j += F32::kLanes) {
      (Block8<true>::load(from + j, base) * F32::all(multiplier)).store(values + j);
    }
    encode(dtype, values, rest, static_cast<unsigned char*>(grad) + i * item_size(dtype));
  }
}
