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
