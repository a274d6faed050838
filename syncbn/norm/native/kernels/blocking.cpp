// Divides an input into tiles and runs kernels on them; the only file that starts threads.
//
// The division depends on the shape alone, never on the number of threads, and parts are merged in order: results have
// the same bits with any number of threads.
#include "blocking.h"

#include <string.h>

#include <algorithm>

namespace syncbn {
namespace {

constexpr int64_t MAX_PARTS = 32;               // of a reduction's rows
constexpr int64_t SERIAL_VALUES = 32768;        // with fewer, waking other threads costs more than it saves
constexpr int64_t WINDOW_BYTES = 1 << 19;       // half of a common second-level cache
constexpr int64_t MAX_WINDOW_BYTES = 1 << 20;   // where one tile's values are more than WINDOW_BYTES
constexpr int64_t STRETCH_BYTES = 1 << 17;
constexpr int64_t STREAMED_BYTES = 1 << 21;     // a tensor of this size leaves the caches between two passes
constexpr int64_t FOLDED_COLUMNS = 128;         // about the columns of a row of folded samples

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Run f(0), ..., f(tasks - 1).
template <class F> void parallel_for(int64_t tasks, int64_t threads, const F& f) {
  if (threads <= 1 || tasks <= 1) {
    for (int64_t task = 0; task < tasks; ++task) f(task);
    return;
  }
#pragma omp parallel for num_threads(int(threads)) schedule(static)
  for (int64_t task = 0; task < tasks; ++task) f(task);
}

int64_t useful_threads(const Plan& plan, int64_t threads) { return plan.values() < SERIAL_VALUES ? 1 : threads; }

// Run `args` over the remainder as one row, padded to a vector, in storage of its own.
void run_remainder(KernelArgs args, const Plan& plan, double* first, double* second) {
  const size_t skip = size_t(plan.rows() * args.size * plan.item), bytes = size_t(plan.remainder() * plan.item);
  char storage[4][FOLDED_COLUMNS * 8];
  const auto staged = [&](int which, const void* from) -> const void* {
    if (!from) return nullptr;
    memset(storage[which], 0, MIN_SIZE * 8);
    return memcpy(storage[which], (const char*)from + skip, bytes);
  };
  args.x = staged(0, args.x);
  args.dy = staged(1, args.dy);
  args.extra = staged(2, args.extra);
  void* const out = args.out;
  args.out = storage[3];
  args.size = plan.remainder() < MIN_SIZE ? MIN_SIZE : plan.remainder();
  args.past_cache = false;
  kernel_for(args)(args, {0, 1, 0, args.size}, first, second);
  if (out) memcpy((char*)out + skip, storage[3], bytes);
}

// The args with the rows of `plan`.
KernelArgs with_rows(KernelArgs args, const Plan& plan) {
  args.planes = plan.planes;
  args.channels = plan.channels;
  args.size = plan.planes ? plan.size : plan.width();
  // Four rows at a time load coefficients less often, which is faster while all values lie in a cache. From memory they
  // are four streams; one stream is faster, unless the row's coefficients fill the first-level cache.
  const int64_t row_bytes = plan.width() * plan.item;
  args.streamed = plan.rows() * row_bytes >= STREAMED_BYTES && row_bytes >= 256 && row_bytes < 4096;
  return args;
}

}  // namespace

Plan::Plan(Dtype dtype, int64_t samples, int64_t channels, int64_t size)
    : samples(samples), channels(channels), size(size), item(dtype == FLOAT64 ? 8 : dtype == FLOAT32 ? 4 : 2),
      planes(size >= MIN_SIZE), fold(1) {
  const int64_t row = channels * size;
  if (!planes && row < FOLDED_COLUMNS / 2) fold = divided_up(FOLDED_COLUMNS, row);
}

Partials reduce(KernelArgs args, const Plan& plan, int64_t threads, Window window) {
  args = with_rows(args, plan);
  const int64_t width = window.end - window.begin, rows = plan.rows();
  const int64_t unit = plan.planes ? tile_channels(plan.size) : CHUNK_COLUMNS, chunks = divided_up(width, unit);
  const auto column = [&](int64_t chunk) {
    return window.begin + (plan.planes ? std::min(unit * chunk, width) : width * chunk / chunks);
  };
  // parts of whole blocks, so that only the last block is shorter
  const int64_t block = plan.planes ? 1 : BLOCK_ROWS, blocks = divided_up(rows, block);
  const int64_t wanted = plan.planes ? divided_up(MAX_PARTS, divided_up(plan.width(), unit)) : MAX_PARTS;
  const int64_t parts = std::min(blocks, wanted);
  const auto row = [&](int64_t part) { return std::min(blocks * part / parts * block, rows); };

  Partials partials;
  partials.storage.reset(new double[2 * (parts + 1) * width]());
  const auto add_part = [&](double values, int64_t part_width) {
    double* const first = partials.storage.get() + 2 * int64_t(partials.parts.size()) * width;
    partials.parts.push_back({values, part_width, first, first + width});
  };
  for (int64_t part = 0; part < parts; ++part)
    add_part(double(row(part + 1) - row(part)) * double(plan.planes ? plan.size : 1), width);
  parallel_for(parts * chunks, useful_threads(plan, threads), [&](int64_t task) {
    const int64_t part = task / chunks, chunk = task % chunks, skip = column(chunk) - window.begin;
    const Partial& sums = partials.parts[part];
    kernel_for(args)(args, {row(part), row(part + 1), column(chunk), column(chunk + 1)}, sums.first + skip, sums.second + skip);
  });
  if (plan.remainder()) {
    add_part(1, plan.remainder());
    run_remainder(args, plan, partials.parts.back().first, partials.parts.back().second);
  }
  return partials;
}

void map(KernelArgs args, const Plan& plan, int64_t threads, Window window) {
  args = with_rows(args, plan);
  const bool whole_lines = uintptr_t(args.out) % 64 == 0 && args.size * plan.item % 64 == 0;
  args.past_cache = whole_lines && plan.values() * plan.item >= STREAMED_BYTES;
  const bool narrow = plan.planes && window.end - window.begin < plan.channels;
  const int64_t rows = plan.planes && !narrow ? plan.samples * plan.channels : plan.rows();
  const int64_t tasks = useful_threads(plan, threads);
  const int64_t stretch = narrow ? 1 : divided_up(STRETCH_BYTES, args.size * plan.item);
  const Kernel kernel = kernel_for(args);
  parallel_for(tasks, tasks, [&](int64_t task) {
    const int64_t begin = rows * task / tasks;
    // backwards: the rows that the pass before read last are still in the cache
    for (int64_t end = rows * (task + 1) / tasks; end > begin; end -= stretch) {
      const int64_t first = end - begin > stretch ? end - stretch : begin, sample = first * plan.channels;
      if (narrow) kernel(args, {sample + window.begin, sample + window.end, 0, 0}, nullptr, nullptr);
      else kernel(args, {first, end, window.begin, window.end}, nullptr, nullptr);
    }
  });
  if (plan.remainder()) run_remainder(args, plan, nullptr, nullptr);
}

void each_window(const Plan& plan, int tensors, int64_t threads, const std::function<void(Window, int64_t)>& f) {
  threads = useful_threads(plan, threads);
  const Window all = {0, plan.width()};
  const int64_t unit = plan.planes ? tile_channels(plan.size) : 1, width = all.end / unit;
  const int64_t unit_bytes = plan.samples * unit * plan.size * plan.item * tensors;
  // a window of columns of a long input is read at a stride, which costs more than the cache saves
  if (!plan.planes || width < 2 || unit_bytes > MAX_WINDOW_BYTES) return f(all, threads);
  const int64_t units = WINDOW_BYTES / unit_bytes, count = units > 1 ? divided_up(width, units) : width;
  if (count < threads) return f(all, threads);
  parallel_for(count, threads, [&](int64_t i) {
    f({width * i / count * unit, i + 1 < count ? width * (i + 1) / count * unit : all.end}, 1);
  });
}

}  // namespace syncbn
