// Parameters of 16 bits with and without the bits that they lack. With a master the parameter is the fp32 value rounded
// to nearest, ties away from zero: then value minus parameter always fits 16 signed bits, and nothing is lost.

GRADKERN_INLINE U32 number_bits(F32 x) { return U32::of(x).unless_nan(x, U32::all(0x7FC00000u)); }

template <ParamCodec kCodec>
inline void decode_param(const void* param, const void* remainder, int64_t padded, float* out) {
  const auto* high = static_cast<const uint16_t*>(param);
  for (int64_t i = 0; i < padded; i += F32::kLanes) {
    prefetch(high + i);
    const U32 shifted = U32::load_u16(high + i).shl<16>();
    if (kCodec == ParamCodec::kBFloat16Split16) {
      const auto* low = static_cast<const uint16_t*>(remainder);
      (shifted + U32::load_u16(low + i).shl<16>().sar<16>()).as_float().store(out + i);
    } else {
      const auto* low = static_cast<const uint8_t*>(remainder);
      (shifted + U32::load_u8(low + i).shl<24>().sar<16>()).as_float().store(out + i);
    }
  }
}

template <ParamCodec kCodec>
inline void encode_param(const float* x, int64_t padded, uint32_t key, uint32_t offset, void* param, void* remainder) {
  auto* high = static_cast<uint16_t*>(param);
  for (int64_t i = 0; i < padded; i += F32::kLanes) {
    U32 bits = number_bits(F32::load(x + i));
    if (kCodec == ParamCodec::kBFloat16Stochastic) {
      const U32 random = next_words(random_words(key, offset + static_cast<uint32_t>(i))).shr<16>();
      // Adding to the bits of a NaN would make a number of it.
      const U32 is_nan = (bits & U32::all(0x7FFFFFFFu)) - U32::all(0x7FC00000u);
      const U32 sum = (bits + random).shr<16>();
      (sum.where_nonzero(is_nan) | U32::all(0x7FC0u).where_nonzero(U32::all(1).where_nonzero(is_nan) ^ U32::all(1)))
          .store_u16(high + i);
      continue;
    }
    if (kCodec == ParamCodec::kBFloat16Split16) {
      bits.store_u16(static_cast<uint16_t*>(remainder) + i);
    } else if (kCodec == ParamCodec::kBFloat16Split8) {
      // Rounded to 24 bits first, ties to even.
      const U32 kept = (bits + U32::all(0x7Fu) + (bits.shr<8>() & U32::all(1))).shr<8>();
      kept.store_u8(static_cast<uint8_t*>(remainder) + i);
      bits = kept.shl<8>();
    }
    (bits + U32::all(0x8000u)).shr<16>().store_u16(high + i);
  }
}
