// The sum of squares of one chunk without a rounding anywhere, added to words of 32 bits (exact_squares.h).
//
// Squares are exact in double, and so is the split of a square by a large sum: with S = 1.5 * 2^m + (what was added
// before), the part of x that S + x keeps is (S + x) - S, and x minus that part is exact too (Dekker's fast two-sum,
// |S| >= |x|). What S does not keep goes to the next, finer bin; the last bin only has to hold what is left. All bins
// stay exact because m is chosen from the exponents that the chunk really has: a bin keeps 52 - log2(additions) bits.
// Bins are those of Demmel, Ahrens & Nguyen (ReproBLAS), used here for an exact sum and not for a reproducible
// rounding.

// Independent sums, and the logarithm of the additions to one of them.
constexpr int64_t kColumns = 2 * F32::kLanes;
constexpr int kAddsLog2 = kColumns == 2 ? 11 : kColumns == 8 ? 9 : kColumns == 16 ? 8 : 7;
static_assert((kColumns << kAddsLog2) == kChunk, "kAddsLog2 must fit kColumns");

constexpr int64_t kInfWord = 22;
constexpr int64_t kNanWord = 23;
constexpr uint32_t kInfBits = 0x7F800000u;

// 2^exponent for a normal double.
GRADKERN_INLINE double power_of_two(int exponent) {
  const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double x;
  __builtin_memcpy(&x, &bits, 8);
  return x;
}

// Adds value * 2^(position - 352), |value| < 2^62.
inline void add_to_words(int64_t value, int64_t position, int64_t* words) {
  const uint64_t magnitude = value < 0 ? -static_cast<uint64_t>(value) : static_cast<uint64_t>(value);
  const int64_t sign = value < 0 ? -1 : 1;
  const int64_t limb = position >> 5;
  const int64_t shift = position & 31;
  const uint64_t low = (magnitude & 0xFFFFFFFFu) << shift;
  const uint64_t high = (magnitude >> 32) << shift;
  words[limb] += sign * static_cast<int64_t>(low & 0xFFFFFFFFu);
  words[limb + 1] += sign * static_cast<int64_t>((low >> 32) + (high & 0xFFFFFFFFu));
  words[limb + 2] += sign * static_cast<int64_t>(high >> 32);
}

GRADKERN_INLINE uint32_t magnitude_bits(const float* x) {
  uint32_t bits;
  __builtin_memcpy(&bits, x, 4);
  return bits & 0x7FFFFFFFu;
}

GRADKERN_INLINE int fraction_bits(DType dtype) {
  return dtype == DType::kFloat32 ? 23 : dtype == DType::kFloat16 ? 10 : 7;
}

// The widest range of exponents, largest minus smallest, that so many bins sum exactly, for significands of
// `fraction` bits behind the point. Squares below 2^(2 largest + 2) put the first bin at m = 2 largest + 3 + kAddsLog2;
// each bin leaves at most 2^(m - 53) of a square to the next, whose m is therefore smaller by 52 - kAddsLog2; the last
// holds 2^53 units of 2^(2 (smallest - fraction)).
GRADKERN_INLINE int widest_range(int bins, int fraction) {
  return (103 - 2 * fraction - 2 * kAddsLog2 + (bins - 2) * (52 - kAddsLog2)) / 2;
}

// A bin and the kFiner bins below it. Nested rather than an array, which the compiler would keep in memory.
template <int kFiner>
struct Bins {
  Squares sum;
  Bins<kFiner - 1> finer;

  GRADKERN_INLINE void start(int m) {
    sum = Squares::all(1.5 * power_of_two(m));
    finer.start(m - (52 - kAddsLog2));
  }
  GRADKERN_INLINE void add(Squares x) {
    const Squares next = sum + x;
    finer.add(x - (next - sum));
    sum = next;
  }
  GRADKERN_INLINE void store(double* columns) const {
    sum.store(columns);
    finer.store(columns + F32::kLanes);
  }
};

template <>
struct Bins<0> {
  Squares sum;

  GRADKERN_INLINE void start(int) { sum = Squares::all(0.0); }
  GRADKERN_INLINE void add(Squares x) { sum = sum + x; }
  GRADKERN_INLINE void store(double* columns) const { sum.store(columns); }
};

