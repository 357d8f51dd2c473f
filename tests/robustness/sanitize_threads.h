// Parallel loops on plain threads, included before the kernels in builds for ThreadSanitizer.
//
// OpenMP's library is not built for ThreadSanitizer, so its threads seem to start and end without synchronisation and
// every hand-over looks like a race. ThreadSanitizer follows plain threads, so its reports are real.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <thread>
#include <vector>

namespace torch::stable {

template <class F>
inline void parallel_for_on_plain_threads(int64_t begin, int64_t end, int64_t, const F& f) {
  constexpr int64_t kThreads = 3;
  const int64_t share = std::max<int64_t>(1, (end - begin + kThreads - 1) / kThreads);
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += share)
    threads.emplace_back([&f, first, last = std::min(first + share, end)] { f(first, last); });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace torch::stable

#define parallel_for parallel_for_on_plain_threads
