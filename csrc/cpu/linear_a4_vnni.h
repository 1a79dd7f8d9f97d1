// What both sets with VNNI share; included by files that define W2A4_FN and `multiply_add`.

// sum + the products of w and the activations at a, four of each to a lane. Chains of two, since an
// instruction's result takes several cycles.
template <int kPlanes>
W2A4_FN __m256i dot(__m256i sum, const __m256i* w, const int8_t* a) {
  const __m256i* from = reinterpret_cast<const __m256i*>(a);
#pragma GCC unroll 2
  for (int i = 0; i < kPlanes; i += 2) {
    const __m256i first = multiply_add(_mm256_setzero_si256(), w[i], _mm256_loadu_si256(from + i));
    sum = _mm256_add_epi32(sum, multiply_add(first, w[i + 1], _mm256_loadu_si256(from + i + 1)));
  }
  return sum;
}

constexpr int64_t kPartialQuads = int64_t{1} << 40;  // sums of 32 bits wrap, and end exact

W2A4_FN __m256i add_partial(__m256i sums, __m256i partial) {
  return _mm256_add_epi32(sums, partial);
}