// Sums `size` squares, a multiple of kColumns, of values below 2^(largest + 1) that are multiples of 2^lowest_bit.
// While it computes, it asks for the chunk that lies at `next`.
template <int kBins>
inline void sum_in_bins(const float* x, int64_t size, int lowest_bit, int largest, const char* next, int64_t next_bytes,
                        int64_t* words) {
  const int first = 2 * largest + 3 + kAddsLog2;
  Bins<kBins - 1> even;
  Bins<kBins - 1> odd;
  even.start(first);
  odd.start(first);
  for (int64_t i = 0; i < size; i += kColumns) {
    if (F32::kLanes >= 8 && i * 4 < next_bytes) {
      __builtin_prefetch(next + i * 4, 0, 2);
    }
    even.add(Squares(x + i));
    odd.add(Squares(x + i + F32::kLanes));
  }
  double columns[2][kBins][F32::kLanes];
  even.store(columns[0][0]);
  odd.store(columns[1][0]);
  for (int bin = 0; bin < kBins; ++bin) {
    const bool last = bin + 1 == kBins;
    const int m = first - bin * (52 - kAddsLog2);
    const int unit = last ? 2 * lowest_bit : m - 52;
    const double start = last ? 0.0 : 1.5 * power_of_two(m);
    const double scale = power_of_two(-unit);
    int64_t value = 0;
    for (int64_t column = 0; column < F32::kLanes; ++column) {
      value += static_cast<int64_t>((columns[0][bin][column] - start) * scale);
      value += static_cast<int64_t>((columns[1][bin][column] - start) * scale);
    }
    add_to_words(value, unit + 352, words);
  }
}

// Any values at all: squares of the 24-bit significands, summed as integers by exponent.
inline void sum_by_exponent(const float* x, int64_t size, int64_t* words) {
  uint64_t sums[255] = {};
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t bits = magnitude_bits(x + i);
    if (bits >= kInfBits) {
      words[bits == kInfBits ? kInfWord : kNanWord] += 1;
      continue;
    }
    const uint32_t exponent = bits >> 23;
    const uint64_t significand = exponent == 0 ? bits : (bits & 0x7FFFFFu) | 0x800000u;
    sums[exponent] += significand * significand;
  }
  for (int64_t exponent = 0; exponent < 255; ++exponent) {
    if (sums[exponent] != 0) {
      // A subnormal counts in the units of the smallest normal.
      const int64_t power = exponent == 0 ? 1 : exponent;
      add_to_words(static_cast<int64_t>(sums[exponent]), 2 * (power - 150) + 352, words);
    }
  }
}

inline void sumsq_exact_values(const float* x, int64_t size, int fraction, const char* next, int64_t next_bytes,
                               int64_t* words) {
  uint32_t largest = 0;
  uint32_t smallest = 0xFFFFFFFFu;
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t bits = magnitude_bits(x + i);
    largest = bits > largest ? bits : largest;
    smallest = bits - 1u < smallest ? bits - 1u : smallest;  // zeros wrap around and do not count
  }
  if (largest == 0) {
    return;
  }
  const int high = static_cast<int>(largest >> 23);
  const int low = static_cast<int>((smallest + 1u) >> 23);
  const int top = (high == 0 ? 1 : high) - 127;
  const int bottom = (low == 0 ? 1 : low) - 127;
  if (largest >= kInfBits || top - bottom > widest_range(4, fraction)) {
    sum_by_exponent(x, size, words);
  } else if (top - bottom <= widest_range(1, fraction)) {  // never for fp32
    sum_in_bins<1>(x, size, bottom - fraction, top, next, next_bytes, words);
  } else if (top - bottom <= widest_range(2, fraction)) {
    sum_in_bins<2>(x, size, bottom - fraction, top, next, next_bytes, words);
  } else if (top - bottom <= widest_range(3, fraction)) {
    sum_in_bins<3>(x, size, bottom - fraction, top, next, next_bytes, words);
  } else {
    sum_in_bins<4>(x, size, bottom - fraction, top, next, next_bytes, words);
  }
}

void sumsq_exact_loop(DType dtype, const void* src, int64_t size, int64_t* words) {
  const int64_t bytes = size * item_size(dtype);
  const char* next = static_cast<const char*>(src) + bytes;
  if (dtype == DType::kFloat32 && size % kColumns == 0) {
    sumsq_exact_values(static_cast<const float*>(src), size, fraction_bits(dtype), next, bytes, words);
    return;
  }
  if (size == 0) {
    return;
  }
  alignas(64) float values[kChunk];
  const int64_t padded = (size + kColumns - 1) / kColumns * kColumns;
  __builtin_memset(values + padded - kColumns, 0, kColumns * sizeof(float));
  decode(dtype, src, size, values);
  sumsq_exact_values(values, padded, fraction_bits(dtype), next, bytes, words);
}
