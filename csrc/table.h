// A table is int64 [tensors, 2 + operands]: element count, first chunk, then one address per operand.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

#include "checks.h"

namespace gradkern {

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

  // Calls body(row, chunk, offset, size) for the chunks from `begin` to `end`. Rows without elements have no chunk.
  template <class Body>
  void walk(int64_t begin, int64_t end, const Body& body) const {
    int64_t row = row_of(begin);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (chunk >= first_chunk(row) + row_chunks(row)) {
        ++row;
      }
      const int64_t offset = (chunk - first_chunk(row)) * kChunk;
      body(row, chunk, offset, std::min(kChunk, size(row) - offset));
    }
  }

  // Calls body(begin, end) for ranges of chunks, in parallel.
  template <class Body>
  void for_each_range(const Body& body) const {
    torch::stable::parallel_for(0, chunks(), grain(), body);
  }

  // Calls body(row, chunk, offset, size) for every chunk, in parallel.
  template <class Body>
  void for_each_chunk(const Body& body) const {
    for_each_range([&](int64_t begin, int64_t end) { walk(begin, end, body); });
  }
};

}  // namespace gradkern
