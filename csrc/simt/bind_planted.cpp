// Small kernels in the manner of cuda/, with and without a mistake each, for tests of the emulator
// itself: what it has to find, and what it must not complain of.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>
#include <vector>

#include "../cuda/ptx_mma.cuh"
#include "../cuda/quantizer.cuh"
#include "bind.h"

using namespace w2a4;
using namespace w2a4::cuda;

namespace {

unsigned neighbour() {
  return threadIdx.x ^ 1;
}
uint32_t* words() {
  return reinterpret_cast<uint32_t*>(shared_memory());
}

struct Planted {
  const char* name;
  std::function<void(bool right, unsigned char* room)> body;  // room: 4 KB of global memory
};

// Each with what orders it, if `right`, and without.
const Planted kPlanted[] = {
    {"lanes of a warp",
     [](bool right, unsigned char*) {
       words()[threadIdx.x] = 1;
       if (right) sync_warp();
       words()[1024 + threadIdx.x] = words()[neighbour()];
     }},
    {"shuffles do not order",
     [](bool right, unsigned char*) {
       words()[threadIdx.x] = shfl_xor(threadIdx.x, 1);
       warp_max(1);
       if (right) sync_warp();
       words()[1024 + threadIdx.x] = words()[neighbour()];
     }},
    {"warps of a block",
     [](bool right, unsigned char*) {
       words()[threadIdx.x] = 1;
       right ? sync_block() : sync_warp();
       words()[1024 + threadIdx.x] = words()[threadIdx.x ^ 32];
     }},
    {"a write after reads of two warps",
     [](bool right, unsigned char*) {
       if (threadIdx.x == 0) words()[0] = 1;
       sync_block();
       const uint32_t seen = words()[0];
       if (right) sync_block();
       if (threadIdx.x == 33) words()[0] = seen + 1;
     }},
    {"a byte next to others",
     [](bool right, unsigned char*) {
       shared_memory()[right ? threadIdx.x : threadIdx.x / 2] = 1;
     }},
    {"atomic and plain",
     [](bool right, unsigned char*) {
       if (threadIdx.x == 0) words()[0] = 0;
       sync_block();
       atomic_max(words(), threadIdx.x);
       if (right) sync_block();
       if (threadIdx.x == 5) words()[1] = words()[0];
     }},
    {"a copy that is not waited for",
     [](bool right, unsigned char* room) {
       cp_async_8(words() + 2 * threadIdx.x, room);
       cp_async_commit();
       if (right) cp_async_wait<0>();
       words()[1024 + threadIdx.x] = words()[2 * threadIdx.x];
       cp_async_wait<0>();
     }},
    {"a copy that only its own lane waited for",
     [](bool right, unsigned char* room) {
       cp_async_16(words() + 4 * threadIdx.x, room, 16);
       cp_async_commit();
       if (!right) sync_warp();
       cp_async_wait<0>();
       if (right) sync_warp();
       words()[2048 + threadIdx.x] = words()[4 * neighbour()];
     }},
    {"a copy over what is still read",
     [](bool right, unsigned char* room) {
       words()[4 * threadIdx.x] = 1;
       sync_warp();
       const uint32_t seen = words()[4 * neighbour()];
       if (right) sync_warp();
       cp_async_16(words() + 4 * threadIdx.x, room, 16);
       cp_async_commit();
       cp_async_wait<0>();
       words()[2048 + threadIdx.x] = seen;
     }},
    {"ldmatrix reads for other lanes",
     [](bool right, unsigned char*) {
       store_u32x4(words() + 4 * threadIdx.x, {1, 2, 3, 4});
       if (right) sync_warp();
       uint32_t w[4];
       ldmatrix_x4(w, shared_memory() + 16 * threadIdx.x);
     }},
    {"blocks write one place",
     [](bool right, unsigned char* room) {
       if (threadIdx.x == 0) room[right ? blockIdx.x : 0] = 1;
     }},
    {"blocks do not order",
     [](bool right, unsigned char* room) {
       auto* flag = reinterpret_cast<uint32_t*>(room);
       if (threadIdx.x || blockIdx.x > 1) return;
       if (blockIdx.x == 0 || right)
         atomic_max(flag, blockIdx.x);
       else
         *flag = 1;
     }},
    {"the read-only path to what the grid wrote",
     [](bool right, unsigned char* room) {
       auto* mine = reinterpret_cast<uint32_t*>(room) + 64 * blockIdx.x + threadIdx.x;
       store_u32(mine, 1);
       right ? read_u32(mine) : load_u32(mine);
     }},
    {"a typed access off its alignment",
     [](bool right, unsigned char*) {
       auto* p = reinterpret_cast<uint32_t*>(shared_memory() + 4 * threadIdx.x + (right ? 0 : 2));
       *p = 1;
     }},
    {"the same shuffle",
     [](bool right, unsigned char*) {
       if (right || threadIdx.x % 32 < 16)
         shfl_xor(1u, 1);
       else
         shfl_xor(1u, 1);
     }},
    {"a helper called from two places",
     [](bool right, unsigned char*) {
       if (right || threadIdx.x % 32 < 16)
         warp_sum(1.0f);
       else
         warp_sum(1.0f);
     }},
    {"the same barrier",
     [](bool right, unsigned char*) {
       if (right || threadIdx.x < 32)
         sync_block();
       else
         sync_block();
     }},
};

void planted(const std::string& name, bool right, unsigned seed) {
  std::vector<unsigned char> memory(4096 + 16);
  auto* room = memory.data() + (-reinterpret_cast<uintptr_t>(memory.data()) & 15);
  for (const Planted& one : kPlanted)
    if (name == one.name) return simt::launch({3}, 64, 16384, seed, [&] { one.body(right, room); });
  throw std::runtime_error("no such kernel: " + name);
}

// One access by every twin of an instruction that needs an alignment, and what that is. `p` is off
// it or not, `even` never is.
struct AlignedAccess {
  const char* name;
  int bytes;  // for the tests, which read this file
  void (*body)(unsigned char* p, unsigned char* even);
};

const AlignedAccess kAccesses[] = {
    {"load_u16", 2, [](auto* p, auto*) { load_u16(p); }},
    {"load_u32", 4, [](auto* p, auto*) { load_u32(p); }},
    {"load_u32x2", 8, [](auto* p, auto*) { load_u32x2(p); }},
    {"load_u32x4", 16, [](auto* p, auto*) { load_u32x4(p); }},
    {"read_u32", 4, [](auto* p, auto*) { read_u32(p); }},
    {"read_u32x2", 8, [](auto* p, auto*) { read_u32x2(p); }},
    {"read_u32x4", 16, [](auto* p, auto*) { read_u32x4(p); }},
    {"store_u32", 4, [](auto* p, auto*) { store_u32(p, 1); }},
    {"store_u32x2", 8, [](auto* p, auto*) { store_u32x2(p, {1, 2}); }},
    {"store_u32x4", 16, [](auto* p, auto*) { store_u32x4(p, {1, 2, 3, 4}); }},
    {"atomic_max", 4, [](auto* p, auto*) { atomic_max(reinterpret_cast<uint32_t*>(p), 1); }},
    {"store_peer_u32", 4, [](auto* p, auto*) { store_peer_u32(p, 0, 1); }},
    {"store_peer_u32x4", 16, [](auto* p, auto*) { store_peer_u32x4(p, 0, {1, 2, 3, 4}); }},
    {"cp_async_4", 4, [](auto* p, auto* even) { cp_async_4(p, even, 4); }},
    {"cp_async_4's source", 4, [](auto* p, auto* even) { cp_async_4(even, p, 4); }},
    {"cp_async_8", 8, [](auto* p, auto* even) { cp_async_8(p, even); }},
    {"cp_async_8's source", 8, [](auto* p, auto* even) { cp_async_8(even, p); }},
    {"cp_async_16", 16, [](auto* p, auto* even) { cp_async_16(p, even, 16); }},
    {"cp_async_16's source", 16, [](auto* p, auto* even) { cp_async_16(even, p, 16); }},
    {"ldmatrix_x4", 16,
     [](auto* p, auto*) {
       uint32_t w[4];
       ldmatrix_x4(w, p);
     }},
    {"ldmatrix_x4_trans", 16,
     [](auto* p, auto*) {
       uint32_t w[4];
       ldmatrix_x4_trans(w, p);
     }},
};

void aligned_access(const std::string& name, int offset) {
  alignas(16) static unsigned char even[16];
  for (const AlignedAccess& one : kAccesses)
    if (name == one.name)
      return simt::launch({1}, 32, 64, 0, [&] {
        one.body(shared_memory() + offset, even);
        cp_async_commit();
        cp_async_wait<0>();
      });
  throw std::runtime_error("no such access: " + name);
}

// The blocks of a grid in the order in which they take steps, three each.
std::vector<unsigned> steps_of_blocks(unsigned seed) {
  std::vector<unsigned> order;
  simt::launch({6}, 32, 0, seed, [&] {
    for (int step = 0; step < 3; ++step) {
      if (threadIdx.x == 0) order.push_back(blockIdx.x);
      sync_block();
    }
  });
  return order;
}

}  // namespace

void bind_planted(pybind11::module_& m) {
  m.def("planted", &planted);
  m.def("aligned_access", &aligned_access);
  m.def("steps_of_blocks", &steps_of_blocks);
  m.def("take_barriers_met", [] { return std::exchange(simt::barriers_met, {}); });
  m.def("leave_out", [](const std::string& site) { simt::left_out = site; });
}
