// Element-wise passes over planes and columns. What does not fill a vector at a row's end is done by a vector that
// ends there and overlaps the one before: writing the same value twice is cheaper than single values.
#pragma once

#include "kernels_passes.h"

namespace {

using syncbn::Part;

// What is written so many bytes ahead is fetched early: a store misses otherwise, and waits (15 -> 20 GB/s).
constexpr int64_t AHEAD = 4096;

// Write a line that is neither read before nor kept in a cache, where it would drive out what others need, the interpreter's
// own code among it: large results would not stay there until they are read (8x64x56x56, forward and backward: 2.8 -> 2.2
// ms, and no slower together with the ReLU or convolution that follows).
INLINE void store_past_cache(void* to, const void* line) {
#if VECTOR_BYTES == 64
  _mm512_stream_si512((__m512i*)to, _mm512_load_si512(line));
#elif VECTOR_BYTES == 32
  _mm256_stream_si256((__m256i*)to, _mm256_load_si256((const __m256i*)line));
  _mm256_stream_si256((__m256i*)to + 1, _mm256_load_si256((const __m256i*)line + 1));
#else
  __builtin_memcpy(to, line, 64);
#endif
}

// Have all that was written past the caches seen by whoever learns that this kernel is done.
INLINE void settle_stores() {
#if VECTOR_BYTES > 16
  _mm_sfence();
#endif
}

template <class T, class A> INLINE void store_ahead(T* to, const Pack<A>& value, bool past_cache) {
  if (sizeof(T) * Pack<A>::lanes == 64 && past_cache) {
    alignas(64) T line[64 / sizeof(T)];
    store(line, value);
    return store_past_cache(to, line);
  }
  __builtin_prefetch((const char*)to + AHEAD, 1, 2);
  store(to, value);
}
template <class T, class A> INLINE void store_ahead(T* to, const Pack<A>& first, const Pack<A>& second, bool past_cache) {
  if (sizeof(T) > 2) {
    store_ahead(to, first, past_cache);
    return store_ahead(to + Pack<A>::lanes, second, past_cache);
  }
  if (past_cache) {
    alignas(64) T line[2 * Pack<A>::lanes];
    store_pair(line, first, second);
    return store_past_cache(to, line);
  }
  __builtin_prefetch((const char*)to + AHEAD, 1, 2);
  store_pair(to, first, second);
}

template <class Op> INLINE void map_row(const Op& op, const Coefficients<typename Op::A>& k, int64_t begin, int64_t size) {
  constexpr int64_t lanes = Pack<typename Op::A>::lanes;
  auto* out = (typename Op::Element*)op.job.out;
  const int64_t end = begin + size;
  int64_t i = begin;
  for (; i + 2 * lanes <= end; i += 2 * lanes) store_ahead(out + i, op(k, i), op(k, i + lanes), op.job.past_cache);
  if (sizeof(typename Op::Element) == 2 && i > begin && i + lanes < end) {
    i = end - 2 * lanes;  // halves are rounded in pairs: one is quicker than two vectors (7x7: 0.85 of the time)
    return store_pair(out + i, op(k, i), op(k, i + lanes));
  }
  if (i + lanes <= end) {
    store_ahead(out + i, op(k, i), op.job.past_cache);
    i += lanes;
  }
  if (i < end) store(out + end - lanes, op(k, end - lanes));
}

template <class Op> void map_planes(const Job& job, const Part& part, double*, double*) {
  const Op op(job);
  const Source<typename Op::A> source(job);
  int64_t channel = part.row_begin % job.channels;  // one division, not one a row
  for (int64_t row = part.row_begin; row < part.row_end; ++row) {
    map_row(op, source.channel(channel), row * job.size, job.size);
    channel = channel + 1 < job.channels ? channel + 1 : 0;
  }
  settle_stores();
}

// What is read so much later is fetched early. Four rows at a time are as many streams, and some processors follow
// these badly where a row has 512 bytes or more: then the next four rows are fetched meanwhile. Shorter rows lose by
// it, and so do those of 1024 bytes or more, whose stores are fetched already.
template <class Op> INLINE int64_t values_ahead(const Op& op) {
  const int64_t row_bytes = op.job.size * int64_t(sizeof(typename Op::Element));
  if (op.job.streamed) return AHEAD / int64_t(sizeof(typename Op::Element));
  return row_bytes < 512 || row_bytes >= 1024 ? 0 : 4 * op.job.size;
}

// ROWS rows at once, so that the coefficients of a column are loaded once for all of them.
template <int ROWS, class Op> INLINE void map_rows(const Op& op, const Source<typename Op::A>& source, int64_t row, const Part& part) {
  constexpr int64_t lanes = Pack<typename Op::A>::lanes;
  const int64_t size = op.job.size, ahead = values_ahead(op);
  auto* out = (typename Op::Element*)op.job.out;
  int64_t j = part.column_begin;
  if (sizeof(typename Op::Element) == 2)
    for (; j + 2 * lanes <= part.column_end; j += 2 * lanes) {
      const auto k = source.columns(j), next = source.columns(j + lanes);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const int64_t i = (row + r) * size + j;
        if (ahead) op.prefetch(i + ahead);
        store_ahead(out + i, op(k, i), op(next, i + lanes), op.job.past_cache);
      }
    }
  for (; j < part.column_end; j += lanes) {
    const int64_t column = j + lanes <= part.column_end ? j : part.column_end - lanes;
    const auto k = source.columns(column);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const int64_t i = (row + r) * size + column;
      if (ahead) op.prefetch(i + ahead);
      store_ahead(out + i, op(k, i), op.job.past_cache);
    }
  }
}

template <class Op> void map_columns(const Job& job, const Part& part, double*, double*) {
  const Op op(job);
  const Source<typename Op::A> source(job);
  int64_t row = part.row_begin;
  if (!job.streamed)
    for (; row + 4 <= part.row_end; row += 4) map_rows<4>(op, source, row, part);
  for (; row < part.row_end; ++row) map_rows<1>(op, source, row, part);
  settle_stores();
}

}  // namespace
