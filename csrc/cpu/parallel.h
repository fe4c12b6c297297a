// Spreads units of unequal cost over threads. A unit's result never depends on who runs it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fastkfo::cpu {

// costs: operations per unit. Each thread gets a contiguous range of about equal cost.
template <class F>
void parallel_units(const std::vector<int64_t>& costs, const F& run) {
  constexpr int64_t kWorthAThread = 200'000;  // operations; waking a thread takes microseconds
  const int64_t units = static_cast<int64_t>(costs.size());
  int64_t total = 0;
  for (const int64_t cost : costs) total += cost;
  const int64_t threads = std::min<int64_t>(
      {units, static_cast<int64_t>(torch::stable::get_num_threads()), total / kWorthAThread});
  if (threads <= 1) {
    for (int64_t u = 0; u < units; ++u) run(u);
    return;
  }
  std::vector<int64_t> first(threads + 1, units);
  first[0] = 0;
  int64_t done = 0;
  for (int64_t u = 0, part = 1; u < units && part < threads; ++u) {
    done += costs[u];
    while (part < threads && done >= total * part / threads) first[part++] = u + 1;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      for (int64_t u = first[part]; u < first[part + 1]; ++u) run(u);
  });
}

}  // namespace fastkfo::cpu
