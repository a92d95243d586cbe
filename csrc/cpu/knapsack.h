// The prefix knapsack of gradkern/checkpoint/_solver.py, by the same additions and comparisons in the same order: equal
// answers, ties included. Knows nothing of torch.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <vector>

namespace gradkern {

// Units in forward order; the options of unit i are numbers first[i] to first[i + 1] of the three columns.
struct OptionChain {
  int64_t units;
  const int64_t* first;
  const int64_t* saved_bytes;
  const int64_t* peak_bytes;
  const double* extra_s;
};

// The feasible choice with the smallest prefix at every unit; false where there is none.
inline bool smallest_prefixes(const OptionChain& chain, int64_t capacity, int64_t* choices) {
  int64_t prefix = 0;
  for (int64_t i = 0; i < chain.units; ++i) {
    int64_t best = -1;
    for (int64_t k = chain.first[i]; k < chain.first[i + 1]; ++k) {
      if (prefix + chain.peak_bytes[k] > capacity) {
        continue;
      }
      if (best < 0 || chain.saved_bytes[k] < chain.saved_bytes[best] ||
          (chain.saved_bytes[k] == chain.saved_bytes[best] && chain.extra_s[k] < chain.extra_s[best])) {
        best = k;
      }
    }
    if (best < 0) {
      return false;
    }
    choices[i] = best - chain.first[i];
    prefix += chain.saved_bytes[best];
  }
  return true;
}

// The smallest capacity that any choice fits into, by bisection, and such a choice.
inline int64_t least_capacity(const OptionChain& chain, int64_t* choices) {
  int64_t prefix = 0;
  int64_t high = 0;
  for (int64_t i = 0; i < chain.units; ++i) {
    high = std::max(high, prefix + chain.peak_bytes[chain.first[i]]);
    prefix += chain.saved_bytes[chain.first[i]];
  }
  std::fill(choices, choices + chain.units, 0);
  std::vector<int64_t> tried(static_cast<size_t>(chain.units));
  int64_t low = 0;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (smallest_prefixes(chain, middle, tried.data())) {
      high = middle;
      std::copy(tried.begin(), tried.end(), choices);
    } else {
      low = middle + 1;
    }
  }
  return high;
}

class PrefixKnapsack {
 public:
  using Doubles = std::vector<double>;

  PrefixKnapsack(const OptionChain& chain, int64_t capacity, int64_t states)
      : chain_(chain),
        capacity_(capacity),
        states_(states),
        scale_(static_cast<double>(std::max<int64_t>(1, capacity))),
        scaled_capacity_(static_cast<double>(capacity) / scale_) {}

  // False where nothing fits. Else the cheapest choice found, a bound on the seconds of all, and whether it is the
  // best.
  bool search(int64_t* choices, double* lower_s, bool* is_best) {
    if (!smallest_prefixes(chain_, capacity_, choices)) {
      return false;
    }
    Doubles multipliers(static_cast<size_t>(chain_.units), 0.0);
    set_bound(multipliers);
    // The smallest prefix survives every thinning, so that this pass always finds something.
    Passed best = pass(kInfinity, std::min(states_, kFewStates));
    double bound_s = 0.0;
    for (int round = 0; round < kRounds && best.is_thinned; ++round) {
      bound_s = find_multipliers(best.extra_s, &multipliers);
      set_bound(multipliers);
      best = better(best, pass(best.extra_s, std::min(states_, kFewStates)));
    }
    const double margin = kMargin * best.extra_s;
    const double start_s = bound_s - margin;
    const double range_s = best.extra_s - start_s;
    *lower_s = start_s;
    for (size_t k = 0; k < std::size(kTargets) && best.is_thinned; ++k) {
      const double target_s = start_s + range_s * kTargets[k];
      const Passed found = pass(target_s + margin, states_);
      if (!found.choices.empty()) {
        best = better(best, found);
        break;
      }
      if (!found.is_thinned) {
        *lower_s = target_s;
      }
    }
    *is_best = !best.is_thinned;
    std::copy(best.choices.begin(), best.choices.end(), choices);
    return true;
  }

 private:
  static constexpr double kInfinity = std::numeric_limits<double>::infinity();
  static constexpr double kMargin = 1e-9;
  static constexpr double kTargets[] = {1.0 / 64, 1.0 / 16, 1.0 / 4, 1.0};
  static constexpr int64_t kFewStates = 64;
  static constexpr int kRounds = 2;
  static constexpr int kIterations = 200;
  static constexpr int kPatience = 12;
  static constexpr double kSmallestStep = 1e-5;

