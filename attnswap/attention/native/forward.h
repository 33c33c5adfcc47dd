// The forward pass of elementwise swaps.
#pragma once
#include "call.h"

namespace {

template <typename F, typename Products>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(ARGUMENTS) {
  using S = typename Products::Held;
  auto c = make_call<F, S>(path, query, key, value, kv_heads, first, last, keep, mask, bias, row_scale, row_bias,
                           key_bias, sinks, params, count, scaling, softcap, tolerance, training);
  const Products products(c);
  const auto exact = query.options().dtype(c10::CppTypeToScalarType<F>::value);
  // Laid out as (batch, queries, heads, width), which is how the next layer reads it.
  Tensor out = at::empty({c.batch, c.queries, c.heads, c.value_width}, query.options());
  // Rounding errors of the output add up in the sums that gates and per-head numbers get, so the backward pass reads an
  // output that has none.
  const bool keeps = training && !std::is_same_v<F, S>;
  Tensor unrounded = keeps ? at::empty_like(out, exact) : at::empty({0, 0, 0, 0}, exact);
  Tensor shifts = at::empty({c.batch, c.heads, c.queries}, exact);
  Tensor inverses = at::empty_like(shifts);
  S* o = out.data_ptr<S>();
  F *u = keeps ? unrounded.data_ptr<F>() : nullptr, *m = shifts.data_ptr<F>(), *z = inverses.data_ptr<F>();
  const int64_t blocks = (c.queries + ROWS - 1) / ROWS, tiles = (c.keys + KEYS - 1) / KEYS;
  const int64_t dv = c.value_width;
  const std::vector<F> norms = key_norms(c);
  const ProgramOf<F>& maths = *c.maths;

  run_tasks<F>(c.batch * c.heads * blocks, [&](int64_t task, Scratch<F>& x) {
    const int64_t block = blocks - 1 - task / (c.batch * c.heads), h = task % c.heads, b = task / c.heads % c.batch;
    const int64_t i0 = block * ROWS, i1 = std::min(i0 + ROWS, c.queries), rows = i1 - i0;
    x.scores.resize(ROWS * KEYS), x.out.assign(ROWS * dv, 0), x.key_part.resize(KEYS), x.kept.resize(KEYS);
    const F* p = c.params + h * maths.params;
    products.begin(x, b, h, i0, rows);
    F shift[ROWS], total[ROWS];
    const F start = std::max(maths.shifted ? maths.floor(p) : F(0), maths.shifted && c.sinks ? c.sinks[h] : -INF<F>);
    std::fill(shift, shift + rows, maths.shifted ? start : F(0)), std::fill(total, total + rows, F(0));
    const F q_norm = norms.empty() ? 0 : largest_norm<F>(c.query(b, h) + i0 * c.q_row, rows, c.q_row, c.width);
    const Span span = keys_of(c, b, i0, i1);
    for (int64_t k1 = span.last; k1 > span.first;) {
      const int64_t tile = (k1 - 1) / KEYS, k0 = std::max(tile * KEYS, Products::WHOLE_TILES ? 0 : span.first);
      const int64_t width = Products::WHOLE_TILES ? KEYS : k1 - k0;
      if (!norms.empty() && negligible(c, b, h, i0, i1, k0, k1, q_norm,
                                       norms[(b * c.kv_heads + c.owner[h]) * tiles + tile], shift)) {
        k1 = k0;  // a later tile may still matter: decay is no more than what the gates say
        continue;
      }
      products.scores(x, b, h, i0, rows, k0, k1);
      const bool far = rows > 1;  // sums of the key bias that rows share are worth their making for several alone
      const double centre = far ? centre_of(c, b, h, k0, k1, x.key_part) : 0;
      for (int64_t r = 0; r < rows; ++r) {
        F* s = x.scores.data() + r * KEYS;
        const Row row = visible(c, b, h, i0 + r, k0, k1, x.kept);
        if (row.to <= row.from) {
          std::fill(s, s + width, F(0));
          products.weighed(x, r);
          continue;
        }
        finish_scores(c, b, h, i0 + r, k0, k1, row, s, far ? x.key_part.data() : nullptr, centre, nullptr);
        if (maths.shifted) {
          const F higher = std::max(shift[r], largest(s, row));
          if (higher > shift[r]) {
            const F factor = vexp(shift[r] - higher);  // 0 for the first tile
            total[r] *= factor;
            F* acc = x.out.data() + r * dv;
#pragma omp simd
            for (int64_t d = 0; d < dv; ++d) acc[d] *= factor;
            shift[r] = higher;
          }
        }
        std::fill(s, s + row.from, F(0)), std::fill(s + row.to, s + width, F(0));
        // A row that sees nothing but hidden keys has no shift yet; any finite one serves, as all is dropped.
        const F reference = shift[r] == -INF<F> ? F(0) : shift[r];
        total[r] += maths.weigh(s + row.from, row.to - row.from, reference, p, row.keep ? row.keep + row.from : nullptr);
        products.weighed(x, r);
      }
      products.add_values(x, b, h, rows, k0, k1);
      k1 = k0;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const F reference = shift[r] == -INF<F> ? F(0) : shift[r];
      const F n = c.count ? c.count[b * c.count_batch + h * c.count_head + i0 + r] : F(0);
      F sum = total[r] + maths.null(reference, n, p);
      if (c.sinks) sum += maths.norm(c.sinks[h], reference, p);
      const F inverse = sum > 0 ? 1 / sum : sum * 0;  // NaN stays NaN
      m[c.row(b, h, i0 + r)] = reference, z[c.row(b, h, i0 + r)] = inverse;
      const int64_t place = ((b * c.queries + i0 + r) * c.heads + h) * dv;
      const F* acc = x.out.data() + r * dv;
#pragma omp simd
      for (int64_t d = 0; d < dv; ++d) o[place + d] = acc[d] * inverse;
      for (int64_t d = 0; keeps && d < dv; ++d) u[place + d] = acc[d] * inverse;
    }
    products.end();
  });
  return {out.transpose(1, 2), shifts, inverses, keeps ? unrounded.transpose(1, 2) : unrounded};
}

}  // namespace
