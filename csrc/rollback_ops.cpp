// Registers the loops of recording: unbox, check, split over samples or parameters, call the loops.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/bends.h"
#include "cpu/isa.h"

namespace gradkern {
namespace {

using torch::headeronly::HeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements from which a second thread is worth waking.
constexpr int64_t kSerialElements = 65536;

void check_dense(const char* op, const char* name, const Tensor& tensor, ScalarType dtype, int64_t size) {
  STD_TORCH_CHECK(tensor.numel() == size && tensor.is_contiguous() && tensor.scalar_type() == dtype, op, ": ", name,
                  " must be a contiguous tensor of ", size, " elements of ", dtype, ", got ", tensor.numel(),
                  tensor.is_contiguous() ? " contiguous elements of " : " strided elements of ", tensor.scalar_type());
}

const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

float* mutable_floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

int64_t grain_of(int64_t items, int64_t elements) {
  return elements <= kSerialElements ? std::max<int64_t>(1, items)
                                     : std::max<int64_t>(1, items * kSerialElements / elements);
}

int64_t last_size(const Tensor& tensor) { return tensor.size(tensor.dim() - 1); }

// The factors of all samples and where their records go; see ReduceSample.
struct Reduction {
  const float *left, *right, *start;
  int64_t samples, tokens, height, width, rank;
  int8_t* left_codes;
  float* left_scales;
  int8_t* right_codes;
  float* right_scales;
};

void reduce_samples(const Reduction& all) {
  const auto reduce = kernels().reduce_sample;
  const int64_t kept = std::min(all.tokens, all.rank), work = all.samples * all.tokens * (all.height + all.width);
  torch::stable::parallel_for(0, all.samples, grain_of(all.samples, work), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(all.tokens > all.rank ? reduce_scratch(all.tokens, all.height, all.width, all.rank) : 0);
    for (int64_t i = begin; i < end; ++i) {
      reduce({all.left == nullptr ? nullptr : all.left + i * all.tokens * all.height,
              all.right + i * all.tokens * all.width, all.start, all.tokens, all.height, all.width, all.rank,
              scratch.data(), all.left_codes + i * kept * all.height, all.left_scales + i * kept,
              all.right_codes + i * kept * all.width, all.right_scales + i * kept});
    }
  });
}

// factors: of every element, or null.
void reduce_rows(const float* rows, const float* factors, int64_t samples, int64_t tokens, int64_t width, int8_t* codes,
                 float* scales) {
  const auto reduce = kernels().reduce_vector;
  const int64_t size = tokens * width;
  torch::stable::parallel_for(0, samples, grain_of(samples, samples * size), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(tokens > 1 ? tokens + 5 * width : 0);
    std::vector<float> products(factors == nullptr ? 0 : size);
    for (int64_t i = begin; i < end; ++i) {
      const float* from = rows + i * size;
      if (factors != nullptr) {
        for (int64_t at = 0; at < size; ++at) {
          products[at] = from[at] * factors[i * size + at];
        }
        from = products.data();
      }
      reduce(from, tokens, width, scratch.data(), codes + i * width, scales + i);
    }
  });
}

// left: (samples, tokens, height) in any shape of that order, or none; codes and scales: (samples, r, ...).
void reduce_matrix(std::optional<Tensor> left, Tensor right, int64_t samples, Tensor start, Tensor left_codes,
                   Tensor left_scales, Tensor right_codes, Tensor right_scales) {
  const char* op = "reduce_matrix";
  const int64_t width = last_size(right), rank = start.size(0);
  STD_TORCH_CHECK(samples > 0 && width > 0 && right.numel() % (samples * width) == 0, op, ": right of ", right.numel(),
                  " elements does not divide into ", samples, " samples of rows of ", width);
  const int64_t tokens = right.numel() / (samples * width), kept = std::min(tokens, rank);
  const int64_t height = left.has_value() ? last_size(*left) : tokens;
  check_dense(op, "right", right, ScalarType::Float, samples * tokens * width);
  check_dense(op, "start", start, ScalarType::Float, rank * width);
  if (left.has_value()) {
    check_dense(op, "left", *left, ScalarType::Float, samples * tokens * height);
  }
  check_dense(op, "left_codes", left_codes, ScalarType::Char, samples * kept * height);
  check_dense(op, "left_scales", left_scales, ScalarType::Float, samples * kept);
  check_dense(op, "right_codes", right_codes, ScalarType::Char, samples * kept * width);
  check_dense(op, "right_scales", right_scales, ScalarType::Float, samples * kept);
  reduce_samples({left.has_value() ? floats(*left) : nullptr, floats(right), floats(start), samples, tokens, height,
                  width, rank, static_cast<int8_t*>(left_codes.mutable_data_ptr()), mutable_floats(left_scales),
                  static_cast<int8_t*>(right_codes.mutable_data_ptr()), mutable_floats(right_scales)});
}

