// A GPU's block on a CPU: its threads are coroutines, each of which runs until it waits at a barrier.
//
// So kernels can be run, and checked, where there is no GPU. Between two barriers threads run one after the other, in
// either order: what depends on the order lacks a barrier.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

namespace dfa {

struct Emulator {
  static constexpr std::size_t STACK = 128 * 1024;
  static constexpr int POISON = 0xff;  // bytes of a NaN, in every precision
  ucontext_t scheduler;
  std::vector<ucontext_t> threads;
  std::vector<std::vector<char>> stacks;
  std::vector<bool> ended;
  std::vector<char> shared;
  std::function<void()> kernel;
  int block = 0, thread = 0;
  bool backwards = false;

  static Emulator& instance() {
    static thread_local Emulator emulator;
    return emulator;
  }

  static void run_thread() {
    Emulator& self = instance();
    self.kernel();
    self.ended[self.thread] = true;
  }

  // False if some threads ended where others wait.
  bool run_block(int count) {
    ended.assign(count, false);
    std::memset(shared.data(), POISON, shared.size());
    for (int i = 0; i < count; ++i) {
      getcontext(&threads[i]);
      threads[i].uc_stack.ss_sp = stacks[i].data();
      threads[i].uc_stack.ss_size = STACK;
      threads[i].uc_link = &scheduler;
      makecontext(&threads[i], run_thread, 0);
    }
    for (int over = 0; over < count;) {
      for (int i = 0; i < count; ++i) {
        thread = backwards ? count - 1 - i : i;
        swapcontext(&scheduler, &threads[thread]);
        over += ended[thread];
      }
      if (over != 0 && over != count) return false;
    }
    return true;
  }

  bool run(int blocks, int count, std::size_t bytes, std::function<void()> body) {
    kernel = std::move(body);
    threads.resize(count);
    while (stacks.size() < static_cast<std::size_t>(count)) stacks.emplace_back(STACK);
    // Aligned as a GPU's is.
    shared.assign(bytes + 256, 0);
    for (block = 0; block < blocks; ++block) {
      if (!run_block(count)) return false;
    }
    return true;
  }
};

inline int emulated_block() { return Emulator::instance().block; }
inline int emulated_thread() { return Emulator::instance().thread; }
inline char* emulated_shared() {
  char* first = Emulator::instance().shared.data();
  return first + (256 - reinterpret_cast<std::size_t>(first) % 256) % 256;
}
inline void emulated_barrier() {
  Emulator& self = Emulator::instance();
  int mine = self.thread;
  swapcontext(&self.threads[mine], &self.scheduler);
  self.thread = mine;
}

}  // namespace dfa
