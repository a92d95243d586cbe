// Scores of int8 rows for one query: the exact inner product, rounded to float, times the row's scale, times the
// query's.
GRADKERN_INLINE int32_t row_dot(const int8_t* row, const int16_t* query, int64_t width) {
  IntDot dot = IntDot::zero();
  int64_t j = 0;
  for (; j + kLine<int8_t> <= width; j += kLine<int8_t>) {
    prefetch(row + j);
    for (int64_t i = 0; i < kLine<int8_t>; i += IntDot::kLanes) {
      dot.add(row + j + i, query + j + i);
    }
  }
  for (; j + IntDot::kLanes <= width; j += IntDot::kLanes) {
    dot.add(row + j, query + j);
  }
  int32_t total = dot.total();
  for (; j < width; ++j) {  // integers: the tail needs no care
    total += static_cast<int32_t>(row[j]) * query[j];
  }
  return total;
}

void sketch_scores_loop(const int8_t* codes, const float* scales, int64_t rows, int64_t width, const int16_t* query,
                        float query_scale, float* scores) {
  for (int64_t i = 0; i < rows; ++i) {
    scores[i] = static_cast<float>(row_dot(codes + i * width, query, width)) * scales[i] * query_scale;
  }
}
