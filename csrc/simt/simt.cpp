#include "simt.h"

#include <algorithm>

#if defined(__SANITIZE_ADDRESS__)
#define W2A4_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define W2A4_ASAN
#endif
#endif
#ifdef W2A4_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace w2a4::simt {

Block* block = nullptr;
Dim3 thread_index, block_index, block_size, grid_size;
std::set<std::string> barriers_met;
std::string left_out;

namespace {

constexpr size_t kMostBlocks = 4;  // that are under way at once

constexpr size_t kStack = 128 << 10;  // bytes a fiber

#ifdef __x86_64__
// Saves the callee-saved registers on the stack that is left, takes those of the other.
using Context = void*;
extern "C" void w2a4_simt_switch(Context* from, Context to);
asm(R"(
.text
.globl w2a4_simt_switch
.hidden w2a4_simt_switch
.type w2a4_simt_switch, @function
w2a4_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size w2a4_simt_switch, .-w2a4_simt_switch
)");

void prepare(Context& context, unsigned char* stack, void (*entry)()) {
  auto top = reinterpret_cast<uintptr_t>(stack + kStack) & ~uintptr_t{15};
  auto* frame = reinterpret_cast<void**>(top) - 8;  // six registers, entry, a word of alignment
  std::fill_n(frame, 8, nullptr);
  frame[6] = reinterpret_cast<void*>(entry);
  context = frame;
}
void switch_context(Context& from, Context& to) {
  w2a4_simt_switch(&from, to);
}
#else
using Context = ucontext_t;
void prepare(Context& context, unsigned char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
void switch_context(Context& from, Context& to) {
  swapcontext(&from, &to);
}
#endif

Context scheduler;
#ifdef W2A4_ASAN
const void* scheduler_stack;
size_t scheduler_stack_size;
#endif

// Stacks are kept for the next block.
std::vector<std::unique_ptr<unsigned char[]>> spare_stacks;

}  // namespace

struct Fiber {
  Context context;
  std::unique_ptr<unsigned char[]> stack;
  std::vector<std::vector<Copy>> copies{1};  // committed groups, then the open one
  void* fake_stack = nullptr;
  races::Calls calls;

  explicit Fiber(void (*entry)()) {
    if (spare_stacks.empty()) {
      stack.reset(new unsigned char[kStack]);
    } else {
      stack = std::move(spare_stacks.back());
      spare_stacks.pop_back();
    }
    prepare(context, stack.get(), entry);
  }
  ~Fiber() {
#ifdef W2A4_ASAN
    __asan_unpoison_memory_region(stack.get(), kStack);  // a stopped fiber left its frames there
#endif
    spare_stacks.push_back(std::move(stack));
  }
};

void fiber_main() {
#ifdef W2A4_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  {
    races::Watch kernel;
    block->kernel_();
  }
  Fiber& self = block->running();
  for (const auto& group : self.copies)
    if (!group.empty())
      block->stop("a lane ended with copies by cp.async that it never waited for");
  ++block->done_;
#ifdef W2A4_ASAN
  __sanitizer_start_switch_fiber(nullptr, scheduler_stack, scheduler_stack_size);
#endif
  switch_context(self.context, scheduler);
}

Block::Block(Dim3 index, unsigned threads, size_t shared_bytes, std::mt19937& random,
             const std::function<void()>& kernel, std::shared_ptr<Cluster> cluster)
    : index_(index),
      random_(random),
      shared_(new unsigned char[shared_bytes]),
      shared_bytes_(shared_bytes),
      warps_((threads + kLanes - 1) / kLanes),
      kernel_(kernel),
      cluster_(std::move(cluster)),
      rank_(static_cast<unsigned>(cluster_->blocks.size())) {
  cluster_->blocks.push_back(this);
  cluster_->meeting.expected += static_cast<int>(threads);
  for (size_t i = 0; i < shared_bytes; ++i) shared_[i] = static_cast<unsigned char>(random_());
  if (threads % kLanes) throw std::runtime_error("simt: threads must be a multiple of 32");
  for (Meeting& warp : warps_) warp.expected = kLanes;
  for (Meeting& warp : warps_) warp.in.resize(kLanes * kSlot), warp.out.resize(kLanes * kSlot);
  block_.expected = static_cast<int>(threads);
  for (unsigned i = 0; i < threads; ++i) {
    fibers_.push_back(std::make_unique<Fiber>(fiber_main));
    ready_.push_back(static_cast<int>(i));
  }
}

Block::~Block() {
  cluster_->blocks[rank_] = nullptr;
  races::forget(shared_.get(), shared_bytes_);  // other memory may lie there next
}

