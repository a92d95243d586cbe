// Sums in a fixed order that is as wide as any vector: 64 lanes, each summed in order, then folded in halves
// (32 + 32, 16 + 16, ...). Absent elements count as zeros. gradkern.rollback._lanes is the same in torch.

constexpr int64_t kLanes = 64;

template <class T>
GRADKERN_INLINE T fold_sixteen(T* lanes) {
  for (int64_t i = 0; i < 8; ++i) {
    lanes[i] += lanes[i + 8];
  }
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

template <class T>
GRADKERN_INLINE T fold_lanes(T* lanes) {
  for (int64_t i = 0; i < 32; ++i) {
    lanes[i] += lanes[i + 32];
  }
  for (int64_t i = 0; i < 16; ++i) {
    lanes[i] += lanes[i + 16];
  }
  return fold_sixteen(lanes);
}

// The inner product of no more than 16 elements, as in all lanes: folding in the zeros of the others changes nothing,
// for no lane is -0.
template <class T>
GRADKERN_INLINE T dot_of_few(const float* a, const float* b, int64_t size) {
  T lanes[16] = {};
  for (int64_t i = 0; i < size; ++i) {
    lanes[i] += static_cast<T>(a[i]) * static_cast<T>(b[i]);
  }
  return fold_sixteen(lanes);
}

// The products of `size` elements in half of the lanes, from `at` on, as vectors that stay in registers.
template <int kRows>
GRADKERN_INLINE void half_lanes(const float* const* a, const float* b, int64_t size, int64_t at,
                                float (*lanes)[kLanes]) {
  constexpr int64_t kHalf = kLanes / 2, kVectors = kHalf / F32::kLanes;
  F32 sums[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int64_t v = 0; v < kVectors; ++v) {
      sums[r][v] = F32::all(0.0f);
    }
  }
  int64_t i = at;
  for (; i + kHalf <= size; i += kLanes) {
    for (int64_t v = 0; v < kVectors; ++v) {
      const F32 x = F32::load(b + i + v * F32::kLanes);
      for (int r = 0; r < kRows; ++r) {
        sums[r][v] = sums[r][v] + F32::load(a[r] + i + v * F32::kLanes) * x;
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int64_t v = 0; v < kVectors; ++v) {
      sums[r][v].store(lanes[r] + at + v * F32::kLanes);
    }
    for (int64_t lane = 0; i + lane < size && lane < kHalf; ++lane) {
      lanes[r][at + lane] += a[r][i + lane] * b[i + lane];
    }
  }
}

// Inner products of several rows with one.
template <int kRows>
inline void lanes_dots(const float* const* a, const float* b, int64_t size, float* to) {
  alignas(64) float lanes[kRows][kLanes];
  half_lanes<kRows>(a, b, size, 0, lanes);
  half_lanes<kRows>(a, b, size, kLanes / 2, lanes);
  for (int r = 0; r < kRows; ++r) {
    to[r] = fold_lanes(lanes[r]);
  }
}

inline float lanes_dot(const float* a, const float* b, int64_t size) {
  if (size <= 16) {
    return dot_of_few<float>(a, b, size);
  }
  float found;
  lanes_dots<1>(&a, b, size, &found);
  return found;
}

// Products of two floats are exact in double.
inline double lanes_dot_wide(const float* a, const float* b, int64_t size) {
  if (size <= 16) {
    return dot_of_few<double>(a, b, size);
  }
  alignas(64) double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += static_cast<double>(a[i + lane]) * static_cast<double>(b[i + lane]);
    }
  }
  for (int64_t lane = 0; i + lane < size; ++lane) {
    lanes[lane] += static_cast<double>(a[i + lane]) * static_cast<double>(b[i + lane]);
  }
  return fold_lanes(lanes);
}

// The largest magnitude; NaN if there is one.
inline float largest_magnitude(const float* x, int64_t size) { return static_cast<float>(abs_max(x, size)); }

// Row k of `to` becomes the sum over rows of weights[k][row] * rows[row]: four sums of every fourth row, added in
// pairs. Whole rows at a time: columns of rows whose stride is a power of two share few sets of a cache. And 16 rows at
// a time, or most of the work would be to fetch and put back sums.
// sums: 4 x rank x width.
inline void combine_rows(const float* weights, int64_t rank, const float* rows, int64_t count, int64_t width,
                         float* __restrict sums, float* __restrict to) {
  __builtin_memset(sums, 0, static_cast<size_t>(4 * rank * width) * sizeof(float));
  int64_t row = 0;
  for (; row + 16 <= count; row += 16) {
    for (int64_t k = 0; k < rank; ++k) {
      for (int64_t part = 0; part < 4; ++part) {
        const float* w = weights + k * count + row + part;
        const float* x = rows + (row + part) * width;
        const float w0 = w[0], w1 = w[4], w2 = w[8], w3 = w[12];
        float* __restrict sum = sums + (k * 4 + part) * width;
        for (int64_t i = 0; i < width; ++i) {
          sum[i] = (((sum[i] + w0 * x[i]) + w1 * x[4 * width + i]) + w2 * x[8 * width + i]) + w3 * x[12 * width + i];
        }
      }
    }
  }
  for (; row < count; ++row) {
    const float* from = rows + row * width;
    for (int64_t k = 0; k < rank; ++k) {
      const float weight = weights[k * count + row];
      float* __restrict sum = sums + (k * 4 + row % 4) * width;
      for (int64_t i = 0; i < width; ++i) {
        sum[i] += weight * from[i];
      }
    }
  }
  for (int64_t k = 0; k < rank; ++k) {
    const float* four = sums + k * 4 * width;
    for (int64_t i = 0; i < width; ++i) {
      to[k * width + i] = (four[i] + four[width + i]) + (four[2 * width + i] + four[3 * width + i]);
    }
  }
}
