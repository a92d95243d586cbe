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
  static GRADKERN_INLINE F32 minimum(F32 a, F32 b) {
    return {_mm512_mask_mov_ps(_mm512_min_ps(a.v, b.v), _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), a.v)};
  }
  // 1 or -1; zero and NaN stay what they are.
  static GRADKERN_INLINE F32 sign(F32 x) {
    const __m512 one = _mm512_or_ps(_mm512_and_ps(x.v, _mm512_set1_ps(-0.0f)), _mm512_set1_ps(1.0f));
    return {_mm512_mask_mov_ps(one, _mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_EQ_UQ), x.v)};
  }
};

// Lanes of 32 bits, for what is done to the bits of numbers: rounding, codes, random words.
struct U32 {
  __m512i v;

  static GRADKERN_INLINE U32 all(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
  static GRADKERN_INLINE U32 lane_numbers() {
    return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
  }
  static GRADKERN_INLINE U32 of(F32 x) { return {_mm512_castps_si512(x.v)}; }
  GRADKERN_INLINE F32 as_float() const { return {_mm512_castsi512_ps(v)}; }
  static GRADKERN_INLINE U32 load_u8(const uint8_t* p) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static GRADKERN_INLINE U32 load_s8(const uint8_t* p) {
    return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static GRADKERN_INLINE U32 load_u16(const uint16_t* p) {
    return {_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  GRADKERN_INLINE void store_u8(uint8_t* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
  }
  // Bytes of four neighbouring vectors of signed numbers, cut to 0..255 or to -128..127.
  static GRADKERN_INLINE void store4_u8(uint8_t* p, U32 a, U32 b, U32 c, U32 d) {
    const U32 four[] = {a, b, c, d};
    for (int i = 0; i < 4; ++i) {
      const __m512i positive = _mm512_max_epi32(four[i].v, _mm512_setzero_si512());
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 16 * i), _mm512_cvtusepi32_epi8(positive));
    }
  }
  static GRADKERN_INLINE void store4_s8(uint8_t* p, U32 a, U32 b, U32 c, U32 d) {
    const U32 four[] = {a, b, c, d};
    for (int i = 0; i < 4; ++i) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 16 * i), _mm512_cvtsepi32_epi8(four[i].v));
    }
  }
  GRADKERN_INLINE void store_u16(uint16_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v));
  }
  GRADKERN_INLINE U32 operator+(U32 o) const { return {_mm512_add_epi32(v, o.v)}; }
  GRADKERN_INLINE U32 operator-(U32 o) const { return {_mm512_sub_epi32(v, o.v)}; }
  GRADKERN_INLINE U32 operator*(U32 o) const { return {_mm512_mullo_epi32(v, o.v)}; }
  GRADKERN_INLINE U32 operator&(U32 o) const { return {_mm512_and_si512(v, o.v)}; }
  GRADKERN_INLINE U32 operator|(U32 o) const { return {_mm512_or_si512(v, o.v)}; }
  GRADKERN_INLINE U32 operator^(U32 o) const { return {_mm512_xor_si512(v, o.v)}; }
  template <int kBits>
  GRADKERN_INLINE U32 shl() const {
    return {_mm512_slli_epi32(v, kBits)};
  }
  template <int kBits>
  GRADKERN_INLINE U32 shr() const {
    return {_mm512_srli_epi32(v, kBits)};
  }
  template <int kBits>
  GRADKERN_INLINE U32 sar() const {
    return {_mm512_srai_epi32(v, kBits)};
  }
  // As signed numbers.
  static GRADKERN_INLINE U32 minimum(U32 a, U32 b) { return {_mm512_min_epi32(a.v, b.v)}; }
  static GRADKERN_INLINE U32 maximum(U32 a, U32 b) { return {_mm512_max_epi32(a.v, b.v)}; }
  GRADKERN_INLINE uint32_t largest() const { return static_cast<uint32_t>(_mm512_reduce_max_epi32(v)); }
  GRADKERN_INLINE U32 magnitude() const { return {_mm512_abs_epi32(v)}; }
  // This, which is not negative, and zero where `other` is, with the sign of that.
  GRADKERN_INLINE U32 signed_as(U32 other) const {
    return {_mm512_mask_sub_epi32(v, _mm512_movepi32_mask(other.v), _mm512_setzero_si512(), v)};
  }
  // `other` where this is zero, else this.
  GRADKERN_INLINE U32 or_if_zero(U32 other) const {
    return {_mm512_mask_mov_epi32(v, _mm512_testn_epi32_mask(v, v), other.v)};
  }
  // This where `condition` is not zero, else zero.
  GRADKERN_INLINE U32 where_nonzero(U32 condition) const {
    return {_mm512_maskz_mov_epi32(_mm512_test_epi32_mask(condition.v, condition.v), v)};
  }
  // `other` where x is NaN, else this.
  GRADKERN_INLINE U32 unless_nan(F32 x, U32 other) const {
    return {_mm512_mask_mov_epi32(v, _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), other.v)};
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
  static GRADKERN_INLINE Squares load(const double* p) { return {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}; }
  static GRADKERN_INLINE Squares all(double x) { return {_mm512_set1_pd(x), _mm512_set1_pd(x)}; }
  GRADKERN_INLINE Squares operator+(Squares o) const {
    o.lo = _mm512_add_pd(lo, o.lo);
    o.hi = _mm512_add_pd(hi, o.hi);
    return o;
  }
  GRADKERN_INLINE Squares operator-(Squares o) const { return {_mm512_sub_pd(lo, o.lo), _mm512_sub_pd(hi, o.hi)}; }
  // The one fused multiply-add: the product is exact in double, so that it rounds where an addition would.
  GRADKERN_INLINE Squares plus_square(const float* p) const {
    const __m512d a = _mm512_cvtps_pd(_mm256_loadu_ps(p)), b = _mm512_cvtps_pd(_mm256_loadu_ps(p + 8));
    return {_mm512_fmadd_pd(a, a, lo), _mm512_fmadd_pd(b, b, hi)};
  }
  GRADKERN_INLINE void store(double* p) const {
    _mm512_storeu_pd(p, lo);
    _mm512_storeu_pd(p + 8, hi);
  }
};

// Running inner products of int8 with int16 numbers, exact in 32 bits. Not VNNI: the scan waits for memory.
struct IntDot {
  static constexpr int64_t kLanes = 32;
  __m512i sums;

  static GRADKERN_INLINE IntDot zero() { return {_mm512_setzero_si512()}; }

  GRADKERN_INLINE void add(const int8_t* a, const int16_t* b) {
    const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
    sums = _mm512_add_epi32(sums, _mm512_madd_epi16(wide, _mm512_loadu_si512(b)));
  }
  GRADKERN_INLINE int32_t total() const { return _mm512_reduce_add_epi32(sums); }
};
