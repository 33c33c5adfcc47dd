// The backward pass.
#pragma once
#include "call.h"

namespace {

// Gradients of everything a swap may learn; what is not asked for comes back empty. `out` is the output, or for row
// swaps the mean that stands in for it; in half precision either may come unrounded.
template <typename F, typename Products>
std::vector<Tensor> backward(const Tensor& grad, const Tensor& out, const Tensor& shifts, const Tensor& inverses,
                             at::ArrayRef<int64_t> wanted, ARGUMENTS) {
  using S = typename Products::Held;
  auto c = make_call<F, S>(path, query, key, value, kv_heads, first, last, keep, mask, bias, row_scale, row_bias,
                           key_bias, sinks, params, count, scaling, softcap, tolerance, training);
  TORCH_CHECK((grad.stride(3) == 1 || grad.size(3) == 1) && (out.stride(3) == 1 || out.size(3) == 1), "attnswap: rows of floats expected");
  const ProgramOf<F>& maths = *c.maths;
  const bool want_scale = wanted[0], want_row = wanted[1], want_key = wanted[2], want_sinks = wanted[3],
             want_params = wanted[4];
  const Products products(c, grad);
  const auto floats_of = shifts.options();
  // One tensor each: torch expects that what an operator returns shares no memory.
  const auto none = [&] { return at::empty({0}, floats_of); };
  Tensor dscale = want_scale ? at::zeros_like(shifts) : none(), drow = want_row ? at::zeros_like(shifts) : none();
  Tensor dkey = want_key ? at::zeros({c.batch, c.heads, c.keys}, floats_of) : none();
  Tensor dsinks = want_sinks ? at::zeros({c.batch, c.heads}, floats_of) : none();
  Tensor dparams = want_params ? at::zeros({c.batch, c.heads, maths.params}, floats_of) : none();
  const int64_t blocks = (c.queries + ROWS - 1) / ROWS, tiles = (c.keys + KEYS - 1) / KEYS;
  const int64_t wide = c.value_width;
  const std::vector<F> norms = key_norms(c);

  run_tasks<F>(c.batch * c.heads, [&](int64_t task, Scratch<F>& x) {
    const int64_t b = task / c.heads, h = task % c.heads;
    const F* p = c.params + h * maths.params;
    const S *q = c.query(b, h), *g = grad.const_data_ptr<S>() + b * grad.stride(0) + h * grad.stride(1);
    const int64_t o_head = b * out.stride(0) + h * out.stride(1);
    const bool rounded = out.scalar_type() == grad.scalar_type();
    const S* o = rounded ? out.const_data_ptr<S>() + o_head : nullptr;
    const F* u = rounded ? nullptr : out.const_data_ptr<F>() + o_head;
    const F* m = shifts.const_data_ptr<F>() + task * c.queries;
    const F* z = inverses.const_data_ptr<F>() + task * c.queries;
    const int64_t g_row = grad.stride(2), o_row = out.stride(2);
    const bool capped = c.softcap > 0, caps = capped || want_scale;
    x.scores.resize(ROWS * KEYS), x.dots.resize(ROWS * KEYS), x.weights.resize(ROWS * KEYS);
    x.caps.resize(caps ? KEYS : 0), x.key_part.resize(KEYS), x.kept.resize(KEYS);

    std::vector<F> delta(c.queries), block_norm(norms.empty() ? 0 : blocks);
    std::vector<Span> spans(blocks);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t i0 = block * ROWS, i1 = std::min(i0 + ROWS, c.queries);
      spans[block] = keys_of(c, b, i0, i1);
      if (!norms.empty()) block_norm[block] = largest_norm<F>(q + i0 * c.q_row, i1 - i0, c.q_row, c.width);
    }
    for (int64_t i = 0; i < c.queries; ++i) {
      const F sum = rounded ? dot<F>(g + i * g_row, o + i * o_row, wide) : dot<F>(g + i * g_row, u + i * o_row, wide);
      delta[i] = sum;
      if (!want_sinks && !want_params) continue;
      const F n = c.count ? c.count[b * c.count_batch + h * c.count_head + i] : F(0);
      if (want_sinks) dsinks.data_ptr<F>()[task] -= maths.norm_slope(c.sinks[h], m[i], p) * sum * z[i];
      if (want_params) {
        F* slopes = dparams.data_ptr<F>() + task * maths.params;
        maths.null_by_param(m[i], n, p, -sum * z[i], slopes);
        if (c.sinks) maths.norm_by_param(c.sinks[h], m[i], p, -sum * z[i], slopes);
      }
    }
    typename Products::Head head(products, x, b, h);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t k0 = tile * KEYS, k1 = std::min(k0 + KEYS, c.keys);
      const int64_t width = Products::WHOLE_TILES ? KEYS : k1 - k0;
      head.begin(k0, k1);
      const double centre = centre_of(c, b, h, k0, k1, x.key_part);
      for (int64_t block = 0; block < blocks; ++block) {
        if (spans[block].last <= k0 || spans[block].first >= k1) continue;
        const int64_t i0 = block * ROWS, i1 = std::min(i0 + ROWS, c.queries), rows = i1 - i0;
        if (!norms.empty() &&
            negligible(c, b, h, i0, i1, k0, k1, block_norm[block], norms[(b * c.kv_heads + c.owner[h]) * tiles + tile],
                       m + i0))
          continue;
        head.scores(i0, rows, k0, k1);
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t i = i0 + r;
          F *s = x.scores.data() + r * KEYS, *dot = x.dots.data() + r * KEYS, *w = x.weights.data() + r * KEYS;
          const Row row = visible(c, b, h, i, k0, k1, x.kept);
          if (row.to <= row.from || z[i] == 0) {
            std::fill(dot, dot + width, F(0)), std::fill(w, w + width, F(0));
            continue;
          }
          finish_scores(c, b, h, i, k0, k1, row, s, x.key_part.data(), centre, caps ? x.caps.data() : nullptr);
          const int64_t size = row.to - row.from;
          const uint8_t* kept = row.keep ? row.keep + row.from : nullptr;
          std::fill(w, w + row.from, F(0)), std::fill(w + row.to, w + width, F(0));
          std::fill(dot, dot + row.from, F(0)), std::fill(dot + row.to, dot + width, F(0));
          if (want_params)
            maths.weigh_by_param(s + row.from, dot + row.from, size, m[i], z[i], delta[i], p, kept,
                                 dparams.data_ptr<F>() + task * maths.params);
          // From here on `dot` holds the gradient of the score.
          maths.slopes(s + row.from, dot + row.from, w + row.from, size, m[i], z[i], delta[i], p, kept);
          if (want_row) {
            F sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = row.from; j < row.to; ++j) sum += dot[j];
            drow.data_ptr<F>()[task * c.queries + i] += sum;
          }
          if (want_key) {
            F* sums = dkey.data_ptr<F>() + task * c.keys + k0;
#pragma omp simd
            for (int64_t j = row.from; j < row.to; ++j) sums[j] += dot[j];
          }
          if (want_scale) {
            F sum = 0;
            const F* cap = x.caps.data();
#pragma omp simd reduction(+ : sum)
            for (int64_t j = row.from; j < row.to; ++j) sum += dot[j] * cap[j];
            dscale.data_ptr<F>()[task * c.queries + i] += sum;
          }
          if (c.row_scale) {
            const F scale = c.row_scale[task * c.queries + i];
#pragma omp simd
            for (int64_t j = row.from; j < row.to; ++j) dot[j] *= scale;
          }
          if (capped) {
            const F* cap = x.caps.data();
            const F inverse = 1 / c.softcap;
#pragma omp simd
            for (int64_t j = row.from; j < row.to; ++j) dot[j] *= 1 - (cap[j] * inverse) * (cap[j] * inverse);
          }
        }
        head.accumulate(i0, rows, k0, k1);
      }
      head.end_tile(k0, k1);
    }
    head.end();
  });
  const bool own = c.regular && c.heads == c.kv_heads;
  Tensor dk = own ? products.dk : by_kv_head(c, products.dk), dv = own ? products.dv : by_kv_head(c, products.dv);
  if (want_sinks) dsinks = dsinks.sum(0);
  if (want_params) dparams = dparams.sum(0);
  return {products.dq.transpose(1, 2), dk, dv, dscale, drow, dkey, dsinks, dparams};
}

}  // namespace
