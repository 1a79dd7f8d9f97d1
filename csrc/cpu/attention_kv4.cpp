// attention_kv4. A task is a tile of queries that share a cache head; it reads the cache in tiles
// of 64 keys, dequantised once for all of them. What is computed for one query row is, in this
// order and in float, whatever the other rows, the threads and the keys it does not see are:
//   score of a key   sum over head_dim in order, times scaling
//   weight           exp(score - largest score), 0 for a key that is not seen
//   total, output    sums over seen keys in order (an unseen one adds an exact zero), then divided
#include <algorithm>
#include <limits>
#include <vector>

#include "exponential.h"
#include "kernels.h"
#include "tile.h"

namespace w2a4::cpu {
namespace {

constexpr int kKeys = kColumns;       // keys of a tile
constexpr int64_t kScores = 1 << 17;  // floats of scores of a task, about
constexpr int64_t kMostTokens = 32;   // query tokens of a task
constexpr int64_t kSharedTokens =
    64;  // from here on cache tiles are dequantised once for all tasks
constexpr int64_t kSharedFloats = 8 << 20;  // of dequantised cache at a time

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

struct Task {
  const AttentionKV4Params* p;
  int64_t padded_dim;         // head_dim rounded up to kColumns
  int64_t tokens;             // query tokens of a task
  int64_t first_head, heads;  // of batch * kv_heads cache heads, those done now
  int64_t key_tiles;          // tiles of kKeys in the cache
  float* shared;              // [heads, key_tiles, tile_floats()], or null: every task dequantises
  uint8_t* finite;            // [heads, key_tiles]: whether all values of a shared tile are

