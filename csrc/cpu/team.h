// Threads that stay together for a whole op. To wake torch's threads, and to wait for the last of
// them, takes some microseconds each time, as long as a product of a small model's decoding; an op
// of many such products wakes them once. One of them, the leader, runs the op; whatever it gives to
// `parallel` (arch.h) the others find without being woken, as they look for it all the time.
//
//     Team::run([&] { ... });   // on the calling thread, which becomes the leader
//
// Work is taken piece by piece, so that nobody waits for a thread that the system has put aside
// unless that has begun a piece. Where other processes keep the processors busy this happens all
// the time, and lasts as long as a step of decoding. So a leader that had to wait works alone for a
// while, ever longer as long as each new try ends so.
#pragma once

#include <sched.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <limits>

namespace w2a4::cpu {

class Team {
 public:
  // The team that the calling thread leads, or null.
  static Team* led() { return led_; }

  // `most`: threads that there is work for.
  template <class Body>
  static void run(const Body& body, int64_t most = std::numeric_limits<int64_t>::max()) {
    if (led_) return body();
    const int64_t threads = std::min<int64_t>(most, torch::stable::get_num_threads());
    const int64_t begun = now();
    Team team(threads);
    if (threads == 1 || begun < crowded().until.load(std::memory_order_relaxed)) {
      team.threads_ = 1;
      led_ = &team;
      const Leave leave;
      return body();
    }
    std::exception_ptr error;
    // Piece 0 is the calling thread's. Pieces that begin when it is done have nothing to do.
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
      if (begin > 0) return team.follow();
      led_ = &team;
      try {
        const Leave leave;
        body();
      } catch (...) {
        error = std::current_exception();
      }
      team.ended_.store(true, std::memory_order_release);
    });
    if (error) std::rethrow_exception(error);
    crowded().note(team.waited_, now());
  }

  // task(p, begin, end) over [0, count), by `grain` at least. Returns when all of it is done.
  template <class Params>
  void share(int64_t count, int64_t grain, const Params& p,
             void (*task)(const Params&, int64_t, int64_t)) {
    share_by(std::max(grain, ceil_div(count, kPieces * threads_)), count, p, task);
  }

  // task(p, i, i + 1) for i in [0, count).
  template <class Params>
  void share_singly(int64_t count, const Params& p, void (*task)(const Params&, int64_t, int64_t)) {
    share_by(1, count, p, task);
  }

 private:
  template <class Params>
  void share_by(int64_t size, int64_t count, const Params& p,
                void (*task)(const Params&, int64_t, int64_t)) {
    if (size >= count || threads_ == 1) return task(p, 0, count);
    using Task = decltype(task);
    const auto run = [](const void* p, void (*task)(), int64_t begin, int64_t end) {
      reinterpret_cast<Task>(task)(*static_cast<const Params*>(p), begin, end);
    };
    // From here on nobody takes a piece, so that nobody reads what follows.
    const int64_t first = (next_.load(std::memory_order_relaxed) / kFirst + 1) * kFirst;
    next_.exchange(first - 1, std::memory_order_acq_rel);
    params_.store(&p, std::memory_order_relaxed);
    task_.store(reinterpret_cast<void (*)()>(task), std::memory_order_relaxed);
    run_.store(run, std::memory_order_relaxed);
    count_.store(count, std::memory_order_relaxed);
    size_.store(size, std::memory_order_relaxed);
    pieces_.store(ceil_div(count, size), std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    next_.store(first, std::memory_order_release);
    // A task that shares work in turn has to wake others.
    led_ = nullptr;
    const int64_t begun = now(), taken = take(), ended = now();
    led_ = this;
    for (Wait wait; done_.load(std::memory_order_acquire) < ceil_div(count, size);) wait();
    if (taken > 0) waited_ |= now() - ended > kPatience + kPieces * (ended - begun) / taken;
    if (failed_.exchange(false)) std::rethrow_exception(error_);
  }

  using Run = void (*)(const void* p, void (*task)(), int64_t begin, int64_t end);

  static constexpr int64_t kPieces = 4;         // of a thread, about
  static constexpr int64_t kFirst = 1ll << 20;  // piece 0 of what is shared next, in next_

  explicit Team(int64_t threads) : threads_(threads) {}

  static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

  // Does pieces while there are any. Returns how many.
  int64_t take() {
    for (int64_t taken = 0;; ++taken) {
      int64_t next = next_.load(std::memory_order_acquire);
      const int64_t piece = next % kFirst;
      if (piece >= pieces_.load(std::memory_order_relaxed)) return taken;
      const void* p = params_.load(std::memory_order_relaxed);
      void (*task)() = task_.load(std::memory_order_relaxed);
      const Run run = run_.load(std::memory_order_relaxed);
      const int64_t count = count_.load(std::memory_order_relaxed);
      const int64_t begin = piece * size_.load(std::memory_order_relaxed);
      const int64_t end = std::min(count, begin + size_.load(std::memory_order_relaxed));
      // Until it is done the leader shares nothing else: what was read is of this piece.
      if (!next_.compare_exchange_strong(next, next + 1, std::memory_order_acq_rel)) {
        --taken;
        continue;
      }
      try {
        run(p, task, begin, end);
      } catch (...) {
        if (!failed_.exchange(true)) error_ = std::current_exception();
      }
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  void follow() {
    for (Wait wait; !ended_.load(std::memory_order_acquire);) {
      const int64_t next = next_.load(std::memory_order_relaxed);
      if (next % kFirst < pieces_.load(std::memory_order_relaxed))
        take(), wait = {};
      else
        wait();
    }
  }

  // Waiting costs another thread nothing where it has a processor of its own; where it has none,
  // it gets this one's.
  struct Wait {
    int tries = 0;

    void operator()() {
      if (++tries > kTries) {
        sched_yield();
        return;
      }
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    }
    static constexpr int kTries = 1000;  // some tens of microseconds
  };

  // Whether threads of this process wait for processors; of all leaders.
  struct Crowded {
    std::atomic<int64_t> until{0};  // when to try again
    std::atomic<int64_t> pause{kPause};

    // A run in company ended, for which the leader waited or not.
    void note(bool waited, int64_t now) {
      const int64_t last = pause.load(std::memory_order_relaxed);
      if (waited) until.store(now + last, std::memory_order_relaxed);
      const int64_t next = waited ? std::min(2 * last, kLongestPause) : std::max(last / 2, kPause);
      pause.store(next, std::memory_order_relaxed);
    }
  };
  static Crowded& crowded() {
    static Crowded crowded;
    return crowded;
  }

  struct Leave {
    ~Leave() { led_ = nullptr; }
  };

  static int64_t now() {
    const auto time = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
  }

  // In nanoseconds. A thread that is longer about a piece than kPatience was put aside.
  static constexpr int64_t kPatience = 500'000;
  static constexpr int64_t kPause = 20'000'000, kLongestPause = 2'000'000'000;

  static inline thread_local Team* led_ = nullptr;

  int64_t threads_;
  bool waited_ = false;
  // What is shared.
  std::atomic<const void*> params_{nullptr};
  std::atomic<void (*)()> task_{nullptr};
  std::atomic<Run> run_{nullptr};
  std::atomic<int64_t> count_{0}, size_{1}, pieces_{0};
  // A number of what is shared times kFirst, plus the piece that is taken next.
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<bool> ended_{false};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;  // of the first piece that failed
};

}  // namespace w2a4::cpu
