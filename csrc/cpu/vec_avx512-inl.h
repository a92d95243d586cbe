// Sixteen lanes of AVX-512 F/BW/DQ/VL. No FMA on fp32: contraction would change bits between instruction sets.
#define GRADKERN_INLINE __attribute__((always_inline)) inline

struct F32 {
  static constexpr int64_t kLanes = 16;
  __m512 v;

  static GRADKERN_INLINE F32 all(float x) { return {_mm512_set1_ps(x)}; }
  static GRADKERN_INLINE F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  GRADKERN_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  GRADKERN_INLINE void stream(float* p) const { _mm512_stream_ps(p, v); }

  static GRADKERN_INLINE F32 load_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }

  GRADKERN_INLINE void store_bf16(uint16_t* p) const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), lsb);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i half = _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan, _mm512_set1_epi32(0x7FC0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(half));
  }

  static GRADKERN_INLINE F32 load_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }

  GRADKERN_INLINE void store_f16(uint16_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  GRADKERN_INLINE F32 operator+(F32 o) const { return {_mm512_add_ps(v, o.v)}; }
  GRADKERN_INLINE F32 operator-(F32 o) const { return {_mm512_sub_ps(v, o.v)}; }
  GRADKERN_INLINE F32 operator*(F32 o) const { return {_mm512_mul_ps(v, o.v)}; }
  GRADKERN_INLINE F32 operator/(F32 o) const { return {_mm512_div_ps(v, o.v)}; }
  static GRADKERN_INLINE F32 sqrt(F32 x) { return {_mm512_sqrt_ps(x.v)}; }
  // maxps returns its second operand when either is NaN, so only a NaN in the first must be put back.
  static GRADKERN_INLINE F32 maximum(F32 a, F32 b) {
    return {_mm512_mask_mov_ps(_mm512_max_ps(a.v, b.v), _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), a.v)};
  }
};

// Squares of kLanes floats in memory, exact in double. Widened from memory, which needs no shuffle.
struct Squares {
  __m512d lo, hi;
  Squares() = default;
  explicit GRADKERN_INLINE Squares(const float* p)
      : lo(_mm512_cvtps_pd(_mm256_loadu_ps(p))), hi(_mm512_cvtps_pd(_mm256_loadu_ps(p + 8))) {
    lo = _mm512_mul_pd(lo, lo);
    hi = _mm512_mul_pd(hi, hi);
  }
  GRADKERN_INLINE Squares(__m512d low, __m512d high) : lo(low), hi(high) {}
  static GRADKERN_INLINE Squares all(double x) { return {_mm512_set1_pd(x), _mm512_set1_pd(x)}; }
  GRADKERN_INLINE Squares operator+(Squares o) const {
    o.lo = _mm512_add_pd(lo, o.lo);
    o.hi = _mm512_add_pd(hi, o.hi);
    return o;
  }
  GRADKERN_INLINE Squares operator-(Squares o) const { return {_mm512_sub_pd(lo, o.lo), _mm512_sub_pd(hi, o.hi)}; }
  // The one fused multiply-add: the product is exact in double, so that it rounds where an addition would.
  GRADKERN_INLINE Squares plus_square(const float* p) const {
    Squares o = *this;
    const __m512d a = _mm512_cvtps_pd(_mm256_loadu_ps(p)), b = _mm512_cvtps_pd(_mm256_loadu_ps(p + 8));
    o.lo = _mm512_fmadd_pd(a, a, lo);
    o.hi = _mm512_fmadd_pd(b, b, hi);
    return o;
  }
  GRADKERN_INLINE void store(double* p) const {
    _mm512_storeu_pd(p, lo);
    _mm512_storeu_pd(p + 8, hi);
  }
};
