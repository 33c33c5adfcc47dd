// The same products in bf16, on matrix units (AMX) or by vectors of bf16 (AVX512_BF16), by the kernels that torch
// exports. Factors are bf16 and sums fp32; the second factor of a product lies as (k / 2, n, 2), and what it lacks to
// whole tiles is filled with zeros.
#pragma once
#include <ATen/native/CPUBlas.h>

#include "call.h"

namespace {

using Half = at::BFloat16;
namespace blas = at::native::cpublas;
typedef std::uint32_t words __attribute__((vector_size(64)));
typedef std::uint16_t half_words __attribute__((vector_size(32)));

inline int64_t rounded_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// torch says whether there are matrix units; whether its kernels know this processor's vectors, or were told to leave
// them alone (ONEDNN_MAX_CPU_ISA), shows in a product.
bool multiplies_by_vectors() {
#ifdef __AVX512BF16__
  std::vector<Half> first(16 * 32, Half(1)), second(32 * 16, Half(1));
  std::vector<float> product(16 * 16);
  try {
    blas::brgemm(16, 16, 32, 32, 16, 16, false, first.data(), second.data(), product.data());
    blas::brgemm_release();
  } catch (const std::exception&) {
    return false;
  }
  return product.front() == 32;
#else
  return false;
#endif
}
bool multiplies_bf16() {
  if (!at::globalContext().userEnabledMkldnn()) return false;
  static const bool found = blas::could_pack(at::kBFloat16) || multiplies_by_vectors();
  return found;
}

// Sixteen numbers rounded to bf16: to the nearest, ties to even.
inline half_words halves(floats x) {
#ifdef __AVX512BF16__
  return (half_words)_mm512_cvtneps_pbh((__m512)x);
#else
  const words u = (words)x, r = u + 0x7fffu + ((u >> 16) & 1u);
  return __builtin_convertvector((words)(x != x ? (ints)(u | 0x400000u) : (ints)r) >> 16, half_words);
#endif
}
inline void to_half(const float* x, Half* out, int64_t size) {
  int64_t j = 0;
  for (; j + 16 <= size; j += 16) {
    const half_words v = halves(load(x + j));
    std::memcpy(static_cast<void*>(out + j), &v, sizeof v);
  }
  for (; j < size; ++j) out[j] = x[j];
}
// Two rows side by side, which is how two steps of a product's sum lie.
inline void interleave(const float* even, const float* odd, Half* out, int64_t size) {
  for (int64_t j = 0; j < size; j += 16) {
    const words v = __builtin_convertvector(halves(load(even + j)), words) |
                    __builtin_convertvector(halves(load(odd + j)), words) << 16;
    std::memcpy(static_cast<void*>(out + 2 * j), &v, sizeof v);
  }
}

// Rows of a matrix in bf16.
struct Rows {
  const Half* at;
  int64_t count, stride, width;
};
// x as a first factor, (count, padded), times a power of two.
void pack_first(Rows x, int64_t padded, float factor, Half* out) {
  for (int64_t i = 0; i < x.count; ++i)
    for (int64_t d = 0; d < x.width; ++d)
      out[i * padded + d] = factor == 1 ? x.at[i * x.stride + d] : Half(float(x.at[i * x.stride + d]) * factor);
}
// The transpose of x as a first factor, (width, ROWS).
void pack_first_transposed(Rows x, Half* out) {
  for (int64_t i = 0; i < x.count; ++i)
    for (int64_t d = 0; d < x.width; ++d) out[d * ROWS + i] = x.at[i * x.stride + d];
}
// x as a second factor, (count / 2, width, 2).
void pack_second(Rows x, Half* out) {
  for (int64_t i = 0; i < x.count; ++i)
    for (int64_t d = 0; d < x.width; ++d) out[(i / 2 * x.width + d) * 2 + i % 2] = x.at[i * x.stride + d];
}
// The transpose of x as a second factor, (width / 2, KEYS, 2).
void pack_second_transposed(Rows x, Half* out) {
  for (int64_t i = 0; i < x.count; ++i)
    for (int64_t d = 0; d < x.width; ++d) out[(d / 2 * KEYS + i) * 2 + d % 2] = x.at[i * x.stride + d];
}

// Splits the scaling: bf16 holds the power of two exactly, and the rest is left for the scores.
float power_of_two(Call<float, Half>& c) {
  int exponent = 0;
  std::frexp(c.scaling, &exponent);
  const float power = c.scaling == 0 ? 1.f : std::ldexp(1.f, exponent - 1);
  c.rest = c.scaling / power;
  return power;
}

// Of the forward pass: keys and values are packed once, for all queries.
struct Packed {
  static constexpr bool WHOLE_TILES = true;
  using Held = Half;

