// One lane, plain C++: the baseline of every architecture. The compiler widens it as far as the baseline allows.
#define GRADKERN_INLINE __attribute__((always_inline)) inline

struct F32 {
  static constexpr int64_t kLanes = 1;
  float v;

  static GRADKERN_INLINE F32 all(float x) { return {x}; }
  static GRADKERN_INLINE F32 load(const float* p) { return {*p}; }
  GRADKERN_INLINE void store(float* p) const { *p = v; }
  GRADKERN_INLINE void stream(float* p) const { *p = v; }

  static GRADKERN_INLINE F32 load_bf16(const uint16_t* p) {
    const uint32_t bits = static_cast<uint32_t>(*p) << 16;
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return {x};
  }

  GRADKERN_INLINE void store_bf16(uint16_t* p) const {
    uint32_t bits;
    __builtin_memcpy(&bits, &v, 4);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    *p = v == v ? static_cast<uint16_t>(rounded) : static_cast<uint16_t>(0x7FC0u);
  }

  static GRADKERN_INLINE F32 load_f16(const uint16_t* p) {
    const uint32_t sign = (static_cast<uint32_t>(*p) & 0x8000u) << 16;
    const uint32_t magnitude = *p & 0x7FFFu;
    // Exponent and mantissa moved into place, then scaled by 2^112: exact for normal and subnormal halves.
    uint32_t bits = magnitude << 13;
    float x;
    __builtin_memcpy(&x, &bits, 4);
    x *= 5.192296858534828e33f;  // 2^112
    __builtin_memcpy(&bits, &x, 4);
    if (magnitude >= 0x7C00u) {
      bits = 0x7F800000u | (magnitude << 13);
    }
    bits |= sign;
    __builtin_memcpy(&x, &bits, 4);
    return {x};
  }

  GRADKERN_INLINE void store_f16(uint16_t* p) const {
    uint32_t bits;
    __builtin_memcpy(&bits, &v, 4);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    uint32_t half;
    if (magnitude > 0x7F800000u) {
      half = 0x7E00u;
    } else if (magnitude >= 0x477FF000u) {  // rounds to 2^16 or more
      half = 0x7C00u;
    } else if (magnitude >= 0x38800000u) {  // normal half
      half = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    } else {
      // Adding 0.5 aligns the value so that the FPU rounds at the last bit of a subnormal half.
      float x;
      __builtin_memcpy(&x, &magnitude, 4);
      x += 0.5f;
      __builtin_memcpy(&half, &x, 4);
      half -= 0x3F000000u;
    }
    *p = static_cast<uint16_t>(half | sign);
  }

  GRADKERN_INLINE F32 operator+(F32 o) const { return {v + o.v}; }
  GRADKERN_INLINE F32 operator-(F32 o) const { return {v - o.v}; }
  GRADKERN_INLINE F32 operator*(F32 o) const { return {v * o.v}; }
  GRADKERN_INLINE F32 operator/(F32 o) const { return {v / o.v}; }
  static GRADKERN_INLINE F32 sqrt(F32 x) { return {__builtin_sqrtf(x.v)}; }
  // NaN if either is NaN, as torch.maximum.
  static GRADKERN_INLINE F32 maximum(F32 a, F32 b) { return {a.v > b.v || a.v != a.v ? a.v : b.v}; }
  static GRADKERN_INLINE F32 minimum(F32 a, F32 b) { return {a.v < b.v || a.v != a.v ? a.v : b.v}; }
  // 1 or -1; zero and NaN stay what they are.
  static GRADKERN_INLINE F32 sign(F32 x) { return {x.v > 0.0f ? 1.0f : x.v < 0.0f ? -1.0f : x.v}; }
};

// Lanes of 32 bits, for what is done to the bits of numbers: rounding, codes, random words.
struct U32 {
  uint32_t v;

