// Work on many things that do not depend on one another, in several threads.
#pragma once

#include <algorithm>
#include <thread>
#include <vector>

namespace tersor {

// Calls work(first, last) so that all of 0..count are covered, in as many threads as there are
// things for, at most `threads`; this one is among them.
template <class Work>
void in_threads(size_t count, size_t threads, const Work& work) {
  threads = std::min(std::max<size_t>(1, threads), std::max<size_t>(1, count));
  std::vector<std::thread> pool;
  for (size_t i = 1; i < threads; ++i) {
    pool.emplace_back(work, count * i / threads, count * (i + 1) / threads);
  }
  work(0, count / threads);
  for (auto& thread : pool) thread.join();
}

}  // namespace tersor
