// One chunk of an optimizer step: codecs around a rule. fp32 operands are used in place; others pass through a block of
// fp32 that stays in L1, so that dtypes do not multiply into loops.

constexpr int64_t kBlock = 512;

// The rule comes by value and the pointers are copied: a store through a float pointer might change them where they
// were, for all that the compiler knows, and it would load them again for every vector.
template <class Rule>
inline void rule_block(const Rule rule, float* param, const float* grad, float* const* shared_states, int64_t padded) {
  float* states[Rule::kStates + 1];
  for (int k = 0; k < Rule::kStates; ++k) {
    states[k] = shared_states[k];
  }
  for (int64_t i = 0; i < padded; i += F32::kLanes) {
    prefetch(param + i);
    prefetch(grad + i);
    F32 state[Rule::kStates + 1];
    for (int k = 0; k < Rule::kStates; ++k) {
      prefetch(states[k] + i);
      state[k] = F32::load(states[k] + i);
    }
    rule(F32::load(param + i), F32::load(grad + i), state).store(param + i);
    for (int k = 0; k < Rule::kStates; ++k) {
      state[k].store(states[k] + i);
    }
  }
}

// What lies in memory for one block of an operand: the user's own bytes where whole vectors fit, else a padded copy of
// what is less than a vector (or than a block of 8-bit state), so that an element never depends on where a tensor ends.
struct Window {
  alignas(64) unsigned char copy[kStateBlock * 4];
  unsigned char* home;
  unsigned char* bytes;
  int64_t size_bytes;

  inline void open(void* base, int64_t item, int64_t offset, int64_t size, int64_t padded) {
    home = static_cast<unsigned char*>(base) + offset * item;
    bytes = home;
    size_bytes = 0;
    if (size != padded && item != 0) {
      size_bytes = size * item;
      __builtin_memset(copy + size_bytes, 0, (padded - size) * item);
      __builtin_memcpy(copy, home, size_bytes);
      bytes = copy;
    }
  }
  inline void close() const { __builtin_memcpy(home, copy, size_bytes); }
};

inline void limit_grad(const StepChunk& chunk, int64_t padded, float* grad) {
  const F32 high = F32::all(chunk.limit), low = F32::all(-chunk.limit);
  for (int64_t i = 0; i < padded; i += F32::kLanes) {
    F32::minimum(F32::maximum(F32::load(grad + i), low), high).store(grad + i);
  }
}

inline void multiply_units(const StepChunk& chunk, int64_t first, int64_t size, float* grad) {
  int64_t i = 0;
  while (i < size) {
    const int64_t unit = (chunk.offset + first + i) / chunk.unit_size;
    int64_t end = (unit + 1) * chunk.unit_size - chunk.offset - first;
    end = end < size ? end : size;
    const float multiplier = chunk.units[unit];
    for (; i < end; ++i) {
      grad[i] *= multiplier;
    }
  }
}

// The block's states as fp32, and back.
inline float* open_state(StateCodec codec, Window& window, int64_t padded, float* values) {
  switch (codec) {
    case StateCodec::kFloat32:
      return reinterpret_cast<float*>(window.bytes);
    case StateCodec::kBFloat16:
    case StateCodec::kBFloat16Stochastic:
      decode<BFloat16Codec>(window.bytes, padded, values);
      return values;
    case StateCodec::kFloat16:
      decode<Float16Codec>(window.bytes, padded, values);
      return values;
    case StateCodec::kBlock8:
      break;  // rule_block8 decodes and encodes as it goes
  }
  return values;
}

template <int kHalf>
inline void encode_bf16_stochastic(const float* x, int64_t padded, uint32_t key, uint32_t offset, uint16_t* out) {
  for (int64_t i = 0; i < padded; i += F32::kLanes) {
    const U32 words = random_words(key, offset + static_cast<uint32_t>(i));
    const U32 random = kHalf == 0 ? words & U32::all(0xFFFFu) : words.shr<16>();
    const F32 value = F32::load(x + i);
    (U32::of(value) + random).shr<16>().unless_nan(value, U32::all(0x7FC0u)).store_u16(out + i);
  }
}

