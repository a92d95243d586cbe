// A codec turns a stored dtype into fp32 lanes and back; loops are templates over codecs, rules never see them.
struct Float32Codec {
  using Stored = float;
  static GRADKERN_INLINE F32 load(const float* p) { return F32::load(p); }
  static GRADKERN_INLINE void store(F32 x, float* p) { x.store(p); }
};

struct BFloat16Codec {
  using Stored = uint16_t;
  static GRADKERN_INLINE F32 load(const uint16_t* p) { return F32::load_bf16(p); }
  static GRADKERN_INLINE void store(F32 x, uint16_t* p) { x.store_bf16(p); }
};

struct Float16Codec {
  using Stored = uint16_t;
  static GRADKERN_INLINE F32 load(const uint16_t* p) { return F32::load_f16(p); }
  static GRADKERN_INLINE void store(F32 x, uint16_t* p) { x.store_f16(p); }
};

// Tails are padded to a whole group, so that element i never depends on where a tensor ends.
constexpr int64_t kGroup = 512;

// Asks for the line that the same position of a later group lies in. The hardware stops at each page and waits for
// the translation of the next; asked for early, one line per load, both overlap with the arithmetic. A prefetch beyond
// the tensor is harmless. Narrow vectors would ask for every line several times and are bound by arithmetic anyway.
// Not a whole page ahead: operands begin alike in their pages, and all lines asked for would share few cache sets.
constexpr int64_t kPrefetchBytes = 1024;

// Elements of T in a cache line.
template <class T>
constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));

GRADKERN_INLINE void prefetch(const void* p, int64_t ahead = kPrefetchBytes) {
  if (F32::kLanes >= 8) {
    __builtin_prefetch(static_cast<const char*>(p) + ahead, 0, 2);
  }
}

template <class Codec>
inline void decode(const void* src, int64_t size, float* out) {
  const auto* from = static_cast<const typename Codec::Stored*>(src);
  int64_t i = 0;
  for (; i + F32::kLanes <= size; i += F32::kLanes) {
    Codec::load(from + i).store(out + i);
  }
  if (i < size) {
    typename Codec::Stored last[F32::kLanes] = {};
    __builtin_memcpy(last, from + i, (size - i) * sizeof(typename Codec::Stored));
    Codec::load(last).store(out + i);
  }
}

template <class Codec>
inline void encode(const float* src, int64_t size, void* out) {
  auto* to = static_cast<typename Codec::Stored*>(out);
  int64_t i = 0;
  for (; i + F32::kLanes <= size; i += F32::kLanes) {
    Codec::store(F32::load(src + i), to + i);
  }
  if (i < size) {
    typename Codec::Stored last[F32::kLanes];
    Codec::store(F32::load(src + i), last);
    __builtin_memcpy(to + i, last, (size - i) * sizeof(typename Codec::Stored));
  }
}

inline void decode(DType dtype, const void* src, int64_t size, float* out) {
  switch (dtype) {
    case DType::kFloat32:
      return decode<Float32Codec>(src, size, out);
    case DType::kBFloat16:
      return decode<BFloat16Codec>(src, size, out);
    case DType::kFloat16:
      return decode<Float16Codec>(src, size, out);
  }
}

inline void encode(DType dtype, const float* src, int64_t size, void* out) {
  switch (dtype) {
    case DType::kFloat32:
      return encode<Float32Codec>(src, size, out);
    case DType::kBFloat16:
      return encode<BFloat16Codec>(src, size, out);
    case DType::kFloat16:
      return encode<Float16Codec>(src, size, out);
  }
}
