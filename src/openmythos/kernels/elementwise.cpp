// Formulas of training that are not matrix products, each in one pass over memory. All numbers are
// fp32. The formulas in plain torch: `reference` in norm.py, gated.py and rope.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "vectors.h"

namespace {

// Rows whose parts of a weight's gradient are summed before they join the others: long sums of fp32
// numbers lose digits.
constexpr int64_t TOGETHER = 64;

// Below, silu(g) is 0 to the last digit of fp32, and exp(-g) overflows.
inline Floats bounded(Floats gate) {
  const Floats low = fill(-88.0f);
  return gate < low ? low : gate;
}

}  // namespace

extern "C" {

// y = x s weight with s = 1 / sqrt(mean(x^2) + eps); x, y [rows, dim], scale s [rows].
void elementwise_norm(const float* x, const float* weight, float* y, float* scale, int64_t rows,
                      int64_t dim, float eps) {
  for (int64_t r = 0; r < rows; r++, x += dim, y += dim) {
    Floats squares = {};
    over(dim, [&](int64_t i, auto get, auto) {
      Floats v = get(x + i);
      squares = fma(v, v, squares);
    });
    float s = scale[r] = 1.0f / std::sqrt(total(squares) / dim + eps);
    over(dim, [&](int64_t i, auto get, auto put) { put(y + i, get(x + i) * s * get(weight + i)); });
  }
}

// dx = s w grad - x s^3 (grad x . w) / dim and dw = sum over rows of s grad x.
void elementwise_norm_backward(const float* grad, const float* x, const float* weight,
                               const float* scale, float* dx, float* dw, int64_t rows,
                               int64_t dim) {
  std::vector<float> part(dim);
  std::fill(dw, dw + dim, 0.0f);
  for (int64_t r = 0; r < rows; r++, grad += dim, x += dim, dx += dim) {
    float s = scale[r];
    Floats along = {};
    over(dim, [&](int64_t i, auto get, auto put) {
      Floats product = get(grad + i) * get(x + i);
      along = fma(product, get(weight + i), along);
      put(part.data() + i, fma(product, fill(s), get(part.data() + i)));
    });
    float back = -total(along) * s * s * s / dim;
    over(dim, [&](int64_t i, auto get, auto put) {
      put(dx + i, fma(get(x + i), fill(back), get(grad + i) * get(weight + i) * s));
    });
    if ((r + 1) % TOGETHER == 0 || r + 1 == rows) {
      over(dim, [&](int64_t i, auto get, auto put) {
        put(dw + i, get(dw + i) + get(part.data() + i));
      });
      std::fill(part.begin(), part.end(), 0.0f);
    }
  }
}

// y = silu(g) u for rows [g | u] of gated [rows, 2 width]; y [rows, width].
void elementwise_gate(const float* gated, float* y, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; r++, gated += 2 * width, y += width)
    over(width, [&](int64_t i, auto get, auto put) {
      Floats gate = bounded(get(gated + i));
      put(y + i, gate / (1.0f + exp_of(-gate)) * get(gated + width + i));
    });
}

// The gradient of [g | u] from that of silu(g) u, in whose place silu(g) u is written.
void elementwise_gate_backward(const float* gated, float* grad, float* found, int64_t rows,
                               int64_t width) {
  for (int64_t r = 0; r < rows; r++, gated += 2 * width, found += 2 * width, grad += width)
    over(width, [&](int64_t i, auto get, auto put) {
      Floats gate = bounded(get(gated + i)), up = get(gated + width + i), d = get(grad + i);
      Floats sigmoid = 1.0f / (1.0f + exp_of(-gate)), silu = gate * sigmoid;
      put(found + i, d * up * (sigmoid + silu - silu * sigmoid));
      put(found + width + i, d * silu);
      put(grad + i, silu * up);
    });
}

// y_i = x_i cos_i + x_{i + dim/2} sin_i (indices modulo dim), for x and y [batch, heads, seq, dim]
// with these strides; tables [batch, seq, dim]. sign = -1: the inverse rotation.
void elementwise_rotate(const float* x, const float* cos, const float* sin, float* y,
                        const int64_t* sizes, const int64_t* x_strides, const int64_t* y_strides,
                        int64_t table_stride, float sign) {
  int64_t seq = sizes[2], half = sizes[3] / 2;
  for (int64_t b = 0; b < sizes[0]; b++)
    for (int64_t s = 0; s < seq; s++) {
      const float* c = cos + b * table_stride + s * 2 * half;
      const float* n = sin + b * table_stride + s * 2 * half;
      for (int64_t h = 0; h < sizes[1]; h++) {
        const float* from = x + b * x_strides[0] + h * x_strides[1] + s * x_strides[2];
        float* to = y + b * y_strides[0] + h * y_strides[1] + s * y_strides[2];
        over(half, [&](int64_t i, auto get, auto put) {
          Floats first = get(from + i), second = get(from + half + i);
          put(to + i, fma(second, get(n + i) * sign, first * get(c + i)));
          put(to + half + i, fma(first, get(n + half + i) * sign, second * get(c + half + i)));
        });
      }
    }
}

}  // extern "C"
