// One call as the engine sees it: its tensors with their strides, its scores, and which keys a row sees.
#pragma once
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "maths.h"
#include "program.h"

#define BLAS(name, F)                                                                                        \
  extern "C" void name(const char*, const char*, const int*, const int*, const int*, const F*, const F*,     \
                       const int*, const F*, const int*, const F*, F*, const int*) __attribute__((weak));
BLAS(sgemm_, float)
BLAS(dgemm_, double)

namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t ROWS = 128;  // queries in a tile
constexpr int64_t KEYS = 256;  // keys in a tile
template <typename F>
constexpr F INF = std::numeric_limits<F>::infinity();

const Program& program(const std::string& path) {
  static std::mutex guard;
  static std::unordered_map<std::string, const Program*> loaded;
  std::lock_guard<std::mutex> lock(guard);
  auto found = loaded.find(path);
  if (found == loaded.end()) {
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    TORCH_CHECK(library, "attnswap: cannot load the compiled swap ", path, ": ", dlerror());
    auto* table = static_cast<const Program*>(dlsym(library, "attnswap_program"));
    TORCH_CHECK(table, "attnswap: ", path, " is no compiled swap");
    found = loaded.emplace(path, table).first;
  }
  return *found->second;
}

// C[m, n] = alpha * op(A) op(B) + beta * C, all row-major with leading dimensions; op transposes where asked.
template <typename F>
void gemm(bool ta, bool tb, int64_t m, int64_t n, int64_t k, std::type_identity_t<F> alpha, const F* a, int64_t lda, const F* b, int64_t ldb,
          std::type_identity_t<F> beta, F* c, int64_t ldc) {
  if (!sgemm_ || !dgemm_) {  // a torch without a BLAS that exports its name
    for (int64_t i = 0; i < m; ++i) {
      F* row = c + i * ldc;
      for (int64_t j = 0; j < n; ++j) row[j] = beta == 0 ? F(0) : row[j] * beta;
      for (int64_t l = 0; l < k; ++l) {
        const F x = alpha * (ta ? a[l * lda + i] : a[i * lda + l]);
        if (tb)
          for (int64_t j = 0; j < n; ++j) row[j] += x * b[j * ldb + l];
        else
          for (int64_t j = 0; j < n; ++j) row[j] += x * b[l * ldb + j];
      }
    }
    return;
  }
  const int M = int(m), N = int(n), K = int(k), LA = int(lda), LB = int(ldb), LC = int(ldc);
  // A row-major product is the transposed column-major one.
  const char *second = tb ? "T" : "N", *first = ta ? "T" : "N";
  if constexpr (std::is_same_v<F, float>)
    sgemm_(second, first, &N, &M, &K, &alpha, b, &LB, a, &LA, &beta, c, &LC);
  else
    dgemm_(second, first, &N, &M, &K, &alpha, b, &LB, a, &LA, &beta, c, &LC);
}

// Everything a call is made of, with strides; absent parts are null. Queries, keys and values are held as S, and
// everything else is, and is computed in, F.
template <typename F, typename S = F>
struct Call {
  const ProgramOf<F>* maths;
  const S *q, *k, *v;
  int64_t batch, heads, kv_heads, queries, keys, width, value_width;
  std::vector<int64_t> owner;  // the key/value head that each head reads
  bool regular;                // equal groups of heads read one each, in order
  int64_t q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row;
  const int32_t *first, *last;
  int64_t span_batch;
  const uint8_t* keep;
  int64_t keep_batch;
  const uint8_t* mask;
  int64_t mask_batch, mask_head, mask_row;
  const F* bias;
  int64_t bias_batch, bias_head, bias_row;
  const F *row_scale, *sinks, *params, *count;
  int64_t count_batch, count_head;
  const double *row_bias, *key_bias;  // (batch, heads, queries), (batch, heads, keys)
  F scaling, softcap, tolerance;
  F rest = 1;  // what the products have left out of `scaling`

  const S* query(int64_t b, int64_t h) const { return q + b * q_batch + h * q_head; }
  const S* key(int64_t b, int64_t h) const { return k + b * k_batch + owner[h] * k_head; }
  const S* value(int64_t b, int64_t h) const { return v + b * v_batch + owner[h] * v_head; }
  int64_t row(int64_t b, int64_t h, int64_t i) const { return (b * heads + h) * queries + i; }
};

