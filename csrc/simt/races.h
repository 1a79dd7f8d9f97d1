// Finds accesses to memory that nothing orders, in the kernels that simt.h runs: a race on
// hardware, whatever came out here. Where W2A4_RACES is defined the bodies are compiled with
// -fsanitize=thread, whose calls races.cpp answers in place of that sanitizer's runtime, which
// knows threads, not lanes.
//
// Lanes of a warp are ordered by sync_warp, those of a block by sync_block, those of a cluster by
// sync_cluster, and other blocks by nothing.
// Shuffles, votes and mma do not order memory: the PTX ISA promises it of barriers alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace w2a4::simt::races {

using Calls = std::vector<const void*>;  // return addresses of a lane's functions

// A lane that is let run. Every barrier is of a whole warp, block or cluster, so of its vector
// clock only three numbers differ from those of others: how many barriers its cluster, its block
// (those of the cluster among them) and its warp have met at.
struct Lane {
  const unsigned char* stack;
  size_t stack_bytes;
  uint32_t block, thread;
  const uint32_t *block_barriers, *warp_barriers;
  Calls* calls;
  uint32_t cluster;
  const uint32_t* cluster_barriers;
};

#ifdef W2A4_RACES
void start_grid();
void resume(const Lane& lane);
void forget(const void* p, size_t bytes);
void atomic(const void* p, size_t bytes, const void* code);
// A read through the read-only path, of what must not change while the grid runs.
void constant(const void* p, size_t bytes);
// Between these two nobody may access `to`; the copy is the lane's at the second.
void copy_starts(const void* to, size_t bytes, const void* from, size_t from_bytes,
                 const void* code);
void copy_lands(const void* to, size_t bytes, const void* from, size_t from_bytes,
                const void* code);
std::string where_it_was();  // the lines of the race that was found, if one was

// While one lives what the lane does is watched: it runs the kernel; or is not: it is in the
// emulator, whose own memory is no part of the kernel.
struct Watch {
  Watch();
  ~Watch();
};
struct Pause {
  Pause();
  ~Pause();
};
#else
inline void start_grid() {}
inline void resume(const Lane&) {}
inline void forget(const void*, size_t) {}
inline void atomic(const void*, size_t, const void*) {}
inline void constant(const void*, size_t) {}
inline void copy_starts(const void*, size_t, const void*, size_t, const void*) {}
inline void copy_lands(const void*, size_t, const void*, size_t, const void*) {}
inline std::string where_it_was() {
  return {};
}

struct Watch {
  Watch() {}
  ~Watch() {}
};
struct Pause {
  Pause() {}
  ~Pause() {}
};
#endif

}  // namespace w2a4::simt::races
