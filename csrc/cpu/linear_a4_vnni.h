// What both sets with VNNI share; included by files that define W2A4_FN and `multiply_add`.

// Products of w and the activations at a, four to a lane. Chains of two, since an instruction's
// result takes several cycles.
template <int kPlanes>
W2A4_FN __m256i dot(const __m256i* w, const int8_t* a) {
  const __m256i* from = reinterpret_cast<const __m256i*>(a);
  __m256i fours[kPlanes / 2];
#pragma GCC unroll 2
  for (int i = 0; i < kPlanes; i += 2)
    fours[i / 2] =
        multiply_add(multiply_add(_mm256_setzero_si256(), w[i], _mm256_loadu_si256(from + i)),
                     w[i + 1], _mm256_loadu_si256(from + i + 1));
  return kPlanes == 2 ? fours[0] : _mm256_add_epi32(fours[0], fours[kPlanes / 2 - 1]);
}
W2A4_FN __m256i add_products(__m256i x, __m256i y) {
  return _mm256_add_epi32(x, y);
}
W2A4_FN __m256i widen(__m256i products) {
  return products;
}

constexpr int64_t kPartialQuads = int64_t{1} << 40;  // sums of 32 bits wrap, and end exact

W2A4_FN __m256i add_partial(__m256i sums, __m256i partial) {
  return _mm256_add_epi32(sums, partial);
}
