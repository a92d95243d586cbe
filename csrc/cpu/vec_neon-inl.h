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
