// Attention with any elementwise normalizer, tile by tile, forward and backward, in memory linear in the length.
//
//   O_i = (1 / Z_i) sum_j w(s_ij; m_i) v_j,   Z_i = null_i + sum_j d(s_ij; m_i)
//   dS_ij = [w'(s_ij) (dO_i . v_j) - d'(s_ij) (dO_i . O_i)] / Z_i
//
// w and d come from a program: a small library compiled from the one definition of the swap (see program.py). Each
// row sees one range of keys [first, last), less what `keep` and `mask` hide. Tiles run from the last key to the
// first, so that the running shift m soon knows the nearest keys, and what decay has made negligible is never read.
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

// Everything a call is made of, with strides; absent parts are null.
template <typename F>
struct Call {
  const ProgramOf<F>* maths;
  const F *q, *k, *v;
  int64_t batch, heads, groups, queries, keys, width, value_width;
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

  const F* query(int64_t b, int64_t h) const { return q + b * q_batch + h * q_head; }
  const F* key(int64_t b, int64_t h) const { return k + b * k_batch + h / groups * k_head; }
  const F* value(int64_t b, int64_t h) const { return v + b * v_batch + h / groups * v_head; }
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
  std::string path, const Tensor &query, const Tensor &key, const Tensor &value, const Tensor &first,                 \
      const Tensor &last, const Optional &keep, const Optional &mask, const Optional &bias, const Optional &row_scale, \
      const Optional &row_bias, const Optional &key_bias, const Optional &sinks, const Tensor &params,                \
      const Optional &count, double scaling, double softcap, double tolerance

template <typename F>
Call<F> make_call(ARGUMENTS) {
  Call<F> c{};
  c.maths = program(path).of<F>();
  TORCH_CHECK(params.size(1) == c.maths->params && params.is_contiguous(), "attnswap: wrong parameters");
  for (const Tensor* x : {&query, &key, &value})
    TORCH_CHECK(x->scalar_type() == c10::CppTypeToScalarType<F>::value && x->stride(3) == 1, "attnswap: rows of floats expected");
  c.q = query.const_data_ptr<F>(), c.k = key.const_data_ptr<F>(), c.v = value.const_data_ptr<F>();
  c.batch = query.size(0), c.heads = query.size(1), c.groups = c.heads / key.size(1);
  c.queries = query.size(2), c.keys = key.size(2), c.width = query.size(3), c.value_width = value.size(3);
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
  std::vector<F> scores, caps, dots, weights, out, key_part;
  std::vector<uint8_t> kept;
};

template <typename F>
Row visible(const Call<F>& c, int64_t b, int64_t h, int64_t i, int64_t k0, int64_t k1, std::vector<uint8_t>& kept) {
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
template <typename F>
void finish_scores(const Call<F>& c, int64_t b, int64_t h, int64_t i, int64_t k0, int64_t k1, const Row& row, F* s,
                   const std::type_identity_t<F>* key_part, double centre, std::type_identity_t<F>* caps) {
  const int64_t from = row.from, to = row.to;
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
    if (to < k1 - k0 || from > 0) {
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

// The part of the key bias that is left in a tile once its last key's is taken out, and that one.
template <typename F>
double centre_of(const Call<F>& c, int64_t b, int64_t h, int64_t k0, int64_t k1, std::vector<F>& part) {
  if (!c.key_bias) return 0;
  const double* keys = c.key_bias + (b * c.heads + h) * c.keys;
  const double centre = keys[k1 - 1];
  for (int64_t j = k0; j < k1; ++j) part[j - k0] = F(keys[j] - centre);
  return centre;
}

// Largest norms of key rows per tile, for the bound that lets decayed tiles be skipped; empty where nothing decays.
template <typename F>
std::vector<F> key_norms(const Call<F>& c) {
  std::vector<F> norms;
  if (!c.key_bias || c.tolerance <= 0 || c.softcap > 0 || c.row_scale || c.bias) return norms;
  const int64_t tiles = (c.keys + KEYS - 1) / KEYS, kv_heads = c.heads / c.groups;
  norms.assign(c.batch * kv_heads * tiles, 0);
  at::parallel_for(0, c.batch * kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t j = 0; j < c.keys; ++j) {
        const F* row = c.k + t / kv_heads * c.k_batch + t % kv_heads * c.k_head + j * c.k_row;
        F sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < c.width; ++d) sum += row[d] * row[d];
        F& largest = norms[t * tiles + j / KEYS];
        largest = std::max(largest, std::sqrt(sum));
      }
  });
  return norms;
}

template <typename F>
F largest_norm(const F* rows, int64_t count, int64_t stride, int64_t width) {
  F most = 0;
  for (int64_t i = 0; i < count; ++i) {
    F sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < width; ++d) sum += rows[i * stride + d] * rows[i * stride + d];
    most = std::max(most, sum);
  }
  return std::sqrt(most);
}

