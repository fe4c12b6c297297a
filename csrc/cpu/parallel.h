// Spreads units of unequal cost over threads. A unit's result never depends on who runs it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fastkfo::cpu {

// costs: operations per unit. Each thread gets a contiguous range [first, last) of about equal
// cost.
template <class F>
void parallel_ranges(const std::vector<int64_t>& costs, const F& run) {
  constexpr int64_t kWorthAThread = 200'000;  // operations; waking a thread takes microseconds
  const int64_t units = static_cast<int64_t>(costs.size());
  int64_t total = 0;
  for (const int64_t cost : costs) total += cost;
  const int64_t threads = std::min<int64_t>(
      {units, static_cast<int64_t>(torch::stable::get_num_threads()), total / kWorthAThread});
  if (threads <= 1) {
    if (units > 0) run(0, units);
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
      if (first[part] < first[part + 1]) run(first[part], first[part + 1]);
  });
}

// The same, unit by unit.
template <class F>
void parallel_units(const std::vector<int64_t>& costs, const F& run) {
  parallel_ranges(costs, [&](int64_t first, int64_t last) {
    for (int64_t u = first; u < last; ++u) run(u);
  });
}

}  // namespace fastkfo::cpu
