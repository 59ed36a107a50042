// One transformer layer for a few rows, each one token: x [rows, dim] -> x [rows, dim].
//
// Keys and values go into the cache in place. All arithmetic is fp32; weights, cache and x may be
// fp32 or bf16. Every output is summed in an order that does not depend on the other rows, so a row
// alone and in a batch gives the same bits. The formulas in plain torch: `reference` in few_rows.py,
// which also mirrors the structs below.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "vectors.h"

namespace {

// Keys that attention reads at a time: they stay in the first-level cache for scores and values.
constexpr int64_t KEYS = 64;

enum Dtype : int32_t { FP32, BF16 };
enum Attention : int32_t { LATENT, GROUPED };
enum Activation : int32_t { SILU, GELU, RELU2 };

// Mirrored in few_rows.py ------------------------------------------------------------------------

// y = (weight + up down) x. Row r's own delta is at r * stride, or at which[r] * stride; stride 0:
// one for all rows.
struct Map {
  const void *weight, *down, *up;  // [out, in], [rank, in], [out, rank]
  const int64_t* which;            // [rows], or null
  int64_t out, in, rank, down_stride, up_stride;
  int32_t dtype, delta_dtype;
};

// y = x / sqrt(mean(x^2) + eps) * weight
struct Norm {
  const void* weight;  // null: no weight
  int32_t present, dtype;
  float eps;
};

struct Layer {
  int64_t dim, kv_width, heads, kv_heads;
  int64_t nope_dim, value_dim, latent_dim;  // grouped: value_dim is head_dim
  int64_t experts, top_k, expert_dim;   // experts = 0: the feed-forward is dense
  int64_t bias_loops;                   // router_bias: [bias_loops, experts], the last also beyond
  Map query_down, query, kv_down, key, value, kv_up, output, router, up, down;  // up: [gate | up]
  Norm query_latent_norm, kv_latent_norm, query_norm, key_norm;
  Norm attention_norm, attention_branch_norm, attention_sum_norm;
  Norm feed_forward_norm, feed_forward_branch_norm, feed_forward_sum_norm;
  const void *query_bias, *key_bias, *router_bias, *expert_up, *expert_down;
  int32_t attention, norm_by_width, activation, gated, dense;
  int32_t bias_dtype, router_bias_dtype, expert_dtype, softmax_scores, normalize;
  float route_scale;
};

struct Call {
  const void* x;
  void *out, *kv;  // kv: [slots, lines, columns, kv_width] with the strides below
  // [rows]; null: 0, r, same_column, 0, same_loop
  const int64_t *slot, *line, *column, *first, *loop;
  // Null, or [lines, blocks] with lines page_row_stride apart: kv is [pages, page_columns, kv_width]
  // with pages slot_stride apart, and column c of row r is in page pages[line, c / page_columns].
  const int64_t* pages;
  const uint8_t *writes, *mask;                 // [rows], [rows or 1, >= column + 1]; may be null
  const float *cos, *sin;                       // [rows or 1, rotary]; null: not rotated
  int64_t rows, rotary_dim, same_column, slot_stride, line_stride, mask_stride, table_stride;
  int64_t page_columns, page_row_stride, same_loop;
  int32_t dtype, kv_dtype;
};

// Memory -----------------------------------------------------------------------------------------

int64_t round_up(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// Memory of one call, kept for the next: allocating is slow, and large blocks come unmapped.
class Scratch {
 public:
  void reset() {
    if (used_ > size_) {  // the last call needed more than there was: have it in one piece now
      block_.reset(new char[used_ + 64]);
      size_ = used_;
    }
    extra_.clear();
    used_ = 0;
  }
  template <class T>
  T* take(int64_t count) {
    size_t bytes = (count * sizeof(T) + 63) / 64 * 64, start = used_;
    used_ += bytes;
    if (used_ <= size_) return reinterpret_cast<T*>(aligned(block_.get()) + start);
    extra_.emplace_back(new char[bytes + 64]);
    return reinterpret_cast<T*>(aligned(extra_.back().get()));
  }

 private:
  static char* aligned(char* p) { return p + (-reinterpret_cast<uintptr_t>(p) & 63); }
  std::unique_ptr<char[]> block_;
  std::vector<std::unique_ptr<char[]>> extra_;
  size_t size_ = 0, used_ = 0;
};

thread_local Scratch scratch;

using Rows = float**;  // a pointer per row; rows of scratch memory are padded to whole vectors

Rows new_rows(int64_t rows, int64_t width) {
  int64_t stride = round_up(width);
  float* numbers = scratch.take<float>(rows * stride);
  Rows pointers = scratch.take<float*>(rows);
  for (int64_t r = 0; r < rows; r++) pointers[r] = numbers + r * stride;
  return pointers;
}

Rows part(Rows rows, int64_t count, int64_t offset) {
  Rows pointers = scratch.take<float*>(count);
  for (int64_t r = 0; r < count; r++) pointers[r] = rows[r] + offset;
  return pointers;
}

// Matrix products --------------------------------------------------------------------------------

// Each of LANES vectors summed over its lanes: {sum(v[0]), sum(v[1]), ...}. One tree for all of
// them costs about as much as two sums one by one.
inline Floats sums(Floats* v) {
#if defined(__AVX512F__)
  UNROLL for (int i = 0; i < 4; i++) {
    for (int half = 0; half < 16; half += 8) {
      Floats a = v[i + half], b = v[i + half + 4];
      v[i + half] = SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                    SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    Floats a = v[i], b = v[i + 8];
    v[i] = SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
#define PAIR_LOW(a, b) SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define PAIR_HIGH(a, b) SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#define EVEN(a, b) SHUFFLE(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30)
#define ODD(a, b) SHUFFLE(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31)
#elif defined(__AVX__)
  UNROLL for (int i = 0; i < 4; i++)
    v[i] = SHUFFLE(v[i], v[i + 4], 0, 1, 2, 3, 8, 9, 10, 11) +
           SHUFFLE(v[i], v[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
#define PAIR_LOW(a, b) SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define PAIR_HIGH(a, b) SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#define EVEN(a, b) SHUFFLE(a, b, 0, 2, 8, 10, 4, 6, 12, 14)
#define ODD(a, b) SHUFFLE(a, b, 1, 3, 9, 11, 5, 7, 13, 15)
#else
#define PAIR_LOW(a, b) SHUFFLE(a, b, 0, 1, 4, 5)
#define PAIR_HIGH(a, b) SHUFFLE(a, b, 2, 3, 6, 7)
#define EVEN(a, b) SHUFFLE(a, b, 0, 2, 4, 6)
#define ODD(a, b) SHUFFLE(a, b, 1, 3, 5, 7)
#endif
  // Now 128-bit part j of v[i] holds four partial sums of vector 4 j + i.
  Floats a = PAIR_LOW(v[0], v[1]) + PAIR_HIGH(v[0], v[1]);
  Floats b = PAIR_LOW(v[2], v[3]) + PAIR_HIGH(v[2], v[3]);
  return EVEN(a, b) + ODD(a, b);
}

// All ones, but zeros in the lanes of the last vector of `in` numbers that overlap the one before.
inline Words last_mask(int64_t in) {
  int64_t overlap = in < LANES ? 0 : LANES - in % LANES;
  Words mask;
  for (int i = 0; i < LANES; i++) mask[i] = i < overlap ? 0 : -1;
  return mask;
}

template <class W>
inline Floats last(const W* p, int64_t in) {
  return in < LANES ? load_some(p, in) : load(p + in - LANES);
}

// y (+)= x, of which `count` numbers exist. Whole parts are copied as vectors.
template <int OUTS>
inline void put(const float* x, float* y, int64_t count, bool add) {
  if (count < OUTS) {
    for (int64_t i = 0; i < count; i++) y[i] = add ? y[i] + x[i] : x[i];
  } else if (add) {
    UNROLL for (int i = 0; i < OUTS; i++) y[i] += x[i];
  } else {
    std::memcpy(y, x, OUTS * sizeof(float));
  }
}

// y[r][o] (+)= sum_i weight[o][i] x[r][i] for OUTS outputs o, of which `outs` exist, and ROWS rows.
// There is at most one sum per lane of a vector; `sums` adds up the others for nothing. Each runs
// over i in the same order in every shape of tile. FETCH: ask for the weights of the next block of
// outputs, since the processor does not guess so many streams.
template <bool FETCH, int OUTS, int ROWS, class W>
inline void tile(const W* weight, int64_t stride, int64_t in, int64_t outs, const float* const* x,
                 float* const* y, int64_t first_out, bool add) {
  const W* w[OUTS];
  Floats v[LANES] = {};
  UNROLL for (int o = 0; o < OUTS; o++) w[o] = weight + std::min<int64_t>(o, outs - 1) * stride;
  for (int64_t i = 0; i + LANES <= in; i += LANES) {
    Floats input[ROWS];
    UNROLL for (int r = 0; r < ROWS; r++) input[r] = load(x[r] + i);
    UNROLL for (int o = 0; o < OUTS; o++) {
      Floats numbers = load(w[o] + i);
      if (FETCH) __builtin_prefetch(w[o] + i + LANES * stride);
      UNROLL for (int r = 0; r < ROWS; r++) v[r * OUTS + o] = fma(numbers, input[r], v[r * OUTS + o]);
    }
  }
  if (in % LANES) {
    Words mask = last_mask(in);
    UNROLL for (int r = 0; r < ROWS; r++) {
      Floats input = (Floats)((Words)last(x[r], in) & mask);
      UNROLL for (int o = 0; o < OUTS; o++) v[r * OUTS + o] = fma(last(w[o], in), input, v[r * OUTS + o]);
    }
  }
  float result[LANES];
  store(result, sums(v));
  UNROLL for (int r = 0; r < ROWS; r++) put<OUTS>(result + r * OUTS, y[r] + first_out, outs, add);
}

// Outputs [o, o + outs) for the rows from r on, as many as whole tiles hold; moves r.
template <int OUTS, int ROWS, class W>
inline void tile_rows(int64_t& r, int64_t rows, const W* weight, int64_t stride, int64_t in,
                      int64_t outs, const float* const* x, float* const* y, int64_t o, bool add) {
  for (; r + ROWS <= rows; r += ROWS)
    for (int64_t done = 0; done < outs; done += OUTS) {
      int64_t some = std::min<int64_t>(OUTS, outs - done);
      auto* run = r == 0 ? tile<true, OUTS, ROWS, W> : tile<false, OUTS, ROWS, W>;
      run(weight + (o + done) * stride, stride, in, some, x + r, y + r, o + done, add);
    }
}

// y[r] (+)= weight x[r], weight [out, in] with rows `stride` numbers apart.
template <class W>
void product(const W* weight, int64_t stride, int64_t out, int64_t in, const float* const* x,
             float* const* y, int64_t rows, bool add = false) {
  // Outputs in blocks, whose weights stay in the first-level cache for all rows.
  for (int64_t o = 0; o < out; o += LANES) {
    int64_t r = 0, outs = std::min<int64_t>(LANES, out - o);
    tile_rows<LANES / 4, 4>(r, rows, weight, stride, in, outs, x, y, o, add);
    tile_rows<LANES / 2, 2>(r, rows, weight, stride, in, outs, x, y, o, add);
    tile_rows<std::min(LANES, 8), 1>(r, rows, weight, stride, in, outs, x, y, o, add);
  }
}

template <int ROWS, int VECTORS, class W>
inline void mix_tile(const W* values, int64_t stride, int64_t count, int64_t width,
                     const float* const* x, float* const* y, int64_t c, const float* keep) {
  Floats v[ROWS][VECTORS] = {};
  if (keep)
    UNROLL for (int r = 0; r < ROWS; r++)
      UNROLL for (int j = 0; j < VECTORS; j++) v[r][j] = keep[r] * load(y[r] + c + j * LANES);
  // The last vector may end after the row. What it reads there is dropped, but must exist.
  int64_t left = width - c - (VECTORS - 1) * LANES, safe = left < LANES ? count - 1 : count;
  values += c;
  for (int64_t n = 0; n < safe; n++) {
    UNROLL for (int j = 0; j < VECTORS; j++) {
      Floats numbers = load(values + n * stride + j * LANES);
      UNROLL for (int r = 0; r < ROWS; r++) v[r][j] = fma(fill(x[r][n]), numbers, v[r][j]);
    }
  }
  for (int64_t n = safe; n < count; n++) {
    UNROLL for (int j = 0; j < VECTORS; j++) {
      const W* p = values + n * stride + j * LANES;
      Floats numbers = j + 1 < VECTORS ? load(p) : load_some(p, left);
      UNROLL for (int r = 0; r < ROWS; r++) v[r][j] = fma(fill(x[r][n]), numbers, v[r][j]);
    }
  }
  UNROLL for (int r = 0; r < ROWS; r++)
    UNROLL for (int j = 0; j < VECTORS; j++) store(y[r] + c + j * LANES, v[r][j]);
}

// y[r] = keep[r] y[r] + sum_n x[r][n] values[n], values [count, width]; keep null: 0. Writes whole
// vectors.
template <class W>
void mix(const W* values, int64_t stride, int64_t count, int64_t width, const float* const* x,
         float* const* y, int64_t rows, const float* keep = nullptr) {
  constexpr int WIDE = LANES == 16 ? 4 : 2;
  for (int64_t c = 0; c < width;) {
    bool wide = width - c > (WIDE - 1) * LANES;
    for (int64_t r = 0; r < rows;) {
      const float* k = keep ? keep + r : nullptr;
      if (wide && r + 4 <= rows)
        mix_tile<4, WIDE>(values, stride, count, width, x + r, y + r, c, k), r += 4;
      else if (wide)
        mix_tile<1, WIDE>(values, stride, count, width, x + r, y + r, c, k), r += 1;
      else if (r + 4 <= rows)
        mix_tile<4, 1>(values, stride, count, width, x + r, y + r, c, k), r += 4;
      else
        mix_tile<1, 1>(values, stride, count, width, x + r, y + r, c, k), r += 1;
    }
    c += (wide ? WIDE : 1) * LANES;
  }
}

// The same for weights whose dtype is known only now.
void product(const void* weight, int32_t dtype, int64_t offset, int64_t out, int64_t in, Rows x,
             Rows y, int64_t rows, bool add = false) {
  if (dtype == FP32)
    product(static_cast<const float*>(weight) + offset, in, out, in, x, y, rows, add);
  else
    product(static_cast<const uint16_t*>(weight) + offset, in, out, in, x, y, rows, add);
}

void mix(const void* values, int32_t dtype, int64_t offset, int64_t count, int64_t width, Rows x,
         Rows y, int64_t rows, const float* keep = nullptr) {
  if (dtype == FP32)
    mix(static_cast<const float*>(values) + offset, width, count, width, x, y, rows, keep);
  else
    mix(static_cast<const uint16_t*>(values) + offset, width, count, width, x, y, rows, keep);
}

// Calls f(first row, rows, offset of down, offset of up) for each group of rows with one delta.
template <class F>
void each_delta(const Map& map, int64_t rows, F f) {
  if (!map.rank) return;
  if (!map.down_stride) return f(int64_t(0), rows, int64_t(0), int64_t(0));
  for (int64_t r = 0, count; r < rows; r += count) {
    int64_t own = map.which ? map.which[r] : r;
    count = 1;
    while (map.which && r + count < rows && map.which[r + count] == own) count++;
    f(r, count, own * map.down_stride, own * map.up_stride);
  }
}

// y = (W + up down) x, for the outputs [begin, begin + out) of the map.
void apply(const Map& map, int64_t begin, int64_t out, Rows x, Rows y, int64_t rows) {
  product(map.weight, map.dtype, begin * map.in, out, map.in, x, y, rows);
  each_delta(map, rows, [&](int64_t r, int64_t count, int64_t down, int64_t up) {
    Rows small = new_rows(count, map.rank);
    product(map.down, map.delta_dtype, down, map.rank, map.in, x + r, small, count);
    up += begin * map.rank;
    product(map.up, map.delta_dtype, up, out, map.rank, small, y + r, count, true);
  });
}

Rows apply(const Map& map, Rows x, int64_t rows) {
  Rows y = new_rows(rows, map.out);
  apply(map, 0, map.out, x, y, rows);
  return y;
}

// y = (W + up down)^T x, for the outputs [begin, begin + count) of the map, which x has.
void apply_transposed(const Map& map, int64_t begin, int64_t count, Rows x, Rows y, int64_t rows) {
  mix(map.weight, map.dtype, begin * map.in, count, map.in, x, y, rows);
  each_delta(map, rows, [&](int64_t r, int64_t some, int64_t down, int64_t up) {
    Rows small = new_rows(some, map.rank);
    mix(map.up, map.delta_dtype, up + begin * map.rank, count, map.rank, x + r, small, some);
    float* ones = scratch.take<float>(some);
    std::fill(ones, ones + some, 1.0f);
    mix(map.down, map.delta_dtype, down, map.rank, map.in, small, y + r, some, ones);
  });
}

// Row by row -------------------------------------------------------------------------------------

const float* as_floats(const void* data, int32_t dtype, int64_t count) {
  if (!data || dtype == FP32) return static_cast<const float*>(data);
  float* numbers = scratch.take<float>(count);
  for (int64_t i = 0; i < count; i++) numbers[i] = number(static_cast<const uint16_t*>(data)[i]);
  return numbers;
}

void normalize(const float* x, float* y, int64_t width, const float* weight, float eps) {
  Floats squares = {};
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) squares = fma(load(x + i), load(x + i), squares);
  float sum = total(squares);
  for (; i < width; i++) sum += x[i] * x[i];
  float scale = 1 / std::sqrt(sum / width + eps);
  for (i = 0; i < width; i++) y[i] = weight ? x[i] * scale * weight[i] : x[i] * scale;
}

// y = norm(x) for each of `parts` equal parts of the row, which share the weight.
void apply(const Norm& norm, Rows x, Rows y, int64_t rows, int64_t width, int64_t parts = 1) {
  if (!norm.present) return;
  const float* weight = as_floats(norm.weight, norm.dtype, width);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t p = 0; p < parts; p++)
      normalize(x[r] + p * width, y[r] + p * width, width, weight, norm.eps);
}

void rotate(float* x, const float* cos, const float* sin, int64_t width) {
  for (int64_t i = 0, half = width / 2; i < half; i++) {
    float first = x[i], second = x[i + half];
    x[i] = first * cos[i] + second * sin[i];
    x[i + half] = second * cos[i + half] + first * sin[i + half];
  }
}

// Rotates the `rotary` numbers at `offset` of each of `parts` parts of the rows.
void rotate(const Call& call, Rows x, int64_t parts, int64_t width, int64_t offset) {
  if (!call.cos) return;
  for (int64_t r = 0; r < call.rows; r++) {
    int64_t table = r * call.table_stride;
    for (int64_t p = 0; p < parts; p++)
      rotate(x[r] + p * width + offset, call.cos + table, call.sin + table, call.rotary_dim);
  }
}

void activate(float* x, int64_t count, int32_t kind) {  // x is padded to whole vectors
  for (int64_t i = 0; i < count; i += LANES) {
    Floats v = load(x + i), out;
    if (kind == SILU) {
      out = v / (1.0f + exp_of(-v));
    } else if (kind == GELU) {  // v sigmoid(2 y) = v (1 + tanh(y)) / 2
      Floats y = 0.7978845608f * (v + 0.044715f * v * v * v);
      out = v / (1.0f + exp_of(-2.0f * y));
    } else {
      out = v > 0.0f ? v * v : Floats{};
    }
    store(x + i, out);
  }
}

// Attention --------------------------------------------------------------------------------------

struct Keys {  // of one row: columns [first, last], of which `mask` may hide some
  int64_t first, last;
  const uint8_t* mask;
};

// Where the columns of one row are: one after the other, or in pages.
template <class W>
struct Cache {
  W* start;
  const int64_t* pages;
  int64_t page_stride, page_columns, width;

  W* at(int64_t column) const {
    if (!pages) return start + column * width;
    return start + pages[column / page_columns] * page_stride + column % page_columns * width;
  }
  int64_t adjacent(int64_t column) const {  // columns that follow each other from this one on
    return pages ? page_columns - column % page_columns : INT64_MAX;
  }
};

template <class W>
Cache<W> cache_of(const Layer& layer, const Call& call, int64_t r) {
  W* kv = static_cast<W*>(call.kv);
  int64_t slot = call.slot ? call.slot[r] : 0, line = call.line ? call.line[r] : r;
  if (call.pages)
    return {kv, call.pages + line * call.page_row_stride, call.slot_stride, call.page_columns, layer.kv_width};
  return {kv + slot * call.slot_stride + line * call.line_stride, nullptr, 0, 0, layer.kv_width};
}

int64_t column_of(const Call& call, int64_t r) {
  return call.column ? call.column[r] : call.same_column;
}

Keys keys_of(const Call& call, int64_t r) {
  Keys keys{call.first ? call.first[r] : 0, column_of(call, r), nullptr};
  if (call.mask) {
    keys.mask = call.mask + r * call.mask_stride;
    while (keys.first < keys.last && !keys.mask[keys.first]) keys.first++;
  }
  return keys;
}

// Scores of a block of keys -> exp(scores - most), with the largest so far; returns their sum.
float exponentials(float* scores, int64_t count, float most) {
  Floats sum = {};
  for (int64_t i = 0; i < count; i += LANES) {
    Floats weights = exp_of(load(scores + i) - most);
    store(scores + i, weights);
    sum += weights;
  }
  return total(sum);
}

// Calls f(columns that follow each other in memory, their first one's number, their count) for the
// columns [first, first + count).
template <class W, class F>
void each_run(const Cache<W>& cache, int64_t first, int64_t count, F f) {
  for (int64_t i = 0, run; i < count; i += run) {
    run = std::min(count - i, cache.adjacent(first + i));
    f(cache.at(first + i), i, run);
  }
}

// mixed[h] = sum_k softmax_k(query[h] . keys[k]) values[k], in blocks of keys with a running
// maximum. The blocks, and so the numbers, are the same with and without pages.
template <class W>
void attend(const Keys& keys, const Cache<W>& cache, int64_t key_at, int64_t value_at,
            int64_t key_width, int64_t value_width, Rows query, Rows mixed, int64_t heads,
            Rows scores, float* numbers) {
  float *most = numbers, *sum = numbers + heads, *keep = numbers + 2 * heads;
  Rows some = scratch.take<float*>(heads);
  for (int64_t h = 0; h < heads; h++) {
    most[h] = -INFINITY, sum[h] = 0;
    std::fill(mixed[h], mixed[h] + round_up(value_width), 0.0f);
  }
  for (int64_t k = keys.first, count; k <= keys.last; k += count) {
    count = std::min(KEYS, keys.last + 1 - k);
    each_run(cache, k, count, [&](const W* columns, int64_t i, int64_t run) {
      for (int64_t h = 0; h < heads; h++) some[h] = scores[h] + i;
      product(columns + key_at, cache.width, run, key_width, query, some, heads);
    });
    for (int64_t h = 0; h < heads; h++) {
      for (int64_t i = 0; keys.mask && i < count; i++)
        if (!keys.mask[k + i]) scores[h][i] = -INFINITY;
      std::fill(scores[h] + count, scores[h] + round_up(count), -INFINITY);
      Floats high = load(scores[h]);
      for (int64_t i = LANES; i < count; i += LANES) {
        Floats next = load(scores[h] + i);
        high = next > high ? next : high;
      }
      float before = most[h];
      most[h] = std::max(before, largest(high));
      keep[h] = std::exp(before - most[h]);
      sum[h] = sum[h] * keep[h] + exponentials(scores[h], count, most[h]);
    }
    each_run(cache, k, count, [&](const W* columns, int64_t i, int64_t run) {
      for (int64_t h = 0; h < heads; h++) some[h] = scores[h] + i;
      mix(columns + value_at, cache.width, run, value_width, some, mixed, heads, keep);
      std::fill(keep, keep + heads, 1.0f);
    });
  }
  for (int64_t h = 0; h < heads; h++)
    for (int64_t i = 0; i < value_width; i++) mixed[h][i] /= sum[h];
}

void write_cache(const Layer& layer, const Call& call, int64_t r, const float* from, int64_t offset,
                 int64_t count) {
  if (call.writes && !call.writes[r]) return;
  int64_t column = column_of(call, r);
  if (call.kv_dtype == FP32)
    std::copy(from, from + count, cache_of<float>(layer, call, r).at(column) + offset);
  else
    std::transform(from, from + count, cache_of<uint16_t>(layer, call, r).at(column) + offset,
                   to_bf16);
}

bool any_writes(const Call& call) {
  return !call.writes || std::any_of(call.writes, call.writes + call.rows, [](uint8_t w) { return w; });
}

// Attention of one row for heads [begin, begin + heads), which read the same keys and values.
void attend_row(const Layer& layer, const Call& call, int64_t r, int64_t key_at, int64_t value_at,
                int64_t key_width, int64_t value_width, Rows query, Rows mixed, int64_t heads,
                Rows scores, float* numbers) {
  Keys keys = keys_of(call, r);
  if (call.kv_dtype == FP32)
    attend(keys, cache_of<float>(layer, call, r), key_at, value_at, key_width, value_width, query,
           mixed, heads, scores, numbers);
  else
    attend(keys, cache_of<uint16_t>(layer, call, r), key_at, value_at, key_width, value_width,
           query, mixed, heads, scores, numbers);
}

void project_latents(const Layer& layer, const Call& call, Rows x) {
  Rows down = apply(layer.kv_down, x, call.rows), key = part(down, call.rows, layer.latent_dim);
  int64_t rope = layer.kv_width - layer.latent_dim;
  apply(layer.kv_latent_norm, down, down, call.rows, layer.latent_dim);
  apply(layer.key_norm, key, key, call.rows, rope);
  rotate(call, key, 1, rope, 0);
  for (int64_t r = 0; r < call.rows; r++) write_cache(layer, call, r, down[r], 0, layer.kv_width);
}

// o_h = W_uv,h (softmax([W_uk,h^T q_n | q_r] [c | k_r]^T / sqrt(d)) c): all heads read the latents c.
Rows latent_attention(const Layer& layer, const Call& call, Rows x) {
  int64_t rows = call.rows, heads = layer.heads, rope = layer.kv_width - layer.latent_dim;
  int64_t width = layer.nope_dim + rope, per_head = layer.nope_dim + layer.value_dim;
  if (any_writes(call)) project_latents(layer, call, x);
  if (layer.query_down.weight) {
    x = apply(layer.query_down, x, rows);
    apply(layer.query_latent_norm, x, x, rows, layer.query_down.out);
  }
  Rows query = apply(layer.query, x, rows);
  apply(layer.query_norm, query, query, rows, width, heads);
  rotate(call, query, heads, width, layer.nope_dim);
  float scale = 1 / std::sqrt(float(width));
  Rows absorbed = new_rows(rows * heads, round_up(layer.latent_dim) + rope);
  Rows mixed = new_rows(rows * heads, layer.latent_dim), out = new_rows(rows, heads * layer.value_dim);
  Rows one_head = scratch.take<float*>(rows);
  for (int64_t h = 0; h < heads; h++) {
    for (int64_t r = 0; r < rows; r++) one_head[r] = absorbed[r * heads + h];
    apply_transposed(layer.kv_up, h * per_head, layer.nope_dim, part(query, rows, h * width), one_head,
                     rows);
    for (int64_t r = 0; r < rows; r++) {
      const float* rotated = query[r] + h * width + layer.nope_dim;
      std::copy(rotated, rotated + rope, one_head[r] + layer.latent_dim);
      for (int64_t i = 0; i < layer.kv_width; i++) one_head[r][i] *= scale;
    }
  }
  Rows scores = new_rows(heads, KEYS);
  float* numbers = scratch.take<float>(3 * heads);
  for (int64_t r = 0; r < rows; r++)
    attend_row(layer, call, r, 0, 0, layer.kv_width, layer.latent_dim, absorbed + r * heads,
               mixed + r * heads, heads, scores, numbers);
  for (int64_t h = 0; h < heads; h++) {
    for (int64_t r = 0; r < rows; r++) one_head[r] = mixed[r * heads + h];
    apply(layer.kv_up, h * per_head + layer.nope_dim, layer.value_dim, one_head,
          part(out, rows, h * layer.value_dim), rows);
  }
  return out;
}

// Queries or keys: normed, bias added, rotated.
void turn(const Layer& layer, const Call& call, Rows x, int64_t heads, const Norm& norm,
          const void* bias) {
  int64_t width = heads * layer.value_dim;
  if (layer.norm_by_width)
    apply(norm, x, x, call.rows, width);
  else
    apply(norm, x, x, call.rows, layer.value_dim, heads);
  const float* added = as_floats(bias, layer.bias_dtype, width);
  for (int64_t r = 0; added && r < call.rows; r++)
    for (int64_t i = 0; i < width; i++) x[r][i] += added[i];
  rotate(call, x, heads, layer.value_dim, 0);
}

Rows grouped_attention(const Layer& layer, const Call& call, Rows x) {
  int64_t rows = call.rows, size = layer.value_dim, keys = layer.kv_heads * size;
  if (any_writes(call)) {
    Rows key = apply(layer.key, x, rows), value = apply(layer.value, x, rows);
    turn(layer, call, key, layer.kv_heads, layer.key_norm, layer.key_bias);
    for (int64_t r = 0; r < rows; r++) {
      write_cache(layer, call, r, key[r], 0, keys);
      write_cache(layer, call, r, value[r], keys, keys);
    }
  }
  Rows query = apply(layer.query, x, rows), out = new_rows(rows, layer.heads * size);
  turn(layer, call, query, layer.heads, layer.query_norm, layer.query_bias);
  int64_t group = layer.heads / layer.kv_heads;
  // Heads of their own: attention writes whole vectors, which would reach into the next head.
  Rows own = scratch.take<float*>(group), mixed = new_rows(group, size);
  Rows scores = new_rows(group, KEYS);
  float *numbers = scratch.take<float>(3 * group), scale = 1 / std::sqrt(float(size));
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t i = 0; i < layer.heads * size; i++) query[r][i] *= scale;
    for (int64_t g = 0; g < layer.kv_heads; g++) {
      for (int64_t h = 0; h < group; h++) own[h] = query[r] + (g * group + h) * size;
      attend_row(layer, call, r, g * size, keys + g * size, size, size, own, mixed, group, scores,
                 numbers);
      for (int64_t h = 0; h < group; h++)
        std::copy(mixed[h], mixed[h] + size, out[r] + (g * group + h) * size);
    }
  }
  return out;
}

// Feed-forward -----------------------------------------------------------------------------------

// activation(gate) * up of [gate | up], or activation(up), in place; hidden features wide.
void activate(const Layer& layer, Rows x, int64_t rows, int64_t hidden) {
  float* gate = scratch.take<float>(round_up(hidden));
  for (int64_t r = 0; r < rows; r++) {
    if (!layer.gated) {
      activate(x[r], hidden, layer.activation);
      continue;
    }
    std::copy(x[r], x[r] + hidden, gate);
    activate(gate, hidden, layer.activation);
    for (int64_t i = 0; i < hidden; i++) x[r][i] = gate[i] * x[r][i + hidden];
  }
}

void scores_of(const Layer& layer, float* x) {  // of router logits, in place
  int64_t count = layer.experts;
  if (!layer.softmax_scores) {
    for (int64_t i = 0; i < count; i++) x[i] = 1 / (1 + std::exp(-x[i]));
    return;
  }
  float most = *std::max_element(x, x + count), sum = 0;
  for (int64_t i = 0; i < count; i++) sum += x[i] = std::exp(x[i] - most);
  for (int64_t i = 0; i < count; i++) x[i] /= sum;
}

// The top_k experts of one row by scores + bias, and their weights.
void route(const Layer& layer, const float* scores, const float* bias, int32_t* chosen,
           float* weights) {
  float sum = 0;
  for (int64_t k = 0; k < layer.top_k; k++) {
    int32_t best = -1;
    float most = 0;
    for (int32_t e = 0; e < layer.experts; e++) {
      float score = scores[e] + bias[e];
      bool taken = std::find(chosen, chosen + k, e) != chosen + k;
      if (!taken && (best < 0 || score > most)) best = e, most = score;
    }
    chosen[k] = best;
    weights[k] = scores[best];
    sum += weights[k];
  }
  for (int64_t k = 0; k < layer.top_k; k++)
    weights[k] *= layer.route_scale / (layer.normalize ? sum + 1e-20f : 1);
}

// y += sum_i weight_i expert_i(x), expert by expert, each for all rows that chose it.
void routed_experts(const Layer& layer, const Call& call, Rows x, Rows y, int64_t rows) {
  int64_t top_k = layer.top_k, hidden = layer.expert_dim, dim = layer.dim;
  Rows logits = apply(layer.router, x, rows);
  int64_t last = layer.bias_loops - 1;
  const float* bias =
      as_floats(layer.router_bias, layer.router_bias_dtype, layer.bias_loops * layer.experts);
  int32_t* chosen = scratch.take<int32_t>(rows * top_k);
  float* weights = scratch.take<float>(rows * top_k);
  for (int64_t r = 0; r < rows; r++) {
    scores_of(layer, logits[r]);
    int64_t loop = std::min(call.loop ? call.loop[r] : call.same_loop, last);
    route(layer, logits[r], bias + loop * layer.experts, chosen + r * top_k, weights + r * top_k);
  }
  Rows some_x = scratch.take<float*>(rows), some_y = scratch.take<float*>(rows);
  float* share = scratch.take<float>(rows);
  Rows up = new_rows(rows, 2 * hidden);
  for (int64_t e = 0; e < layer.experts; e++) {
    int64_t count = 0;
    for (int64_t i = 0; i < rows * top_k; i++) {
      if (chosen[i] != e) continue;
      some_x[count] = x[i / top_k], some_y[count] = y[i / top_k], share[count++] = weights[i];
    }
    if (!count) continue;
    product(layer.expert_up, layer.expert_dtype, e * 2 * hidden * dim, 2 * hidden, dim, some_x, up,
            count);
    activate(layer, up, count, hidden);
    for (int64_t r = 0; r < count; r++)
      for (int64_t i = 0; i < hidden; i++) up[r][i] *= share[r];
    product(layer.expert_down, layer.expert_dtype, e * dim * hidden, dim, hidden, up, some_y, count,
            true);
  }
}

Rows feed_forward(const Layer& layer, const Call& call, Rows x, int64_t rows) {
  Rows y = new_rows(rows, layer.dim);
  if (layer.dense) {  // the whole feed-forward, or the shared experts
    Rows hidden = apply(layer.up, x, rows);
    activate(layer, hidden, rows, layer.down.in);
    apply(layer.down, 0, layer.dim, hidden, y, rows);
  } else {
    for (int64_t r = 0; r < rows; r++) std::fill(y[r], y[r] + layer.dim, 0.0f);
  }
  if (layer.experts) routed_experts(layer, call, x, y, rows);
  return y;
}

// The layer --------------------------------------------------------------------------------------

Rows normed(const Norm& norm, Rows x, int64_t rows, int64_t width) {
  if (!norm.present) return x;
  Rows y = new_rows(rows, width);
  apply(norm, x, y, rows, width);
  return y;
}

// x = sum_norm(x + branch_norm(update))
void add(const Norm& branch, const Norm& sum, Rows x, Rows update, int64_t rows, int64_t width) {
  apply(branch, update, update, rows, width);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < width; i++) x[r][i] += update[r][i];
  apply(sum, x, x, rows, width);
}

Rows read_rows(const void* x, int32_t dtype, int64_t rows, int64_t width) {
  Rows y = new_rows(rows, width);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < width; i++)
      y[r][i] = dtype == FP32 ? static_cast<const float*>(x)[r * width + i]
                              : number(static_cast<const uint16_t*>(x)[r * width + i]);
  return y;
}