template <typename F>
const F* reals_in(const Optional& x) { return x ? x->const_data_ptr<F>() : nullptr; }
const double* doubles_in(const Optional& x) { return x ? x->const_data_ptr<double>() : nullptr; }
const uint8_t* bytes_in(const Optional& x) {
  return x ? reinterpret_cast<const uint8_t*>(x->const_data_ptr<bool>()) : nullptr;
}
int64_t step_of(const Tensor& x, int64_t dim) { return x.size(dim) == 1 ? 0 : x.stride(dim); }

#define ARGUMENTS                                                                                                      \
  std::string path, const Tensor &query, const Tensor &key, const Tensor &value, at::ArrayRef<int64_t> kv_heads,       \
      const Tensor &first, const Tensor &last, const Optional &keep, const Optional &mask, const Optional &bias,       \
      const Optional &row_scale, const Optional &row_bias, const Optional &key_bias, const Optional &sinks,            \
      const Tensor &params, const Optional &count, double scaling, double softcap, double tolerance, bool training

template <typename F, typename S = F>
Call<F, S> make_call(ARGUMENTS) {
  Call<F, S> c{};
  c.maths = program(path).of<F>();
  TORCH_CHECK(params.size(1) == c.maths->params && params.is_contiguous(), "attnswap: wrong parameters");
  for (const Tensor* x : {&query, &key, &value})
    TORCH_CHECK(x->scalar_type() == c10::CppTypeToScalarType<S>::value && (x->stride(3) == 1 || x->size(3) == 1), "attnswap: rows of floats expected");
  c.q = query.const_data_ptr<S>(), c.k = key.const_data_ptr<S>(), c.v = value.const_data_ptr<S>();
  c.batch = query.size(0), c.heads = query.size(1), c.kv_heads = key.size(1);
  c.queries = query.size(2), c.keys = key.size(2), c.width = query.size(3), c.value_width = value.size(3);
  c.regular = kv_heads.empty(), c.owner = kv_heads.vec();
  for (int64_t h = 0; c.regular && h < c.heads; ++h) c.owner.push_back(h / (c.heads / c.kv_heads));
  TORCH_CHECK(int64_t(c.owner.size()) == c.heads, "attnswap: one key/value head for each head expected");
  for (const int64_t kv : c.owner) TORCH_CHECK(kv >= 0 && kv < c.kv_heads, "attnswap: no key/value head ", kv);
  c.q_batch = query.stride(0), c.q_head = query.stride(1), c.q_row = query.stride(2);
  c.k_batch = key.stride(0), c.k_head = key.stride(1), c.k_row = key.stride(2);
  c.v_batch = value.stride(0), c.v_head = value.stride(1), c.v_row = value.stride(2);
  c.first = first.const_data_ptr<int32_t>(), c.last = last.const_data_ptr<int32_t>();
  c.span_batch = step_of(first, 0);
  c.keep = bytes_in(keep), c.keep_batch = keep ? step_of(*keep, 0) : 0;
  c.mask = bytes_in(mask), c.bias = reals_in<F>(bias);
  for (const Optional* x : {&mask, &bias})
    TORCH_CHECK(!*x || (*x)->stride(3) == 1 || (*x)->size(3) == 1, "attnswap: rows of a mask expected");
  if (mask) c.mask_batch = step_of(*mask, 0), c.mask_head = step_of(*mask, 1), c.mask_row = mask->stride(2);
  if (bias) c.bias_batch = step_of(*bias, 0), c.bias_head = step_of(*bias, 1), c.bias_row = bias->stride(2);
  c.row_scale = reals_in<F>(row_scale), c.sinks = reals_in<F>(sinks), c.params = params.const_data_ptr<F>();
  c.row_bias = doubles_in(row_bias), c.key_bias = doubles_in(key_bias), c.count = reals_in<F>(count);
  if (count) c.count_batch = step_of(*count, 0), c.count_head = step_of(*count, 1);
  c.scaling = F(scaling), c.softcap = F(softcap), c.tolerance = F(tolerance);
  return c;
}

// One row of a tile, ready for the maths: its visible columns [from, to), and what is kept among them.
struct Row {
  int64_t from, to;
  const uint8_t* keep;
};

// Buffers of one thread.
template <typename F>
struct Scratch {
  std::vector<F> scores, caps, dots, weights, out, key_part, wide;
  std::vector<at::BFloat16> first, second;
  std::vector<uint8_t> kept;
};