// rows, and factors where there are any: (samples, tokens, width) in any shape of that order.
void reduce_vector(Tensor rows, std::optional<Tensor> factors, int64_t samples, Tensor codes, Tensor scales) {
  const char* op = "reduce_vector";
  const int64_t width = last_size(rows);
  STD_TORCH_CHECK(samples > 0 && width > 0 && rows.numel() % (samples * width) == 0, op, ": rows of ", rows.numel(),
                  " elements do not divide into ", samples, " samples of rows of ", width);
  const int64_t tokens = rows.numel() / (samples * width);
  check_dense(op, "rows", rows, ScalarType::Float, samples * tokens * width);
  if (factors.has_value()) {
    check_dense(op, "factors", *factors, ScalarType::Float, samples * tokens * width);
  }
  check_dense(op, "codes", codes, ScalarType::Char, samples * width);
  check_dense(op, "scales", scales, ScalarType::Float, samples);
  reduce_rows(floats(rows), factors.has_value() ? floats(*factors) : nullptr, samples, tokens, width,
              static_cast<int8_t*>(codes.mutable_data_ptr()), mutable_floats(scales));
}

// Of several matrices: writes the records of their factors, and those of the sums of the rows of left factors, to
// places of `block` (gradkern.rollback._packing); a negative offset leaves out the latter.
void record_matrices(HeaderOnlyArrayRef<Tensor> rows, HeaderOnlyArrayRef<Tensor> columns,
                     HeaderOnlyArrayRef<Tensor> starts, HeaderOnlyArrayRef<int64_t> offsets, int64_t samples,
                     Tensor block) {
  const char* op = "record_matrices";
  const size_t count = rows.size();
  STD_TORCH_CHECK(columns.size() == count && starts.size() == count && offsets.size() == 6 * count, op,
                  ": the lists must be as long as one another");
  STD_TORCH_CHECK(block.is_contiguous() && block.scalar_type() == ScalarType::Byte, op,
                  ": block must be a contiguous uint8 tensor");
  auto* to = static_cast<unsigned char*>(block.mutable_data_ptr());
  const auto place = [&](int64_t offset, int64_t nbytes) {
    STD_TORCH_CHECK(offset >= 0 && offset + nbytes <= block.numel(), op, ": a record does not fit into its block");
    return to + offset;
  };
  for (size_t i = 0; i < count; ++i) {
    const int64_t width = last_size(columns[i]), height = last_size(rows[i]), rank = starts[i].size(0);
    STD_TORCH_CHECK(samples > 0 && width > 0 && columns[i].numel() % (samples * width) == 0, op, ": ",
                    columns[i].numel(), " elements do not divide into ", samples, " samples of rows of ", width);
    const int64_t tokens = columns[i].numel() / (samples * width), kept = std::min(tokens, rank);
    check_dense(op, "columns", columns[i], ScalarType::Float, samples * tokens * width);
    check_dense(op, "rows", rows[i], ScalarType::Float, samples * tokens * height);
    check_dense(op, "starts", starts[i], ScalarType::Float, rank * width);
    const int64_t* offset = offsets.data() + 6 * i;
    const Reduction reduction = {floats(rows[i]),
                                 floats(columns[i]),
                                 floats(starts[i]),
                                 samples,
                                 tokens,
                                 height,
                                 width,
                                 rank,
                                 reinterpret_cast<int8_t*>(place(offset[3], samples * kept * height)),
                                 reinterpret_cast<float*>(place(offset[0], 4 * samples * kept)),
                                 reinterpret_cast<int8_t*>(place(offset[4], samples * kept * width)),
                                 reinterpret_cast<float*>(place(offset[1], 4 * samples * kept))};
    reduce_samples(reduction);
    if (offset[5] >= 0) {
      reduce_rows(floats(rows[i]), nullptr, samples, tokens, height,
                  reinterpret_cast<int8_t*>(place(offset[5], samples * height)),
                  reinterpret_cast<float*>(place(offset[2], 4 * samples)));
    }
  }
}

