// Registers the native operators: unbox, check, split into fixed chunks, call the loops. No arithmetic on elements.
//
// A table is int64 [tensors, 2 + operands]: element count, first chunk, then one address per operand.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/step_scalars.h"

namespace gradkern {
namespace {

using torch::stable::Tensor;

// Chunks that one thread takes at least: waking a thread costs more than about 64 KiB of work.
constexpr int64_t kGrainElements = 16384;

struct Table {
  const int64_t* rows;
  int64_t count;
  int64_t columns;

  Table(const char* op, const Tensor& table, int64_t operands)
      : rows(static_cast<const int64_t*>(table.const_data_ptr())), count(table.size(0)), columns(2 + operands) {
    check_table(op, table, columns);
  }

  int64_t size(int64_t row) const { return rows[row * columns]; }
  int64_t first_chunk(int64_t row) const { return rows[row * columns + 1]; }
  unsigned char* address(int64_t row, int64_t operand) const {
    return reinterpret_cast<unsigned char*>(rows[row * columns + 2 + operand]);
  }
  int64_t row_chunks(int64_t row) const { return (size(row) + kChunk - 1) / kChunk; }
  int64_t chunks() const { return count == 0 ? 0 : first_chunk(count - 1) + row_chunks(count - 1); }

  // Grain in chunks such that a thread gets about kGrainElements, whatever the size of the tensors.
  int64_t grain() const {
    int64_t elements = 0;
    for (int64_t row = 0; row < count; ++row) {
      elements += size(row);
    }
    return std::max<int64_t>(1, kGrainElements * chunks() / std::max<int64_t>(1, elements));
  }

  int64_t row_of(int64_t chunk) const {
    int64_t low = 0;
    int64_t high = count - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      first_chunk(middle) <= chunk ? low = middle : high = middle - 1;
    }
    return low;
  }

  // Calls body(row, chunk, offset, size) for every chunk, in parallel. Rows without elements have no chunk.
  template <class Body>
  void for_each_chunk(const Body& body) const {
    torch::stable::parallel_for(0, chunks(), grain(), [&](int64_t begin, int64_t end) {
      int64_t row = row_of(begin);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        while (chunk >= first_chunk(row) + row_chunks(row)) {
          ++row;
        }
        const int64_t offset = (chunk - first_chunk(row)) * kChunk;
        body(row, chunk, offset, std::min(kChunk, size(row) - offset));
      }
    });
  }
};

// Any table will do: the sum is taken over its operand number `operand`.
void sumsq_table(Tensor table_tensor, int64_t operand, int64_t dtype_code, Tensor partials) {
  STD_TORCH_CHECK(table_tensor.dim() == 2 && operand >= 0 && operand < table_tensor.size(1) - 2,
                  "sumsq: operand must be a column of the table, got ", operand);
  const Table table("sumsq", table_tensor, table_tensor.size(1) - 2);
  const DType dtype = checked_dtype("sumsq", dtype_code);
  check_block("sumsq", "partials", partials, table.chunks());
  auto* out = static_cast<double*>(partials.mutable_data_ptr());
  const int64_t item = item_size(dtype);
  const auto sumsq = kernels().sumsq;
  table.for_each_chunk([&](int64_t row, int64_t chunk, int64_t offset, int64_t size) {
    out[chunk] = sumsq(dtype, table.address(row, operand) + offset * item, size);
  });
}

void accumulate_table(Tensor table_tensor, int64_t dtype_code, std::optional<Tensor> partials, bool overwrite) {
  const Table table("accumulate_", table_tensor, 2);
  const DType dtype = checked_dtype("accumulate_", dtype_code);
  double* out = nullptr;
  if (partials.has_value()) {
    check_block("accumulate_", "partials", *partials, table.chunks());
    out = static_cast<double*>(partials->mutable_data_ptr());
  }
  const int64_t item = item_size(dtype);
  const auto accumulate = kernels().accumulate;
  table.for_each_chunk([&](int64_t row, int64_t chunk, int64_t offset, int64_t size) {
    accumulate(reinterpret_cast<float*>(table.address(row, 0)) + offset, table.address(row, 1) + offset * item, dtype,
               size, overwrite, out == nullptr ? nullptr : out + chunk);
  });
}

