// Registers the solver of checkpoint plans: unbox, check, call. No decision is made here.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <tuple>

#include "cpu/knapsack.h"

namespace gradkern {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_column(const char* op, const char* name, const Tensor& column, ScalarType dtype, int64_t size) {
  STD_TORCH_CHECK(column.numel() == size && column.is_contiguous() && column.scalar_type() == dtype, op, ": ", name,
                  " must be a contiguous tensor of ", size, " elements, got ", column.numel(),
                  " elements or another dtype");
}

OptionChain checked_chain(const char* op, const Tensor& first, const Tensor& saved, const Tensor& peak,
                          const Tensor& extra, const Tensor& choices) {
  check_column(op, "first", first, ScalarType::Long, choices.numel() + 1);
  check_column(op, "choices", choices, ScalarType::Long, choices.numel());
  const OptionChain chain{choices.numel(), static_cast<const int64_t*>(first.const_data_ptr()),
                          static_cast<const int64_t*>(saved.const_data_ptr()),
                          static_cast<const int64_t*>(peak.const_data_ptr()),
                          static_cast<const double*>(extra.const_data_ptr())};
  STD_TORCH_CHECK(chain.first[0] == 0, op, ": first must begin with 0, got ", chain.first[0]);
  for (int64_t i = 0; i < chain.units; ++i) {
    const int64_t count = chain.first[i + 1] - chain.first[i];
    STD_TORCH_CHECK(count > 0 && count <= INT16_MAX, op, ": unit ", i, " has ", count, " options, expected 1 to ",
                    INT16_MAX);
  }
  const int64_t options = chain.first[chain.units];
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

}  // namespace
}  // namespace gradkern

STABLE_TORCH_LIBRARY_IMPL(gradkern, CPU, m) {
  m.impl("_least_capacity_", TORCH_BOX(&gradkern::least_capacity_of));
  m.impl("_prefix_knapsack_", TORCH_BOX(&gradkern::cheapest_of));
}