// Whether no score of a tile can come within `tolerance` of the smallest shift among its rows: what all keys together
// could add to any row is then below the tolerance relative to that row's largest term.
template <typename F>
bool negligible(const Call<F>& c, int64_t b, int64_t h, int64_t i0, int64_t i1, int64_t k1, F q_norm, F k_norm,
                const F* shift) {
  const double nearest = c.key_bias[(b * c.heads + h) * c.keys + k1 - 1];
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

struct Span {
  int64_t first, last;
};

// The keys that rows [i0, i1) see between them.
template <typename F>
Span keys_of(const Call<F>& c, int64_t b, int64_t i0, int64_t i1) {
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

template <typename F>
std::tuple<Tensor, Tensor, Tensor> forward(ARGUMENTS) {
  const Call<F> c = make_call<F>(path, query, key, value, first, last, keep, mask, bias, row_scale, row_bias, key_bias, sinks,
                           params, count, scaling, softcap, tolerance);
  // Laid out as (batch, queries, heads, width), which is how the next layer reads it.
  Tensor out = at::empty({c.batch, c.queries, c.heads, c.value_width}, query.options());
  Tensor shifts = at::empty({c.batch, c.heads, c.queries}, query.options());
  Tensor inverses = at::empty_like(shifts);
  F *o = out.data_ptr<F>(), *m = shifts.data_ptr<F>(), *z = inverses.data_ptr<F>();
  const int64_t blocks = (c.queries + ROWS - 1) / ROWS, tiles = (c.keys + KEYS - 1) / KEYS;
  const int64_t dv = c.value_width;
  const std::vector<F> norms = key_norms(c);
  const ProgramOf<F>& maths = *c.maths;

  run_tasks<F>(c.batch * c.heads * blocks, [&](int64_t task, Scratch<F>& x) {
    const int64_t block = blocks - 1 - task / (c.batch * c.heads), h = task % c.heads, b = task / c.heads % c.batch;
    const int64_t i0 = block * ROWS, i1 = std::min(i0 + ROWS, c.queries), rows = i1 - i0;
    x.scores.resize(ROWS * KEYS), x.out.assign(ROWS * dv, 0), x.key_part.resize(KEYS), x.kept.resize(KEYS);
    const F* p = c.params + h * maths.params;
    const F* q = c.query(b, h) + i0 * c.q_row;
    F shift[ROWS], total[ROWS];
    const F start = std::max(maths.shifted ? maths.floor(p) : F(0), maths.shifted && c.sinks ? c.sinks[h] : -INF<F>);
    std::fill(shift, shift + rows, maths.shifted ? start : F(0)), std::fill(total, total + rows, F(0));
    const F q_norm = norms.empty() ? 0 : largest_norm(q, rows, c.q_row, c.width);
    const Span span = keys_of(c, b, i0, i1);
    for (int64_t k1 = span.last; k1 > span.first;) {
      const int64_t tile = (k1 - 1) / KEYS, k0 = std::max(tile * KEYS, span.first), width = k1 - k0;
      if (!norms.empty() && negligible(c, b, h, i0, i1, k1, q_norm,
                                       norms[(b * (c.heads / c.groups) + h / c.groups) * tiles + tile], shift)) {
        k1 = k0;  // a later tile may still matter: decay is no more than what the gates say
        continue;
      }
      gemm(false, true, rows, width, c.width, c.scaling, q, c.q_row, c.key(b, h) + k0 * c.k_row, c.k_row, 0,
           x.scores.data(), KEYS);
      const double centre = centre_of(c, b, h, k0, k1, x.key_part);
      for (int64_t r = 0; r < rows; ++r) {
        F* s = x.scores.data() + r * KEYS;
        const Row row = visible(c, b, h, i0 + r, k0, k1, x.kept);
        if (row.to <= row.from) {
          std::fill(s, s + width, F(0));
          continue;
        }
        finish_scores(c, b, h, i0 + r, k0, k1, row, s, x.key_part.data(), centre, nullptr);
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
      }
      gemm(false, false, rows, dv, width, 1, x.scores.data(), KEYS, c.value(b, h) + k0 * c.v_row, c.v_row, 1,
           x.out.data(), dv);
      k1 = k0;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const F reference = shift[r] == -INF<F> ? F(0) : shift[r];
      const F n = c.count ? c.count[b * c.count_batch + h * c.count_head + i0 + r] : F(0);
      F sum = total[r] + maths.null(reference, n, p);
      if (c.sinks) sum += maths.norm(c.sinks[h], reference, p);
      const F inverse = sum > 0 ? 1 / sum : F(0);
      m[c.row(b, h, i0 + r)] = reference, z[c.row(b, h, i0 + r)] = inverse;
      F* target = o + ((b * c.queries + i0 + r) * c.heads + h) * dv;
      const F* acc = x.out.data() + r * dv;
#pragma omp simd
      for (int64_t d = 0; d < dv; ++d) target[d] = acc[d] * inverse;
    }
  });
  return {out.transpose(1, 2), shifts, inverses};
}

// Gradients of everything a swap may learn; what is not asked for comes back empty.
template <typename F>
std::vector<Tensor> backward(const Tensor& grad, const Tensor& out, const Tensor& shifts, const Tensor& inverses,
                             at::ArrayRef<int64_t> wanted, ARGUMENTS) {
  const Call<F> c = make_call<F>(path, query, key, value, first, last, keep, mask, bias, row_scale, row_bias, key_bias, sinks,
                           params, count, scaling, softcap, tolerance);
  TORCH_CHECK(grad.stride(3) == 1 && out.stride(3) == 1, "attnswap: rows of floats expected");
  const ProgramOf<F>& maths = *c.maths;
  const bool want_scale = wanted[0], want_row = wanted[1], want_key = wanted[2], want_sinks = wanted[3],
             want_params = wanted[4];
  const auto floats_of = query.options();
  const Tensor none = at::empty({0}, floats_of);
  Tensor dq = at::zeros({c.batch, c.queries, c.heads, c.width}, floats_of);
  Tensor dk = at::zeros({c.batch, c.heads, c.keys, c.width}, floats_of);
  Tensor dv = at::zeros({c.batch, c.heads, c.keys, c.value_width}, floats_of);
  Tensor dscale = want_scale ? at::zeros_like(shifts) : none, drow = want_row ? at::zeros_like(shifts) : none;
  Tensor dkey = want_key ? at::zeros({c.batch, c.heads, c.keys}, floats_of) : none;
  Tensor dsinks = want_sinks ? at::zeros({c.batch, c.heads}, floats_of) : none;
  Tensor dparams = want_params ? at::zeros({c.batch, c.heads, maths.params}, floats_of) : none;
  const int64_t blocks = (c.queries + ROWS - 1) / ROWS, tiles = (c.keys + KEYS - 1) / KEYS;
  const int64_t wide = c.value_width, kv_heads = c.heads / c.groups;
  const std::vector<F> norms = key_norms(c);

  run_tasks<F>(c.batch * c.heads, [&](int64_t task, Scratch<F>& x) {
    const int64_t b = task / c.heads, h = task % c.heads;
    const F *p = c.params + h * maths.params, *q = c.query(b, h), *k = c.key(b, h), *v = c.value(b, h);
    const F* g = grad.const_data_ptr<F>() + b * grad.stride(0) + h * grad.stride(1);
    const F* o = out.const_data_ptr<F>() + b * out.stride(0) + h * out.stride(1);
    const F* m = shifts.const_data_ptr<F>() + task * c.queries;
    const F* z = inverses.const_data_ptr<F>() + task * c.queries;
    const int64_t g_row = grad.stride(2), o_row = out.stride(2), dq_row = c.heads * c.width;
    F* dq_head = dq.data_ptr<F>() + (b * c.queries * c.heads + h) * c.width;
    F* dk_head = dk.data_ptr<F>() + task * c.keys * c.width;
    F* dv_head = dv.data_ptr<F>() + task * c.keys * wide;
    const bool capped = c.softcap > 0, caps = capped || want_scale;
    x.scores.resize(ROWS * KEYS), x.dots.resize(ROWS * KEYS), x.weights.resize(ROWS * KEYS);
    x.caps.resize(caps ? KEYS : 0), x.key_part.resize(KEYS), x.kept.resize(KEYS);

    std::vector<F> delta(c.queries), block_norm(norms.empty() ? 0 : blocks);
    std::vector<Span> spans(blocks);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t i0 = block * ROWS, i1 = std::min(i0 + ROWS, c.queries);
      spans[block] = keys_of(c, b, i0, i1);
      if (!norms.empty()) block_norm[block] = largest_norm(q + i0 * c.q_row, i1 - i0, c.q_row, c.width);
    }
    for (int64_t i = 0; i < c.queries; ++i) {
      F sum = 0;
      const F *left = g + i * g_row, *right = o + i * o_row;
#pragma omp simd reduction(+ : sum)
      for (int64_t d = 0; d < wide; ++d) sum += left[d] * right[d];
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
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t k0 = tile * KEYS, k1 = std::min(k0 + KEYS, c.keys), width = k1 - k0;
      const double centre = centre_of(c, b, h, k0, k1, x.key_part);
      for (int64_t block = 0; block < blocks; ++block) {
        if (spans[block].last <= k0 || spans[block].first >= k1) continue;
        const int64_t i0 = block * ROWS, i1 = std::min(i0 + ROWS, c.queries), rows = i1 - i0;
        if (!norms.empty() &&
            negligible(c, b, h, i0, i1, k1, block_norm[block], norms[(b * kv_heads + h / c.groups) * tiles + tile],
                       m + i0))
          continue;
        gemm(false, true, rows, width, c.width, c.scaling, q + i0 * c.q_row, c.q_row, k + k0 * c.k_row, c.k_row, 0,
             x.scores.data(), KEYS);
        gemm(false, true, rows, width, wide, 1, g + i0 * g_row, g_row, v + k0 * c.v_row, c.v_row, 0, x.dots.data(),
             KEYS);
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
        gemm(true, false, width, wide, rows, 1, x.weights.data(), KEYS, g + i0 * g_row, g_row, 1, dv_head + k0 * wide,
             wide);
        gemm(true, false, width, c.width, rows, c.scaling, x.dots.data(), KEYS, q + i0 * c.q_row, c.q_row, 1,
             dk_head + k0 * c.width, c.width);
        gemm(false, false, rows, c.width, width, c.scaling, x.dots.data(), KEYS, k + k0 * c.k_row, c.k_row, 1,
             dq_head + i0 * dq_row, dq_row);
      }
    }
  });
  if (c.groups > 1) {
    dk = dk.view({c.batch, kv_heads, c.groups, c.keys, c.width}).sum(2);
    dv = dv.view({c.batch, kv_heads, c.groups, c.keys, c.value_width}).sum(2);
  }
  if (want_sinks) dsinks = dsinks.sum(0);
  if (want_params) dparams = dparams.sum(0);
  return {dq.transpose(1, 2), dk, dv, dscale, drow, dkey, dsinks, dparams};
}

// Calls the form for a tensor's own type.
#define DISPATCH(function, ...)                                                          \
  return query.scalar_type() == at::kDouble ? function<double>(__VA_ARGS__) : function<float>(__VA_ARGS__)
#define NAMES                                                                                                     \
  path, query, key, value, first, last, keep, mask, bias, row_scale, row_bias, key_bias, sinks, params, count, scaling, \
      softcap, tolerance

std::tuple<Tensor, Tensor, Tensor> forward_of(ARGUMENTS) { DISPATCH(forward, NAMES); }

std::vector<Tensor> backward_of(const Tensor& grad, const Tensor& out, const Tensor& shifts, const Tensor& inverses,
                                at::ArrayRef<int64_t> wanted, ARGUMENTS) {
  DISPATCH(backward, grad, out, shifts, inverses, wanted, NAMES);
}

}  // namespace

TORCH_LIBRARY(attnswap_native, library) {
  const std::string arguments =
      "str path, Tensor query, Tensor key, Tensor value, Tensor first, Tensor last, Tensor? keep, Tensor? mask, "
      "Tensor? bias, Tensor? row_scale, Tensor? row_bias, Tensor? key_bias, Tensor? sinks, Tensor params, "
      "Tensor? count, float scaling, float softcap, float tolerance";
  library.def(("forward(" + arguments + ") -> (Tensor, Tensor, Tensor)").c_str());
  library.def(("backward(Tensor grad, Tensor out, Tensor shifts, Tensor inverses, int[] wanted, " + arguments +
               ") -> Tensor[]").c_str());
}

TORCH_LIBRARY_IMPL(attnswap_native, CPU, library) {
  library.impl("forward", forward_of);
  library.impl("backward", backward_of);
}
