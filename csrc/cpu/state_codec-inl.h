// Optimizer state in 8 bits: in every block of 64 elements one byte holds the exponent of the largest, and an element
// one code relative to it: sign, 4 exponent and 3 mantissa bits where the state has a sign (`exp_avg`), 4 and 4 where
// it has none (`exp_avg_sq`). Codes are cut out of the bits of the fp32 number, so there is neither a root nor a
// division, and rounding is stochastic: an average that moves by a thousandth a step would never leave its code
// otherwise.

template <bool kSigned>
struct Block8 {
  static constexpr int kMantissaBits = kSigned ? 3 : 4;
  static constexpr int kShift = 23 - kMantissaBits;
  static constexpr uint32_t kLargest = kSigned ? 127u : 255u;

  // Code 0 stands for zero, code k for the bits (k + base) << kShift.
  static GRADKERN_INLINE U32 base(uint8_t exponent) {
    return U32::all((exponent < 15u ? 0u : exponent - 15u) << kMantissaBits);
  }

  static GRADKERN_INLINE F32 decode(U32 code, U32 base) {
    if (kSigned) {
      const U32 magnitude = code & U32::all(0x7Fu);
      const U32 bits = (magnitude + base).template shl<kShift>().where_nonzero(magnitude);
      return (bits | (code & U32::all(0x80u)).template shl<24>()).as_float();
    }
    return (code + base).template shl<kShift>().where_nonzero(code).as_float();
  }

  // `random` holds 16 bits in every lane.
  static GRADKERN_INLINE U32 encode(F32 x, U32 base, U32 random) {
    const U32 bits = U32::of(x).unless_nan(x, U32::all(0x7FC00000u));
    const U32 magnitude = bits & U32::all(0x7FFFFFFFu);
    const U32 rounded = (magnitude + random.template shl<kShift - 16>()).template shr<kShift>() - base;
    const U32 code = U32::minimum(rounded, U32::all(kLargest));
    if (kSigned) {
      return U32::maximum(code, U32::all(0)) | (bits.template shr<24>() & U32::all(0x80u));
    }
    // What is not zero never becomes zero: the step divides by it.
    return U32::maximum(code, U32::all(1u).where_nonzero(magnitude));
  }
};

template <bool kSigned>
inline void decode_block8(const uint8_t* codes, const uint8_t* exponents, int64_t padded, float* out) {
  for (int64_t block = 0; block < padded; block += kStateBlock) {
    const U32 base = Block8<kSigned>::base(exponents[block / kStateBlock]);
    const int64_t end = padded - block < kStateBlock ? padded : block + kStateBlock;
    for (int64_t i = block; i < end; i += F32::kLanes) {
      prefetch(codes + i);
      Block8<kSigned>::decode(U32::load_u8(codes + i), base).store(out + i);
    }
  }
}

// kHalf: which 16 bits of an element's word are this state's.
template <bool kSigned, int kHalf>
inline void encode_block8(const float* x, int64_t padded, uint32_t key, uint32_t offset, uint8_t* codes,
                          uint8_t* exponents) {
  for (int64_t block = 0; block < padded; block += kStateBlock) {
    const int64_t end = padded - block < kStateBlock ? padded : block + kStateBlock;
    U32 largest = U32::all(0);
    for (int64_t i = block; i < end; i += F32::kLanes) {
      largest = U32::maximum(largest, U32::of(F32::load(x + i)) & U32::all(0x7FFFFFFFu));
    }
    const auto exponent = static_cast<uint8_t>(largest.largest() >> 23);
    exponents[block / kStateBlock] = exponent;
    const U32 base = Block8<kSigned>::base(exponent);
    for (int64_t i = block; i < end; i += F32::kLanes) {
      const U32 words = random_words(key, offset + static_cast<uint32_t>(i));
      const U32 random = kHalf == 0 ? words & U32::all(0xFFFFu) : words.shr<16>();
      Block8<kSigned>::encode(F32::load(x + i), base, random).store_u8(codes + i);
    }
  }
}
