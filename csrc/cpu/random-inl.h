// The counter-based generator of stochastic rounding: a word is a hash of its counter under a key, so that its bits
// depend on nothing but (seed, step, parameter, offset). Two rounds of multiply and xor-shift, the finalizer that
// Mueller and Wellons searched for low bias.

GRADKERN_INLINE U32 mixed(U32 x) {
  x = (x ^ x.shr<16>()) * U32::all(kMix1);
  x = (x ^ x.shr<15>()) * U32::all(kMix2);
  return x ^ x.shr<15>();
}

// Words of kLanes neighbouring elements.
GRADKERN_INLINE U32 random_words(uint32_t key, uint32_t offset) {
  return mixed((U32::all(offset) + U32::lane_numbers()) ^ U32::all(key));
}

// A second word of the same elements.
GRADKERN_INLINE U32 next_words(U32 words) { return mixed(words + U32::all(kSecondWord)); }
