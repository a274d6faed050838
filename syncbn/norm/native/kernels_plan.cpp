// Cuts an input into parts and runs kernels on them. Only this file knows of threads.
#include "kernels_plan.h"

namespace syncbn {
namespace {

constexpr int64_t MAX_PARTS = 32;          // of a reduction's rows
constexpr int64_t ALONE = 32768;           // values for which waking other threads does not pay
constexpr int64_t WINDOW_BYTES = 1 << 19;       // half of a common second cache
constexpr int64_t MOST_WINDOW_BYTES = 1 << 20;  // of one tile's values, where these are more
constexpr int64_t STRETCH_BYTES = 1 << 17;
constexpr int64_t STREAMED_BYTES = 1 << 21;  // of a tensor that is not found in a cache from one pass to the next
constexpr int64_t FOLDED_COLUMNS = 128;    // a row of folded samples has about as many

int64_t item_size(Dtype dtype) { return dtype == FLOAT64 ? 8 : dtype == FLOAT32 ? 4 : 2; }

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Run f(0), ..., f(tasks - 1).
template <class F> void share_out(int64_t tasks, int threads, const F& f) {
  if (threads <= 1 || tasks <= 1) {
    for (int64_t task = 0; task < tasks; ++task) f(task);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < tasks; ++task) f(task);
}

// f(from, to) for stretches of [begin, end), last first: what a pass before this one read last is still in the cache.
template <class F> void backwards(int64_t begin, int64_t end, int64_t stretch, const F& f) {
  for (; end > begin; end -= stretch) f(end - begin > stretch ? end - stretch : begin, end);
}

int useful_threads(const Plan& plan, int threads) {
  return plan.samples * plan.channels * plan.size < ALONE ? 1 : threads;
}

// How a reduction is cut: `parts` ranges of rows times `chunks` ranges of channels or columns.
class Cut {
 public:
  Cut(const Plan& plan, Window window)
      : rows_(plan.rows()), window_(window), unit_(plan.planes ? 1 : BLOCK_ROWS),
        tile_(plan.planes ? tile_channels(plan.size) : 0) {
    const int64_t tile = plan.planes ? tile_ : CHUNK_COLUMNS;
    chunks = divided_up(window.end - window.begin, tile);
    const int64_t units = divided_up(rows_, unit_);
    const int64_t wanted = plan.planes ? divided_up(MAX_PARTS, divided_up(plan.width(), tile)) : MAX_PARTS;
    parts = units < wanted ? units : wanted;
  }
  Part part(int64_t p, int64_t chunk) const { return {row(p), row(p + 1), column(chunk), column(chunk + 1)}; }
  int64_t parts, chunks;

