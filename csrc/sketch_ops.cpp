// Registers the search among sketches: unbox, check, split into blocks of rows, call the loops, keep the best.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <vector>

#include "cpu/isa.h"
#include "cpu/top_k.h"

namespace gradkern {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Bytes of rows that are scored for every query before the next ones are read: they stay in the first cache.
constexpr int64_t kBlockBytes = 16384;

// Blocks that one thread takes at least: waking a thread costs more than reading a few.
constexpr int64_t kGrainBlocks = 16;

// The widest rows whose inner products surely fit 32 bits.
constexpr int64_t kMostWidth = 131071;

void check_matrix(const char* name, const Tensor& tensor, ScalarType dtype, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns && tensor.is_contiguous() &&
                      tensor.scalar_type() == dtype,
                  "sketch_top: ", name, " must be a contiguous tensor of shape (", rows, ", ", columns,
                  "), got another shape or dtype");
}

void check_column(const char* name, const Tensor& tensor, int64_t size) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size && tensor.is_contiguous() &&
                      tensor.scalar_type() == ScalarType::Float,
                  "sketch_top: ", name, " must be a contiguous fp32 tensor of ", size,
                  " elements, got another shape or dtype");
}

void sketch_top(Tensor codes, Tensor scales, Tensor queries, Tensor query_scales, Tensor scores, Tensor positions) {
  STD_TORCH_CHECK(codes.dim() == 2 && queries.dim() == 2 && scores.dim() == 2,
                  "sketch_top: codes, queries and scores must be matrices");
  const int64_t rows = codes.size(0), width = codes.size(1), count = queries.size(0), k = scores.size(1);
  STD_TORCH_CHECK(width <= kMostWidth, "sketch_top: rows must have at most ", kMostWidth, " elements, got ", width);
  STD_TORCH_CHECK(k >= 1 && k <= rows, "sketch_top: k must be 1 to the number of rows, ", rows, ", got ", k);
  check_matrix("codes", codes, ScalarType::Char, rows, width);
  check_column("scales", scales, rows);
  check_matrix("queries", queries, ScalarType::Char, count, width);
  check_column("query_scales", query_scales, count);
  check_matrix("scores", scores, ScalarType::Float, count, k);
  check_matrix("positions", positions, ScalarType::Long, count, k);

  const auto* code = static_cast<const int8_t*>(codes.const_data_ptr());
  const auto* scale = static_cast<const float*>(scales.const_data_ptr());
  const auto* query = static_cast<const int8_t*>(queries.const_data_ptr());
  const auto* query_scale = static_cast<const float*>(query_scales.const_data_ptr());
  const std::vector<int16_t> wide(query, query + count * width);
  const auto score_rows = kernels().sketch_scores;
  const int64_t block = std::max<int64_t>(1, kBlockBytes / std::max<int64_t>(1, width));

  std::vector<TopK> best(static_cast<size_t>(count), TopK(k));
  std::mutex guard;
  torch::stable::parallel_for(0, (rows + block - 1) / block, kGrainBlocks, [&](int64_t begin, int64_t end) {
    std::vector<TopK> found(best.size(), TopK(k));
    std::vector<float> made(static_cast<size_t>(block));
    for (int64_t from = begin * block; from < std::min(end * block, rows); from += block) {
      const int64_t size = std::min(block, rows - from);
      for (size_t q = 0; q < found.size(); ++q) {
        const auto which = static_cast<int64_t>(q);
        score_rows(code + from * width, scale + from, size, width, wide.data() + which * width, query_scale[q],
                   made.data());
        float least = found[q].least();
        for (int64_t i = 0; i < size; ++i) {
          const float score = made[static_cast<size_t>(i)];
          if (score >= least) {  // hardly ever
            found[q].offer({score, from + i});
            least = found[q].least();
          }
        }
      }
    }
    const std::lock_guard<std::mutex> lock(guard);
    for (size_t q = 0; q < found.size(); ++q) {
      best[q].offer(found[q]);
    }
  });

  auto* score = static_cast<float*>(scores.mutable_data_ptr());
  auto* position = static_cast<int64_t*>(positions.mutable_data_ptr());
  for (TopK& each : best) {
    for (const Scored& kept : each.sorted()) {
      *score++ = kept.score;
      *position++ = kept.position;
    }
  }
}

}  // namespace
}  // namespace gradkern

STABLE_TORCH_LIBRARY_IMPL(gradkern, CPU, m) { m.impl("_sketch_top_", TORCH_BOX(&gradkern::sketch_top)); }
