// The best k of many scored ids: higher scores first, of equal ones the smaller id. What comes out does not
// depend on the order in which they are offered.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace gradkern {

struct Scored {
  float score;
  int64_t id;
};

inline bool is_better(const Scored& a, const Scored& b) {
  return a.score > b.score || (a.score == b.score && a.id < b.id);
}

class TopK {
 public:
  explicit TopK(int64_t k) : k_(static_cast<size_t>(k)) { kept_.reserve(k_); }

  // What scores below this is not kept.
  float least() const { return kept_.size() < k_ ? -std::numeric_limits<float>::infinity() : kept_.front().score; }

  void offer(const Scored& found) {
    if (kept_.size() < k_) {
      kept_.push_back(found);
      std::push_heap(kept_.begin(), kept_.end(), is_better);  // the worst on top
    } else if (is_better(found, kept_.front())) {
      std::pop_heap(kept_.begin(), kept_.end(), is_better);
      kept_.back() = found;
      std::push_heap(kept_.begin(), kept_.end(), is_better);
    }
  }

  void offer(const TopK& others) {
    for (const Scored& found : others.kept_) {
      offer(found);
    }
  }

  // All that were kept, the best first; nothing may be offered afterwards.
  const std::vector<Scored>& sorted() {
    std::sort_heap(kept_.begin(), kept_.end(), is_better);
    return kept_;
  }

 private:
  size_t k_;
  std::vector<Scored> kept_;
};

}  // namespace gradkern