  // A prefix, the seconds spent, and where they came from.
  struct State {
    int64_t prefix;
    double seconds;
    int32_t before;
    int32_t option;
  };

  struct Origin {
    int32_t before;
    int32_t option;
  };

  struct Passed {
    std::vector<int64_t> choices;
    double extra_s;
    bool is_thinned;
  };

  // The second where it found something that is faster, or as fast and surely the best.
  static Passed better(const Passed& known, const Passed& found) {
    const bool is_found = !found.choices.empty() && found.extra_s <= known.extra_s;
    return is_found && (found.extra_s < known.extra_s || !found.is_thinned) ? found : known;
  }

  double scaled(int64_t bytes) const { return static_cast<double>(bytes) / scale_; }

  static Doubles sums_after(const Doubles& values) {
    Doubles sums(values.size(), 0.0);
    for (size_t i = values.size(); i > 1; --i) {
      sums[i - 2] = sums[i - 1] + values[i - 1];
    }
    return sums;
  }

  // Seconds of an option under multipliers.
  double priced(int64_t option, double multiplier, double later) const {
    return chain_.extra_s[option] + multiplier * scaled(chain_.peak_bytes[option]) +
           scaled(chain_.saved_bytes[option]) * later;
  }

  void set_bound(const Doubles& multipliers) {
    const auto units = static_cast<size_t>(chain_.units);
    const Doubles later = sums_after(multipliers);
    Doubles least(units);
    for (size_t i = 0; i < units; ++i) {
      least[i] = kInfinity;
      for (int64_t k = chain_.first[i]; k < chain_.first[i + 1]; ++k) {
        least[i] = std::min(least[i], priced(k, multipliers[i], later[i]));
      }
    }
    rest_ = sums_after(least);
    slope_ = later;
    for (size_t i = 0; i < units; ++i) {
      rest_[i] += least[i];
      slope_[i] += multipliers[i];
    }
    rest_.push_back(0.0);
    slope_.push_back(0.0);
  }

  // Polyak's subgradient steps from the multipliers given; returns the bound that those found prove.
  double find_multipliers(double upper_s, Doubles* best) const {
    const auto units = static_cast<size_t>(chain_.units);
    Doubles multipliers = *best;
    Doubles excess(units);
    double best_s = -kInfinity;
    double step = 1.0;
    int stalled = 0;
    for (int iteration = 0; iteration < kIterations; ++iteration) {
      const Doubles later = sums_after(multipliers);
      double seconds = 0.0;
      double price = 0.0;
      double prefix = 0.0;
      for (size_t i = 0; i < units; ++i) {
        int64_t choice = chain_.first[i];
        double least = priced(choice, multipliers[i], later[i]);
        for (int64_t k = choice + 1; k < chain_.first[i + 1]; ++k) {
          const double other = priced(k, multipliers[i], later[i]);
          if (other < least) {
            least = other;
            choice = k;
          }
        }
        seconds += least;
        price += multipliers[i];
        const double saved = scaled(chain_.saved_bytes[choice]);
        prefix += saved;
        excess[i] = (prefix - saved + scaled(chain_.peak_bytes[choice])) - scaled_capacity_;
      }
      const double bound_s = seconds - scaled_capacity_ * price;
      if (best_s == -kInfinity || bound_s > best_s + kMargin * std::fabs(bound_s)) {
        *best = multipliers;
        best_s = bound_s;
        stalled = 0;
      } else if (++stalled == kPatience) {
        step /= 2;
        stalled = 0;
        multipliers = *best;
        if (step < kSmallestStep) {
          break;
        }
        continue;
      }
      double square = 0.0;
      for (size_t i = 0; i < units; ++i) {
        if (multipliers[i] <= 0.0 && excess[i] < 0.0) {
          excess[i] = 0.0;
        }
        square += excess[i] * excess[i];
      }
      if (square < 1e-18) {
        break;
      }
      const double length = step * (upper_s - bound_s) / square;
      for (size_t i = 0; i < units; ++i) {
        multipliers[i] = std::max(0.0, multipliers[i] + length * excess[i]);
      }
    }
    return best_s;
  }

