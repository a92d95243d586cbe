// Which instruction set the loops run on, decided once per process.
#pragma once

#include "kernels.h"

namespace gradkern {

// "baseline", "avx2", "avx512" or "neon".
const char* isa_name();

// The loops of the chosen instruction set. GRADKERN_CPU_ISA may name one that this CPU has.
const KernelTable& kernels();

// To be called by every thread that wrote with streaming stores, before others may read.
void finish_streaming();

}  // namespace gradkern
