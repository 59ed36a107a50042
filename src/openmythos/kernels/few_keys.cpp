// Softmax attention with few keys, in fp32: o = p v, p = softmax(s), s = scale q k^T, and its
// gradients. One head at a time, whose numbers stay in the processor's cache. The formula in plain
// torch: `reference` in attention.py.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "vectors.h"

namespace {

constexpr int MOST_VECTORS = LANES == 16 ? 4 : 2;  // in a row of a tile, which stays in registers
constexpr int64_t TOGETHER = 8;                    // queries, or keys, that are computed at a time
constexpr float INFINITE = std::numeric_limits<float>::infinity();

inline int64_t padded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// A matrix whose number (row, column) is at p[row * down + column * along].
struct Matrix {
  const float* p;
  int64_t down, along = 1;
};

// C [ROWS, VECTORS * LANES] = A B, or += if `add`; A [ROWS, inner]. Every number is summed in the
// order of `inner`, whatever the tile.
template <int ROWS, int VECTORS>
inline void tile(Matrix a, Matrix b, float* c, int64_t down, int64_t inner, bool add) {
  Floats sums[ROWS][VECTORS] = {};
  if (add)
    UNROLL for (int r = 0; r < ROWS; r++)
      UNROLL for (int v = 0; v < VECTORS; v++) sums[r][v] = load(c + r * down + v * LANES);
  for (int64_t i = 0; i < inner; i++, b.p += b.down) {
    Floats numbers[VECTORS];
    UNROLL for (int v = 0; v < VECTORS; v++) numbers[v] = load(b.p + v * LANES);
    UNROLL for (int r = 0; r < ROWS; r++) {
      Floats x = fill(a.p[r * a.down + i * a.along]);
      UNROLL for (int v = 0; v < VECTORS; v++) sums[r][v] = fma(x, numbers[v], sums[r][v]);
    }
  }
  UNROLL for (int r = 0; r < ROWS; r++)
    UNROLL for (int v = 0; v < VECTORS; v++) store(c + r * down + v * LANES, sums[r][v]);
}

template <int VECTORS>
void strip(Matrix a, Matrix b, float* c, int64_t down, int64_t rows, int64_t inner, bool add) {
  constexpr int MOST = VECTORS <= MOST_VECTORS / 2 ? TOGETHER : TOGETHER / 2;
  auto next = [&](int64_t count) { a.p += count * a.down, c += count * down, rows -= count; };
  for (; rows >= MOST; next(MOST)) tile<MOST, VECTORS>(a, b, c, down, inner, add);
  for (; rows >= 2; next(2)) tile<2, VECTORS>(a, b, c, down, inner, add);
  if (rows) tile<1, VECTORS>(a, b, c, down, inner, add);
}

// C [rows, columns] = A B, or += if `add`; `columns` is a multiple of LANES, and B has no `along`.
void product(Matrix a, Matrix b, float* c, int64_t down, int64_t rows, int64_t columns,
             int64_t inner, bool add = false) {
  for (int64_t left = columns / LANES; left > 0;) {
    int64_t now = std::min<int64_t>(left, MOST_VECTORS);
    if (now == 1) strip<1>(a, b, c, down, rows, inner, add);
    if (now == 2) strip<2>(a, b, c, down, rows, inner, add);
    if (now == 3) strip<MOST_VECTORS == 4 ? 3 : 1>(a, b, c, down, rows, inner, add);
    if (now == 4) strip<MOST_VECTORS == 4 ? 4 : 1>(a, b, c, down, rows, inner, add);
    left -= now, b.p += now * LANES, c += now * LANES;
  }
}

// Rows whose width is a multiple of LANES: those in memory, or a copy padded with zeros in `room`.
Matrix whole(Matrix from, int64_t rows, int64_t width, float* room) {
  if (width % LANES == 0) return from;
  int64_t down = padded(width);
  for (int64_t r = 0; r < rows; r++)
    over(width, [&](int64_t i, auto get, auto) {
      store(room + r * down + i, get(from.p + r * from.down + i));
    });
  return {room, down};
}

// factor times the transpose of rows: [width, padded(rows)], padded with zeros.
Matrix transposed(Matrix from, int64_t rows, int64_t width, float factor, float* room) {
  int64_t down = padded(rows);
  for (int64_t r = 0; r < rows; r += LANES)
    over(width, [&](int64_t i, auto get, auto) {
      Floats lines[LANES] = {};
      int64_t some = std::min<int64_t>(LANES, rows - r);
      for (int64_t l = 0; l < some; l++) lines[l] = get(from.p + (r + l) * from.down + i) * factor;
      transpose(lines);
      some = std::min<int64_t>(LANES, width - i);
      for (int64_t l = 0; l < some; l++) store(room + (i + l) * down + r, lines[l]);
    });
  return {room, down};
}

// Writes to rows in memory: at once if their width is a multiple of LANES, else by way of `room`.
struct Target {
  float* p;
  int64_t down, rows, width;
  float *room, *to;
  int64_t step;