  // Adds the states that one option leads to, in order of prefix; what costs no less than a smaller prefix goes.
  void merge(int64_t unit, int64_t option, const std::vector<State>& states, double target_s,
             const std::vector<State>& known, std::vector<State>* merged) const {
    const int64_t saved = chain_.saved_bytes[option];
    const int64_t room = capacity_ - chain_.peak_bytes[option];
    const double extra = chain_.extra_s[option];
    const auto number = static_cast<int32_t>(option - chain_.first[unit]);
    merged->clear();
    double least = kInfinity;
    const auto offer = [&](const State& state) {
      if (state.seconds < least) {
        least = state.seconds;
        merged->push_back(state);
      }
    };
    size_t next = 0;
    for (size_t i = 0; i < states.size() && states[i].prefix <= room; ++i) {
      const State state{states[i].prefix + saved, states[i].seconds + extra, static_cast<int32_t>(i), number};
      if (!(end_of(unit + 1, state) <= target_s)) {
        continue;
      }
      while (next < known.size() && (known[next].prefix < state.prefix ||
                                     (known[next].prefix == state.prefix && known[next].seconds <= state.seconds))) {
        offer(known[next++]);
      }
      offer(state);
    }
    while (next < known.size()) {
      offer(known[next++]);
    }
  }

  // The least seconds that a state before `unit` can end with.
  double end_of(int64_t unit, const State& state) const {
    const auto i = static_cast<size_t>(unit);
    return state.seconds + (rest_[i] + (scaled(state.prefix) - scaled_capacity_) * slope_[i]);
  }

  // Leaves the states that can end with the fewest seconds, those of smaller prefix first, and the smallest prefix, by
  // which everything stays feasible. Without multipliers the bound says too little: then evenly.
  void thin(int64_t unit, int64_t limit, bool evenly, std::vector<State>* states) const {
    const auto count = static_cast<int64_t>(states->size());
    std::vector<State>& all = *states;
    if (evenly) {
      for (int64_t j = 0; j < limit; ++j) {
        all[static_cast<size_t>(j)] = all[static_cast<size_t>(j * (count - 1) / (limit - 1))];
      }
      all.resize(static_cast<size_t>(limit));
      return;
    }
    Doubles ends(all.size());
    for (size_t j = 0; j < all.size(); ++j) {
      ends[j] = j == 0 ? -kInfinity : end_of(unit, all[j]);
    }
    Doubles sorted = ends;
    std::nth_element(sorted.begin(), sorted.begin() + (limit - 1), sorted.end());
    const double last = sorted[static_cast<size_t>(limit - 1)];
    int64_t room = limit - std::count_if(ends.begin(), ends.end(), [&](double end) { return end < last; });
    size_t kept = 0;
    for (size_t j = 0; j < all.size(); ++j) {
      if (ends[j] < last || (ends[j] == last && room-- > 0)) {
        all[kept++] = all[j];
      }
    }
    all.resize(kept);
  }

  Passed pass(double target_s, int64_t limit) const {
    std::vector<State> states{{0, 0.0, 0, 0}};
    std::vector<State> known;
    std::vector<State> merged;
    std::vector<std::vector<Origin>> came_from;
    bool is_thinned = false;
    for (int64_t i = 0; i < chain_.units; ++i) {
      known.clear();
      for (int64_t k = chain_.first[i]; k < chain_.first[i + 1]; ++k) {
        merge(i, k, states, target_s, known, &merged);
        known.swap(merged);
      }
      if (static_cast<int64_t>(known.size()) > limit) {
        thin(i + 1, limit, target_s == kInfinity, &known);
        is_thinned = true;
      }
      if (known.empty()) {
        return {{}, kInfinity, is_thinned};
      }
      std::vector<Origin> origins;
      origins.reserve(known.size());
      for (const State& state : known) {
        origins.push_back({state.before, state.option});
      }
      came_from.push_back(std::move(origins));
      states.swap(known);
    }
    std::vector<int64_t> choices(static_cast<size_t>(chain_.units));
    size_t at = states.size() - 1;  // the largest prefix, hence the fewest seconds
    for (size_t i = choices.size(); i-- > 0;) {
      choices[i] = came_from[i][at].option;
      at = static_cast<size_t>(came_from[i][at].before);
    }
    return {std::move(choices), states.back().seconds, is_thinned};
  }

  const OptionChain chain_;
  const int64_t capacity_;
  const int64_t states_;
  const double scale_;
  const double scaled_capacity_;
  Doubles rest_;   // by unit: least seconds of it and all later ones under the multipliers
  Doubles slope_;  // by unit: what a byte of prefix before it adds to that
};

}  // namespace gradkern
