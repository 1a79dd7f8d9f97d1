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

namespace {

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
  (*block->kernel_)();
  Fiber& self = *block->fibers_[block->current_];
  for (const auto& group : self.copies)
    if (!group.empty())
      block->stop("a lane ended with copies by cp.async that it never waited for");
  ++block->done_;
#ifdef W2A4_ASAN
  __sanitizer_start_switch_fiber(nullptr, scheduler_stack, scheduler_stack_size);
#endif
  switch_context(self.context, scheduler);
}

Block::Block(unsigned threads, size_t shared_bytes, std::mt19937& random)
    : random_(random),
      shared_(new unsigned char[shared_bytes]),
      warps_((threads + kLanes - 1) / kLanes) {
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

Block::~Block() = default;

void Block::run(const std::function<void()>& kernel) {
  block = this;
  kernel_ = &kernel;
  while (error_.empty() && !ready_.empty()) {
    std::swap(ready_[random_() % ready_.size()], ready_.back());
    const int next = ready_.back();
    ready_.pop_back();
    resume(next);
  }
  block = nullptr;
  if (error_.empty() && done_ < fibers_.size()) {
    error_ = "lanes wait for others that have ended, at";
    for (const Meeting& m : warps_)
      if (m.arrived) error_ += std::string(" ") + m.name;
    if (block_.arrived) error_ += std::string(" ") + block_.name;
  }
  if (!error_.empty()) throw std::runtime_error("simt: " + error_);
}

void Block::resume(int fiber) {
  current_ = fiber;
  thread_index.x = static_cast<unsigned>(fiber);
  Fiber& f = *fibers_[fiber];
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
  Fiber& f = *fibers_[current_];
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
           std::to_string(block_index.x);
  yield();
  __builtin_unreachable();  // the scheduler does not resume it
}

Meeting& Block::warp_meeting() {
  return warps_[thread_index.x / kLanes];
}

void Block::meet(Meeting& where, const char* name, const void* in, size_t in_bytes,
                 void (*compute)(Meeting&), void* out, size_t out_bytes, int index) {
  if (where.arrived && std::strcmp(where.name, name) != 0)
    stop(std::string("lanes of one warp meet at ") + where.name + " and " + name);
  where.name = name;
  if (in_bytes) std::memcpy(&where.in[index * kSlot], in, in_bytes);
  const uint64_t generation = where.generation;
  if (++where.arrived == where.expected) {
    if (compute) compute(where);
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

void Block::copy_async(void* to, const void* from, int bytes, int from_bytes) {
  auto address = reinterpret_cast<uintptr_t>(to);
  if (address % bytes || (from_bytes && reinterpret_cast<uintptr_t>(from) % bytes))
    stop("cp.async of " + std::to_string(bytes) + " bytes that are not aligned");
  for (int i = 0; i < bytes; ++i)
    static_cast<unsigned char*>(to)[i] = static_cast<unsigned char>(random_());
  fibers_[current_]->copies.back().push_back({static_cast<unsigned char*>(to),
                                              static_cast<const unsigned char*>(from), bytes,
                                              from_bytes});
}

void Block::commit_copies() {
  fibers_[current_]->copies.emplace_back();
}

void Block::wait_copies(int but_the_last) {
  auto& groups = fibers_[current_]->copies;
  while (static_cast<int>(groups.size()) - 1 > but_the_last) {
    for (const Copy& c : groups.front()) {
      std::memset(c.to, 0, c.bytes);
      if (c.from_bytes) std::memcpy(c.to, c.from, c.from_bytes);
    }
    groups.erase(groups.begin());
  }
}

void launch(Dim3 grid, unsigned threads, size_t shared_bytes, unsigned seed,
            const std::function<void()>& kernel) {
  std::mt19937 random(seed);
  std::vector<unsigned> order(size_t{grid.x} * grid.y * grid.z);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<unsigned>(i);
  std::shuffle(order.begin(), order.end(), random);
  grid_size = grid;
  block_size = {threads, 1, 1};
  for (unsigned i : order) {
    block_index = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    Block(threads, shared_bytes, random).run(kernel);
  }
}

}  // namespace w2a4::simt
