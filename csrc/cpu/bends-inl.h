// Of one row of logits and its gradient, the sums that gradkern.rollback._curvature needs.

// exp(x) for x <= 0, to one unit in the last place or two, and 0 below the normal numbers: arithmetic alone, the same
// bits everywhere.
GRADKERN_INLINE float exp_nonpositive(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float n = __builtin_rintf(clamped * 1.44269504f);
  const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9841270e-4f;
  p = p * r + 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  __builtin_memcpy(&power, &bits, 4);
  return x < -87.0f ? 0.0f : p * power;
}

// sums: inner product of gradient and residual, squares of the residual, of the gradient, and residual times Hessian
// times residual. scratch: 2 x classes.
void bend_row_loop(const float* logits, const float* grad, int64_t classes, float* scratch, double* sums) {
  float* p = scratch;
  float* pr = scratch + classes;
  float top = logits[0];
  for (int64_t k = 1; k < classes; ++k) {
    top = logits[k] > top ? logits[k] : top;
  }
  float largest = largest_magnitude(grad, classes);
  // A logit or a gradient that is not finite says nothing.
  if (!(largest <= 3.40282347e38f) || !(top <= 3.40282347e38f && top >= -3.40282347e38f)) {
    sums[0] = sums[1] = sums[2] = sums[3] = __builtin_nan("");
    return;
  }
  for (int64_t k = 0; k < classes; ++k) {
    p[k] = exp_nonpositive(logits[k] - top);
    pr[k] = 1.0f;
  }
  const float total = lanes_dot(p, pr, classes);
  for (int64_t k = 0; k < classes; ++k) {
    p[k] = p[k] / total;
  }
  const float tie_break = 1e-6f * (largest < kTinyNormal ? kTinyNormal : largest);
  int64_t right = 0;
  float least = grad[0] - tie_break * p[0];
  for (int64_t k = 1; k < classes; ++k) {
    const float value = grad[k] - tie_break * p[k];
    if (value < least) {
      least = value;
      right = k;
    }
  }
  const float p_right = p[right];
  p[right] = p_right - 1.0f;  // p holds the residual from here
  for (int64_t k = 0; k < classes; ++k) {
    pr[k] = p[k] * (k == right ? p_right : p[k]);
  }
  sums[0] = lanes_dot_wide(grad, p, classes);
  sums[1] = lanes_dot_wide(p, p, classes);
  sums[2] = lanes_dot_wide(grad, grad, classes);
  const double along = lanes_dot_wide(pr, p, classes);
  for (int64_t k = 0; k < classes; ++k) {
    p[k] = 1.0f;
  }
  const double mean = lanes_dot_wide(pr, p, classes);
  sums[3] = along - mean * mean;
}
