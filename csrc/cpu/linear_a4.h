// What the kernels of linear_w2a4, linear_w3a4 and linear_w4a4 share. All are bit-exact to the
// reference: the sum of a block is an exact integer; it is converted to float, multiplied by
// (weight scale * activation scale) and added in block order, each step rounded by itself. So every
// instruction set gives the same bits, and a token's result does not depend on its neighbours.
//
//   linear_a4.cpp         chooses and launches a kernel
//   linear_a4_rows.h      x86, few tokens: a weight row is decoded in registers, met by each token
//   linear_a4_decode.h    x86: 32 bytes of a weight row to biased bytes, by planes
//   linear_a4_panels.h    x86, many tokens: weights are decoded into panels, then multiplied
//   linear_a4_<set>.cpp   compiles these two for an instruction set
//   linear_a4_base.cpp    portable loops, for all other machines
//
// On x86 a product is of an unsigned byte and a signed one. The weight's is the unsigned one, its
// level or code biased by kBias, so that pairs of products (at most 2 * 255 * 8) fit 16 bits; the
// block's sum of activations times the bias is taken off again.
#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "../params.h"

namespace w2a4::cpu {

constexpr int kFewTokens = 4;             // up to here rows, above panels
constexpr int64_t kPanelTokens = 256;     // tokens that share a decoded panel
constexpr int64_t kVectorBytes = 32;      // bytes of a weight row that are decoded together
constexpr int64_t kUnitBytes = 4;         // the same of a panel
constexpr int64_t kScratch = 32ll << 20;  // bytes of unpacked activations at a time

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

struct AlignedDelete {
  void operator()(void* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
// Scratch memory, not initialised.
template <class T>
using Aligned = std::unique_ptr<T[], AlignedDelete>;
template <class T>
Aligned<T> aligned(int64_t n) {
  return Aligned<T>(static_cast<T*>(::operator new[](n * sizeof(T), std::align_val_t(64))));
}

// Codes of 2 and 3 bits pick a level. The low two bits of both lie alike, four codes a byte; a row
// of 3 bits has the high bits of its codes behind them, eight codes a byte (see packing.py). So the
// two formats share the order of activations, and a kernel of one decodes the other with one step
// more.
template <int kBits>
constexpr int kPlanes = kBits == 4 ? 2 : 4;  // codes of a byte, but for the high bits of 3
template <int kBits>
constexpr int kBias = kBits == 4 ? 8 : 128;
template <int kBits>
constexpr int kLevels = kBits == 4 ? 0 : 1 << kBits;  // of a group

inline int64_t codes_in_byte(const LinearA4Params& p) {
  return p.weight_bits == 4 ? 2 : 4;
}
// Bytes of a row without the high bits of 3, which begin there.
inline int64_t low_bytes(const LinearA4Params& p) {
  return ceil_div(p.in_features, codes_in_byte(p));
}
inline int64_t row_bytes(const LinearA4Params& p) {
  return low_bytes(p) + (p.weight_bits == 3 ? ceil_div(p.in_features, 8) : 0);
}
inline int64_t levels_of_group(const LinearA4Params& p) {
  return p.levels ? int64_t{1} << p.weight_bits : 0;
}
// Whether every block of a row begins at a byte, also of the high bits.
inline bool by_bytes(const LinearA4Params& p) {
  return p.block % (p.weight_bits == 3 ? 8 : codes_in_byte(p)) == 0 || p.block == p.in_features;
}
// Code k of a row.
inline int code_at(const LinearA4Params& p, const uint8_t* row, int64_t k) {
  const int64_t in_byte = codes_in_byte(p), bits = 8 / in_byte;
  const int code = row[k / in_byte] >> (k % in_byte * bits) & ((1 << bits) - 1);
  return p.weight_bits == 3 ? code | (row[low_bytes(p) + k / 8] >> k % 8 & 1) << 2 : code;
}

// A weight row is read by cells. If blocks are 8 or 16 bytes long, a cell is a vector of several
// blocks, else one block of as many vectors as it takes; the last vector of a cell may reach beyond
// it, where activations are 0. Codes come out of a vector by planes: first those in the lowest bits
// of every byte, then the next; activations are put in that order once.
struct RowsTask {
  const LinearA4Params* p;
  int64_t groups, blocks;  // of a row
  int64_t cells;           // of a row
  int64_t cell_bytes;      // of weight
  int64_t cell_vectors;    //
  int64_t cell_blocks;     // 1, 2 or 4
  int spread;              // weight groups of a vector: 2**spread
  int64_t padded_blocks;   // blocks of a row, of all its cells and a vector more
  int8_t* a;               // [tokens, cells, cell_vectors, planes, kVectorBytes]
  int32_t* bias;           // [tokens, padded_blocks]: bias times the sum of the block's activations
  float* a_scale;          // [tokens, padded_blocks]
  int64_t* cell_group;     // [cells]: the weight group of a cell's first input
};

// Panels hold the weights of some outputs by units of 4 bytes of their rows: [units, planes,
// outputs, 4]. A block fills whole units; codes beyond its end meet activations that are 0.
struct PanelsTask {
  const LinearA4Params* p;
  int64_t first_token, tokens;
  int64_t block_units;
  int8_t* a;       // [tokens, blocks, block_units, planes, 4]
  int32_t* bias;   // [tokens, blocks]: minus the bias times the sum of the block's activations
  float* a_scale;  // [tokens, blocks]
};

struct BaseTask {
  const LinearA4Params* p;
  int64_t first_token, tokens;
  int64_t
      unit_words;  // 16-bit words that are decoded together, or 0 if blocks are not made of them
  int16_t* a;      // [tokens, in]: units by planes, or in natural order
};

struct LinearA4Kernels {
  void (*prepare_rows)(const RowsTask&, int64_t begin, int64_t end);      // over tokens
  void (*rows)(const RowsTask&, int64_t begin, int64_t end);              // over eights of outputs
  void (*prepare_panels)(const PanelsTask&, int64_t begin, int64_t end);  // over tokens
  void (*panels)(const PanelsTask&, int64_t begin, int64_t end);  // over panels, tokens outside
  int64_t panel_outs;
};

extern const LinearA4Kernels kLinearA4Avx2, kLinearA4AvxVnni, kLinearA4Avx512Vnni;

void linear_a4_base(const LinearA4Params& p);

}  // namespace w2a4::cpu