 private:
  // Between blocks of columns' rows, so that only the last block is a short one.
  int64_t row(int64_t p) const {
    const int64_t row = divided_up(rows_, unit_) * p / parts * unit_;
    return row < rows_ ? row : rows_;
  }
  int64_t column(int64_t chunk) const {
    const int64_t width = window_.end - window_.begin;
    if (!tile_) return window_.begin + width * chunk / chunks;
    return window_.begin + (tile_ * chunk < width ? tile_ * chunk : width);
  }
  int64_t rows_;
  Window window_;
  int64_t unit_, tile_;
};

// A job over the samples that are left over from rows of `fold`: one row, on storage of its own where it would not
// fill a vector.
class LeftOver {
 public:
  LeftOver(const Job& job, const Plan& plan) : job_(job), count_(plan.left_over()), item_(plan.item) {
    const int64_t skip = plan.rows() * job.size * item_;
    job_.x = staged(0, job.x, skip);
    job_.dy = staged(1, job.dy, skip);
    job_.extra = staged(2, job.extra, skip);
    out_ = job.out ? (char*)job.out + skip : nullptr;
    job_.out = out_ && short_of_a_vector() ? staging_[3] : out_;
    job_.size = short_of_a_vector() ? MIN_SIZE : count_;
    job_.past_cache = false;
  }
  void run(double* first, double* second) {
    kernel_for(job_)(job_, {0, 1, 0, job_.size}, first, second);
    if (out_ && short_of_a_vector()) memcpy(out_, staging_[3], count_ * item_);
  }
 private:
  bool short_of_a_vector() const { return count_ < MIN_SIZE; }
  const void* staged(int which, const void* from, int64_t skip) {
    if (!from || !short_of_a_vector()) return from ? (const char*)from + skip : nullptr;
    return memcpy(staging_[which], (const char*)from + skip, count_ * item_);
  }
  Job job_;
  int64_t count_, item_;
  char* out_;
  char staging_[4][MIN_SIZE * 8] = {};
};

// Maps of four rows at a time load coefficients more seldom, which counts while all lies in a cache. From memory they
// are four streams, and one is faster, unless the row's coefficients fill the first cache.
bool streamed(const Plan& plan) {
  const int64_t row_bytes = plan.width() * plan.item;
  return plan.rows() * row_bytes >= STREAMED_BYTES && row_bytes >= 256 && row_bytes < 4096;
}

// Whether the result is larger than what stays in a cache, and its rows are whole lines.
bool past_cache(const Job& job, const Plan& plan) {
  const bool lines = uintptr_t(job.out) % 64 == 0 && job.size * plan.item % 64 == 0;
  return lines && plan.samples * plan.channels * plan.size * plan.item >= STREAMED_BYTES;
}

// The job with the rows of `plan`.
Job shaped(Job job, const Plan& plan) {
  job.planes = plan.planes;
  job.channels = plan.channels;
  job.size = plan.planes ? plan.size : plan.width();
  job.streamed = streamed(plan);
  return job;
}

int highest_level() {
#if SYNCBN_X86_LEVELS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return 2;
  if (__builtin_cpu_supports("x86-64-v3")) return 1;
#endif
  return 0;
}

int& level() {
  static int chosen = highest_level();
  return chosen;
}

}  // namespace

Kernel kernel_for(const Job& job) {
#if SYNCBN_X86_LEVELS
  if (level() == 2) return kernel_v4(job);
  if (level() == 1) return kernel_v3(job);
#endif
  return kernel_base(job);
}

Plan::Plan(const Job& job, const Shape& shape)
    : samples(shape.samples), channels(shape.channels), size(shape.size), fold(1),
      planes(shape.size >= MIN_SIZE), item(item_size(job.dtype)) {
  const int64_t row = channels * size;
  if (!planes && row < FOLDED_COLUMNS / 2) fold = divided_up(FOLDED_COLUMNS, row);
}

Reduced reduce(Job job, const Plan& plan, int threads, Window window) {
  job = shaped(job, plan);
  const Cut cut(plan, window);
  const int64_t width = window.end - window.begin;
  Reduced reduced;
  reduced.storage.reset(new double[2 * (cut.parts + 1) * width]());
  const auto sums = [&](int64_t p) { return reduced.storage.get() + 2 * p * width; };
  share_out(cut.parts * cut.chunks, useful_threads(plan, threads), [&](int64_t task) {
    const int64_t p = task / cut.chunks;
    const Part part = cut.part(p, task % cut.chunks);
    double* const first = sums(p) + part.column_begin - window.begin;
    kernel_for(job)(job, part, first, first + width);
  });
  for (int64_t p = 0; p < cut.parts; ++p) {
    const Part part = cut.part(p, 0);
    const double values = double(part.row_end - part.row_begin) * double(plan.planes ? plan.size : 1);
    reduced.shares.push_back({values, width, sums(p), sums(p) + width});
  }
  if (plan.left_over()) {
    LeftOver(job, plan).run(sums(cut.parts), sums(cut.parts) + width);
    reduced.shares.push_back({1, plan.left_over(), sums(cut.parts), sums(cut.parts) + width});
  }
  return reduced;
}

void map(Job job, const Plan& plan, int threads, Window window) {
  job = shaped(job, plan);
  const bool narrow = plan.planes && window.end - window.begin < plan.channels;
  const int64_t rows = plan.planes && !narrow ? plan.samples * plan.channels : plan.rows();
  const int64_t tasks = useful_threads(plan, threads);
  job.past_cache = past_cache(job, plan);
  const Kernel kernel = kernel_for(job);
  const int64_t stretch = divided_up(STRETCH_BYTES, job.size * plan.item);
  share_out(tasks, int(tasks), [&](int64_t task) {
    const int64_t begin = rows * task / tasks, end = rows * (task + 1) / tasks;
    if (!narrow) return backwards(begin, end, stretch, [&](int64_t from, int64_t to) {
      kernel(job, {from, to, window.begin, window.end}, nullptr, nullptr);
    });
    for (int64_t sample = begin; sample < end; ++sample) {
      const int64_t row = sample * plan.channels;
      kernel(job, {row + window.begin, row + window.end, 0, 0}, nullptr, nullptr);
    }
  });
  if (plan.left_over()) LeftOver(job, plan).run(nullptr, nullptr);
}

Windows::Windows(const Plan& plan, int tensors)
    : count(1), unit_(plan.planes ? tile_channels(plan.size) : 1), width_(plan.width() / unit_), end_(plan.width()) {
  const int64_t unit_bytes = plan.samples * unit_ * plan.size * plan.item * tensors;
  // narrow columns of a long input are read at a stride, which costs more than the cache gives back
  if (!plan.planes || width_ < 2 || unit_bytes > MOST_WINDOW_BYTES) return;
  const int64_t units = WINDOW_BYTES / unit_bytes;
  count = units > 1 ? divided_up(width_, units) : width_;
}

void each_window(const Plan& plan, int tensors, int threads, const std::function<void(Window, int)>& f) {
  const Windows windows(plan, tensors);
  threads = useful_threads(plan, threads);
  if (windows.count < threads) return f({0, plan.width()}, threads);
  share_out(windows.count, threads, [&](int64_t i) { f(windows[i], 1); });
}

}  // namespace syncbn

// Use no newer instruction set than `highest` (0 any processor's, 1 AVX2, 2 AVX-512), and return the one in use.
SYNCBN_API int syncbn_limit_level(int highest) {
  const int found = syncbn::highest_level();
  return syncbn::level() = highest < found ? highest : found;
}