void write_rows(Rows x, void* y, int32_t dtype, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; r++) {
    if (dtype == FP32)
      std::copy(x[r], x[r] + width, static_cast<float*>(y) + r * width);
    else
      std::transform(x[r], x[r] + width, static_cast<uint16_t*>(y) + r * width, to_bf16);
  }
}

}  // namespace

extern "C" {

int64_t few_rows_size(int64_t which) {  // few_rows.py checks that its structs have these sizes
  const int64_t sizes[] = {sizeof(Map), sizeof(Norm), sizeof(Layer), sizeof(Call)};
  return sizes[which];
}

// y = weight x for x [rows, in], both of `dtype`.
void few_rows_linear(const void* weight, const void* x, void* y, int64_t rows, int64_t out,
                     int64_t in, int32_t weight_dtype, int32_t dtype) {
  scratch.reset();
  Rows from = read_rows(x, dtype, rows, in), to;
  if (dtype == FP32) {  // an output may be a vocabulary wide: no copy of it
    to = scratch.take<float*>(rows);
    for (int64_t r = 0; r < rows; r++) to[r] = static_cast<float*>(y) + r * out;
  } else {
    to = new_rows(rows, out);
  }
  product(weight, weight_dtype, 0, out, in, from, to, rows);
  if (dtype != FP32) write_rows(to, y, dtype, rows, out);
}

void few_rows_layer(const Layer* layer, const Call* call) {
  scratch.reset();
  int64_t rows = call->rows, dim = layer->dim;
  Rows x = read_rows(call->x, call->dtype, rows, dim);
  Rows input = normed(layer->attention_norm, x, rows, dim);
  Rows heads = layer->attention == LATENT ? latent_attention(*layer, *call, input)
                                          : grouped_attention(*layer, *call, input);
  Rows update = apply(layer->output, heads, rows);
  add(layer->attention_branch_norm, layer->attention_sum_norm, x, update, rows, dim);
  update = feed_forward(*layer, *call, normed(layer->feed_forward_norm, x, rows, dim), rows);
  add(layer->feed_forward_branch_norm, layer->feed_forward_sum_norm, x, update, rows, dim);
  write_rows(x, call->out, call->dtype, rows, dim);
}
}