template <int kHalf>
inline void close_state(const StepChunk& chunk, Window& window, int64_t first, int64_t padded, const float* values) {
  const auto offset = static_cast<uint32_t>(chunk.offset + first);
  switch (chunk.state_codec) {
    case StateCodec::kFloat32:
      break;
    case StateCodec::kBFloat16:
      encode<BFloat16Codec>(values, padded, window.bytes);
      break;
    case StateCodec::kBFloat16Stochastic:
      encode_bf16_stochastic<kHalf>(values, padded, chunk.key, offset, reinterpret_cast<uint16_t*>(window.bytes));
      break;
    case StateCodec::kFloat16:
      encode<Float16Codec>(values, padded, window.bytes);
      break;
    case StateCodec::kBlock8:
      break;
  }
  window.close();
}

inline float* open_param(const StepChunk& chunk, Window& param, Window& remainder, int64_t padded, float* values) {
  switch (chunk.param_codec) {
    case ParamCodec::kFloat32:
      return reinterpret_cast<float*>(param.bytes);
    case ParamCodec::kBFloat16Master32:
    case ParamCodec::kFloat16Master32:
      return reinterpret_cast<float*>(remainder.bytes);
    case ParamCodec::kBFloat16:
    case ParamCodec::kBFloat16Stochastic:
      decode<BFloat16Codec>(param.bytes, padded, values);
      break;
    case ParamCodec::kFloat16:
      decode<Float16Codec>(param.bytes, padded, values);
      break;
    case ParamCodec::kBFloat16Split16:
      decode_param<ParamCodec::kBFloat16Split16>(param.bytes, remainder.bytes, padded, values);
      break;
    case ParamCodec::kBFloat16Split8:
      decode_param<ParamCodec::kBFloat16Split8>(param.bytes, remainder.bytes, padded, values);
      break;
  }
  return values;
}

inline void close_param(const StepChunk& chunk, Window& param, Window& remainder, int64_t first, int64_t padded,
                        const float* values) {
  const auto offset = static_cast<uint32_t>(chunk.offset + first);
  switch (chunk.param_codec) {
    case ParamCodec::kFloat32:
      break;
    case ParamCodec::kBFloat16:
      encode<BFloat16Codec>(values, padded, param.bytes);
      break;
    case ParamCodec::kFloat16:
    case ParamCodec::kFloat16Master32:
      encode<Float16Codec>(values, padded, param.bytes);
      break;
    case ParamCodec::kBFloat16Master32:
      encode_param<ParamCodec::kBFloat16Master32>(values, padded, chunk.key, offset, param.bytes, remainder.bytes);
      break;
    case ParamCodec::kBFloat16Split16:
      encode_param<ParamCodec::kBFloat16Split16>(values, padded, chunk.key, offset, param.bytes, remainder.bytes);
      break;
    case ParamCodec::kBFloat16Split8:
      encode_param<ParamCodec::kBFloat16Split8>(values, padded, chunk.key, offset, param.bytes, remainder.bytes);
      break;
    case ParamCodec::kBFloat16Stochastic:
      encode_param<ParamCodec::kBFloat16Stochastic>(values, padded, chunk.key, offset, param.bytes, remainder.bytes);
      break;
  }
  param.close();
  remainder.close();
}

// Scratch of one block: fp32 values and padded copies of what lies in memory.
struct Scratch {
  alignas(64) float param_values[kBlock], grad_values[kBlock], state_values[kMaxStates][kBlock];
  Window param, remainder, grad, state[kMaxStates];
};

// Blocks of 8-bit state, one behind the other: while the rule works on one, bound by the divider, the codes of the one
// before are formed between its vectors.
template <class Rule>
struct Blocks8 {
  alignas(64) float values[2][kMaxStates][kStateBlock];
  U32 base[kMaxStates], previous_base[kMaxStates];
  uint8_t* previous_codes[kMaxStates];

  // The rule on 64 elements, states left in values[now]; with kPrevious, the codes of values[1 - now] besides.
  template <bool kPrevious>
  GRADKERN_INLINE void run(const Rule& rule, uint32_t key, int now, float* param, const float* grad,
                           uint8_t* const* codes, U32* largest) {
    for (int64_t j = 0; j < kStateBlock; j += 4 * F32::kLanes) {
      for (int64_t i = j; i < j + 4 * F32::kLanes; i += F32::kLanes) {
        prefetch(param + i);
        prefetch(grad + i);
        F32 state[Rule::kStates + 1];
        for (int k = 0; k < Rule::kStates; ++k) {
          state[k] =
              Rule::kSigned[k] ? Block8<true>::load(codes[k] + i, base[k]) : Block8<false>::load(codes[k] + i, base[k]);
        }
        rule(F32::load(param + i), F32::load(grad + i), state).store(param + i);
        for (int k = 0; k < Rule::kStates; ++k) {
          state[k].store(values[now][k] + i);
          largest[k] = U32::maximum(largest[k], U32::of(state[k]) & U32::all(0x7FFFFFFFu));
        }
      }
      if (kPrevious) {
        encode<true>(key, 1 - now, j);
      }
    }
  }

