// The products of a tile with queries, keys and values as they lie in memory, by the BLAS that torch brings.
#pragma once
#include "call.h"

namespace {

// Of the forward pass.
template <typename F>
struct Direct {
  static constexpr bool WHOLE_TILES = false;  // a tile may be as narrow as the keys that are seen
  using Held = F;

  explicit Direct(Call<F>& c) : c(c) {}

  void begin(Scratch<F>&, int64_t, int64_t, int64_t, int64_t) const {}
  void end() const {}

  // Writes the scaled dot products of queries [i0, i0 + rows) with keys [k0, k1), rows KEYS apart.
  void scores(Scratch<F>& x, int64_t b, int64_t h, int64_t i0, int64_t rows, int64_t k0, int64_t k1) const {
    gemm<F>(false, true, rows, k1 - k0, c.width, c.scaling, c.query(b, h) + i0 * c.q_row, c.q_row,
            c.key(b, h) + k0 * c.k_row, c.k_row, 0, x.scores.data(), KEYS);
  }

  void weighed(Scratch<F>&, int64_t) const {}

  // Adds the weighted sums of values [k0, k1) to `x.out`.
  void add_values(Scratch<F>& x, int64_t b, int64_t h, int64_t rows, int64_t k0, int64_t k1) const {
    gemm<F>(false, false, rows, c.value_width, k1 - k0, 1, x.scores.data(), KEYS, c.value(b, h) + k0 * c.v_row,
            c.v_row, 1, x.out.data(), c.value_width);
  }

  const Call<F>& c;
};

// Of the forward pass with few queries, as in decoding: a key is read once and not copied, in half precision either.
template <typename F, typename S>
struct Few {
  static constexpr bool WHOLE_TILES = false;
  static constexpr int64_t MOST = 8;
  using Held = S;

  explicit Few(Call<F, S>& c) : c(c) {}

  void begin(Scratch<F>& x, int64_t b, int64_t h, int64_t i0, int64_t rows) const {
    x.wide.resize(rows * c.width);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < c.width; ++d)
        x.wide[r * c.width + d] = F(c.query(b, h)[(i0 + r) * c.q_row + d]) * c.scaling;
  }
  void end() const {}

  void scores(Scratch<F>& x, int64_t b, int64_t h, int64_t, int64_t rows, int64_t k0, int64_t k1) const {
    const S* k = c.key(b, h);
    for (int64_t r = 0; r < rows; ++r) {
      const F* q = x.wide.data() + r * c.width;
      F* out = x.scores.data() + r * KEYS - k0;
      int64_t j = k0;
      for (; j + 4 <= k1; j += 4) {
        const S *a = k + j * c.k_row, *e = a + c.k_row, *f = e + c.k_row, *g = f + c.k_row;
        F s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
        for (int64_t d = 0; d < c.width; ++d)
          s0 += q[d] * F(a[d]), s1 += q[d] * F(e[d]), s2 += q[d] * F(f[d]), s3 += q[d] * F(g[d]);
        out[j] = s0, out[j + 1] = s1, out[j + 2] = s2, out[j + 3] = s3;
      }
      for (; j < k1; ++j) out[j] = dot<F>(q, k + j * c.k_row, c.width);
    }
  }

  void weighed(Scratch<F>&, int64_t) const {}

  void add_values(Scratch<F>& x, int64_t b, int64_t h, int64_t rows, int64_t k0, int64_t k1) const {
    for (int64_t r = 0; r < rows; ++r) {
      const F* w = x.scores.data() + r * KEYS - k0;
      F* out = x.out.data() + r * c.value_width;
      int64_t j = k0;
      for (; j + 4 <= k1; j += 4) {
        const S *a = c.value(b, h) + j * c.v_row, *e = a + c.v_row, *f = e + c.v_row, *g = f + c.v_row;
        const F w0 = w[j], w1 = w[j + 1], w2 = w[j + 2], w3 = w[j + 3];
#pragma omp simd
        for (int64_t d = 0; d < c.value_width; ++d)
          out[d] += (w0 * F(a[d]) + w1 * F(e[d])) + (w2 * F(f[d]) + w3 * F(g[d]));
      }
      for (; j < k1; ++j)
        for (int64_t d = 0; d < c.value_width; ++d) out[d] += w[j] * F(c.value(b, h)[j * c.v_row + d]);
    }
  }

  const Call<F, S>& c;
};

// Of the backward pass over one head: the tile is a range of keys, and the block one of queries.
template <typename F>
struct DirectBackward {
  static constexpr bool WHOLE_TILES = false;
  using Held = F;

  DirectBackward(Call<F>& c, const Tensor& grad)
      : c(c), dq(at::zeros({c.batch, c.queries, c.heads, c.width}, grad.options())),
        dk(at::zeros({c.batch, c.heads, c.keys, c.width}, grad.options())),
        dv(at::zeros({c.batch, c.heads, c.keys, c.value_width}, grad.options())), grad(grad) {}

  struct Head {
    const DirectBackward& all;
    Scratch<F>& x;
    const F *q, *k, *v, *g;
    F *dq, *dk, *dv;

    Head(const DirectBackward& all, Scratch<F>& x, int64_t b, int64_t h)
        : all(all), x(x), q(all.c.query(b, h)), k(all.c.key(b, h)), v(all.c.value(b, h)),
          g(all.grad.const_data_ptr<F>() + b * all.grad.stride(0) + h * all.grad.stride(1)),
          dq(all.dq.data_ptr<F>() + b * all.dq.stride(0) + h * all.dq.stride(2)),
          dk(all.dk.data_ptr<F>() + b * all.dk.stride(0) + h * all.dk.stride(1)),
          dv(all.dv.data_ptr<F>() + b * all.dv.stride(0) + h * all.dv.stride(1)) {}

    void begin(int64_t, int64_t) {}

    // Writes the scores, and the dot products of the output's gradient with the values.
    void scores(int64_t i0, int64_t rows, int64_t k0, int64_t k1) {
      const Call<F>& c = all.c;
      const int64_t g_row = all.grad.stride(2);
      gemm<F>(false, true, rows, k1 - k0, c.width, c.scaling, q + i0 * c.q_row, c.q_row, k + k0 * c.k_row, c.k_row, 0,
              x.scores.data(), KEYS);
      gemm<F>(false, true, rows, k1 - k0, c.value_width, 1, g + i0 * g_row, g_row, v + k0 * c.v_row, c.v_row, 0,
              x.dots.data(), KEYS);
    }

    // Adds to the gradients, from the weights and the gradients of the scores.
    void accumulate(int64_t i0, int64_t rows, int64_t k0, int64_t k1) {
      const Call<F>& c = all.c;
      const int64_t width = k1 - k0, wide = c.value_width, g_row = all.grad.stride(2), dq_row = all.dq.stride(1);
      gemm<F>(true, false, width, wide, rows, 1, x.weights.data(), KEYS, g + i0 * g_row, g_row, 1, dv + k0 * wide,
              wide);
      gemm<F>(true, false, width, c.width, rows, c.scaling, x.dots.data(), KEYS, q + i0 * c.q_row, c.q_row, 1,
              dk + k0 * c.width, c.width);
      gemm<F>(false, false, rows, c.width, width, c.scaling, x.dots.data(), KEYS, k + k0 * c.k_row, c.k_row, 1,
              dq + i0 * dq_row, dq_row);
    }

    void end_tile(int64_t, int64_t) {}
    void end() {}
  };

  const Call<F>& c;
  const Tensor dq, dk, dv, grad;
};

}  // namespace