template <typename F, typename S>
Row visible(const Call<F, S>& c, int64_t b, int64_t h, int64_t i, int64_t k0, int64_t k1, std::vector<uint8_t>& kept) {
  const int32_t* first = c.first + b * c.span_batch;
  const int32_t* last = c.last + b * c.span_batch;
  Row row{std::max<int64_t>(first[i], k0) - k0, std::min<int64_t>(last[i], k1) - k0, nullptr};
  if (row.to <= row.from || !(c.keep || c.mask)) return row;
  const uint8_t* keys = c.keep ? c.keep + b * c.keep_batch + k0 : nullptr;
  const uint8_t* own = c.mask ? c.mask + b * c.mask_batch + h * c.mask_head + i * c.mask_row + k0 : nullptr;
  for (int64_t j = row.from; j < row.to; ++j) kept[j] = (keys ? keys[j] : 1) & (own ? own[j] : 1);
  row.keep = kept.data();
  return row;
}

// Turns dot products into scores a_i cap(z) + b_i + c_j + B_ij; `caps` receives cap(z) where the backward needs it.
template <typename F, typename S>
void finish_scores(const Call<F, S>& c, int64_t b, int64_t h, int64_t i, int64_t k0, int64_t k1, const Row& row, F* s,
                   const std::type_identity_t<F>* key_part, double centre, std::type_identity_t<F>* caps) {
  const int64_t from = row.from, to = row.to;
  if (c.rest != 1) {
#pragma omp simd
    for (int64_t j = from; j < to; ++j) s[j] *= c.rest;
  }
  if (c.softcap > 0) {
    const F cap = c.softcap, inverse = 1 / c.softcap;
#pragma omp simd
    for (int64_t j = from; j < to; ++j) s[j] = cap * vtanh(s[j] * inverse);
  }
  if (caps) std::copy(s + from, s + to, caps + from);
  if (c.row_scale) {
    const F scale = c.row_scale[c.row(b, h, i)];
#pragma omp simd
    for (int64_t j = from; j < to; ++j) s[j] *= scale;
  }
  if (c.key_bias) {
    // Sums of log gates grow without bound, and only differences matter: they meet in double, next to the diagonal
    // key by key, elsewhere relative to the tile's last key, where the decay within the tile is all that is lost.
    const double* keys = c.key_bias + (b * c.heads + h) * c.keys + k0;
    const double own = c.row_bias ? c.row_bias[c.row(b, h, i)] : 0;
    if (!key_part || to < k1 - k0 || from > 0) {
#pragma omp simd
      for (int64_t j = from; j < to; ++j) s[j] += F(own + keys[j]);
    } else {
      const F shared = F(own + centre);
#pragma omp simd
      for (int64_t j = from; j < to; ++j) s[j] += shared + key_part[j];
    }
  } else if (c.row_bias) {
    const F own = F(c.row_bias[c.row(b, h, i)]);
#pragma omp simd
    for (int64_t j = from; j < to; ++j) s[j] += own;
  }
  if (c.bias) {
    const F* own = c.bias + b * c.bias_batch + h * c.bias_head + i * c.bias_row + k0;
#pragma omp simd
    for (int64_t j = from; j < to; ++j) s[j] += own[j];
  }
}

template <typename F>
F largest(const F* s, const Row& row) {
  using V = lanes_of<F>;
  const V lowest = number<V>(-INF<F>);
  V most = lowest;
  int64_t j = row.from;
  for (; j + LANES<F> <= row.to; j += LANES<F>) {
    const V x = load(s + j);
    most = vmax(most, row.keep ? (load_seen<F>(row.keep + j) ? x : lowest) : x);
  }
  F m = -INF<F>;
  for (int i = 0; i < LANES<F>; ++i) m = std::max(m, lane(most, i));
  for (; j < row.to; ++j) m = std::max(m, !row.keep || row.keep[j] ? s[j] : -INF<F>);
  return m;
}

template <typename F, typename A, typename B>
F dot(const A* a, const B* b, int64_t size) {
  F sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < size; ++d) sum += F(a[d]) * F(b[d]);
  return sum;
}