  // The codes of four vectors of values[at], from element j on.
  template <bool kFinite>
  GRADKERN_INLINE void encode(uint32_t key, int at, int64_t j) {
    U32 stirred[4];
    for (int i = 0; i < 4; ++i) {
      stirred[i] = stirred_bits<kFinite>(F32::load(values[at][0] + j + i * F32::kLanes), U32::all(key));
    }
    for (int k = 0; k < Rule::kStates; ++k) {
      Rule::kSigned[k]
          ? encode_four<true, kFinite>(values[at][k] + j, previous_base[k], stirred, previous_codes[k] + j)
          : encode_four<false, kFinite>(values[at][k] + j, previous_base[k], stirred, previous_codes[k] + j);
    }
  }

  // The codes of all of values[at].
  template <bool kFinite>
  inline void encode_all(uint32_t key, int at) {
    for (int64_t j = 0; j < kStateBlock; j += 4 * F32::kLanes) {
      encode<kFinite>(key, at, j);
    }
  }
};

// As rule_block, for states in 8 bits.
template <class Rule>
inline void rule_block8(const Rule rule, const StepChunk& chunk, int64_t first, int64_t size, float* param,
                        const float* grad, Scratch& scratch) {
  Blocks8<Rule> blocks;
  bool pending = false;
  int now = 0;
  for (int64_t block = 0; block < size; block += kStateBlock, now = 1 - now) {
    uint8_t* codes[kMaxStates] = {};
    uint8_t* exponents[kMaxStates] = {};
    U32 largest[kMaxStates];
    for (int k = 0; k < Rule::kStates; ++k) {
      codes[k] = scratch.state[k].bytes + block;
      exponents[k] = chunk.scale[k] + (first + block) / kStateBlock;
      blocks.base[k] = Rule::kSigned[k] ? Block8<true>::base(*exponents[k]) : Block8<false>::base(*exponents[k]);
      largest[k] = U32::all(0);
      prefetch(codes[k]);
    }
    pending ? blocks.template run<true>(rule, chunk.key, now, param + block, grad + block, codes, largest)
            : blocks.template run<false>(rule, chunk.key, now, param + block, grad + block, codes, largest);
    pending = true;
    for (int k = 0; k < Rule::kStates; ++k) {
      if (size - block < kStateBlock) {  // padding must not set the exponent of a block
        float* values = blocks.values[now][k];
        largest[k] = U32::all(0);
        for (int64_t j = size - block; j < kStateBlock; ++j) {
          values[j] = 0.0f;
        }
        for (int64_t j = 0; j < kStateBlock; j += F32::kLanes) {
          largest[k] = U32::maximum(largest[k], U32::of(F32::load(values + j)) & U32::all(0x7FFFFFFFu));
        }
      }
      const uint32_t most = largest[k].largest();
      const uint32_t exponent = Rule::kSigned[k] ? Block8<true>::exponent(most) : Block8<false>::exponent(most);
      *exponents[k] = static_cast<uint8_t>(exponent);
      blocks.previous_base[k] = Rule::kSigned[k] ? Block8<true>::base(exponent) : Block8<false>::base(exponent);
      blocks.previous_codes[k] = codes[k];
      pending = pending && exponent != 255u;
    }
    if (!pending) {
      blocks.template encode_all<false>(chunk.key, now);
    }
  }
  if (pending) {
    blocks.template encode_all<true>(chunk.key, 1 - now);
  }
}

// Elements that are computed together.
inline int64_t whole_size(const StepChunk& chunk) {
  return chunk.state_codec == StateCodec::kBlock8 ? kStateBlock : F32::kLanes;
}

