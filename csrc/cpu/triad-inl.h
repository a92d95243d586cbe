// out = a + 3 b: the yardstick of memory bandwidth for the benchmarks, with plain or streaming stores.
void triad_loop(float* out, const float* a, const float* b, int64_t any_size, bool streaming) {
  const F32 three = F32::all(3.0f);
  int64_t i = 0;
  if (streaming) {
    for (; i + F32::kLanes <= any_size; i += F32::kLanes) {
      (F32::load(a + i) + three * F32::load(b + i)).stream(out + i);
    }
  } else {
    for (; i + F32::kLanes <= any_size; i += F32::kLanes) {
      (F32::load(a + i) + three * F32::load(b + i)).store(out + i);
    }
  }
  for (; i < any_size; ++i) {
    out[i] = a[i] + 3.0f * b[i];
  }
}