bool Block::step() {
  if (error_.empty() && !ready_.empty()) {
    std::swap(ready_[random_() % ready_.size()], ready_.back());
    const int next = ready_.back();
    ready_.pop_back();
    block = this;
    block_index = index_;
    resume(next);
    block = nullptr;
    return true;
  }
  if (error_.empty() && done_ < fibers_.size()) {
    for (const Block* mate : cluster_->blocks)
      if (cluster_->meeting.arrived && mate && !mate->ready_.empty()) return true;
    error_ = "lanes wait for others that have ended, at";
    for (const Meeting& m : warps_)
      if (m.arrived) error_ += std::string(" ") + m.name + " (" + m.site.text() + ")";
    for (const Meeting* m : {&block_, &cluster_->meeting})
      if (m->arrived) error_ += std::string(" ") + m->name + " (" + m->site.text() + ")";
  }
  return false;
}

void Block::resume(int fiber) {
  current_ = fiber;
  thread_index.x = static_cast<unsigned>(fiber);
  Fiber& f = *fibers_[fiber];
  races::resume({f.stack.get(), kStack, grid_place(), thread_index.x, &block_.barriers,
                 &warp_meeting().barriers, &f.calls,
                 grid_place() / static_cast<uint32_t>(cluster_->blocks.size()),
                 &cluster_->meeting.barriers});
#ifdef W2A4_ASAN
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, f.stack.get(), kStack);
#endif
  switch_context(scheduler, f.context);
#ifdef W2A4_ASAN
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void Block::yield() {
  Fiber& f = running();
#ifdef W2A4_ASAN
  __sanitizer_start_switch_fiber(&f.fake_stack, scheduler_stack, scheduler_stack_size);
#endif
  switch_context(f.context, scheduler);
#ifdef W2A4_ASAN
  __sanitizer_finish_switch_fiber(f.fake_stack, &scheduler_stack, &scheduler_stack_size);
#endif
}

void Block::stop(const std::string& why) {
  error_ = why + ", thread " + std::to_string(thread_index.x) + " of block " +
           std::to_string(grid_place());
  yield();
  __builtin_unreachable();  // the scheduler does not resume it
}

uint32_t Block::grid_place() const {
  return index_.x + grid_size.x * (index_.y + grid_size.y * index_.z);
}

Meeting& Block::warp_meeting() {
  return warps_[thread_index.x / kLanes];
}

void Block::meet(Meeting& where, const char* name, Site site, const void* in, size_t in_bytes,
                 void (*compute)(Meeting&), void* out, size_t out_bytes, int index) {
  races::Pause pause;
  if (where.arrived && !(std::strcmp(where.name, name) == 0 && where.site == site))
    stop(std::string("lanes of one ") + (&where == &block_ ? "block" : "warp") + " meet at " +
         where.name + " (" + where.site.text() + ") and " + name + " (" + site.text() + ")");
  where.name = name;
  where.site = site;
  if (in_bytes) std::memcpy(&where.in[index * kSlot], in, in_bytes);
  const uint64_t generation = where.generation;
  if (++where.arrived == where.expected) {
    if (compute)
      compute(where);
    else
      ++where.barriers, barriers_met.insert(site.text());
    where.arrived = 0;
    ++where.generation;
    const int first = &where == &block_ ? 0 : static_cast<int>(&where - warps_.data()) * kLanes;
    for (int i = first; i < first + where.expected; ++i)
      if (i != current_) ready_.push_back(i);
    ready_.push_back(current_);
    yield();
  } else {
    while (where.generation == generation) yield();
  }
  if (out_bytes) std::memcpy(out, &where.out[index * kSlot], out_bytes);
}

void Block::meet_cluster(Site site) {
  races::Pause pause;
  Meeting& where = cluster_->meeting;
  if (where.arrived && !(where.site == site))
    stop("lanes of one cluster meet at sync_cluster (" + where.site.text() + ") and (" +
         site.text() + ")");
  where.name = "sync_cluster";
  where.site = site;
  const uint64_t generation = where.generation;
  if (++where.arrived < where.expected) {
    while (where.generation == generation) yield();
    return;
  }
  ++where.barriers, barriers_met.insert(site.text());
  where.arrived = 0;
  ++where.generation;
  for (Block* mate : cluster_->blocks) {
    if (!mate) stop("a cluster meets when a block of it has ended");
    ++mate->block_.barriers;
    for (size_t i = 0; i < mate->fibers_.size(); ++i) mate->ready_.push_back(static_cast<int>(i));
  }
  yield();
}