  Target(float* p, int64_t down, int64_t rows, int64_t width, float* room)
      : p(p), down(down), rows(rows), width(width), room(room) {
    to = width % LANES ? room : p, step = width % LANES ? padded(width) : down;
  }

  // All rows times `factor`.
  void finish(float factor) {
    for (int64_t r = 0; r < rows; r++) finish(r, factor);
  }

  void finish(int64_t r, float factor) {
    over(width, [&](int64_t i, auto, auto put) {
      put(p + r * down + i, load(to + r * step + i) * factor);
    });
  }
};

inline Words shown_by(const uint8_t* mask, int64_t count) {  // of at most LANES keys: -1 or 0
  typedef uint8_t Bytes __attribute__((vector_size(LANES)));
  Bytes bytes = {};
  std::memcpy(&bytes, mask, std::min<int64_t>(count, LANES));
  return __builtin_convertvector(bytes, Words) != 0;
}

// exp(x), and nan where x is: exp_of would lose it.
inline Floats exponential(Floats x) {
  Floats y = exp_of(x);
  return x == x ? y : x;
}

}  // namespace

extern "C" {

// Sizes, and distances in memory from one row of the batch, head and position to the next. The
// numbers of a position are neighbours.
struct Sizes {
  int64_t batch, kv_heads, group, queries, keys, width, value_width;
  int64_t q[3], k[3], v[3], o[3], dq[3], dk[3], dv[3];
  int64_t mask[2];    // of row of the batch, and query
  int64_t is_causal;  // hides later keys, with a mask too
  float scale;
};

}  // extern "C"

namespace {

// Memory for one head.
struct Room {
  std::vector<float> all;
  float *kt, *v, *p, *o, *vt, *k, *q, *g, *ds, *dq, *dk, *dv;

  explicit Room(const Sizes& s) {
    int64_t wide = padded(s.width), value_wide = padded(s.value_width), keys = padded(s.keys);
    int64_t qs = s.queries * wide, ks = s.keys * wide, os = s.queries * value_wide;
    int64_t vs = s.keys * value_wide, scores = s.queries * keys;
    int64_t kts = s.width * keys, vts = s.value_width * keys;
    float** places[] = {&kt, &v, &p, &o, &vt, &k, &q, &g, &ds, &dq, &dk, &dv};
    int64_t sizes[] = {kts, vs, scores, os, vts, ks, qs, os, scores, qs, ks, vs};
    int64_t total = LANES;
    for (int64_t size : sizes) total += padded(size);
    all.resize(total);
    auto address = reinterpret_cast<uintptr_t>(all.data());
    float* next = all.data() + (-address % (4 * LANES)) / 4;
    for (int i = 0; i < 12; i++) *places[i] = next, next += padded(sizes[i]);
  }
};

struct Head {
  const Sizes& s;
  const uint8_t* mask;
  Matrix q, kt;
  float* p;

