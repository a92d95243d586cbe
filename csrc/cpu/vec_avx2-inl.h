// Eight lanes of AVX2 with F16C. No FMA: contraction would change bits between instruction sets.
#define GRADKERN_INLINE __attribute__((always_inline)) inline

struct F32 {
  static constexpr int64_t kLanes = 8;
  __m256 v;

  static GRADKERN_INLINE F32 all(float x) { return {_mm256_set1_ps(x)}; }
  static GRADKERN_INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  GRADKERN_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  GRADKERN_INLINE void stream(float* p) const { _mm256_stream_ps(p, v); }

  static GRADKERN_INLINE F32 load_bf16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }

  GRADKERN_INLINE void store_bf16(uint16_t* p) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), lsb);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i half = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7FC0), nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(half, half), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }

  static GRADKERN_INLINE F32 load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }

  GRADKERN_INLINE void store_f16(uint16_t* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  GRADKERN_INLINE F32 operator+(F32 o) const { return {_mm256_add_ps(v, o.v)}; }
  GRADKERN_INLINE F32 operator-(F32 o) const { return {_mm256_sub_ps(v, o.v)}; }
  GRADKERN_INLINE F32 operator*(F32 o) const { return {_mm256_mul_ps(v, o.v)}; }
  GRADKERN_INLINE F32 operator/(F32 o) const { return {_mm256_div_ps(v, o.v)}; }
  static GRADKERN_INLINE F32 sqrt(F32 x) { return {_mm256_sqrt_ps(x.v)}; }
  // maxps returns its second operand when either is NaN, so only a NaN in the first must be put back.
  static GRADKERN_INLINE F32 maximum(F32 a, F32 b) {
    return {_mm256_blendv_ps(_mm256_max_ps(a.v, b.v), a.v, _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q))};
  }
};

// Squares of kLanes floats in memory, exact in double. Widened from memory, which needs no shuffle.
struct Squares {
  __m256d lo, hi;
  Squares() = default;
  explicit GRADKERN_INLINE Squares(const float* p)
      : lo(_mm256_cvtps_pd(_mm_loadu_ps(p))), hi(_mm256_cvtps_pd(_mm_loadu_ps(p + 4))) {
    lo = _mm256_mul_pd(lo, lo);
    hi = _mm256_mul_pd(hi, hi);
  }
  GRADKERN_INLINE Squares(__m256d low, __m256d high) : lo(low), hi(high) {}
  static GRADKERN_INLINE Squares all(double x) { return {_mm256_set1_pd(x), _mm256_set1_pd(x)}; }
  GRADKERN_INLINE Squares operator+(Squares o) const {
    o.lo = _mm256_add_pd(lo, o.lo);
    o.hi = _mm256_add_pd(hi, o.hi);
    return o;
  }
  GRADKERN_INLINE Squares operator-(Squares o) const { return {_mm256_sub_pd(lo, o.lo), _mm256_sub_pd(hi, o.hi)}; }
  GRADKERN_INLINE Squares plus_square(const float* p) const { return *this + Squares(p); }
  GRADKERN_INLINE void store(double* p) const {
    _mm256_storeu_pd(p, lo);
    _mm256_storeu_pd(p + 4, hi);
  }
};
