// The AdamW rule, once, for every vector type: no intrinsics, no includes, no include guard (it is included into
// the namespace of each instruction set). Decoupled weight decay: Loshchilov & Hutter, arXiv 1711.05101, alg. 2.
// Each operator is one IEEE operation rounded to fp32; the order is the contract shared with the reference and Triton.

template <class V>
struct AdamWRule {
  V grad_multiplier, decay, grad_weight, beta2, sq_weight, inv_bias2_sqrt, eps, step_size;

  explicit AdamWRule(const AdamWScalars& s)
      : grad_multiplier(V::all(s.grad_multiplier)),
        decay(V::all(s.decay)),
        grad_weight(V::all(s.grad_weight)),
        beta2(V::all(s.beta2)),
        sq_weight(V::all(s.sq_weight)),
        inv_bias2_sqrt(V::all(s.inv_bias2_sqrt)),
        eps(V::all(s.eps)),
        step_size(V::all(s.step_size)) {}

  // Moments first; returns the second moment that the step divides by.
  GRADKERN_INLINE void moments(V grad, V& exp_avg, V& exp_avg_sq) const {
    const V g = grad * grad_multiplier;
    exp_avg = exp_avg + (g - exp_avg) * grad_weight;
    exp_avg_sq = exp_avg_sq * beta2 + (g * g) * sq_weight;
  }

  GRADKERN_INLINE V update(V param, V exp_avg, V second_moment) const {
    const V denom = V::sqrt(second_moment) * inv_bias2_sqrt + eps;
    return param * decay - step_size * (exp_avg / denom);
  }
};
