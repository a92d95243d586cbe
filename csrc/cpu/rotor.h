// The table of gradkern/checkpoint/_rotor.py in C++. Every sum of seconds is exact there, so that neither the order of
// additions nor what is skipped here for being no better can change a number. Knows nothing of torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

namespace gradkern {

// As Grid in Python; the options of stage i are numbers first[i] to first[i + 1]. Nothing held is negative.
struct RotorGrid {
  int64_t stages;
  int64_t slots;
  const int64_t* first;
  const int64_t* option_held;
  const int64_t* option_needs;  // by last stage and option
  const double* option_s;
  const int64_t* input_held;
  const int64_t* start_needs;  // by last stage and stage
  const int64_t* run_needs;    // by last stage and stage
  const double* forward_s;
};

// What stays in cache decides the speed: the splits of a row read rows all over the table. A number depends on none
// with more slots, so a block of slots is done for all rows before the next; what the splits of one block read is kept
// apart, in the order in which it is read, and so is the least of each row in the block, by which most splits are ruled
// out.
class RotorTable {
 public:
  // Slots of a block.
  static constexpr int64_t kWidth = 32;

  static int64_t blocks_of(int64_t slots) { return slots / kWidth + 1; }
  static int64_t rows_of(int64_t stages) { return stages * (stages + 1) / 2; }

  // By block, then by row, number b * (b + 1) / 2 + a for stages a to b, then by slot.
  RotorTable(const RotorGrid& grid, double* table)
      : grid_(grid),
        table_(table),
        left_(new double[static_cast<size_t>(grid.stages * grid.stages * kWidth)]),
        left_least_(static_cast<size_t>(grid.stages * grid.stages)),
        right_(static_cast<size_t>(grid.stages * kWidth)),
        right_least_(static_cast<size_t>(grid.stages)) {
    double sum = 0.0;
    for (int64_t i = 0; i < grid.stages; ++i) {
      before_.push_back(sum);
      sum += grid.forward_s[i];
    }
  }

  void fill() {
    const int64_t blocks = blocks_of(grid_.slots);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t start = block * kWidth;
      for (int64_t b = 0; b < grid_.stages; ++b) {
        const int64_t* run_needs = grid_.run_needs + b * grid_.stages;
        // The first stage after a that cannot run in any slot of the block, and the first that cannot in all of them.
        int64_t stop = b;
        int64_t ample = b;
        for (int64_t a = b; a >= 0; --a) {
          double* row = row_of(block, a, b);
          std::fill(row, row + kWidth, kInfinity);
          run_now(start, a, b, row);
          run_later(start, a, b, stop, ample, row);
          stop = run_needs[a] >= start + kWidth ? a : stop;
          ample = run_needs[a] > start ? a : ample;
          keep(start, a, b, row);
        }
      }
    }
  }

 private:
  static constexpr double kInfinity = std::numeric_limits<double>::infinity();

  double* row_of(int64_t block, int64_t a, int64_t b) const {
    return table_ + (block * rows_of(grid_.stages) + b * (b + 1) / 2 + a) * kWidth;
  }

  // Copies as many slots of a row as a block has, from any slot on; there is nothing in slots below zero.
  void copy(int64_t slot, int64_t a, int64_t b, double* __restrict to) const {
    if (slot <= -kWidth) {
      std::fill(to, to + kWidth, kInfinity);
      return;
    }
    const int64_t block = (slot + kWidth) / kWidth - 1;
    const int64_t skipped = slot - block * kWidth;
    if (block < 0) {
      std::fill(to, to + kWidth - skipped, kInfinity);
    } else {
      const double* from = row_of(block, a, b);
      std::copy(from + skipped, from + kWidth, to);
    }
    if (skipped > 0) {
      const double* from = row_of(block + 1, a, b);
      std::copy(from, from + skipped, to + kWidth - skipped);
    }
  }

  void run_now(int64_t start, int64_t a, int64_t b, double* __restrict row) const {
    const int64_t* option_needs = grid_.option_needs + b * grid_.first[grid_.stages];
    double rest[kWidth] = {};
    for (int64_t o = grid_.first[a]; o < grid_.first[a + 1]; ++o) {
      const int64_t from = std::max<int64_t>(0, option_needs[o] - start);
      if (from >= kWidth) {
        continue;
      }
      if (a < b) {
        copy(start - grid_.option_held[o], a + 1, b, rest);
      }
      for (int64_t i = from; i < kWidth; ++i) {
        row[i] = std::min(row[i], grid_.option_s[o] + rest[i]);
      }
    }
  }

  void run_later(int64_t start, int64_t a, int64_t b, int64_t stop, int64_t ample, double* __restrict row) const {
    const int64_t* run_needs = grid_.run_needs + b * grid_.stages;
    int64_t needs = grid_.start_needs[b * grid_.stages + a];
    if (needs >= start + kWidth) {
      return;
    }
    const double* left_least = left_least_.data() + a * grid_.stages;
    int64_t next = a + 1;  // needs holds for the stages before it
    for (int64_t j = a + 1; j <= stop; ++j) {
      // More slots never take longer: nothing of the block beats its last number, nor can it be beaten beyond its
      // first.
      if (left_least[j - 1] + right_least_[j] >= row[0]) {
        continue;
      }
      const double seconds = before_[j] - before_[a];
      const double* left = left_.get() + (a * grid_.stages + j - 1) * kWidth;
      const double* right = right_.data() + j * kWidth;
      if (needs <= start && j <= ample) {
        improve(seconds, left, right, row);
        continue;
      }
      for (; next < j; ++next) {
        needs = std::max(needs, run_needs[next]);
      }
      for (int64_t i = std::max<int64_t>(0, needs - start); i < kWidth; ++i) {
        row[i] = std::min(row[i], seconds + left[i] + right[i]);
      }
    }
  }

  static void improve(double seconds, const double* __restrict left, const double* __restrict right,
                      double* __restrict row) {
    for (int64_t i = 0; i < kWidth; ++i) {
      const double other = seconds + left[i] + right[i];
      row[i] = other < row[i] ? other : row[i];
    }
  }

  // For the splits that read this row: as their left part as it is, as their right part without what its input holds.
  void keep(int64_t start, int64_t a, int64_t b, const double* row) {
    const int64_t number = a * grid_.stages + b;
    std::copy(row, row + kWidth, left_.get() + number * kWidth);
    left_least_[static_cast<size_t>(number)] = row[kWidth - 1] - before_[a];
    double* right = right_.data() + a * kWidth;
    copy(start - grid_.input_held[a], a, b, right);
    right_least_[static_cast<size_t>(a)] = right[kWidth - 1] + before_[a];
  }

  const RotorGrid grid_;
  double* const table_;
  std::unique_ptr<double[]> left_;   // by a and b: their rows in this block
  std::vector<double> left_least_;   // by a and b: the last of it, less what runs before a
  std::vector<double> right_;        // by a: its row for this b from input_held[a] slots before the block
  std::vector<double> right_least_;  // by a: the last of it, and what runs before a
  std::vector<double> before_;       // by stage: seconds of all stages before it
};

}  // namespace gradkern
