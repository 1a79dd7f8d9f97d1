// Weights of 32 bytes of a row, decoded in registers. Included by linear_a4_rows.h, for each x86
// instruction set; linear_a4_panels.h uses it too.

W2A4_FN __m256i load_bytes(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

// Look-up tables of the levels of a vector, biased. Of 2 bits: of the low code of a nibble and of
// the high one; if a lane has two groups, of single codes, the upper group's from entry 4 on. Of 3
// bits, in `low`: of single codes, the upper group's from entry 8 on.
struct Tables {
  __m256i low, high;
};

template <int kSpread>
W2A4_FN Tables load_eights(const int8_t* levels) {
  __m256i all;
  if constexpr (kSpread == 0) {
    int64_t eight;
    std::memcpy(&eight, levels, sizeof(eight));
    all = _mm256_set1_epi64x(eight);
  } else if constexpr (kSpread == 1) {
    const __m128i two = _mm_loadu_si128(reinterpret_cast<const __m128i*>(levels));
    all = _mm256_permute4x64_epi64(_mm256_castsi128_si256(two), 0x50);
  } else {
    all = load_bytes(levels);
  }
  return {_mm256_xor_si256(all, _mm256_set1_epi8(-128)), all};
}

template <int kBits, int kSpread>
W2A4_FN Tables load_tables(const int8_t* levels) {
  if constexpr (kBits == 3) return load_eights<kSpread>(levels);
  const __m256i sign = _mm256_set1_epi8(-128);
  if constexpr (kSpread == 0) {
    int32_t four;
    std::memcpy(&four, levels, sizeof(four));
    const __m256i low = _mm256_xor_si256(_mm256_set1_epi32(four), sign);
    const __m256i by_high = _mm256_setr_epi32(0, 0x01010101, 0x02020202, 0x03030303, 0, 0x01010101,
                                              0x02020202, 0x03030303);
    return {low, _mm256_shuffle_epi8(low, by_high)};
  }
  const __m128i loaded = _mm_loadu_si128(reinterpret_cast<const __m128i*>(levels));
  const __m256i all = _mm256_xor_si256(_mm256_broadcastsi128_si256(loaded), sign);
  if constexpr (kSpread == 1) {
    const __m256i by_low = _mm256_setr_epi32(0x03020100, 0x03020100, 0x03020100, 0x03020100,
                                             0x07060504, 0x07060504, 0x07060504, 0x07060504);
    const __m256i by_high = _mm256_setr_epi32(0, 0x01010101, 0x02020202, 0x03030303, 0x04040404,
                                              0x05050505, 0x06060606, 0x07070707);
    return {_mm256_shuffle_epi8(all, by_low), _mm256_shuffle_epi8(all, by_high)};
  }
  return {_mm256_permute4x64_epi64(all, 0x50), all};  // groups 0, 1 in lane 0 and 2, 3 in lane 1
}

// 16 bytes of high bits as 32 of a nibble each: byte j has those of the codes 4j .. 4j + 3, as byte
// j of the low bits.
W2A4_FN __m256i spread_high_bits(const uint8_t* from) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const __m128i nibble = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(x, nibble);
  const __m128i odd = _mm_and_si128(_mm_srli_epi16(x, 4), nibble);
  return _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
}

// The codes of one plane, of 2 or 3 bits.
template <int kBits>
W2A4_FN __m256i code_of_plane(__m256i low, __m256i high, int plane) {
  const __m256i code = _mm256_and_si256(_mm256_srli_epi16(low, 2 * plane), _mm256_set1_epi8(3));
  if constexpr (kBits == 2) return code;
  const __m256i moved = plane < 3 ? _mm256_slli_epi16(high, 2 - plane) : _mm256_srli_epi16(high, 1);
  return _mm256_or_si256(code, _mm256_and_si256(moved, _mm256_set1_epi8(4)));
}

// w[plane] = biased weights of the codes in 32 bytes and, of 3 bits, 16 bytes of high bits.
template <int kBits, int kSpread>
W2A4_FN void decode_vector(const uint8_t* codes, const uint8_t* high_bits, const Tables& tables,
                           __m256i* w) {
  const __m256i x = load_bytes(codes);
  if constexpr (kBits == 3 || (kBits == 2 && kSpread == 2)) {
    constexpr int kUpper = kSpread < 2 ? 0 : kLevels<kBits> * 0x01010101;
    const __m256i upper = _mm256_setr_epi32(0, 0, kUpper, kUpper, 0, 0, kUpper, kUpper);
    const __m256i top = kBits == 3 ? spread_high_bits(high_bits) : x;
#pragma GCC unroll 4
    for (int plane = 0; plane < 4; ++plane) {
      const __m256i code = code_of_plane<kBits>(x, top, plane);
      w[plane] = _mm256_shuffle_epi8(tables.low, _mm256_or_si256(code, upper));
    }
    return;
  }
  const __m256i nibble = _mm256_set1_epi8(15);
  const __m256i low = _mm256_and_si256(x, nibble);
  const __m256i high = _mm256_and_si256(_mm256_srli_epi16(x, 4), nibble);
  if constexpr (kBits == 2) {
    w[0] = _mm256_shuffle_epi8(tables.low, low);
    w[1] = _mm256_shuffle_epi8(tables.high, low);
    w[2] = _mm256_shuffle_epi8(tables.low, high);
    w[3] = _mm256_shuffle_epi8(tables.high, high);
  } else {
    w[0] = _mm256_xor_si256(low, _mm256_set1_epi8(8));
    w[1] = _mm256_xor_si256(high, _mm256_set1_epi8(8));
  }
}
