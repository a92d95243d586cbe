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

void check_column(const char* name, const Tensor& tensor, ScalarType dtype, int64_t size) {
  STD_TORCH_CHECK(
      tensor.dim() == 1 && tensor.size(0) == size && tensor.is_contiguous() && tensor.scalar_type() == dtype,
      "sketch_top: ", name, " must be a contiguous tensor of ", size, " elements, got another shape or dtype");
}

// Neighbouring rows that are scored together.
struct Block {
  int64_t from;
  int64_t size;
};

// The rows of all ranges in blocks of at most so many; counts the rows.
std::vector<Block> blocks_of(const Tensor& ranges, int64_t rows, int64_t most, int64_t* count) {
  STD_TORCH_CHECK(
      ranges.dim() == 2 && ranges.size(1) == 2 && ranges.is_contiguous() && ranges.scalar_type() == ScalarType::Long,
      "sketch_top: ranges must be a contiguous int64 tensor of two columns");
  const auto* bounds = static_cast<const int64_t*>(ranges.const_data_ptr());
  std::vector<Block> blocks;
  *count = 0;
  for (int64_t r = 0; r < ranges.size(0); ++r) {
    const int64_t begin = bounds[2 * r], end = bounds[2 * r + 1];
    STD_TORCH_CHECK(begin >= 0 && begin <= end && end <= rows, "sketch_top: a range must lie in 0 to ", rows, ", got ",
                    begin, " to ", end);
    *count += end - begin;
    for (int64_t from = begin; from < end; from += most) {
      blocks.push_back({from, std::min(most, end - from)});
    }
  }
  return blocks;
}

void sketch_top(Tensor codes, Tensor scales, Tensor ids, Tensor ranges, Tensor queries, Tensor query_scales,
                Tensor scores, Tensor best_ids) {
  STD_TORCH_CHECK(codes.dim() == 2 && queries.dim() == 2 && scores.dim() == 2,
                  "sketch_top: codes, queries and scores must be matrices");
  const int64_t rows = codes.size(0), width = codes.size(1), count = queries.size(0), k = scores.size(1);
  STD_TORCH_CHECK(width <= kMostWidth, "sketch_top: rows must have at most ", kMostWidth, " elements, got ", width);
  check_matrix("codes", codes, ScalarType::Char, rows, width);
  check_column("scales", scales, ScalarType::Float, rows);
  check_column("ids", ids, ScalarType::Long, rows);
  check_matrix("queries", queries, ScalarType::Char, count, width);
  check_column("query_scales", query_scales, ScalarType::Float, count);
  check_matrix("scores", scores, ScalarType::Float, count, k);
  check_matrix("best_ids", best_ids, ScalarType::Long, count, k);
  int64_t searched = 0;
  const auto blocks =
      blocks_of(ranges, rows, std::max<int64_t>(1, kBlockBytes / std::max<int64_t>(1, width)), &searched);
  STD_TORCH_CHECK(k >= 1 && k <= searched, "sketch_top: k must be 1 to the number of rows in all ranges, ", searched,
                  ", got ", k);

  const auto* code = static_cast<const int8_t*>(codes.const_data_ptr());
  const auto* scale = static_cast<const float*>(scales.const_data_ptr());
  const auto* id = static_cast<const int64_t*>(ids.const_data_ptr());
  const auto* query = static_cast<const int8_t*>(queries.const_data_ptr());
  const auto* query_scale = static_cast<const float*>(query_scales.const_data_ptr());
  const std::vector<int16_t> wide(query, query + count * width);
  const auto score_rows = kernels().sketch_scores;

  std::vector<TopK> best(static_cast<size_t>(count), TopK(k));
  std::mutex guard;
  const auto total = static_cast<int64_t>(blocks.size());
  torch::stable::parallel_for(0, total, kGrainBlocks, [&](int64_t begin, int64_t end) {
    std::vector<TopK> found(best.size(), TopK(k));
    std::vector<float> made(static_cast<size_t>(kBlockBytes));
    for (int64_t b = begin; b < end; ++b) {
      const Block block = blocks[static_cast<size_t>(b)];
      for (size_t q = 0; q < found.size(); ++q) {
        score_rows(code + block.from * width, scale + block.from, block.size, width,
                   wide.data() + static_cast<int64_t>(q) * width, query_scale[q], made.data());
        float least = found[q].least();
        for (int64_t i = 0; i < block.size; ++i) {
          const float score = made[static_cast<size_t>(i)];
          if (score >= least) {  // hardly ever
            found[q].offer({score, id[block.from + i]});
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
  auto* best_id = static_cast<int64_t*>(best_ids.mutable_data_ptr());
  for (TopK& each : best) {
    for (const Scored& kept : each.sorted()) {
      *score++ = kept.score;
      *best_id++ = kept.id;
    }
  }
}

}  // namespace
}  // namespace gradkern

STABLE_TORCH_LIBRARY_IMPL(gradkern, CPU, m) { m.impl("_sketch_top_", TORCH_BOX(&gradkern::sketch_top)); }