// Adds each gradient to its sum, or writes it there where it is the first.
void add_gradients(HeaderOnlyArrayRef<Tensor> sums, HeaderOnlyArrayRef<Tensor> gradients,
                   HeaderOnlyArrayRef<int64_t> are_first) {
  const char* op = "add_gradients";
  STD_TORCH_CHECK(sums.size() == gradients.size() && are_first.size() == sums.size(), op,
                  ": the lists must be as long as one another");
  for (size_t i = 0; i < sums.size(); ++i) {
    const int64_t size = sums[i].numel();
    check_dense(op, "sums", sums[i], ScalarType::Float, size);
    check_dense(op, "gradients", gradients[i], ScalarType::Float, size);
    float* sum = mutable_floats(sums[i]);
    const float* gradient = floats(gradients[i]);
    const bool is_first = are_first[i] != 0;
    torch::stable::parallel_for(0, size, kSerialElements, [&](int64_t begin, int64_t end) {
      if (is_first) {
        std::memcpy(sum + begin, gradient + begin, static_cast<size_t>(end - begin) * sizeof(float));
        return;
      }
      for (int64_t at = begin; at < end; ++at) {
        sum[at] += gradient[at];
      }
    });
  }
}

// How far gradients are from the sums that were captured: two sums of squares each, of the difference and of the
// gradient.
void compare_gradients(HeaderOnlyArrayRef<Tensor> captured, HeaderOnlyArrayRef<Tensor> gradients, Tensor squares) {
  const char* op = "compare_gradients";
  STD_TORCH_CHECK(captured.size() == gradients.size(), op, ": the lists must be as long as one another");
  check_dense(op, "squares", squares, ScalarType::Double, static_cast<int64_t>(2 * captured.size()));
  auto* to = static_cast<double*>(squares.mutable_data_ptr());
  for (size_t i = 0; i < captured.size(); ++i) {
    const int64_t size = captured[i].numel();
    check_dense(op, "captured", captured[i], ScalarType::Float, size);
    check_dense(op, "gradients", gradients[i], ScalarType::Float, size);
    const float* ours = floats(captured[i]);
    const float* theirs = floats(gradients[i]);
    double missing = 0.0, all = 0.0;
    for (int64_t at = 0; at < size; ++at) {
      const double grad = theirs[at], difference = grad - static_cast<double>(ours[at]);
      missing += difference * difference;
      all += grad * grad;
    }
    to[2 * i] = missing;
    to[2 * i + 1] = all;
  }
}

// logits: (samples, tokens, classes) in any shape of that order. Returns the scale; NaN stands for none.
double measure_bends(Tensor logits, Tensor grad, int64_t samples, double scale, bool is_declared, Tensor sums) {
  const char* op = "measure_bends";
  const int64_t classes = last_size(logits);
  STD_TORCH_CHECK(samples > 0 && classes > 0 && logits.numel() % (samples * classes) == 0, op, ": logits of ",
                  logits.numel(), " elements do not divide into ", samples, " samples of rows of ", classes);
  const int64_t rows = logits.numel() / classes;
  check_dense(op, "logits", logits, ScalarType::Float, rows * classes);
  check_dense(op, "grad", grad, ScalarType::Float, rows * classes);
  check_dense(op, "sums", sums, ScalarType::Double, samples * 2);
  const float* from = floats(logits);
  const float* slopes = floats(grad);
  std::vector<BentRow> bent(rows);
  const auto bend = kernels().bend_row;
  torch::stable::parallel_for(0, rows, grain_of(rows, logits.numel()), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(2 * classes);
    for (int64_t row = begin; row < end; ++row) {
      bend(from + row * classes, slopes + row * classes, classes, scratch.data(), &bent[row].inner);
    }
  });
  const Bends bends(bent.data(), samples, rows / samples, classes, is_declared);
  const double found = bends.scale(scale);
  bends.sums(found, static_cast<double*>(sums.mutable_data_ptr()));
  return found;
}

// Columns of `numbers`, gradkern.rollback._conservation.COLUMNS.
enum Number : int64_t {
  kLr,
  kDecay,
  kMomentum,
  kGradWeight,
  kMultiplier,
  kStepSize,
  kRootScale,
  kEps,
  kHasGradient,
  kHasSecondMoment,
  kNumbers
};

bool all_finite(const Tensor& tensor) {
  const float* values = floats(tensor);
  for (int64_t at = 0; at < tensor.numel(); at += kChunk) {
    const int64_t size = std::min(kChunk, tensor.numel() - at);
    if (!std::isfinite(kernels().abs_norm(DType::kFloat32, values + at, size, true))) {
      return false;
    }
  }
  return true;
}

