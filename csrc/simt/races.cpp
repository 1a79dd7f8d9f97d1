#include "races.h"

#ifdef W2A4_RACES
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <unordered_map>
#include <utility>

#include "simt.h"

#define EXPORT extern "C" __attribute__((visibility("hidden")))

extern "C" const char __ehdr_start, _end;  // of this module, by the linker

namespace w2a4::simt::races {
namespace {

enum Kind { kRead, kWrite, kAtomic, kKinds };

// Who accessed a byte, when, and where in the code: offsets in this module of the instruction and
// of the call that led to its function.
struct Access {
  uint32_t block = 0, thread = 0;  // both from 1 on: 0 is no access
  uint32_t block_barriers = 0, warp_barriers = 0;
  uint32_t code = 0, caller = 0;
  uint32_t cluster = 0, cluster_barriers = 0;

  explicit operator bool() const { return block; }
};

// 0 if barriers put a before b, which comes later here. Else how far apart the two are: lanes of a
// warp, warps, blocks.
int apart(const Access& a, const Access& b) {
  if (a.block != b.block)
    return a.cluster == b.cluster && a.cluster_barriers != b.cluster_barriers ? 0 : 3;
  if (a.thread == b.thread || a.block_barriers != b.block_barriers) return 0;
  if ((a.thread - 1) / kLanes != (b.thread - 1) / kLanes) return 2;
  return a.warp_barriers == b.warp_barriers;
}

// Accesses of one kind that do not conflict with each other. Two are enough: whatever is not
// ordered after one that is left out is not ordered after both of these either.
struct Pair {
  Access of[2];