void step_scalars(Tensor scalars, torch::headeronly::HeaderOnlyArrayRef<Tensor> steps,
                  torch::headeronly::HeaderOnlyArrayRef<Tensor> partials, double max_norm,
                  std::optional<double> grad_scale, bool skip) {
  check_block("step_scalars_", "scalars", scalars, kStepScalars);
  ExactSum sum;
  for (const Tensor& block : partials) {
    check_block("step_scalars_", "partials", block, 0);
    const auto* values = static_cast<const double*>(block.const_data_ptr());
    for (int64_t i = 0; i < block.numel(); ++i) {
      sum.add(values[i]);
    }
  }
  const double scale = grad_scale.value_or(1.0);
  const double norm = std::sqrt(sum.value()) / scale;
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
    return;
  }
  for (const Tensor& block : steps) {
    STD_TORCH_CHECK(block.scalar_type() == torch::headeronly::ScalarType::Float && block.is_contiguous(),
                    "step_scalars_: steps must be contiguous fp32 tensors");
    auto* values = static_cast<float*>(block.mutable_data_ptr());
    for (int64_t i = 0; i < block.numel(); ++i) {
      values[i] += 1.0f;
    }
  }
}

// Operands: param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq (address 0 without amsgrad), step.
void adamw_step_table(Tensor table_tensor, Tensor scalars, int64_t param_dtype, int64_t grad_dtype, int64_t state_dtype,
                      double lr, double beta1, double beta2, double eps, double weight_decay, bool maximize) {
  const char* op = "adamw_step_";
  const Table table(op, table_tensor, 6);
  check_block(op, "scalars", scalars, kStepScalars);
  AdamWChunk base{};
  base.param_dtype = checked_dtype(op, param_dtype);
  base.grad_dtype = checked_dtype(op, grad_dtype);
  base.state_dtype = checked_dtype(op, state_dtype);
  const auto* block = static_cast<const double*>(scalars.const_data_ptr());
  if (block[kSkip] != 0.0) {
    return;
  }
  const double grad_multiplier = block[kGradMultiplier];
  const int64_t param_item = item_size(base.param_dtype);
  const int64_t grad_item = item_size(base.grad_dtype);
  const int64_t state_item = item_size(base.state_dtype);
  const auto adamw = kernels().adamw;
  const auto scalars_at = [&](float step) {
    return adamw_scalars(grad_multiplier, static_cast<int64_t>(step), lr, beta1, beta2, eps, weight_decay, maximize);
  };
  // Tensors of one group nearly always share their step: form the scalars once and again only where it differs.
  const float first_step = table.count == 0 ? 1.0f : *reinterpret_cast<const float*>(table.address(0, 5));
  const AdamWScalars shared = scalars_at(first_step);
  table.for_each_chunk([&](int64_t row, int64_t, int64_t offset, int64_t size) {
    AdamWChunk chunk = base;
    chunk.param = table.address(row, 0) + offset * param_item;
    chunk.grad = table.address(row, 1) + offset * grad_item;
    chunk.exp_avg = table.address(row, 2) + offset * state_item;
    chunk.exp_avg_sq = table.address(row, 3) + offset * state_item;
    unsigned char* max_exp_avg_sq = table.address(row, 4);
    chunk.max_exp_avg_sq = max_exp_avg_sq == nullptr ? nullptr : max_exp_avg_sq + offset * state_item;
    chunk.size = size;
    const float step = *reinterpret_cast<const float*>(table.address(row, 5));
    adamw(chunk, step == first_step ? shared : scalars_at(step));
  });
}

void triad(Tensor out, Tensor a, Tensor b, bool streaming) {
  STD_TORCH_CHECK(out.numel() == a.numel() && out.numel() == b.numel(), "triad: sizes differ");
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  const auto* first = static_cast<const float*>(a.const_data_ptr());
  const auto* second = static_cast<const float*>(b.const_data_ptr());
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(to) % 64 == 0, "triad: out must be aligned to 64 bytes");
  const int64_t chunks = (out.numel() + kChunk - 1) / kChunk;
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    const int64_t from = begin * kChunk;
    kernels().triad(to + from, first + from, second + from, std::min(end * kChunk, out.numel()) - from, streaming);
  });
}

std::string isa() { return isa_name(); }

}  // namespace
}  // namespace gradkern

STABLE_TORCH_LIBRARY_IMPL(gradkern, CPU, m) {
  m.impl("_sumsq_table_", TORCH_BOX(&gradkern::sumsq_table));
  m.impl("_accumulate_table_", TORCH_BOX(&gradkern::accumulate_table));
  m.impl("_step_scalars_native_", TORCH_BOX(&gradkern::step_scalars));
  m.impl("_adamw_step_table_", TORCH_BOX(&gradkern::adamw_step_table));
  m.impl("_triad_", TORCH_BOX(&gradkern::triad));
}

STABLE_TORCH_LIBRARY_IMPL(gradkern, CompositeExplicitAutograd, m) { m.impl("_isa", TORCH_BOX(&gradkern::isa)); }
