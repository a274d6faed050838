// Element-wise passes over planes and columns. What does not fill a vector at a row's end is done by a vector that
// ends there and overlaps the one before: writing the same value twice is cheaper than single values.
#pragma once

#include "kernels_passes.h"

namespace {

using syncbn::Part;

// What is written so many bytes ahead is fetched early: a store misses otherwise, and waits (15 -> 20 GB/s). Stores past
// the cache are no faster, and slow down whoever reads the result next.
constexpr int64_t AHEAD = 4096;

template <class T, class A> INLINE void store_ahead(T* to, const Pack<A>& value) {
  __builtin_prefetch((const char*)to + AHEAD, 1, 2);
  store(to, value);
}
template <class T, class A> INLINE void store_ahead(T* to, const Pack<A>& first, const Pack<A>& second) {
  __builtin_prefetch((const char*)to + AHEAD, 1, 2);
  if (sizeof(T) > 2) __builtin_prefetch((const char*)(to + Pack<A>::lanes) + AHEAD, 1, 2);  // a line of its own
  store_pair(to, first, second);
}

template <class Op> INLINE void map_row(const Op& op, const Coefficients<typename Op::A>& k, int64_t begin, int64_t size) {
  constexpr int64_t lanes = Pack<typename Op::A>::lanes;
  auto* out = (typename Op::Element*)op.job.out;
  const int64_t end = begin + size;
  int64_t i = begin;
  for (; i + 2 * lanes <= end; i += 2 * lanes) store_ahead(out + i, op(k, i), op(k, i + lanes));
  if (i + lanes <= end) {
    store_ahead(out + i, op(k, i));
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
}

// ROWS rows at once, so that the coefficients of a column are loaded once for all of them.
template <int ROWS, class Op> INLINE void map_rows(const Op& op, const Source<typename Op::A>& source, int64_t row, const Part& part) {
  constexpr int64_t lanes = Pack<typename Op::A>::lanes;
  const int64_t size = op.job.size, ahead = values_ahead(op, 1023);
  auto* out = (typename Op::Element*)op.job.out;
  int64_t j = part.column_begin;
  if (sizeof(typename Op::Element) == 2)
    for (; j + 2 * lanes <= part.column_end; j += 2 * lanes) {
      const auto k = source.columns(j), next = source.columns(j + lanes);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const int64_t i = (row + r) * size + j;
        if (ahead) op.prefetch(i + ahead);
        store_ahead(out + i, op(k, i), op(next, i + lanes));
      }
    }
  for (; j < part.column_end; j += lanes) {
    const int64_t column = j + lanes <= part.column_end ? j : part.column_end - lanes;
    const auto k = source.columns(column);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const int64_t i = (row + r) * size + column;
      if (ahead) op.prefetch(i + ahead);
      store_ahead(out + i, op(k, i));
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
}

}  // namespace