  void add(const Access& now) {
    for (Access& a : of)
      if (a && !apart(a, now)) a = {};
    if (!of[0]) std::swap(of[0], of[1]);
    if (!of[0] || !of[1]) {
      (of[0] ? of[1] : of[0]) = now;
      return;
    }
    const int first = apart(of[0], now), second = apart(of[1], now);
    const int before = apart(of[0], of[1]);
    if (first > before && first >= second)
      of[1] = now;
    else if (second > before)
      of[0] = now;
  }
  const Access* conflict(const Access& now) const {
    for (const Access& a : of)
      if (a && apart(a, now)) return &a;
    return nullptr;
  }
};

struct Byte {
  Access write, copy;  // copy: under way
  Pair shared[2];      // reads, atomic operations
};

constexpr uintptr_t kPage = 64;
struct Page {
  Byte bytes[kPage];
};

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
Page* last_page;
uintptr_t last_page_at = ~uintptr_t{0};

Lane lane;
bool watching = false;

struct Race {
  Access before, now;
  const char *was, *is;
  bool found = false;
} race;

Byte& byte_at(uintptr_t at) {
  if (at / kPage != last_page_at) {
    auto& page = pages[at / kPage];
    if (!page) page = std::make_unique<Page>();
    last_page = page.get(), last_page_at = at / kPage;
  }
  return last_page->bytes[at % kPage];
}

uint32_t offset_of(const void* code) {
  return static_cast<uint32_t>(static_cast<const char*>(code) - &__ehdr_start);
}

Access access_of(const void* code) {
  return {lane.block + 1,       lane.thread + 1,
          *lane.block_barriers, *lane.warp_barriers,
          offset_of(code),      lane.calls->empty() ? 0 : offset_of(lane.calls->back()),
          lane.cluster,         *lane.cluster_barriers};
}

[[noreturn]] void report(const Access& before, const char* was, const Access& now, const char* is,
                         uintptr_t at) {
  race = {before, now, was, is, true};
  const auto* byte = reinterpret_cast<const unsigned char*>(at);
  const bool shared = block->has_shared(byte);
  char place[64];
  std::snprintf(place, sizeof(place),
                shared ? "byte %zu of shared memory" : "global memory at %#zx",
                static_cast<size_t>(shared ? byte - block->shared() : at));
  block->stop(std::string("race: ") + is + " of " + place + ", which thread " +
              std::to_string(before.thread - 1) + " of block " + std::to_string(before.block - 1) +
              " " + was + " and no barrier ordered");
}

const char* const kWas[kKinds] = {"read", "wrote", "changed atomically"};
const char* const kIs[kKinds] = {"a read", "a write", "an atomic change"};

// Stops the block if something conflicts with an access.
void check(uintptr_t at, const Byte& b, Kind kind, const Access& now, const char* is) {
  if (b.copy) report(b.copy, "copies to by cp.async", now, is, at);
  if (b.write && apart(b.write, now)) report(b.write, kWas[kWrite], now, is, at);
  for (Kind other : {kRead, kAtomic}) {
    if (other == kind) continue;
    if (const Access* a = b.shared[other == kAtomic].conflict(now))
      report(*a, kWas[other], now, is, at);
  }
}

// Stacks are a lane's own; constants and the like of this module are not the kernels' memory.
bool is_watched(const void* p) {
  const auto* byte = static_cast<const unsigned char*>(p);
  return !(byte >= lane.stack && byte < lane.stack + lane.stack_bytes) &&
         !(p >= &__ehdr_start && p < &_end);
}

void note(const void* p, size_t bytes, Kind kind, const void* code) {
  if (!is_watched(p)) return;
  const Access now = access_of(code);
  const auto first = reinterpret_cast<uintptr_t>(p);
  for (uintptr_t at = first; at < first + bytes; ++at) {
    Byte& b = byte_at(at);
    check(at, b, kind, now, kIs[kind]);
    if (kind == kWrite)
      b.write = now;
    else
      b.shared[kind == kAtomic].add(now);
  }
}

// The source's lines of an offset in this module, innermost function first.
std::string lines_of(uint32_t offset) {
  Dl_info module;
  if (!offset || !dladdr(&__ehdr_start, &module)) return {};
  char number[16], line[1024];
  std::snprintf(number, sizeof(number), "%#x", offset - 1);  // of the call, not behind it
  std::string lines;
  const std::string command =
      std::string("addr2line -Cfpsie '") + module.dli_fname + "' " + number + " 2>/dev/null";
  if (FILE* pipe = popen(command.c_str(), "r")) {
    while (std::fgets(line, sizeof(line), pipe))
      if (!std::strstr(line, " invoke.h:") && !std::strstr(line, " std_function.h:"))
        lines += std::string("    ") + line;
    pclose(pipe);
  }
  return lines;
}

}  // namespace

void start_grid() {
  pages.clear();
  last_page_at = ~uintptr_t{0};
  race = {};
}

void resume(const Lane& next) {
  lane = next;
  watching = false;  // it is where it has left, in the emulator
}

Watch::Watch() {
  watching = true;
}
Watch::~Watch() {
  watching = false;
}
Pause::Pause() {
  watching = false;
}
Pause::~Pause() {
  watching = true;
}

void forget(const void* p, size_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(p);
  for (uintptr_t at = first / kPage; at <= (first + bytes) / kPage; ++at) pages.erase(at);
  last_page_at = ~uintptr_t{0};
}

void atomic(const void* p, size_t bytes, const void* code) {
  note(p, bytes, kAtomic, code);
}

void constant(const void* p, size_t bytes) {
  Pause pause;
  const auto first = reinterpret_cast<uintptr_t>(p);
  for (uintptr_t at = first; at < first + bytes; ++at) {
    const Byte& b = byte_at(at);
    const Access& change = b.write ? b.write : b.shared[1].of[0];
    if (!change) continue;
    race = {change, access_of(__builtin_return_address(0)), kWas[kWrite], kIs[kRead], true};
    block->stop("a read through the read-only path of what the same grid wrote");
  }
}

void copy_starts(const void* to, size_t bytes, const void* from, size_t from_bytes,
                 const void* code) {
  note(from, from_bytes, kRead, code);
  note(to, bytes, kWrite, code);
  for (size_t i = 0; i < bytes; ++i)
    byte_at(reinterpret_cast<uintptr_t>(to) + i).copy = access_of(code);
}

void copy_lands(const void* to, size_t bytes, const void* from, size_t from_bytes,
                const void* code) {
  for (size_t i = 0; i < bytes; ++i) byte_at(reinterpret_cast<uintptr_t>(to) + i).copy = {};
  note(from, from_bytes, kRead, code);  // at any time until now
  note(to, bytes, kWrite, code);
}

std::string where_it_was() {
  if (!race.found) return {};
  return std::string("\n  ") + race.is + ":\n" + lines_of(race.now.code) +
         lines_of(race.now.caller) + "  thread " + std::to_string(race.before.thread - 1) + " " +
         race.was + ":\n" + lines_of(race.before.code) + lines_of(race.before.caller);
}

}  // namespace w2a4::simt::races

