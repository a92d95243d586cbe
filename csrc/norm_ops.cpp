// Registers the operators that read gradients: unbox, check, split into fixed chunks, call the loops. No arithmetic on
// elements.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <mutex>
#include <optional>

#include "cpu/exact_squares.h"
#include "cpu/isa.h"
#include "cpu/step_scalars.h"
#include "table.h"

namespace gradkern {
namespace {

using torch::headeronly::HeaderOnlyArrayRef;

// Any table will do: the sum is taken over its operand number `operand`. Returns the partials written.
const double* sum_squares(const char* op, const Tensor& table_tensor, int64_t operand, int64_t dtype_code,
                          const Tensor& partials, int64_t* chunks) {
  STD_TORCH_CHECK(table_tensor.dim() == 2 && operand >= 0 && operand < table_tensor.size(1) - 2, op,
                  ": operand must be a column of the table, got ", operand);
  const Table table(op, table_tensor, table_tensor.size(1) - 2);
  const DType dtype = checked_dtype(op, dtype_code);
  *chunks = table.chunks();
  check_block(op, "partials", partials, *chunks);
  auto* out = static_cast<double*>(partials.mutable_data_ptr());
  const int64_t item = item_size(dtype);
  const auto sumsq = kernels().sumsq;
  table.for_each_chunk([&](int64_t row, int64_t chunk, int64_t offset, int64_t size) {
    out[chunk] = sumsq(dtype, table.address(row, operand) + offset * item, size);
  });
  return out;
}

void sumsq_table(Tensor table, int64_t operand, int64_t dtype, Tensor partials) {
  int64_t chunks = 0;
  sum_squares("sumsq", table, operand, dtype, partials, &chunks);
}

// As sumsq_table; every thread sums its chunks into words of its own, and the words are added.
void sumsq_exact_table(Tensor table_tensor, int64_t operand, int64_t dtype_code, Tensor limbs) {
  STD_TORCH_CHECK(table_tensor.dim() == 2 && operand >= 0 && operand < table_tensor.size(1) - 2,
                  "sumsq_exact: operand must be a column of the table, got ", operand);
  STD_TORCH_CHECK(limbs.numel() == ExactSquares::kWords && limbs.is_contiguous() &&
                      limbs.scalar_type() == torch::headeronly::ScalarType::Long,
                  "sumsq_exact: limbs must be a contiguous int64 tensor of ", ExactSquares::kWords, " elements, got ",
                  limbs.numel(), " elements or another dtype");
  const Table table("sumsq_exact", table_tensor, table_tensor.size(1) - 2);
  const DType dtype = checked_dtype("sumsq_exact", dtype_code);
  const int64_t item = item_size(dtype);
  const auto sumsq_exact = kernels().sumsq_exact;
  ExactSquares total;
  std::mutex guard;
  table.for_each_range([&](int64_t begin, int64_t end) {
    ExactSquares part;
    table.walk(begin, end, [&](int64_t row, int64_t, int64_t offset, int64_t size) {
      sumsq_exact(dtype, table.address(row, operand) + offset * item, size, part.words);
    });
    const std::lock_guard<std::mutex> lock(guard);
    total.add(part);
  });
  total.carry();
  __builtin_memcpy(limbs.mutable_data_ptr(), total.words, sizeof(total.words));
}

void abs_norm_table(Tensor table_tensor, int64_t dtype_code, bool maximum, Tensor partials) {
  const Table table("abs_norm", table_tensor, 1);
  const DType dtype = checked_dtype("abs_norm", dtype_code);
  check_block("abs_norm", "partials", partials, table.chunks());
  auto* out = static_cast<double*>(partials.mutable_data_ptr());
  const int64_t item = item_size(dtype);
  const auto abs_norm = kernels().abs_norm;
  table.for_each_chunk([&](int64_t row, int64_t chunk, int64_t offset, int64_t size) {
    out[chunk] = abs_norm(dtype, table.address(row, 0) + offset * item, size, maximum);
  });
}

// Bytes of main_grad from which overwriting streams: what leaves a core's share of the caches before it is read again
// is better never brought in. A constant: what systems report as their last cache is at times that of other cores.
constexpr int64_t kStreamingBytes = int64_t{1} << 26;

void accumulate_table(Tensor table_tensor, int64_t dtype_code, std::optional<Tensor> partials, bool overwrite) {
  const Table table("accumulate_", table_tensor, 2);
  const DType dtype = checked_dtype("accumulate_", dtype_code);
  double* out = nullptr;
  if (partials.has_value()) {
    check_block("accumulate_", "partials", *partials, table.chunks());
    out = static_cast<double*>(partials->mutable_data_ptr());
  }
  const int64_t item = item_size(dtype);
  const int64_t main_bytes = table.elements() * static_cast<int64_t>(sizeof(float));
  const Fold fold = !overwrite                      ? Fold::kAdd
                    : main_bytes >= kStreamingBytes ? Fold::kOverwriteStreaming
                                                    : Fold::kOverwrite;
  const auto accumulate = kernels().accumulate;
  table.for_each_range([&](int64_t begin, int64_t end) {
    table.walk(begin, end, [&](int64_t row, int64_t chunk, int64_t offset, int64_t size) {
      accumulate(reinterpret_cast<float*>(table.address(row, 0)) + offset, table.address(row, 1) + offset * item, dtype,
                 size, fold, out == nullptr ? nullptr : out + chunk);
    });
    if (fold == Fold::kOverwriteStreaming) {
      finish_streaming();
    }
  });
}

// Columns: gradients, codes, exponents, keys.
void stash_table(Tensor table_tensor, int64_t dtype_code, Tensor partials) {
  const Table table("stash_", table_tensor, 4);
  const DType dtype = checked_dtype("stash_", dtype_code);
  check_block("stash_", "partials", partials, table.chunks());
  auto* out = static_cast<double*>(partials.mutable_data_ptr());
  const int64_t item = item_size(dtype);
  const auto stash = kernels().stash;
  table.for_each_chunk([&](int64_t row, int64_t chunk, int64_t offset, int64_t size) {
    out[chunk] =
        stash(table.address(row, 0) + offset * item, dtype, offset, size, static_cast<uint32_t>(table.integer(row, 3)),
              table.address(row, 1) + offset, table.address(row, 2) + offset / kStateBlock);
  });
}

// Columns: gradients, codes, exponents.
void unstash_table(Tensor table_tensor, int64_t dtype_code, Tensor multiplier) {
  const Table table("unstash_", table_tensor, 3);
  const DType dtype = checked_dtype("unstash_", dtype_code);
  STD_TORCH_CHECK(multiplier.numel() == 1 && multiplier.scalar_type() == torch::headeronly::ScalarType::Float,
                  "unstash_: multiplier must be one fp32 number, got ", multiplier.numel(), " or another dtype");
  const float factor = *static_cast<const float*>(multiplier.const_data_ptr());
  const int64_t item = item_size(dtype);
  const auto unstash = kernels().unstash;
  table.for_each_chunk([&](int64_t row, int64_t, int64_t offset, int64_t size) {
    unstash(table.address(row, 0) + offset * item, dtype, size, table.address(row, 1) + offset,
            table.address(row, 2) + offset / kStateBlock, factor);
  });
}

// `tables`, `operands`, `dtypes` and `sums` are parallel lists: gradients whose squares are still to be summed.
void step_scalars(Tensor scalars, HeaderOnlyArrayRef<Tensor> steps, HeaderOnlyArrayRef<Tensor> partials,
                  HeaderOnlyArrayRef<Tensor> tables, HeaderOnlyArrayRef<int64_t> operands,
                  HeaderOnlyArrayRef<int64_t> dtypes, HeaderOnlyArrayRef<Tensor> sums, double max_norm,
                  std::optional<double> grad_scale, bool skip, bool skip_nonfinite) {
  const char* op = "step_scalars_";
  check_block(op, "scalars", scalars, kStepScalars);
  STD_TORCH_CHECK(operands.size() == tables.size() && dtypes.size() == tables.size() && sums.size() == tables.size(),
                  op, ": tables, operands, dtypes and sums must be as many, got ", tables.size(), ", ", operands.size(),
                  ", ", dtypes.size(), " and ", sums.size());
  for (const Tensor& block : steps) {
    STD_TORCH_CHECK(block.scalar_type() == torch::headeronly::ScalarType::Float && block.is_contiguous(), op,
                    ": steps must be contiguous fp32 tensors");
  }
  ExactSum sum;
  for (const Tensor& block : partials) {
    check_block(op, "partials", block, 0);
    const auto* values = static_cast<const double*>(block.const_data_ptr());
    for (int64_t i = 0; i < block.numel(); ++i) {
      sum.add(values[i]);
    }
  }
  for (size_t k = 0; k < tables.size(); ++k) {
    int64_t chunks = 0;
    const double* values = sum_squares(op, tables[k], operands[k], dtypes[k], sums[k], &chunks);
    for (int64_t i = 0; i < chunks; ++i) {
      sum.add(values[i]);
    }
  }
  const double scale = grad_scale.value_or(1.0);
  const double norm = std::sqrt(sum.value()) / scale;
  skip = skip || (skip_nonfinite && !std::isfinite(norm));
  double clip = 1.0;
  if (!std::isinf(max_norm)) {
    clip = max_norm / (norm + 1e-6);
    clip = clip > 1.0 ? 1.0 : clip;  // NaN stays, as in torch
  }
  auto* out = static_cast<double*>(scalars.mutable_data_ptr());
  out[kNorm] = norm;
  out[kGradMultiplier] = static_cast<double>(static_cast<float>(clip / scale));
  out[kSkip] = skip ? 1.0 : 0.0;
  out[kClipCoef] = clip;
  if (skip) {
    out[kSkipped] += 1.0;
    return;
  }
  for (const Tensor& block : steps) {
    auto* values = static_cast<float*>(block.mutable_data_ptr());
    for (int64_t i = 0; i < block.numel(); ++i) {
      values[i] += 1.0f;
    }
  }
}

}  // namespace
}  // namespace gradkern

STABLE_TORCH_LIBRARY_IMPL(gradkern, CPU, m) {
  m.impl("_sumsq_table_", TORCH_BOX(&gradkern::sumsq_table));
  m.impl("_sumsq_exact_table_", TORCH_BOX(&gradkern::sumsq_exact_table));
  m.impl("_abs_norm_table_", TORCH_BOX(&gradkern::abs_norm_table));
  m.impl("_accumulate_table_", TORCH_BOX(&gradkern::accumulate_table));
  m.impl("_stash_table_", TORCH_BOX(&gradkern::stash_table));
  m.impl("_unstash_table_", TORCH_BOX(&gradkern::unstash_table));
  m.impl("_step_scalars_native_", TORCH_BOX(&gradkern::step_scalars));
}
