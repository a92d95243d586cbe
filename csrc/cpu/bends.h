// From the sums of every row of logits to those of every sample; gradkern.rollback._curvature says why.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace gradkern {

// What bend_row leaves of a row.
struct BentRow {
  double inner, squares, grad_squares, along;
};

class Bends {
 public:
  static constexpr double kMisfit = 1e-2, kRounding = 1e-5, kTells = 1e-3, kFollows = 2e-2;

  Bends(const BentRow* rows, int64_t samples, int64_t tokens, int64_t classes, bool is_declared)
      : rows_(rows), samples_(samples), tokens_(tokens), classes_(classes), is_declared_(is_declared) {}

  // The scale of a loss that is the same for all rows: the lower median, or `known` where too few rows tell; twice or
  // half of that where they tell so much, as gradient scalers do.
  double scale(double known) const {
    if (is_declared_) {
      return known;
    }
    std::vector<double> told = own_scales(kTells);
    if (static_cast<int64_t>(told.size()) >= (classes_ == 2 ? 2 : 1)) {
      return lower_median(told);
    }
    told = own_scales(kRounding);
    if (told.empty()) {
      return known;
    }
    const double ratio = lower_median(told) / known;
    for (const double factor : {2.0, 0.5}) {
      if (std::fabs(ratio - factor) <= kFollows * factor) {
        return known * factor;
      }
    }
    return known;
  }

  // Two sums a sample, each in pairs of neighbours.
  void sums(double scale, double* to) const {
    std::vector<double> along(tokens_), squares(tokens_);
    for (int64_t sample = 0; sample < samples_; ++sample) {
      for (int64_t token = 0; token < tokens_; ++token) {
        const BentRow& row = rows_[sample * tokens_ + token];
        const double s = scale_of(row, scale);
        along[token] = s * s * s * row.along;
        squares[token] = s * s * row.squares;
      }
      to[2 * sample] = pairs_sum(along.data());
      to[2 * sample + 1] = pairs_sum(squares.data());
    }
  }

 private:
  // Of the rows with at least such a residual.
  std::vector<double> own_scales(double least) const {
    std::vector<double> told;
    for (int64_t i = 0; i < samples_ * tokens_; ++i) {
      if (rows_[i].squares >= least * least && rows_[i].grad_squares > 0.0) {
        told.push_back(rows_[i].inner / rows_[i].squares);
      }
    }
    return told;
  }

  static double lower_median(std::vector<double>& values) {
    const auto middle = values.begin() + static_cast<int64_t>(values.size() - 1) / 2;
    std::nth_element(values.begin(), middle, values.end());
    return *middle;
  }

  double scale_of(const BentRow& row, double scale) const {
    const bool is_fitted = row.squares < kRounding * kRounding;
    double s = is_declared_ ? (is_fitted ? 0.0 : row.inner / row.squares) : scale;
    if (row.grad_squares == 0.0) {
      s = 0.0;
    }
    const double squared = row.grad_squares - 2.0 * s * row.inner + s * s * row.squares;
    const double misfit = std::sqrt(squared < 0.0 ? 0.0 : squared);
    const bool fits = misfit <= kMisfit * std::sqrt(row.grad_squares) + kRounding * s || (is_declared_ && is_fitted);
    return fits && classes_ > 1 ? s : std::numeric_limits<double>::quiet_NaN();
  }

  double pairs_sum(double* values) const {
    int64_t count = tokens_;
    while (count > 1) {
      for (int64_t i = 0; 2 * i < count; ++i) {
        values[i] = values[2 * i] + (2 * i + 1 < count ? values[2 * i + 1] : 0.0);
      }
      count = (count + 1) / 2;
    }
    return values[0];
  }

  const BentRow* rows_;
  int64_t samples_, tokens_, classes_;
  bool is_declared_;
};

}  // namespace gradkern