  explicit Packed(Call<float, Half>& call)
      : c(call), power(power_of_two(call)), padded(rounded_up(c.width, 32)), tiles(rounded_up(c.keys, KEYS) / KEYS) {
    const int64_t count = c.batch * c.kv_heads * tiles;
    const auto options = at::TensorOptions(at::kBFloat16);
    keys = at::zeros({count, padded, KEYS}, options), values = at::zeros({count, KEYS, c.value_width}, options);
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t k0 = t % tiles * KEYS, rows = std::min(KEYS, c.keys - k0);
        const int64_t b = t / tiles / c.kv_heads, kv = t / tiles % c.kv_heads;
        const Half *key = c.k + b * c.k_batch + kv * c.k_head, *value = c.v + b * c.v_batch + kv * c.v_head;
        pack_second_transposed({key + k0 * c.k_row, rows, c.k_row, c.width}, keys[t].data_ptr<Half>());
        pack_second({value + k0 * c.v_row, rows, c.v_row, c.value_width}, values[t].data_ptr<Half>());
      }
    });
  }

  int64_t tile(int64_t b, int64_t h, int64_t k0) const {
    return (b * c.kv_heads + c.owner[h]) * tiles + k0 / KEYS;
  }

  void begin(Scratch<float>& x, int64_t b, int64_t h, int64_t i0, int64_t rows) const {
    x.first.assign(ROWS * padded, 0), x.second.resize(ROWS * KEYS);
    pack_first({c.query(b, h) + i0 * c.q_row, rows, c.q_row, c.width}, padded, power, x.first.data());
  }

  void scores(Scratch<float>& x, int64_t b, int64_t h, int64_t, int64_t rows, int64_t k0, int64_t) const {
    blas::brgemm(rounded_up(rows, 16), KEYS, padded, padded, KEYS, KEYS, false, x.first.data(),
                 keys.data_ptr<Half>() + tile(b, h, k0) * padded * KEYS, x.scores.data());
  }

  // Takes over the weights of a row.
  void weighed(Scratch<float>& x, int64_t row) const {
    to_half(x.scores.data() + row * KEYS, x.second.data() + row * KEYS, KEYS);
  }

  void add_values(Scratch<float>& x, int64_t b, int64_t h, int64_t rows, int64_t k0, int64_t) const {
    const int64_t wide = c.value_width;
    blas::brgemm(rounded_up(rows, 16), wide, KEYS, KEYS, wide, wide, true, x.second.data(),
                 values.data_ptr<Half>() + tile(b, h, k0) * KEYS * wide, x.out.data());
  }

  void end() const { blas::brgemm_release(); }

  const Call<float, Half>& c;
  const float power;
  const int64_t padded, tiles;
  Tensor keys, values;
};

// Of the backward pass. The gradients of keys and values are summed transposed, so that the weights, of which there are
// most, need not be.
struct PackedBackward {
  static constexpr bool WHOLE_TILES = true;
  using Held = Half;

  PackedBackward(Call<float, Half>& call, const Tensor& grad)
      : c(call), power(power_of_two(call)), padded(rounded_up(c.width, 32)), wide(rounded_up(c.value_width, 32)),
        dq(at::empty({c.batch, c.queries, c.heads, c.width}, grad.options())),
        dk(at::zeros({c.batch, c.heads, c.keys, c.width}, grad.options())),
        dv(at::zeros({c.batch, c.heads, c.keys, c.value_width}, grad.options())), grad(grad) {}

  struct Head {
    const PackedBackward& all;
    Scratch<float>& x;
    const int64_t b, h, blocks, q_size, g_size;
    // Of all queries, block by block: as first factors, and transposed; of one tile: keys both ways, values transposed.
    std::vector<Half> q, q_turned, g, g_turned, k, k_turned, v_turned, ds, ds_pairs, w_pairs;
    std::vector<float> dq, dk, dv;

    Head(const PackedBackward& all, Scratch<float>& x, int64_t b, int64_t h)
        : all(all), x(x), b(b), h(h), blocks(rounded_up(all.c.queries, ROWS) / ROWS), q_size(ROWS * all.padded),
          g_size(ROWS * all.wide), q(blocks * q_size), q_turned(blocks * q_size), g(blocks * g_size),
          g_turned(blocks * g_size), k(KEYS * all.c.width), k_turned(KEYS * all.padded), v_turned(KEYS * all.wide),
          ds(ROWS * KEYS), ds_pairs(ROWS * KEYS), w_pairs(ROWS * KEYS), dq(blocks * ROWS * all.c.width),
          dk(KEYS * all.c.width), dv(KEYS * all.c.value_width) {
      const Call<float, Half>& c = all.c;
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t i0 = block * ROWS, rows = std::min(ROWS, c.queries - i0);
        const Rows own{c.query(b, h) + i0 * c.q_row, rows, c.q_row, c.width};
        const Rows up{all.grad.const_data_ptr<Half>() + b * all.grad.stride(0) + h * all.grad.stride(1) +
                          i0 * all.grad.stride(2),
                      rows, all.grad.stride(2), c.value_width};
        pack_first(own, all.padded, all.power, q.data() + block * q_size);
        pack_first_transposed(own, q_turned.data() + block * q_size);
        pack_first(up, all.wide, 1, g.data() + block * g_size);
        pack_first_transposed(up, g_turned.data() + block * g_size);
      }
    }

