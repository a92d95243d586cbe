// Eight lanes of AVX2 with F16C and FMA. No FMA on fp32: contraction would change bits between instruction sets.
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
  static GRADKERN_INLINE F32 minimum(F32 a, F32 b) {
    return {_mm256_blendv_ps(_mm256_min_ps(a.v, b.v), a.v, _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q))};
  }
  // 1 or -1; zero and NaN stay what they are.
  static GRADKERN_INLINE F32 sign(F32 x) {
    const __m256 one = _mm256_or_ps(_mm256_and_ps(x.v, _mm256_set1_ps(-0.0f)), _mm256_set1_ps(1.0f));
    return {_mm256_blendv_ps(one, x.v, _mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_EQ_UQ))};
  }
};

// Lanes of 32 bits, for what is done to the bits of numbers: rounding, codes, random words.
struct U32 {
  __m256i v;

  static GRADKERN_INLINE U32 all(uint32_t x) { return {_mm256_set1_epi32(static_cast<int>(x))}; }
  static GRADKERN_INLINE U32 lane_numbers() { return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)}; }
  static GRADKERN_INLINE U32 of(F32 x) { return {_mm256_castps_si256(x.v)}; }
  GRADKERN_INLINE F32 as_float() const { return {_mm256_castsi256_ps(v)}; }
  static GRADKERN_INLINE U32 load_u8(const uint8_t* p) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
  }
  static GRADKERN_INLINE U32 load_s8(const uint8_t* p) {
    return {_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
  }
  static GRADKERN_INLINE U32 load_u16(const uint16_t* p) {
    return {_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  GRADKERN_INLINE void store_u8(uint8_t* p) const {
    // The low byte of every lane, gathered in each half, then both halves side by side.
    const __m256i bytes =
        _mm256_shuffle_epi8(v, _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8,
                                                12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
    const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), both);
  }
  // Packing works within halves: the halves' four-byte groups are then put in order.
  static GRADKERN_INLINE void store_packed(uint8_t* p, __m256i bytes) {
    const __m256i ordered = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), ordered);
  }
  // Bytes of four neighbouring vectors of signed numbers, cut to 0..255 or to -128..127.
  static GRADKERN_INLINE void store4_u8(uint8_t* p, U32 a, U32 b, U32 c, U32 d) {
    store_packed(p, _mm256_packus_epi16(_mm256_packs_epi32(a.v, b.v), _mm256_packs_epi32(c.v, d.v)));
  }
  static GRADKERN_INLINE void store4_s8(uint8_t* p, U32 a, U32 b, U32 c, U32 d) {
    store_packed(p, _mm256_packs_epi16(_mm256_packs_epi32(a.v, b.v), _mm256_packs_epi32(c.v, d.v)));
  }
  GRADKERN_INLINE void store_u16(uint16_t* p) const {
    const __m256i low = _mm256_and_si256(v, _mm256_set1_epi32(0xFFFF));
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  GRADKERN_INLINE U32 operator+(U32 o) const { return {_mm256_add_epi32(v, o.v)}; }
  GRADKERN_INLINE U32 operator-(U32 o) const { return {_mm256_sub_epi32(v, o.v)}; }
  GRADKERN_INLINE U32 operator*(U32 o) const { return {_mm256_mullo_epi32(v, o.v)}; }
  GRADKERN_INLINE U32 operator&(U32 o) const { return {_mm256_and_si256(v, o.v)}; }
  GRADKERN_INLINE U32 operator|(U32 o) const { return {_mm256_or_si256(v, o.v)}; }
  GRADKERN_INLINE U32 operator^(U32 o) const { return {_mm256_xor_si256(v, o.v)}; }
  template <int kBits>
  GRADKERN_INLINE U32 shl() const {
    return {_mm256_slli_epi32(v, kBits)};
  }
  template <int kBits>
  GRADKERN_INLINE U32 shr() const {
    return {_mm256_srli_epi32(v, kBits)};
  }
  template <int kBits>
  GRADKERN_INLINE U32 sar() const {
    return {_mm256_srai_epi32(v, kBits)};
  }
  // As signed numbers.
  static GRADKERN_INLINE U32 minimum(U32 a, U32 b) { return {_mm256_min_epi32(a.v, b.v)}; }
  static GRADKERN_INLINE U32 maximum(U32 a, U32 b) { return {_mm256_max_epi32(a.v, b.v)}; }
  GRADKERN_INLINE uint32_t largest() const {
    __m128i x = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0x4E));
    x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0xB1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(x));
  }
  GRADKERN_INLINE U32 magnitude() const { return {_mm256_abs_epi32(v)}; }
  // This, which is not negative, and zero where `other` is, with the sign of that.
  GRADKERN_INLINE U32 signed_as(U32 other) const { return {_mm256_sign_epi32(v, other.v)}; }
  // `other` where this is zero, else this.
  GRADKERN_INLINE U32 or_if_zero(U32 other) const {
    return {_mm256_blendv_epi8(v, other.v, _mm256_cmpeq_epi32(v, _mm256_setzero_si256()))};
  }
  // This where `condition` is not zero, else zero.
  GRADKERN_INLINE U32 where_nonzero(U32 condition) const {
    return {_mm256_andnot_si256(_mm256_cmpeq_epi32(condition.v, _mm256_setzero_si256()), v)};
  }
  // `other` where x is NaN, else this.
  GRADKERN_INLINE U32 unless_nan(F32 x, U32 other) const {
    const __m256 nan = _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q);
    return {_mm256_blendv_epi8(v, other.v, _mm256_castps_si256(nan))};
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
  static GRADKERN_INLINE Squares load(const double* p) { return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)}; }
  static GRADKERN_INLINE Squares all(double x) { return {_mm256_set1_pd(x), _mm256_set1_pd(x)}; }
  GRADKERN_INLINE Squares operator+(Squares o) const {
    o.lo = _mm256_add_pd(lo, o.lo);
    o.hi = _mm256_add_pd(hi, o.hi);
    return o;
  }
  GRADKERN_INLINE Squares operator-(Squares o) const { return {_mm256_sub_pd(lo, o.lo), _mm256_sub_pd(hi, o.hi)}; }
  // The one fused multiply-add: the product is exact in double, so that it rounds where an addition would.
  GRADKERN_INLINE Squares plus_square(const float* p) const {
    const __m256d a = _mm256_cvtps_pd(_mm_loadu_ps(p)), b = _mm256_cvtps_pd(_mm_loadu_ps(p + 4));
    return {_mm256_fmadd_pd(a, a, lo), _mm256_fmadd_pd(b, b, hi)};
  }
  GRADKERN_INLINE void store(double* p) const {
    _mm256_storeu_pd(p, lo);
    _mm256_storeu_pd(p + 4, hi);
  }
};

// Running inner products of int8 with int16 numbers, exact in 32 bits.
struct IntDot {
  static constexpr int64_t kLanes = 16;
  __m256i sums;

  static GRADKERN_INLINE IntDot zero() { return {_mm256_setzero_si256()}; }

  GRADKERN_INLINE void add(const int8_t* a, const int16_t* b) {
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a)));
    const __m256i pairs = _mm256_madd_epi16(wide, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
    sums = _mm256_add_epi32(sums, pairs);
  }
  GRADKERN_INLINE int32_t total() const {
    __m128i x = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4E));
    x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0xB1));
    return _mm_cvtsi128_si32(x);
  }
};
