// Registers what belongs to no operator: the bandwidth yardstick and the name of the instruction set.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "cpu/isa.h"

namespace gradkern {
namespace {

using torch::stable::Tensor;

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

STABLE_TORCH_LIBRARY_IMPL(gradkern, CPU, m) { m.impl("_triad_", TORCH_BOX(&gradkern::triad)); }

STABLE_TORCH_LIBRARY_IMPL(gradkern, CompositeExplicitAutograd, m) { m.impl("_isa", TORCH_BOX(&gradkern::isa)); }
