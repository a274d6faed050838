// Element-wise passes over planes and columns. A vector that ends where the row ends, and overlaps the one before,
// handles the values that do not fill a vector: writing a value twice is cheaper than writing single values.
#pragma once

#include "operations.h"

namespace {

// Distance in bytes at which the lines of a store are fetched early; otherwise stores miss and wait (15 -> 20 GB/s).
constexpr int64_t AHEAD_BYTES = 4096;

// Write a line past the caches. A large result leaves them before it is read, and evicts data and the interpreter's code
// (8x64x56x56, forward and backward: 2.8 -> 2.2 ms, and no slower together with the ReLU or convolution that follows).
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

// Make stores past the caches visible before any later store.
INLINE void fence_stores() {
#if VECTOR_BYTES > 16
  _mm_sfence();
#endif
}

// Store one pack, or two packs one after the other; past the caches where they fill a line.
template <class T, class... Packs> INLINE void store_ahead(T* to, bool past_cache, const Packs&... packs) {
  if (sizeof...(packs) * sizeof(T) * Pack<Statistics<T>>::lanes == 64 && past_cache) {
    alignas(64) T line[64 / sizeof(T)];
    store(line, packs...);
    return store_past_cache(to, line);
  }
  __builtin_prefetch((const char*)to + AHEAD_BYTES, 1, 2);
  store(to, packs...);
}
template <class T, class A> INLINE void store_two(T* to, bool past_cache, const Pack<A>& first, const Pack<A>& second) {
  if (sizeof(T) == 2) return store_ahead(to, past_cache, first, second);
  store_ahead(to, past_cache, first);
  store_ahead(to + Pack<A>::lanes, past_cache, second);
}

template <class Op> INLINE void map_row(const Op& op, const Coefficients<typename Op::A>& k, int64_t begin, int64_t size) {
  constexpr int64_t lanes = Pack<typename Op::A>::lanes;
  auto* out = (typename Op::Element*)op.args.out;
  const int64_t end = begin + size;
  int64_t i = begin;
  for (; i + 2 * lanes <= end; i += 2 * lanes) store_two(out + i, op.args.past_cache, op(k, i), op(k, i + lanes));
  if (sizeof(typename Op::Element) == 2 && i > begin && i + lanes < end) {
    i = end - 2 * lanes;  // halves are rounded in pairs, faster than two single vectors (7x7: 0.85 of the time)
    return store(out + i, op(k, i), op(k, i + lanes));
  }
  if (i + lanes <= end) {
    store_ahead(out + i, op.args.past_cache, op(k, i));
    i += lanes;
  }
  if (i < end) store(out + end - lanes, op(k, end - lanes));
}

template <class Op> void map_planes(const KernelArgs& args, const Tile& tile, double*, double*) {
  const Op op(args);
  const Source<typename Op::A> source(args);
  int64_t channel = tile.row_begin % args.channels;  // one division, not one for each row
  for (int64_t row = tile.row_begin; row < tile.row_end; ++row) {
    map_row(op, source.channel(channel), row * args.size, args.size);
    channel = channel + 1 < args.channels ? channel + 1 : 0;
  }
  fence_stores();
}

// Distance in values at which reads are fetched early. Four rows at a time are four streams, which some processors predict
// badly for rows of 512 bytes or more: the next four rows are then fetched early. Shorter rows become slower with it, and so
// do rows of 1024 bytes or more, whose stores are fetched already.
template <class Op> INLINE int64_t values_ahead(const Op& op) {
  const int64_t row_bytes = op.args.size * int64_t(sizeof(typename Op::Element));
  if (op.args.streamed) return AHEAD_BYTES / int64_t(sizeof(typename Op::Element));
  return row_bytes < 512 || row_bytes >= 1024 ? 0 : 4 * op.args.size;
}

// ROWS rows at once, to load the coefficients of a column once for all of them.
template <int ROWS, class Op> INLINE void map_rows(const Op& op, const Source<typename Op::A>& source, int64_t row, const Tile& tile) {
  constexpr int64_t lanes = Pack<typename Op::A>::lanes;
  const int64_t size = op.args.size, ahead = values_ahead(op);
  auto* out = (typename Op::Element*)op.args.out;
  int64_t j = tile.column_begin;
  if (sizeof(typename Op::Element) == 2)
    for (; j + 2 * lanes <= tile.column_end; j += 2 * lanes) {
      const auto k = source.columns(j), next = source.columns(j + lanes);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const int64_t i = (row + r) * size + j;
        if (ahead) op.prefetch(i + ahead);
        store_ahead(out + i, op.args.past_cache, op(k, i), op(next, i + lanes));
      }
    }
  for (; j < tile.column_end; j += lanes) {
    const int64_t column = j + lanes <= tile.column_end ? j : tile.column_end - lanes;
    const auto k = source.columns(column);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const int64_t i = (row + r) * size + column;
      if (ahead) op.prefetch(i + ahead);
      store_ahead(out + i, op.args.past_cache, op(k, i));
    }
  }
}

template <class Op> void map_columns(const KernelArgs& args, const Tile& tile, double*, double*) {
  const Op op(args);
  const Source<typename Op::A> source(args);
  int64_t row = tile.row_begin;
  if (!args.streamed)
    for (; row + 4 <= tile.row_end; row += 4) map_rows<4>(op, source, row, tile);
  for (; row < tile.row_end; ++row) map_rows<1>(op, source, row, tile);
  fence_stores();
}

}  // namespace
