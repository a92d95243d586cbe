#include "isa.h"

#include <cmath>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Each block below includes the same loops once, in its own namespace and for its own instruction set. Regions
// rather than per-file flags: a file compiled with -mavx512f leaks wide instructions through inline functions of
// shared headers and then crashes CPUs that lack them.

#define GRADKERN_ISA baseline
#define GRADKERN_VEC "vec_scalar-inl.h"
#include "foreach_isa.inc"
#undef GRADKERN_VEC
#undef GRADKERN_ISA

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx2,f16c,fma")
#define GRADKERN_ISA avx2
#define GRADKERN_VEC "vec_avx2-inl.h"
#include "foreach_isa.inc"
#undef GRADKERN_VEC
#undef GRADKERN_ISA
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,f16c,fma,avx512f,avx512bw,avx512dq,avx512vl")
#define GRADKERN_ISA avx512
#define GRADKERN_VEC "vec_avx512-inl.h"
#include "foreach_isa.inc"
#undef GRADKERN_VEC
#undef GRADKERN_ISA
#pragma GCC pop_options

#elif defined(__aarch64__)

#define GRADKERN_ISA neon
#define GRADKERN_VEC "vec_neon-inl.h"
#include "foreach_isa.inc"
#undef GRADKERN_VEC
#undef GRADKERN_ISA

#endif

namespace gradkern {
namespace {

struct Isa {
  const char* name;
  bool available;
  const KernelTable* table;
};

Isa choose() {
#if defined(__x86_64__)
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const Isa candidates[] = {
      {"avx512", has_avx512, &avx512::table}, {"avx2", has_avx2, &avx2::table}, {"baseline", true, &baseline::table}};
#elif defined(__aarch64__)
  const Isa candidates[] = {{"neon", true, &neon::table}, {"baseline", true, &baseline::table}};
#else
  const Isa candidates[] = {{"baseline", true, &baseline::table}};
#endif
  // An unknown or unavailable name is reported in Python, which reads the variable too and compares.
  const char* wanted = std::getenv("GRADKERN_CPU_ISA");
  for (const Isa& isa : candidates) {
    if (isa.available && wanted != nullptr && std::strcmp(wanted, isa.name) == 0) {
      return isa;
    }
  }
  for (const Isa& isa : candidates) {
    if (isa.available) {
      return isa;
    }
  }
  return {"baseline", true, &baseline::table};
}

const Isa& chosen() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace

const char* isa_name() { return chosen().name; }

const KernelTable& kernels() { return *chosen().table; }

void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace gradkern