// ---- what -fsanitize=thread calls

using namespace w2a4::simt;
using races::kRead;
using races::kWrite;

#define CODE __builtin_return_address(0)

EXPORT void __tsan_init() {}
EXPORT void __tsan_func_entry(const void* call) {
  if (races::watching) races::lane.calls->push_back(call);
}
EXPORT void __tsan_func_exit() {
  if (races::watching && !races::lane.calls->empty()) races::lane.calls->pop_back();
}

// kTyped: the type of the access promises that it is aligned.
template <bool kTyped>
static void accessed(const void* p, size_t bytes, races::Kind kind, const void* code) {
  if (!races::watching) return;
  races::Pause pause;
  if (kTyped) check_aligned(p, bytes);
  races::note(p, bytes, kind, code);
}

#define ACCESS(bytes)                                        \
  EXPORT void __tsan_read##bytes(const void* p) {            \
    accessed<true>(p, bytes, kRead, CODE);                   \
  }                                                          \
  EXPORT void __tsan_write##bytes(const void* p) {           \
    accessed<true>(p, bytes, kWrite, CODE);                  \
  }                                                          \
  EXPORT void __tsan_unaligned_read##bytes(const void* p) {  \
    accessed<false>(p, bytes, kRead, CODE);                  \
  }                                                          \
  EXPORT void __tsan_unaligned_write##bytes(const void* p) { \
    accessed<false>(p, bytes, kWrite, CODE);                 \
  }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)

EXPORT void __tsan_read_range(const void* p, size_t bytes) {
  accessed<false>(p, bytes, kRead, CODE);
}
EXPORT void __tsan_write_range(const void* p, size_t bytes) {
  accessed<false>(p, bytes, kWrite, CODE);
}
// Clang has these called for the functions.
EXPORT void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  __tsan_read_range(from, bytes), __tsan_write_range(to, bytes);
  return std::memcpy(to, from, bytes);
}
EXPORT void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  __tsan_read_range(from, bytes), __tsan_write_range(to, bytes);
  return std::memmove(to, from, bytes);
}
EXPORT void* __tsan_memset(void* to, int value, size_t bytes) {
  __tsan_write_range(to, bytes);
  return std::memset(to, value, bytes);
}
EXPORT void __tsan_vptr_update(const void*, const void*) {}
EXPORT void __tsan_vptr_read(const void*) {}

// Of the standard library and the bindings: kernels have simt::atomic_max.
#define ATOMIC(bits)                                                                               \
  EXPORT int##bits##_t __tsan_atomic##bits##_load(const volatile int##bits##_t* p, int) {          \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                   \
  }                                                                                                \
  EXPORT void __tsan_atomic##bits##_store(volatile int##bits##_t* p, int##bits##_t v, int) {       \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                      \
  }                                                                                                \
  EXPORT int##bits##_t __tsan_atomic##bits##_fetch_add(volatile int##bits##_t* p, int##bits##_t v, \
                                                       int) {                                      \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                             \
  }
ATOMIC(8)
ATOMIC(32)
ATOMIC(64)
#endif