  static GRADKERN_INLINE U32 all(uint32_t x) { return {x}; }
  static GRADKERN_INLINE U32 lane_numbers() { return {0}; }
  static GRADKERN_INLINE U32 of(F32 x) {
    U32 bits;
    __builtin_memcpy(&bits.v, &x.v, 4);
    return bits;
  }
  GRADKERN_INLINE F32 as_float() const {
    F32 x;
    __builtin_memcpy(&x.v, &v, 4);
    return x;
  }
  static GRADKERN_INLINE U32 load_u8(const uint8_t* p) { return {*p}; }
  static GRADKERN_INLINE U32 load_s8(const uint8_t* p) {
    return {static_cast<uint32_t>(static_cast<int32_t>(static_cast<int8_t>(*p)))};
  }
  static GRADKERN_INLINE U32 load_u16(const uint16_t* p) { return {*p}; }
  GRADKERN_INLINE void store_u8(uint8_t* p) const { *p = static_cast<uint8_t>(v); }
  // Bytes of four neighbouring vectors of signed numbers, cut to 0..255 or to -128..127.
  static GRADKERN_INLINE void store4_u8(uint8_t* p, U32 a, U32 b, U32 c, U32 d) {
    const U32 four[] = {a, b, c, d};
    for (int i = 0; i < 4; ++i) {
      minimum(maximum(four[i], all(0)), all(255)).store_u8(p + i);
    }
  }
  static GRADKERN_INLINE void store4_s8(uint8_t* p, U32 a, U32 b, U32 c, U32 d) {
    const U32 four[] = {a, b, c, d};
    for (int i = 0; i < 4; ++i) {
      minimum(maximum(four[i], all(0xFFFFFF80u)), all(127)).store_u8(p + i);
    }
  }
  GRADKERN_INLINE void store_u16(uint16_t* p) const { *p = static_cast<uint16_t>(v); }
  GRADKERN_INLINE U32 operator+(U32 o) const { return {v + o.v}; }
  GRADKERN_INLINE U32 operator-(U32 o) const { return {v - o.v}; }
  GRADKERN_INLINE U32 operator*(U32 o) const { return {v * o.v}; }
  GRADKERN_INLINE U32 operator&(U32 o) const { return {v & o.v}; }
  GRADKERN_INLINE U32 operator|(U32 o) const { return {v | o.v}; }
  GRADKERN_INLINE U32 operator^(U32 o) const { return {v ^ o.v}; }
  template <int kBits>
  GRADKERN_INLINE U32 shl() const {
    return {v << kBits};
  }
  template <int kBits>
  GRADKERN_INLINE U32 shr() const {
    return {v >> kBits};
  }
  template <int kBits>
  GRADKERN_INLINE U32 sar() const {
    return {static_cast<uint32_t>(static_cast<int32_t>(v) >> kBits)};
  }
  // As signed numbers.
  static GRADKERN_INLINE U32 minimum(U32 a, U32 b) {
    return static_cast<int32_t>(a.v) < static_cast<int32_t>(b.v) ? a : b;
  }
  static GRADKERN_INLINE U32 maximum(U32 a, U32 b) {
    return static_cast<int32_t>(a.v) > static_cast<int32_t>(b.v) ? a : b;
  }
  GRADKERN_INLINE uint32_t largest() const { return v; }
  GRADKERN_INLINE U32 magnitude() const { return {static_cast<int32_t>(v) < 0 ? 0u - v : v}; }
  // This, which is not negative, and zero where `other` is, with the sign of that.
  GRADKERN_INLINE U32 signed_as(U32 other) const { return {static_cast<int32_t>(other.v) < 0 ? 0u - v : v}; }
  // `other` where this is zero, else this.
  GRADKERN_INLINE U32 or_if_zero(U32 other) const { return v == 0 ? other : *this; }
  // This where `condition` is not zero, else zero.
  GRADKERN_INLINE U32 where_nonzero(U32 condition) const { return {condition.v == 0 ? 0 : v}; }
  // `other` where x is NaN, else this.
  GRADKERN_INLINE U32 unless_nan(F32 x, U32 other) const { return x.v == x.v ? *this : other; }
};

// Squares of kLanes floats in memory, exact in double.
struct Squares {
  double v;
  Squares() = default;
  explicit GRADKERN_INLINE Squares(const float* p) : v(static_cast<double>(*p) * static_cast<double>(*p)) {}
  explicit GRADKERN_INLINE Squares(double sum) : v(sum) {}
  static GRADKERN_INLINE Squares load(const double* p) { return Squares(*p); }
  static GRADKERN_INLINE Squares all(double x) { return Squares(x); }
  GRADKERN_INLINE Squares operator-(Squares o) const { return Squares(v - o.v); }
  GRADKERN_INLINE Squares operator+(Squares o) const {
    o.v = v + o.v;
    return o;
  }
  GRADKERN_INLINE Squares plus_square(const float* p) const { return *this + Squares(p); }
  GRADKERN_INLINE void store(double* p) const { *p = v; }
};

// Running inner product of int8 with int16 numbers, exact in 32 bits.
struct IntDot {
  static constexpr int64_t kLanes = 1;
  int32_t sum;

  static GRADKERN_INLINE IntDot zero() { return {0}; }

  GRADKERN_INLINE void add(const int8_t* a, const int16_t* b) { sum += static_cast<int32_t>(*a) * *b; }
  GRADKERN_INLINE int32_t total() const { return sum; }
};
