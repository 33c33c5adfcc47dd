// The forward pass of elementwise swaps with few queries, as in decoding, where reading the keys is what takes time: a
// task takes a stretch of keys for all heads that read them, so that they come from far away once, and half precision
// is not copied. The stretches of a row are put together in the end.
#pragma once
#include "forward.h"

namespace {

constexpr int64_t FEW = 8;             // queries
constexpr int64_t STRETCH = 2 * KEYS;  // keys of a task

// Writes the dot products of a query with keys [k0, k1), four keys at a time.
template <typename F, typename S>
void dots(const F* q, const S* k, int64_t stride, int64_t count, int64_t width, F* out) {
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    const S *a = k + j * stride, *b = a + stride, *c = b + stride, *d = c + stride;
    F s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t l = 0; l < width; ++l) s0 += q[l] * F(a[l]), s1 += q[l] * F(b[l]), s2 += q[l] * F(c[l]), s3 += q[l] * F(d[l]);
    out[j] = s0, out[j + 1] = s1, out[j + 2] = s2, out[j + 3] = s3;
  }
  for (; j < count; ++j) out[j] = dot<F>(q, k + j * stride, width);
}

// Adds the weighted sum of `count` values.
template <typename F, typename S>
void add_weighted(const F* w, const S* v, int64_t stride, int64_t count, int64_t width, F* out) {
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    const S *a = v + j * stride, *b = a + stride, *c = b + stride, *d = c + stride;
    const F w0 = w[j], w1 = w[j + 1], w2 = w[j + 2], w3 = w[j + 3];
#pragma omp simd
    for (int64_t l = 0; l < width; ++l) out[l] += (w0 * F(a[l]) + w1 * F(b[l])) + (w2 * F(c[l]) + w3 * F(d[l]));
  }
  for (; j < count; ++j)
    for (int64_t l = 0; l < width; ++l) out[l] += w[j] * F(v[j * stride + l]);
}

template <typename F, typename S>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward_few(ARGUMENTS) {
  const auto c = make_call<F, S>(path, query, key, value, kv_heads, first, last, keep, mask, bias, row_scale, row_bias,
                                 key_bias, sinks, params, count, scaling, softcap, tolerance, training);
  const Results<F, S> results(c, query.options(), training);
  const int64_t stretches = (c.keys + STRETCH - 1) / STRETCH, dv = c.value_width, rows = c.batch * c.heads * c.queries;
  std::vector<F> queries(rows * c.width), acc(stretches * rows * dv), shifts(stretches * rows), totals(stretches * rows);
  std::vector<std::vector<int64_t>> readers(c.kv_heads);
  for (int64_t h = 0; h < c.heads; ++h) readers[c.owner[h]].push_back(h);
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.heads; ++h)
      for (int64_t i = 0; i < c.queries; ++i) {
        for (int64_t d = 0; d < c.width; ++d)
          queries[c.row(b, h, i) * c.width + d] = F(c.query(b, h)[i * c.q_row + d]) * c.scaling;
        for (int64_t t = 0; t < stretches; ++t) shifts[t * rows + c.row(b, h, i)] = first_shift(c, h);
      }
  run_tasks<F>(c.batch * c.kv_heads * stretches, [&](int64_t task, Scratch<F>& x) {
    const int64_t t = task % stretches, kv = task / stretches % c.kv_heads, b = task / stretches / c.kv_heads;
    const Span span = keys_of(c, b, 0, c.queries);
    const int64_t end = std::min((t + 1) * STRETCH, span.last), start = std::max(t * STRETCH, span.first);
    x.scores.resize(KEYS), x.kept.resize(KEYS);
    for (int64_t k1 = end; k1 > start; k1 -= KEYS) {
      const int64_t k0 = std::max(k1 - KEYS, start);
      for (const int64_t h : readers[kv])
        for (int64_t i = 0; i < c.queries; ++i) {
          const int64_t row = c.row(b, h, i), place = t * rows + row;
          F* s = x.scores.data();
          dots<F>(queries.data() + row * c.width, c.key(b, h) + k0 * c.k_row, c.k_row, k1 - k0, c.width, s);
          absorb<F>(c, b, h, i, k0, k1, k1 - k0, s, nullptr, 0, x.kept, shifts[place], totals[place],
                    acc.data() + place * dv);
          add_weighted<F>(s, c.value(b, h) + k0 * c.v_row, c.v_row, k1 - k0, dv, acc.data() + place * dv);
        }
    }
  });
  std::vector<F> sum(dv);
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.heads; ++h)
      for (int64_t i = 0; i < c.queries; ++i) {
        const int64_t row = c.row(b, h, i);
        F shift = first_shift(c, h), total = 0;
        for (int64_t t = 0; t < stretches; ++t) shift = std::max(shift, shifts[t * rows + row]);
        std::fill(sum.begin(), sum.end(), F(0));
        for (int64_t t = 0; t < stretches; ++t) {
          const F own = shifts[t * rows + row], factor = own < shift ? vexp(own - shift) : F(1);
          const F* part = acc.data() + (t * rows + row) * dv;
          total += totals[t * rows + row] * factor;
#pragma omp simd
          for (int64_t d = 0; d < dv; ++d) sum[d] += part[d] * factor;
        }
        results.finish(c, b, h, i, shift, total, sum.data());
      }
  return results.tensors();
}

}  // namespace
