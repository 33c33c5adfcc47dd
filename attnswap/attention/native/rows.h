// The forward pass of row swaps, whose weights depend on the threshold of a whole row:
//
//   O_i = sum_j w(s_ij; t_i) v_j,   t_i such that sum_j w(s_ij; t_i) = 1
//
// By the implicit function theorem dS_ij = w'(s_ij) [dO_i . v_j - dO_i . U_i] with U_i the mean of the values under
// the slopes dw/dt. So once U_i stands in for O_i, the backward pass is that of the elementwise swaps.
#pragma once
#include "call.h"

namespace {

// Solves sum w(s; t) = 1 over the scores that have weight at the lower bound; the others have none above it either.
template <typename F>
F solve(const ProgramOf<F>& maths, const F* s, int64_t size, F low, F high, const F* p) {
  const F power = maths.power(p);
  F t = low;
  for (int step = 0; step < 60; ++step) {
    F slope = 0;
    const F mass = maths.mass(s, size, t, p, &slope);
    if (mass == 1) break;
    (mass > 1 ? low : high) = t;
    // Newton on (mass^power - 1) / power, whose limit for a power of 0 is the logarithm.
    const F bent = power < F(1e-2)    ? std::log(mass) * mass
                   : power == F(0.5) ? 2 * (mass - std::sqrt(mass))
                                     : (std::pow(mass, power) - 1) / power * std::pow(mass, 1 - power);
    F next = t - bent / slope;
    if (!(next >= low && next <= high)) next = (low + high) / 2;
    const F moved = std::abs(next - t), finest = 2 * std::numeric_limits<F>::epsilon() * std::max(F(1), std::abs(t));
    t = next;
    if (moved <= finest) break;
  }
  return t;
}

template <typename F>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward_rows(ARGUMENTS) {
  const auto c = make_call<F>(path, query, key, value, kv_heads, first, last, keep, mask, bias, row_scale, row_bias,
                                 key_bias, sinks, params, count, scaling, softcap, tolerance, training);
  Tensor out = at::empty({c.batch, c.queries, c.heads, c.value_width}, query.options());
  Tensor mean = training ? at::empty_like(out) : at::empty({0, 0, 0, 0}, query.options());
  Tensor shifts = at::empty({c.batch, c.heads, c.queries}, query.options());
  Tensor inverses = at::empty_like(shifts);
  F *o = out.data_ptr<F>(), *u = training ? mean.data_ptr<F>() : nullptr;
  F *m = shifts.data_ptr<F>(), *z = inverses.data_ptr<F>();
  const ProgramOf<F>& maths = *c.maths;
  // Whole rows of scores, as many at once as stay in the cache.
  const int64_t rows_at_once = std::clamp<int64_t>((int64_t(1) << 18) / std::max<int64_t>(c.keys, 1), 8, 64);
  const int64_t blocks = (c.queries + rows_at_once - 1) / rows_at_once, dv = c.value_width;

  run_tasks<F>(c.batch * c.heads * blocks, [&](int64_t task, Scratch<F>& x) {
    const int64_t block = blocks - 1 - task / (c.batch * c.heads), h = task % c.heads, b = task / c.heads % c.batch;
    const int64_t i0 = block * rows_at_once, i1 = std::min(i0 + rows_at_once, c.queries), rows = i1 - i0;
    const Span span = keys_of(c, b, i0, i1);
    const int64_t k0 = std::min(span.first, span.last), k1 = span.last, width = k1 - k0;
    const F* p = c.params + h * maths.params;
    x.scores.resize(rows * width), x.weights.resize(training ? rows * width : 0), x.dots.resize(width + LANES<F>);
    x.kept.resize(width), x.out.resize(2 * rows * dv);
    F *values = x.out.data(), *means = values + rows * dv, totals[64] = {}, slopes[64] = {};
    if (width > 0)
      gemm<F>(false, true, rows, width, c.width, c.scaling, c.query(b, h) + i0 * c.q_row, c.q_row,
            c.key(b, h) + k0 * c.k_row, c.k_row, 0, x.scores.data(), width);
    for (int64_t r = 0; r < rows; ++r) {
      F *s = x.scores.data() + r * width, *w = training ? x.weights.data() + r * width : nullptr;
      Row row = visible(c, b, h, i0 + r, k0, k1, x.kept);
      row.to = std::max(row.from = std::min(row.from, width), row.to);
      finish_scores<F>(c, b, h, i0 + r, k0, k1, row, s, nullptr, 0, nullptr);
      const F sink = c.sinks ? c.sinks[h] : -INF<F>, top = std::max(largest(s, row), sink);
      std::fill(s, s + row.from, F(0)), std::fill(s + row.to, s + width, F(0));
      if (w) std::fill(w, w + row.from, F(0)), std::fill(w + row.to, w + width, F(0));
      F t = 0;
      if (top > -INF<F>) {
        const uint8_t* kept = row.keep ? row.keep + row.from : nullptr;
        const F n = F(row.to - row.from + 1), low = maths.low(top, n, p);
        int64_t size = maths.candidates(s + row.from, row.to - row.from, low, p, kept, x.dots.data());
        if (c.sinks) x.dots[size++] = sink;
        t = solve(maths, x.dots.data(), size, low, maths.high(top, n, p), p);
        totals[r] = w ? maths.weigh_and_slope(s + row.from, w + row.from, row.to - row.from, t, p, kept, slopes + r)
                      : maths.weigh(s + row.from, row.to - row.from, t, p, kept);
        if (c.sinks) {
          totals[r] += maths.norm(sink, t, p);
          F slope = 0;
          maths.mass(&sink, 1, t, p, &slope);
          slopes[r] += slope;
        }
      } else {
        // No key, or none but NaN, which must not be lost.
        for (int64_t j = row.from; j < row.to; ++j)
          if (!row.keep || row.keep[j]) totals[r] += s[j] * 0;
        std::fill(s + row.from, s + row.to, F(0));
        if (w) std::fill(w + row.from, w + row.to, F(0));
      }
      m[c.row(b, h, i0 + r)] = t, z[c.row(b, h, i0 + r)] = totals[r] > 0 ? 1 / totals[r] : totals[r] * 0;
    }
    const F* v = c.value(b, h) + k0 * c.v_row;
    if (width > 0) gemm<F>(false, false, rows, dv, width, 1, x.scores.data(), width, v, c.v_row, 0, values, dv);
    if (width > 0 && training)
      gemm<F>(false, false, rows, dv, width, 1, x.weights.data(), width, v, c.v_row, 0, means, dv);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t place = ((b * c.queries + i0 + r) * c.heads + h) * dv;
      const F inverse = z[c.row(b, h, i0 + r)], slope = slopes[r] < 0 ? 1 / slopes[r] : F(0);
      for (int64_t d = 0; d < dv; ++d) o[place + d] = width ? values[r * dv + d] * inverse : F(0);
      for (int64_t d = 0; training && d < dv; ++d) u[place + d] = width ? means[r * dv + d] * slope : F(0);
    }
  });
  return {out.transpose(1, 2), shifts, inverses, training ? mean.transpose(1, 2) : mean};
}

}  // namespace