  // A tile: keys transposed [head_dim, kKeys], then values [kKeys, padded_dim].
  int64_t tile_floats() const { return (p->head_dim + padded_dim) * kKeys; }
};

template <class T>
W2A4_INLINE T* at(const Strided4& t, int64_t batch, int64_t head, int64_t token) {
  return static_cast<T*>(t.data) + batch * t.batch + head * t.head + token * t.token;
}

// Of a cache, which may be paged, and then holds no sinks.
template <class T>
W2A4_INLINE T* key_at(const AttentionKV4Params& p, const Strided4& t, int64_t batch, int64_t head,
                      int64_t key) {
  const BlockTable& table = p.table;
  if (!table.at) return at<T>(t, batch, head, key);
  key -= p.sinks;
  return at<T>(t, table.at[batch * table.row + key / table.block_tokens], head,
               key % table.block_tokens);
}

// Keys that a sequence has.
W2A4_INLINE int64_t keys_of(const AttentionKV4Params& p, int64_t batch) {
  return p.starts ? p.starts[batch] + p.q_tokens : p.length;
}

// How many of the keys from `first` on lie in no cache.
W2A4_INLINE int64_t outside(const AttentionKV4Params& p, int64_t first, int64_t count) {
  return p.table.at ? std::clamp<int64_t>(p.sinks - first, 0, count) : 0;
}

// Codes of keys first .. first + count as bytes [head_dim / 2, kKeys], any where a key has none;
// `gathered` [kKeys, head_dim / 2] is used where they do not lie next to each other.
W2A4_INLINE void transpose_codes(const AttentionKV4Params& p, int64_t batch, int64_t head,
                                 int64_t first, int64_t count, uint8_t* gathered, uint8_t* bytes) {
  const int64_t width = p.head_dim / 2;
  if (count == 0) return transpose_bytes(gathered, width, 0, width, bytes);
  const auto key = [&](int64_t i) {
    return key_at<const uint8_t>(p, p.k_codes, batch, head, first + i);
  };
  const int64_t begin = outside(p, first, count), size = p.table.block_tokens;
  const auto block = [&](int64_t i) { return (first + i - p.sinks) / size; };
  if (!p.table.at || (begin == 0 && block(0) == block(count - 1)))
    return transpose_bytes(key(0), p.k_codes.token, count, width, bytes);
  for (int64_t i = begin; i < count; ++i) std::memcpy(gathered + i * width, key(i), width);
  transpose_bytes(gathered, width, count, width, bytes);
}

// Scales and zero-points of keys (or values) first .. first + count, 0 where one lies in no cache.
struct ParamsTile {
  alignas(64) float scale[kKeys], zero[kKeys];
  bool finite;
};

W2A4_INLINE void load_params(const AttentionKV4Params& p, const Strided4& params, int64_t batch,
                             int64_t head, int64_t first, int64_t count, ParamsTile& to) {
  F16 pairs[2 * kKeys] = {};
  for (int64_t key = outside(p, first, count); key < count; ++key)
    std::memcpy(pairs + 2 * key, key_at<const F16>(p, params, batch, head, first + key),
                2 * sizeof(F16));
  int most = 0;
  for (const F16& each : pairs) most = std::max(most, each.bits & 0x7fff);
  to.finite = most < 0x7c00;
  for (int key = 0; key < kKeys; ++key) {
    to.scale[key] = to_float(pairs[2 * key]);
    to.zero[key] = to_float(pairs[2 * key + 1]);
  }
}

// keys [head_dim, kKeys]: keys first .. first + count, transposed; columns from count on are 0.
// `bytes` has room for two tiles of codes.
W2A4_INLINE void load_keys(const AttentionKV4Params& p, int64_t batch, int64_t head, int64_t first,
                           int64_t count, uint8_t* bytes, float* keys) {
  const int64_t width = p.head_dim / 2;
  ParamsTile params;
  load_params(p, p.k_params, batch, head, first, count, params);
  transpose_codes(p, batch, head, first, count, bytes + width * kKeys, bytes);
  for (int64_t j = 0; j < width; ++j) {
    const uint8_t* codes = bytes + j * kKeys;
    float *even = keys + 2 * j * kKeys, *odd = even + kKeys;
    for (int key = 0; key < kKeys; ++key) {
      even[key] = static_cast<float>(codes[key] & 15) * params.scale[key] + params.zero[key];
      odd[key] = static_cast<float>(codes[key] >> 4) * params.scale[key] + params.zero[key];
    }
  }
  for (int64_t key = first; key < std::min(p.sinks, first + count); ++key)
    for (int64_t d = 0; d < p.head_dim; ++d)
      load(at<const char>(p.k_sink, 0, 0, 0), p.k_sink_dtype,
           batch * p.k_sink.batch + head * p.k_sink.head + key * p.k_sink.token + d, 1,
           keys + d * kKeys + key - first);
}

W2A4_INLINE bool all_finite(const float* x, int64_t n) {
  int32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t magnitude = bits<int32_t>(x[i]) & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
  }
  return most < 0x7f800000;
}

// values [kKeys, padded_dim]: the values of the same keys; what is beyond head_dim or count is 0.
// Returns whether all are finite.
W2A4_INLINE bool load_values(const AttentionKV4Params& p, int64_t batch, int64_t head,
                             int64_t first, int64_t count, int64_t padded_dim, float* values) {
  std::memset(values, 0, kKeys * padded_dim * sizeof(float));
  ParamsTile params;
  load_params(p, p.v_params, batch, head, first, count, params);
  for (int64_t key = 0; key < count; ++key) {
    float* row = values + key * padded_dim;
    if (first + key < p.sinks) {
      load(p.v_sink.data, p.v_sink_dtype,
           batch * p.v_sink.batch + head * p.v_sink.head + (first + key) * p.v_sink.token,
           p.head_dim, row);
      continue;
    }
    const uint8_t* codes = key_at<const uint8_t>(p, p.v_codes, batch, head, first + key);
    const float scale = params.scale[key], zero = params.zero[key];
    for (int64_t j = 0; j < p.head_dim / 2; ++j) {
      row[2 * j] = static_cast<float>(codes[j] & 15) * scale + zero;
      row[2 * j + 1] = static_cast<float>(codes[j] >> 4) * scale + zero;
    }
  }
  // Finite numbers of 16 bits give values that are.
  return first < p.sinks || !params.finite ? all_finite(values, count * padded_dim) : true;
}

template <class Arch>
W2A4_INLINE void load_shared_tiles(const Task& task, int64_t begin, int64_t end) {
  const AttentionKV4Params& p = *task.p;
  std::vector<uint8_t> bytes(p.head_dim * kKeys);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t pair = task.first_head + i / task.key_tiles, first = i % task.key_tiles * kKeys;
    const int64_t batch = pair / p.kv_heads, head = pair % p.kv_heads;
    // A block table says nothing of keys that the sequence does not have.
    const int64_t count = std::clamp<int64_t>(keys_of(p, batch) - first, 0, kKeys);
    float* tile = task.shared + i * task.tile_floats();
    load_keys(p, batch, head, first, count, bytes.data(), tile);
    task.finite[i] =
        load_values(p, batch, head, first, count, task.padded_dim, tile + p.head_dim * kKeys);
  }
}
W2A4_DISPATCH(load_shared_tiles, Task)

