// The rule of Lion, for every vector type; see adamw.h for the conventions. Chen et al., arXiv 2302.06675, alg. 2.

template <class V, int kVariant>
struct LionRule {
  static constexpr int kVariants = 1;
  static constexpr int kStates = 1;
  static constexpr bool kSigned[] = {true, false, false};

  V grad_multiplier, decay, update_weight, state_weight, lr;

  // hyper: lr, beta1, beta2, weight_decay, sign
  static StepScalars scalars(const double* hyper, double grad_multiplier, int64_t) {
    StepScalars s = {};
    s.v[0] = static_cast<float>(grad_multiplier * hyper[4]);
    s.v[1] = static_cast<float>(1.0 - hyper[0] * hyper[3]);
    s.v[2] = static_cast<float>(1.0 - hyper[1]);
    s.v[3] = static_cast<float>(1.0 - hyper[2]);
    s.v[4] = static_cast<float>(hyper[0]);
    return s;
  }

  explicit LionRule(const StepScalars& s)
      : grad_multiplier(V::all(s.v[0])),
        decay(V::all(s.v[1])),
        update_weight(V::all(s.v[2])),
        state_weight(V::all(s.v[3])),
        lr(V::all(s.v[4])) {}

  GRADKERN_INLINE V operator()(V param, V grad, V* state) const {
    const V change = grad * grad_multiplier - state[0];
    const V update = V::sign(state[0] + change * update_weight);
    state[0] = state[0] + change * state_weight;
    return param * decay - update * lr;
  }
};
