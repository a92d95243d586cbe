// Registers the solvers of checkpoint plans: unbox, check, call. No decision is made here.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <tuple>

#include "cpu/knapsack.h"
#include "cpu/rotor.h"

namespace gradkern {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_column(const char* op, const char* name, const Tensor& column, ScalarType dtype, int64_t size) {
  STD_TORCH_CHECK(column.numel() == size && column.is_contiguous() && column.scalar_type() == dtype, op, ": ", name,
                  " must be a contiguous tensor of ", size, " elements, got ", column.numel(),
                  " elements or another dtype");
}

// Options of unit i are numbers first[i] to first[i + 1]; returns how many there are.
int64_t checked_first(const char* op, const Tensor& first, int64_t units) {
  check_column(op, "first", first, ScalarType::Long, units + 1);
  const auto* numbers = static_cast<const int64_t*>(first.const_data_ptr());
  STD_TORCH_CHECK(numbers[0] == 0, op, ": first must begin with 0, got ", numbers[0]);
  for (int64_t i = 0; i < units; ++i) {
    const int64_t count = numbers[i + 1] - numbers[i];
    STD_TORCH_CHECK(count > 0 && count <= INT16_MAX, op, ": unit ", i, " has ", count, " options, expected 1 to ",
                    INT16_MAX);
  }
  return numbers[units];
}

OptionChain checked_chain(const char* op, const Tensor& first, const Tensor& saved, const Tensor& peak,
                          const Tensor& extra, const Tensor& choices) {
  const int64_t options = checked_first(op, first, choices.numel());
  check_column(op, "choices", choices, ScalarType::Long, choices.numel());
  const OptionChain chain{choices.numel(), static_cast<const int64_t*>(first.const_data_ptr()),
                          static_cast<const int64_t*>(saved.const_data_ptr()),
                          static_cast<const int64_t*>(peak.const_data_ptr()),
                          static_cast<const double*>(extra.const_data_ptr())};
  check_column(op, "saved", saved, ScalarType::Long, options);
  check_column(op, "peak", peak, ScalarType::Long, options);
  check_column(op, "extra", extra, ScalarType::Double, options);
  return chain;
}

int64_t least_capacity_of(Tensor first, Tensor saved, Tensor peak, Tensor extra, Tensor choices) {
  const OptionChain chain = checked_chain("least_capacity", first, saved, peak, extra, choices);
  return least_capacity(chain, static_cast<int64_t*>(choices.mutable_data_ptr()));
}

// Returns the bound on the seconds of all choices, and whether the one found is the best; NaN where none fits.
std::tuple<double, bool> cheapest_of(Tensor first, Tensor saved, Tensor peak, Tensor extra, int64_t capacity,
                                     int64_t states, Tensor choices) {
  const char* op = "prefix_knapsack";
  const OptionChain chain = checked_chain(op, first, saved, peak, extra, choices);
  STD_TORCH_CHECK(states >= 2 && states <= INT32_MAX, op, ": states must be 2 or more, got ", states);
  double lower_s = 0.0;
  bool is_best = false;
  const bool fits = PrefixKnapsack(chain, capacity, states)
                        .search(static_cast<int64_t*>(choices.mutable_data_ptr()), &lower_s, &is_best);
  return {fits ? lower_s : std::nan(""), is_best};
}

void check_held(const char* op, const char* name, const Tensor& held, int64_t size) {
  check_column(op, name, held, ScalarType::Long, size);
  const auto* slots = static_cast<const int64_t*>(held.const_data_ptr());
  for (int64_t i = 0; i < size; ++i) {
    // So much that nothing overflows when it is added.
    STD_TORCH_CHECK(slots[i] >= 0 && slots[i] <= INT64_MAX / 2, op, ": ", name, "[", i, "] must not be negative, got ",
                    slots[i]);
  }
}

void rotor_table_of(Tensor first, Tensor option_held, Tensor option_needs, Tensor option_s, Tensor input_held,
                    Tensor start_needs, Tensor run_needs, Tensor forward_s, int64_t slots, Tensor table) {
  const char* op = "rotor_table";
  const int64_t stages = forward_s.numel();
  const int64_t options = checked_first(op, first, stages);
  STD_TORCH_CHECK(slots >= 0 && slots <= INT32_MAX, op, ": slots must not be negative, got ", slots);
  check_held(op, "option_held", option_held, options);
  check_column(op, "option_needs", option_needs, ScalarType::Long, options * stages);
  check_column(op, "option_s", option_s, ScalarType::Double, options);
  check_held(op, "input_held", input_held, stages);
  check_column(op, "start_needs", start_needs, ScalarType::Long, stages * stages);
  check_column(op, "run_needs", run_needs, ScalarType::Long, stages * stages);
  check_column(op, "forward_s", forward_s, ScalarType::Double, stages);
  check_column(op, "table", table, ScalarType::Double,
               RotorTable::blocks_of(slots) * RotorTable::rows_of(stages) * RotorTable::kWidth);
  const RotorGrid grid{stages,
                       slots,
                       static_cast<const int64_t*>(first.const_data_ptr()),
                       static_cast<const int64_t*>(option_held.const_data_ptr()),
                       static_cast<const int64_t*>(option_needs.const_data_ptr()),
                       static_cast<const double*>(option_s.const_data_ptr()),
                       static_cast<const int64_t*>(input_held.const_data_ptr()),
                       static_cast<const int64_t*>(start_needs.const_data_ptr()),
                       static_cast<const int64_t*>(run_needs.const_data_ptr()),
                       static_cast<const double*>(forward_s.const_data_ptr())};
  RotorTable(grid, static_cast<double*>(table.mutable_data_ptr())).fill();
}

}  // namespace
}  // namespace gradkern

STABLE_TORCH_LIBRARY_IMPL(gradkern, CPU, m) {
  m.impl("_least_capacity_", TORCH_BOX(&gradkern::least_capacity_of));
  m.impl("_prefix_knapsack_", TORCH_BOX(&gradkern::cheapest_of));
  m.impl("_rotor_table_", TORCH_BOX(&gradkern::rotor_table_of));
}
