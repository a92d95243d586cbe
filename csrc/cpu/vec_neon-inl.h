// Four lanes of Arm NEON (AArch64). Arm has FMA in its baseline: -ffp-contract=off keeps the compiler from using it.
#define GRADKERN_INLINE __attribute__((always_inline)) inline

struct F32 {
  static constexpr int64_t kLanes = 4;
  float32x4_t v;

  static GRADKERN_INLINE F32 all(float x) { return {vdupq_n_f32(x)}; }
  static GRADKERN_INLINE F32 load(const float* p) { return {vld1q_f32(p)}; }
  GRADKERN_INLINE void store(float* p) const { vst1q_f32(p, v); }
  GRADKERN_INLINE void stream(float* p) const { vst1q_f32(p, v); }

  static GRADKERN_INLINE F32 load_bf16(const uint16_t* p) {
    return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16))};
  }

  GRADKERN_INLINE void store_bf16(uint16_t* p) const {
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t lsb = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t half = vshrq_n_u32(vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7FFF)), lsb), 16);
    vst1_u16(p, vmovn_u32(vbslq_u32(vceqq_f32(v, v), half, vdupq_n_u32(0x7FC0))));
  }

  static GRADKERN_INLINE F32 load_f16(const uint16_t* p) { return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)))}; }

  GRADKERN_INLINE void store_f16(uint16_t* p) const { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }

  GRADKERN_INLINE F32 operator+(F32 o) const { return {vaddq_f32(v, o.v)}; }
  GRADKERN_INLINE F32 operator-(F32 o) const { return {vsubq_f32(v, o.v)}; }
  GRADKERN_INLINE F32 operator*(F32 o) const { return {vmulq_f32(v, o.v)}; }
  GRADKERN_INLINE F32 operator/(F32 o) const { return {vdivq_f32(v, o.v)}; }
  static GRADKERN_INLINE F32 sqrt(F32 x) { return {vsqrtq_f32(x.v)}; }
  static GRADKERN_INLINE F32 maximum(F32 a, F32 b) { return {vmaxq_f32(a.v, b.v)}; }  // FMAX propagates NaN
  static GRADKERN_INLINE F32 minimum(F32 a, F32 b) { return {vminq_f32(a.v, b.v)}; }  // FMIN propagates NaN
  // 1 or -1; zero and NaN stay what they are.
  static GRADKERN_INLINE F32 sign(F32 x) {
    const uint32x4_t one = vorrq_u32(vandq_u32(vreinterpretq_u32_f32(x.v), vdupq_n_u32(0x80000000u)),
                                     vreinterpretq_u32_f32(vdupq_n_f32(1.0f)));
    const uint32x4_t signed_number = vorrq_u32(vcltzq_f32(x.v), vcgtzq_f32(x.v));
    return {vbslq_f32(signed_number, vreinterpretq_f32_u32(one), x.v)};
  }
};

// Lanes of 32 bits, for what is done to the bits of numbers: rounding, codes, random words.
struct U32 {
  uint32x4_t v;

