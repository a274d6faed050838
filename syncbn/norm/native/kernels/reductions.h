// Sums over planes and columns, in lanes, block by block: a block's float32 lanes are added up in float64.
//
// A block's moments are those of the deviations from a shift, the mean of the block's first values. One pass is then
// exact: at least 1/124 of the block's values determine the shift (16 of 64 rows of 31), so its distance to the block's mean
// is at most 11.1 standard deviations of the block, whatever the values. Blocks merge as ranks do (Chan, Golub & LeVeque 1983).
#pragma once

#include "operations.h"

namespace {

using syncbn::BLOCK_ROWS;
using syncbn::BLOCK_VALUES;
using syncbn::CHUNK_COLUMNS;
using syncbn::MAX_TILE_CHANNELS;

template <class A> struct Sums { Pack<A> first, second; };

template <class A> INLINE void add(Sums<A>& sums, const Terms<A>& terms) {
  sums.first = sums.first + terms.value;
  sums.second = sums.second + terms.value * terms.factor;
}

template <class Op> constexpr bool is_moments = Op::kind == syncbn::MOMENTS;

// The two results of each channel or column, in float64.
struct Totals {
  double *first, *second, count;
  // Add a block of `values` values: two sums, or for moments those of deviations from `shift` and of their squares.
  template <bool MOMENTS> INLINE void add(int64_t at, double a, double b, double shift, double values) const {
    if (!MOMENTS) {
      first[at] += a;
      second[at] += b;
      return;
    }
    const double offset = a / values, mean = shift + offset, delta = mean - first[at], share = values / (count + values);
    first[at] += delta * share;
    second[at] += b - a * offset + delta * delta * count * share;
  }
};

// ---- planes --------------------------------------------------------------------------------------------------

// Rows of fewer values end before the processor predicts the stream: the next sample's row is fetched early (7 -> 13 GB/s
// for rows of 49).
constexpr int64_t SHORT_ROW = 128;
// Halves are added up faster than processors fetch successive pages of 4 KB: values are fetched a page early (moments of
// 8x256x56x56: 0.75 of the time). Two tensors at once become slower with it, unless rows are short.
constexpr int64_t LONG_ROW = 1024, PAGE_BYTES = 4096;

template <class Op> INLINE int64_t plane_values_ahead(const Op& op) {
  constexpr int64_t item = sizeof(typename Op::Element);
  if (op.args.size < SHORT_ROW) return op.args.size * op.args.channels;
  return item == 2 && (is_moments<Op> || op.args.size < LONG_ROW) ? PAGE_BYTES / item : 0;
}

template <class Op> INLINE void add_row(const Op& op, const Coefficients<typename Op::A>& k, int64_t begin, int64_t size,
                                        int64_t ahead, Sums<typename Op::A>& total) {
  using A = typename Op::A;
  constexpr int64_t lanes = Pack<A>::lanes;
  // two chains of additions hide their latency; local copies, because `total` could alias what op reads
  Sums<A> sums = total, other = {};
  const int64_t end = begin + size;
  int64_t i = begin;
  for (; i + 2 * lanes <= end; i += 2 * lanes) {
    if (ahead) op.prefetch(i + ahead);
    if (ahead) op.prefetch(i + lanes + ahead);
    add(sums, op(k, i));
    add(other, op(k, i + lanes));
  }
  if (i + lanes <= end) {
    add(sums, op(k, i));
    i += lanes;
  }
  if (i < end) {
    Terms<A> terms = op(k, end - lanes);
    terms.value = keep_last(terms.value, end - i);
    add(other, terms);
  }
  total = {sums.first + other.first, sums.second + other.second};
}

// The mean of up to 128 values from `begin` on.
template <class T> INLINE Statistics<T> sample_mean(const T* begin, int64_t size) {
  using A = Statistics<T>;
  constexpr int64_t lanes = Pack<A>::lanes;
  Pack<A> sum = {};
  int64_t i = 0;
  for (; i + lanes <= size && i < 128; i += lanes) sum = sum + load(begin + i);
  return A(total(sum) / double(i));
}

// The values [begin, end) of the planes of a tile's channels in the samples [row_begin, row_end).
struct Block { int64_t row_begin, row_end, begin, end; };

template <class Op> INLINE void add_block(const Op& op, const Tile& tile, const Block& block, Source<typename Op::A> source,
                                          const Totals& totals) {
  using A = typename Op::A;
  constexpr bool moments = is_moments<Op>;
  const int64_t size = op.args.size, channels = tile.column_end - tile.column_begin, length = block.end - block.begin;
  const int64_t ahead = plane_values_ahead(op);
  const auto first_of = [&](int64_t row, int64_t c) __attribute__((always_inline)) {
    return (row * op.args.channels + tile.column_begin + c) * size + block.begin;
  };
  Sums<A> sums[MAX_TILE_CHANNELS];
  A shift[MAX_TILE_CHANNELS];
  for (int64_t c = 0; c < channels; ++c) {
    sums[c] = {};
    shift[c] = moments ? sample_mean(op.x + first_of(block.row_begin, c), length) : source.mean[tile.column_begin + c];
  }
  for (int64_t row = block.row_begin; row < block.row_end; ++row)
    for (int64_t c = 0; c < channels; ++c) {
      Coefficients<A> k = moments ? Coefficients<A>{} : source.channel(tile.column_begin + c);
      k.mean = broadcast<A>(shift[c]);
      add_row(op, k, first_of(row, c), length, ahead, sums[c]);
    }
  const double values = double(block.row_end - block.row_begin) * double(length);
  double first[MAX_TILE_CHANNELS], second[MAX_TILE_CHANNELS];  // so that the divisions below are vectorised
  for (int64_t c = 0; c < channels; ++c) {
    first[c] = total(sums[c].first);
    second[c] = total(sums[c].second);
  }
  for (int64_t c = 0; c < channels; ++c) totals.add<moments>(c, first[c], second[c], shift[c], values);
}

template <class Op> void reduce_planes(const KernelArgs& args, const Tile& tile, double* first, double* second) {
  const Op op(args);
  Totals totals = {first, second, 0};
  const int64_t length = args.size < BLOCK_VALUES ? args.size : BLOCK_VALUES;
  const int64_t fitting = BLOCK_VALUES / length, rows = fitting < 64 ? fitting : 64;
  for (int64_t row = tile.row_begin; row < tile.row_end; row += rows)
    for (int64_t begin = 0; begin < args.size; begin += length) {
      // a last piece shorter than a vector joins the one before it
      const int64_t left = args.size - begin;
      const bool last = left < length + syncbn::MIN_SIZE;
      const Block block = {row, row + rows < tile.row_end ? row + rows : tile.row_end, begin, last ? args.size : begin + length};
      add_block(op, tile, block, Source<typename Op::A>(args), totals);
      totals.count += double(block.row_end - block.row_begin) * double(block.end - block.begin);
      if (last) break;
    }
}

// ---- columns -------------------------------------------------------------------------------------------------

// A chunk of columns: vector p starts at `column(p)`. The last vector ends where the chunk ends and may overlap the one
// before; both then hold the same sums of their common columns.
template <class A> struct Chunk {
  static constexpr int64_t lanes = Pack<A>::lanes;
  int64_t begin, end;
  INLINE int64_t vectors() const { return (end - begin + lanes - 1) / lanes; }
  INLINE int64_t column(int64_t p) const {
    const int64_t j = begin + p * lanes;
    return j + lanes <= end ? j : end - lanes;
  }
};

template <class A> struct ColumnState {
  Sums<A> sums[CHUNK_COLUMNS / Pack<A>::lanes + 1];
  Pack<A> shift[CHUNK_COLUMNS / Pack<A>::lanes + 1];
};

// Distance in bytes, and at least ROWS rows, at which reads are fetched early in memory order, as one stream. Without it
// ROWS rows are as many streams, which from memory take up to 1.4 times as long.
constexpr int64_t FETCHED_AHEAD = 4096;
// With more columns, two rows are added at a time: the fetched lines of four leave the first-level cache before use.
constexpr int64_t FOUR_ROWS_COLUMNS = 512;

template <int ROWS, class Op> INLINE void add_rows(const Op& op, const Source<typename Op::A>& source, int64_t row,
                                                   Chunk<typename Op::A> chunk, ColumnState<typename Op::A>& state) {
  using A = typename Op::A;
  const int64_t step = ROWS * op.args.size, least = FETCHED_AHEAD / int64_t(sizeof(typename Op::Element));
  const int64_t next = row * op.args.size + (step > least ? step : least);
  const bool whole = chunk.end - chunk.begin == op.args.size;
  for (int64_t p = 0; p < chunk.vectors(); ++p) {
    const int64_t column = chunk.column(p);
    const bool moments = is_moments<Op>;
    Coefficients<A> k = moments ? Coefficients<A>{} : source.columns(column);
    if (moments) k.mean = state.shift[p];
    Sums<A> even = state.sums[p], odd = {};
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const int64_t i = (row + r) * op.args.size + column;
      op.prefetch(whole ? next + (p * ROWS + r) * Chunk<A>::lanes : i + step);
      add(r % 2 ? odd : even, op(k, i));
    }
    state.sums[p] = {even.first + odd.first, even.second + odd.second};
  }
}

