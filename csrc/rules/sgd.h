// The rule of SGD with momentum, for every vector type; see adamw.h for the conventions. Semantics of
// torch/optim/sgd.py: the first step sets the buffer to the gradient, without dampening.
//
// Variants, as bits: 1 momentum, 2 nesterov.

template <class V, int kVariant>
struct SgdRule {
  static constexpr int kVariants = 4;
  static constexpr bool kMomentum = (kVariant & 1) != 0;
  static constexpr bool kNesterov = (kVariant & 2) != 0;
  static constexpr int kStates = kMomentum ? 1 : 0;
  static constexpr bool kSigned[] = {true, false, false};

  V grad_multiplier, weight_decay, old_weight, grad_weight, momentum, lr;

  // hyper: lr, momentum, dampening, weight_decay, sign
  static StepScalars scalars(const double* hyper, double grad_multiplier, int64_t step) {
    const bool first = step <= 1;
    StepScalars s = {};
    s.v[0] = static_cast<float>(grad_multiplier * hyper[4]);
    s.v[1] = static_cast<float>(hyper[3]);
    s.v[2] = static_cast<float>(first ? 0.0 : hyper[1]);
    s.v[3] = static_cast<float>(first ? 1.0 : 1.0 - hyper[2]);
    s.v[4] = static_cast<float>(hyper[1]);
    s.v[5] = static_cast<float>(hyper[0]);
    return s;
  }

  explicit SgdRule(const StepScalars& s)
      : grad_multiplier(V::all(s.v[0])),
        weight_decay(V::all(s.v[1])),
        old_weight(V::all(s.v[2])),
        grad_weight(V::all(s.v[3])),
        momentum(V::all(s.v[4])),
        lr(V::all(s.v[5])) {}

  GRADKERN_INLINE V operator()(V param, V grad, [[maybe_unused]] V* state) const {
    V g = grad * grad_multiplier + param * weight_decay;
    if constexpr (kMomentum) {
      state[0] = state[0] * old_weight + g * grad_weight;
      g = kNesterov ? g + state[0] * momentum : state[0];
    }
    return param - g * lr;
  }
};