  int64_t keys_of(int64_t query) const {  // the first so many may be seen
    return s.is_causal ? s.keys - s.queries + query + 1 : s.keys;
  }

  // Scores of queries [from, to), and -inf where a key is hidden, for padded(keys_of(to - 1)) keys.
  void scores(int64_t from, int64_t to) const {
    int64_t down = padded(s.keys), columns = padded(keys_of(to - 1));
    float* rows = p + from * down;
    product({q.p + from * q.down, q.down}, kt, rows, down, to - from, columns, s.width);
#define PLACE(lane) lane
    const Words lanes = {EACH_LANE(PLACE)};
#undef PLACE
    for (int64_t i = from; i < to; i++, rows += down) {
      int64_t end = keys_of(i);
      for (int64_t j = mask ? 0 : end / LANES * LANES; j < columns; j += LANES) {
        Words shown = lanes < int32_t(end - j);
        if (mask && j < s.keys) shown &= shown_by(mask + i * s.mask[1] + j, s.keys - j);
        store(rows + j, shown ? load(rows + j) : fill(-INFINITE));
      }
    }
  }
};

}  // namespace

extern "C" {

// o, and for each query the greatest score and 1 / sum of exp(s - it): 0 where no key is seen.
// mask: nullptr, or bytes, 0 where a key is hidden. tops and parts: [batch, heads, queries].
void few_keys_forward(const Sizes* sizes, const float* q, const float* k, const float* v,
                      const uint8_t* mask, float* o, float* tops, float* parts) {
  const Sizes& s = *sizes;
  Room room(s);
  int64_t down = padded(s.keys), value_wide = padded(s.value_width);
  for (int64_t b = 0; b < s.batch; b++) {
    for (int64_t h = 0; h < s.kv_heads * s.group; h++, tops += s.queries, parts += s.queries) {
      int64_t kv = h / s.group;
      Matrix key{k + b * s.k[0] + kv * s.k[1], s.k[2]}, value{v + b * s.v[0] + kv * s.v[1], s.v[2]};
      if (h % s.group == 0) transposed(key, s.keys, s.width, s.scale, room.kt);
      value = whole(value, s.keys, s.value_width, room.v);
      Head head{s, mask ? mask + b * s.mask[0] : nullptr, {q + b * s.q[0] + h * s.q[1], s.q[2]},
                {room.kt, down}, room.p};
      Target out(o + b * s.o[0] + h * s.o[1], s.o[2], s.queries, s.value_width, room.o);
      for (int64_t from = 0; from < s.queries; from += TOGETHER) {
        int64_t to = std::min(s.queries, from + TOGETHER), end = head.keys_of(to - 1);
        head.scores(from, to);
        for (int64_t i = from; i < to; i++) {
          float* row = room.p + i * down;
          Floats most = fill(-INFINITE), sums = {};
          for (int64_t j = 0; j < end; j += LANES) {
            Floats x = load(row + j);
            most = x > most ? x : most;
          }
          float top = largest(most);
          if (top == -INFINITE) top = 0;
          for (int64_t j = 0; j < end; j += LANES) {
            Floats x = exponential(load(row + j) - top);
            sums += x;
            store(row + j, x);
          }
          float sum = total(sums);
          tops[i] = top, parts[i] = sum == 0 ? 0 : 1 / sum;
        }
        product({room.p + from * down, down}, value, out.to + from * out.step, out.step, to - from,
                value_wide, end);
        for (int64_t i = from; i < to; i++) out.finish(i, parts[i]);
      }
    }
  }
}

// With g = dL/do: dL/dv = p^T g, ds = p (g v^T - rowsum(g o)), dL/dq = scale ds k,
// dL/dk = scale ds^T q. g lies in memory as o does.
void few_keys_backward(const Sizes* sizes, const float* q, const float* k, const float* v,
                       const uint8_t* mask, const float* o, const float* tops, const float* parts,
                       const float* g, float* dq, float* dk, float* dv) {
  const Sizes& s = *sizes;
  Room room(s);
  int64_t wide = padded(s.width), value_wide = padded(s.value_width), down = padded(s.keys);
  for (int64_t b = 0; b < s.batch; b++) {
    for (int64_t h = 0; h < s.kv_heads * s.group; h++, tops += s.queries, parts += s.queries) {
      int64_t kv = h / s.group;
      bool first = h % s.group == 0;
      Matrix query{q + b * s.q[0] + h * s.q[1], s.q[2]}, key{k + b * s.k[0] + kv * s.k[1], s.k[2]};
      Matrix value{v + b * s.v[0] + kv * s.v[1], s.v[2]}, out{o + b * s.o[0] + h * s.o[1], s.o[2]};
      Matrix grad{g + (out.p - o), s.o[2]};
      if (first) {
        transposed(key, s.keys, s.width, s.scale, room.kt);
        transposed(value, s.keys, s.value_width, 1.0f, room.vt);
      }
      Head head{s, mask ? mask + b * s.mask[0] : nullptr, query, {room.kt, down}, room.p};
      key = whole(key, s.keys, s.width, room.k);
      Target to_q(dq + b * s.dq[0] + h * s.dq[1], s.dq[2], s.queries, s.width, room.dq);
      Target to_k(dk + b * s.dk[0] + kv * s.dk[1], s.dk[2], s.keys, s.width, room.dk);
      Target to_v(dv + b * s.dv[0] + kv * s.dv[1], s.dv[2], s.keys, s.value_width, room.dv);
      for (int64_t from = 0; from < s.queries; from += TOGETHER) {
        int64_t to = std::min(s.queries, from + TOGETHER), end = head.keys_of(to - 1);
        head.scores(from, to);
        product({grad.p + from * grad.down, grad.down}, {room.vt, down}, room.ds + from * down,
                down, to - from, padded(end), s.value_width);
        for (int64_t i = from; i < to; i++) {
          float *p = room.p + i * down, *ds = room.ds + i * down;
          Floats along = {};
          over(s.value_width, [&](int64_t c, auto get, auto) {
            along = fma(get(out.p + i * out.down + c), get(grad.p + i * grad.down + c), along);
          });
          float sum = total(along);
          for (int64_t j = 0; j < padded(end); j += LANES) {
            Floats x = exponential(load(p + j) - tops[i]) * parts[i];
            store(p + j, x);
            store(ds + j, x * (load(ds + j) - sum));
          }
          std::fill(p + padded(end), p + down, 0.0f);
          std::fill(ds + padded(end), ds + down, 0.0f);
        }
        product({room.ds + from * down, down}, key, to_q.to + from * to_q.step, to_q.step,
                to - from, wide, end);
        for (int64_t i = from; i < to; i++) to_q.finish(i, s.scale);
      }
      query = whole(query, s.queries, s.width, room.q);
      grad = whole(grad, s.queries, s.value_width, room.g);
      for (int64_t from = 0; from < s.keys; from += TOGETHER) {
        int64_t to = std::min(s.keys, from + TOGETHER);
        // Earlier queries do not see these keys.
        int64_t skip = s.is_causal ? std::max<int64_t>(0, from - (s.keys - s.queries)) : 0;
        int64_t seen = s.queries - skip, start = skip * down + from;
        product({room.ds + start, 1, down}, {query.p + skip * query.down, query.down},
                to_k.to + from * to_k.step, to_k.step, to - from, wide, seen, !first);
        product({room.p + start, 1, down}, {grad.p + skip * grad.down, grad.down},
                to_v.to + from * to_v.step, to_v.step, to - from, value_wide, seen, !first);
      }
      if ((h + 1) % s.group == 0) to_k.finish(s.scale), to_v.finish(1.0f);
    }
  }
}

}  // extern "C"
