// Optimizer state in 8 bits: in every block of 64 elements one byte holds the exponent of the largest, and an element
// one code relative to it: sign, 4 exponent and 3 mantissa bits where the state has a sign (`exp_avg`), 4 and 4 where
// it has none (`exp_avg_sq`). Codes are cut out of the bits of the fp32 number, so there is neither a root nor a
// division, and rounding is stochastic: an average that moves by a thousandth a step would never leave its code
// otherwise.

template <bool kSigned>
struct Block8 {
  static constexpr int kMantissaBits = kSigned ? 3 : 4;
  static constexpr int kShift = 23 - kMantissaBits;

  // Code k stands for the bits (k + base) << kShift. With a sign codes are negated, and code 0 is zero.
  static GRADKERN_INLINE U32 base(uint32_t exponent) {
    return U32::all((exponent < 15u ? 0u : exponent - 15u) << kMantissaBits);
  }

  // Exponent of a block whose largest magnitude has these bits: the next one where that number may be rounded up to it.
  // Cut at the power of two, an average that grows slowly would never pass it. Nothing finite gets that of infinity,
  // which is where the numbers of the dtype end.
  static GRADKERN_INLINE uint32_t exponent(uint32_t largest, uint32_t infinity = 255u) {
    const uint32_t rounded = (largest + ((1u << kShift) - 1u)) >> 23;
    return rounded < infinity ? rounded : largest >> 23;
  }

  static GRADKERN_INLINE F32 load(const uint8_t* codes, U32 base) {
    if (kSigned) {
      const U32 code = U32::load_s8(codes);
      const U32 magnitude = code.magnitude();
      const U32 bits = (magnitude + base).template shl<kShift>().where_nonzero(magnitude);
      return (bits | (code & U32::all(0x80000000u))).as_float();
    }
    return (U32::load_u8(codes) + base).template shl<kShift>().as_float();
  }

  // A code yet to be cut to 8 bits; the highest of the stirred bits decide how it is rounded. A block with a number
  // that is not finite has exponent 255; then kFinite must be false.
  template <bool kFinite>
  static GRADKERN_INLINE U32 encode(F32 x, U32 base, U32 stirred) {
    U32 bits = U32::of(x);
    if (!kFinite) {
      bits = bits.unless_nan(x, U32::all(0x7FC00000u));
    }
    const U32 random = stirred.template shr<32 - kShift>();
    if (kSigned) {
      const U32 magnitude = bits & U32::all(0x7FFFFFFFu);
      const U32 code = (magnitude + random).template shr<kShift>() - base;  // of zero: at most zero
      return U32::maximum(code, U32::all(0)).signed_as(bits);
    }
    return (bits + random).template shr<kShift>() - base;
  }
};

// Random bits for all states of an element: those of the first state's number under the step's key, stirred once. One
// multiplication where a word of the counter takes two and a counter: the low bits of a fresh average are as good as
// random, and where they repeat, the key does not.
template <bool kFinite>
GRADKERN_INLINE U32 stirred_bits(F32 x, U32 key) {
  U32 bits = U32::of(x);
  if (!kFinite) {
    bits = bits.unless_nan(x, U32::all(0x7FC00000u));
  }
  return (bits ^ key) * U32::all(kMix1);
}

// Codes of four vectors.
template <bool kSigned, bool kFinite>
GRADKERN_INLINE void encode_four(const float* x, U32 base, const U32* stirred, uint8_t* codes) {
  U32 code[4];
  for (int i = 0; i < 4; ++i) {
    code[i] = Block8<kSigned>::template encode<kFinite>(F32::load(x + i * F32::kLanes), base, stirred[i]);
  }
  kSigned ? U32::store4_s8(codes, code[0], code[1], code[2], code[3])
          : U32::store4_u8(codes, code[0], code[1], code[2], code[3]);
}