// Returns whether all gradients are finite; changes nothing where they are not.
bool shadow_step(HeaderOnlyArrayRef<Tensor> gradients, HeaderOnlyArrayRef<Tensor> momenta,
                 HeaderOnlyArrayRef<Tensor> deltas, HeaderOnlyArrayRef<Tensor> second_moments, Tensor numbers,
                 Tensor roundings, Tensor smoothed, double sum_rounding) {
  const char* op = "shadow_step";
  const auto count = static_cast<int64_t>(gradients.size());
  STD_TORCH_CHECK(static_cast<int64_t>(momenta.size()) == count && static_cast<int64_t>(deltas.size()) == count &&
                      static_cast<int64_t>(second_moments.size()) == count,
                  op, ": the lists must be as long as one another, got ", count, ", ", momenta.size(), ", ",
                  deltas.size(), " and ", second_moments.size());
  check_dense(op, "numbers", numbers, ScalarType::Double, count * kNumbers);
  check_dense(op, "roundings", roundings, ScalarType::Double, count * 2);
  const auto* all = static_cast<const double*>(numbers.const_data_ptr());
  auto* rounding = static_cast<double*>(roundings.mutable_data_ptr());
  std::vector<int64_t> first(count + 1, 0);
  int64_t elements = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t size = gradients[i].numel();
    check_dense(op, "gradients", gradients[i], ScalarType::Float, size);
    check_dense(op, "momenta", momenta[i], ScalarType::Float, size);
    check_dense(op, "deltas", deltas[i], ScalarType::Float, size);
    if (all[i * kNumbers + kHasSecondMoment] != 0.0) {
      check_dense(op, "second_moments", second_moments[i], ScalarType::Float, size);
    }
    const int64_t rows = gradients[i].dim() < 2 ? 0 : gradients[i].size(0);
    STD_TORCH_CHECK(gradients[i].dim() < 2 || size > 0, op, ": matrices must have elements");
    first[i + 1] = first[i] + (rows == 0 ? size : rows + size / rows);
    elements += size;
  }
  check_dense(op, "smoothed", smoothed, ScalarType::BFloat16, first[count]);
  for (int64_t i = 0; i < count; ++i) {
    const double* n = all + i * kNumbers;
    if (!std::isnan(n[kLr]) && n[kHasGradient] != 0.0 && !all_finite(gradients[i])) {
      return false;
    }
  }
  auto* to = static_cast<uint16_t*>(smoothed.mutable_data_ptr());
  const auto step = kernels().shadow_step;
  torch::stable::parallel_for(0, count, grain_of(count, elements), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch;
    for (int64_t i = begin; i < end; ++i) {
      const double* n = all + i * kNumbers;
      if (std::isnan(n[kLr])) {
        continue;
      }
      const int64_t size = gradients[i].numel();
      const int64_t rows = gradients[i].dim() < 2 ? 0 : gradients[i].size(0);
      const int64_t columns = rows == 0 ? size : size / rows;
      const bool has_gradient = n[kHasGradient] != 0.0;
      scratch.resize(std::max<size_t>(scratch.size(), static_cast<size_t>(shadow_scratch(rows, columns))));
      double squares[2] = {0.0, 0.0};
      step({has_gradient ? floats(gradients[i]) : nullptr,
            n[kHasSecondMoment] != 0.0 ? floats(second_moments[i]) : nullptr, mutable_floats(momenta[i]),
            mutable_floats(deltas[i]), rows, columns, static_cast<float>(n[kMomentum]),
            static_cast<float>(n[kGradWeight] * n[kMultiplier]), static_cast<float>(n[kDecay]),
            static_cast<float>(n[kStepSize]), static_cast<float>(n[kRootScale]), static_cast<float>(n[kEps]),
            scratch.data(), to + first[i], squares});
      if (gradients[i].dim() == 1) {
        double added = n[kMomentum] * rounding[2 * i + 1];
        if (has_gradient) {
          const double typical = std::sqrt(squares[0]) / std::sqrt(static_cast<double>(std::max<int64_t>(1, size)));
          added = added + std::fabs(n[kGradWeight] * n[kMultiplier]) * sum_rounding * typical;
        }
        rounding[2 * i + 1] = added;
        rounding[2 * i] = std::fabs(n[kDecay]) * rounding[2 * i] + added * std::sqrt(squares[1]);
      }
    }
  });
  return true;
}

}  // namespace
}  // namespace gradkern

STABLE_TORCH_LIBRARY_IMPL(gradkern, CPU, m) {
  m.impl("_reduce_matrix_", TORCH_BOX(&gradkern::reduce_matrix));
  m.impl("_record_matrices_", TORCH_BOX(&gradkern::record_matrices));
  m.impl("_add_gradients_", TORCH_BOX(&gradkern::add_gradients));
  m.impl("_compare_gradients_", TORCH_BOX(&gradkern::compare_gradients));
  m.impl("_reduce_vector_", TORCH_BOX(&gradkern::reduce_vector));
  m.impl("_measure_bends_", TORCH_BOX(&gradkern::measure_bends));
  m.impl("_shadow_step_", TORCH_BOX(&gradkern::shadow_step));
}
