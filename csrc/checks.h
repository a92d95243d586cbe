// Checks that stand between Python and raw memory: only what would corrupt memory is repeated here, Python having
// validated the rest with better messages.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/kernels.h"

namespace gradkern {

inline void check_table(const char* op, const torch::stable::Tensor& table, int64_t columns) {
  STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == columns && table.is_contiguous() &&
                      table.scalar_type() == torch::headeronly::ScalarType::Long,
                  op, ": table must be a contiguous int64 tensor of ", columns,
                  " columns, got another shape or dtype; tables come from gradkern.ops._table.AddressTable");
}

inline void check_block(const char* op, const char* name, const torch::stable::Tensor& block, int64_t size) {
  STD_TORCH_CHECK(
      block.numel() >= size && block.is_contiguous() && block.scalar_type() == torch::headeronly::ScalarType::Double,
      op, ": ", name, " must be a contiguous fp64 tensor of at least ", size, " elements, got ", block.numel(),
      " elements or another dtype");
}

inline DType checked_dtype(const char* op, int64_t code) {
  STD_TORCH_CHECK(code >= 0 && code <= 2, op, ": dtype code must be 0 (fp32), 1 (bf16) or 2 (fp16), got ", code);
  return static_cast<DType>(code);
}

}  // namespace gradkern