// Set sums to 0, shifts to the mean of the first rows.
template <class Op> INLINE void start_block(const Op& op, int64_t row, int64_t rows, Chunk<typename Op::A> chunk,
                                            ColumnState<typename Op::A>& state) {
  using A = typename Op::A;
  const int64_t sample = rows < 4 ? rows : 4;
  for (int64_t p = 0; p < chunk.vectors(); ++p) {
    state.sums[p] = {};
    if (!is_moments<Op>) continue;
    Pack<A> sum = {};
    for (int64_t r = 0; r < sample; ++r) sum = sum + load(op.x + (row + r) * op.args.size + chunk.column(p));
    state.shift[p] = sum * broadcast<A>(A(1) / A(sample));
  }
}

template <class Op> INLINE void finish_block(Chunk<typename Op::A> chunk, const ColumnState<typename Op::A>& state,
                                             const Totals& totals, int64_t rows) {
  using A = typename Op::A;
  constexpr bool moments = is_moments<Op>;
  int64_t next = chunk.begin;  // columns in two vectors are added once
  for (int64_t p = 0; p < chunk.vectors(); ++p) {
    A first[Chunk<A>::lanes], second[Chunk<A>::lanes], shift[Chunk<A>::lanes] = {};
    store(first, state.sums[p].first);
    store(second, state.sums[p].second);
    if (moments) store(shift, state.shift[p]);
    const int64_t column = chunk.column(p);
    for (int64_t l = next - column; l < Chunk<A>::lanes; ++l)
      totals.add<moments>(column + l - chunk.begin, first[l], second[l], shift[l], double(rows));
    next = column + Chunk<A>::lanes;
  }
}

template <class Op> void reduce_columns(const KernelArgs& args, const Tile& tile, double* first, double* second) {
  using A = typename Op::A;
  const Op op(args);
  const Source<A> source(args);
  const Chunk<A> chunk = {tile.column_begin, tile.column_end};
  Totals totals = {first, second, 0};
  ColumnState<A> state;
  const bool four = args.size <= FOUR_ROWS_COLUMNS || args.size > CHUNK_COLUMNS;
  for (int64_t begin = tile.row_begin; begin < tile.row_end; begin += BLOCK_ROWS) {
    const int64_t end = begin + BLOCK_ROWS < tile.row_end ? begin + BLOCK_ROWS : tile.row_end;
    start_block(op, begin, end - begin, chunk, state);
    int64_t row = begin;
    if (four)
      for (; row + 4 <= end; row += 4) add_rows<4>(op, source, row, chunk, state);
    for (; row + 2 <= end; row += 2) add_rows<2>(op, source, row, chunk, state);
    for (; row < end; ++row) add_rows<1>(op, source, row, chunk, state);
    finish_block<Op>(chunk, state, totals, end - begin);
    totals.count += double(end - begin);
  }
}

}  // namespace