    void begin(int64_t k0, int64_t k1) {
      const Call<float, Half>& c = all.c;
      for (auto* buffer : {&k, &k_turned, &v_turned}) std::fill(buffer->begin(), buffer->end(), Half(0));
      std::fill(dk.begin(), dk.end(), 0.f), std::fill(dv.begin(), dv.end(), 0.f);
      const Rows keys{c.key(b, h) + k0 * c.k_row, k1 - k0, c.k_row, c.width};
      pack_second(keys, k.data()), pack_second_transposed(keys, k_turned.data());
      pack_second_transposed({c.value(b, h) + k0 * c.v_row, k1 - k0, c.v_row, c.value_width}, v_turned.data());
    }

    void scores(int64_t i0, int64_t rows, int64_t, int64_t) {
      const int64_t block = i0 / ROWS, m = rounded_up(rows, 16);
      blas::brgemm(m, KEYS, all.padded, all.padded, KEYS, KEYS, false, q.data() + block * q_size, k_turned.data(),
                   x.scores.data());
      blas::brgemm(m, KEYS, all.wide, all.wide, KEYS, KEYS, false, g.data() + block * g_size, v_turned.data(),
                   x.dots.data());
    }

    void accumulate(int64_t i0, int64_t rows, int64_t, int64_t) {
      const Call<float, Half>& c = all.c;
      const int64_t block = i0 / ROWS, m = rounded_up(rows, 32);
      std::fill(x.weights.begin() + rows * KEYS, x.weights.begin() + m * KEYS, 0.f);
      std::fill(x.dots.begin() + rows * KEYS, x.dots.begin() + m * KEYS, 0.f);
      for (int64_t r = 0; r < m; r += 2) {
        const float *w = x.weights.data() + r * KEYS, *s = x.dots.data() + r * KEYS;
        interleave(w, w + KEYS, w_pairs.data() + r * KEYS, KEYS);
        interleave(s, s + KEYS, ds_pairs.data() + r * KEYS, KEYS);
        to_half(s, ds.data() + r * KEYS, 2 * KEYS);
      }
      blas::brgemm(c.value_width, KEYS, m, ROWS, KEYS, KEYS, true, g_turned.data() + block * g_size, w_pairs.data(),
                   dv.data());
      blas::brgemm(c.width, KEYS, m, ROWS, KEYS, KEYS, true, q_turned.data() + block * q_size, ds_pairs.data(),
                   dk.data());
      blas::brgemm(m, c.width, KEYS, KEYS, c.width, c.width, true, ds.data(), k.data(), dq.data() + i0 * c.width);
    }

    void end_tile(int64_t k0, int64_t k1) {
      turn_back(dk.data(), all.c.width, k1 - k0, all.c.scaling,
                all.dk.data_ptr<Half>() + (b * all.c.heads + h) * all.dk.stride(1) + k0 * all.c.width);
      turn_back(dv.data(), all.c.value_width, k1 - k0, 1,
                all.dv.data_ptr<Half>() + (b * all.c.heads + h) * all.dv.stride(1) + k0 * all.c.value_width);
    }

    static void turn_back(const float* x, int64_t width, int64_t rows, float factor, Half* out) {
      for (int64_t j = 0; j < rows; ++j)
        for (int64_t d = 0; d < width; ++d) out[j * width + d] = x[d * KEYS + j] * factor;
    }

    void end() {
      Half* out = all.dq.data_ptr<Half>() + b * all.dq.stride(0) + h * all.dq.stride(2);
      for (int64_t i = 0; i < all.c.queries; ++i)
        for (int64_t d = 0; d < all.c.width; ++d)
          out[i * all.dq.stride(1) + d] = dq[i * all.c.width + d] * all.c.scaling;
      blas::brgemm_release();
    }
  };

  const Call<float, Half>& c;
  const float power;
  const int64_t padded, wide;
  const Tensor dq, dk, dv, grad;
};

}  // namespace