  static GRADKERN_INLINE U32 all(uint32_t x) { return {vdupq_n_u32(x)}; }
  static GRADKERN_INLINE U32 lane_numbers() { return {uint32x4_t{0, 1, 2, 3}}; }
  static GRADKERN_INLINE U32 of(F32 x) { return {vreinterpretq_u32_f32(x.v)}; }
  GRADKERN_INLINE F32 as_float() const { return {vreinterpretq_f32_u32(v)}; }
  static GRADKERN_INLINE U32 load_u8(const uint8_t* p) {
    uint32_t four;
    __builtin_memcpy(&four, p, 4);
    return {vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four))))};
  }
  static GRADKERN_INLINE U32 load_s8(const uint8_t* p) { return load_u8(p).shl<24>().sar<24>(); }
  static GRADKERN_INLINE U32 load_u16(const uint16_t* p) { return {vmovl_u16(vld1_u16(p))}; }
  GRADKERN_INLINE void store_u8(uint8_t* p) const {
    const uint16x4_t half = vmovn_u32(v);
    const uint32_t four = vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(half, half))), 0);
    __builtin_memcpy(p, &four, 4);
  }
  GRADKERN_INLINE int16x4_t narrowed() const { return vqmovn_s32(vreinterpretq_s32_u32(v)); }
  // Bytes of four neighbouring vectors of signed numbers, cut to 0..255 or to -128..127.
  static GRADKERN_INLINE void store4_u8(uint8_t* p, U32 a, U32 b, U32 c, U32 d) {
    const int16x8_t low = vcombine_s16(a.narrowed(), b.narrowed()), high = vcombine_s16(c.narrowed(), d.narrowed());
    vst1q_u8(p, vcombine_u8(vqmovun_s16(low), vqmovun_s16(high)));
  }
  static GRADKERN_INLINE void store4_s8(uint8_t* p, U32 a, U32 b, U32 c, U32 d) {
    const int16x8_t low = vcombine_s16(a.narrowed(), b.narrowed()), high = vcombine_s16(c.narrowed(), d.narrowed());
    vst1q_u8(p, vreinterpretq_u8_s8(vcombine_s8(vqmovn_s16(low), vqmovn_s16(high))));
  }
  GRADKERN_INLINE void store_u16(uint16_t* p) const { vst1_u16(p, vmovn_u32(v)); }
  GRADKERN_INLINE U32 operator+(U32 o) const { return {vaddq_u32(v, o.v)}; }
  GRADKERN_INLINE U32 operator-(U32 o) const { return {vsubq_u32(v, o.v)}; }
  GRADKERN_INLINE U32 operator*(U32 o) const { return {vmulq_u32(v, o.v)}; }
  GRADKERN_INLINE U32 operator&(U32 o) const { return {vandq_u32(v, o.v)}; }
  GRADKERN_INLINE U32 operator|(U32 o) const { return {vorrq_u32(v, o.v)}; }
  GRADKERN_INLINE U32 operator^(U32 o) const { return {veorq_u32(v, o.v)}; }
  template <int kBits>
  GRADKERN_INLINE U32 shl() const {
    return {vshlq_n_u32(v, kBits)};
  }
  template <int kBits>
  GRADKERN_INLINE U32 shr() const {
    return {vshrq_n_u32(v, kBits)};
  }
  template <int kBits>
  GRADKERN_INLINE U32 sar() const {
    return {vreinterpretq_u32_s32(vshrq_n_s32(vreinterpretq_s32_u32(v), kBits))};
  }
  // As signed numbers.
  static GRADKERN_INLINE U32 minimum(U32 a, U32 b) {
    return {vreinterpretq_u32_s32(vminq_s32(vreinterpretq_s32_u32(a.v), vreinterpretq_s32_u32(b.v)))};
  }
  static GRADKERN_INLINE U32 maximum(U32 a, U32 b) {
    return {vreinterpretq_u32_s32(vmaxq_s32(vreinterpretq_s32_u32(a.v), vreinterpretq_s32_u32(b.v)))};
  }
  GRADKERN_INLINE uint32_t largest() const { return static_cast<uint32_t>(vmaxvq_s32(vreinterpretq_s32_u32(v))); }
  GRADKERN_INLINE U32 magnitude() const { return {vreinterpretq_u32_s32(vabsq_s32(vreinterpretq_s32_u32(v)))}; }
  // This, which is not negative, and zero where `other` is, with the sign of that.
  GRADKERN_INLINE U32 signed_as(U32 other) const {
    const uint32x4_t negative = vcltzq_s32(vreinterpretq_s32_u32(other.v));
    return {vbslq_u32(negative, vsubq_u32(vdupq_n_u32(0), v), v)};
  }
  // `other` where this is zero, else this.
  GRADKERN_INLINE U32 or_if_zero(U32 other) const { return {vbslq_u32(vceqzq_u32(v), other.v, v)}; }
  // This where `condition` is not zero, else zero.
  GRADKERN_INLINE U32 where_nonzero(U32 condition) const { return {vandq_u32(v, vtstq_u32(condition.v, condition.v))}; }
  // `other` where x is NaN, else this.
  GRADKERN_INLINE U32 unless_nan(F32 x, U32 other) const { return {vbslq_u32(vceqq_f32(x.v, x.v), v, other.v)}; }
};

// Squares of kLanes floats in memory, exact in double.
struct Squares {
  float64x2_t lo, hi;
  Squares() = default;
  explicit GRADKERN_INLINE Squares(const float* p) : lo(vcvt_f64_f32(vld1_f32(p))), hi(vcvt_f64_f32(vld1_f32(p + 2))) {
    lo = vmulq_f64(lo, lo);
    hi = vmulq_f64(hi, hi);
  }
  GRADKERN_INLINE Squares(float64x2_t low, float64x2_t high) : lo(low), hi(high) {}
  static GRADKERN_INLINE Squares load(const double* p) { return {vld1q_f64(p), vld1q_f64(p + 2)}; }
  static GRADKERN_INLINE Squares all(double x) { return {vdupq_n_f64(x), vdupq_n_f64(x)}; }
  GRADKERN_INLINE Squares operator+(Squares o) const {
    o.lo = vaddq_f64(lo, o.lo);
    o.hi = vaddq_f64(hi, o.hi);
    return o;
  }
  GRADKERN_INLINE Squares operator-(Squares o) const { return {vsubq_f64(lo, o.lo), vsubq_f64(hi, o.hi)}; }
  GRADKERN_INLINE Squares plus_square(const float* p) const { return *this + Squares(p); }
  GRADKERN_INLINE void store(double* p) const {
    vst1q_f64(p, lo);
    vst1q_f64(p + 2, hi);
  }
};

// Running inner products of int8 with int16 numbers, exact in 32 bits.
struct IntDot {
  static constexpr int64_t kLanes = 8;
  int32x4_t sums;

  static GRADKERN_INLINE IntDot zero() { return {vdupq_n_s32(0)}; }

  GRADKERN_INLINE void add(const int8_t* a, const int16_t* b) {
    const int16x8_t wide = vmovl_s8(vld1_s8(a)), other = vld1q_s16(b);
    sums = vmlal_s16(sums, vget_low_s16(wide), vget_low_s16(other));
    sums = vmlal_high_s16(sums, wide, other);
  }
  GRADKERN_INLINE int32_t total() const { return vaddvq_s32(sums); }
};
