// Per-sample gradients, compressed: gradkern.rollback._reduce says what is computed, in the order that is kept here.

constexpr float kTinyNormal = 1.17549435e-38f;

// One int8 code an element, one scale for all: codes are x / scale, rounded to even. 0 where the scale is not finite.
inline float quantize_row(const float* x, int64_t size, int8_t* codes) {
  const float scale = largest_magnitude(x, size) / 127.0f;
  if (!(scale <= 3.40282347e38f)) {
    __builtin_memset(codes, 0, static_cast<size_t>(size));
    return scale;
  }
  const float divisor = scale > kTinyNormal ? scale : kTinyNormal;
  for (int64_t i = 0; i < size; ++i) {
    codes[i] = static_cast<int8_t>(static_cast<int32_t>(__builtin_rintf(x[i] / divisor)));
  }
  return scale;
}

inline void normalise_row(float* x, int64_t size) {
  const float largest = largest_magnitude(x, size);
  const float divisor = largest < kTinyNormal ? kTinyNormal : largest;
  for (int64_t i = 0; i < size; ++i) {
    x[i] = x[i] / divisor;
  }
  const float root = __builtin_sqrtf(lanes_dot(x, x, size));
  const float length = root < kTinyNormal ? kTinyNormal : root;
  for (int64_t i = 0; i < size; ++i) {
    x[i] = x[i] / length;
  }
}

// Gram-Schmidt, each row twice: once leaves a nearly dependent row far from orthogonal.
inline void orthonormalise_rows(float* rows, int64_t count, int64_t width, float* along, float* sums, float* sum) {
  for (int64_t row = 0; row < count; ++row) {
    float* x = rows + row * width;
    normalise_row(x, width);
    for (int64_t pass = 0; pass < 2 && row > 0; ++pass) {
      for (int64_t other = 0; other < row; ++other) {
        along[other] = lanes_dot(x, rows + other * width, width);
      }
      combine_rows(along, 1, rows, row, width, sums, sum);
      for (int64_t i = 0; i < width; ++i) {
        x[i] = x[i] - sum[i];
      }
      normalise_row(x, width);
    }
  }
}

inline void dot_rows(const float* directions, int64_t rank, const float* rows, int64_t count, int64_t width,
                     float* to) {
  for (int64_t row = 0; row < count; ++row) {
    const float* x = rows + row * width;
    int64_t k = 0;
    for (; k + 2 <= rank; k += 2) {
      const float* pair[2] = {directions + k * width, directions + (k + 1) * width};
      float found[2];
      lanes_dots<2>(pair, x, width, found);
      to[k * count + row] = found[0];
      to[(k + 1) * count + row] = found[1];
    }
    if (k < rank) {
      to[k * count + row] = lanes_dot(directions + k * width, x, width);
    }
  }
}

inline void quantize_rows(const float* rows, int64_t count, int64_t width, int8_t* codes, float* scales) {
  for (int64_t row = 0; row < count; ++row) {
    scales[row] = quantize_row(rows + row * width, width, codes + row * width);
  }
}

// One sample's leftᵀ @ right, or right itself where left is null; see ReduceSample.
void reduce_sample_loop(const ReduceSample& sample) {
  const int64_t tokens = sample.tokens, height = sample.height, width = sample.width, rank = sample.rank;
  if (tokens <= rank) {
    quantize_rows(sample.right, tokens, width, sample.right_codes, sample.right_scales);
    if (sample.left != nullptr) {
      quantize_rows(sample.left, tokens, height, sample.left_codes, sample.left_scales);
    } else {
      for (int64_t row = 0; row < tokens; ++row) {
        for (int64_t i = 0; i < tokens; ++i) {
          sample.left_codes[row * tokens + i] = row == i ? 127 : 0;
        }
        sample.left_scales[row] = 1.0f / 127.0f;
      }
    }
    return;
  }
  float* along = sample.scratch;        // rank x tokens
  float* left = along + rank * tokens;  // rank x height
  float* right = left + rank * height;  // rank x width
  float* sum = right + rank * width;    // width
  float* sums = sum + width;            // 4 x rank x the larger of height and width
  dot_rows(sample.start, rank, sample.right, tokens, width, along);
  if (sample.left != nullptr) {
    combine_rows(along, rank, sample.left, tokens, height, sums, left);
    for (int64_t k = 0; k < rank; ++k) {
      normalise_row(left + k * height, height);
    }
    dot_rows(left, rank, sample.left, tokens, height, along);
  } else {
    for (int64_t k = 0; k < rank; ++k) {
      normalise_row(along + k * tokens, tokens);
    }
  }
  combine_rows(along, rank, sample.right, tokens, width, sums, right);
  orthonormalise_rows(right, rank, width, along, sums, sum);
  dot_rows(right, rank, sample.right, tokens, width, along);
  if (sample.left != nullptr) {
    combine_rows(along, rank, sample.left, tokens, height, sums, left);
    quantize_rows(left, rank, height, sample.left_codes, sample.left_scales);
  } else {
    quantize_rows(along, rank, tokens, sample.left_codes, sample.left_scales);
  }
  quantize_rows(right, rank, width, sample.right_codes, sample.right_scales);
}

// One sample's rows added up, to one row of codes. scratch: tokens + 5 x width.
void reduce_vector_loop(const float* rows, int64_t tokens, int64_t width, float* scratch, int8_t* codes, float* scale) {
  if (tokens == 1) {
    *scale = quantize_row(rows, width, codes);
    return;
  }
  float* sum = scratch + tokens;
  for (int64_t i = 0; i < tokens; ++i) {
    scratch[i] = 1.0f;
  }
  combine_rows(scratch, 1, rows, tokens, width, sum + width, sum);
  *scale = quantize_row(sum, width, codes);
}