// scores [limit] become weights; returns their sum in order. Keys from seen_end on, and those the
// mask hides, weigh 0.
W2A4_INLINE float softmax_row(const AttentionKV4Params& p, const bool* mask, int64_t seen_end,
                              int64_t limit, float* scores) {
  constexpr float kHidden = -std::numeric_limits<float>::infinity();
  for (int64_t key = 0; key < seen_end; ++key) scores[key] *= p.scaling;
  if (mask)
    for (int64_t key = 0; key < seen_end; ++key)
      if (!mask[key * p.mask_key]) scores[key] = kHidden;
  float most = kHidden;
  for (int64_t key = 0; key < seen_end; ++key) most = scores[key] > most ? scores[key] : most;
  if (most == kHidden) most = 0.0f;  // nothing is seen: every weight is exp(-inf)
  for (int64_t key = 0; key < seen_end; ++key) scores[key] = exp_negative(scores[key] - most);
  for (int64_t key = seen_end; key < limit; ++key) scores[key] = 0.0f;
  float total = 0.0f;
  for (int64_t key = 0; key < seen_end; ++key) total += scores[key];
  return total;
}

// out [rows, padded_dim] += weights [rows, ldw] x values [count, padded_dim], of a tile of rows.
template <class Arch>
W2A4_INLINE void add_values(int64_t rows, const float* weights, int64_t ldw, const float* values,
                            int64_t count, int64_t padded_dim, bool finite, float* out) {
  if (finite) {
    for (int64_t d = 0; d < padded_dim; d += kColumns)
      multiply_rows<Arch, false>(rows, weights, ldw, values + d, padded_dim, count, out + d,
                                 padded_dim);
    return;
  }
  // 0 * NaN is not 0: a value that is not a number must not reach rows that do not see it.
  for (int64_t r = 0; r < std::min<int64_t>(rows, kRows); ++r)
    for (int64_t key = 0; key < count; ++key) {
      const float weight = weights[r * ldw + key];
      if (weight == 0.0f) continue;
      for (int64_t d = 0; d < padded_dim; ++d)
        out[r * padded_dim + d] += weight * values[key * padded_dim + d];
    }
}

// Buffers of one task. A row is one query token and head.
struct Scratch {
  std::vector<float> q;       // [rows, head_dim]
  std::vector<float> scores;  // [rows, limit rounded up to kKeys]
  std::vector<float> out;     // [rows, padded_dim]
  std::vector<float> total;   // [rows]
  std::vector<float> tile;
  std::vector<uint8_t> bytes;
};

// One tile of queries: cache head `pair`, query tokens first_token .. first_token + tokens.
struct QueryTile {
  const Task& task;
  int64_t batch, head, pair;
  int64_t first_token, tokens;
  int64_t repeat;      // query heads of this cache head
  int64_t rows;        // tokens * repeat, padded as tiles need it
  int64_t limit;       // keys seen by any of its rows
  int64_t row_stride;  // of scores

