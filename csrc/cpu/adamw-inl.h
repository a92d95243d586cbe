// One chunk of AdamW: codecs around the rule. fp32 operands are used in place; others pass through a block of fp32 that
// stays in L1, so that dtypes do not multiply into loops.

constexpr int64_t kBlock = 512;

template <bool kAmsgrad>
inline void adamw_block(const AdamWRule<F32>& rule, float* param, const float* grad, float* exp_avg, float* exp_avg_sq,
                        float* max_exp_avg_sq, int64_t padded_size) {
  for (int64_t i = 0; i < padded_size; i += F32::kLanes) {
    prefetch(param + i);
    prefetch(grad + i);
    prefetch(exp_avg + i);
    prefetch(exp_avg_sq + i);
    F32 m = F32::load(exp_avg + i);
    F32 v = F32::load(exp_avg_sq + i);
    rule.moments(F32::load(grad + i), m, v);
    m.store(exp_avg + i);
    v.store(exp_avg_sq + i);
    if (kAmsgrad) {
      v = F32::maximum(F32::load(max_exp_avg_sq + i), v);
      v.store(max_exp_avg_sq + i);
    }
    rule.update(F32::load(param + i), m, v).store(param + i);
  }
}

// An operand of a block: the user's own fp32 memory where whole vectors fit, a padded copy otherwise.
struct Operand {
  alignas(64) float copy[kBlock];
  float* values;
  unsigned char* home;
  DType dtype;

  inline void open(void* base, DType stored, int64_t offset, int64_t size) {
    dtype = stored;
    home = static_cast<unsigned char*>(base) + offset * item_size(stored);
    if (stored == DType::kFloat32 && size % F32::kLanes == 0) {
      values = reinterpret_cast<float*>(home);
      return;
    }
    values = copy;
    const int64_t whole = (size + F32::kLanes - 1) / F32::kLanes * F32::kLanes;
    for (int64_t i = size; i < whole; ++i) {
      copy[i] = 0.0f;
    }
    decode(stored, home, size, copy);
  }

  inline void close(int64_t size) const {
    if (values == copy) {
      encode(dtype, copy, size, home);
    }
  }
};

void adamw_loop(const AdamWChunk& chunk, const AdamWScalars& scalars) {
  const AdamWRule<F32> rule(scalars);
  Operand param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq;
  max_exp_avg_sq.values = nullptr;
  const bool amsgrad = chunk.max_exp_avg_sq != nullptr;
  for (int64_t i = 0; i < chunk.size; i += kBlock) {
    const int64_t size = chunk.size - i < kBlock ? chunk.size - i : kBlock;
    param.open(chunk.param, chunk.param_dtype, i, size);
    grad.open(const_cast<void*>(chunk.grad), chunk.grad_dtype, i, size);
    exp_avg.open(chunk.exp_avg, chunk.state_dtype, i, size);
    exp_avg_sq.open(chunk.exp_avg_sq, chunk.state_dtype, i, size);
    if (amsgrad) {
      max_exp_avg_sq.open(chunk.max_exp_avg_sq, chunk.state_dtype, i, size);
      adamw_block<true>(rule, param.values, grad.values, exp_avg.values, exp_avg_sq.values, max_exp_avg_sq.values,
                        size);
      max_exp_avg_sq.close(size);
    } else {
      adamw_block<false>(rule, param.values, grad.values, exp_avg.values, exp_avg_sq.values, nullptr, size);
    }
    param.close(size);
    exp_avg.close(size);
    exp_avg_sq.close(size);
  }
}