template <class Rule>
inline void step_block(const Rule& rule, const StepChunk& chunk, int64_t first, int64_t size, Scratch& scratch) {
  const int64_t whole = whole_size(chunk);
  const int64_t padded = (size + whole - 1) / whole * whole;
  scratch.param.open(chunk.param, param_item(chunk.param_codec), first, size, padded);
  scratch.remainder.open(chunk.remainder, remainder_item(chunk.param_codec), first, size, padded);
  scratch.grad.open(const_cast<void*>(chunk.grad), item_size(chunk.grad_dtype), first, size, padded);
  float* param = open_param(chunk, scratch.param, scratch.remainder, padded, scratch.param_values);
  float* grad = reinterpret_cast<float*>(scratch.grad.bytes);
  if (chunk.grad_dtype != DType::kFloat32 || chunk.transform != GradTransform::kNone) {
    grad = scratch.grad_values;
    decode(chunk.grad_dtype, scratch.grad.bytes, padded, grad);
    if (chunk.transform == GradTransform::kLimit) {
      limit_grad(chunk, padded, grad);
    } else if (chunk.transform == GradTransform::kUnits) {
      multiply_units(chunk, first, size, grad);
    }
  }
  float* states[kMaxStates] = {};
  for (int k = 0; k < Rule::kStates; ++k) {
    scratch.state[k].open(chunk.state[k], state_item(chunk.state_codec), first, size, padded);
    states[k] = open_state(chunk.state_codec, scratch.state[k], padded, scratch.state_values[k]);
  }
  if (chunk.state_codec == StateCodec::kBlock8) {
    rule_block8(rule, chunk, first, size, param, grad, scratch);
  } else {
    rule_block(rule, param, grad, states, padded);
  }
  for (int k = 0; k < Rule::kStates; ++k) {
    k == 0 ? close_state<0>(chunk, scratch.state[k], first, padded, states[k])
           : close_state<1>(chunk, scratch.state[k], first, padded, states[k]);
  }
  close_param(chunk, scratch.param, scratch.remainder, first, padded, param);
}

// Elements of one turn: all, where nothing passes through scratch.
inline int64_t turn_size(const StepChunk& chunk) {
  const bool in_place = chunk.param_codec == ParamCodec::kFloat32 && chunk.grad_dtype == DType::kFloat32 &&
                        chunk.transform == GradTransform::kNone && chunk.state_codec == StateCodec::kFloat32;
  return in_place ? kChunk : kBlock;
}

template <class Rule>
inline void step_chunk(const StepChunk& chunk, const StepScalars& scalars) {
  const Rule rule(scalars);
  Scratch scratch;
  const int64_t whole = chunk.size - chunk.size % whole_size(chunk);
  const int64_t turn = turn_size(chunk);
  for (int64_t i = 0; i < whole; i += turn) {
    step_block(rule, chunk, i, whole - i < turn ? whole - i : turn, scratch);
  }
  if (whole < chunk.size) {
    step_block(rule, chunk, whole, chunk.size - whole, scratch);
  }
}

// From a variant's number to its template.
template <template <class, int> class Rule, int kVariant>
inline void step_variant(int64_t variant, const StepChunk& chunk, const StepScalars& scalars) {
  if (variant == kVariant) {
    return step_chunk<Rule<F32, kVariant>>(chunk, scalars);
  }
  if constexpr (kVariant + 1 < Rule<F32, 0>::kVariants) {
    step_variant<Rule, kVariant + 1>(variant, chunk, scalars);
  }
}

template <template <class, int> class Rule>
void step_loop(int64_t variant, const StepChunk& chunk, const StepScalars& scalars) {
  step_variant<Rule, 0>(variant, chunk, scalars);
}

template <template <class, int> class Rule, int kVariant>
inline StepScalars scalars_variant(int64_t variant, const double* hyper, double grad_multiplier, int64_t step) {
  if constexpr (kVariant + 1 < Rule<F32, 0>::kVariants) {
    if (variant != kVariant) {
      return scalars_variant<Rule, kVariant + 1>(variant, hyper, grad_multiplier, step);
    }
  }
  return Rule<F32, kVariant>::scalars(hyper, grad_multiplier, step);
}

template <template <class, int> class Rule>
StepScalars step_scalars_of(int64_t variant, const double* hyper, double grad_multiplier, int64_t step) {
  return scalars_variant<Rule, 0>(variant, hyper, grad_multiplier, step);
}

template <template <class, int> class Rule, int kVariant>
inline int64_t states_variant(int64_t variant) {
  if (variant == kVariant) {
    return Rule<F32, kVariant>::kStates;
  }
  if constexpr (kVariant + 1 < Rule<F32, 0>::kVariants) {
    return states_variant<Rule, kVariant + 1>(variant);
  }
  return -1;
}

template <template <class, int> class Rule>
int64_t step_states(int64_t variant) {
  return states_variant<Rule, 0>(variant);
}
