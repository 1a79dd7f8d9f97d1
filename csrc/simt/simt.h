// Runs the bodies of CUDA kernels on a CPU, for tests. A lane is a fiber: it runs until it meets a
// collective (shuffle, mma, barrier), waits there until every lane of its warp or block has come,
// and goes on with its share of the result. What hardware leaves open is chosen at random: the
// order of blocks and of lanes, and what shared memory holds at first. A copy by cp.async lands
// when it is waited for, and garbage lies there until then.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

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

// Where the lanes of a warp or block meet.
struct Meeting {
  const char* name = nullptr;
  int expected = 0, arrived = 0;
  uint64_t generation = 0;
  std::vector<unsigned char> in, out;  // [lanes, kSlot]
};

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes, from_bytes;  // the rest is zero
};

struct Fiber;

// The running block. One at a time.
class Block {
 public:
  Block(unsigned threads, size_t shared_bytes, std::mt19937& random);
  ~Block();
  void run(const std::function<void()>& kernel);

  // Called by lanes.
  unsigned char* shared() { return shared_.get(); }
  Meeting& warp_meeting();
  Meeting& block_meeting() { return block_; }
  void meet(Meeting& where, const char* name, const void* in, size_t in_bytes,
            void (*compute)(Meeting&), void* out, size_t out_bytes, int index);
  void copy_async(void* to, const void* from, int bytes, int from_bytes);
  void commit_copies();
  void wait_copies(int but_the_last);
  [[noreturn]] void stop(const std::string& why);

 private:
  friend void fiber_main();
  void resume(int fiber);
  void yield();

  std::mt19937& random_;
  std::unique_ptr<unsigned char[]> shared_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Meeting> warps_;
  Meeting block_;
  std::vector<int> ready_;
  int current_ = -1;
  size_t done_ = 0;
  std::string error_;
  const std::function<void()>* kernel_ = nullptr;
};

extern Block* block;
extern Dim3 thread_index, block_index, block_size, grid_size;

// kernel() as every thread of every block would run it.
void launch(Dim3 grid, unsigned threads, size_t shared_bytes, unsigned seed,
            const std::function<void()>& kernel);

inline int lane() {
  return thread_index.x % kLanes;
}

// One exchange among the lanes of a warp: compute(in, out) sees all lanes' operands.
template <class In, class Out, void (*kCompute)(const In* in, Out* out)>
Out warp_collective(const char* name, const In& mine) {
  static_assert(sizeof(In) <= kSlot && sizeof(Out) <= kSlot);
  Out result;
  block->meet(
      block->warp_meeting(), name, &mine, sizeof(In),
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

inline void sync_warp() {
  block->meet(block->warp_meeting(), "sync_warp", nullptr, 0, nullptr, nullptr, 0, lane());
}
inline void sync_block() {
  block->meet(block->block_meeting(), "sync_block", nullptr, 0, nullptr, nullptr, 0,
              static_cast<int>(thread_index.x));
}

}  // namespace w2a4::simt

#define threadIdx ::w2a4::simt::thread_index
#define blockIdx ::w2a4::simt::block_index
#define blockDim ::w2a4::simt::block_size
#define gridDim ::w2a4::simt::grid_size
