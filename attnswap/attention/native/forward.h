// The forward pass of elementwise swaps.
#pragma once
#include "call.h"

namespace {

// What a row's shift is before it has seen a key.
template <typename F, typename S>
F first_shift(const Call<F, S>& c, int64_t h) {
  if (!c.maths->shifted) return 0;
  return std::max(c.maths->floor(c.params + h * c.maths->params), c.sinks ? c.sinks[h] : -INF<F>);
}

// Makes weights of the dot products of a row with keys [k0, k1), and moves its shift, total and output along.
template <typename F, typename S>
void absorb(const Call<F, S>& c, int64_t b, int64_t h, int64_t i, int64_t k0, int64_t k1, int64_t width, F* s,
            const F* key_part, double centre, std::vector<uint8_t>& kept, F& shift, F& total, F* acc) {
  const ProgramOf<F>& maths = *c.maths;
  const Row row = visible(c, b, h, i, k0, k1, kept);
  if (row.to <= row.from) {
    std::fill(s, s + width, F(0));
    return;
  }
  finish_scores<F>(c, b, h, i, k0, k1, row, s, key_part, centre, nullptr);
  if (maths.shifted) {
    const F higher = std::max(shift, largest(s, row));
    if (higher > shift) {
      const F factor = vexp(shift - higher);  // 0 for the first tile
      total *= factor;
#pragma omp simd
      for (int64_t d = 0; d < c.value_width; ++d) acc[d] *= factor;
      shift = higher;
    }
  }
  std::fill(s, s + row.from, F(0)), std::fill(s + row.to, s + width, F(0));
  // A row that sees nothing but hidden keys has no shift yet; any finite one serves, as all is dropped.
  total += maths.weigh(s + row.from, row.to - row.from, shift == -INF<F> ? F(0) : shift,
                       c.params + h * maths.params, row.keep ? row.keep + row.from : nullptr);
}

// What the forward pass gives back.
template <typename F, typename S>
struct Results {
  Tensor out, shifts, inverses, unrounded;
  bool keeps;

  // The output is laid out as (batch, queries, heads, width), which is how the next layer reads it. Rounding errors of
  // it add up in the sums that gates and per-head numbers get, so the backward pass reads one that has none.
  Results(const Call<F, S>& c, const at::TensorOptions& options, bool training)
      : out(at::empty({c.batch, c.queries, c.heads, c.value_width}, options)),
        shifts(at::empty({c.batch, c.heads, c.queries}, options.dtype(c10::CppTypeToScalarType<F>::value))),
        inverses(at::empty_like(shifts)),
        unrounded(at::empty({0, 0, 0, 0}, shifts.options())), keeps(training && !std::is_same_v<F, S>) {
    if (keeps) unrounded = at::empty_like(out, shifts.options());
  }

  // Divides a row by its denominator.
  void finish(const Call<F, S>& c, int64_t b, int64_t h, int64_t i, F shift, F total, const F* acc) const {
    const F reference = shift == -INF<F> ? F(0) : shift;
    const F* p = c.params + h * c.maths->params;
    const F n = c.count ? c.count[b * c.count_batch + h * c.count_head + i] : F(0);
    F sum = total + c.maths->null(reference, n, p);
    if (c.sinks) sum += c.maths->norm(c.sinks[h], reference, p);
    const F inverse = sum > 0 ? 1 / sum : sum * 0;  // NaN stays NaN
    shifts.template data_ptr<F>()[c.row(b, h, i)] = reference;
    inverses.template data_ptr<F>()[c.row(b, h, i)] = inverse;
    const int64_t dv = c.value_width, place = ((b * c.queries + i) * c.heads + h) * dv;
    S* o = out.template data_ptr<S>() + place;
#pragma omp simd
    for (int64_t d = 0; d < dv; ++d) o[d] = acc[d] * inverse;
    F* u = keeps ? unrounded.template data_ptr<F>() + place : nullptr;
    for (int64_t d = 0; keeps && d < dv; ++d) u[d] = acc[d] * inverse;
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> tensors() const {
    return {out.transpose(1, 2), shifts, inverses, keeps ? unrounded.transpose(1, 2) : unrounded};
  }
};

template <typename F, typename Products>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(ARGUMENTS) {
  using S = typename Products::Held;
  auto c = make_call<F, S>(path, query, key, value, kv_heads, first, last, keep, mask, bias, row_scale, row_bias,
                           key_bias, sinks, params, count, scaling, softcap, tolerance, training);
  const Products products(c);
  const Results<F, S> results(c, query.options(), training);
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
    std::fill(shift, shift + rows, first_shift(c, h)), std::fill(total, total + rows, F(0));
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
        absorb(c, b, h, i0 + r, k0, k1, width, s, far ? x.key_part.data() : nullptr, centre, x.kept, shift[r], total[r],
               x.out.data() + r * dv);
        products.weighed(x, r);
      }
      products.add_values(x, b, h, rows, k0, k1);
      k1 = k0;
    }
    for (int64_t r = 0; r < rows; ++r)
      results.finish(c, b, h, i0 + r, shift[r], total[r], x.out.data() + r * dv);
    products.end();
  });
  return results.tensors();
}

}  // namespace
