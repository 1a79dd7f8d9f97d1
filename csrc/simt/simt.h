// Runs the bodies of CUDA kernels on a CPU, for tests. A lane is a fiber: it runs until it meets a
// collective (shuffle, mma, barrier), waits there until every lane of its warp or block has come,
// and goes on with its share of the result. What hardware leaves open is chosen at random: the
// order of lanes and of blocks, several of which are under way at once, and what shared memory
// holds at first. Blocks of a cluster are under way together. A copy by cp.async lands when it is
// waited for, and garbage lies there until then. Lanes that meet at different places of the source
// are an error. races.h finds accesses that nothing orders.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "races.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __grid_constant__

namespace w2a4::simt {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

constexpr int kLanes = 32;
constexpr int kSlot = 64;  // bytes of a lane's operands or results in a collective

// Where in the source an instruction of the kernel stands: the default argument of the functions
// that lanes meet in, so it is the line of the call. Helpers that are called from more than one
// place pass theirs on.
struct Site {
  const char* file = nullptr;
  int line = 0;

  bool operator==(const Site& other) const {
    return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
  }
  std::string text() const {  // the file's name alone
    const char* slash = std::strrchr(file, '/');
    return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
  }
};

// Where the lanes of a warp or block meet.
struct Meeting {
  const char* name = nullptr;
  Site site;
  int expected = 0, arrived = 0;
  uint64_t generation = 0;
  uint32_t barriers = 0;               // how many generations ordered the lanes' accesses to memory
  std::vector<unsigned char> in, out;  // [lanes, kSlot]
};

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes, from_bytes;  // the rest is zero
};

struct Fiber;
class Block;

// Blocks that reach each other's shared memory and meet at barriers.
struct Cluster {
  std::vector<Block*> blocks;  // null where one has ended
  Meeting meeting;
};

// A block of a running grid.
class Block {
 public:
  Block(Dim3 index, unsigned threads, size_t shared_bytes, std::mt19937& random,
        const std::function<void()>& kernel, std::shared_ptr<Cluster> cluster);
  ~Block();
  // Lets one lane run until it waits. False if there is none to run; error() says whether the block
  // has ended well.
  bool step();
  const std::string& error() const { return error_; }

  // Called by lanes.
  unsigned char* shared() { return shared_.get(); }
  bool has_shared(const unsigned char* p) const {
    return p >= shared_.get() && p < shared_.get() + shared_bytes_;
  }
  Meeting& warp_meeting();
  Meeting& block_meeting() { return block_; }
  unsigned cluster_rank() const { return rank_; }
  void meet_cluster(Site site);
  // Where `p` of this block's shared memory lies in that of another block of the cluster.
  void* in_peer(void* p, unsigned rank);
  Fiber& running() { return *fibers_[current_]; }
  // A meeting without `compute` is a barrier.
  void meet(Meeting& where, const char* name, Site site, const void* in, size_t in_bytes,
            void (*compute)(Meeting&), void* out, size_t out_bytes, int index);
  void copy_async(void* to, const void* from, int bytes, int from_bytes);
  void commit_copies();
  void wait_copies(int but_the_last, Site site);
  [[noreturn]] void stop(const std::string& why);

 private:
  friend void fiber_main();
  void resume(int fiber);
  void yield();
  uint32_t grid_place() const;  // of this block

  const Dim3 index_;
  std::mt19937& random_;
  std::unique_ptr<unsigned char[]> shared_;
  size_t shared_bytes_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Meeting> warps_;
  Meeting block_;
  std::vector<int> ready_;
  int current_ = -1;
  size_t done_ = 0;
  std::string error_;
  const std::function<void()>& kernel_;
  const std::shared_ptr<Cluster> cluster_;
  const unsigned rank_;  // in the cluster
};

extern Block* block;  // that runs now
extern Dim3 thread_index, block_index, block_size, grid_size;

// Barriers of the block or warp that lanes have met at, and waits for copies, "file:line"; and the
// one that is left out, for tests that prove that it is missed.
extern std::set<std::string> barriers_met;
extern std::string left_out;

// kernel() as every thread of every block would run it, blocks in clusters of so many along x.
// Throws what went wrong.
void launch(Dim3 grid, unsigned threads, size_t shared_bytes, unsigned seed,
            const std::function<void()>& kernel, unsigned cluster = 1);

inline int lane() {
  return thread_index.x % kLanes;
}

// One exchange among the lanes of a warp: compute(in, out) sees all lanes' operands.
template <class In, class Out, void (*kCompute)(const In* in, Out* out)>
Out warp_collective(const char* name, Site site, const In& mine) {
  static_assert(sizeof(In) <= kSlot && sizeof(Out) <= kSlot);
  Out result;
  block->meet(
      block->warp_meeting(), name, site, &mine, sizeof(In),
      [](Meeting& m) {
        In in[kLanes];
        Out out[kLanes];
        for (int i = 0; i < kLanes; ++i) std::memcpy(&in[i], &m.in[i * kSlot], sizeof(In));
        kCompute(in, out);
        for (int i = 0; i < kLanes; ++i) std::memcpy(&m.out[i * kSlot], &out[i], sizeof(Out));
      },
      &result, sizeof(Out), lane());
  return result;
}

void sync_warp(Site site);
void sync_block(Site site);
void sync_cluster(Site site);

// *p = max(*p, value), which other lanes may do at once.
void atomic_max(uint32_t* p, uint32_t value);

// What an access of so many bytes needs; hardware stops the kernel.
[[noreturn]] void stop_misaligned(size_t bytes);
inline void check_aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) stop_misaligned(bytes);
}
template <class T>
T load(const void* p) {
  check_aligned(p, sizeof(T));
  T x;
  std::memcpy(&x, p, sizeof(T));
  return x;
}
template <class T>
T load_constant(const void* p) {
  races::constant(p, sizeof(T));
  return load<T>(p);
}
template <class T>
void store(void* p, const T& x) {
  check_aligned(p, sizeof(T));
  std::memcpy(p, &x, sizeof(T));
}

}  // namespace w2a4::simt

#define threadIdx ::w2a4::simt::thread_index
#define blockIdx ::w2a4::simt::block_index
#define blockDim ::w2a4::simt::block_size
#define gridDim ::w2a4::simt::grid_size

// The last parameter, or the only one, of functions that lanes meet in; and how one passes it on.
#define W2A4_SITE_ONLY ::w2a4::simt::Site site = {__builtin_FILE(), __builtin_LINE()}
#define W2A4_SITE , W2A4_SITE_ONLY
#define W2A4_SAME_SITE , site
