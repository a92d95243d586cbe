// The rule of AdamW and Adam, once, for every vector type: no intrinsics, no includes, no include guard (it is included
// into the namespace of each instruction set). Decoupled weight decay: Loshchilov & Hutter, arXiv 1711.05101, alg. 2;
// coupled: Kingma & Ba, arXiv 1412.6980, alg. 1, with the decay added to the gradient. Each operator is one IEEE
// operation rounded to fp32; the order is the contract shared with the reference and Triton.
//
// Variants, as bits: 1 amsgrad, 2 coupled decay.

template <class V, int kVariant>
struct AdamWRule {
  static constexpr int kVariants = 4;
  static constexpr bool kAmsgrad = (kVariant & 1) != 0;
  static constexpr bool kCoupled = (kVariant & 2) != 0;
  static constexpr int kStates = kAmsgrad ? 3 : 2;
  static constexpr bool kSigned[] = {true, false, false};

  V grad_multiplier, decay, grad_weight, beta2, sq_weight, inv_bias2_sqrt, eps, step_size;

  // hyper: lr, beta1, beta2, eps, weight_decay, sign
  static StepScalars scalars(const double* hyper, double grad_multiplier, int64_t step) {
    const double lr = hyper[0], weight_decay = hyper[4];
    StepScalars s = {};
    s.v[0] = static_cast<float>(grad_multiplier * hyper[5]);
    s.v[1] = static_cast<float>(kCoupled ? weight_decay : 1.0 - lr * weight_decay);
    s.v[2] = static_cast<float>(1.0 - hyper[1]);
    s.v[3] = static_cast<float>(hyper[2]);
    s.v[4] = static_cast<float>(1.0 - hyper[2]);
    s.v[5] = static_cast<float>(1.0 / std::sqrt(1.0 - power(hyper[2], step)));
    s.v[6] = static_cast<float>(hyper[3]);
    s.v[7] = static_cast<float>(lr / (1.0 - power(hyper[1], step)));
    return s;
  }

  explicit AdamWRule(const StepScalars& s)
      : grad_multiplier(V::all(s.v[0])),
        decay(V::all(s.v[1])),
        grad_weight(V::all(s.v[2])),
        beta2(V::all(s.v[3])),
        sq_weight(V::all(s.v[4])),
        inv_bias2_sqrt(V::all(s.v[5])),
        eps(V::all(s.v[6])),
        step_size(V::all(s.v[7])) {}

  // The new parameter; states (exp_avg, exp_avg_sq, max_exp_avg_sq) in place.
  GRADKERN_INLINE V operator()(V param, V grad, V* state) const {
    V g = grad * grad_multiplier;
    if (kCoupled) {
      g = g + param * decay;
    } else {
      param = param * decay;
    }
    state[0] = state[0] + (g - state[0]) * grad_weight;
    state[1] = state[1] * beta2 + (g * g) * sq_weight;
    V second_moment = state[1];
    if constexpr (kAmsgrad) {
      second_moment = state[2] = V::maximum(state[2], state[1]);
    }
    const V denom = V::sqrt(second_moment) * inv_bias2_sqrt + eps;
    return param - step_size * (state[0] / denom);
  }
};