  QueryTile(const Task& task, int64_t index) : task(task) {
    const AttentionKV4Params& p = *task.p;
    const int64_t tiles = ceil_div(p.q_tokens, task.tokens);
    pair = task.first_head + index / tiles;
    batch = pair / p.kv_heads;
    head = pair % p.kv_heads;
    // Later tokens see more keys: the longest tasks first.
    first_token = (tiles - 1 - index % tiles) * task.tokens;
    tokens = std::min(task.tokens, p.q_tokens - first_token);
    repeat = p.q_heads / p.kv_heads;
    rows = padded_rows(tokens * repeat);
    limit = seen_end(tokens - 1);
    row_stride = ceil_div(limit, kKeys) * kKeys;
  }

  // Keys that the tile's token may see, before any mask: 0 .. seen_end.
  int64_t seen_end(int64_t token) const {
    const AttentionKV4Params& p = *task.p;
    const int64_t length = keys_of(p, batch);
    return p.causal ? std::max<int64_t>(0, length - p.q_tokens + first_token + token + 1) : length;
  }
};

W2A4_INLINE void load_queries(const QueryTile& t, Scratch& s) {
  const AttentionKV4Params& p = *t.task.p;
  s.q.assign(t.rows * p.head_dim, 0.0f);
  for (int64_t row = 0; row < t.tokens * t.repeat; ++row)
    load(p.q.data, p.dtype,
         t.batch * p.q.batch + (t.head * t.repeat + row % t.repeat) * p.q.head +
             (t.first_token + row / t.repeat) * p.q.token,
         p.head_dim, s.q.data() + row * p.head_dim);
}

// Number of a shared tile.
W2A4_INLINE int64_t shared_tile(const QueryTile& t, int64_t first) {
  return (t.pair - t.task.first_head) * t.task.key_tiles + first / kKeys;
}

// The tile of keys from key `first` on.
W2A4_INLINE const float* key_tile(const QueryTile& t, int64_t first, int64_t count, Scratch& s) {
  const Task& task = t.task;
  if (task.shared) return task.shared + shared_tile(t, first) * task.tile_floats();
  load_keys(*task.p, t.batch, t.head, first, count, s.bytes.data(), s.tile.data());
  return s.tile.data();
}

// That of values, and whether all of them are finite.
W2A4_INLINE const float* value_tile(const QueryTile& t, int64_t first, int64_t count, Scratch& s,
                                    bool& finite) {
  const Task& task = t.task;
  const AttentionKV4Params& p = *task.p;
  if (task.shared) {
    const int64_t i = shared_tile(t, first);
    finite = task.finite[i];
    return task.shared + i * task.tile_floats() + p.head_dim * kKeys;
  }
  finite = load_values(p, t.batch, t.head, first, count, task.padded_dim, s.tile.data());
  return s.tile.data();
}

template <class Arch>
W2A4_INLINE void score(const QueryTile& t, Scratch& s) {
  const int64_t head_dim = t.task.p->head_dim;
  s.scores.resize(t.rows * t.row_stride);
  for (int64_t first = 0; first < t.limit; first += kKeys) {
    const float* keys = key_tile(t, first, std::min<int64_t>(kKeys, t.limit - first), s);
    for (int64_t row = 0; row < t.rows; row += kRows)
      multiply_rows<Arch, true>(t.rows - row, s.q.data() + row * head_dim, head_dim, keys, kKeys,
                                head_dim, s.scores.data() + row * t.row_stride + first,
                                t.row_stride);
  }
}

W2A4_INLINE void softmax(const QueryTile& t, Scratch& s) {
  const AttentionKV4Params& p = *t.task.p;
  s.total.assign(t.rows, 0.0f);
  for (int64_t row = 0; row < t.tokens * t.repeat; ++row) {
    const int64_t token = row / t.repeat, head = t.head * t.repeat + row % t.repeat;
    const bool* mask = p.mask ? p.mask + t.batch * p.mask_batch + head * p.mask_head +
                                    (t.first_token + token) * p.mask_q
                              : nullptr;
    s.total[row] =
        softmax_row(p, mask, t.seen_end(token), t.limit, s.scores.data() + row * t.row_stride);
  }
}