void* Block::in_peer(void* p, unsigned rank) {
  races::Pause pause;
  auto* byte = static_cast<unsigned char*>(p);
  if (rank >= cluster_->blocks.size() || !has_shared(byte))
    stop("an address in a block that the cluster does not have, or not of shared memory");
  if (!cluster_->blocks[rank] || (cluster_->blocks.size() > 1 && !cluster_->meeting.barriers))
    stop("race: shared memory of a block that may not have begun, or has ended");
  return cluster_->blocks[rank]->shared_.get() + (byte - shared_.get());
}

void Block::copy_async(void* to, const void* from, int bytes, int from_bytes) {
  races::Pause pause;
  auto address = reinterpret_cast<uintptr_t>(to);
  if (address % bytes || (from_bytes && reinterpret_cast<uintptr_t>(from) % bytes))
    stop("cp.async of " + std::to_string(bytes) + " bytes that are not aligned");
  races::copy_starts(to, bytes, from, from_bytes, __builtin_return_address(0));
  for (int i = 0; i < bytes; ++i)
    static_cast<unsigned char*>(to)[i] = static_cast<unsigned char>(random_());
  running().copies.back().push_back({static_cast<unsigned char*>(to),
                                     static_cast<const unsigned char*>(from), bytes, from_bytes});
}

void Block::commit_copies() {
  races::Pause pause;
  running().copies.emplace_back();
}

static bool is_left_out(Site site) {
  races::Pause pause;
  return !left_out.empty() && site.text() == left_out;
}

void Block::wait_copies(int but_the_last, Site site) {
  if (is_left_out(site)) return;
  races::Pause pause;
  barriers_met.insert(site.text());
  auto& groups = running().copies;
  while (static_cast<int>(groups.size()) - 1 > but_the_last) {
    for (const Copy& c : groups.front()) {
      races::copy_lands(c.to, c.bytes, c.from, c.from_bytes, __builtin_return_address(0));
      std::memset(c.to, 0, c.bytes);
      if (c.from_bytes) std::memcpy(c.to, c.from, c.from_bytes);
    }
    groups.erase(groups.begin());
  }
}

void stop_misaligned(size_t bytes) {
  races::Pause pause;
  block->stop("an access of " + std::to_string(bytes) + " bytes that is not aligned");
}

void sync_warp(Site site) {
  if (is_left_out(site)) return;
  block->meet(block->warp_meeting(), "sync_warp", site, nullptr, 0, nullptr, nullptr, 0, lane());
}

void sync_block(Site site) {
  if (is_left_out(site)) return;
  block->meet(block->block_meeting(), "sync_block", site, nullptr, 0, nullptr, nullptr, 0,
              static_cast<int>(thread_index.x));
}

void sync_cluster(Site site) {
  if (!is_left_out(site)) block->meet_cluster(site);
}

void atomic_max(uint32_t* p, uint32_t value) {
  races::Pause pause;
  check_aligned(p, sizeof(*p));
  races::atomic(p, sizeof(*p), __builtin_return_address(0));
  if (value > *p) *p = value;
}

void launch(Dim3 grid, unsigned threads, size_t shared_bytes, unsigned seed,
            const std::function<void()>& kernel, unsigned cluster) {
  if (grid.x % cluster) throw std::runtime_error("simt: a grid is made of whole clusters");
  std::mt19937 random(seed);
  std::vector<unsigned> order(size_t{grid.x} * grid.y * grid.z / cluster);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<unsigned>(i);
  std::shuffle(order.begin(), order.end(), random);
  grid_size = grid;
  block_size = {threads, 1, 1};
  races::start_grid();
  const size_t together = 1 + random() % kMostBlocks;
  std::vector<std::unique_ptr<Block>> blocks;  // that are under way
  for (size_t next = 0; next < order.size() || !blocks.empty();) {
    if (blocks.size() < together && next < order.size()) {
      const auto mates = std::make_shared<Cluster>();
      const unsigned first = order[next++] * cluster;
      for (unsigned i = first; i < first + cluster; ++i) {
        const Dim3 index{i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
        blocks.push_back(
            std::make_unique<Block>(index, threads, shared_bytes, random, kernel, mates));
      }
    }
    auto& one = blocks[random() % blocks.size()];
    if (one->step()) continue;
    if (!one->error().empty())
      throw std::runtime_error("simt: " + one->error() + races::where_it_was());
    std::swap(one, blocks.back());
    blocks.pop_back();
  }
}

}  // namespace w2a4::simt