// The part of the key bias that is left in a tile once its last key's is taken out, and that one.
template <typename F, typename S>
double centre_of(const Call<F, S>& c, int64_t b, int64_t h, int64_t k0, int64_t k1, std::vector<F>& part) {
  if (!c.key_bias) return 0;
  const double* keys = c.key_bias + (b * c.heads + h) * c.keys;
  const double centre = keys[k1 - 1];
  for (int64_t j = k0; j < k1; ++j) part[j - k0] = F(keys[j] - centre);
  return centre;
}

// Largest norms of key rows per tile, for the bound that lets decayed tiles be skipped; empty where nothing decays.
template <typename F, typename S>
std::vector<F> key_norms(const Call<F, S>& c) {
  std::vector<F> norms;
  if (!c.key_bias || c.tolerance <= 0 || c.queries < ROWS || c.softcap > 0 || c.row_scale || c.bias) return norms;
  const int64_t tiles = (c.keys + KEYS - 1) / KEYS, kv_heads = c.kv_heads;
  norms.assign(c.batch * kv_heads * tiles, 0);
  at::parallel_for(0, c.batch * kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t j = 0; j < c.keys; ++j) {
        const S* row = c.k + t / kv_heads * c.k_batch + t % kv_heads * c.k_head + j * c.k_row;
        F& largest = norms[t * tiles + j / KEYS];
        largest = std::max(largest, std::sqrt(dot<F>(row, row, c.width)));
      }
  });
  return norms;
}

template <typename F, typename S>
F largest_norm(const S* rows, int64_t count, int64_t stride, int64_t width) {
  F most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, dot<F>(rows + i * stride, rows + i * stride, width));
  return std::sqrt(most);
}

// Whether no score of a tile can come within `tolerance` of the smallest shift among its rows: what all keys together
// could add to any row is then below the tolerance relative to that row's largest term.
template <typename F, typename S>
bool negligible(const Call<F, S>& c, int64_t b, int64_t h, int64_t i0, int64_t i1, int64_t k0, int64_t k1, F q_norm, F k_norm,
                const F* shift) {
  const double* keys = c.key_bias + (b * c.heads + h) * c.keys;
  const double nearest = *std::max_element(keys + k0, keys + k1);
  double slack = -std::numeric_limits<double>::infinity();
  for (int64_t i = i0; i < i1; ++i) {
    if (shift[i - i0] == -INF<F>) return false;
    slack = std::max(slack, (c.row_bias ? c.row_bias[c.row(b, h, i)] : 0) - shift[i - i0]);
  }
  const double bound = double(q_norm) * k_norm * std::abs(c.scaling) + nearest + slack;
  return bound < std::log(double(c.tolerance) / std::max<int64_t>(c.keys, 1));
}

// Runs tasks on all threads, each taking the next one when it is done: causal tasks differ in length.
template <typename F, typename Function>
void run_tasks(int64_t tasks, Function&& function) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), tasks);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      Scratch<F> scratch;
      for (int64_t task = next++; task < tasks; task = next++) function(task, scratch);
    }
  });
}

// Sums what the heads add to each key/value head's gradient, (batch, heads, keys, width), always in the order of the
// heads; 0 for one that none reads.
template <typename F, typename S>
Tensor by_kv_head(const Call<F, S>& c, const Tensor& x) {
  if (c.regular) return x.view({c.batch, c.kv_heads, c.heads / c.kv_heads, c.keys, x.size(3)}).sum(2);
  Tensor sums = at::zeros({c.batch, c.kv_heads, c.keys, x.size(3)}, x.options());
  for (int64_t kv = 0; kv < c.kv_heads; ++kv) {
    std::vector<int64_t> own;
    for (int64_t h = 0; h < c.heads; ++h)
      if (c.owner[h] == kv) own.push_back(h);
    if (!own.empty()) sums.select(1, kv).copy_(x.index_select(1, at::tensor(own)).sum(1));
  }
  return sums;
}

struct Span {
  int64_t first, last;
};

// The keys that rows [i0, i1) see between them.
template <typename F, typename S>
Span keys_of(const Call<F, S>& c, int64_t b, int64_t i0, int64_t i1) {
  const int32_t* first = c.first + b * c.span_batch;
  const int32_t* last = c.last + b * c.span_batch;
  Span span{c.keys, 0};
  for (int64_t i = i0; i < i1; ++i) {
    if (last[i] <= first[i]) continue;
    span.first = std::min<int64_t>(span.first, first[i]);
    span.last = std::max<int64_t>(span.last, last[i]);
  }
  return span;
}

}  // namespace