template <class Arch>
W2A4_INLINE void weigh_values(const QueryTile& t, Scratch& s) {
  const int64_t padded_dim = t.task.padded_dim;
  s.out.assign(t.rows * padded_dim, 0.0f);
  for (int64_t first = 0; first < t.limit; first += kKeys) {
    const int64_t count = std::min<int64_t>(kKeys, t.limit - first);
    bool finite;
    const float* values = value_tile(t, first, count, s, finite);
    for (int64_t row = 0; row < t.rows; row += kRows)
      add_values<Arch>(t.rows - row, s.scores.data() + row * t.row_stride + first, t.row_stride,
                       values, count, padded_dim, finite, s.out.data() + row * padded_dim);
  }
}

W2A4_INLINE void store_outputs(const QueryTile& t, Scratch& s) {
  const AttentionKV4Params& p = *t.task.p;
  for (int64_t row = 0; row < t.tokens * t.repeat; ++row) {
    float* out = s.out.data() + row * t.task.padded_dim;
    const float total = s.total[row];
    for (int64_t d = 0; d < p.head_dim; ++d) out[d] = total == 0.0f ? 0.0f : out[d] / total;
    const int64_t token = t.first_token + row / t.repeat, head = t.head * t.repeat + row % t.repeat;
    store(out, p.y, p.dtype, ((t.batch * p.q_tokens + token) * p.q_heads + head) * p.head_dim,
          p.head_dim);
  }
}

template <class Arch>
W2A4_INLINE void attend(const Task& task, int64_t begin, int64_t end) {
  const AttentionKV4Params& p = *task.p;
  Scratch scratch;
  if (!task.shared) {
    scratch.tile.resize(kKeys * std::max(p.head_dim, task.padded_dim));
    scratch.bytes.resize(p.head_dim * kKeys);
  }
  for (int64_t i = begin; i < end; ++i) {
    const QueryTile tile(task, i);
    load_queries(tile, scratch);
    score<Arch>(tile, scratch);
    softmax(tile, scratch);
    weigh_values<Arch>(tile, scratch);
    store_outputs(tile, scratch);
  }
}
W2A4_DISPATCH(attend, Task)

}  // namespace

void attention_kv4(const AttentionKV4Params& p) {
  const int64_t pairs = p.batch * p.kv_heads, repeat = p.q_heads / p.kv_heads;
  if (pairs * p.q_tokens * repeat == 0) return;
  Task task{&p,      ceil_div(p.head_dim, kColumns) * kColumns,
            0,       0,
            pairs,   ceil_div(p.length, kKeys),
            nullptr, nullptr};
  const int64_t fitting = kScores / std::max<int64_t>(1, p.length) / repeat;
  task.tokens = std::max<int64_t>(1, std::min({fitting, kMostTokens, p.q_tokens}));
  const int64_t query_tiles = ceil_div(p.q_tokens, task.tokens);
  std::vector<float> shared;
  std::vector<uint8_t> finite;
  if (p.q_tokens >= kSharedTokens && p.length > 0) {
    const int64_t head_floats = task.key_tiles * task.tile_floats();
    task.heads = std::clamp<int64_t>(kSharedFloats / head_floats, 1, pairs);
    shared.resize(task.heads * head_floats);
    finite.resize(task.heads * task.key_tiles);
    task.shared = shared.data();
    task.finite = finite.data();
  }
  for (const int64_t step = task.heads; task.first_head < pairs; task.first_head += step) {
    task.heads = std::min(step, pairs - task.first_head);
    if (task.shared) parallel(task.heads * task.key_tiles, 1, task, load_shared_tiles_dispatch);
    parallel_dynamic(task.heads * query_tiles, task, attend_dispatch);
  }
}

}  // namespace w2a4::cpu
